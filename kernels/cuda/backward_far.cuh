// The samples that the tile kernel leaves out: a gather for their offset and mask gradients, reductions into the input
// gradient. Runs after the tile kernel, over the units that it flagged: it overwrites the three gradients of each far
// tap and adds to the input gradient that the tile kernel stored.
// Where a reproducible result is asked for, the reductions are left to far_owner_kernel, which adds in a fixed order.
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
  int few_samples;     // wide_kernel leaves 8x8 outputs with fewer in reach to a gather
  int64_t units;
};

constexpr int kFarWarps = 4, kMostUnits = 4, kUnitSamples = 32 * 9;

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

// The gradients of a sample (before offset_scale and mask) from the products of grad_output with its four corners.
__device__ __forceinline__ TapGradient corner_gradient(const float (&dot)[4], float lx, float ly) {
  const float upper = fmaf(lx, dot[1] - dot[0], dot[0]), lower = fmaf(lx, dot[3] - dot[2], dot[2]);
  return {fmaf(ly, dot[3] - dot[2] - (dot[1] - dot[0]), dot[1] - dot[0]), lower - upper,
          fmaf(ly, lower - upper, upper)};
}

// `to`: the gradients of the sample's (pixel, group).
template <typename T>
__device__ __forceinline__ void store_gradient(T* to, int tap, const TapGradient& gradient, float factor) {
  to[2 * tap] = static_cast<T>(factor * gradient.x);
  to[2 * tap + 1] = static_cast<T>(factor * gradient.y);
  to[18 + tap] = static_cast<T>(gradient.mask);
}

// One sample by D / kVector lanes.
template <typename T, int D, bool ADD>
__device__ void far_sample(const FarArgs& args, const FarSample& sample, bool real, const Unit& unit, int part) {
  const Params& p = args.p;
  constexpr int kVector = HalfTraits<T>::kVector;
  const int width = static_cast<int>(p.width_in), height = static_cast<int>(p.height_in);
  Corners corners(sample, width, height);
  corners.counts = corners.counts && real;
  TapGradient gradient = {0.f, 0.f, 0.f};
  float factor = 0.f;
  if (corners.counts) {
    const int channel = unit.group * D + kVector * part;
    const int64_t image = int64_t{unit.n} * width * height;
    float grad[kVector], value[4][kVector] = {};
    HalfTraits<T>::load_vector(
        grad, static_cast<const T*>(args.grad_output) + sample.out * p.output_pixel_stride + channel);
    int pixels[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      pixels[q] = corners.pixel(q, width, height);
      if (pixels[q] < 0) continue;
      HalfTraits<T>::load_vector(
          value[q], static_cast<const T*>(args.input) + (image + pixels[q]) * p.input_pixel_stride + channel);
    }
    float dot[4] = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) dot[q] = fmaf(grad[c], value[q][c], dot[q]);
      if (ADD && sample.beyond() && pixels[q] >= 0) {
        const float weight = sample.mask * corners.weight(q);
        float add[kVector];
#pragma unroll
        for (int c = 0; c < kVector; ++c) add[c] = weight * grad[c];
        HalfTraits<T>::reduce_add(
            static_cast<T*>(args.grad_input) + (image + pixels[q]) * p.grad_input_pixel_stride + channel, add);
      }
    }
    gradient = corner_gradient(dot, corners.lx, corners.ly);
    factor = args.tile.scale * sample.mask;
  }
#pragma unroll
  for (int step = D / kVector / 2; step > 0; step /= 2) {
    gradient.x += __shfl_xor_sync(window::kAllLanes, gradient.x, step);
    gradient.y += __shfl_xor_sync(window::kAllLanes, gradient.y, step);
    gradient.mask += __shfl_xor_sync(window::kAllLanes, gradient.mask, step);
  }
  if (real && part == 0) {
    T* to = static_cast<T*>(args.tile.grad_offset_mask) + sample.out * args.tile.grad_offset_mask_stride;
    store_gradient(to + 27 * unit.group, sample.tap, gradient, factor);
  }
}

// Appends the far samples of a unit to a list, as 16 * (32 * which + lane) + tap; returns its new length.
__device__ __forceinline__ int list_far_samples(uint16_t* list, int length, unsigned far, int which, int lane) {
  int before = __popc(far);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(window::kAllLanes, before, step);
    if (lane >= step) before += left;
  }
  const int total = __shfl_sync(window::kAllLanes, before, 31);
  before += length - __popc(far);
  for (; far; far &= far - 1) list[before++] = static_cast<uint16_t>(16 * (32 * which + lane) + __ffs(far) - 1);
  return length + total;
}

