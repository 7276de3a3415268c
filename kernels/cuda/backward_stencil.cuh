// The tile kernels' arguments and the stencil of one pixel: its offsets and masks, its 25 weights, its gradients.
// backward_tile.cuh says what they are for.
#pragma once

#include "backward_primitives.cuh"

namespace dcngen::backward {

struct Maps {
  CUtensorMap input, grad_output, offset_mask, grad_input;
};

struct TileArgs {
  const void* offset_mask;
  void* grad_offset_mask;
  uint8_t* far_units;   // of a unit: 0 where all its samples are near, else 1 + how many of the others are in reach
  uint16_t* far_masks;  // of a flagged unit: bit k of lane l's mask is set where tap k of pixel l is not near
  int64_t offset_mask_stride, grad_offset_mask_stride;
  int channels;  // of grad_offset_mask; those past 27 * groups are written 0
  int groups;
  // block = ((image * tiles_y + y) * tiles_x + x) * groups + group
  window::FastDivide by_group, by_tiles_x, by_tiles_y;
  int width_out, height_out, width_in, height_in;
  int origin_x, origin_y;  // u of tile (0, 0)
  int end_x, end_y;        // past the last u that is an input or the middle of an output
  int shift_x, shift_y;
  float scale;
  float reach;  // displacements that far_units counts
  float* sums;  // a row of every unit (backward_sums.cuh); null: not asked for
  uint32_t* finished_sums;  // of every group: set to 0 for sum_kernel
};

// Byte offset of a pixel's 16-byte piece in a tile of 2 * D bytes a pixel, as the copy engine's swizzle places it.
template <int D>
__device__ __forceinline__ uint32_t tile_offset(int slot, int piece) {
  constexpr int kPieces = D / 8;
  constexpr int kShift = D == 16 ? 2 : D == 32 ? 1 : 0;
  return slot * (2 * D) + ((piece ^ ((slot >> kShift) & (kPieces - 1))) << 4);
}

// The 27 numbers of one (pixel, group): words 0..8 hold (x, y) of a tap, words 9..13 the masks.
struct OffsetMask {
  uint32_t word[14];
};

// The copy engine starts at multiples of 16 bytes, so a tile holds 32 numbers from `first` on; the group's own begin
// `skip` later, and where that is 6 or 7 the last of them are past the tile: the `tail`, fetched by the lane itself.
struct GroupNumbers {
  int first, skip;
  __device__ __forceinline__ explicit GroupNumbers(int group) : first((27 * group) & ~7), skip((27 * group) & 7) {}

  __device__ __forceinline__ uint32_t tail(const TileArgs& args, int n, int ow, int oh) const {
    if (skip < 6 || static_cast<unsigned>(ow) >= static_cast<unsigned>(args.width_out) ||
        static_cast<unsigned>(oh) >= static_cast<unsigned>(args.height_out)) {
      return 0;
    }
    const int64_t pixel = (int64_t{n} * args.height_out + oh) * args.width_out + ow;
    const auto* numbers = static_cast<const uint16_t*>(args.offset_mask) + pixel * args.offset_mask_stride;
    return __ldg(reinterpret_cast<const uint32_t*>(numbers + first + 32));
  }

  template <int SKIP>
  static __device__ __forceinline__ void align(OffsetMask& om, const uint32_t (&raw)[18], unsigned order) {
#pragma unroll
    for (int i = 0; i < 14; ++i) om.word[i] = __byte_perm(raw[SKIP + i], raw[SKIP + i + 1], order);
  }

  __device__ __forceinline__ OffsetMask load(uint32_t tile, int slot, uint32_t tail) const {
    uint32_t raw[18];
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      const uint4 v = window::load_shared16(tile + tile_offset<32>(slot, piece));
      raw[4 * piece] = v.x, raw[4 * piece + 1] = v.y, raw[4 * piece + 2] = v.z, raw[4 * piece + 3] = v.w;
    }
    raw[16] = tail, raw[17] = 0;
    const unsigned order = skip & 1 ? 0x5432 : 0x3210;
    OffsetMask om;
    switch (skip >> 1) {  // the same for the whole grid block: register indices stay constants
      case 0: align<0>(om, raw, order); break;
      case 1: align<1>(om, raw, order); break;
      case 2: align<2>(om, raw, order); break;
      default: align<3>(om, raw, order); break;
    }
    return om;
  }
};

template <typename T>
__device__ __forceinline__ float mask_of(const OffsetMask& om, int k) {
  const uint32_t pair = om.word[9 + k / 2];
  return k % 2 ? HalfTraits<T>::high(pair) : HalfTraits<T>::low(pair);
}

// The displacement of tap (i, j) from its integer place; offset_scale stretches the grid as well as the offset.
template <typename T>
__device__ __forceinline__ float2 displacement(uint32_t word, int i, int j, float scale) {
  return make_float2(fmaf(scale, HalfTraits<T>::low(word), (scale - 1.f) * (i - 1)),
                     fmaf(scale, HalfTraits<T>::high(word), (scale - 1.f) * (j - 1)));
}

