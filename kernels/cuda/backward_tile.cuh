// The window backward of one tile: offset and mask gradients and the owned input gradient, on tensor cores.
//
// Frame: u = input coordinates. Output pixel p has its middle tap at u = p + shift, shift = 1 - pad. A tap whose
// displacement d from its own integer place satisfies |d| < 1 in x and y ("near") reads only the 3x3 pixels around
// that place, so the nine taps together are a 5x5 stencil around p with weights
//   W[j + 1 + b][i + 1 + a] += m * hat_b(dy) * hat_a(dx),  hat_-1 = max(-d, 0), hat_0 = 1 - |d|, hat_1 = max(d, 0)
// that sit at fixed register indices. A unit is 8x4 pixels, one warp, one pixel a lane: two 4x4 blocks.
//   T(16 x 64) = grad_output(block) * input(8x8 window)^T gives each pixel its 25 products with the window;
//     a tap's three gradients are differences of 9 of them.
//   grad_input(16 x D) = S(16 x 64) * grad_output(8x8 window), S[q, p] = W_p[q - p], q in the block.
// Every p stores its 25 weights once, as the 6 rows x 8 columns of the 4-aligned frame they fall in, in pieces of
// 2 rows x 4 columns (16 bytes): a piece is one row of a transposed 8x8 fragment of S for the block that covers it.
#pragma once

#include "backward_primitives.cuh"

namespace dcngen::backward {

struct Maps {
  CUtensorMap input, grad_output, offset_mask, grad_input;
};

struct TileArgs {
  const void* offset_mask;
  void* grad_offset_mask;
  uint8_t* far_units;   // one flag a unit: some sample of it is not near
  uint16_t* far_masks;  // of a flagged unit: bit k of lane l's mask is set where tap k of pixel l is not near
  int64_t offset_mask_stride, grad_offset_mask_stride;
  int channels;  // of grad_offset_mask; those past 27 * groups are written 0
  int groups;
  window::FastDivide by_group, by_tiles_x, by_tiles_y;  // block = ((image * tiles_y + y) * tiles_x + x) * groups + group
  int width_out, height_out, width_in, height_in;
  int origin_x, origin_y;  // u of tile (0, 0)
  int end_x, end_y;        // past the last u that is an input or the middle of an output
  int shift_x, shift_y;
  float scale;
};

template <int D, int UNITS_X, int UNITS_Y>
struct TileShape {
  static constexpr int kWarps = UNITS_X * UNITS_Y, kThreads = 32 * kWarps;
  static constexpr int kWidth = 8 * UNITS_X, kHeight = 4 * UNITS_Y;
  static constexpr int kPitch = kWidth + 4, kRows = kHeight + 4, kSlots = kPitch * kRows;  // with the halo of 2
  static constexpr int kRing = kSlots - kWidth * kHeight;
  static_assert(kPitch % 8 == 4, "the swizzles' address arithmetic counts on it");

