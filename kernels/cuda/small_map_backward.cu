// The backward on maps of at most 4x4 pixels (small_map.cuh): no atomics, so every result is reproducible.
#include "small_map.cuh"

namespace dcngen {
namespace small_map {
namespace {

struct BackwardProblem : Problem {
  int64_t grad_input_stride, grad_offset_mask_stride;
  int grad_offset_mask_bytes;  // of a pixel; what is behind the last group is written 0
  explicit BackwardProblem(const Params& p)
      : Problem(p), grad_input_stride(2 * p.grad_input_pixel_stride),
        grad_offset_mask_stride(2 * p.grad_offset_mask_pixel_stride),
        grad_offset_mask_bytes(2 * p.offset_mask_channels) {}
};

// T of both groups in shared memory, as floats: number of the input pixel, then the lane of the output pixel and group.
// With this pitch neither fragments on their way in nor neighbouring lanes with neighbouring samples share banks.
struct Products {
  static constexpr int PITCH = 36 * 4, BYTES = kPixels * PITCH;

  template <typename T, int D>
  static __device__ __forceinline__ void compute(uint32_t to, uint32_t grad_output, uint32_t input, int lane) {
    using Tile = PairTile<D>;
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      float c[2][4] = {};
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t a[4], b[4];
        window::load_matrices(a, Tile::matrices(grad_output, unit * D + 16 * step, lane, true));
        window::load_matrices(b, Tile::matrices(input, unit * D + 16 * step, lane, false));
        Dtype<T>::mma(c[0], a, b[0], b[1]);
        Dtype<T>::mma(c[1], a, b[2], b[3]);
      }
      const uint32_t at = to + 2 * (lane & 3) * PITCH + 4 * (16 * unit + (lane >> 2));
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // eight input pixels on, one on, eight output pixels on
        window::store_shared(at + (8 * (i >> 2) + (i & 1)) * PITCH + 32 * (i >> 1 & 1), __float_as_uint(c[i >> 2][i & 3]));
      }
    }
    __syncwarp();
  }
  static __device__ __forceinline__ float load_if(bool inside, uint32_t at) {
    return inside ? __uint_as_float(window::load_shared(at)) : 0.f;
  }
};

template <int D>
struct BackwardWarp {
  static constexpr int PRODUCTS_AT = kTapsBytes, INPUT_AT = PRODUCTS_AT + Products::BYTES;
  static constexpr int GRAD_AT = INPUT_AT + PairTile<D>::BYTES, BYTES = GRAD_AT + PairTile<D>::BYTES;
  static constexpr int NUMBERS_PITCH = 2 * kPairNumbers;
  static_assert(kTapsBytes >= kPixels * NUMBERS_PITCH, "their gradients take the place of offsets and masks");
  static_assert(Products::BYTES >= WeightRows::BYTES, "the weights take the place of T");
};

// The gradients of a tap's offsets and mask from T. The derivative is that of the cell that floor() picks.
struct TapGradient {
  float x, y, mask;
  __device__ __forceinline__ TapGradient(const Places& places, float2 at, float m, uint32_t products, int lane) {
    const bool counts = places.counts(at);
    const float x0 = floorf(at.x), y0 = floorf(at.y);
    const float lx = counts ? at.x - x0 : 0.f, ly = counts ? at.y - y0 : 0.f;
    const int column = static_cast<int>(x0), row = static_cast<int>(y0);
    const bool left = column >= 0, right = column < kSide - 1, top = row >= 0, bottom = row < kSide - 1;
    const uint32_t first = products + 4 * lane + (kSide * row + column) * Products::PITCH;
    const float t00 = Products::load_if(counts && top && left, first);
    const float t01 = Products::load_if(counts && top && right, first + Products::PITCH);
    const float t10 = Products::load_if(counts && bottom && left, first + kSide * Products::PITCH);
    const float t11 = Products::load_if(counts && bottom && right, first + (kSide + 1) * Products::PITCH);
    const float slope_top = t01 - t00, slope_bottom = t11 - t10;
    const float value_top = fmaf(lx, slope_top, t00), value_bottom = fmaf(lx, slope_bottom, t10);
    const float factor = counts ? places.scale * m : 0.f;
    x = factor * fmaf(ly, slope_bottom - slope_top, slope_top);
    y = factor * (value_bottom - value_top);
    mask = fmaf(ly, value_bottom - value_top, value_top);
  }
};

