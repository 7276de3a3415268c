// Products of a warpgroup (four warps, 64 rows), which sm_90a alone has.
#pragma once

#include <type_traits>

#include "instructions.cuh"

namespace dcngen::window {

__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// A right operand in shared memory, k along rows of 128 bytes that are permuted as the copy engine does, a row a column
// of the result. `address` may begin within a row, at a multiple of 32 bytes.
__device__ __forceinline__ uint64_t right_operand(uint32_t address) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// d (64 rows, fragments of 16 a warp) += a (64 x 16, likewise) * b (16 columns of k), with 64 or 128 columns. After the
// operands: a predicate, true to add to d; the signs of a and b; b lies k-major.
#define DCNGEN_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define DCNGEN_SUMS_8(j) \
  DCNGEN_SUMS(j), DCNGEN_SUMS(j + 1), DCNGEN_SUMS(j + 2), DCNGEN_SUMS(j + 3), DCNGEN_SUMS(j + 4), DCNGEN_SUMS(j + 5), \
      DCNGEN_SUMS(j + 6), DCNGEN_SUMS(j + 7)
#define DCNGEN_WARPGROUP_MMA_64(KIND) \
  asm volatile( \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." KIND "." KIND " {" \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" \
      "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;" \
      : DCNGEN_SUMS_8(0) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define DCNGEN_WARPGROUP_MMA_128(KIND) \
  asm volatile( \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." KIND "." KIND " {" \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63" \
      "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;" \
      : DCNGEN_SUMS_8(0), DCNGEN_SUMS_8(8) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <typename T>
__device__ __forceinline__ void warpgroup_mma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    DCNGEN_WARPGROUP_MMA_64("f16");
  } else {
    DCNGEN_WARPGROUP_MMA_64("bf16");
  }
}
template <typename T>
__device__ __forceinline__ void warpgroup_mma(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    DCNGEN_WARPGROUP_MMA_128("f16");
  } else {
    DCNGEN_WARPGROUP_MMA_128("bf16");
  }
}
#undef DCNGEN_WARPGROUP_MMA_64
#undef DCNGEN_WARPGROUP_MMA_128
#undef DCNGEN_SUMS_8
#undef DCNGEN_SUMS

// The four warps of a warpgroup meet.
__device__ __forceinline__ void warpgroup_barrier(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

}  // namespace dcngen::window
