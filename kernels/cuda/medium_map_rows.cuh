// Maps of at most 8x8 pixels (medium_map.cuh): a lane's row of W in shared memory. Samples less than a pixel from their
// place on the grid ("near") are one 5x5 stencil around the middle tap, in registers (window.cuh); the lane adds the others
// to its row one by one.
#pragma once

#include "medium_map.cuh"

namespace dcngen::medium_map {

// Whether all samples of the warp are near, and all masks finite: others must not reach pixels beside a place that does not
// count.
template <typename T>
__device__ __forceinline__ bool all_near(const Taps& taps, const window::OffsetScale& scale) {
  const float infinity = __int_as_float(0x7f800000);
  uint32_t offset = 0, mask = taps.word[13] & 0x7fffu;  // only its lower half is the tap's
#pragma unroll
  for (int k = 0; k < window::kTaps; ++k) offset = Dtype<T>::max_abs(offset, taps.word[k]);
#pragma unroll
  for (int i = window::kTaps; i < 13; ++i) mask = Dtype<T>::max_abs(mask, taps.word[i]);
  const bool near = Dtype<T>::low(offset) < scale.near_bound && Dtype<T>::high(offset) < scale.near_bound &&
                    Dtype<T>::low(mask) < infinity && Dtype<T>::high(mask) < infinity;
  return __all_sync(window::kAllLanes, near);
}

// The lane's taps that are not near or whose mask is not finite, as bits. Their offsets and masks become 0.
template <typename T>
__device__ __forceinline__ unsigned take_far(Taps& taps, const window::OffsetScale& scale) {
  const float infinity = __int_as_float(0x7f800000);
  unsigned far = 0;
#pragma unroll
  for (int k = 0; k < window::kTaps; ++k) {
    const float dx = scale.displacement(Dtype<T>::low(taps.word[k]), k / 3 - 1);
    const float dy = scale.displacement(Dtype<T>::high(taps.word[k]), k % 3 - 1);
    const bool is_near = fabsf(dx) < 1.f & fabsf(dy) < 1.f & fabsf(taps.mask<T>(k)) < infinity;
    uint32_t& masks = taps.word[window::kTaps + k / 2];
    far |= is_near ? 0 : 1u << k;
    taps.word[k] = is_near ? taps.word[k] : 0;
    masks = is_near ? masks : masks & (k % 2 ? 0x0000ffffu : 0xffff0000u);
  }
  return far;
}

// Rounds a stencil whose [0][0] is input pixel (x, y) to the row; what lies outside 8x8 pixels is left out.
template <typename T>
__device__ __forceinline__ void store_stencil(uint32_t row, const float (&stencil)[5][5], int x, int y) {
  // Two columns are a word: an odd x moves all by one value, and what results by `first` words, of which -2 to 3 show.
  const int first = x >> 1, even = first & ~1;
  const unsigned order = x & 1 ? 0x5432 : 0x7654;
  const bool odd = first & 1, left = even == -2, middle = even == 0, right = even == 2;
#pragma unroll
  for (int r = 0; r < kSide; ++r) window::store_shared16(row + 2 * kSide * r, 0, 0, 0, 0);
#pragma unroll
  for (int a = 0; a < 5; ++a) {
    const uint32_t p0 = Dtype<T>::pack(stencil[a][0], stencil[a][1]);
    const uint32_t p1 = Dtype<T>::pack(stencil[a][2], stencil[a][3]), p2 = Dtype<T>::pack(stencil[a][4], 0.f);
    const uint32_t q0 = __byte_perm(0, p0, order), q1 = __byte_perm(p0, p1, order), q2 = __byte_perm(p1, p2, order);
    const uint32_t r0 = odd ? 0 : q0, r1 = odd ? q0 : q1, r2 = odd ? q1 : q2, r3 = odd ? q2 : 0;
    if (static_cast<unsigned>(y + a) >= kSide) continue;
    window::store_shared16(row + 2 * kSide * (y + a), middle ? r0 : left ? r2 : 0, middle ? r1 : left ? r3 : 0,
                           middle ? r2 : right ? r0 : 0, middle ? r3 : right ? r1 : 0);
  }
}

// Adds to the row the four weights of a sample at (x, y), rounding each sum; nothing where that place does not count.
template <typename T>
__device__ __forceinline__ void add_sample(uint32_t row, float x, float y, float mask, int width, int height) {
  if (!(x > -1.f & x < static_cast<float>(width) & y > -1.f & y < static_cast<float>(height))) return;
  const float first_x = floorf(x), first_y = floorf(y), right = x - first_x;
  const float lower = mask * (y - first_y), upper = mask - lower;
  const float weight[4] = {upper - upper * right, upper * right, lower - lower * right, lower * right};
  uint32_t cell[4];
  float sum[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int cx = static_cast<int>(first_x) + (q & 1), cy = static_cast<int>(first_y) + (q >> 1);
    const bool inside = static_cast<unsigned>(cx) < kSide && static_cast<unsigned>(cy) < kSide;
    cell[q] = row + (inside ? 2 * (kSide * cy + cx) : 2 * kPixels + 2 * q);  // else behind the row, where nothing is
    sum[q] = Dtype<T>::low(window::load_shared2(cell[q])) + weight[q];
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) window::store_shared2(cell[q], Dtype<T>::pack(sum[q], 0.f));
}

// The row of output pixel m. Its offsets and masks are at `from` in shared memory.
template <typename T, typename P>
__device__ __forceinline__ void build_row(uint32_t row, uint32_t from, const P& p, int m) {
  static_assert(OwnWeights::PITCH >= 2 * kPixels + 8, "room behind a row");
  Taps near = window::load_taps(from);
  const unsigned far = all_near<T>(near, p.scale) ? 0 : take_far<T>(near, p.scale);
  float stencil[5][5];
  window::stencil_weights<T>(stencil, near, p.scale);
  const int x = p.first_x + m % kSide, y = p.first_y + m / kSide;  // of the middle tap
  store_stencil<T>(row, stencil, x - 2, y - 2);
  for (unsigned rest = far; rest != 0; rest &= rest - 1) {
    const int k = __ffs(rest) - 1, i = k / 3, j = k % 3;
    const auto number = [&](int at) { return Dtype<T>::low(window::load_shared2(from + 2 * at)); };
    add_sample<T>(row, fmaf(p.scale.scale, number(2 * k) + (i - 1), x), fmaf(p.scale.scale, number(2 * k + 1) + (j - 1), y),
                  number(2 * window::kTaps + k), p.width_in, p.height_in);
  }
}

}  // namespace dcngen::medium_map