// What a far tap adds to its pixel's word: its bit, and from bit 16 on a count of those that a wider window reaches.
__device__ __forceinline__ unsigned far_bits(float2 d, int k, float reach) {
  return (1u << k) + (fabsf(d.x) < reach && fabsf(d.y) < reach ? 0x10000u : 0u);
}

// Writes a unit's flag and, where it is set, the bits of its pixels; returns whether it is.
__device__ __forceinline__ bool note_far_samples(const TileArgs& args, int64_t unit, unsigned far, int lane) {
  unsigned flag = 0;
  if (__any_sync(window::kAllLanes, far != 0)) {
    flag = 1 + min(__reduce_add_sync(window::kAllLanes, far >> 16), 254u);
    args.far_masks[32 * unit + lane] = static_cast<uint16_t>(far);
  }
  if (lane == 0) args.far_units[unit] = static_cast<uint8_t>(flag);
  return flag != 0;
}

// Returns, as bits, the taps whose gradients the products do not give: those that are not near, NaN among them. Of
// these the ones beyond 1 leave no weights either: offset and mask become 0. (At |d| = 1 the weights are exact, only
// the derivative is that of a cell further out.) Counts, too: see far_bits. `removed(tap, displacement, mask)` is called
// for each of them.
template <typename T, typename Removed>
__device__ __forceinline__ unsigned remove_far(OffsetMask& om, float scale, float reach, Removed removed) {
  constexpr uint32_t kToSign = 0x80008000u - HalfTraits<T>::kOne * 0x10001u;  // |h| >= 1 sets the top bit
  unsigned far = 0, beyond = 0;
  if (scale == 1.f) {
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < 9; ++k) largest = __vmaxu2(largest, om.word[k] & 0x7fff7fffu);
    if (((largest + kToSign) & 0x80008000u) == 0) return 0;
  }
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    const float2 d = displacement<T>(om.word[k], k / 3, k % 3, scale);
    if (!(fabsf(d.x) < 1.f && fabsf(d.y) < 1.f)) far += far_bits(d, k, reach);
    beyond |= (fabsf(d.x) <= 1.f && fabsf(d.y) <= 1.f ? 0u : 1u) << k;
  }
  if (beyond == 0) return far;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    if (beyond >> k & 1) {
      removed(k, displacement<T>(om.word[k], k / 3, k % 3, scale), mask_of<T>(om, k));
      om.word[k] = 0;
      om.word[9 + k / 2] &= k % 2 ? 0x0000ffffu : 0xffff0000u;
    }
  }
  return far;
}

__device__ __forceinline__ void add_tap(float (&w)[5][5], int i, int j, float2 d, float m) {
  const float hx[3] = {fmaxf(-d.x, 0.f), 1.f - fabsf(d.x), fmaxf(d.x, 0.f)};
  const float hy[3] = {m * fmaxf(-d.y, 0.f), m * (1.f - fabsf(d.y)), m * fmaxf(d.y, 0.f)};
#pragma unroll
  for (int b = 0; b < 3; ++b) {
#pragma unroll
    for (int a = 0; a < 3; ++a) w[j + b][i + a] = fmaf(hy[b], hx[a], w[j + b][i + a]);
  }
}

// Where a pixel at column x and row y of the tile with its halo stores its weights in its frame.
struct WeightFrame {
  uint32_t even, odd, unused;  // rows 0, 2, 4; rows 1, 3; the row of the frame that the pixel does not reach
  int shift;
  bool right;
  __device__ __forceinline__ WeightFrame(uint32_t to, int x, int y) {
    even = to + (y & 1 ? 8 : 0);
    odd = to + (y & 1 ? 32 : 8);
    unused = to + (y & 1 ? 0 : 72);
    shift = (x & 1) * 16;
    right = x & 2;
  }
  // Rounds one row of five weights and stores it, moved to the pixel's column.
  template <typename T>
  __device__ __forceinline__ void store_row(int row, const float (&w)[5]) const {
    const uint32_t p0 = HalfTraits<T>::pack(w[0], w[1]), p1 = HalfTraits<T>::pack(w[2], w[3]);
    const uint32_t p2 = HalfTraits<T>::pack(w[4], 0.f);
    const uint32_t q0 = p0 << shift, q1 = __funnelshift_l(p0, p1, shift), q2 = __funnelshift_l(p1, p2, shift);
    const uint32_t at = (row % 2 ? odd : even) + 32 * (row / 2);
    window::store_shared8(at, right ? 0u : q0, right ? q0 : q1);
    window::store_shared8(at + 16, right ? q1 : q2, right ? q2 : 0u);
  }
  __device__ __forceinline__ void clear_unused() const {
    window::store_shared8(unused, 0u, 0u);
    window::store_shared8(unused + 16, 0u, 0u);
  }
};

__device__ __forceinline__ void store_no_weights(uint32_t to) {
#pragma unroll
  for (int piece = 0; piece < 12; ++piece) window::store_shared8(to + 8 * piece, 0u, 0u);
}

