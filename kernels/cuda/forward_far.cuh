// Far samples of the window forward: those that leave the reach of their stencil.
//
// Where a unit (16 pixels of one group) has few of them, their corners are further columns of its product: four samples
// are sixteen rows of right operand, copied from global memory, and sixteen columns of S, each with one weight. A warp
// with more leaves its whole result to the gather kernel (forward_gather.cuh) and says so in the output.
#pragma once

#include "window.cuh"

namespace dcngen::window {

// More far samples than this in a unit (of 16 * 9): the warp's pixels are left to the gather kernel.
constexpr int kMostFar = 24;

// What sampling needs of the problem. Distances in the input are counted in pieces of 16 bytes.
struct FarContext {
  int height_in, width_in, pad_h, pad_w;
  float scale;
  uint32_t stride_pieces;             // from pixel to pixel
  uint32_t pixel_pieces, row_pieces;  // to a corner's neighbours: 0 where the image has one column, one row
  FarContext() = default;
  explicit FarContext(const Params& p)
      : height_in(static_cast<int>(p.height_in)), width_in(static_cast<int>(p.width_in)), pad_h(p.pad_h),
        pad_w(p.pad_w), scale(p.offset_scale) {
    stride_pieces = static_cast<uint32_t>(p.input_pixel_stride / (p.dtype == DCNGEN_FLOAT32 ? 4 : 8));
    pixel_pieces = width_in > 1 ? stride_pieces : 0;
    row_pieces = height_in > 1 ? static_cast<uint32_t>(width_in) * stride_pieces : 0;
  }
};

// A sample's four corners: the upper left one's distance from the image's first value, and weights in row order. The
// corners are two neighbouring columns and rows inside the image; the hat functions give a corner that the sample does
// not touch weight 0, so borders need no cases. A place that does not count (NaN too) gets only zeros.
struct Corners {
  float weight[4];
  uint32_t first;
  bool counts;
  __device__ __forceinline__ Corners(const FarContext& c, float x, float y, float mask) {
    float left_weight, right_weight, upper_weight, lower_weight;
    const float left = first_of_two(x, c.width_in, left_weight, right_weight);
    const float top = first_of_two(y, c.height_in, upper_weight, lower_weight);
    counts = left_weight + right_weight > 0.f && upper_weight + lower_weight > 0.f;
    const float upper = counts ? mask * upper_weight : 0.f, lower = counts ? mask * lower_weight : 0.f;
    weight[0] = upper * left_weight, weight[1] = upper * right_weight;
    weight[2] = lower * left_weight, weight[3] = lower * right_weight;
    const uint32_t pixel = static_cast<uint32_t>(top) * c.width_in + static_cast<uint32_t>(left);
    first = counts ? pixel * c.stride_pieces : 0;
  }
  // Their 16 bytes of the channels that `image` points to; leaves `v` as it is where the sample does not count.
  __device__ __forceinline__ void load(uint4 (&v)[4], const FarContext& c, const uint4* image) const {
    const uint4* from = image + first;
    load_global16_if(counts, v[0], from);
    load_global16_if(counts, v[1], from + c.pixel_pieces);
    load_global16_if(counts, v[2], from + c.row_pieces);
    load_global16_if(counts, v[3], from + c.row_pieces + c.pixel_pieces);
  }

 private:
  // The first of two neighbours inside [0, size) and their weights at coordinate `at`.
  static __device__ __forceinline__ float first_of_two(float at, int size, float& first, float& second) {
    const float left = fminf(fmaxf(floorf(at), 0.f), static_cast<float>(max(size - 2, 0)));
    const float distance = at - left;
    first = __saturatef(1.f - fabsf(distance));
    second = size > 1 ? __saturatef(1.f - fabsf(distance - 1.f)) : 0.f;
    return left;
  }
};

// Whether a warp leaves its pixels to the gather kernel is written where its result would begin: a NaN that no
// arithmetic yields, since rounding a NaN to a storage type and every fp32 operation give the canonical one.
template <typename T>
struct LeftMark {
  using Word = uint16_t;
  static constexpr Word VALUE = 0x7fa5;
};
template <>
struct LeftMark<float> {
  using Word = uint32_t;
  static constexpr Word VALUE = 0x7fa5a5a5u;
};

// A value of offset_mask in shared memory.
template <typename T>
__device__ __forceinline__ float load_value(uint32_t from) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(load_shared(from));
  } else {
    return Dtype<T>::low(load_shared2(from));
  }
}

