// The forward on maps of at most 8x8 pixels (medium_map.cuh), whether these kernels apply, and the launch.
#include "medium_map_rows.cuh"

namespace dcngen {
namespace medium_map {
namespace {

template <int D>
struct ForwardBlock {
  static constexpr int PIXELS_AT = kTapsBytes, WEIGHTS_AT = PIXELS_AT + Tile<D>::BYTES;
  static constexpr int BYTES = WEIGHTS_AT + kWarps * kWeightsBytes;
  static_assert(OwnWeights::PITCH >= 2 * D, "results are staged where the weights were");
};

template <typename T, int D, typename P>
__global__ void __launch_bounds__(kThreads, D == 64 ? 4 : 6)
    forward_kernel(const P p, const void* input, const void* offset_mask, void* output) {
  using Block = ForwardBlock<D>;
  extern __shared__ __align__(16) uint8_t memory[];
  window::wait_for_previous_kernel();
  window::let_next_kernel_begin();
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, unit = warp & 1, half = warp >> 1;
  const Task task(p, blockIdx.x);
  const uint32_t taps_at = window::smem_address(memory), pixels = taps_at + Block::PIXELS_AT;
  const uint32_t rows = taps_at + Block::WEIGHTS_AT + warp * kWeightsBytes;
  copy_taps<kSide, kThreads>(taps_at, offset_mask, p, task, thread);
  window::copy_commit();
  copy_pixels<D, kSide, kThreads>(pixels, input, p.input_stride, p.height_in, p.width_in, p, task, thread);
  window::copy_commit();
  window::copy_wait<1>();
  __syncthreads();
  const bool busy = p.has_group(2 * task.pair + unit) && has_half(half, p.height_out);
  if (busy) {
    const int m = kHalf * half + lane;
    const uint32_t from = taps_at_pixel(taps_at, task, m, unit);  // zeros where there is no pixel
    build_row<T>(rows + lane * OwnWeights::PITCH, from, p, m);
  }
  window::copy_wait<0>();
  __syncthreads();
  if (!busy) return;
  HalfSums<D> sums = {};
#pragma unroll
  for (int step = 0; step < kPixels / 16; ++step) {
    const uint32_t own = weight_fragments<kSide, false>(rows, 16 * step, lane);
    uint32_t a[2][4];
    window::load_matrices(a[0], own);
    window::load_matrices(a[1], own + 16 * OwnWeights::PITCH);
    add_products<T, D>(sums, a, pixels + 16 * step * Tile<D>::PITCH, unit * D, lane);
  }
  __syncwarp();  // the weights have been read
  store_sums<T, D, OwnWeights::PITCH>(rows, sums, lane);
  __syncwarp();
  write_half<D, OwnWeights::PITCH, P::FULL>(output, p.output_stride, p.height_out, p.width_out, rows, task, unit, half,
                                            lane);
}

template <typename T, int D>
cudaError_t launch_forward(const ForwardArgs& args, cudaStream_t stream) {
  const Problem problem(args.p);
  constexpr int kBytes = ForwardBlock<D>::BYTES;
  static_assert(kBytes <= kMostSharedBytes, "");
  const auto launch_for = [&](const auto& p) {
    using P = std::decay_t<decltype(p)>;
    return launch_with_memory<forward_kernel<T, D, P>>(p.tasks, kThreads, kBytes, stream, window::bulk_copies(), p,
                                                       args.input, args.offset_mask, args.output);
  };
  using Full = FullProblem<Problem, kSide>;
  return Full::applies(problem) ? launch_for(Full(problem)) : launch_for(problem);
}

}  // namespace
}  // namespace medium_map

bool medium_map_applies(const Params& p) { return whole_map::applies(p, medium_map::kSide); }

cudaError_t forward_medium_map(const ForwardArgs& args, cudaStream_t stream) {
  // Slices of wider tensors may begin anywhere.
  if (!aligned16(args.input) || !aligned16(args.offset_mask) || !aligned16(args.output)) {
    return forward_plain(args, stream);
  }
  return whole_map::for_type_and_channels(args.p, [&](auto type, auto channels) {
    return medium_map::launch_forward<decltype(type), channels()>(args, stream);
  });
}

}  // namespace dcngen
