// Far samples of the window forward: those that leave the reach of their stencil are gathered from global memory.
//
// Where few samples are far, add_far_taps adds them to the sums of the products. A warp with many of them gathers all
// its samples instead (gather_taps): one path whose cost does not depend on the offsets.
#pragma once

#include "window.cuh"

namespace dcngen::window {

// What gathering needs of the problem; strides in elements.
struct FarContext {
  int height_in, width_in, width_out, pad_h, pad_w;
  int64_t input_stride, offset_mask_stride;
  float scale;
};

// The weighted sum of four corners' eight channels, added to `sum`. fp16 blends one sample in pairs of halves, with
// weights rounded as those of the stencils are; bf16, whose eight bits are too few for that, blends in fp32.
template <typename T>
struct Blend;

template <>
struct Blend<__half> {
  using Weights = uint4;  // a pair of equal halves a corner
  static __device__ __forceinline__ Weights weights(float w00, float w01, float w10, float w11) {
    using D = Dtype<__half>;
    return {D::pack(w00, w00), D::pack(w01, w01), D::pack(w10, w10), D::pack(w11, w11)};
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t v;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
  }
  static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t v;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
  }
  static __device__ __forceinline__ void add(float& low, float& high, const Weights& w, uint32_t v00, uint32_t v01,
                                             uint32_t v10, uint32_t v11) {
    uint32_t v = multiply_add(w.y, v01, multiply(w.x, v00));
    v = multiply_add(w.w, v11, multiply_add(w.z, v10, v));
    low += Dtype<__half>::low(v);
    high += Dtype<__half>::high(v);
  }
};

template <>
struct Blend<__nv_bfloat16> {
  using Weights = uint4;  // bits of a float a corner
  static __device__ __forceinline__ Weights weights(float w00, float w01, float w10, float w11) {
    return {__float_as_uint(w00), __float_as_uint(w01), __float_as_uint(w10), __float_as_uint(w11)};
  }
  static __device__ __forceinline__ void add(float& low, float& high, const Weights& w, uint32_t v00, uint32_t v01,
                                             uint32_t v10, uint32_t v11) {
    const uint32_t weights[4] = {w.x, w.y, w.z, w.w}, values[4] = {v00, v01, v10, v11};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low = fmaf(__uint_as_float(weights[i]), Dtype<__nv_bfloat16>::low(values[i]), low);
      high = fmaf(__uint_as_float(weights[i]), Dtype<__nv_bfloat16>::high(values[i]), high);
    }
  }
};

// Sampling places in shared memory: per place four corner weights and one word, the first corner's distance from the
// image's first value in units of 16 bytes (times 4) with two bits: the second column and row lie one further.
template <typename T, int ROWS, int SLOTS>
struct FarPlaces {
  static constexpr int WORDS_AT = ROWS * SLOTS * 16, BYTES = WORDS_AT + ROWS * SLOTS * 4;

  // Corners outside the image get weight 0 and the address of one inside; a place that does not count gets only zeros.
  static __device__ __forceinline__ void store(uint32_t to, int place, const FarContext& c, float x, float y,
                                               float mask) {
    const bool counts =
        x > -1.f && y > -1.f && x < static_cast<float>(c.width_in) && y < static_cast<float>(c.height_in);
    const float floor_x = counts ? floorf(x) : 0.f, floor_y = counts ? floorf(y) : 0.f;
    const float lx = counts ? x - floor_x : 0.f, ly = counts ? y - floor_y : 0.f;
    const int x0 = static_cast<int>(floor_x), y0 = static_cast<int>(floor_y);
    const bool left = x0 >= 0, right = x0 + 1 < c.width_in, top = y0 >= 0, bottom = y0 + 1 < c.height_in;
    const float weight = counts ? mask : 0.f;
    const float upper = top ? weight * (1.f - ly) : 0.f, lower = bottom ? weight * ly : 0.f;
    const uint4 weights = Blend<T>::weights(left ? upper * (1.f - lx) : 0.f, right ? upper * lx : 0.f,
                                            left ? lower * (1.f - lx) : 0.f, right ? lower * lx : 0.f);
    const uint32_t pixel = (top ? y0 : 0) * c.width_in + (left ? x0 : 0);
    store_shared16(to + place * 16, weights.x, weights.y, weights.z, weights.w);
    store_shared(to + WORDS_AT + place * 4,
                 pixel * static_cast<uint32_t>(c.input_stride / 8) << 2 | (top && bottom ? 2 : 0) | (left && right));
  }