// Writes the pair's staged gradients of offset_mask, half a warp a pixel; a pair begins at a word of memory.
template <int D>
__device__ __forceinline__ void write_numbers(void* tensor, uint32_t stage, const BackwardProblem& p, const Task& task,
                                              int lane) {
  constexpr int WORDS = kPairNumbers / 2;
  const bool last = 2 * task.pair + 2 >= p.groups;
  const int first = task.pair * BackwardWarp<D>::NUMBERS_PITCH;
  const int words = last ? (p.grad_offset_mask_bytes - first) / 4 : WORDS;  // the last pair's with the padding
  char* image = static_cast<char*>(tensor) + task.image * p.height_out * p.width_out * p.grad_offset_mask_stride + first;
#pragma unroll
  for (int m = lane >> 4; m < kPixels; m += 2) {
    const int pixel = pixel_at(m, p.height_out, p.width_out);
    if (pixel < 0) continue;
    auto* to = reinterpret_cast<uint32_t*>(image + pixel * p.grad_offset_mask_stride);
    for (int word = lane & 15; word < words; word += 16) {
      to[word] = word < WORDS ? window::load_shared(stage + m * BackwardWarp<D>::NUMBERS_PITCH + 4 * word) : 0;
    }
  }
}

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
  copy_taps(taps_at, offset_mask, p, task, lane);
  copy_pixels<D>(input_at, input, p.input_stride, p.height_in, p.width_in, p, task, lane);
  copy_pixels<D>(grad_at, grad_output, p.output_stride, p.height_out, p.width_out, p, task, lane);
  window::copy_commit();
  window::copy_wait<0>();
  __syncwarp();
  const Taps taps = own_taps(taps_at, p, task, lane);
  Products::compute<T, D>(products, grad_at, input_at, lane);  // after it all lanes have their offsets and masks

  const Places places(p, lane);
  Weights weights;
  const uint32_t stage = taps_at + (lane & 15) * Warp::NUMBERS_PITCH + (lane >> 4) * Warp::NUMBERS_PITCH / 2;
#pragma unroll
  for (int k = 0; k < window::kTaps; ++k) {
    const float2 at = places.of_tap<T>(taps, k / 3, k % 3);
    const float mask = taps.mask<T>(k);
    const TapGradient gradient(places, at, mask, products, lane);
    const uint32_t pair = Dtype<T>::pack(gradient.x, gradient.y);
    window::store_shared2(stage + 4 * k, pair);  // the second group's begin in the middle of a word
    window::store_shared2(stage + 4 * k + 2, pair >> 16);
    window::store_shared2(stage + 4 * window::kTaps + 2 * k, Dtype<T>::pack(gradient.mask, 0.f));
    weights.add(at, places.counts(at) ? mask : 0.f);
  }
  __syncwarp();
  write_numbers<D>(grad_offset_mask, taps_at, p, task, lane);
  weights.store<T>(products, lane);
  __syncwarp();
  multiply_weights<T, D, true>(input_at, products, grad_at, lane);
  write_pixels<D>(grad_input, p.grad_input_stride, p.height_in, p.width_in, input_at, p, task, lane);
}

template <typename T, int D>
cudaError_t launch_backward(const BackwardArgs& args, cudaStream_t stream) {
  const BackwardProblem problem(args.p);
  constexpr int kBytes = kWarps * BackwardWarp<D>::BYTES;
  static_assert(kBytes <= kMostSharedBytes, "");
  return launch_with_memory<backward_kernel<T, D>>(problem.blocks(), kThreads, kBytes, stream, window::bulk_copies(),
                                                   problem, args.grad_output, args.input, args.offset_mask,
                                                   args.grad_input, args.grad_offset_mask);
}

}  // namespace
}  // namespace small_map

bool backward_small_map_applies(const Params& p) {
  return small_map_applies(p) && p.grad_input_pixel_stride % 8 == 0 && p.grad_offset_mask_pixel_stride % 2 == 0;
}

cudaError_t backward_small_map(const BackwardArgs& args, cudaStream_t stream) {
  const void* pointers[] = {args.grad_output, args.input, args.offset_mask, args.grad_input, args.grad_offset_mask};
  for (const void* pointer : pointers) {
    if (!aligned16(pointer)) return cudaErrorMisalignedAddress;
  }
  return small_map::for_type_and_channels(args.p, [&](auto type, auto channels) {
    return small_map::launch_backward<decltype(type), channels()>(args, stream);
  });
}

}  // namespace dcngen
