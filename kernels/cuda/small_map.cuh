// Maps of at most 4x4 pixels, whole, for fp16 and bf16: what the forward and the backward share.
//
// All samples of a map that small fall on the same 16 pixels, near or far, so a group's bilinear weights are a dense
// matrix W of 16 outputs x 16 inputs, with products like those of the window kernels but neither halo nor far samples:
//   output      = W * input                              16 x 16 times 16 x D
//   T           = grad_output * input^T                  16 x D times D x 16: a sample's gradients are four of its numbers
//   grad_input  = W^T * grad_output
// A warp takes one image and two groups ("a pair"): lane l is pixel l % 16 of the output and group l / 16 of the pair,
// and computes that row of W. Pixel (y, x) of either map is number 4 * y + x; numbers outside the map stand for zeros.
// Warps do not wait for one another.
#pragma once

#include <type_traits>

#include "instructions.cuh"
#include "launch.h"
#include "window.cuh"

namespace dcngen::small_map {

using window::Dtype;
using window::Taps;

constexpr int kSide = 4, kPixels = kSide * kSide;
constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a block

using PairSpan = window::GroupSpan<2>;  // of offset_mask in shared memory
constexpr int kTapsBytes = kPixels * PairSpan::PITCH;
constexpr int kPairNumbers = 2 * window::kGroupValues;

// Two groups of the 16 pixels in shared memory. The pitch spreads eight pixels, read at one chunk of 16 bytes, over all
// banks.
template <int D>
struct PairTile {
  static constexpr int CHUNKS = D / 4, PITCH = 4 * D + 16, BYTES = kPixels * PITCH;

  // The lane's address for four 8x8 matrices of 16 channels from `first` on: their pixels are rows, and the second one
  // has the lower pixels (`lower_second`), or the upper channels.
  static __device__ __forceinline__ uint32_t matrices(uint32_t tile, int first, int lane, bool lower_second) {
    const int i = lane >> 3, lower = lower_second ? i & 1 : i >> 1, upper = lower_second ? i >> 1 : i & 1;
    return tile + ((lane & 7) + 8 * lower) * PITCH + 2 * (first + 8 * upper);
  }
};

// Rows of 16 weights in shared memory, one a lane, spread over the banks likewise.
struct WeightRows {
  static constexpr int PITCH = 48, BYTES = 32 * PITCH;
};

// What the kernels need of a call. Strides in bytes, from pixel to pixel.
struct Problem {
  int height_in, width_in, height_out, width_out;
  int groups, channel_bytes, offset_mask_bytes;  // of a pixel
  int64_t input_stride, offset_mask_stride, output_stride;
  float first_x, first_y, scale;  // the middle tap of output (0, 0), offsets apart
  uint32_t tasks;
  window::FastDivide pairs;

  explicit Problem(const Params& p)
      : height_in(static_cast<int>(p.height_in)), width_in(static_cast<int>(p.width_in)),
        height_out(static_cast<int>(p.height_out)), width_out(static_cast<int>(p.width_out)), groups(p.groups),
        channel_bytes(2 * p.groups * p.group_channels), offset_mask_bytes(2 * p.offset_mask_channels),
        input_stride(2 * p.input_pixel_stride), offset_mask_stride(2 * p.offset_mask_pixel_stride),
        output_stride(2 * p.output_pixel_stride), first_x(1.f - p.pad_w), first_y(1.f - p.pad_h),
        scale(p.offset_scale), tasks(static_cast<uint32_t>(p.batch * ((p.groups + 1) / 2))),
        pairs((p.groups + 1) / 2) {}
  int64_t blocks() const { return (int64_t{tasks} + kWarps - 1) / kWarps; }
};

// A warp's image and pair.
struct Task {
  int pair;
  int64_t image;
  __device__ __forceinline__ Task(const Problem& p, uint32_t number) {
    pair = static_cast<int>(p.pairs.split(number));
    image = number;
  }
};

// The index of pixel m in a map's memory, -1 outside the map.
__device__ __forceinline__ int pixel_at(int m, int height, int width) {
  const int y = m / kSide, x = m % kSide;
  return y < height && x < width ? y * width + x : -1;
}

// Begins copying the pair's channels of an image to shared memory, zeros where there are none.
template <int D>
__device__ __forceinline__ void copy_pixels(uint32_t tile, const void* tensor, int64_t stride, int height, int width,
                                            const Problem& p, const Task& task, int lane) {
  constexpr int CHUNKS = PairTile<D>::CHUNKS;
  const int chunk = lane % CHUNKS, byte = task.pair * 4 * D + 16 * chunk;
  const char* image = static_cast<const char*>(tensor) + task.image * height * width * stride;
#pragma unroll
  for (int m = lane / CHUNKS; m < kPixels; m += 32 / CHUNKS) {
    const int pixel = pixel_at(m, height, width);
    const bool valid = pixel >= 0 && byte < p.channel_bytes;
    window::copy_async16(tile + m * PairTile<D>::PITCH + 16 * chunk, valid ? image + pixel * stride + byte : image,
                         valid);
  }
}

// Writes the pair's channels of an image from shared memory.
template <int D>
__device__ __forceinline__ void write_pixels(void* tensor, int64_t stride, int height, int width, uint32_t tile,
                                             const Problem& p, const Task& task, int lane) {
  constexpr int CHUNKS = PairTile<D>::CHUNKS;
  const int chunk = lane % CHUNKS, byte = task.pair * 4 * D + 16 * chunk;
  char* image = static_cast<char*>(tensor) + task.image * height * width * stride;
#pragma unroll
  for (int m = lane / CHUNKS; m < kPixels; m += 32 / CHUNKS) {
    const int pixel = pixel_at(m, height, width);
    const uint4 v = window::load_shared16(tile + m * PairTile<D>::PITCH + 16 * chunk);
    if (pixel >= 0 && byte < p.channel_bytes) window::store_global16(image + pixel * stride + byte, v);
  }
}

// Begins copying the pair's offsets and masks to shared memory.
__device__ __forceinline__ void copy_taps(uint32_t to, const void* offset_mask, const Problem& p, const Task& task,
                                          int lane) {
  const char* image = static_cast<const char*>(offset_mask) +
                      task.image * p.height_out * p.width_out * p.offset_mask_stride;
  window::copy_offset_mask<PairSpan, 32>(to, image, p.offset_mask_stride, PairSpan::first_byte(2 * task.pair),
                                         p.offset_mask_bytes, kPixels, lane,
                                         [&](int m) { return pixel_at(m, p.height_out, p.width_out); });
}

// The lane's own offsets and masks; masks of 0 where it has no pixel or no group.
__device__ __forceinline__ Taps own_taps(uint32_t taps, const Problem& p, const Task& task, int lane) {
  const int m = lane & 15, unit = lane >> 4, group = 2 * task.pair + unit;
  const int skip = 2 * window::kGroupValues * 2 * task.pair - PairSpan::first_byte(2 * task.pair);
  Taps own = window::load_taps(taps + m * PairSpan::PITCH + skip + unit * 2 * window::kGroupValues);
  if (group >= p.groups || pixel_at(m, p.height_out, p.width_out) < 0) {
#pragma unroll
    for (int i = 0; i < 14; ++i) own.word[i] = 0;
  }
  return own;
}

// A lane's sampling places.
struct Places {
  float x, y, scale, width, height;  // (x, y): the middle tap's, offsets apart
  __device__ __forceinline__ Places(const Problem& p, int lane)
      : x(p.first_x + (lane & 3)), y(p.first_y + (lane >> 2 & 3)), scale(p.scale),
        width(static_cast<float>(p.width_in)), height(static_cast<float>(p.height_in)) {}