struct TapGradient {
  float x, y, mask;
};

// The derivative is that of the cell that floor() picks: at d == 0 the right-hand one. `from_x` and `from_y` say from
// which d on: 0, or just above 0 where d == 0 is the place -1, which does not count (its right-hand cell would).
__device__ __forceinline__ TapGradient tap_gradient(const float (&t)[5][5], int i, int j, float2 d, float from_x,
                                                    float from_y) {
  float value[3], slope[3];
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    const float(&row)[5] = t[j + b];
    slope[b] = d.x >= from_x ? row[i + 2] - row[i + 1] : row[i + 1] - row[i];
    value[b] = fmaf(d.x, slope[b], row[i + 1]);
  }
  const bool down = d.y >= from_y;
  const float dv = down ? value[2] - value[1] : value[1] - value[0];
  const float ds = down ? slope[2] - slope[1] : slope[1] - slope[0];
  return {fmaf(d.y, ds, slope[1]), dv, fmaf(d.y, dv, value[1])};
}

// Weights of one pixel; taps go row by row so that a finished row leaves the registers.
template <typename T>
__device__ __forceinline__ void pixel_weights(const OffsetMask& om, float scale, const WeightFrame& frame) {
  float w[5][5] = {};
#pragma unroll
  for (int j = 0; j < 3; ++j) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int k = 3 * i + j;
      add_tap(w, i, j, displacement<T>(om.word[k], i, j, scale), mask_of<T>(om, k));
    }
    frame.template store_row<T>(j, w[j]);
  }
  frame.template store_row<T>(3, w[3]);
  frame.template store_row<T>(4, w[4]);
  frame.clear_unused();
}

// The same with the gradients of the 27 numbers from the 25 products; they go to `to` in the order of memory.
template <typename T>
__device__ __forceinline__ void pixel_gradients(const OffsetMask& om, const float (&products)[5][5], int u_x, int u_y,
                                                float scale, uint32_t to, const WeightFrame& frame) {
  float w[5][5] = {};
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    const float from_y = u_y + j == 0 ? __int_as_float(1) : 0.f;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int k = 3 * i + j;
      const float from_x = u_x + i == 0 ? __int_as_float(1) : 0.f;
      const float2 d = displacement<T>(om.word[k], i, j, scale);
      const float m = mask_of<T>(om, k), factor = scale * m;
      const TapGradient gradient = tap_gradient(products, i, j, d, from_x, from_y);
      window::store_shared(to + 4 * k, HalfTraits<T>::pack(factor * gradient.x, factor * gradient.y));
      const uint32_t of_mask = HalfTraits<T>::pack(gradient.mask, 0.f);
      if (k < 8) {
        window::store_shared2(to + 36 + 2 * k, of_mask);
      } else {
        window::store_shared(to + 36 + 2 * k, of_mask);  // the half word behind is summed with it
      }
      add_tap(w, i, j, d, m);
    }
    frame.template store_row<T>(j, w[j]);
  }
  frame.template store_row<T>(3, w[3]);
  frame.template store_row<T>(4, w[4]);
  frame.clear_unused();
}

// Zeros behind the last group's numbers, in the pixels of the unit whose first output is (x0, y0): four lanes a pixel, 16
// bytes at a time but for the ends.
template <typename T>
__device__ __forceinline__ void clear_padding(const TileArgs& args, int n, int x0, int y0, int lane) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  const int used = 27 * args.groups, begin = min((used + kPiece - 1) / kPiece * kPiece, args.channels);
  const int end = args.channels - (args.channels - begin) % kPiece, x = x0 + (lane >> 2), part = lane & 3;
  if (used == args.channels || x < 0 || x >= args.width_out) return;
#pragma unroll 1
  for (int y = max(y0, 0); y < min(y0 + 4, args.height_out); ++y) {
    T* to = static_cast<T*>(args.grad_offset_mask) +
            ((int64_t{n} * args.height_out + y) * args.width_out + x) * args.grad_offset_mask_stride;
    for (int c = used + part; c < begin; c += 4) to[c] = T{};
    for (int c = begin + kPiece * part; c < end; c += 4 * kPiece) window::store_global16(to + c, make_uint4(0, 0, 0, 0));
    for (int c = end + part; c < args.channels; c += 4) to[c] = T{};
  }
}

// Pixel number `index` of the halo, row by row above and below, then the two columns left and right.
template <typename Shape>
__device__ __forceinline__ void ring_pixel(int index, int& x, int& y) {
  constexpr int kPitch = Shape::kPitch, kRows = Shape::kRows;
  if (index < 4 * kPitch) {
    y = index / kPitch;
    x = index - y * kPitch;
    if (y >= 2) y += kRows - 4;
  } else {
    const int rest = index - 4 * kPitch;
    y = 2 + rest / 4;
    x = rest % 4 < 2 ? rest % 4 : kPitch - 4 + rest % 4;
  }
}

}  // namespace dcngen::backward
