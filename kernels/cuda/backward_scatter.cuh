// Far samples of single precision: the input gradient of a window of 16x16 inputs around 8x8 output pixels, summed in
// shared memory and added to memory with one reduction a cell instead of four a sample. far_kernel then adds what does
// not fit, and takes the samples' own gradients.
// A warp owns eight channels, a lane one of them and one parity of (x, y): every sample has one corner at each parity,
// so a cell is only ever touched by one lane, and sums need neither atomics nor barriers.
#pragma once

#include "backward_far.cuh"

namespace dcngen::backward {

template <int D>
struct ScatterShape {
  static constexpr int kWarps = D / 8, kThreads = 32 * kWarps, kSamples = 64 * 9, kAtOnce = 4;
  static constexpr int kCells = kScatterSide * kScatterSide;
  // 32 bytes a cell, one more so that the warps' sums begin in different banks.
  static constexpr int kSums = 32 * (kCells + 1), kGradOutput = 64 * 4 * D;
  static constexpr int kRecords = (kSamples + kAtOnce) * kRecordBytes;
  static constexpr int kShared = kWarps * kSums + kGradOutput + kRecords + 4 * (kWarps + 1) /* flags, count */;
  static constexpr int kBlocks = 227 * 1024 / (kShared + 1024);

  // The cells of odd rows change places by pairs: corners of all four parities lie in different banks.
  static __device__ __forceinline__ uint32_t cell(uint32_t sums, int x, int y) {
    return sums + 32 * ((y * kScatterSide + x) ^ (y & 1) << 1);
  }
};

// The records of all samples of two units that are far and fit, in any order; returns how many (of the whole block).
template <int D>
__device__ __forceinline__ int collect_records(const FarArgs& args, int64_t upper, const Unit& unit, int x, int y,
                                               uint32_t records, uint32_t* count, int thread) {
  using Shape = ScatterShape<D>;
  const TileArgs& tile = args.tile;
  const int lower = 1 << args.log_units_x, lane = thread & 31;
  for (int number = thread; number < Shape::kSamples; number += Shape::kThreads) {  // whole warps
    const int pixel = number / 9, tap = number - 9 * pixel;
    const int64_t own = pixel < 32 ? upper : upper + lower;
    const unsigned bits = tile.far_masks[32 * own + (pixel & 31)];
    bool adds = tile.far_units[own] && (bits >> tap & 1);
    float lx = 0.f, ly = 0.f, mask = 0.f;
    int left = 0, top = 0;
    if (adds) {
      const FarSample sample = load_far_sample<float>(args, unit, pixel, tap);
      const Corners corners(sample, tile.width_in, tile.height_in);
      adds = sample.beyond() && corners.counts && fits<kScatterSide>(corners.left, x, tile.width_in) &&
             fits<kScatterSide>(corners.top, y, tile.height_in);
      lx = corners.lx, ly = corners.ly, mask = sample.mask, left = corners.left - x, top = corners.top - y;
    }
    const unsigned ballot = __ballot_sync(window::kAllLanes, adds);
    int first = 0;
    if (lane == 0 && ballot != 0) first = atomicAdd(count, __popc(ballot));
    first = __shfl_sync(window::kAllLanes, first, 0) + __popc(ballot & ((1u << lane) - 1));
    if (adds) store_record<kScatterSide>(records + first * kRecordBytes, left, top, lx, ly, mask, pixel);
  }
  __syncthreads();
  const int total = *count;
  if (thread < Shape::kAtOnce) store_record<kScatterSide>(records + (total + thread) * kRecordBytes, 0, 0, 0, 0, 0, 0);
  return total;
}

// Adds all records to the warp's sums.
template <int D>
__device__ __forceinline__ void sum_records(uint32_t sums, uint32_t grad_output, uint32_t records, int count, int lane) {
  using Shape = ScatterShape<D>;
  const int odd_x = lane >> 3 & 1, odd_y = lane >> 4;
  sums += 4 * (lane & 7), grad_output += 4 * (lane & 7);
  for (int first = 0; first < count; first += Shape::kAtOnce) {
    uint32_t cell[Shape::kAtOnce];
    float add[Shape::kAtOnce];
#pragma unroll
    for (int i = 0; i < Shape::kAtOnce; ++i) {
      const ParityCorner<kScatterSide> corner(records + (first + i) * kRecordBytes, odd_x, odd_y);
      cell[i] = Shape::cell(sums, corner.x, corner.y);
      const float grad = __uint_as_float(window::load_shared(grad_output + corner.pixel * 4 * D));
      add[i] = corner.weight == 0.f ? 0.f : corner.weight * grad;  // 0 also where the gradient is infinite
    }
#pragma unroll
    for (int i = 0; i < Shape::kAtOnce; ++i) {
      window::store_shared(cell[i], __float_as_uint(__uint_as_float(window::load_shared(cell[i])) + add[i]));
    }
  }
}

template <int D>
__device__ __forceinline__ void scatter_window(const FarArgs& args, int64_t upper, uint32_t shared, uint32_t* count,
                                               int thread) {
  using Shape = ScatterShape<D>;
  constexpr int kPieces = D / 4;  // of 16 bytes, a pixel
  const TileArgs& tile = args.tile;
  const uint32_t grad_output = shared + Shape::kWarps * Shape::kSums, records = grad_output + Shape::kGradOutput;
  const Unit unit = locate_unit(args, upper);
  const int x = window_begin<kScatterSide>(unit.u_x, tile.width_in);
  const int y = window_begin<kScatterSide>(unit.u_y, tile.height_in);
  __syncthreads();  // the sums before have left
  if (thread == 0) *count = 0;
  for (int i = thread; i < Shape::kWarps * Shape::kSums / 16; i += Shape::kThreads) {
    window::store_shared16(shared + 16 * i, 0, 0, 0, 0);
  }
  for (int i = thread; i < 64 * kPieces; i += Shape::kThreads) {
    const int pixel = i / kPieces, ow = unit.u_x + (pixel & 7) - tile.shift_x, oh = unit.u_y + (pixel >> 3) - tile.shift_y;
    const bool inside = static_cast<unsigned>(ow) < static_cast<unsigned>(tile.width_out) &&
                        static_cast<unsigned>(oh) < static_cast<unsigned>(tile.height_out);
    const int64_t out = (int64_t{unit.n} * tile.height_out + oh) * tile.width_out + ow;
    const float* from = static_cast<const float*>(args.grad_output) + out * args.p.output_pixel_stride +
                        unit.group * D + 4 * (i % kPieces);
    window::copy_async16(grad_output + 16 * i, inside ? from : static_cast<const float*>(args.grad_output), inside);
  }
  window::copy_commit();
  __syncthreads();
  const int total = collect_records<D>(args, upper, unit, x, y, records, count, thread);
  window::copy_wait<0>();
  __syncthreads();
  const int warp = thread >> 5;
  sum_records<D>(shared + warp * Shape::kSums, grad_output + 32 * warp, records, total, thread & 31);
  __syncthreads();
  float* grad_input = static_cast<float*>(args.grad_input) + unit.group * D;
  for (int i = thread; i < Shape::kCells * kPieces; i += Shape::kThreads) {
    const int cell = i / kPieces, piece = i % kPieces, cx = cell % kScatterSide, cy = cell / kScatterSide;
    const float4 sum = window::load_shared16f(Shape::cell(shared + (piece >> 1) * Shape::kSums, cx, cy) + 16 * (piece & 1));
    if (x + cx >= tile.width_in || y + cy >= tile.height_in) continue;
    if (sum.x == 0.f && sum.y == 0.f && sum.z == 0.f && sum.w == 0.f) continue;
    const int64_t pixel = (int64_t{unit.n} * tile.height_in + y + cy) * tile.width_in + x + cx;
    HalfTraits<float>::reduce_add(grad_input + pixel * args.p.grad_input_pixel_stride + 4 * piece,
                                  {sum.x, sum.y, sum.z, sum.w});
  }
}

template <int D>
__global__ void __launch_bounds__(ScatterShape<D>::kThreads, ScatterShape<D>::kBlocks) scatter_kernel(const FarArgs args) {
#if __CUDA_ARCH__ >= 900
  using Shape = ScatterShape<D>;
  extern __shared__ __align__(16) uint8_t scatter_shared[];
  auto* flags = reinterpret_cast<uint32_t*>(scatter_shared + Shape::kShared) - (Shape::kWarps + 1);
  const int thread = threadIdx.x, log_units_y = args.log_units_per_tile - args.log_units_x;
  const int64_t windows = args.units >> log_units_y, step = gridDim.x;
  const auto upper_of = [&](int64_t number) {
    const int64_t tile = number >> args.log_units_x;
    return (tile << args.log_units_per_tile) + (number & ((1 << args.log_units_x) - 1));
  };
  wait_for_previous_kernel();
  let_next_kernel_begin();
  // Every thread looks at one of the block's windows, then the block takes those that pay.
  for (int64_t first = blockIdx.x; first < windows; first += step * Shape::kThreads) {
    const int64_t mine = first + step * thread;
    const unsigned ballot =
        __ballot_sync(window::kAllLanes, mine < windows && has_window(args, upper_of(mine)));
    if ((thread & 31) == 0) flags[thread >> 5] = ballot;
    __syncthreads();
    for (int word = 0; word < Shape::kWarps; ++word) {
      for (unsigned rest = flags[word]; rest; rest &= rest - 1) {
        scatter_window<D>(args, upper_of(first + step * (32 * word + __ffs(rest) - 1)),
                          window::smem_address(scatter_shared), flags + Shape::kWarps, thread);
      }
    }
    __syncthreads();
  }
#endif
}

}  // namespace dcngen::backward
