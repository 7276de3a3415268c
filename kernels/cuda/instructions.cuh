// Types and single instructions: the order of kernels, halves in pairs, asynchronous copies, 16-byte accesses, matrix
// fragments and products. Those of the copy engine are in copy_engine.cuh, of a warpgroup in warpgroup.cuh.
// All shared-memory addresses are 32-bit shared-space addresses (smem_address).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dcngen::window {

constexpr unsigned kAllLanes = 0xffffffffu;

// --------------------------------------------------------------------------------------------------- order of kernels

// For kernels that follow one another closely (launch in launch.h; nothing before sm_90). The next kernel's blocks may
// take their places once all of this one's have theirs.
__device__ __forceinline__ void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernel before this one in the stream has ended and its results can be read.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------- dtype traits

// Two 16-bit values in a 32-bit word (low half first), and the tensor-core product for T = __half, __nv_bfloat16.
template <typename T>
struct Dtype;

template <>
struct Dtype<__half> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static __device__ __forceinline__ float low(uint32_t word) {
    return __low2float(*reinterpret_cast<const __half2*>(&word));
  }
  static __device__ __forceinline__ float high(uint32_t word) {
    return __high2float(*reinterpret_cast<const __half2*>(&word));
  }
  // max(a, |b|) of both halves; NaN wins.
  static __device__ __forceinline__ uint32_t max_abs(uint32_t a, uint32_t b) {
    const __half2 v =
        __hmax2_nan(*reinterpret_cast<const __half2*>(&a), __habs2(*reinterpret_cast<const __half2*>(&b)));
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  // d += a (16 x 16, rows) * b (16 x 8, columns).
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Dtype<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static __device__ __forceinline__ float low(uint32_t word) { return __uint_as_float(word << 16); }
  static __device__ __forceinline__ float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  static __device__ __forceinline__ uint32_t max_abs(uint32_t a, uint32_t b) {
    const __nv_bfloat162 v = __hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                         __habs2(*reinterpret_cast<const __nv_bfloat162*>(&b)));
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// --------------------------------------------------------------------------------- memory and tensor-core instructions

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, zeros instead where !valid (then `from` is not read).
__device__ __forceinline__ void copy_async16(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint16_t load_shared2(uint32_t from) {
  uint16_t v;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}
// Where `counts`; leaves v as it is elsewhere.
__device__ __forceinline__ void load_shared_if(bool counts, float& v, uint32_t from) {
  asm volatile(
      "{\n"
      ".reg .pred counts;\n"
      "setp.ne.b32 counts, %2, 0;\n"
      "@counts ld.shared.f32 %0, [%1];\n"
      "}\n"
      : "+f"(v)
      : "r"(from), "r"(static_cast<int>(counts))
      : "memory");
}
__device__ __forceinline__ uint4 load_shared16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
// A read of the input where `counts`; leaves v as it is elsewhere. Volatile, so that the compiler issues several before it
// uses the first.
__device__ __forceinline__ void load_global16_if(bool counts, uint4& v, const void* from) {
  asm volatile(
      "{\n"
      ".reg .pred counts;\n"
      "setp.ne.b32 counts, %5, 0;\n"
      "@counts ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4];\n"
      "}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<int>(counts)));
}
// A volatile 16-byte store: the compiler splits a plain one where it cannot see the alignment.
__device__ __forceinline__ void store_global16(void* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// The lower half of v.
__device__ __forceinline__ void store_shared2(uint32_t to, uint32_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(static_cast<uint16_t>(v)) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared8(uint32_t to, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ float4 load_shared16f(uint32_t from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared16(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The other way for MATRICES = 2 or 4 of them: register i of the fragments goes to matrix i.
template <int MATRICES>
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&r)[MATRICES]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (MATRICES == 4) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    static_assert(MATRICES == 2, "");
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(row), "r"(r[0]), "r"(r[1]) : "memory");
  }
#else
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < MATRICES; ++i) {  // the row that this lane's register belongs to is known by another lane
    store_shared(__shfl_sync(kAllLanes, row, i * 8 + lane / 4) + (lane & 3) * 4, r[i]);
  }
#endif
}

}  // namespace dcngen::window
