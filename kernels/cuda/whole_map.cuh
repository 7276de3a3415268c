// Maps taken whole for the window, for fp16 and bf16: what the kernels for maps of at most 4x4 (small_map*.cu) and at most
// 8x8 pixels (medium_map*.cu) share; of the backward alone in whole_map_backward.cuh.
//
// All samples of so small a map fall on the same few pixels, near or far, so a group's bilinear weights are a dense matrix
// W of outputs x inputs, with products like those of the window kernels but neither halo nor far samples:
//   output      = W * input                      T = grad_output * input^T: a sample's gradients are four of its numbers
//   grad_input  = W^T * grad_output
// Two groups of an image are a task ("a pair"): their offsets and masks begin at a word of memory. A lane has one output
// pixel of one group and computes that row of W. Pixel (y, x) of either map is number SIDE * y + x; numbers outside the map
// stand for zeros.
#pragma once

#include <type_traits>

#include "instructions.cuh"
#include "launch.h"
#include "window.cuh"

namespace dcngen::whole_map {

using window::Dtype;
using window::Taps;

using PairSpan = window::GroupSpan<2>;  // of offset_mask in shared memory
constexpr int kPairNumbers = 2 * window::kGroupValues;

// Two groups of PIXELS pixels in shared memory. The pitch spreads eight pixels, read at one chunk of 16 bytes, over all
// banks.
template <int D, int PIXELS>
struct PairTile {
  static constexpr int CHUNKS = D / 4, PITCH = 4 * D + 16, BYTES = PIXELS * PITCH;

  // The lane's address for four 8x8 matrices of 16 channels from `first` on: their pixels are rows, and the second one
  // has the lower pixels (`lower_second`), or the upper channels.
  static __device__ __forceinline__ uint32_t matrices(uint32_t tile, int first, int lane, bool lower_second) {
    const int i = lane >> 3, lower = lower_second ? i & 1 : i >> 1, upper = lower_second ? i >> 1 : i & 1;
    return tile + ((lane & 7) + 8 * lower) * PITCH + 2 * (first + 8 * upper);
  }
};

// What the kernels need of a call. Strides in bytes, from pixel to pixel.
struct Problem {
  static constexpr bool FULL = false;
  int height_in, width_in, height_out, width_out;
  int groups, channel_bytes, offset_mask_bytes;  // of a pixel
  int64_t input_stride, offset_mask_stride, output_stride;
  int first_x, first_y;  // the middle tap of output (0, 0), offsets apart
  window::OffsetScale scale;
  uint32_t tasks;
  window::FastDivide pairs;

