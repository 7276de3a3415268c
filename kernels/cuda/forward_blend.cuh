// Sums of corners wherever samples are gathered, in the arithmetic of each storage type.
#pragma once

#include "forward_far.cuh"

namespace dcngen::window {

// Weights of the four corners of a sample, and the sum over them of 16 bytes of channels.
template <typename T>
struct Blend;

// Weights rounded to the storage type as those of the stencils are.
template <typename T>
struct PairWeights {
  static constexpr int VALUES = 8, WORDS = 2;  // channels of a lane, words that hold a sample's weights
  static __device__ __forceinline__ void pack(uint32_t (&words)[2], const float (&w)[4]) {
    words[0] = Dtype<T>::pack(w[0], w[1]);
    words[1] = Dtype<T>::pack(w[2], w[3]);
  }
};

// One sample in pairs of halves; samples are added in fp32.
template <>
struct Blend<__half> : PairWeights<__half> {
  static __device__ __forceinline__ __half2 half2(uint32_t word) { return *reinterpret_cast<const __half2*>(&word); }
  static __device__ __forceinline__ void add(float (&sum)[8], const uint32_t (&w)[2], const uint4 (&v)[4]) {
    const __half2 upper = half2(w[0]), lower = half2(w[1]);
    const uint32_t corners[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w},
                                    {v[1].x, v[1].y, v[1].z, v[1].w},
                                    {v[2].x, v[2].y, v[2].z, v[2].w},
                                    {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      __half2 s = __hmul2(__low2half2(upper), half2(corners[0][i]));
      s = __hfma2(__high2half2(upper), half2(corners[1][i]), s);
      s = __hfma2(__low2half2(lower), half2(corners[2][i]), s);
      s = __hfma2(__high2half2(lower), half2(corners[3][i]), s);
      sum[2 * i] += __low2float(s);
      sum[2 * i + 1] += __high2float(s);
    }
  }
};

// bf16 has too few bits for sums of corners: fp32.
template <>
struct Blend<__nv_bfloat16> : PairWeights<__nv_bfloat16> {
  static __device__ __forceinline__ void add(float (&sum)[8], const uint32_t (&w)[2], const uint4 (&v)[4]) {
    using D = Dtype<__nv_bfloat16>;
    const float weights[4] = {D::low(w[0]), D::high(w[0]), D::low(w[1]), D::high(w[1])};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const uint32_t words[4] = {v[corner].x, v[corner].y, v[corner].z, v[corner].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] = fmaf(weights[corner], D::low(words[i]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(weights[corner], D::high(words[i]), sum[2 * i + 1]);
      }
    }
  }
};

template <>
struct Blend<float> {
  static constexpr int VALUES = 4, WORDS = 4;
  static __device__ __forceinline__ void pack(uint32_t (&words)[4], const float (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(w[i]);
  }
  static __device__ __forceinline__ void add(float (&sum)[4], const uint32_t (&w)[4], const uint4 (&v)[4]) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const uint32_t words[4] = {v[corner].x, v[corner].y, v[corner].z, v[corner].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(__uint_as_float(w[corner]), __uint_as_float(words[i]), sum[i]);
    }
  }
};

template <typename T>
__device__ __forceinline__ uint4 pack_result(const float (&v)[Blend<T>::VALUES]) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  } else {
    using D = Dtype<T>;
    return make_uint4(D::pack(v[0], v[1]), D::pack(v[2], v[3]), D::pack(v[4], v[5]), D::pack(v[6], v[7]));
  }
}

// 16 bytes of channels of one pixel, its nine samples gathered from memory in the gather kernel's arithmetic. `values`
// is the first of the (pixel, group)'s offsets in shared memory, `image` the channels in pixel 0, (x, y) the pixel.
template <typename T>
__device__ __forceinline__ uint4 gather_samples(const FarContext& c, const uint4* image, uint32_t values, int x, int y) {
  float sums[Blend<T>::VALUES] = {};
#pragma unroll 3
  for (int k = 0; k < kTaps; ++k) {
    const Corners corners = corners_of_tap<T>(c, x, y, k, values);
    uint4 read[4] = {};  // finite where the sample does not count
    corners.load(read, c, image);
    uint32_t weights[Blend<T>::WORDS];
    Blend<T>::pack(weights, corners.weight);
    Blend<T>::add(sums, weights, read);
  }
  return pack_result<T>(sums);
}

}  // namespace dcngen::window
