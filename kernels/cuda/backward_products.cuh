// The products of the half types on the tensor cores: fragments of tiles in shared memory, T, the input gradient.
#pragma once

#include "backward_stencil.cuh"

namespace dcngen::backward {

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
    if (row <= 5 && row - r >= 0 && row - r <= 4) {
      window::store_shared8(at, __float_as_uint(v[0]), __float_as_uint(v[1]));
    }
    if (row >= 2 && row - r >= 2 && row - r <= 6) {
      window::store_shared8(at + 4 * 320, __float_as_uint(v[2]), __float_as_uint(v[3]));
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
      window::store_matrices<4>(stage + tile_offset<D>(pixel + 16 * high, low),
                                {upper_half[0], upper_half[1], lower_half[0], lower_half[1]});
    } else {
#pragma unroll
      for (int part = 0; part < D / 32; ++part) {
        const int first = 4 * part;
        window::store_matrices<4>(
            stage + tile_offset<D>(pixel, first + matrix),
            {upper_half[first], upper_half[first + 1], upper_half[first + 2], upper_half[first + 3]});
        window::store_matrices<4>(
            stage + tile_offset<D>(pixel + 16, first + matrix),
            {lower_half[first], lower_half[first + 1], lower_half[first + 2], lower_half[first + 3]});
      }
    }
  }
}

}  // namespace dcngen::backward