  // Of tap (i, j), i over width.
  template <typename T>
  __device__ __forceinline__ float2 of_tap(const Taps& taps, int i, int j) const {
    const uint32_t offset = taps.word[3 * i + j];
    return make_float2(fmaf(scale, Dtype<T>::low(offset) + (i - 1), x), fmaf(scale, Dtype<T>::high(offset) + (j - 1), y));
  }
  // A NaN does not.
  __device__ __forceinline__ bool counts(float2 at) const {
    return at.x > -1.f && at.x < width && at.y > -1.f && at.y < height;
  }
};

// A lane's row of W.
struct Weights {
  float of[kSide][kSide] = {};

  // Adds a sample. Along an axis the bilinear weight of pixel c is the hat max(0, 1 - |place - c|), 0 for NaN.
  __device__ __forceinline__ void add(float2 at, float mask) {
    float across[kSide];
#pragma unroll
    for (int c = 0; c < kSide; ++c) across[c] = __saturatef(1.f - fabsf(at.x - c));
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      const float down = mask * __saturatef(1.f - fabsf(at.y - r));
#pragma unroll
      for (int c = 0; c < kSide; ++c) of[r][c] = fmaf(down, across[c], of[r][c]);
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(uint32_t rows, int lane) const {
    const uint32_t row = rows + lane * WeightRows::PITCH;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float(&upper)[kSide] = of[2 * half];
      const float(&lower)[kSide] = of[2 * half + 1];
      window::store_shared16(row + 16 * half, Dtype<T>::pack(upper[0], upper[1]), Dtype<T>::pack(upper[2], upper[3]),
                             Dtype<T>::pack(lower[0], lower[1]), Dtype<T>::pack(lower[2], lower[3]));
    }
  }
};

// For every group of the pair: its 16 x 16 weights, or their transpose, times 16 pixels x D channels of `values`, rounded
// to the same place in `results`, which may be `values`.
template <typename T, int D, bool TRANSPOSED>
__device__ __forceinline__ void multiply_weights(uint32_t results, uint32_t rows, uint32_t values, int lane) {
  using Tile = PairTile<D>;
  const int i = lane >> 3, down = TRANSPOSED ? i >> 1 : i & 1, right = TRANSPOSED ? i & 1 : i >> 1;
  const uint32_t own = rows + ((lane & 7) + 8 * down) * WeightRows::PITCH + 16 * right;
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    uint32_t a[4];
    if constexpr (TRANSPOSED) {
      window::load_matrices_transposed(a, own + 16 * unit * WeightRows::PITCH);
    } else {
      window::load_matrices(a, own + 16 * unit * WeightRows::PITCH);
    }
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint32_t at = Tile::matrices(0, unit * D + 16 * step, lane, true);
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

}  // namespace dcngen::small_map
