// Building blocks of the window kernels: DCNv4 with a 3x3 kernel, stride 1, dilation 1 as dense products.
//
// A sample within one pixel of its integer anchor ("near") is a weighted sum over the 3x3 neighbours of the anchor,
// with weights that are hat functions of its displacement. The nine taps of one (pixel, group) together are a 5x5
// stencil whose 25 places are known at compile time. For a block of 4x4 output pixels the stencils lie in a window of
// 8x8 input pixels, so that  out (16 x D) = S (16 x 64) * X_window (64 x D)  on the tensor cores. Conventions:
//   pixel m of a block   row m / 4, column m % 4
//   window pixel k       row k / 8, column k % 8; window pixel (0, 0) is input pixel (oy - pad - 1, ox - pad - 1)
//   stencil [y][x]       weight of window pixel (m / 4 + y, m % 4 + x)
//
// Parts, in order: fast division; pixel tiles in shared memory (swizzled, zero outside the image); offsets and masks;
// stencil weights; the matrix S and its fragments. Instructions are in instructions.cuh.
#pragma once

#include "instructions.cuh"
#include "launch.h"

namespace dcngen::window {

constexpr int kTaps = 9;
constexpr int kGroupValues = 3 * kTaps;             // offsets and masks of one (pixel, group)
constexpr int kTileChannels = 64;                   // channels of a pixel tile in shared memory
constexpr int kTilePixelBytes = 2 * kTileChannels;  // 8 chunks of 16 bytes

// ------------------------------------------------------------------------------------------------------ fast division

// n / divisor for 0 <= n < 2^31 as one multiplication, prepared on the host.
struct FastDivide {
  uint32_t divisor = 1, multiplier = 0, shift = 0;
  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    if (d == 1) return;
    uint32_t log2 = 0;
    while ((uint64_t{1} << log2) < d) ++log2;
    const uint32_t power = 31 + log2;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << power) + d - 1) / d);
    shift = power - 32;
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return divisor == 1 ? n : __umulhi(n, multiplier) >> shift;
  }
  // Replaces n by its quotient and returns the remainder.
  __device__ __forceinline__ uint32_t split(uint32_t& n) const {
    const uint32_t quotient = divide(n), remainder = n - quotient * divisor;
    n = quotient;
    return remainder;
  }
};

// ---------------------------------------------------------------------------------------- pixel tiles in shared memory

// A tile of ROWS x COLUMNS pixels, 128 bytes a pixel: 64 channels of 16 bits or 32 of fp32. The 16-byte chunks of a
// pixel are permuted by its number in the tile so that eight neighbouring pixels of a row, read at one chunk
// (ldmatrix), lie in different banks; for a tile aligned to 1024 bytes this is the 128-byte swizzle of the bulk copy
// engine.
template <int ROWS_, int COLUMNS_>
struct PixelTile {
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int BYTES = ROWS * COLUMNS * kTilePixelBytes;

  static __device__ __forceinline__ uint32_t address(uint32_t tile, int row, int column, int chunk) {
    const int pixel = row * COLUMNS + column;
    return tile + pixel * kTilePixelBytes + ((chunk ^ (pixel & 7)) << 4);
  }

  // Begins copying pixels (y0.., x0..) of an image, channels from `first` on as far as they are < channels; zeros
  // elsewhere. `image` points to the image's first value; it, pixel_stride and `first` allow 16-byte accesses. The
  // tile is split over THREADS threads in whole warps; the caller commits and waits.
  template <int THREADS, typename T>
  static __device__ __forceinline__ void copy(uint32_t tile, const T* image, int height, int width,
                                              int64_t pixel_stride, int y0, int x0, int first, int channels,
                                              int thread) {
    static_assert(COLUMNS % 4 == 0 && THREADS % 32 == 0, "a warp copies four pixels of a row");
    constexpr int VALUES = 16 / static_cast<int>(sizeof(T));  // of a chunk
    constexpr int QUADS = COLUMNS / 4, ITEMS = ROWS * QUADS, WARPS = THREADS / 32;
    const int lane = thread & 31, warp = thread >> 5, chunk = lane & 7, in_quad = lane >> 3;
    const bool has_channels = first + chunk * VALUES < channels;
    const T* source = image + first + chunk * VALUES;
#pragma unroll
    for (int step = 0; step < (ITEMS + WARPS - 1) / WARPS; ++step) {
      const int item = step * WARPS + warp;
      if (ITEMS % WARPS != 0 && item >= ITEMS) break;
      const int row = item / QUADS, column = (item % QUADS) * 4 + in_quad;
      const int y = y0 + row, x = x0 + column;
      const bool inside = has_channels && static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
                          static_cast<unsigned>(x) < static_cast<unsigned>(width);
      const T* from = inside ? source + static_cast<int64_t>(y * width + x) * pixel_stride : image;
      copy_async16(address(tile, row, column, chunk), from, inside);
    }
  }
};

