// Wide windows: their shapes, which one a block takes, and the far samples that fit in one. See backward_wide.cuh.
#pragma once

#include "backward_far.cuh"

namespace dcngen::backward {

constexpr int kWideSide = 16;  // of a window, in input pixels

// A record of a sample for sums over the cells of its window. Of its four corners, one lies at each parity of (x, y):
// the weights of its even and odd column, those of its even and odd row times the mask (0 outside the window), and its
// place. A lane that owns a parity finds its corner without looking at the others.
constexpr int kRecordBytes = 20;

__device__ __forceinline__ void store_record(uint32_t to, int left, int top, float lx, float ly, float mask) {
  float column[2] = {}, row[2] = {};
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const int right = (left ^ odd) & 1, down = (top ^ odd) & 1;
    if (static_cast<unsigned>(left + right) < kWideSide) column[odd] = right ? lx : 1.f - lx;
    if (static_cast<unsigned>(top + down) < kWideSide) row[odd] = mask * (down ? ly : 1.f - ly);
  }
  window::store_shared(to, __float_as_uint(column[0]));
  window::store_shared(to + 4, __float_as_uint(column[1]));
  window::store_shared(to + 8, __float_as_uint(row[0]));
  window::store_shared(to + 12, __float_as_uint(row[1]));
  window::store_shared(to + 16, (left + kWideSide) | (top + kWideSide) << 8);
}

// The corner of a record that belongs to the lane's parity. One outside the window adds 0 to some other cell.
struct ParityCorner {
  float weight;
  int x, y;
  __device__ __forceinline__ ParityCorner(uint32_t record, int odd_x, int odd_y) {
    const uint32_t place = window::load_shared(record + 16);
    weight = __uint_as_float(window::load_shared(record + 4 * odd_x)) *
             __uint_as_float(window::load_shared(record + 8 + 4 * odd_y));
    const uint32_t at = ((place + ((1 - odd_x) | (1 - odd_y) << 8)) & 0xfefeu) | odd_x | odd_y << 8;
    x = at & (kWideSide - 1), y = at >> 8 & (kWideSide - 1);
  }
};

constexpr int kWideWarps = 8, kWideThreads = 32 * kWideWarps;
constexpr int kWideSamples = 72, kRounds = 3;  // of a warp: it owns one row of eight output pixels

template <int D>
struct WideShape {
  static constexpr int kCells = kWideSide * kWideSide;
  // The row of an output pixel: first T; then S (16 bytes on in every other four rows, so that eight rows' pieces lie
  // in different banks) and nine records. It is 8 words past a multiple of 32: no conflicts where T is stored.
  static constexpr int kWeights = 2 * kCells + 16;
  static constexpr int kRow = 4 * kCells + 32, kProducts = 64 * kRow;
  static constexpr int kInput = kCells * 2 * D, kGradOutput = 64 * 2 * D;
  static constexpr int kShared = kInput + kGradOutput + kProducts + 8 * kWideWarps /* flags */;
  static constexpr int kBlocks = 2;
  // grad_input: tiles of 16 cells x 8 channels; a warp computes kTilesM x kTilesN of them.
  static constexpr int kTilesM = 2, kTilesN = D / 8;
  static_assert(kShared + 1024 <= 228 * 1024 / kBlocks, "the blocks' shared memory");
  static_assert(kWeights + 9 * kRecordBytes <= kRow, "records stand behind the weights");

  static __device__ __forceinline__ uint32_t weights_row(uint32_t products, int pixel) {
    return products + pixel * kRow + ((pixel >> 2) & 1) * 16;
  }
};

// Where the window of 8x8 outputs whose upper left one is at u begins, along one axis, and whether all of a sample's
// corners on the map lie in it.
__device__ __forceinline__ int window_begin(int u, int length) {
  return max(min(u + 4 - kWideSide / 2, length - kWideSide), 0);
}
__device__ __forceinline__ bool fits(int first, int begin, int length) {
  return max(first, 0) >= begin && min(first + 1, length - 1) < begin + kWideSide;
}