  static constexpr int round_up(int bytes) { return (bytes + 1023) / 1024 * 1024; }
  static constexpr int most(int a, int b) { return a > b ? a : b; }
  // Region A: the input tile, then staging of both results. B: grad_output. C: offset_mask and, behind it, T of one
  // block a warp, then the weights W of all pixels.
  static constexpr int kPixelBytes = 2 * D, kTileBytes = kSlots * kPixelBytes;
  static constexpr int kOffsetMaskBytes = kSlots * 64, kProducts = 672 * 4, kWeights = kSlots * 96;
  static constexpr int kInputStage = 32 * kPixelBytes, kOffsetMaskStage = 32 * 56;  // a warp
  static constexpr int kRegionA = round_up(most(kTileBytes, kWarps * (kInputStage + kOffsetMaskStage)));
  static constexpr int kRegionB = round_up(kTileBytes);
  static constexpr int kRegionC = most(kWeights, kOffsetMaskBytes + kWarps * kProducts);
  static constexpr int kShared = kRegionA + kRegionB + kRegionC + 16 /* barrier */;
  // Blocks of a multiprocessor: by its shared memory, but leave a thread at least 128 registers.
  static constexpr int kByMemory = 227 * 1024 / (kShared + 1024), kByRegisters = 512 / kThreads;
  static constexpr int kBlocks = kByMemory < kByRegisters ? kByMemory : kByRegisters;
};

// Byte offset of a pixel's 16-byte piece in a tile of 2 * D bytes a pixel, as the copy engine's swizzle places it.
template <int D>
__device__ __forceinline__ uint32_t tile_offset(int slot, int piece) {
  constexpr int kPieces = D / 8;
  constexpr int kShift = D == 16 ? 2 : D == 32 ? 1 : 0;
  return slot * (2 * D) + ((piece ^ ((slot >> kShift) & (kPieces - 1))) << 4);
}

// The lane's address for the fragments of an 8x8 window whose first pixel is `slot`. Since the pitch is 4 mod 8, going
// one row down or four pixels right flips one known bit of the swizzle: row_step and block_step.
template <int D, int PITCH>
struct Window {
  uint32_t address;
  __device__ __forceinline__ Window(uint32_t tile, int slot, int lane) {
    const int down = D == 16 ? lane >> 4 : 0, piece = D == 16 ? (lane >> 3) & 1 : lane >> 3;
    address = tile + tile_offset<D>(slot + down * PITCH + (lane & 7), piece);
  }
  // Fragments of window rows 2k and 2k + 1: f[row parity][piece of 8 channels].
  template <bool TRANSPOSED>
  __device__ __forceinline__ void load(uint32_t (&f)[2][D / 8], int k) const {
    const uint32_t even = address + 2 * k * PITCH * 2 * D;
    uint32_t r[4];
    if constexpr (D == 16) {
      load_fragments<TRANSPOSED>(r, even);
#pragma unroll
      for (int i = 0; i < 4; ++i) f[i >> 1][i & 1] = r[i];
    } else {
      const uint32_t odd = (address ^ D) + (2 * k + 1) * PITCH * 2 * D;
#pragma unroll
      for (int part = 0; part < D / 32; ++part) {
        load_fragments<TRANSPOSED>(r, even ^ (part << 6));
#pragma unroll
        for (int i = 0; i < 4; ++i) f[0][4 * part + i] = r[i];
        load_fragments<TRANSPOSED>(r, odd ^ (part << 6));
#pragma unroll
        for (int i = 0; i < 4; ++i) f[1][4 * part + i] = r[i];
      }
    }
  }
};

template <int D>
__device__ __forceinline__ uint32_t four_right(uint32_t address) {
  return (address ^ D) + 4 * 2 * D;
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

// Returns, as bits, the taps whose gradients the products do not give: those that are not near, NaN among them. Of these
// the ones beyond 1 leave no weights either: offset and mask become 0. (At |d| = 1 the weights are exact, only the
// derivative is that of a cell further out.)
template <typename T>
__device__ __forceinline__ unsigned remove_far(OffsetMask& om, float scale) {
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
    far |= (fabsf(d.x) < 1.f && fabsf(d.y) < 1.f ? 0u : 1u) << k;
    beyond |= (fabsf(d.x) <= 1.f && fabsf(d.y) <= 1.f ? 0u : 1u) << k;
  }
  if (beyond == 0) return far;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    if (beyond >> k & 1) {
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
    store_pair(at, right ? 0u : q0, right ? q0 : q1);
    store_pair(at + 16, right ? q1 : q2, right ? q2 : 0u);
  }
  __device__ __forceinline__ void clear_unused() const {
    store_pair(unused, 0u, 0u);
    store_pair(unused + 16, 0u, 0u);
  }
};

__device__ __forceinline__ void store_no_weights(uint32_t to) {
#pragma unroll
  for (int piece = 0; piece < 12; ++piece) store_pair(to + 8 * piece, 0u, 0u);
}

// T of one block: 16 rows of grad_output at `rows` (the lane's fragment address) times the window.
template <typename T, int D, int PITCH>
__device__ __forceinline__ void multiply_window(float (&t)[8][4], const Window<D, PITCH>& window, uint32_t rows) {
  uint32_t a[D / 16][4];
#pragma unroll
  for (int k = 0; k < D / 16; ++k) load_fragments<false>(a[k], rows ^ (k << 5));
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    uint32_t b[2][D / 8];
    window.template load<false>(b, pair);
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      float(&c)[4] = t[2 * pair + parity];
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = 0.f;
#pragma unroll
      for (int k = 0; k < D / 16; ++k) HalfTraits<T>::mma(c, a[k], b[parity][2 * k], b[parity][2 * k + 1]);
    }
  }
}

