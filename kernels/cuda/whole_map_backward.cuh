// Maps taken whole for the window (whole_map.cuh): what the backward alone needs. T in shared memory, the gradients of
// offsets and masks from it, and how these are written.
#pragma once

#include "whole_map.cuh"

namespace dcngen::whole_map {

// A lane's column of T in shared memory, floats, PITCH bytes from cell to cell: the input pixels, one cell of zeros before
// every row and one behind the last, and then one more. So the pixels left and right of a row are zeros, and kNothing is
// the first of two such cells.
// Where TURNED, a cell is 32 numbers without a gap, and the lanes' places go round by eight from pixel to pixel of a row,
// so that eight bytes of eight pixels lie in different banks.
template <int SIDE, int PITCH_, bool TURNED = false>
struct ProductCells {
  static constexpr int PITCH = PITCH_, kNothing = (SIDE + 1) * SIDE * PITCH, BYTES = kNothing + 2 * PITCH;
  static_assert(!TURNED || PITCH == 32 * 4, "a cell is a round");
  static __device__ __forceinline__ constexpr int at(int y, int x) { return ((SIDE + 1) * y + 1 + x) * PITCH; }
  // The lane's place in the cells of pixels x, behind `column`: 0 where the column is the lane's own.
  static __device__ __forceinline__ int turn(int lane, int x) {
    return TURNED ? (4 * lane + 32 * x) & (PITCH - 1) : 0;
  }
  static __device__ __forceinline__ int next(int turn) { return TURNED ? (turn + 32) & (PITCH - 1) : 0; }
  // By the lanes of the columns, before T is read.
  static __device__ __forceinline__ void clear_edges(uint32_t column) {
#pragma unroll
    for (int y = 0; y <= SIDE; ++y) window::store_shared(column + at(y, -1), 0);
    window::store_shared(column + kNothing + PITCH, 0);
  }
};

// The gradients of a tap's offsets and mask. The derivative is that of the cell that floor() picks.
template <typename Cells>
struct TapGradient {
  float x, y, mask;
  template <int SIDE>
  static __device__ __forceinline__ TapGradient of(const Sample& sample, float scale, uint32_t column, int lane) {
    const float lx = sample.counts ? sample.x.distance : 0.f, ly = sample.counts ? sample.y.distance : 0.f;
    const int first = static_cast<int>(fmaf(SIDE + 1, sample.y.first, sample.x.first)) * Cells::PITCH;  // of no use
    const uint32_t nothing = column + Cells::kNothing;                                    // where it does not count
    const bool above = sample.counts & (sample.y.first >= 0.f), below = sample.counts & (sample.y.first < SIDE - 1.f);
    const uint32_t upper = above ? column + Cells::at(0, 0) + first : nothing;
    const uint32_t lower = below ? column + Cells::at(1, 0) + first : nothing;
    const int left = Cells::turn(lane, static_cast<int>(sample.x.first)), right = Cells::next(left) + Cells::PITCH;
    const auto load = [](uint32_t at) { return __uint_as_float(window::load_shared(at)); };
    const float t00 = load(upper + left), t01 = load(upper + right), t10 = load(lower + left), t11 = load(lower + right);
    const float slope_top = t01 - t00, slope_bottom = t11 - t10;
    const float value_top = fmaf(lx, slope_top, t00), value_bottom = fmaf(lx, slope_bottom, t10);
    const float factor = scale * sample.mask;
    return {factor * fmaf(ly, slope_bottom - slope_top, slope_top), factor * (value_bottom - value_top),
            fmaf(ly, value_bottom - value_top, value_top)};
  }
  // Among the staged gradients of a pixel's group: a second group's begin in the middle of a word.
  template <typename T>
  __device__ __forceinline__ void store(uint32_t stage, int tap) const {
    const uint32_t pair = Dtype<T>::pack(x, y);
    window::store_shared2(stage + 4 * tap, pair);
    window::store_shared2(stage + 4 * tap + 2, pair >> 16);
    window::store_shared2(stage + 4 * window::kTaps + 2 * tap, Dtype<T>::pack(mask, 0.f));
  }
};

// What the backward needs of a call.
struct BackwardProblem : Problem {
  int64_t grad_input_stride, grad_offset_mask_stride;
  int grad_offset_mask_bytes;  // of a pixel; what is behind the last group is written 0
  explicit BackwardProblem(const Params& p)
      : Problem(p), grad_input_stride(2 * p.grad_input_pixel_stride),
        grad_offset_mask_stride(2 * p.grad_offset_mask_pixel_stride),
        grad_offset_mask_bytes(2 * p.offset_mask_channels) {}
};

// Writes the pair's staged gradients of offset_mask, 16 of THREADS threads a pixel; a pair begins at a word of memory.
constexpr int kNumbersPitch = 2 * kPairNumbers;
template <int SIDE, int THREADS, typename P>
__device__ __forceinline__ void write_numbers(void* tensor, uint32_t stage, const P& p, const Task& task,
                                              int thread) {
  constexpr int WORDS = kPairNumbers / 2, STEP = THREADS / 16;
  static_assert(WORDS > 16 && WORDS <= 32, "two words a thread");
  const int word = thread & 15, first = thread >> 4, begin = task.pair * kNumbersPitch;
  const bool last = 2 * task.pair + 2 >= p.groups;  // its numbers, of one group or two, come with the padding
  const int words = last ? (p.grad_offset_mask_bytes - begin) / 4 : WORDS;
  char* image = static_cast<char*>(tensor) + task.image * p.height_out * p.width_out * p.grad_offset_mask_stride + begin;
  const uint32_t own = stage + first * kNumbersPitch + 4 * word;
  for_pixels<SIDE, STEP, SIDE * SIDE, P::FULL>(
      first, p.height_out, p.width_out, p.grad_offset_mask_stride, [&](int i, bool inside, int64_t bytes) {
        auto* const to = reinterpret_cast<uint32_t*>(image + bytes) + word;
        const uint32_t from = own + i * STEP * kNumbersPitch;
        if (inside && word < words) to[0] = window::load_shared(from);
        if (inside && word + 16 < min(words, WORDS)) to[16] = window::load_shared(from + 64);
      });
  if (words <= WORDS) return;
#pragma unroll 1
  for (int m = first; m < SIDE * SIDE; m += STEP) {
    const int pixel = pixel_at<SIDE>(m, p.height_out, p.width_out);
    auto* to = reinterpret_cast<uint32_t*>(image + pixel * p.grad_offset_mask_stride);
#pragma unroll 1
    for (int at = WORDS + word; pixel >= 0 && at < words; at += 16) to[at] = 0;
  }
}

inline bool backward_applies(const Params& p, int side) {
  return applies(p, side) && p.grad_input_pixel_stride % 8 == 0 && p.grad_offset_mask_pixel_stride % 2 == 0;
}

inline bool aligned(const BackwardArgs& args) {
  return aligned16(args.grad_output) && aligned16(args.input) && aligned16(args.offset_mask) &&
         aligned16(args.grad_input) && aligned16(args.grad_offset_mask);
}

}  // namespace dcngen::whole_map