// -------------------------------------------------------------------------------------------------- offsets and masks

// The bytes of an offset_mask pixel that hold groups [first_group, first_group + GROUPS), widened to 16-byte pieces.
// PIECES is the most that any first_group needs, and odd so that pixels at this pitch spread over the banks.
template <int GROUPS, int VALUE_BYTES = 2>
struct GroupSpan {
  static constexpr int NEEDED = (GROUPS * kGroupValues * VALUE_BYTES + 31 - VALUE_BYTES) / 16;
  static constexpr int PITCH = (NEEDED | 1) * 16;  // bytes from pixel to pixel in shared memory
  static __device__ __forceinline__ int first_byte(int first_group) {
    return (first_group * kGroupValues * VALUE_BYTES) & ~15;
  }
};

// A lane's share of copying `count` pixels of offset_mask to shared memory, pixel q at `to + q * GroupSpan::PITCH`,
// split over LANES threads. pixel_at(q) is q's pixel index in the image or negative (then zeros are written);
// bytes from limit_bytes on (the end of a pixel's values, a multiple of 16) are zeros too.
template <typename Span, int LANES, typename PixelAt>
__device__ __forceinline__ void copy_offset_mask(uint32_t to, const char* image, int64_t pixel_bytes, int first_byte,
                                                 int limit_bytes, int count, int lane, PixelAt pixel_at) {
  constexpr int LANES_PER_PIXEL = Span::NEEDED <= 4 ? 4 : Span::NEEDED <= 8 ? 8 : 16;
  const int piece = lane % LANES_PER_PIXEL;
#pragma unroll
  for (int q = lane / LANES_PER_PIXEL; q < count; q += LANES / LANES_PER_PIXEL) {
    const int pixel = pixel_at(q);
#pragma unroll
    for (int part = piece; part < Span::NEEDED; part += LANES_PER_PIXEL) {
      const int byte = first_byte + part * 16;
      const bool valid = pixel >= 0 && byte < limit_bytes;
      copy_async16(to + q * Span::PITCH + part * 16, valid ? image + pixel * pixel_bytes + byte : image, valid);
    }
  }
}

// Offsets and masks of one (pixel, group): word k < 9 is tap k's (dx, dy), the masks follow two a word.
struct Taps {
  uint32_t word[14];
  template <typename T>
  __device__ __forceinline__ float mask(int k) const {
    return k % 2 ? Dtype<T>::high(word[kTaps + k / 2]) : Dtype<T>::low(word[kTaps + k / 2]);
  }
};

// Reads the 27 values that begin at shared-memory address `from` (a multiple of 2).
__device__ __forceinline__ Taps load_taps(uint32_t from) {
  const uint32_t aligned = from & ~3u;
  const unsigned order = from & 2 ? 0x5432 : 0x3210;
  uint32_t raw[15];
#pragma unroll
  for (int i = 0; i < 14; ++i) raw[i] = load_shared(aligned + 4 * i);
  raw[14] = 0;
  Taps taps;
#pragma unroll
  for (int i = 0; i < 14; ++i) taps.word[i] = __byte_perm(raw[i], raw[i + 1], order);
  return taps;
}

// A tap's displacement from its anchor along one axis, scale * (anchor + offset) - anchor with anchor in {-1, 0, 1}.
struct OffsetScale {
  float scale;
  float near_bound;  // every tap with both |offset| <= near_bound is near, whatever its anchor; negative if unknown
  OffsetScale() = default;
  explicit OffsetScale(float s) : scale(s), near_bound(-1.f) {
    const float shift = s > 1.f ? s - 1.f : 1.f - s;
    if (s > 0.f && shift <= 1.f) near_bound = (1.f - shift) / s * (s == 1.f ? 1.f : 0.999999f);
  }
  __device__ __forceinline__ float displacement(float offset, int anchor) const {
    return fmaf(scale, offset, (scale - 1.f) * static_cast<float>(anchor));
  }
};

// True where some tap may leave the reach of its stencil (a NaN does).
template <typename T>
__device__ __forceinline__ bool may_be_far(const Taps& taps, const OffsetScale& scale) {
  uint32_t top = 0;
#pragma unroll
  for (int k = 0; k < kTaps; ++k) top = Dtype<T>::max_abs(top, taps.word[k]);
  return !(Dtype<T>::low(top) <= scale.near_bound && Dtype<T>::high(top) <= scale.near_bound);
}

// A bit for every tap that is not near.
template <typename T>
__device__ __forceinline__ unsigned far_taps(const Taps& taps, const OffsetScale& scale) {
  unsigned far = 0;
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    const float dx = scale.displacement(Dtype<T>::low(taps.word[k]), k / 3 - 1);
    const float dy = scale.displacement(Dtype<T>::high(taps.word[k]), k % 3 - 1);
    if (!(fabsf(dx) <= 1.f && fabsf(dy) <= 1.f)) far |= 1u << k;
  }
  return far;
}

// ----------------------------------------------------------------------------------------------------- stencil weights

