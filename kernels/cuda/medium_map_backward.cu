// The backward on maps of at most 8x8 pixels (medium_map.cuh): no atomics, so every result is reproducible. The sums of both
// gradients over all pixels, where they are asked for: each block leaves a row of its own, and one more kernel adds the rows.
#include "medium_map_sums.cuh"

namespace dcngen {
namespace medium_map {
namespace {

// A warp's T in shared memory, as floats: number of the input pixel, then the lane of the output pixel. With this pitch
// neither fragments on their way in nor neighbouring lanes with neighbouring samples share banks.
struct Products : ProductCells<kSide, 40 * 4> {

  template <typename T, int D>
  static __device__ __forceinline__ void compute(uint32_t to, uint32_t grad_output, uint32_t input, int unit, int half,
                                                 int lane) {
    uint32_t b[D / 16][2][4];  // of grad_output: 16 channels, 16 pixels
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t at = grad_output + (kHalf * half + 16 * n) * Tile<D>::PITCH;
        window::load_matrices(b[step][n], Tile<D>::matrices(at, unit * D + 16 * step, lane, false));
      }
    }
    const uint32_t own = to + at(0, lane >> 2) + 8 * (lane & 3);
#pragma unroll
    for (int m = 0; m < kPixels / 16; ++m) {
      float c[4][4] = {};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t a[4];
        window::load_matrices(a, Tile<D>::matrices(input + 16 * m * Tile<D>::PITCH, unit * D + 16 * step, lane, true));
#pragma unroll
        for (int n = 0; n < 4; ++n) Dtype<T>::mma(c[n], a, b[step][n >> 1][2 * (n & 1)], b[step][n >> 1][2 * (n & 1) + 1]);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t row = own + at(2 * m, -1) + 32 * n;
        window::store_shared8(row, __float_as_uint(c[n][0]), __float_as_uint(c[n][1]));
        window::store_shared8(row + at(1, -1), __float_as_uint(c[n][2]), __float_as_uint(c[n][3]));
      }
    }
    clear_edges(to + 4 * lane);
    __syncwarp();
  }
};

template <int D>
struct BackwardBlock {
  static constexpr int INPUT_AT = kTapsBytes, GRAD_AT = INPUT_AT + Tile<D>::BYTES;
  static constexpr int PRODUCTS_AT = GRAD_AT + Tile<D>::BYTES, BYTES = PRODUCTS_AT + kWarps * Products::BYTES;
  static_assert(kTapsBytes >= kPixels * kNumbersPitch, "their gradients take the place of offsets and masks");
  static_assert(Products::BYTES >= kWeightsBytes + kWarpSumBytes<D>, "weights and sums take the place of T");
};

