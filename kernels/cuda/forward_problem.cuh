// What the forward's kernels need of a call, computed in one place. A "slice" is a run of consecutive channels of one
// group: a whole group, or a part of a group too wide for a kernel's tile. Slices are numbered by channel; a "chunk" is
// the slices of one block or warp.
#pragma once

#include "forward_far.cuh"

namespace dcngen::window {

inline int divide_up(int64_t n, int by) { return static_cast<int>((n + by - 1) / by); }

// Whether a window forward of so many blocks gathers many far samples itself instead of leaving them to a kernel of their
// own. Such a kernel is faster at that, but its launch costs the host 3 us and the device 1, whatever the samples.
inline bool is_small(int64_t blocks) { return blocks <= 4 * multiprocessors(); }

struct ForwardProblem {
  const void* input;
  const void* offset_mask;
  void* output;
  int height_out, width_out, channels, slices;
  int offset_mask_bytes;  // of a pixel
  FastDivide chunks, slices_per_group;

  ForwardProblem(const ForwardArgs& args, int slice_channels, int chunk_channels)
      : input(args.input), offset_mask(args.offset_mask), output(args.output),
        height_out(static_cast<int>(args.p.height_out)), width_out(static_cast<int>(args.p.width_out)),
        channels(args.p.groups * args.p.group_channels), slices(channels / slice_channels),
        offset_mask_bytes(args.p.offset_mask_channels * value_bytes(args.p)),
        chunks(divide_up(channels, chunk_channels)), slices_per_group(args.p.group_channels / slice_channels) {}
};

// The outputs in tiles of 8x8 pixels, numbered row by row, image by image.
struct TileGrid {
  static constexpr int SIDE = 8;
  FastDivide tiles_x, tiles_y;
  explicit TileGrid(const Params& p) : tiles_x(divide_up(p.width_out, SIDE)), tiles_y(divide_up(p.height_out, SIDE)) {}
  int64_t count(int64_t batch) const { return batch * tiles_x.divisor * tiles_y.divisor; }

  struct Place {
    int x, y, image;
  };
  __device__ __forceinline__ Place locate(uint32_t tile) const {
    Place place;
    place.x = static_cast<int>(tiles_x.split(tile)) * SIDE;
    place.y = static_cast<int>(tiles_y.split(tile)) * SIDE;
    place.image = static_cast<int>(tile);
    return place;
  }
};

// For the window kernels, of 16-bit values and of fp32: a block computes one chunk of one tile, chunks next to each
// other.
struct ForwardTiles : ForwardProblem {
  int64_t input_stride, offset_mask_stride, output_stride;  // values from pixel to pixel
  int height_in, width_in, pad_h, pad_w;
  OffsetScale scale;
  FarContext far;
  TileGrid grid;

  ForwardTiles(const ForwardArgs& args, int slice_channels, int chunk_channels)
      : ForwardProblem(args, slice_channels, chunk_channels), input_stride(args.p.input_pixel_stride),
        offset_mask_stride(args.p.offset_mask_pixel_stride), output_stride(args.p.output_pixel_stride),
        height_in(static_cast<int>(args.p.height_in)), width_in(static_cast<int>(args.p.width_in)),
        pad_h(args.p.pad_h), pad_w(args.p.pad_w), scale(args.p.offset_scale), far(args.p), grid(args.p) {}
  int64_t blocks(int64_t batch) const { return grid.count(batch) * chunks.divisor; }
};

// Where a block's tile lies, and a pixel of it in the output.
struct OutputTile {
  int chunk, x0, y0, image;
  __device__ __forceinline__ explicit OutputTile(const ForwardTiles& p) {
    uint32_t rest = blockIdx.x;
    chunk = static_cast<int>(p.chunks.split(rest));
    const TileGrid::Place place = p.grid.locate(rest);
    x0 = place.x, y0 = place.y, image = place.image;
  }
  // -1 outside the output.
  __device__ __forceinline__ int pixel(const ForwardTiles& p, int y, int x) const {
    return y0 + y < p.height_out && x0 + x < p.width_out ? (y0 + y) * p.width_out + x0 + x : -1;
  }
};

}  // namespace dcngen::window
