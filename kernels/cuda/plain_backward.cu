// The plain backward. Offset and mask gradients: a group of lanes per (pixel, group), one reduction over the channels.
// Input gradient: fp32 atomics (half dtypes through an fp32 workspace, so that it is rounded once), or, where a
// reproducible result is asked for, one thread per (image, channel) that adds in a fixed order.
#include "plain.cuh"

namespace dcngen {
namespace {

struct TapGradient {
  float x, y, mask;
};

// The contribution of VEC channels to the gradients of one tap, before offset_scale.
template <typename T, int VEC>
__device__ __forceinline__ TapGradient tap_gradient(const Place& place, const T* image, int64_t pixel_stride,
                                                    const float (&grad)[VEC]) {
  float dot[4] = {};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    if (!place.inside[q]) continue;
    float value[VEC];
    load_vector<VEC>(image + place.corner[q] * pixel_stride, value);
#pragma unroll
    for (int c = 0; c < VEC; ++c) dot[q] = fmaf(grad[c], value[c], dot[q]);
  }
  float w[4];
  corner_weights(place, w);
  const float hx = 1.f - place.lx, hy = 1.f - place.ly;
  return {hy * (dot[1] - dot[0]) + place.ly * (dot[3] - dot[2]), hx * (dot[2] - dot[0]) + place.lx * (dot[3] - dot[1]),
          w[0] * dot[0] + w[1] * dot[1] + w[2] * dot[2] + w[3] * dot[3]};
}

template <int LANES>
__device__ __forceinline__ float sum_over_lanes(float v) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <int LANES>
__device__ __forceinline__ TapGradient sum_over_lanes(TapGradient t) {
  return {sum_over_lanes<LANES>(t.x), sum_over_lanes<LANES>(t.y), sum_over_lanes<LANES>(t.mask)};
}

// One tap's gradient, summed over all channels of the group; every lane of the group gets the sum.
template <typename T, int VEC, int LANES>
__device__ TapGradient whole_tap_gradient(const Params& p, const Place& place, const T* image, const T* grad_output,
                                          int lane) {
  TapGradient total = {0.f, 0.f, 0.f};
  if (place.counts) {
    for (int c = lane * VEC; c < p.group_channels; c += LANES * VEC) {
      float grad[VEC];
      load_vector<VEC>(grad_output + c, grad);
      const TapGradient part = tap_gradient<T, VEC>(place, image + c, p.input_pixel_stride, grad);
      total.x += part.x;
      total.y += part.y;
      total.mask += part.mask;
    }
  }
  return sum_over_lanes<LANES>(total);
}

template <typename T, int VEC, int LANES>
__global__ void __launch_bounds__(kThreads) backward_offset_mask_kernel(const BackwardArgs args) {
  const Params& p = args.p;
  const int count = taps(p), lane = threadIdx.x % LANES;
  const int64_t total = p.batch * p.height_out * p.width_out * p.groups;
  const int64_t step = int64_t{gridDim.x} * (kThreads / LANES);
  const T* offset_mask = static_cast<const T*>(args.offset_mask);
  T* grad_offset_mask = static_cast<T*>(args.grad_offset_mask);
  // Whole warps run the same number of rounds, because the reduction shuffles with all lanes.
  for (int64_t base = blockIdx.x * int64_t{kThreads / LANES}; base < total; base += step) {
    const int64_t id = base + threadIdx.x / LANES;
    const bool active = id < total;
    const int64_t pixel = active ? id / p.groups : 0;
    const int group = active ? static_cast<int>(id - pixel * p.groups) : 0;
    const OutputPixel at = locate(p, pixel);
    const T* offsets = offset_mask + pixel * p.offset_mask_pixel_stride + 3 * count * group;
    const T* masks = offsets + 2 * count;
    const T* image = static_cast<const T*>(args.input) + at.image * p.input_pixel_stride + group * p.group_channels;
    const T* grad_output =
        static_cast<const T*>(args.grad_output) + pixel * p.output_pixel_stride + group * p.group_channels;
    T* out = grad_offset_mask + pixel * p.grad_offset_mask_pixel_stride + 3 * count * group;
    const MaskRule rule = mask_rule(p, masks, count);
    float mean = 0.f;  // softmax only: sum_k weight_k * d(output)/d(weight_k), which its Jacobian subtracts
    for (int pass = p.softmax ? 0 : 1; pass < 2; ++pass) {
      int k = 0;
      for (int i = 0; i < p.kernel_w; ++i) {
        for (int j = 0; j < p.kernel_h; ++j) {
          if (is_removed(p, i, j)) continue;
          Place place = place_of(p, i, j, at.oh, at.ow, to_float(offsets[2 * k]), to_float(offsets[2 * k + 1]));
          place.counts = place.counts && active;
          const TapGradient t = whole_tap_gradient<T, VEC, LANES>(p, place, image, grad_output, lane);
          const float weight = rule(to_float(masks[k]));
          if (pass == 0) {
            mean = fmaf(weight, t.mask, mean);
          } else if (active && lane == 0) {
            out[2 * k] = from_float<T>(place.counts ? p.offset_scale * weight * t.x : 0.f);
            out[2 * k + 1] = from_float<T>(place.counts ? p.offset_scale * weight * t.y : 0.f);
            out[2 * count + k] = from_float<T>(p.softmax ? weight * (t.mask - mean) : t.mask);
          }
          ++k;
        }
      }
    }
    if (active && group == p.groups - 1) {  // the padding at the tail
      T* tail = grad_offset_mask + pixel * p.grad_offset_mask_pixel_stride;
      for (int c = 3 * count * p.groups + lane; c < p.offset_mask_channels; c += LANES) tail[c] = from_float<T>(0.f);
    }
  }
}

// Adds the contributions of output pixel (at, pixel) to the input gradient of VEC channels through `add`.
template <typename T, int VEC, typename Add>
__device__ __forceinline__ void scatter_pixel(const BackwardArgs& args, int64_t pixel, int channel, Add add) {
  const Params& p = args.p;
  const int count = taps(p);
  const OutputPixel at = locate(p, pixel);
  const T* offsets = static_cast<const T*>(args.offset_mask) + pixel * p.offset_mask_pixel_stride +
                     3 * count * (channel / p.group_channels);
  const T* masks = offsets + 2 * count;
  const MaskRule rule = mask_rule(p, masks, count);
  float grad[VEC];
  load_vector<VEC>(static_cast<const T*>(args.grad_output) + pixel * p.output_pixel_stride + channel, grad);
  int k = 0;
  for (int i = 0; i < p.kernel_w; ++i) {
    for (int j = 0; j < p.kernel_h; ++j) {
      if (is_removed(p, i, j)) continue;
      const Place place = place_of(p, i, j, at.oh, at.ow, to_float(offsets[2 * k]), to_float(offsets[2 * k + 1]));
      const float weight = rule(to_float(masks[k]));
      float w[4];
      corner_weights(place, w);
      for (int q = 0; q < 4; ++q) {
        if (place.inside[q]) add(at.image + place.corner[q], weight * w[q], grad);
      }
      ++k;
    }
  }
}

template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads) backward_input_atomic_kernel(const BackwardArgs args, float* accumulator,
                                                                        int64_t accumulator_stride) {
  const Params& p = args.p;
  const int vectors = p.groups * p.group_channels / VEC;
  const int64_t total = p.batch * p.height_out * p.width_out * vectors;
  for (int64_t id = blockIdx.x * int64_t{kThreads} + threadIdx.x; id < total; id += int64_t{gridDim.x} * kThreads) {
    const int64_t pixel = id / vectors;
    const int channel = static_cast<int>(id - pixel * vectors) * VEC;
    scatter_pixel<T, VEC>(args, pixel, channel, [&](int64_t at, float f, const float(&grad)[VEC]) {
#pragma unroll
      for (int c = 0; c < VEC; ++c) atomicAdd(accumulator + at * accumulator_stride + channel + c, f * grad[c]);
    });
  }
}

