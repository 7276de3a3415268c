// The plain forward: a gather, one thread per output pixel and vector of channels.
#include "plain.cuh"

namespace dcngen {
namespace {

template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 4) forward_plain_kernel(const ForwardArgs args) {
  const Params& p = args.p;
  const int channels = p.groups * p.group_channels, vectors = channels / VEC, count = taps(p);
  const int64_t total = p.batch * p.height_out * p.width_out * vectors;
  const T* input = static_cast<const T*>(args.input);
  const T* offset_mask = static_cast<const T*>(args.offset_mask);
  T* output = static_cast<T*>(args.output);
  for (int64_t id = blockIdx.x * int64_t{kThreads} + threadIdx.x; id < total; id += int64_t{gridDim.x} * kThreads) {
    const int64_t pixel = id / vectors;
    const int channel = static_cast<int>(id - pixel * vectors) * VEC;
    const OutputPixel at = locate(p, pixel);
    const T* offsets = offset_mask + pixel * p.offset_mask_pixel_stride + 3 * count * (channel / p.group_channels);
    const T* masks = offsets + 2 * count;
    const T* image = input + at.image * p.input_pixel_stride + channel;
    const MaskRule rule = mask_rule(p, masks, count);
    float sum[VEC] = {};
    int k = 0;
    for (int i = 0; i < p.kernel_w; ++i) {
      for (int j = 0; j < p.kernel_h; ++j) {
        if (is_removed(p, i, j)) continue;
        const Place place = place_of(p, i, j, at.oh, at.ow, to_float(offsets[2 * k]), to_float(offsets[2 * k + 1]));
        if (place.counts) {
          const float weight = rule(to_float(masks[k]));
          float w[4];
          corner_weights(place, w);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            if (!place.inside[q]) continue;
            float value[VEC];
            load_vector<VEC>(image + place.corner[q] * p.input_pixel_stride, value);
            const float f = weight * w[q];
#pragma unroll
            for (int c = 0; c < VEC; ++c) sum[c] = fmaf(f, value[c], sum[c]);
          }
        }
        ++k;
      }
    }
    store_vector<VEC>(output + pixel * p.output_pixel_stride + channel, sum);
  }
}

template <typename T, int VEC>
cudaError_t launch_forward(const ForwardArgs& args, cudaStream_t stream) {
  const Params& p = args.p;
  const int64_t work = p.batch * p.height_out * p.width_out * (p.groups * p.group_channels / VEC);
  return launch(forward_plain_kernel<T, VEC>, blocks_for(work), kThreads, 0, stream, false, args);
}

template <typename T>
cudaError_t dispatch(const ForwardArgs& args, cudaStream_t stream) {
  const void* pointers[] = {args.input, args.output};
  const int64_t strides[] = {args.p.input_pixel_stride, args.p.output_pixel_stride};
  switch (vector_width<T>(args.p, pointers, strides, 2)) {
    case 8: return launch_forward<T, (sizeof(T) == 2 ? 8 : 4)>(args, stream);
    case 4: return launch_forward<T, 4>(args, stream);
    case 2: return launch_forward<T, 2>(args, stream);
    default: return launch_forward<T, 1>(args, stream);
  }
}

}  // namespace

cudaError_t forward_plain(const ForwardArgs& args, cudaStream_t stream) {
  switch (args.p.dtype) {
    case DCNGEN_FLOAT32: return dispatch<float>(args, stream);
    case DCNGEN_FLOAT16: return dispatch<__half>(args, stream);
    default: return dispatch<__nv_bfloat16>(args, stream);
  }
}

}  // namespace dcngen
