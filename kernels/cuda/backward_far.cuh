// The samples that the tile kernel leaves out: a gather for their offset and mask gradients, reductions into the input
// gradient. Runs after the tile kernel, over the units that it flagged: it overwrites the three gradients of each far
// tap and adds to the input gradient that the tile kernel stored.
#pragma once

#include "backward_tile.cuh"

namespace dcngen::backward {

struct FarArgs {
  TileArgs tile;
  Params p;
  const void *grad_output, *input, *offset_mask;
  void* grad_input;
  int units_x, units_per_tile;
  int64_t units;
};

constexpr int kFarWarps = 4;

struct FarSample {
  float x, y, mask;  // its place in the input
  int where;         // pixel of the unit * 16 + tap
};

// Lists the far samples of one unit; returns how many.
template <typename T>
__device__ int list_far_samples(FarSample* list, const FarArgs& args, int n, int group, int ow, int oh, int lane) {
  const TileArgs& tile = args.tile;
  const bool inside = ow >= 0 && ow < tile.width_out && oh >= 0 && oh < tile.height_out;
  const int64_t pixel = inside ? (int64_t{n} * tile.height_out + oh) * tile.width_out + ow : 0;
  const uint16_t* om = static_cast<const uint16_t*>(args.offset_mask) + pixel * args.p.offset_mask_pixel_stride + 27 * group;
  unsigned far = 0;
  float2 d[9];
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    d[k] = displacement<T>(om[2 * k] | static_cast<uint32_t>(om[2 * k + 1]) << 16, k / 3, k % 3, tile.scale);
    far |= (inside && !(fabsf(d[k].x) < 1.f && fabsf(d[k].y) < 1.f) ? 1u : 0u) << k;
  }
  int before = __popc(far);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(window::kAllLanes, before, step);
    if (lane >= step) before += left;
  }
  const int total = __shfl_sync(window::kAllLanes, before, 31);
  before -= __popc(far);
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    if (!(far >> k & 1)) continue;
    list[before++] = {static_cast<float>(ow + tile.shift_x + k / 3 - 1) + d[k].x,
                      static_cast<float>(oh + tile.shift_y + k % 3 - 1) + d[k].y, HalfTraits<T>::low(om[18 + k]),
                      lane * 16 + k};
  }
  __syncwarp();
  return total;
}

template <typename T>
__device__ __forceinline__ void unpack8(float (&to)[8], const void* from) {
  const uint4 v = __ldg(static_cast<const uint4*>(from));
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = HalfTraits<T>::low(words[i]);
    to[2 * i + 1] = HalfTraits<T>::high(words[i]);
  }
}

// One sample by D / 8 lanes, 8 channels each.
template <typename T, int D>
__device__ void far_sample(const FarArgs& args, const FarSample& sample, bool real, int n, int group, int u_x, int u_y,
                           int part) {
  const TileArgs& tile = args.tile;
  const Params& p = args.p;
  const int width = static_cast<int>(p.width_in), height = static_cast<int>(p.height_in);
  const int pixel = sample.where >> 4, tap = sample.where & 15;
  const int ow = u_x + (pixel & 7) - tile.shift_x, oh = u_y + (pixel >> 3) - tile.shift_y;
  const int64_t out = (int64_t{n} * tile.height_out + oh) * tile.width_out + ow;
  const bool counts = real && sample.x > -1.f && sample.y > -1.f && sample.x < width && sample.y < height;
  float gx = 0.f, gy = 0.f, gm = 0.f;
  if (counts) {
    const int channel = group * D + 8 * part;
    float grad[8];
    unpack8<T>(grad, static_cast<const T*>(args.grad_output) + out * p.output_pixel_stride + channel);
    const float x0 = floorf(sample.x), y0 = floorf(sample.y), lx = sample.x - x0, ly = sample.y - y0;
    const int left = static_cast<int>(x0), top = static_cast<int>(y0);
    float dot[4] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int cx = left + (corner & 1), cy = top + (corner >> 1);
      if (cx < 0 || cx >= width || cy < 0 || cy >= height) continue;
      const int64_t at = (int64_t{n} * height + cy) * width + cx;
      float value[8];
      unpack8<T>(value, static_cast<const T*>(args.input) + at * p.input_pixel_stride + channel);
      const float weight = sample.mask * (corner & 1 ? lx : 1.f - lx) * (corner >> 1 ? ly : 1.f - ly);
      uint32_t add[4];
#pragma unroll
      for (int c = 0; c < 8; ++c) dot[corner] = fmaf(grad[c], value[c], dot[corner]);
#pragma unroll
      for (int c = 0; c < 4; ++c) add[c] = HalfTraits<T>::pack(weight * grad[2 * c], weight * grad[2 * c + 1]);
      HalfTraits<T>::reduce_add(static_cast<T*>(args.grad_input) + at * p.grad_input_pixel_stride + channel, add);
    }
    const float upper = fmaf(lx, dot[1] - dot[0], dot[0]), lower = fmaf(lx, dot[3] - dot[2], dot[2]);
    gm = fmaf(ly, lower - upper, upper);
    gy = tile.scale * sample.mask * (lower - upper);
    gx = tile.scale * sample.mask * fmaf(ly, dot[3] - dot[2] - dot[1] + dot[0], dot[1] - dot[0]);
  }
