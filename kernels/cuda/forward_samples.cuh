// Samples of the gather kernel: a lane places some taps of its (pixel, group), the lanes that share the pair pass
// places and weights to each other, and every lane reads its channels of the corners.
#pragma once

#include "forward_blend.cuh"

namespace dcngen::window {

// What placing samples needs of the problem. The window kernels have a way of their own (forward_far.cuh): with this
// one they took 0.3 to 1 us longer on small maps without far samples, though the code that runs there is the same.
struct GatherContext {
  // Of an axis: the last place where two neighbours begin, and 1 if the second of them is in the image, else 0.
  struct Axis {
    float last, second;
    Axis() = default;
    explicit Axis(int size) : last(size > 1 ? static_cast<float>(size - 2) : 0.f), second(size > 1 ? 1.f : 0.f) {}
  };
  Axis horizontal, vertical;
  int width_in, pad_h, pad_w;
  float scale;
  uint32_t pixel_bytes, next_pixel;  // bytes from pixel to pixel and to a corner's right neighbour (0: there is none)
  uint64_t next_row;                 // to the one below
  uint32_t minus_shift;              // undoes what GatherCorners::kShift adds to the number of a pixel
  GatherContext() = default;
  explicit GatherContext(const Params& p);
};

// A sample's four corners: the number of the upper left pixel, and weights in row order. The corners are two
// neighbouring columns and rows inside the image; the hat functions give a corner that the sample does not touch weight
// 0, so borders need no cases. A place that does not count (NaN too) gets only zeros.
struct GatherCorners {
  // Added to a place of at most 2^23 (forward_window_applies sees to that) and rounded down, this leaves the integer in
  // the low bits: one addition where a conversion takes the slow unit.
  static constexpr float kShift = 8388608.f;
  static constexpr uint32_t kShiftBits = 0x4b000000u;

  float weight[4];
  uint32_t pixel;
  bool counts;
  __device__ __forceinline__ GatherCorners(const GatherContext& c, float x, float y, float mask) {
    float left_weight, right_weight, upper_weight, lower_weight;
    const uint32_t left = first_of_two(x, c.horizontal, left_weight, right_weight);
    const uint32_t top = first_of_two(y, c.vertical, upper_weight, lower_weight);
    counts = left_weight + right_weight > 0.f && upper_weight + lower_weight > 0.f;
    const float counted = counts ? mask : 0.f;  // selected: the mask may be NaN
    const float upper = counted * upper_weight, lower = counted * lower_weight;
    weight[0] = upper * left_weight, weight[1] = upper * right_weight;
    weight[2] = lower * left_weight, weight[3] = lower * right_weight;
    pixel = top * c.width_in + left + c.minus_shift;
  }

 private:
  // The first of two neighbours inside the image, with kShift, and their weights at coordinate `at`.
  static __device__ __forceinline__ uint32_t first_of_two(float at, const GatherContext::Axis& axis, float& first,
                                                          float& second) {
    const float shifted = __fadd_rd(fminf(fmaxf(at, 0.f), axis.last), kShift);
    const float distance = at - (shifted - kShift);
    first = __saturatef(1.f - fabsf(distance));
    second = __saturatef(axis.second - fabsf(distance - 1.f));
    return __float_as_uint(shifted);
  }
};

inline GatherContext::GatherContext(const Params& p)
    : horizontal(static_cast<int>(p.width_in)), vertical(static_cast<int>(p.height_in)),
      width_in(static_cast<int>(p.width_in)), pad_h(p.pad_h), pad_w(p.pad_w), scale(p.offset_scale) {
  pixel_bytes = static_cast<uint32_t>(p.input_pixel_stride * (p.dtype == DCNGEN_FLOAT32 ? 4 : 2));
  next_pixel = p.width_in > 1 ? pixel_bytes : 0;
  next_row = p.height_in > 1 ? static_cast<uint64_t>(width_in) * pixel_bytes : 0;
  minus_shift = 0u - GatherCorners::kShiftBits * static_cast<uint32_t>(width_in + 1);
}

// Of samples that do not count: they are not read, on small maps a good part of them.
constexpr uint32_t kNoPixel = ~0u;

// The taps of a (pixel, group) that a lane places: every PAIR_LANES-th.
struct LaneTaps {
  uint32_t offsets, masks;   // of the next one, in shared memory
  float tap;                 // its number, counted from the middle tap
  float centre_x, centre_y;  // the pixel's place
};

// A sample as the lanes that read its corners need it.
template <typename T>
struct Sample {
  uint32_t pixel;  // the upper left corner or kNoPixel
  uint32_t weights[Blend<T>::WORDS];

  // The lane's next tap; the lanes of a pair go on by so many.
  template <int PAIR_LANES>
  __device__ __forceinline__ void place(const GatherContext& c, LaneTaps& lane) {
    constexpr int VALUE = sizeof(T);
    const float offset_x = load_value<T>(lane.offsets), offset_y = load_value<T>(lane.offsets + VALUE);
    const float mask = load_value<T>(lane.masks);
    // Tap k is (k / 3, k % 3): the third of k - 4, rounded to nearest, and the rest.
    constexpr float kRound = 12582912.f;
    const float anchor_x = fmaf(lane.tap, 1.f / 3.f, kRound) - kRound, anchor_y = fmaf(anchor_x, -3.f, lane.tap);
    const GatherCorners corners(c, fmaf(c.scale, anchor_x + offset_x, lane.centre_x),
                          fmaf(c.scale, anchor_y + offset_y, lane.centre_y), mask);
    pixel = corners.counts ? corners.pixel : kNoPixel;
    Blend<T>::pack(weights, corners.weight);
    lane.offsets += PAIR_LANES * 2 * VALUE;
    lane.masks += PAIR_LANES * VALUE;
    lane.tap += static_cast<float>(PAIR_LANES);
  }
  // That of the lane with number `other` of the PAIR_LANES that share a pixel and group.
  template <int PAIR_LANES>
  __device__ __forceinline__ Sample of_lane(int other) const {
    if constexpr (PAIR_LANES == 1) return *this;
    Sample sample;
    sample.pixel = __shfl_sync(kAllLanes, pixel, other, PAIR_LANES);
#pragma unroll
    for (int i = 0; i < Blend<T>::WORDS; ++i) {
      sample.weights[i] = __shfl_sync(kAllLanes, weights[i], other, PAIR_LANES);
    }
    return sample;
  }
};

// Where a lane's channels of an image's pixels stand.
struct LaneImage {
  const char* first;  // of pixel 0
  uint32_t pixel_bytes, next_pixel;
  uint64_t next_row;
  // Reads the corners of the sample whose first one is `pixel`; leaves `v` as it is where the sample does not count.
  __device__ __forceinline__ void load(uint4 (&v)[4], uint32_t pixel) const {
    const char* upper;  // one instruction, of which the compiler makes two where it sees a product of 64 bits
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(upper) : "r"(pixel), "r"(pixel_bytes), "l"(first));
    const char* lower = upper + next_row;
    load_global16_if(pixel != kNoPixel, v[0], upper);
    load_global16_if(pixel != kNoPixel, v[1], upper + next_pixel);
    load_global16_if(pixel != kNoPixel, v[2], lower);
    load_global16_if(pixel != kNoPixel, v[3], lower + next_pixel);
  }
};

}  // namespace dcngen::window