// Which window: a block's share of the work, and the 8x8 output pixels (two units) that belong to it.
template <bool WHOLE>
struct WideWindow {
  int n, group, x, y;
  static __host__ __device__ __forceinline__ int64_t count(const FarArgs& args) {
    return WHOLE ? args.p.batch * args.p.groups : args.units >> (args.log_units_per_tile - args.log_units_x);
  }
  static __device__ __forceinline__ int tiles(const FarArgs& args) {  // of one group of one image
    return static_cast<int>(args.tile.by_tiles_x.divisor * args.tile.by_tiles_y.divisor);
  }
  // Of one window; each is the upper of two units, `lower` further on is the other.
  static __device__ __forceinline__ int pieces(const FarArgs& args) {
    return WHOLE ? tiles(args) << args.log_units_x : 1;
  }
  static __device__ __forceinline__ int lower(const FarArgs& args) { return 1 << args.log_units_x; }
  static __device__ __forceinline__ int64_t upper_unit(const FarArgs& args, uint32_t number, int piece) {
    const int column = (WHOLE ? piece : static_cast<int>(number)) & ((1 << args.log_units_x) - 1);
    int64_t tile = number >> args.log_units_x;
    if (WHOLE) {
      const int tiles_of_group = tiles(args);
      uint32_t n = number;
      const int group = args.tile.by_group.split(n);
      tile = (int64_t{n} * tiles_of_group + (piece >> args.log_units_x)) * args.tile.groups + group;
    }
    return (tile << args.log_units_per_tile) + column;
  }
  // Whether a unit of its tiles is flagged. The flags of a tile are two or four bytes one behind the other.
  static __device__ __forceinline__ bool has_far_samples(const FarArgs& args, uint32_t number) {
    if constexpr (!WHOLE) {
      const uint8_t* flag = args.tile.far_units + upper_unit(args, number, 0);
      return (flag[0] | flag[lower(args)]) != 0;
    }
    uint32_t n = number, some = 0;
    const uint32_t group = args.tile.by_group.split(n), step = args.tile.groups << args.log_units_per_tile;
    const int count = tiles(args);
    const uint8_t* flags = args.tile.far_units + (int64_t{n} * count * step + (group << args.log_units_per_tile));
#pragma unroll 2
    for (int i = 0; i < count; ++i, flags += step) {
      some |= args.log_units_per_tile == 2 ? *reinterpret_cast<const uint32_t*>(flags)
                                           : *reinterpret_cast<const uint16_t*>(flags);
    }
    return some != 0;
  }
  __device__ __forceinline__ WideWindow(const FarArgs& args, const Unit& unit) : n(unit.n), group(unit.group) {
    x = WHOLE ? 0 : window_begin(unit.u_x, args.tile.width_in);
    y = WHOLE ? 0 : window_begin(unit.u_y, args.tile.height_in);
  }
};

// Begins copying CELLS pixels, `width` a row, from pixel (x, y) of an image on; zeros outside it.
template <typename T, int D, int CELLS>
__device__ __forceinline__ void copy_cells(uint32_t to, const void* image, int64_t stride, int x, int y, int log_width,
                                           int image_width, int image_height, int thread) {
  constexpr int kPieces = D / 8;
#pragma unroll 2
  for (int i = thread; i < CELLS * kPieces; i += kWideThreads) {
    const int cell = i / kPieces, piece = i % kPieces;
    const int px = x + (cell & ((1 << log_width) - 1)), py = y + (cell >> log_width);
    const bool inside = static_cast<unsigned>(px) < static_cast<unsigned>(image_width) &&
                        static_cast<unsigned>(py) < static_cast<unsigned>(image_height);
    const T* from = static_cast<const T*>(image) + (inside ? (int64_t{py} * image_width + px) * stride + 8 * piece : 0);
    window::copy_async16(to + tile_offset<D>(cell, piece), from, inside);
  }
}

// A sample that the window takes: a word of its mask's 16 bits, its upper left corner in the window (plus 1), and what
// is to be done with it.
struct WideSample {
  static constexpr uint32_t kTaken = 1u << 30, kAdds = 1u << 31;
  float lx, ly;
  uint32_t word;
  __device__ __forceinline__ int left() const { return static_cast<int>(word >> 16 & 31) - 1; }
  __device__ __forceinline__ int top() const { return static_cast<int>(word >> 21 & 31) - 1; }
};

// Lane l's samples l, l + 32, l + 64 of a warp's row, nine a pixel: those that are far (`far`, lane l: pixel l of the
// unit, its first of the row `first`) and fit. Returns, as far_masks has it, what does not fit: lane l < 8 the bits of
// pixel l of the row. `om`: the numbers of the row's first pixel, `to`: their gradients.
template <typename T, bool WHOLE>
__device__ __forceinline__ unsigned take_samples(WideSample (&samples)[kRounds], const TileArgs& tile, const T* om,
                                                 T* to, int u_x, int u_y, unsigned far, int first,
                                                 const WideWindow<WHOLE>& window, int lane) {
  unsigned left_over = 0;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int number = lane + 32 * i, pixel = number < kWideSamples ? number / 9 : 0, tap = number % 9;
    const unsigned bits = __shfl_sync(window::kAllLanes, far, first + pixel);
    const bool is_far = number < kWideSamples && (bits >> tap & 1);
    samples[i] = {0.f, 0.f, 0u};
    bool taken = false;
    if (is_far) {
      const FarSample sample = read_sample(om + pixel * static_cast<int>(tile.offset_mask_stride), u_x + pixel, u_y,
                                           tap, tile.scale);
      const Corners corners(sample, tile.width_in, tile.height_in);
      taken = !corners.counts || WHOLE ||
              (fits(corners.left, window.x, tile.width_in) &&
               fits(corners.top, window.y, tile.height_in));
      if (!corners.counts) {
        store_gradient(to + pixel * static_cast<int>(tile.grad_offset_mask_stride), tap, {0.f, 0.f, 0.f}, 0.f);
      } else if (taken) {
        samples[i].lx = corners.lx, samples[i].ly = corners.ly;
        samples[i].word = (HalfTraits<T>::pack(sample.mask, 0.f) & 0xffffu) | (corners.left + 1 - window.x) << 16 |
                          (corners.top + 1 - window.y) << 21 | WideSample::kTaken |
                          (sample.beyond() ? WideSample::kAdds : 0u);
      }
    }
    if (WHOLE) continue;
    const unsigned missed = __ballot_sync(window::kAllLanes, is_far && !taken);
    const int shift = 9 * lane - 32 * i;  // the lane's bits among all 72
    if (shift > -9 && shift < 32) left_over |= shift < 0 ? missed << -shift : missed >> shift;
  }
  return left_over & 0x1ffu;
}

}  // namespace dcngen::backward