  explicit Problem(const Params& p)
      : height_in(static_cast<int>(p.height_in)), width_in(static_cast<int>(p.width_in)),
        height_out(static_cast<int>(p.height_out)), width_out(static_cast<int>(p.width_out)), groups(p.groups),
        channel_bytes(2 * p.groups * p.group_channels), offset_mask_bytes(2 * p.offset_mask_channels),
        input_stride(2 * p.input_pixel_stride), offset_mask_stride(2 * p.offset_mask_pixel_stride),
        output_stride(2 * p.output_pixel_stride), first_x(1 - p.pad_w), first_y(1 - p.pad_h),
        scale(p.offset_scale), tasks(static_cast<uint32_t>(p.batch * ((p.groups + 1) / 2))),
        pairs((p.groups + 1) / 2) {}
  // Whether there is such a group, or byte of a pixel's channels.
  __device__ __forceinline__ bool has_group(int group) const { return group < groups; }
  __device__ __forceinline__ bool has_channels(int byte) const { return byte < channel_bytes; }
};

// The same where both maps have SIDE x SIDE pixels and no pair lacks a group: what is known need not be looked at.
template <typename Base, int SIDE>
struct FullProblem : Base {
  static constexpr bool FULL = true;
  static constexpr int height_in = SIDE, width_in = SIDE, height_out = SIDE, width_out = SIDE, first_x = 0, first_y = 0;
  explicit FullProblem(const Base& p) : Base(p) {}
  static bool applies(const Base& p) {
    return p.height_in == SIDE && p.width_in == SIDE && p.height_out == SIDE && p.width_out == SIDE && p.groups % 2 == 0;
  }
  __device__ __forceinline__ bool has_group(int) const { return true; }
  __device__ __forceinline__ bool has_channels(int) const { return true; }
};

// A task's image and pair.
struct Task {
  int pair;
  int64_t image;
  __device__ __forceinline__ Task(const Problem& p, uint32_t number) {
    pair = static_cast<int>(p.pairs.split(number));
    image = number;
  }
};

// The index of pixel m in a map's memory, -1 outside the map.
template <int SIDE>
__device__ __forceinline__ int pixel_at(int m, int height, int width) {
  const int y = m / SIDE, x = m % SIDE;
  return y < height && x < width ? y * width + x : -1;
}

// Calls visit(i, inside, bytes) for the pixels first, first + STEP, ... of PIXELS: i from 0 on, whether the map has the pixel,
// and, if so, how many bytes behind the map's first pixel it lies in memory. FULL: the map has all.
template <int SIDE, int STEP, int PIXELS, bool FULL, typename Visit>
__device__ __forceinline__ void for_pixels(int first, int height, int width, int64_t stride, Visit visit) {
  if constexpr (STEP % SIDE == 0) {  // whole rows: one multiplication for all
    constexpr int ROWS = STEP / SIDE;
    const int y = first / SIDE, x = first % SIDE;
    int64_t bytes = (y * width + x) * stride;
    const int64_t step = ROWS * width * stride;
#pragma unroll
    for (int i = 0; i < PIXELS / STEP; ++i, bytes += step) visit(i, FULL || (x < width && y + i * ROWS < height), bytes);
  } else {
#pragma unroll
    for (int i = 0; i < PIXELS / STEP; ++i) {
      const int pixel = pixel_at<SIDE>(first + i * STEP, height, width);
      visit(i, FULL || pixel >= 0, pixel * stride);
    }
  }
}

// Begins copying the pair's channels of an image to shared memory, zeros where there are none; `thread` is one of THREADS.
template <int D, int SIDE, int THREADS, typename P>
__device__ __forceinline__ void copy_pixels(uint32_t tile, const void* tensor, int64_t stride, int height, int width,
                                            const P& p, const Task& task, int thread) {
  using Tile = PairTile<D, SIDE * SIDE>;
  constexpr int STEP = THREADS / Tile::CHUNKS;
  const int chunk = thread % Tile::CHUNKS, first = thread / Tile::CHUNKS, byte = task.pair * 4 * D + 16 * chunk;
  const char* const image = static_cast<const char*>(tensor) + task.image * height * width * stride;
  const uint32_t to = tile + first * Tile::PITCH + 16 * chunk;
  for_pixels<SIDE, STEP, SIDE * SIDE, P::FULL>(first, height, width, stride, [&](int i, bool inside, int64_t bytes) {
    const bool valid = inside && p.has_channels(byte);
    window::copy_async16(to + i * STEP * Tile::PITCH, valid ? image + bytes + byte : image, valid);
  });
}

// Begins copying the pair's offsets and masks to shared memory, zeros outside the map.
template <int SIDE, int THREADS, typename P>
__device__ __forceinline__ void copy_taps(uint32_t to, const void* offset_mask, const P& p, const Task& task,
                                          int thread) {
  constexpr int PIECES = PairSpan::NEEDED, STEP = THREADS / PIECES;
  static_assert(PIECES == 8, "a power of two");
  const int piece = thread % PIECES, first = thread / PIECES, byte = PairSpan::first_byte(2 * task.pair) + 16 * piece;
  const char* const image = static_cast<const char*>(offset_mask) +
                            task.image * p.height_out * p.width_out * p.offset_mask_stride;
  const uint32_t own = to + first * PairSpan::PITCH + 16 * piece;
  for_pixels<SIDE, STEP, SIDE * SIDE, P::FULL>(
      first, p.height_out, p.width_out, p.offset_mask_stride, [&](int i, bool inside, int64_t bytes) {
        const bool valid = inside && byte < p.offset_mask_bytes;
        window::copy_async16(own + i * STEP * PairSpan::PITCH, valid ? image + bytes + byte : image, valid);
      });
}

// Where the offsets and masks of output pixel m and group `unit` of the pair begin in shared memory: a multiple of 2.
__device__ __forceinline__ uint32_t taps_at_pixel(uint32_t taps, const Task& task, int m, int unit) {
  const int skip = 2 * window::kGroupValues * 2 * task.pair - PairSpan::first_byte(2 * task.pair);
  return taps + m * PairSpan::PITCH + skip + unit * 2 * window::kGroupValues;
}

// Those offsets and masks; 0 where there is no such pixel or group.
template <int SIDE>
__device__ __forceinline__ Taps taps_of(uint32_t taps, const Problem& p, const Task& task, int m, int unit) {
  const int group = 2 * task.pair + unit;
  Taps own = window::load_taps(taps_at_pixel(taps, task, m, unit));
  if (group >= p.groups || pixel_at<SIDE>(m, p.height_out, p.width_out) < 0) {
#pragma unroll
    for (int i = 0; i < 14; ++i) own.word[i] = 0;
  }
  return own;
}

// One axis of a sample: the input pixel before it, as a float, the distance from there, and whether the operator counts the
// place: -1 < place < size, not a NaN. All but the place come from the displacement alone: added to a coordinate first, a
// small one would lose its sign.
struct Place {
  float first, distance;
  bool counts;
  __device__ __forceinline__ Place(float anchor, float displacement, float size) {
    const float down = floorf(displacement);
    first = anchor + down, distance = displacement - down;
    counts = (anchor + ceilf(displacement) >= 0.f) & (first < size);
  }
  __device__ __forceinline__ float place() const { return first + distance; }
};

// A sample and its mask, 0 where its place does not count: that mask may be NaN, or the place's.
struct Sample {
  Place x, y;
  float mask;
  bool counts;
};

// What a lane's samples lie around: its middle tap, offsets apart.
struct Anchor {
  float x, y, scale, width, height;
  template <int SIDE, typename P>
  static __device__ __forceinline__ Anchor of_pixel(const P& p, int m) {
    return {static_cast<float>(p.first_x + m % SIDE), static_cast<float>(p.first_y + m / SIDE), p.scale.scale,
            static_cast<float>(p.width_in), static_cast<float>(p.height_in)};
  }
  // Of tap (i, j), i over width, with these offsets and this mask.
  __device__ __forceinline__ Sample sample(float offset_x, float offset_y, float mask, int i, int j) const {
    const Place at_x(x + (i - 1), fmaf(scale, offset_x, (scale - 1.f) * (i - 1)), width);
    const Place at_y(y + (j - 1), fmaf(scale, offset_y, (scale - 1.f) * (j - 1)), height);
    const bool counts = at_x.counts & at_y.counts;
    return {at_x, at_y, counts ? mask : 0.f, counts};
  }
  // Of tap k = 3 * i + j.
  template <typename T>
  __device__ __forceinline__ Sample sample(const Taps& taps, int k) const {
    return sample(Dtype<T>::low(taps.word[k]), Dtype<T>::high(taps.word[k]), taps.mask<T>(k), k / 3, k % 3);
  }
};

// A lane's row of W, and rows of W in shared memory.
template <int SIDE>
struct Weights {
  static constexpr int PITCH = 2 * SIDE * SIDE + 16;  // spread over the banks as PairTile's
  float of[SIDE][SIDE] = {};

