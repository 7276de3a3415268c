// Samples of the gather kernel: a lane places some taps of its (pixel, group), the lanes that share the pair pass places
// and weights to each other, and every lane reads its channels of the corners.
#pragma once

#include "forward_blend.cuh"

namespace dcngen::window {

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
  __device__ __forceinline__ void place(const FarContext& c, LaneTaps& lane) {
    constexpr int VALUE = sizeof(T);
    const float offset_x = load_value<T>(lane.offsets), offset_y = load_value<T>(lane.offsets + VALUE);
    const float mask = load_value<T>(lane.masks);
    // Tap k is (k / 3, k % 3): the third of k - 4, rounded to nearest, and the rest.
    constexpr float kRound = 12582912.f;
    const float anchor_x = fmaf(lane.tap, 1.f / 3.f, kRound) - kRound, anchor_y = fmaf(anchor_x, -3.f, lane.tap);
    const Corners corners(c, fmaf(c.scale, anchor_x + offset_x, lane.centre_x),
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
  uint32_t pixel_bytes, next_pixel, next_row;
  // Reads the corners of the sample whose first one is `pixel`; leaves `v` as it is where the sample does not count.
  __device__ __forceinline__ void load(uint4 (&v)[4], uint32_t pixel) const {
    const char* upper;  // one instruction, of which the compiler makes two where it sees a product of 64 bits
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(upper) : "r"(pixel), "r"(pixel_bytes), "l"(first));
    const char* lower = upper + next_row;
    load(v[0], upper, pixel != kNoPixel);
    load(v[1], upper + next_pixel, pixel != kNoPixel);
    load(v[2], lower, pixel != kNoPixel);
    load(v[3], lower + next_pixel, pixel != kNoPixel);
  }

 private:
  static __device__ __forceinline__ void load(uint4& v, const char* from, bool counts) {
    asm volatile(
        "{\n"
        ".reg .pred counts;\n"
        "setp.ne.b32 counts, %5, 0;\n"
        "@counts ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4];\n"
        "}\n"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(from), "r"(static_cast<int>(counts)));
  }
};

}  // namespace dcngen::window