#pragma unroll
  for (int step = D / 16; step > 0; step /= 2) {
    gx += __shfl_xor_sync(window::kAllLanes, gx, step);
    gy += __shfl_xor_sync(window::kAllLanes, gy, step);
    gm += __shfl_xor_sync(window::kAllLanes, gm, step);
  }
  if (real && part == 0) {
    uint16_t* to = static_cast<uint16_t*>(tile.grad_offset_mask) + out * tile.grad_offset_mask_stride + 27 * group;
    const uint32_t xy = HalfTraits<T>::pack(gx, gy);
    to[2 * tap] = static_cast<uint16_t>(xy);
    to[2 * tap + 1] = static_cast<uint16_t>(xy >> 16);
    to[18 + tap] = static_cast<uint16_t>(HalfTraits<T>::pack(gm, 0.f));
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(32 * kFarWarps) far_kernel(const FarArgs args) {
#if __CUDA_ARCH__ >= 900
  __shared__ FarSample lists[kFarWarps][32 * 9];
  constexpr int kLanes = D / 8, kAtOnce = 32 / kLanes;
  const TileArgs& tile = args.tile;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  FarSample* list = lists[warp];
  for (int64_t first = 4 * (int64_t{blockIdx.x} * kFarWarps + warp); first < args.units;
       first += 4 * int64_t{gridDim.x} * kFarWarps) {
    const bool flagged = lane < 4 && first + lane < args.units && tile.far_units[first + lane];
    for (unsigned left = __ballot_sync(window::kAllLanes, flagged); left; left &= left - 1) {
      const int64_t unit = first + __ffs(left) - 1;
      uint32_t index = static_cast<uint32_t>(unit / args.units_per_tile);
      const int in_tile = static_cast<int>(unit % args.units_per_tile), units_y = args.units_per_tile / args.units_x;
      const int group = tile.by_group.split(index), tile_x = tile.by_tiles_x.split(index);
      const int tile_y = tile.by_tiles_y.split(index), n = index;
      const int u_x = tile.origin_x + 8 * (tile_x * args.units_x + in_tile % args.units_x);
      const int u_y = tile.origin_y + 4 * (tile_y * units_y + in_tile / args.units_x);
      const int count = list_far_samples<T>(list, args, n, group, u_x + (lane & 7) - tile.shift_x,
                                            u_y + (lane >> 3) - tile.shift_y, lane);
      for (int base = 0; base < count; base += kAtOnce) {
        const int number = base + lane / kLanes;
        const bool real = number < count;
        far_sample<T, D>(args, list[real ? number : 0], real, n, group, u_x, u_y, lane % kLanes);
      }
      __syncwarp();  // the list is free again
    }
  }
#endif
}

}  // namespace dcngen::backward
