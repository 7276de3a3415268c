// The backward on maps of at most 8x8 pixels: T, and the gradients of offsets and masks from it.
#pragma once

#include "backward_stencil.cuh"
#include "medium_map.cuh"
#include "whole_map_backward.cuh"

namespace dcngen::medium_map {

// A warp's T in shared memory, as floats: number of the input pixel, then the lane of the output pixel.
struct Products : ProductCells<kSide, 32 * 4, true> {
  template <typename T, int D>
  static __device__ __forceinline__ void compute(uint32_t to, uint32_t grad_output, uint32_t input, int unit, int half,
                                                 int lane) {
    uint32_t b[D / 16][2][4];  // of grad_output: 16 channels, 16 pixels
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t at = grad_output + (kHalf * half + 16 * n) * Tile<D>::PITCH;
        window::load_matrices(b[step][n], Tile<D>::matrices(at, unit * D + 16 * step, lane, false));
      }
    }
    const int x = lane >> 2;  // of the input pixels; eight output pixels are 32 bytes
    const uint32_t own = to + at(0, x) + 8 * (lane & 3);
#pragma unroll
    for (int m = 0; m < kPixels / 16; ++m) {
      float c[4][4] = {};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t a[4];
        window::load_matrices(a, Tile<D>::matrices(input + 16 * m * Tile<D>::PITCH, unit * D + 16 * step, lane, true));
#pragma unroll
        for (int n = 0; n < 4; ++n) Dtype<T>::mma(c[n], a, b[step][n >> 1][2 * (n & 1)], b[step][n >> 1][2 * (n & 1) + 1]);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t row = own + at(2 * m, -1) + 32 * ((n + x) & 3);
        window::store_shared8(row, __float_as_uint(c[n][0]), __float_as_uint(c[n][1]));
        window::store_shared8(row + at(1, -1), __float_as_uint(c[n][2]), __float_as_uint(c[n][3]));
      }
    }
    clear_edges(to + 4 * lane);
    __syncwarp();
  }
};

// The products of the lane's pixel with those around it, [0][0] with input pixel (x, y); 0 outside the map.
__device__ __forceinline__ void load_products(float (&products)[5][5], uint32_t own, int x, int y, int lane) {
  uint32_t column[5];
#pragma unroll
  for (int b = 0; b < 5; ++b) {
    const bool inside = static_cast<unsigned>(x + b) < kSide;
    const int first = inside ? Products::at(0, x + b) + Products::turn(lane, x + b) : Products::at(0, -1);  // zeros
    column[b] = own + first + Products::at(y, -1);
  }
#pragma unroll
  for (int a = 0; a < 5; ++a) {
    const bool inside = static_cast<unsigned>(y + a) < kSide;
#pragma unroll
    for (int b = 0; b < 5; ++b) {
      products[a][b] = 0.f;
      window::load_shared_if(inside, products[a][b], column[b] + Products::at(a, -1));
    }
  }
}

// The gradients of the 27 numbers of output pixel m, to `stage`, and its stencil, where all its samples are near.
template <typename T, typename P>
__device__ __forceinline__ void differentiate_near(float (&stencil)[5][5], uint32_t stage, const Taps& taps, uint32_t own,
                                                   const P& p, int m, int lane) {
  const int x = p.first_x + m % kSide, y = p.first_y + m / kSide;  // of the middle tap
  float products[5][5];
  load_products(products, own, x - 2, y - 2, lane);
  window::clear_stencil(stencil);
#pragma unroll
  for (int k = 0; k < window::kTaps; ++k) {
    const int i = k / 3, j = k % 3;
    const float2 d = {p.scale.displacement(Dtype<T>::low(taps.word[k]), i - 1),
                      p.scale.displacement(Dtype<T>::high(taps.word[k]), j - 1)};
    const float mask = taps.mask<T>(k), factor = p.scale.scale * mask;
    const float just_right = x + i == 0 ? __int_as_float(1) : 0.f, just_below = y + j == 0 ? __int_as_float(1) : 0.f;
    const backward::TapGradient of = backward::tap_gradient(products, i, j, d, just_right, just_below);
    TapGradient<Products>{factor * of.x, factor * of.y, of.mask}.template store<T>(stage, k);
    window::add_tap(stencil, i, j, d.x, d.y, mask);
  }
}

// The same and the whole row of W, wherever the samples lie.
template <typename T, typename P>
__device__ __forceinline__ void differentiate(OwnWeights& weights, uint32_t stage, const Taps& taps, uint32_t own,
                                              const P& p, int m, int lane) {
  const Anchor anchor = Anchor::of_pixel<kSide>(p, m);
#pragma unroll
  for (int k = 0; k < window::kTaps; ++k) {
    const Sample sample = anchor.sample<T>(taps, k);
    TapGradient<Products>::of<kSide>(sample, p.scale.scale, own, lane).template store<T>(stage, k);
    weights.add(sample);
  }
}

}  // namespace dcngen::medium_map
