// The gradients' sums over all pixels, of the backward on maps of at most 8x8 pixels. In a block the warps leave theirs in
// shared memory: floats, first of the pair's numbers of offset_mask, then of the channels of the warp's group.
#pragma once

#include "medium_map.cuh"
#include "whole_map_backward.cuh"

namespace dcngen::medium_map {

template <int D>
constexpr int kSumRow = kPairNumbers + 2 * D;  // of a block
template <int D>
constexpr int kWarpSumBytes = 4 * (kPairNumbers + D);

// The warp's share of the staged numbers: every fourth pixel. A lane has a word of the pair's, two numbers.
template <typename T, typename P>
__device__ __forceinline__ void sum_numbers(uint32_t to, uint32_t stage, const P& p, int warp, int lane) {
  if (lane >= kPairNumbers / 2) return;
  float low = 0.f, high = 0.f;
  const uint32_t from = stage + warp * kNumbersPitch + 4 * lane;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!has_half(half, p.height_out)) break;  // nothing is staged
#pragma unroll
    for (int m = kHalf * half; m < kHalf * half + kHalf; m += kWarps) {
      const uint32_t word = window::load_shared(from + m * kNumbersPitch);
      low += Dtype<T>::low(word), high += Dtype<T>::high(word);
    }
  }
  window::store_shared8(to + 8 * lane, __float_as_uint(low), __float_as_uint(high));
}

// Of the warp's half of its group's input gradient, in rows of shared memory PITCH bytes apart. A lane has a word of the
// channels, two of them, of every PARTS-th pixel.
template <typename T, int D, int PITCH, typename P>
__device__ __forceinline__ void sum_channels(uint32_t to, uint32_t rows, const P& p, int half, int lane) {
  constexpr int WORDS = D / 2, PARTS = 32 / WORDS;
  const int word = lane % WORDS, part = lane / WORDS;
  float low = 0.f, high = 0.f;
#pragma unroll
  for (int i = 0; i < kHalf; i += PARTS) {
    const int m = i + part;
    const uint32_t both = window::load_shared(rows + m * PITCH + 4 * word);
    const bool inside = P::FULL || pixel_at<kSide>(kHalf * half + m, p.height_in, p.width_in) >= 0;
    low += inside ? Dtype<T>::low(both) : 0.f, high += inside ? Dtype<T>::high(both) : 0.f;
  }
#pragma unroll
  for (int step = WORDS; step < 32; step *= 2) {
    low += __shfl_xor_sync(window::kAllLanes, low, step);
    high += __shfl_xor_sync(window::kAllLanes, high, step);
  }
  if (part == 0) {
    window::store_shared8(to + 4 * kPairNumbers + 8 * word, __float_as_uint(low), __float_as_uint(high));
  }
}

// The block's row: the warps' sums, `pitch` bytes apart, added in a fixed order. What belongs to a group that there is not
// is of no use.
template <int D, typename P>
__device__ __forceinline__ void add_sums(float* row, uint32_t sums, int pitch, const P& p, int thread) {
  const auto load = [&](int warp, int column) {
    return __uint_as_float(window::load_shared(sums + warp * pitch + 4 * column));
  };
#pragma unroll
  for (int i = 0; i < kSumRow<D>; i += kThreads) {
    const int column = i + thread;
    if (column < kPairNumbers) {
      row[column] = load(0, column) + load(1, column) + (load(2, column) + load(3, column));
    } else if (column < kSumRow<D>) {
      const int unit = (column - kPairNumbers) / D, at = kPairNumbers + (column - kPairNumbers) % D;
      row[column] = load(unit, at) + (has_half(1, p.height_in) ? load(2 + unit, at) : 0.f);
    }
  }
}

constexpr int kSumWarps = 32, kSumBytes = kSumWarps * 32 * 4;

// Adds up the blocks' rows, `columns` numbers an image: a block has 32 columns, a warp every 32nd image. To `to`: the
// sums of all channels of grad_offset_mask, 0 behind the last group's, then those of grad_input.
template <int D>
__global__ void __launch_bounds__(32 * kSumWarps)
    sum_kernel(const float* rows, float* to, int columns, int images, int groups, int offset_mask_channels) {
  extern __shared__ __align__(16) uint8_t memory[];
  window::wait_for_previous_kernel();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = 32 * blockIdx.x + lane;
  const uint32_t sums = window::smem_address(memory);
  float sum = 0.f;
  if (column < columns) {
    const float* from = rows + int64_t{warp} * columns + column;
#pragma unroll 8
    for (int image = warp; image < images; image += kSumWarps, from += int64_t{kSumWarps} * columns) sum += *from;
  }
  window::store_shared(sums + 4 * (32 * warp + lane), __float_as_uint(sum));
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int i = 27 * groups + threadIdx.x; i < offset_mask_channels; i += 32 * kSumWarps) to[i] = 0.f;
  }
  if (warp > 0 || column >= columns) return;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kSumWarps; ++w) total += __uint_as_float(window::load_shared(sums + 4 * (32 * w + lane)));
  const int pair = column / kSumRow<D>, in_row = column % kSumRow<D>, channel = in_row - kPairNumbers;
  if (in_row < kPairNumbers) {
    const int number = kPairNumbers * pair + in_row;
    if (number < window::kGroupValues * groups) to[number] = total;
  } else if (2 * pair + channel / D < groups) {
    to[offset_mask_channels + 2 * D * pair + channel] = total;
  }
}

}  // namespace dcngen::medium_map
