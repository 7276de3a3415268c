// The samples that the tile kernel leaves out: a gather for their offset and mask gradients, reductions into the input
// gradient. Runs after the tile kernel, over the units that it flagged: it overwrites the three gradients of each far
// tap and adds to the input gradient that the tile kernel stored.
// Where a reproducible result is asked for, the reductions are left to far_owner_kernel, which adds in a fixed order.
#pragma once

#include "backward_samples.cuh"

namespace dcngen::backward {

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

// One sample by D / 8 lanes, 8 channels each.
template <typename T, int D, bool ADD>
__device__ void far_sample(const FarArgs& args, const FarSample& sample, bool real, const Unit& unit, int part) {
  constexpr int kLanes = D / 8;
  const Params& p = args.p;
  const int width = static_cast<int>(p.width_in), height = static_cast<int>(p.height_in);
  Corners corners(sample, width, height);
  corners.counts = corners.counts && real;
  TapGradient gradient = {0.f, 0.f, 0.f};
  float factor = 0.f;
  if (corners.counts) {
    const int channel = unit.group * D + HalfTraits<T>::kPiece * part;
    const int64_t image = int64_t{unit.n} * width * height;
    float grad[8], value[4][8] = {};
    HalfTraits<T>::template load_share<kLanes>(
        grad, static_cast<const T*>(args.grad_output) + sample.out * p.output_pixel_stride + channel);
    int pixels[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      pixels[q] = corners.pixel(q, width, height);
      if (pixels[q] < 0) continue;
      HalfTraits<T>::template load_share<kLanes>(
          value[q], static_cast<const T*>(args.input) + (image + pixels[q]) * p.input_pixel_stride + channel);
    }
    float dot[4] = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int c = 0; c < 8; ++c) dot[q] = fmaf(grad[c], value[q][c], dot[q]);
      if (ADD && sample.beyond() && pixels[q] >= 0) {
        const float weight = sample.mask * corners.weight(q);
        float add[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) add[c] = weight * grad[c];
        HalfTraits<T>::template reduce_share<kLanes>(
            static_cast<T*>(args.grad_input) + (image + pixels[q]) * p.grad_input_pixel_stride + channel, add);
      }
    }
    gradient = corner_gradient(dot, corners.lx, corners.ly);
    factor = args.tile.scale * sample.mask;
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
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
  constexpr int kLanes = D / 8, kAtOnce = 32 / kLanes;
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
// are far, their loads overlap. One block a multiprocessor, so that all have as many warps however early blocks take
// their places while the kernel before ends (kernels/README.md has the other forms).
template <typename T>
constexpr int kFarWarps = sizeof(T) == 4 ? 28 : 32;  // float needs 72 registers

template <typename T, int D, bool ADD>
__global__ void __launch_bounds__(32 * kFarWarps<T>, 1) far_kernel(const FarArgs args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ uint16_t far_lists[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (warp >= args.warps) return;
  uint16_t* list = far_lists + warp * (kMostUnits * kUnitSamples);
  const int64_t step = args.units_per_warp * int64_t{gridDim.x} * args.warps;
  window::wait_for_previous_kernel();
  for (int64_t first = args.units_per_warp * (int64_t{blockIdx.x} * args.warps + warp); first < args.units;
       first += step) {
    const bool flagged = lane < args.units_per_warp && first + lane < args.units && args.tile.far_units[first + lane];
    const unsigned units = __ballot_sync(window::kAllLanes, flagged);
    if (units != 0) gather_units<T, D, ADD>(args, first, units, list, lane);
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
