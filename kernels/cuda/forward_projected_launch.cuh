// Launches the window forward with a product after it: tensor maps, the choice of shape.
#pragma once

#include "forward_launch.cuh"
#include "forward_projected.cuh"

namespace dcngen::window {

template <typename Shape>
cudaError_t encode_maps(ForwardProjected& projected, const ProjectedArgs& args) {
  using Tile = typename Shape::Tile;
  const Params& p = args.p;
  constexpr int64_t kChannels = kProjectedChannels;
  constexpr Box kResult{64, 4, 4, true};
  cudaError_t error = encode_box_map(projected.input_map, input_pixels(p, args.input, kChannels, p.input_pixel_stride),
                                     {64, Tile::COLUMNS, Tile::ROWS, true});
  if (error != cudaSuccess) return error;
  error = encode_box_map(projected.taps_map,
                         output_pixels(p, args.offset_mask, p.offset_mask_channels, p.offset_mask_pixel_stride),
                         {Shape::TAPS_PITCH / 2, 4, 4, false});
  if (error != cudaSuccess) return error;
  // The weight's rows are the pixels of one row of a picture.
  error = encode_box_map(projected.weight_map, {args.weight, value_bytes(p), 1, 1, kChannels, kChannels, kChannels},
                         {64, kProjectedChannels, 1, true});
  if (error != cudaSuccess) return error;
  error = encode_box_map(projected.projected_map, output_pixels(p, args.projected, kChannels, kChannels), kResult);
  if (error != cudaSuccess || !Shape::OUTPUT) return error;
  return encode_box_map(projected.output_map, output_pixels(p, args.output, kChannels, p.output_pixel_stride), kResult);
}

template <typename T, typename Shape>
cudaError_t launch_projected(const ProjectedArgs& args, cudaStream_t stream) {
  ForwardProjected projected(args);
  const cudaError_t error = encode_maps<Shape>(projected, args);
  if (error != cudaSuccess) return error;
  const int64_t most = multiprocessors();
  const int64_t needed = divide_up(projected.tiles, Shape::WARPGROUPS);
  return launch_with_memory<forward_projected_kernel<T, Shape>>(needed < most ? needed : most, Shape::THREADS,
                                                                Shape::BYTES, stream, true, projected);
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