// Regroups T of one block through `to`, this warp's: the lane of a pixel of the block (`owner`) takes its 5x5 products.
__device__ __forceinline__ void exchange_products(float (&mine)[5][5], const float (&t)[8][4], uint32_t to, bool owner,
                                                  int lane) {
  // Floats: pixel row 168, pixel 40, its window row (five of the eight) 8: no bank conflicts either way.
  const int r = lane >> 4, c = (lane >> 2) & 3;
  const uint32_t base = to + 4 * (160 * r + 40 * c + 2 * (lane & 3));
#pragma unroll
  for (int row = 0; row < 8; ++row) {
    const float(&v)[4] = t[row];
    const uint32_t at = base + 32 * row;
    if (row <= 5 && row - r >= 0 && row - r <= 4) store_pair(at, __float_as_uint(v[0]), __float_as_uint(v[1]));
    if (row >= 2 && row - r >= 2 && row - r <= 6) {
      store_pair(at + 4 * 320, __float_as_uint(v[2]), __float_as_uint(v[3]));
    }
  }
  __syncwarp();
  const uint32_t own = to + 4 * (168 * (lane >> 3) + 41 * (lane & 3));
#pragma unroll
  for (int row = 0; row < 5; ++row) {
#pragma unroll
    for (int column = 0; column < 5; ++column) {
      if (owner) mine[row][column] = __uint_as_float(window::load_shared(own + 4 * (8 * row + column)));
    }
  }
  __syncwarp();
}

// Each lane's 5x5 products of the warp's two blocks.
template <typename T, int D, int PITCH>
__device__ __forceinline__ void pixel_products(float (&mine)[5][5], uint32_t input, uint32_t grad_output, uint32_t to,
                                               int slot, int lane) {
  Window<D, PITCH> window(input, slot, lane);
  const int m = lane & 15;
  uint32_t rows = grad_output + tile_offset<D>(slot + (2 + (m >> 2)) * PITCH + 2 + (m & 3), lane >> 4);
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    float t[8][4];
    multiply_window<T>(t, window, rows);
    exchange_products(mine, t, to, ((lane >> 2) & 1) == block, lane);
    window.address = four_right<D>(window.address);
    rows = four_right<D>(rows);
  }
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
      store_half(to + 36 + 2 * k, HalfTraits<T>::pack(gradient.mask, 0.f));
      add_tap(w, i, j, d, m);
    }
    frame.template store_row<T>(j, w[j]);
  }
  frame.template store_row<T>(3, w[3]);
  frame.template store_row<T>(4, w[4]);
  frame.clear_unused();
}

// Writes the warp's staged gradients of offset_mask, 27 numbers a pixel: half a warp a pixel, a word a lane. An odd group
// begins in the middle of a word of memory; the one number that shares its word with another group goes alone.
template <typename T>
__device__ __forceinline__ void write_offset_mask(const TileArgs& args, uint32_t stage, int n, int group, int u_x,
                                                  int u_y, int lane) {
  const int word = lane & 15, odd = group & 1, x0 = u_x - args.shift_x, y0 = u_y - args.shift_y;
  const bool alone = word == (odd ? 0 : 13), pair = word <= 13 && !alone;
  const int64_t stride = args.grad_offset_mask_stride, row_stride = stride * args.width_out;
  uint16_t* row = static_cast<uint16_t*>(args.grad_offset_mask) +
                  (int64_t{n} * args.height_out + y0) * row_stride + (x0 + (lane >> 4)) * stride + 27 * group;
  const uint32_t from = stage + 56 * (lane >> 4) + 4 * word;
#pragma unroll
  for (int y = 0; y < 4; ++y, row += row_stride) {
    if (y0 + y < 0 || y0 + y >= args.height_out) continue;
    uint16_t* to = row + 2 * word - odd;
#pragma unroll
    for (int x = 0; x < 8; x += 2, to += 2 * stride) {
      const uint32_t at = from + 56 * (8 * y + x), v = window::load_shared(at);
      const uint32_t before = window::load_shared(word == 0 ? at : at - 4);
      const uint32_t both = odd ? __funnelshift_l(before, v, 16) : v;
      const bool inside = static_cast<unsigned>(x0 + x + (lane >> 4)) < static_cast<unsigned>(args.width_out);
      if (pair && inside) *reinterpret_cast<uint32_t*>(to) = both;
      if (alone && inside) to[odd] = static_cast<uint16_t>(v);
    }
  }
  if (group == args.groups - 1) {
    const int ow = x0 + (lane & 7), oh = y0 + (lane >> 3);
    if (ow < 0 || ow >= args.width_out || oh < 0 || oh >= args.height_out) return;
    uint16_t* to = static_cast<uint16_t*>(args.grad_offset_mask) +
                   ((int64_t{n} * args.height_out + oh) * args.width_out + ow) * stride;
    for (int c = 27 * args.groups; c < args.channels; ++c) to[c] = 0;
  }
}