  // Along an axis the bilinear weight of pixel c is the hat max(0, 1 - |place - c|), 0 for NaN.
  __device__ __forceinline__ void add(const Sample& sample) {
    const float x = sample.x.place(), y = sample.y.place();
    float across[SIDE];
#pragma unroll
    for (int c = 0; c < SIDE; ++c) across[c] = __saturatef(1.f - fabsf(x - c));
#pragma unroll
    for (int r = 0; r < SIDE; ++r) {
      const float down = sample.mask * __saturatef(1.f - fabsf(y - r));
#pragma unroll
      for (int c = 0; c < SIDE; ++c) of[r][c] = fmaf(down, across[c], of[r][c]);
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(uint32_t row) const {
    const float* const flat = &of[0][0];
#pragma unroll
    for (int i = 0; i < SIDE * SIDE; i += 8) {
      window::store_shared16(row + 2 * i, Dtype<T>::pack(flat[i], flat[i + 1]), Dtype<T>::pack(flat[i + 2], flat[i + 3]),
                             Dtype<T>::pack(flat[i + 4], flat[i + 5]), Dtype<T>::pack(flat[i + 6], flat[i + 7]));
    }
  }
};

// The lane's address for the fragments of 16 rows of W, or of its transpose: 16 of a row's numbers from `first` on.
template <int SIDE, bool TRANSPOSED>
__device__ __forceinline__ uint32_t weight_fragments(uint32_t rows, int first, int lane) {
  const int i = lane >> 3, down = TRANSPOSED ? i >> 1 : i & 1, right = TRANSPOSED ? i & 1 : i >> 1;
  return rows + ((lane & 7) + 8 * down) * Weights<SIDE>::PITCH + 2 * first + 16 * right;
}

// Whether the maps have at most `side` pixels a side and all else is as the kernels want it (host side).
inline bool applies(const Params& p, int side) {
  const auto fits = [&](int64_t size) { return size >= 1 && size <= side; };
  const bool width = p.group_channels == 16 || p.group_channels == 32 || p.group_channels == 64;
  return plain_3x3(p) && p.dtype != DCNGEN_FLOAT32 && width && fits(p.height_in) && fits(p.width_in) &&
         fits(p.height_out) && fits(p.width_out) && p.input_pixel_stride % 8 == 0 &&
         p.offset_mask_pixel_stride % 8 == 0 && p.output_pixel_stride % 8 == 0 && p.offset_mask_channels % 8 == 0 &&
         p.offset_mask_channels >= window::kGroupValues * p.groups && p.batch * p.groups < int64_t{1} << 30;
}

// Calls `launch` with a value of the call's type and its channels of a group, as constants (host side).
template <typename Launch>
cudaError_t for_type_and_channels(const Params& p, Launch launch) {
  const auto with_type = [&](auto type) {
    switch (p.group_channels) {
      case 16: return launch(type, std::integral_constant<int, 16>{});
      case 32: return launch(type, std::integral_constant<int, 32>{});
      default: return launch(type, std::integral_constant<int, 64>{});
    }
  };
  return p.dtype == DCNGEN_FLOAT16 ? with_type(__half{}) : with_type(__nv_bfloat16{});
}

}  // namespace dcngen::whole_map
