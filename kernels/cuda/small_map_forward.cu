// The forward on maps of at most 4x4 pixels (small_map.cuh), whether these kernels apply, and the launch.
#include "small_map.cuh"

namespace dcngen {
namespace small_map {
namespace {

template <int D>
struct ForwardWarp {
  static constexpr int PIXELS_AT = kTapsBytes, BYTES = PIXELS_AT + Tile<D>::BYTES;
  static_assert(kTapsBytes >= kWeightsBytes, "the weights take the place of the offsets and masks");
};

template <typename T, int D>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const Problem p, const void* input, const void* offset_mask, void* output) {
  extern __shared__ __align__(16) uint8_t memory[];
  window::wait_for_previous_kernel();
  window::let_next_kernel_begin();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t number = blockIdx.x * kWarps + warp;
  if (number >= p.tasks) return;
  const Task task(p, number);
  const uint32_t taps_at = window::smem_address(memory) + warp * ForwardWarp<D>::BYTES;
  const uint32_t pixels = taps_at + ForwardWarp<D>::PIXELS_AT;
  copy_taps<kSide, 32>(taps_at, offset_mask, p, task, lane);
  window::copy_commit();
  copy_pixels<D, kSide, 32>(pixels, input, p.input_stride, p.height_in, p.width_in, p, task, lane);
  window::copy_commit();
  window::copy_wait<1>();
  __syncwarp();
  const Taps taps = taps_of<kSide>(taps_at, p, task, lane & 15, lane >> 4);
  const Anchor anchor = Anchor::of_pixel<kSide>(p, lane & 15);
  OwnWeights weights;
#pragma unroll
  for (int k = 0; k < window::kTaps; ++k) weights.add(anchor.sample<T>(taps, k));
  __syncwarp();  // all lanes have their offsets and masks
  weights.store<T>(taps_at + lane * OwnWeights::PITCH);
  window::copy_wait<0>();
  __syncwarp();
  multiply_weights<T, D, false>(pixels, taps_at, pixels, lane);
  write_pixels<D>(output, p.output_stride, p.height_out, p.width_out, pixels, p, task, lane);
}

template <typename T, int D>
cudaError_t launch_forward(const ForwardArgs& args, cudaStream_t stream) {
  const Problem problem(args.p);
  constexpr int kBytes = kWarps * ForwardWarp<D>::BYTES;
  static_assert(kBytes <= kMostSharedBytes, "");
  return launch_with_memory<forward_kernel<T, D>>(blocks(problem), kThreads, kBytes, stream, window::bulk_copies(),
                                                  problem, args.input, args.offset_mask, args.output);
}

}  // namespace
}  // namespace small_map

bool small_map_applies(const Params& p) { return whole_map::applies(p, small_map::kSide); }

cudaError_t forward_small_map(const ForwardArgs& args, cudaStream_t stream) {
  // Slices of wider tensors may begin anywhere.
  if (!aligned16(args.input) || !aligned16(args.offset_mask) || !aligned16(args.output)) {
    return forward_plain(args, stream);
  }
  return whole_map::for_type_and_channels(args.p, [&](auto type, auto channels) {
    return small_map::launch_forward<decltype(type), channels()>(args, stream);
  });
}

}  // namespace dcngen
