// What the window backward needs beyond instructions.cuh: reductions (sm_90 and later) and the far samples' channels.
#pragma once

#include "copy_engine.cuh"
#include "window.cuh"

namespace dcngen::backward {

// What the dtypes add to window::Dtype. For the far samples: a lane, one of LANES, takes eight channels of a
// group, in pieces of 16 bytes (kPiece values) next to those of its neighbours: their reductions fill whole sectors.
template <typename T>
struct HalfTraits;

template <typename T>
struct HalfVectors : window::Dtype<T> {
  using Base = window::Dtype<T>;
  static constexpr int kPiece = 8;
  template <int LANES>
  static __device__ __forceinline__ void load_share(float (&to)[8], const T* from) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) to[2 * i] = Base::low(words[i]), to[2 * i + 1] = Base::high(words[i]);
  }
  static __device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
    return Base::pack(Base::low(a) + Base::low(b), Base::high(a) + Base::high(b));
  }
};

template <>
struct HalfTraits<__half> : HalfVectors<__half> {
  static constexpr uint32_t kOne = 0x3c00u;
  static __device__ __forceinline__ void reduce_add(__half* to, uint4 v) {
    asm volatile("red.global.add.noftz.v4.f16x2 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  }
  template <int LANES>
  static __device__ __forceinline__ void reduce_share(__half* to, const float (&v)[8]) {
    reduce_add(to, make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])));
  }
};

template <>
struct HalfTraits<__nv_bfloat16> : HalfVectors<__nv_bfloat16> {
  static constexpr uint32_t kOne = 0x3f80u;
  static __device__ __forceinline__ void reduce_add(__nv_bfloat16* to, uint4 v) {
    asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  }
  template <int LANES>
  static __device__ __forceinline__ void reduce_share(__nv_bfloat16* to, const float (&v)[8]) {
    reduce_add(to, make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])));
  }
};

// float: only what the far samples need; its tiles have a kernel of their own.
template <>
struct HalfTraits<float> {
  static constexpr int kPiece = 4;
  template <int LANES>
  static __device__ __forceinline__ void load_share(float (&to)[8], const float* from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(from) + i * LANES);
      to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
  }
  template <int LANES>
  static __device__ __forceinline__ void reduce_share(float* to, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to + 4 * i * LANES), "f"(v[4 * i]),
                   "f"(v[4 * i + 1]), "f"(v[4 * i + 2]), "f"(v[4 * i + 3])
                   : "memory");
    }
  }
};

template <bool TRANSPOSED>
__device__ __forceinline__ void load_fragments(uint32_t (&r)[4], uint32_t address) {
  if constexpr (TRANSPOSED) {
    window::load_matrices_transposed(r, address);
  } else {
    window::load_matrices(r, address);
  }
}

}  // namespace dcngen::backward
