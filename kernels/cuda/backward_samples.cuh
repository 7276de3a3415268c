// The samples that the tile kernel leaves out: which they are and where they lie. backward_wide.cuh and
// backward_far.cuh handle them.
#pragma once

#include "backward_stencil.cuh"

namespace dcngen::backward {

struct FarArgs {
  TileArgs tile;
  Params p;
  const void *grad_output, *input;
  void* grad_input;
  int log_units_x, log_units_per_tile;
  int units_per_warp;  // of far_kernel, at a time: 1 to kMostUnits
  int warps;           // of its blocks: so many take units; its launch sets it
  int few_samples;     // fewer in reach, of 8x8 outputs: wide_kernel leaves them to a gather
  int64_t units;
};

constexpr int kMostUnits = 4, kUnitSamples = 32 * 9;

// Where a unit lies: its group, image and first u.
struct Unit {
  int n, group, u_x, u_y;
};

__device__ __forceinline__ Unit locate_unit(const FarArgs& args, int64_t number) {
  const TileArgs& tile = args.tile;
  uint32_t index = static_cast<uint32_t>(number >> args.log_units_per_tile);
  const int in_tile = static_cast<int>(number) & ((1 << args.log_units_per_tile) - 1);
  const int units_x = 1 << args.log_units_x, log_units_y = args.log_units_per_tile - args.log_units_x;
  Unit unit;
  unit.group = tile.by_group.split(index);
  const int tile_x = tile.by_tiles_x.split(index), tile_y = tile.by_tiles_y.split(index);
  unit.n = index;
  unit.u_x = tile.origin_x + 8 * ((tile_x << args.log_units_x) + (in_tile & (units_x - 1)));
  unit.u_y = tile.origin_y + 4 * ((tile_y << log_units_y) + (in_tile >> args.log_units_x));
  return unit;
}

// One sample: the integer place of its tap, the displacement from there, its mask, the output pixel's number, the tap.
struct FarSample {
  int x, y;
  float dx, dy, mask;
  int64_t out;
  int tap;
  // The tile kernel left it out of the input gradient too.
  __device__ __forceinline__ bool beyond() const { return !(fabsf(dx) <= 1.f && fabsf(dy) <= 1.f); }
};

// `om`: the numbers of its (pixel, group), which has its middle tap at (u_x, u_y).
template <typename T>
__device__ __forceinline__ FarSample read_sample(const T* om, int u_x, int u_y, int tap, float scale) {
  const int i = tap / 3, j = tap - 3 * i;
  FarSample sample;
  sample.dx = fmaf(scale, static_cast<float>(om[2 * tap]), (scale - 1.f) * (i - 1));
  sample.dy = fmaf(scale, static_cast<float>(om[2 * tap + 1]), (scale - 1.f) * (j - 1));
  sample.mask = static_cast<float>(om[18 + tap]);
  sample.x = u_x + i - 1;
  sample.y = u_y + j - 1;
  sample.tap = tap;
  return sample;
}

template <typename T>
__device__ __forceinline__ FarSample load_far_sample(const FarArgs& args, const Unit& unit, int pixel, int tap) {
  const TileArgs& tile = args.tile;
  const int u_x = unit.u_x + (pixel & 7), u_y = unit.u_y + (pixel >> 3);
  const int64_t out =
      (int64_t{unit.n} * tile.height_out + u_y - tile.shift_y) * tile.width_out + u_x - tile.shift_x;
  const T* om = static_cast<const T*>(tile.offset_mask) + out * tile.offset_mask_stride + 27 * unit.group;
  FarSample sample = read_sample(om, u_x, u_y, tap, tile.scale);
  sample.out = out;
  return sample;
}

// The four input pixels around a sample; `counts` is false outside the image and for NaN. The fractions come from the
// displacement alone: added to a large coordinate first, it would lose digits.
struct Corners {
  int left, top;
  float lx, ly;
  bool counts;
  __device__ __forceinline__ Corners(const FarSample& sample, int width, int height) {
    constexpr float kFurthest = 1e9f;  // beyond every image, and still an int; NaN and infinities fail the test
    counts = fabsf(sample.dx) < kFurthest && fabsf(sample.dy) < kFurthest;
    const float fx = counts ? floorf(sample.dx) : 0.f, fy = counts ? floorf(sample.dy) : 0.f;
    left = sample.x + static_cast<int>(fx), top = sample.y + static_cast<int>(fy);
    lx = sample.dx - fx, ly = sample.dy - fy;
    counts = counts && left < width && (left >= 0 || (left == -1 && lx > 0.f)) && top < height &&
             (top >= 0 || (top == -1 && ly > 0.f));
  }
  __device__ __forceinline__ float weight(int corner) const {
    return (corner & 1 ? lx : 1.f - lx) * (corner >> 1 ? ly : 1.f - ly);
  }
  // The pixel's number in the image, or -1 outside.
  __device__ __forceinline__ int pixel(int corner, int width, int height) const {
    const int x = left + (corner & 1), y = top + (corner >> 1);
    return counts && x >= 0 && x < width && y >= 0 && y < height ? y * width + x : -1;
  }
};

}  // namespace dcngen::backward