// The input gradient of the warp's half and group, in the place of the input.
template <typename T, int D>
__device__ __forceinline__ void multiply_transposed(uint32_t input, uint32_t grad_output, uint32_t weights,
                                                    int height_out, int unit, int half, int lane) {
  HalfSums<D> sums = {};
#pragma unroll
  for (int step = 0; step < kPixels / 16; ++step) {  // of 16 output pixels
    const int of_half = step >> 1;
    if (!has_half(of_half, height_out)) break;
    const uint32_t rows = weights + (2 * of_half + unit) * Products::BYTES + 16 * (step & 1) * OwnWeights::PITCH;
    const uint32_t own = weight_fragments<kSide, true>(rows, kHalf * half, lane);
    uint32_t a[2][4];
    window::load_matrices_transposed(a[0], own);
    window::load_matrices_transposed(a[1], own + 32);
    add_products<T, D>(sums, a, grad_output + 16 * step * Tile<D>::PITCH, unit * D, lane);
  }
  store_sums<T, D, Tile<D>::PITCH>(input + kHalf * half * Tile<D>::PITCH + 2 * unit * D, sums, lane);
  __syncwarp();
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, D == 64 ? 2 : 3)
    backward_kernel(const BackwardProblem p, const void* grad_output, const void* input, const void* offset_mask,
                    void* grad_input, void* grad_offset_mask, float* sums) {
  using Block = BackwardBlock<D>;
  extern __shared__ __align__(16) uint8_t memory[];
  window::wait_for_previous_kernel();
  window::let_next_kernel_begin();
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, unit = warp & 1, half = warp >> 1;
  const Task task(p, blockIdx.x);
  const uint32_t taps_at = window::smem_address(memory), input_at = taps_at + Block::INPUT_AT;
  const uint32_t grad_at = taps_at + Block::GRAD_AT, products = taps_at + Block::PRODUCTS_AT;
  const uint32_t own = products + warp * Products::BYTES;
  copy_pixels<D, kSide, kThreads>(input_at, input, p.input_stride, p.height_in, p.width_in, p, task, thread);
  copy_pixels<D, kSide, kThreads>(grad_at, grad_output, p.output_stride, p.height_out, p.width_out, p, task, thread);
  copy_taps<kSide, kThreads>(taps_at, offset_mask, p, task, thread);
  window::copy_commit();
  window::copy_wait<0>();
  __syncthreads();
  const bool has_group = 2 * task.pair + unit < p.groups, busy = has_group && has_half(half, p.height_out);
  const int m = kHalf * half + lane;
  Taps taps;
  if (busy) {
    taps = taps_of<kSide>(taps_at, p, task, m, unit);
    Products::compute<T, D>(own, grad_at, input_at, unit, half, lane);
  }
  __syncthreads();  // all have their offsets and masks, and their products with the input
  const uint32_t stage = taps_at + m * kNumbersPitch + unit * kNumbersPitch / 2;
  if (!has_group) {  // a pair's second: padding
    for (int i = 0; i < window::kGroupValues; ++i) window::store_shared2(stage + 2 * i, 0);
  } else if (busy) {
    const Anchor anchor = Anchor::of_pixel<kSide>(p, m);
    OwnWeights weights;
#pragma unroll
    for (int k = 0; k < window::kTaps; ++k) {
      const Sample sample = anchor.sample<T>(taps, k);
      TapGradient<Products>::of<kSide>(sample, p.scale, own + 4 * lane).template store<T>(stage, k);
      weights.add(sample);
    }
    __syncwarp();  // all lanes have read their products
    weights.store<T>(own + lane * OwnWeights::PITCH);
  }
  __syncthreads();
  write_numbers<kSide, kThreads>(grad_offset_mask, taps_at, p, task, thread);
  if (sums != nullptr) sum_numbers<T>(own + kWeightsBytes, taps_at, p, warp, lane);
  if (has_group && has_half(half, p.height_in)) {
    multiply_transposed<T, D>(input_at, grad_at, products, p.height_out, unit, half, lane);
    const uint32_t rows = input_at + kHalf * half * Tile<D>::PITCH + 2 * unit * D;
    write_half<D, Tile<D>::PITCH>(grad_input, p.grad_input_stride, p.height_in, p.width_in, rows, task, unit, half, lane);
    if (sums != nullptr) sum_channels<T, D>(own + kWeightsBytes, rows, p, half, lane);
  }
  if (sums == nullptr) return;
  __syncthreads();
  add_sums<D>(sums + int64_t{blockIdx.x} * kSumRow<D>, products + kWeightsBytes, Products::BYTES, p, thread);
}

template <typename T, int D>
cudaError_t launch_backward(const BackwardArgs& args, cudaStream_t stream) {
  const BackwardProblem problem(args.p);
  constexpr int kBytes = BackwardBlock<D>::BYTES;
  static_assert(kBytes <= kMostSharedBytes, "");
  float* const rows = args.grad_sums == nullptr ? nullptr : static_cast<float*>(args.workspace);
  const cudaError_t error = launch_with_memory<backward_kernel<T, D>>(
      problem.tasks, kThreads, kBytes, stream, window::bulk_copies(), problem, args.grad_output, args.input,
      args.offset_mask, args.grad_input, args.grad_offset_mask, rows);
  if (error != cudaSuccess || rows == nullptr) return error;
  const int columns = static_cast<int>(problem.pairs.divisor) * kSumRow<D>;
  return launch_with_memory<sum_kernel<D>>((columns + 31) / 32, 32 * kSumWarps, kSumBytes, stream, window::bulk_copies(),
                                           static_cast<const float*>(rows), args.grad_sums, columns,
                                           static_cast<int>(args.p.batch), args.p.groups,
                                           static_cast<int>(args.p.offset_mask_channels));
}

}  // namespace
}  // namespace medium_map

bool backward_medium_map_applies(const Params& p) { return whole_map::backward_applies(p, medium_map::kSide); }

int64_t backward_medium_map_workspace(const Params& p) {
  return p.batch * ((p.groups + 1) / 2) * (medium_map::kPairNumbers + 2 * int64_t{p.group_channels}) * 4;
}

cudaError_t backward_medium_map(const BackwardArgs& args, cudaStream_t stream) {
  if (!whole_map::aligned(args)) return cudaErrorMisalignedAddress;
  return whole_map::for_type_and_channels(args.p, [&](auto type, auto channels) {
    return medium_map::launch_backward<decltype(type), channels()>(args, stream);
  });
}

}  // namespace dcngen
