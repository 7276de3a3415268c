// Maps of at most 8x8 pixels (whole_map.cuh): what the forward and the backward share. A block takes one image and pair;
// warp w has group w % 2 of the pair and "half" w / 2 of the output: lane l is pixel 32 * half + l.
#pragma once

#include "whole_map.cuh"

namespace dcngen::medium_map {

using namespace whole_map;

constexpr int kSide = 8, kPixels = kSide * kSide, kHalf = 32;
constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a block
constexpr int kTapsBytes = kPixels * PairSpan::PITCH;

template <int D>
using Tile = PairTile<D, kPixels>;
using OwnWeights = Weights<kSide>;
constexpr int kWeightsBytes = kHalf * OwnWeights::PITCH;  // of a warp, a row a lane

// Whether a map has pixels in a half.
__device__ __forceinline__ bool has_half(int half, int height) { return half * (kHalf / kSide) < height; }

// Sums of 32 pixels x D channels as fragments: c[16 pixels][8 channels].
template <int D>
using HalfSums = float[2][D / 8][4];

// Adds a (16 rows of `left`: two of 16 pixels each) times 16 pixels x D channels of `values` from channel `first` on.
template <typename T, int D>
__device__ __forceinline__ void add_products(HalfSums<D>& c, const uint32_t (&a)[2][4], uint32_t values, int first,
                                             int lane) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t b[4];
    window::load_matrices_transposed(b, Tile<D>::matrices(values, first + 16 * step, lane, true));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      Dtype<T>::mma(c[m][2 * step], a[m], b[0], b[1]);
      Dtype<T>::mma(c[m][2 * step + 1], a[m], b[2], b[3]);
    }
  }
}

// Rounds the sums to rows of shared memory, PITCH bytes apart.
template <typename T, int D, int PITCH>
__device__ __forceinline__ void store_sums(uint32_t rows, const HalfSums<D>& c, int lane) {
  const uint32_t at = rows + ((lane & 7) + 8 * (lane >> 3 & 1)) * PITCH + 16 * (lane >> 4);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const auto &low = c[m][2 * step], &high = c[m][2 * step + 1];
      window::store_matrices<4>(at + 16 * m * PITCH + 32 * step,
                                {Dtype<T>::pack(low[0], low[1]), Dtype<T>::pack(low[2], low[3]),
                                 Dtype<T>::pack(high[0], high[1]), Dtype<T>::pack(high[2], high[3])});
    }
  }
}

// Writes a half's pixels of one group from rows of shared memory, PITCH bytes apart.
template <int D, int PITCH, bool FULL>
__device__ __forceinline__ void write_half(void* tensor, int64_t stride, int height, int width, uint32_t rows,
                                           const Task& task, int unit, int half, int lane) {
  constexpr int CHUNKS = D / 8, STEP = 32 / CHUNKS;
  const int chunk = lane % CHUNKS, first = lane / CHUNKS, group = 2 * task.pair + unit;
  char* const image = static_cast<char*>(tensor) + task.image * height * width * stride + group * 2 * D + 16 * chunk;
  const uint32_t own = rows + first * PITCH + 16 * chunk;
  const auto write = [&](int i, bool inside, int64_t bytes) {
    const uint4 v = window::load_shared16(own + i * STEP * PITCH);
    if (inside) window::store_global16(image + bytes, v);
  };
  for_pixels<kSide, STEP, kHalf, FULL>(kHalf * half + first, height, width, stride, write);
}

}  // namespace dcngen::medium_map