// Hat functions of a displacement in [-1, 1]: the weights of the anchor's lower neighbour, the anchor, the upper one.
__device__ __forceinline__ void hat_weights(float (&w)[3], float displacement) {
  w[0] = __saturatef(-displacement);
  w[1] = 1.f - fabsf(displacement);
  w[2] = __saturatef(displacement);
}

// Adds tap (i, j), i over width, with displacements (dx, dy) from its anchor to a stencil.
__device__ __forceinline__ void add_tap(float (&stencil)[5][5], int i, int j, float dx, float dy, float mask) {
  float wx[3], wy[3];
  hat_weights(wx, dx);
  hat_weights(wy, dy);
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    const float row = mask * wy[a];
#pragma unroll
    for (int b = 0; b < 3; ++b) stencil[j + a][i + b] = fmaf(row, wx[b], stencil[j + a][i + b]);
  }
}
__device__ __forceinline__ void clear_stencil(float (&stencil)[5][5]) {
#pragma unroll
  for (int y = 0; y < 5; ++y) {
#pragma unroll
    for (int x = 0; x < 5; ++x) stencil[y][x] = 0.f;
  }
}

// The 5x5 stencil [y][x] of one (pixel, group); with SOME_FAR the taps whose bit is set in `far` count as masked.
template <typename T, bool SOME_FAR = false>
__device__ __forceinline__ void stencil_weights(float (&stencil)[5][5], const Taps& taps, const OffsetScale& scale,
                                                unsigned far = 0) {
  clear_stencil(stencil);
#pragma unroll
  for (int i = 0; i < 3; ++i) {  // width, outer in the tap order
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const int k = i * 3 + j;
      // Selected, not multiplied away: a far offset or its mask may be NaN.
      const bool leave_out = SOME_FAR && (far >> k & 1);
      const uint32_t offset = leave_out ? 0 : taps.word[k];
      add_tap(stencil, i, j, scale.displacement(Dtype<T>::low(offset), i - 1),
              scale.displacement(Dtype<T>::high(offset), j - 1), leave_out ? 0.f : taps.mask<T>(k));
    }
  }
}

// ------------------------------------------------------------------------------------- the matrix S and its fragments

// S of one 4x4 block and group in shared memory. Rows m < 8 use window rows 0..5 only and rows m >= 8 rows 2..7, so a
// row keeps six chunks of eight weights: chunk v of row m is window row v + 2 * (m / 8). The pitch of seven chunks
// keeps both the 16-byte stores and ldmatrix free of bank conflicts.
struct StencilMatrix {
  static constexpr int PITCH = 112;
  static constexpr int BYTES = 16 * PITCH;

  // The lane of pixel m writes its row: five chunks of shifted weights and one of zeros.
  template <typename T>
  static __device__ __forceinline__ void store_row(uint32_t matrix, int m, const float (&stencil)[5][5]) {
    const int first = (m >> 2) & 1;  // chunk of stencil row 0
    const bool odd = m & 1, two = m & 2;
    const unsigned order = odd ? 0x5432 : 0x7654;
    const uint32_t row = matrix + m * PITCH;
#pragma unroll
    for (int y = 0; y < 5; ++y) {
      const uint32_t p0 = Dtype<T>::pack(stencil[y][0], stencil[y][1]);
      const uint32_t p1 = Dtype<T>::pack(stencil[y][2], stencil[y][3]);
      const uint32_t p2 = Dtype<T>::pack(stencil[y][4], 0.f);
      // Shift right by the pixel's column: an odd column moves by one value, columns 2 and 3 by a whole word more.
      const uint32_t q0 = __byte_perm(0, p0, order), q1 = __byte_perm(p0, p1, order), q2 = __byte_perm(p1, p2, order);
      store_shared16(row + (first + y) * 16, two ? 0 : q0, two ? q0 : q1, two ? q1 : q2, two ? q2 : 0);
    }
    store_shared16(row + (first ? 0 : 80), 0, 0, 0, 0);
  }

  // The left operands of the four products over k = 16 (step s: window rows 2s and 2s + 1).
  static __device__ __forceinline__ void load(uint32_t (&a)[4][4], uint32_t matrix, int lane) {
    const int r = lane & 7, i = lane >> 3;
    uint32_t outer[4];
    load_matrices(outer, matrix + ((i >> 1) * 8 + r) * PITCH + ((i >> 1) * 4 + (i & 1)) * 16);
    const uint32_t inner = matrix + ((i & 1) * 8 + r) * PITCH + ((i & 1 ? 0 : 2) + (i >> 1)) * 16;
    load_matrices(a[1], inner);
    load_matrices(a[2], inner + 32);
    a[0][0] = outer[0], a[0][1] = 0, a[0][2] = outer[1], a[0][3] = 0;
    a[3][0] = 0, a[3][1] = outer[2], a[3][2] = 0, a[3][3] = outer[3];
  }
};

}  // namespace dcngen::window