// The input gradient of the warp's two blocks into its stage, rounded once.
template <typename T, int D, int PITCH>
__device__ __forceinline__ void multiply_weights(uint32_t stage, uint32_t weights, uint32_t grad_output, int slot,
                                                 int lane) {
  Window<D, PITCH> window(grad_output, slot, lane);
  const int column = lane & 7, matrix = lane >> 3, low = matrix & 1, high = matrix >> 1;
  const int side = column < 4 ? 1 : 0;
  const uint32_t at = weights + 96 * (slot + column) + 16 * side;
  // Rows 0, 1 of the window reach only the block's upper half and rows 6, 7 only the lower one: one load for all four.
  const uint32_t outer = at + 96 * PITCH * (matrix < 2 ? matrix : matrix + 4) + (matrix < 2 ? 64 : 0);
  const uint32_t upper = at + 96 * PITCH * (2 + high) + 32 + 32 * low, lower = at + 96 * PITCH * (4 + high) + 32 * low;
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    uint32_t edge[4], a[4][4];
    load_fragments<true>(edge, outer + block * 4 * 96);
    load_fragments<true>(a[1], upper + block * 4 * 96);
    load_fragments<true>(a[2], lower + block * 4 * 96);
    a[0][0] = edge[0], a[0][1] = 0, a[0][2] = edge[1], a[0][3] = 0;
    a[3][0] = 0, a[3][1] = edge[2], a[3][2] = 0, a[3][3] = edge[3];
    float c[D / 8][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t b[2][D / 8];
      window.template load<true>(b, k);
#pragma unroll
      for (int piece = 0; piece < D / 8; ++piece) HalfTraits<T>::mma(c[piece], a[k], b[0][piece], b[1][piece]);
    }
    window.address = four_right<D>(window.address);

    uint32_t upper_half[D / 8], lower_half[D / 8];
#pragma unroll
    for (int piece = 0; piece < D / 8; ++piece) {
      upper_half[piece] = HalfTraits<T>::pack(c[piece][0], c[piece][1]);
      lower_half[piece] = HalfTraits<T>::pack(c[piece][2], c[piece][3]);
    }
    const int pixel = 4 * block + 8 * ((lane >> 2) & 1) + (lane & 3);  // of the unit; the lower half is two rows down
    if constexpr (D == 16) {
      store_matrices(stage + tile_offset<D>(pixel + 16 * high, low), upper_half[0], upper_half[1], lower_half[0],
                     lower_half[1]);
    } else {
#pragma unroll
      for (int part = 0; part < D / 32; ++part) {
        const int first = 4 * part;
        store_matrices(stage + tile_offset<D>(pixel, first + matrix), upper_half[first], upper_half[first + 1],
                       upper_half[first + 2], upper_half[first + 3]);
        store_matrices(stage + tile_offset<D>(pixel + 16, first + matrix), lower_half[first], lower_half[first + 1],
                       lower_half[first + 2], lower_half[first + 3]);
      }
    }
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

template <typename T, int D, int UNITS_X, int UNITS_Y>
__global__ void __launch_bounds__(TileShape<D, UNITS_X, UNITS_Y>::kThreads, TileShape<D, UNITS_X, UNITS_Y>::kBlocks)
    tile_kernel(const __grid_constant__ Maps maps, const TileArgs args) {
#if __CUDA_ARCH__ >= 900
  using Shape = TileShape<D, UNITS_X, UNITS_Y>;
  constexpr int kPitch = Shape::kPitch;
  extern __shared__ __align__(1024) uint8_t shared[];  // the swizzles of the copy engine go by address
  const uint32_t region_a = window::smem_address(shared);
  const uint32_t region_b = region_a + Shape::kRegionA, region_c = region_b + Shape::kRegionB;
  const uint32_t barrier = region_c + Shape::kRegionC;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;

  uint32_t index = blockIdx.x;
  const int group = args.by_group.split(index), tile_x = args.by_tiles_x.split(index);
  const int tile_y = args.by_tiles_y.split(index), n = index;
  const int u_x0 = args.origin_x + tile_x * Shape::kWidth, u_y0 = args.origin_y + tile_y * Shape::kHeight;

  const GroupNumbers numbers(group);
  if (thread == 0) {
    barrier_init(barrier, 1);
    barrier_expect(barrier, 2 * Shape::kTileBytes + Shape::kOffsetMaskBytes);
    const int x = u_x0 - 2, y = u_y0 - 2;
    load_tile(region_a, &maps.input, barrier, group * D, x, y, n);
    load_tile(region_b, &maps.grad_output, barrier, group * D, x - args.shift_x, y - args.shift_y, n);
    load_tile(region_c, &maps.offset_mask, barrier, numbers.first, x - args.shift_x, y - args.shift_y, n);
  }
  const int unit_x = 8 * (warp % UNITS_X), unit_y = 4 * (warp / UNITS_X);  // in the tile; the window begins there too
  const int u_x = u_x0 + unit_x, u_y = u_y0 + unit_y;
  const bool active = u_x < args.end_x && u_y < args.end_y;
  const int window_slot = unit_y * kPitch + unit_x;
  const int x = unit_x + 2 + (lane & 7), y = unit_y + 2 + (lane >> 3), slot = y * kPitch + x;
  const int ow0 = u_x0 - 2 - args.shift_x, oh0 = u_y0 - 2 - args.shift_y;  // output pixel of slot 0
  constexpr int kPasses = (Shape::kRing + Shape::kThreads - 1) / Shape::kThreads;
  const uint32_t tail = numbers.tail(args, n, ow0 + x, oh0 + y);
  uint32_t ring_tail[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    int rx, ry;
    const int number = thread + pass * Shape::kThreads;
    ring_pixel<Shape>(number < Shape::kRing ? number : 0, rx, ry);
    ring_tail[pass] = numbers.tail(args, n, ow0 + rx, oh0 + ry);
  }
  __syncthreads();
  barrier_wait(barrier, 0);

  float products[5][5];
  if (active) {
    pixel_products<T, D, kPitch>(products, region_a, region_b,
                                 region_c + Shape::kOffsetMaskBytes + warp * Shape::kProducts, window_slot, lane);
  }
  OffsetMask om = numbers.load(region_c, slot, tail);
  OffsetMask ring[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    int rx, ry;
    const int number = thread + pass * Shape::kThreads;
    ring_pixel<Shape>(number < Shape::kRing ? number : 0, rx, ry);
    ring[pass] = numbers.load(region_c, ry * kPitch + rx, ring_tail[pass]);
  }
  __syncthreads();  // the input tile, the offsets and T have been read: results and weights may take their place

  const uint32_t stage = region_a + warp * Shape::kInputStage;
  const uint32_t offset_mask_stage =
      region_a + Shape::kWarps * Shape::kInputStage + warp * Shape::kOffsetMaskStage;
  if (active) {
    const int px = u_x0 - 2 + x, py = u_y0 - 2 + y;  // the pixel's u
    const bool inside = px >= args.shift_x && px < args.width_out + args.shift_x && py >= args.shift_y &&
                        py < args.height_out + args.shift_y;
    unsigned far = remove_far<T>(om, args.scale);
    if (!inside) far = 0;
    const bool any_far = __any_sync(window::kAllLanes, far != 0);
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * Shape::kWarps + warp;
    if (lane == 0) args.far_units[unit] = any_far;
    if (any_far) args.far_masks[32 * unit + lane] = static_cast<uint16_t>(far);
    pixel_gradients<T>(om, products, px, py, args.scale, offset_mask_stage + 56 * lane,
                       WeightFrame(region_c + 96 * slot, x, y));
    __syncwarp();
    write_offset_mask<T>(args, offset_mask_stage, n, group, u_x, u_y, lane);
  } else {
    if (lane == 0) args.far_units[static_cast<int64_t>(blockIdx.x) * Shape::kWarps + warp] = 0;
    store_no_weights(region_c + 96 * slot);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    int rx = 0, ry = 0;
    const int number = thread + pass * Shape::kThreads;
    if (number < Shape::kRing) ring_pixel<Shape>(number, rx, ry);
    const int px = u_x0 - 2 + rx - args.shift_x, py = u_y0 - 2 + ry - args.shift_y;
    const bool inside = px >= 0 && px < args.width_out && py >= 0 && py < args.height_out;
    const bool some_inside = __any_sync(window::kAllLanes, inside && number < Shape::kRing);
    const uint32_t to = region_c + 96 * (ry * kPitch + rx);
    if (number >= Shape::kRing) continue;
    if (some_inside) {
      remove_far<T>(ring[pass], args.scale);
      pixel_weights<T>(ring[pass], args.scale, WeightFrame(to, rx, ry));
    } else {
      store_no_weights(to);
    }
  }
  __syncthreads();
  if (active) {
    multiply_weights<T, D, kPitch>(stage, region_c, region_b, window_slot, lane);
    fence_stores();
    __syncwarp();
    const bool has_input = u_x >= 0 && u_y >= 0 && u_x < args.width_in && u_y < args.height_in;
    if (lane == 0 && has_input) store_tile(&maps.grad_input, stage, group * D, u_x, u_y, n);
  }
#endif
}

}  // namespace dcngen::backward