// Reproducible: a thread owns one channel of one image and walks the output pixels in order.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_input_owner_kernel(const BackwardArgs args, float* accumulator,
                                                                       int64_t accumulator_stride) {
  const Params& p = args.p;
  const int channels = p.groups * p.group_channels;
  const int64_t per_image = p.height_out * p.width_out, total = p.batch * channels;
  for (int64_t id = blockIdx.x * int64_t{kThreads} + threadIdx.x; id < total; id += int64_t{gridDim.x} * kThreads) {
    const int64_t n = id / channels;
    const int channel = static_cast<int>(id - n * channels);
    for (int64_t pixel = n * per_image; pixel < (n + 1) * per_image; ++pixel) {
      scatter_pixel<T, 1>(args, pixel, channel, [&](int64_t at, float f, const float(&grad)[1]) {
        accumulator[at * accumulator_stride + channel] += f * grad[0];
      });
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) round_kernel(const float* from, T* to, int64_t pixels, int channels,
                                                        int64_t stride) {
  const int64_t total = pixels * channels;
  for (int64_t id = blockIdx.x * int64_t{kThreads} + threadIdx.x; id < total; id += int64_t{gridDim.x} * kThreads) {
    const int64_t pixel = id / channels;
    to[pixel * stride + (id - pixel * channels)] = from_float<T>(from[id]);
  }
}

template <typename T, int VEC, int LANES>
cudaError_t launch_offset_mask(const BackwardArgs& args, cudaStream_t stream) {
  const Params& p = args.p;
  const int64_t work = p.batch * p.height_out * p.width_out * p.groups * LANES;
  return launch(backward_offset_mask_kernel<T, VEC, LANES>, blocks_for(work), kThreads, 0, stream, false, args);
}

template <typename T, int VEC>
cudaError_t dispatch_lanes(const BackwardArgs& args, cudaStream_t stream) {
  const int vectors = (args.p.group_channels + VEC - 1) / VEC;
  if (vectors <= 1) return launch_offset_mask<T, VEC, 1>(args, stream);
  if (vectors <= 2) return launch_offset_mask<T, VEC, 2>(args, stream);
  if (vectors <= 4) return launch_offset_mask<T, VEC, 4>(args, stream);
  if (vectors <= 8) return launch_offset_mask<T, VEC, 8>(args, stream);
  return launch_offset_mask<T, VEC, 32>(args, stream);
}

template <typename T>
cudaError_t scatter(const BackwardArgs& args, float* accumulator, int64_t stride, bool vectors_of_four,
                    cudaStream_t stream) {
  const Params& p = args.p;
  const int channels = p.groups * p.group_channels;
  const int64_t pixels = p.batch * p.height_out * p.width_out;
  if (p.deterministic) {
    return launch(backward_input_owner_kernel<T>, blocks_for(p.batch * channels), kThreads, 0, stream, false, args,
                  accumulator, stride);
  }
  const auto kernel = vectors_of_four ? backward_input_atomic_kernel<T, 4> : backward_input_atomic_kernel<T, 1>;
  const int64_t work = pixels * (vectors_of_four ? channels / 4 : channels);
  return launch(kernel, blocks_for(work), kThreads, 0, stream, false, args, accumulator, stride);
}

template <typename T>
cudaError_t backward(const BackwardArgs& args, cudaStream_t stream) {
  const Params& p = args.p;
  const int channels = p.groups * p.group_channels;
  const int64_t pixels_in = p.batch * p.height_in * p.width_in;
  const void* pointers[] = {args.input, args.grad_output};
  const int64_t strides[] = {p.input_pixel_stride, p.output_pixel_stride};
  const int vec = vector_width<T>(p, pointers, strides, 2);
  cudaError_t error = vec >= 4 ? dispatch_lanes<T, 4>(args, stream) : dispatch_lanes<T, 1>(args, stream);
  if (error != cudaSuccess) return error;

  constexpr bool kDirect = sizeof(T) == 4;  // fp32 accumulates in place, strided or not
  float* accumulator = static_cast<float*>(kDirect ? args.grad_input : args.workspace);
  const int64_t stride = kDirect ? p.grad_input_pixel_stride : channels;
  error = cudaMemset2DAsync(accumulator, stride * sizeof(float), 0, channels * sizeof(float), pixels_in, stream);
  if (error != cudaSuccess) return error;
  error = scatter<T>(args, accumulator, stride, vec >= 4, stream);
  if (error != cudaSuccess || kDirect) return error;
  return launch(round_kernel<T>, blocks_for(pixels_in * channels), kThreads, 0, stream, false, accumulator,
                static_cast<T*>(args.grad_input), pixels_in, channels, p.grad_input_pixel_stride);
}

}  // namespace

int64_t backward_plain_workspace(const Params& p) {
  if (p.dtype == DCNGEN_FLOAT32) return 0;
  return p.batch * p.height_in * p.width_in * p.groups * p.group_channels * static_cast<int64_t>(sizeof(float));
}

cudaError_t backward_plain(const BackwardArgs& args, cudaStream_t stream) {
  switch (args.p.dtype) {
    case DCNGEN_FLOAT32: return backward<float>(args, stream);
    case DCNGEN_FLOAT16: return backward<__half>(args, stream);
    default: return backward<__nv_bfloat16>(args, stream);
  }
}

}  // namespace dcngen
