// Launches the window forward with a product after it: tensor maps, the choice of shape.
#pragma once

#include "forward_launch.cuh"
#include "forward_projected.cuh"

namespace dcngen::window {

template <typename T, typename Shape>
cudaError_t launch_projected(const ProjectedArgs& args, cudaStream_t stream) {
  using Tile = typename Shape::Tile;
  const Params& p = args.p;
  const int64_t channels = int64_t{p.groups} * p.group_channels;
  ForwardProjected projected;
  projected.input = args.input;
  projected.bias = args.bias;
  projected.image_bytes = p.height_in * p.width_in * p.input_pixel_stride * 2;
  projected.scale = OffsetScale(p.offset_scale);
  projected.far = FarContext(p);
  projected.pad_h = p.pad_h;
  projected.pad_w = p.pad_w;
  const int64_t tiles_x = (p.width_out + 7) / 8, tiles_y = (p.height_out + 7) / 8, tiles = p.batch * tiles_x * tiles_y;
  projected.tiles_x = FastDivide(static_cast<uint32_t>(tiles_x));
  projected.tiles_y = FastDivide(static_cast<uint32_t>(tiles_y));
  projected.tiles = static_cast<int>(tiles);
  const BoxShape result{64, 4, 4, true};
  cudaError_t error = encode_box_map(projected.input_map, args.input, p.batch, p.height_in, p.width_in, channels,
                                     p.input_pixel_stride, {64, Tile::COLUMNS, Tile::ROWS, true});
  if (error != cudaSuccess) return error;
  error = encode_box_map(projected.taps_map, args.offset_mask, p.batch, p.height_out, p.width_out,
                         p.offset_mask_channels, p.offset_mask_pixel_stride, {Shape::TAPS_PITCH / 2, 4, 4, false});
  if (error != cudaSuccess) return error;
  error = encode_box_map(projected.weight_map, args.weight, 1, 1, channels, channels, channels,
                         {64, kProjectedChannels, 1, true});
  if (error != cudaSuccess) return error;
  error = encode_box_map(projected.projected_map, args.projected, p.batch, p.height_out, p.width_out, channels,
                         channels, result);
  if (error != cudaSuccess) return error;
  projected.output_map = projected.projected_map;
  if (Shape::OUTPUT) {
    error = encode_box_map(projected.output_map, args.output, p.batch, p.height_out, p.width_out, channels,
                           p.output_pixel_stride, result);
    if (error != cudaSuccess) return error;
  }

  const auto kernel = forward_projected_kernel<T, Shape>;
  static OncePerDevice prepared;
  error = prepared.run(
      [&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::BYTES); });
  if (error != cudaSuccess) return error;
  const int64_t most = device_limits().multiprocessors;
  const int64_t needed = (tiles + Shape::WARPGROUPS - 1) / Shape::WARPGROUPS;
  return launch(kernel, needed < most ? needed : most, Shape::THREADS, Shape::BYTES, stream, true, projected);
}

template <typename T>
cudaError_t forward_projected_typed(const ProjectedArgs& args, cudaStream_t stream) {
  const bool output = args.output != nullptr;
  if (args.p.group_channels == 64) {
    return (output ? launch_projected<T, ProjectedShape<64, true>> : launch_projected<T, ProjectedShape<64, false>>)(
        args, stream);
  }
  return (output ? launch_projected<T, ProjectedShape<32, true>> : launch_projected<T, ProjectedShape<32, false>>)(
      args, stream);
}

}  // namespace dcngen::window