  // Adds the sample's eight channels; `image` points to the first of them in the image's first pixel.
  static __device__ __forceinline__ void gather(float (&sum)[8], uint32_t from, int place, const FarContext& c,
                                                const T* image) {
    const uint4 weights = load_shared16(from + place * 16);
    const uint32_t word = load_shared(from + WORDS_AT + place * 4), first = word >> 2;
    const uint32_t column = static_cast<uint32_t>(c.input_stride / 8);
    const uint32_t right = word & 1 ? column : 0, down = word & 2 ? column * c.width_in : 0;
    const uint4* base = reinterpret_cast<const uint4*>(image);
    const uint4 v00 = load_global16(base + first), v01 = load_global16(base + (first + right));
    const uint4 v10 = load_global16(base + (first + down)), v11 = load_global16(base + (first + down + right));
    Blend<T>::add(sum[0], sum[1], weights, v00.x, v01.x, v10.x, v11.x);
    Blend<T>::add(sum[2], sum[3], weights, v00.y, v01.y, v10.y, v11.y);
    Blend<T>::add(sum[4], sum[5], weights, v00.z, v01.z, v10.z, v11.z);
    Blend<T>::add(sum[6], sum[7], weights, v00.w, v01.w, v10.w, v11.w);
  }
};

// Adds the far taps of a unit to its sums. `far` has the taps' bits in the lane that owns the pixel; (oy, ox) is the
// unit's first pixel. `image_taps` and `image` point to the group's offsets and to the pass' first channel in the
// image; the offsets are read again, since keeping them would cost every warp the registers. `scratch` is the unit's S.
template <typename T, int CHUNKS>
__device__ __forceinline__ void add_far_taps(float (&sums)[CHUNKS][4], const FarContext& c, unsigned far, int unit,
                                             int oy, int ox, const T* image_taps, const T* image, uint32_t scratch,
                                             int lane) {
  // ROWS pixels at a time; a lane computes the places of every LANES-th tap and gathers eight channels of one pixel.
  constexpr int ROWS = CHUNKS == 4 ? 8 : 16, LANES = 32 / ROWS;
  constexpr int SLOTS = ROWS == 8 ? kTaps : 5;  // taps whose places are in shared memory at a time
  using Places = FarPlaces<T, ROWS, SLOTS>;
  static_assert(Places::BYTES <= StencilMatrix::BYTES && ROWS * CHUNKS * 32 <= StencilMatrix::BYTES, "fits where S is");
  const int row = lane / CHUNKS % ROWS, chunk = lane % CHUNKS;
  const bool gathers = lane < ROWS * CHUNKS;
#pragma unroll 1
  for (int first_row = 0; first_row < 16; first_row += ROWS) {
    const int m = first_row + lane / LANES, y = oy + (m >> 2), x = ox + (m & 3);
    const unsigned far_computed = __shfl_sync(kAllLanes, far, unit * 16 + m);
    const unsigned far_gathered = __shfl_sync(kAllLanes, far, unit * 16 + first_row + row);
    const uint16_t* values = reinterpret_cast<const uint16_t*>(
        image_taps + static_cast<int64_t>(y * c.width_out + x) * c.offset_mask_stride);
    float sum[8] = {};
#pragma unroll 1
    for (int first_tap = 0; first_tap < kTaps; first_tap += SLOTS) {
      const unsigned computed = far_computed >> first_tap & ((1u << SLOTS) - 1);
#pragma unroll
      for (int step = 0; step < (SLOTS + LANES - 1) / LANES; ++step) {
        const int bit = step * LANES + lane % LANES, k = first_tap + bit;
        if (!(computed >> bit & 1)) continue;
        const float at_x = static_cast<float>(x + 1 - c.pad_w) +
                           c.scale * (static_cast<float>(k / 3 - 1) + Dtype<T>::low(values[2 * k]));
        const float at_y = static_cast<float>(y + 1 - c.pad_h) +
                           c.scale * (static_cast<float>(k % 3 - 1) + Dtype<T>::low(values[2 * k + 1]));
        const int slot = __popc(computed & ((1u << bit) - 1));
        Places::store(scratch, lane / LANES * SLOTS + slot, c, at_x, at_y, Dtype<T>::low(values[2 * kTaps + k]));
      }
      __syncwarp();
      const int count = gathers ? __popc(far_gathered >> first_tap & ((1u << SLOTS) - 1)) : 0;
#pragma unroll 1
      for (int slot = 0; slot < count; ++slot) {
        Places::gather(sum, scratch, row * SLOTS + slot, c, image + chunk * 8);
      }
      __syncwarp();
    }
    // From eight channels a lane to the layout of the products, through shared memory.
    if (gathers) {
      const uint32_t to = scratch + (row * CHUNKS + chunk) * 32;
      store_shared16f(to, {sum[0], sum[1], sum[2], sum[3]});
      store_shared16f(to + 16, {sum[4], sum[5], sum[6], sum[7]});
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j) {
      const uint32_t from = scratch + ((lane >> 2) * CHUNKS + j) * 32 + (lane & 3) * 8;
      const float2 v = load_shared8f(from);
      if (ROWS == 16) {
        const float2 w = load_shared8f(from + 8 * CHUNKS * 32);
        sums[j][0] += v.x, sums[j][1] += v.y, sums[j][2] += w.x, sums[j][3] += w.y;
      } else {
        sums[j][0] += first_row == 0 ? v.x : 0.f, sums[j][1] += first_row == 0 ? v.y : 0.f;
        sums[j][2] += first_row == 8 ? v.x : 0.f, sums[j][3] += first_row == 8 ? v.y : 0.f;
      }
    }
    __syncwarp();
  }
}

