// Launches the window forward for fp16 and bf16: tensor maps, the rule of choice, the two kernels.
#pragma once

#include "forward_gather.cuh"
#include "forward_window.cuh"

namespace dcngen::window {

template <typename Shape>
cudaError_t encode_maps(ForwardWindow& window, const Params& p) {
  using Tile = typename Shape::Tile;
  const cudaError_t error =
      encode_box_map(window.input_map, input_pixels(p, window.input, window.channels, p.input_pixel_stride),
                     {kTileChannels, Tile::COLUMNS, Tile::ROWS, true});
  if (error != cudaSuccess) return error;
  return encode_box_map(
      window.taps_map, output_pixels(p, window.offset_mask, p.offset_mask_channels, p.offset_mask_pixel_stride),
      {Shape::Span::PITCH / 2, 4, 4, false});
}

template <typename T, typename Shape>
cudaError_t launch_window(ForwardWindow& window, const ForwardArgs& args, cudaStream_t stream) {
  if (Shape::BULK) {
    const cudaError_t error = encode_maps<Shape>(window, args.p);
    if (error != cudaSuccess) return error;
  }
  const int64_t blocks = window.blocks(args.p.batch);
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  return launch_with_memory<forward_window_kernel<T, Shape>>(blocks, Shape::THREADS, Shape::BYTES, stream, Shape::BULK,
                                                             window);
}

template <typename T, int CHANNELS, bool BULK>
cudaError_t launch_forward(const ForwardArgs& args, cudaStream_t stream) {
  using Shape = ForwardShape<CHANNELS, BULK>;
  ForwardWindow window(args, CHANNELS, kTileChannels);
  if (is_small(window.blocks(args.p.batch))) {
    return launch_window<T, ForwardShape<CHANNELS, BULK, true>>(window, args, stream);
  }
  const cudaError_t error = launch_window<T, Shape>(window, args, stream);
  if (error != cudaSuccess) return error;
  return launch_gather<T, GatherShape<T, CHANNELS, Shape::WARP_SLICES, 4>>(args, stream);
}

// The rule of choice: slices as wide as D allows. Tiles are 8x8 for every map: tiles of 8x16 move fewer bytes but were
// never faster.
template <typename T, bool BULK>
cudaError_t launch_chosen(const ForwardArgs& args, cudaStream_t stream) {
  const int channels = args.p.group_channels;
  if (channels % 64 == 0) return launch_forward<T, 64, BULK>(args, stream);
  if (channels % 32 == 0) return launch_forward<T, 32, BULK>(args, stream);
  if (channels % 16 == 0) return launch_forward<T, 16, BULK>(args, stream);
  return launch_forward<T, 8, BULK>(args, stream);
}

template <typename T>
cudaError_t forward_window_typed(const ForwardArgs& args, cudaStream_t stream) {
  return bulk_copies() ? launch_chosen<T, true>(args, stream) : launch_chosen<T, false>(args, stream);
}

// Instantiated in one file a dtype, so that they compile side by side.
extern template cudaError_t forward_window_typed<__half>(const ForwardArgs&, cudaStream_t);
extern template cudaError_t forward_window_typed<__nv_bfloat16>(const ForwardArgs&, cudaStream_t);
cudaError_t forward_window_fp32(const ForwardArgs& args, cudaStream_t stream);  // forward_window_fp32.cu

}  // namespace dcngen::window