// The corners of tap k of output pixel (x, y), whose offsets and masks begin at `values` in shared memory.
template <typename T>
__device__ __forceinline__ Corners corners_of_tap(const FarContext& c, int x, int y, int k, uint32_t values) {
  constexpr int VALUE = sizeof(T);
  const float offset_x = load_value<T>(values + 2 * k * VALUE);
  const float offset_y = load_value<T>(values + (2 * k + 1) * VALUE);
  const float place_x = static_cast<float>(x + 1 - c.pad_w) + c.scale * (static_cast<float>(k / 3 - 1) + offset_x);
  const float place_y = static_cast<float>(y + 1 - c.pad_h) + c.scale * (static_cast<float>(k % 3 - 1) + offset_y);
  return Corners(c, place_x, place_y, load_value<T>(values + (2 * kTaps + k) * VALUE));
}

// Few far samples of a task: up to kMostFar records a unit. A record has 16 bytes: weights of the corners as two words,
// the first corner, and which sample it is (16 * row of S + tap).
struct FarRecords {
  static constexpr int UNIT_BYTES = kMostFar * 16, BYTES = 2 * UNIT_BYTES;

  // Lane l owns pair l of the task, `far` has its far taps. The samples are listed first, so that a lane computes one
  // sample however they lie. corners_of(row, tap) gives those of a sample of the lane's own unit.
  template <typename T, typename CornersOf>
  static __device__ __forceinline__ void store(uint32_t records, unsigned far, int count, int lane,
                                               CornersOf corners_of) {
    const uint32_t own = records + (lane >> 4) * UNIT_BYTES;
    const int row = lane & 15;
    int before = __popc(far);
#pragma unroll
    for (int step = 1; step < 16; step *= 2) {
      const int left = __shfl_up_sync(kAllLanes, before, step, 16);
      if (row >= step) before += left;
    }
    uint32_t to = own + (before - __popc(far)) * 16 + 12;
    for (; far; far &= far - 1, to += 16) store_shared(to, 16 * row + __ffs(far) - 1);
    __syncwarp();
#pragma unroll
    for (int slot = row; slot < kMostFar; slot += 16) {
      if (slot >= count) break;
      const int sample = static_cast<int>(load_shared(own + slot * 16 + 12));
      const Corners corners = corners_of(sample >> 4, sample & 15);
      store_shared(own + slot * 16, Dtype<T>::pack(corners.weight[0], corners.weight[1]));
      store_shared(own + slot * 16 + 4, Dtype<T>::pack(corners.weight[2], corners.weight[3]));
      store_shared(own + slot * 16 + 8, corners.first);
    }
    __syncwarp();
  }
};

// One step of the far product: records 4 * step .. 4 * step + 3 of `count`. `staging` is the unit's S, already in
// registers; row r of the right operand stands where row r of S stood.
template <int CHUNKS>
__device__ __forceinline__ void begin_far_step(const FarContext& c, uint32_t records, int count, int step,
                                               const void* image, uint32_t staging, int lane) {
#pragma unroll
  for (int item = lane; item < 16 * CHUNKS; item += 32) {
    const int row = item / CHUNKS, chunk = item % CHUNKS, t = step * 4 + row / 4;
    const bool valid = t < count;
    const uint32_t first = valid ? load_shared(records + t * 16 + 8) : 0;
    const uint32_t corner = first + (row & 1 ? c.pixel_pieces : 0) + (row & 2 ? c.row_pieces : 0);
    copy_async16(staging + row * StencilMatrix::PITCH + chunk * 16, static_cast<const uint4*>(image) + corner + chunk,
                 valid);
  }
  copy_commit();
}
template <typename T, int CHUNKS>
__device__ __forceinline__ void finish_far_step(float (&sums)[CHUNKS][4], uint32_t records, int count, int step,
                                                uint32_t staging, int lane) {
  const int row = lane >> 2;
  uint32_t a[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = step * 4 + half * 2 + (lane >> 1 & 1);
    const uint32_t record = records + t * 16;
    const uint32_t weights = t < count ? load_shared(record + (lane & 1) * 4) : 0;
    const int pixel = t < count ? static_cast<int>(load_shared(record + 12)) >> 4 : 0;
    a[2 * half] = pixel == row ? weights : 0;
    a[2 * half + 1] = pixel == row + 8 ? weights : 0;
  }
  copy_wait<0>();
  __syncwarp();
  const int r = lane & 7, i = lane >> 3;
#pragma unroll
  for (int j = 0; j < CHUNKS; j += 2) {
    uint32_t b[4];
    load_matrices_transposed(
        b, staging + ((i & 1) * 8 + r) * StencilMatrix::PITCH + (CHUNKS == 1 ? 0 : j + (i >> 1)) * 16);
    Dtype<T>::mma(sums[j], a, b[0], b[1]);
    if (CHUNKS > 1) Dtype<T>::mma(sums[CHUNKS > 1 ? j + 1 : 0], a, b[2], b[3]);
  }
  __syncwarp();
}

}  // namespace dcngen::window