// The result of 32 (pixel, group) pairs by a gather of all taps. Lane l owns pair l: its offsets are `taps`, its pixel
// is (oy, ox), `valid` says whether it exists. store(pair, chunk, words) takes eight channels' results; image_of(pair)
// points to the pair's first channel of CHUNKS chunks in the image. `scratch` holds two matrices S.
template <typename T, int CHUNKS, typename ImageOf, typename Store>
__device__ __forceinline__ void gather_taps(const FarContext& c, const Taps& taps, bool valid, int oy, int ox,
                                            uint32_t scratch, int lane, ImageOf image_of, Store store) {
  constexpr int SLOTS = 5, PAIRS = 32 / CHUNKS;  // taps whose places are in shared memory at a time; pairs of one pass
  using Places = FarPlaces<T, 32, SLOTS>;
  static_assert(Places::BYTES <= 2 * StencilMatrix::BYTES, "the places are written where S is in the other path");
  const int pair_in_pass = lane / CHUNKS, chunk = lane % CHUNKS;
  const float base_x = static_cast<float>(ox + 1 - c.pad_w), base_y = static_cast<float>(oy + 1 - c.pad_h);
  float sum[CHUNKS][8] = {};
#pragma unroll
  for (int first_tap = 0; first_tap < kTaps; first_tap += SLOTS) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int k = first_tap + slot;
      if (k >= kTaps) break;
      const float x = base_x + c.scale * (static_cast<float>(k / 3 - 1) + Dtype<T>::low(taps.word[k]));
      const float y = base_y + c.scale * (static_cast<float>(k % 3 - 1) + Dtype<T>::high(taps.word[k]));
      Places::store(scratch, lane * SLOTS + slot, c, x, y, valid ? taps.mask<T>(k) : 0.f);
    }
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < CHUNKS; ++pass) {
      const int pair = pass * PAIRS + pair_in_pass, count = first_tap + SLOTS <= kTaps ? SLOTS : kTaps - first_tap;
      const T* image = image_of(pair) + chunk * 8;
#pragma unroll 1
      for (int slot = 0; slot < count; ++slot) Places::gather(sum[pass], scratch, pair * SLOTS + slot, c, image);
    }
    __syncwarp();
  }
#pragma unroll
  for (int pass = 0; pass < CHUNKS; ++pass) {
    const float(&v)[8] = sum[pass];
    using D = Dtype<T>;
    store(pass * PAIRS + pair_in_pass, chunk,
          make_uint4(D::pack(v[0], v[1]), D::pack(v[2], v[3]), D::pack(v[4], v[5]), D::pack(v[6], v[7])));
  }
}

}  // namespace dcngen::window
