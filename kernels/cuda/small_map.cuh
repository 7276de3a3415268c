// Maps of at most 4x4 pixels (whole_map.cuh): what the forward and the backward share. A warp takes one image and pair:
// lane l is pixel l % 16 of the output and group l / 16 of the pair. Warps do not wait for one another.
#pragma once

#include "whole_map.cuh"

namespace dcngen::small_map {

using namespace whole_map;

constexpr int kSide = 4, kPixels = kSide * kSide;
constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a block
constexpr int kTapsBytes = kPixels * PairSpan::PITCH;

template <int D>
using Tile = PairTile<D, kPixels>;
using OwnWeights = Weights<kSide>;
constexpr int kWeightsBytes = 32 * OwnWeights::PITCH;  // a row a lane

inline int64_t blocks(const Problem& p) { return (int64_t{p.tasks} + kWarps - 1) / kWarps; }

// Writes the pair's channels of an image from shared memory.
template <int D>
__device__ __forceinline__ void write_pixels(void* tensor, int64_t stride, int height, int width, uint32_t tile,
                                             const Problem& p, const Task& task, int lane) {
  constexpr int CHUNKS = Tile<D>::CHUNKS, STEP = 32 / CHUNKS;
  const int chunk = lane % CHUNKS, first = lane / CHUNKS, byte = task.pair * 4 * D + 16 * chunk;
  char* const image = static_cast<char*>(tensor) + task.image * height * width * stride + byte;
  const uint32_t own = tile + first * Tile<D>::PITCH + 16 * chunk;
  for_pixels<kSide, STEP, kPixels, false>(first, height, width, stride, [&](int i, bool inside, int64_t bytes) {
    const uint4 v = window::load_shared16(own + i * STEP * Tile<D>::PITCH);
    if (inside && byte < p.channel_bytes) window::store_global16(image + bytes, v);
  });
}

// For every group of the pair: its 16 x 16 weights, or their transpose, times 16 pixels x D channels of `values`, rounded
// to the same place in `results`, which may be `values`.
template <typename T, int D, bool TRANSPOSED>
__device__ __forceinline__ void multiply_weights(uint32_t results, uint32_t rows, uint32_t values, int lane) {
  const uint32_t own = weight_fragments<kSide, TRANSPOSED>(rows, 0, lane);
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    uint32_t a[4];
    if constexpr (TRANSPOSED) {
      window::load_matrices_transposed(a, own + 16 * unit * OwnWeights::PITCH);
    } else {
      window::load_matrices(a, own + 16 * unit * OwnWeights::PITCH);
    }
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint32_t at = Tile<D>::matrices(0, unit * D + 16 * step, lane, true);
      uint32_t b[4];
      window::load_matrices_transposed(b, values + at);
      float c[2][4] = {};
      Dtype<T>::mma(c[0], a, b[0], b[1]);
      Dtype<T>::mma(c[1], a, b[2], b[3]);
      __syncwarp();  // these values have been read
      window::store_matrices<4>(results + at, {Dtype<T>::pack(c[0][0], c[0][1]), Dtype<T>::pack(c[0][2], c[0][3]),
                                               Dtype<T>::pack(c[1][0], c[1][1]), Dtype<T>::pack(c[1][2], c[1][3])});
    }
  }
  __syncwarp();
}

}  // namespace dcngen::small_map
