// The backward on maps of at most 4x4 pixels (small_map.cuh): no atomics, so every result is reproducible.
#include "small_map.cuh"
#include "whole_map_backward.cuh"

namespace dcngen {
namespace small_map {
namespace {

// T of both groups in shared memory, as floats: number of the input pixel, then the lane of the output pixel and group.
// With this pitch neither fragments on their way in nor neighbouring lanes with neighbouring samples share banks.
struct Products : ProductCells<kSide, 36 * 4> {

  template <typename T, int D>
  static __device__ __forceinline__ void compute(uint32_t to, uint32_t grad_output, uint32_t input, int lane) {
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      float c[2][4] = {};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t a[4], b[4];
        window::load_matrices(a, Tile<D>::matrices(grad_output, unit * D + 16 * step, lane, true));
        window::load_matrices(b, Tile<D>::matrices(input, unit * D + 16 * step, lane, false));
        Dtype<T>::mma(c[0], a, b[0], b[1]);
        Dtype<T>::mma(c[1], a, b[2], b[3]);
      }
      const int pixel = 2 * (lane & 3);
      const uint32_t to_pixel = to + at(pixel / kSide, pixel % kSide) + 4 * (16 * unit + (lane >> 2));
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // two rows of input pixels on, one pixel on, eight output pixels on
        window::store_shared(to_pixel + at(2 * (i >> 2), (i & 1) - 1) + 32 * (i >> 1 & 1),
                             __float_as_uint(c[i >> 2][i & 3]));
      }
    }
    clear_edges(to + 4 * lane);
    __syncwarp();
  }
};

template <int D>
struct BackwardWarp {
  static constexpr int PRODUCTS_AT = kTapsBytes, INPUT_AT = PRODUCTS_AT + Products::BYTES;
  static constexpr int GRAD_AT = INPUT_AT + Tile<D>::BYTES, BYTES = GRAD_AT + Tile<D>::BYTES;
  static_assert(kTapsBytes >= kPixels * kNumbersPitch, "their gradients take the place of offsets and masks");
  static_assert(Products::BYTES >= kWeightsBytes, "the weights take the place of T");
};

template <typename T, int D>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const BackwardProblem p, const void* grad_output, const void* input, const void* offset_mask,
                    void* grad_input, void* grad_offset_mask) {
  using Warp = BackwardWarp<D>;
  extern __shared__ __align__(16) uint8_t memory[];
  window::wait_for_previous_kernel();
  window::let_next_kernel_begin();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t number = blockIdx.x * kWarps + warp;
  if (number >= p.tasks) return;
  const Task task(p, number);
  const uint32_t taps_at = window::smem_address(memory) + warp * Warp::BYTES, products = taps_at + Warp::PRODUCTS_AT;
  const uint32_t input_at = taps_at + Warp::INPUT_AT, grad_at = taps_at + Warp::GRAD_AT;
  copy_taps<kSide, 32>(taps_at, offset_mask, p, task, lane);
  copy_pixels<D, kSide, 32>(input_at, input, p.input_stride, p.height_in, p.width_in, p, task, lane);
  copy_pixels<D, kSide, 32>(grad_at, grad_output, p.output_stride, p.height_out, p.width_out, p, task, lane);
  window::copy_commit();
  window::copy_wait<0>();
  __syncwarp();
  const Taps taps = taps_of<kSide>(taps_at, p, task, lane & 15, lane >> 4);
  Products::compute<T, D>(products, grad_at, input_at, lane);  // after it all lanes have their offsets and masks

  const Anchor anchor = Anchor::of_pixel<kSide>(p, lane & 15);
  OwnWeights weights;
  const uint32_t stage = taps_at + (lane & 15) * kNumbersPitch + (lane >> 4) * kNumbersPitch / 2;
#pragma unroll
  for (int k = 0; k < window::kTaps; ++k) {
    const Sample sample = anchor.sample<T>(taps, k);
    TapGradient<Products>::of<kSide>(sample, p.scale.scale, products + 4 * lane, lane).template store<T>(stage, k);
    weights.add(sample);
  }
  __syncwarp();
  write_numbers<kSide, 32>(grad_offset_mask, taps_at, p, task, lane);
  weights.store<T>(products + lane * OwnWeights::PITCH);
  __syncwarp();
  multiply_weights<T, D, true>(input_at, products, grad_at, lane);
  write_pixels<D>(grad_input, p.grad_input_stride, p.height_in, p.width_in, input_at, p, task, lane);
}

template <typename T, int D>
cudaError_t launch_backward(const BackwardArgs& args, cudaStream_t stream) {
  const BackwardProblem problem(args.p);
  constexpr int kBytes = kWarps * BackwardWarp<D>::BYTES;
  static_assert(kBytes <= kMostSharedBytes, "");
  return launch_with_memory<backward_kernel<T, D>>(blocks(problem), kThreads, kBytes, stream, window::bulk_copies(),
                                                   problem, args.grad_output, args.input, args.offset_mask,
                                                   args.grad_input, args.grad_offset_mask);
}

}  // namespace
}  // namespace small_map

bool backward_small_map_applies(const Params& p) { return whole_map::backward_applies(p, small_map::kSide); }

cudaError_t backward_small_map(const BackwardArgs& args, cudaStream_t stream) {
  if (!whole_map::aligned(args)) return cudaErrorMisalignedAddress;
  return whole_map::for_type_and_channels(args.p, [&](auto type, auto channels) {
    return small_map::launch_backward<decltype(type), channels()>(args, stream);
  });
}

}  // namespace dcngen