// The far samples of the units first + i, for every bit i of `units`, by one warp with room for them in `list`.
template <typename T, int D, bool ADD>
__device__ __forceinline__ void gather_units(const FarArgs& args, int64_t first, unsigned units, uint16_t* list,
                                             int lane) {
  constexpr int kLanes = D / HalfTraits<T>::kVector, kAtOnce = 32 / kLanes;
  unsigned far[kMostUnits];
#pragma unroll
  for (int i = 0; i < kMostUnits; ++i) far[i] = units >> i & 1 ? args.tile.far_masks[32 * (first + i) + lane] : 0u;
  int count = 0;
#pragma unroll
  for (int i = 0; i < kMostUnits; ++i) {
    if (units >> i & 1) count = list_far_samples(list, count, far[i], i, lane);
  }
  __syncwarp();
  for (int base = 0; base < count; base += kAtOnce) {
    const bool real = base + lane / kLanes < count;
    const int which = list[real ? base + lane / kLanes : 0];
    const Unit unit = locate_unit(args, first + (which >> 9));
    const FarSample sample = load_far_sample<T>(args, unit, which >> 4 & 31, which & 15);
    far_sample<T, D, ADD>(args, sample, real, unit, lane % kLanes);
  }
  __syncwarp();  // the list is free again
}

// A warp takes several units at a time where there are enough of them for all warps of the device: where few samples
// are far, their loads overlap.
template <typename T, int D, bool ADD>
__global__ void __launch_bounds__(32 * kFarWarps) far_kernel(const FarArgs args) {
#if __CUDA_ARCH__ >= 900
  __shared__ uint16_t lists[kFarWarps][kMostUnits * kUnitSamples];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  wait_for_previous_kernel();
  for (int64_t first = args.units_per_warp * (int64_t{blockIdx.x} * kFarWarps + warp); first < args.units;
       first += args.units_per_warp * int64_t{gridDim.x} * kFarWarps) {
    const bool flagged = lane < args.units_per_warp && first + lane < args.units && args.tile.far_units[first + lane];
    const unsigned units = __ballot_sync(window::kAllLanes, flagged);
    if (units != 0) gather_units<T, D, ADD>(args, first, units, lists[warp], lane);
  }
#endif
}

// Reproducible additions to the input gradient: a block owns one group of one image, a thread one of its channels, and
// goes through the far samples in order. Slow; nothing else happens to these elements meanwhile.
template <typename T, int D>
__global__ void __launch_bounds__(D) far_owner_kernel(const FarArgs args) {
#if __CUDA_ARCH__ >= 900
  const Params& p = args.p;
  const int width = static_cast<int>(p.width_in), height = static_cast<int>(p.height_in);
  const int64_t tiles = (args.units >> args.log_units_per_tile) / p.groups / p.batch;  // of one image and group
  const int64_t n = blockIdx.x / p.groups, group = blockIdx.x - n * p.groups, channel = group * D + threadIdx.x;
  const int log = args.log_units_per_tile;
  for (int64_t t = 0; t < tiles << log; ++t) {
    const int64_t number = (((n * tiles + (t >> log)) * p.groups + group) << log) + (t & ((1 << log) - 1));
    if (!args.tile.far_units[number]) continue;
    const Unit unit = locate_unit(args, number);
    for (int pixel = 0; pixel < 32; ++pixel) {
      for (unsigned far = args.tile.far_masks[32 * number + pixel]; far; far &= far - 1) {
        const FarSample sample = load_far_sample<T>(args, unit, pixel, __ffs(far) - 1);
        if (!sample.beyond()) continue;
        const Corners corners(sample, width, height);
        const float grad = static_cast<float>(
            static_cast<const T*>(args.grad_output)[sample.out * p.output_pixel_stride + channel]);
        for (int q = 0; q < 4; ++q) {
          const int at = corners.pixel(q, width, height);
          if (at < 0) continue;
          T* to = static_cast<T*>(args.grad_input) + (n * width * height + at) * p.grad_input_pixel_stride + channel;
          *to = static_cast<T>(static_cast<float>(*to) + sample.mask * corners.weight(q) * grad);
        }
      }
    }
  }
#endif
}

}  // namespace dcngen::backward
