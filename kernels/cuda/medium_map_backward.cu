// The backward on maps of at most 8x8 pixels (medium_map.cuh): no atomics, so every result is reproducible. The sums of both
// gradients over all pixels, where they are asked for: each block leaves a row of its own, and one more kernel adds the rows.
#include "medium_map_gradients.cuh"
#include "medium_map_rows.cuh"
#include "medium_map_sums.cuh"

namespace dcngen {
namespace medium_map {
namespace {

// Shared memory, which limits how many blocks there are: T begins where the offsets and masks were, once these are in
// registers. In T's place come a warp's weights, results and sums; the gradients of offsets and masks take the input's, if
// they fit.
template <int D>
struct BackwardBlock {
  static constexpr int ROWS_PITCH = 2 * D + 16, ROWS_AT = kWeightsBytes, SUMS_AT = ROWS_AT + kHalf * ROWS_PITCH;
  static constexpr int AFTER_PRODUCTS = (SUMS_AT + kWarpSumBytes<D> + 15) / 16 * 16;
  static constexpr int WARP_BYTES = AFTER_PRODUCTS > Products::BYTES ? AFTER_PRODUCTS : Products::BYTES;
  static constexpr int INPUT_AT = kWarps * WARP_BYTES, GRAD_AT = INPUT_AT + Tile<D>::BYTES;
  static constexpr int END = GRAD_AT + Tile<D>::BYTES, NUMBERS_BYTES = kPixels * kNumbersPitch;
  static constexpr bool IN_PLACE = NUMBERS_BYTES <= Tile<D>::BYTES;
  static constexpr int NUMBERS_AT = IN_PLACE ? INPUT_AT : END, BYTES = IN_PLACE ? END : END + NUMBERS_BYTES;
  static constexpr int BLOCKS = D == 64 ? 3 : 4;  // of a multiprocessor
  static_assert(kTapsBytes <= INPUT_AT && BLOCKS * (BYTES + 1024) <= 228 * 1024, "");
};

// The input gradient of the warp's half and group, to rows of shared memory. `warps`: what the warps have there.
template <typename T, int D>
__device__ __forceinline__ void multiply_transposed(uint32_t to, uint32_t grad_output, uint32_t warps, int height_out,
                                                    int unit, int half, int lane) {
  using Block = BackwardBlock<D>;
  HalfSums<D> sums = {};
#pragma unroll
  for (int step = 0; step < kPixels / 16; ++step) {  // of 16 output pixels
    const int of_half = step >> 1;
    if (!has_half(of_half, height_out)) break;
    const uint32_t rows = warps + (2 * of_half + unit) * Block::WARP_BYTES + 16 * (step & 1) * OwnWeights::PITCH;
    const uint32_t own = weight_fragments<kSide, true>(rows, kHalf * half, lane);
    uint32_t a[2][4];
    window::load_matrices_transposed(a[0], own);
    window::load_matrices_transposed(a[1], own + 32);
    add_products<T, D>(sums, a, grad_output + 16 * step * Tile<D>::PITCH, unit * D, lane);
  }
  store_sums<T, D, Block::ROWS_PITCH>(to, sums, lane);
  __syncwarp();
}

template <typename T, int D, typename P>
__global__ void __launch_bounds__(kThreads, BackwardBlock<D>::BLOCKS)
    backward_kernel(const P p, const void* grad_output, const void* input, const void* offset_mask,
                    void* grad_input, void* grad_offset_mask, float* sums) {
  using Block = BackwardBlock<D>;
  extern __shared__ __align__(16) uint8_t memory[];
  window::wait_for_previous_kernel();
  window::let_next_kernel_begin();
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, unit = warp & 1, half = warp >> 1;
  const Task task(p, blockIdx.x);
  const uint32_t warps = window::smem_address(memory), own = warps + warp * Block::WARP_BYTES;
  const uint32_t input_at = warps + Block::INPUT_AT, grad_at = warps + Block::GRAD_AT;
  const uint32_t numbers = warps + Block::NUMBERS_AT;
  copy_taps<kSide, kThreads>(warps, offset_mask, p, task, thread);
  copy_pixels<D, kSide, kThreads>(input_at, input, p.input_stride, p.height_in, p.width_in, p, task, thread);
  copy_pixels<D, kSide, kThreads>(grad_at, grad_output, p.output_stride, p.height_out, p.width_out, p, task, thread);
  window::copy_commit();
  window::copy_wait<0>();
  __syncthreads();
  const bool has_group = p.has_group(2 * task.pair + unit), busy = has_group && has_half(half, p.height_out);
  const int m = kHalf * half + lane;
  Taps taps;
  if (busy) taps = window::load_taps(taps_at_pixel(warps, task, m, unit));  // zeros where there is no pixel
  __syncthreads();  // all have their offsets and masks
  if (busy) Products::compute<T, D>(own, grad_at, input_at, unit, half, lane);
  if (Block::IN_PLACE) __syncthreads();  // all have their products with the input
  const uint32_t stage = numbers + m * kNumbersPitch + unit * kNumbersPitch / 2, row = own + lane * OwnWeights::PITCH;
  if (!has_group) {  // a pair's second: padding
    for (int i = 0; i < window::kGroupValues; ++i) window::store_shared2(stage + 2 * i, 0);
  } else if (busy && all_near<T>(taps, p.scale)) {
    float stencil[5][5];
    differentiate_near<T>(stencil, stage, taps, own, p, m, lane);
    __syncwarp();  // all lanes have read their products
    store_stencil<T>(row, stencil, p.first_x + m % kSide - 2, p.first_y + m / kSide - 2);
  } else if (busy) {
    OwnWeights weights;
    differentiate<T>(weights, stage, taps, own, p, m, lane);
    __syncwarp();
    weights.store<T>(row);
  }
  __syncthreads();
  write_numbers<kSide, kThreads>(grad_offset_mask, numbers, p, task, thread);
  if (sums != nullptr) sum_numbers<T>(own + Block::SUMS_AT, numbers, p, warp, lane);
  if (has_group && has_half(half, p.height_in)) {
    const uint32_t rows = own + Block::ROWS_AT;
    multiply_transposed<T, D>(rows, grad_at, warps, p.height_out, unit, half, lane);
    write_half<D, Block::ROWS_PITCH, P::FULL>(grad_input, p.grad_input_stride, p.height_in, p.width_in, rows, task, unit,
                                              half, lane);
    if (sums != nullptr) sum_channels<T, D, Block::ROWS_PITCH>(own + Block::SUMS_AT, rows, p, half, lane);
  }
  if (sums == nullptr) return;
  __syncthreads();
  add_sums<D>(sums + int64_t{blockIdx.x} * kSumRow<D>, warps + Block::SUMS_AT, Block::WARP_BYTES, p, thread);
}

template <typename T, int D>
cudaError_t launch_backward(const BackwardArgs& args, cudaStream_t stream) {
  const BackwardProblem problem(args.p);
  constexpr int kBytes = BackwardBlock<D>::BYTES;
  static_assert(kBytes <= kMostSharedBytes, "");
  float* const rows = args.grad_sums == nullptr ? nullptr : static_cast<float*>(args.workspace);
  const auto launch_for = [&](const auto& p) {
    using P = std::decay_t<decltype(p)>;
    return launch_with_memory<backward_kernel<T, D, P>>(p.tasks, kThreads, kBytes, stream, window::bulk_copies(), p,
                                                        args.grad_output, args.input, args.offset_mask, args.grad_input,
                                                        args.grad_offset_mask, rows);
  };
  using Full = FullProblem<BackwardProblem, kSide>;
  const cudaError_t error = Full::applies(problem) ? launch_for(Full(problem)) : launch_for(problem);
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
