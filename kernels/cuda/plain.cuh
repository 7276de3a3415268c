// Shared parts of the plain kernels: any shape, any dtype, one thread per vector of channels.
// They are the yardstick for the window kernels and the path for every case those decline.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.h"

namespace dcngen {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T v[VEC];
};

template <int VEC, typename T>
__device__ __forceinline__ void load_vector(const T* from, float (&to)[VEC]) {
  const Pack<T, VEC> pack = *reinterpret_cast<const Pack<T, VEC>*>(from);
#pragma unroll
  for (int c = 0; c < VEC; ++c) to[c] = to_float(pack.v[c]);
}

template <int VEC, typename T>
__device__ __forceinline__ void store_vector(T* to, const float (&from)[VEC]) {
  Pack<T, VEC> pack;
#pragma unroll
  for (int c = 0; c < VEC; ++c) pack.v[c] = from_float<T>(from[c]);
  *reinterpret_cast<Pack<T, VEC>*>(to) = pack;
}

// The most channels one thread can move in one 16-byte access, given what all tensors' strides and D allow.
template <typename T>
inline int vector_width(const Params& p, const void* const* pointers, const int64_t* strides, int count) {
  for (int vec = 16 / static_cast<int>(sizeof(T)); vec > 1; vec /= 2) {
    bool fits = p.group_channels % vec == 0;
    for (int i = 0; i < count; ++i) {
      fits = fits && strides[i] % vec == 0 && reinterpret_cast<uintptr_t>(pointers[i]) % (vec * sizeof(T)) == 0;
    }
    if (fits) return vec;
  }
  return 1;
}

// One sampling place: the four corners' offsets in pixels from the image's first pixel, and the fractions.
struct Place {
  int corner[4];   // y0x0, y0x1, y1x0, y1x1; valid only where inside[] is set
  bool inside[4];  // the corner lies in the image
  float lx, ly;    // distance from the lower corner
  bool counts;     // -1 < x < width and -1 < y < height; false for NaN
};

// The sampling place of tap (i, j), i over width, for output (oh, ow): offset_scale multiplies grid and offset alike.
__device__ __forceinline__ Place place_of(const Params& p, int i, int j, int oh, int ow, float dx, float dy) {
  const int center_w = (p.dilation_w * (p.kernel_w - 1)) >> 1;
  const int center_h = (p.dilation_h * (p.kernel_h - 1)) >> 1;
  const float x = static_cast<float>(center_w - p.pad_w + ow * p.stride_w) +
                  p.offset_scale * (static_cast<float>(i * p.dilation_w - center_w) + dx);
  const float y = static_cast<float>(center_h - p.pad_h + oh * p.stride_h) +
                  p.offset_scale * (static_cast<float>(j * p.dilation_h - center_h) + dy);
  const int width = static_cast<int>(p.width_in), height = static_cast<int>(p.height_in);
  Place place;
  place.counts = x > -1.f && y > -1.f && x < static_cast<float>(width) && y < static_cast<float>(height);
  // Written with a select so that NaN and far places never reach the conversion to int.
  const float fx = place.counts ? floorf(x) : 0.f, fy = place.counts ? floorf(y) : 0.f;
  const int x0 = static_cast<int>(fx), y0 = static_cast<int>(fy);
  place.lx = place.counts ? x - fx : 0.f;
  place.ly = place.counts ? y - fy : 0.f;
  const bool left = x0 >= 0, right = x0 + 1 < width, top = y0 >= 0, bottom = y0 + 1 < height;
  place.inside[0] = place.counts && top && left;
  place.inside[1] = place.counts && top && right;
  place.inside[2] = place.counts && bottom && left;
  place.inside[3] = place.counts && bottom && right;
  place.corner[0] = y0 * width + x0;
  place.corner[1] = place.corner[0] + 1;
  place.corner[2] = place.corner[0] + width;
  place.corner[3] = place.corner[2] + 1;
  return place;
}

__device__ __forceinline__ void corner_weights(const Place& place, float (&w)[4]) {
  const float hx = 1.f - place.lx, hy = 1.f - place.ly;
  w[0] = hy * hx;
  w[1] = hy * place.lx;
  w[2] = place.ly * hx;
  w[3] = place.ly * place.lx;
}

__device__ __forceinline__ bool is_removed(const Params& p, int i, int j) {
  return p.remove_center && i == p.kernel_w / 2 && j == p.kernel_h / 2;
}

// Mask normalisation of one (pixel, group): weight_k = exp(m_k - shift) * scale for softmax, m_k otherwise.
struct MaskRule {
  float shift, scale;
  bool softmax;
  __device__ __forceinline__ float operator()(float m) const { return softmax ? expf(m - shift) * scale : m; }
};

template <typename T>
__device__ __forceinline__ MaskRule mask_rule(const Params& p, const T* masks, int count) {
  if (!p.softmax) return {0.f, 1.f, false};
  float top = -INFINITY, sum = 0.f;
  for (int k = 0; k < count; ++k) top = fmaxf(top, to_float(masks[k]));
  for (int k = 0; k < count; ++k) sum += expf(to_float(masks[k]) - top);
  return {top, 1.f / sum, true};
}

// Where output pixel `pixel` lies, and the first pixel of its image in the input.
struct OutputPixel {
  int oh, ow;
  int64_t image;
};

__device__ __forceinline__ OutputPixel locate(const Params& p, int64_t pixel) {
  const int64_t per_image = p.height_out * p.width_out;
  const int64_t n = pixel / per_image;
  const int rest = static_cast<int>(pixel - n * per_image);
  const int width = static_cast<int>(p.width_out);
  return {rest / width, rest % width, n * p.height_in * p.width_in};
}

constexpr int kThreads = 256;

inline unsigned blocks_for(int64_t work) {
  const int64_t blocks = (work + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < (int64_t{1} << 30) ? blocks : (int64_t{1} << 30));  // kernels stride the grid
}

}  // namespace dcngen
