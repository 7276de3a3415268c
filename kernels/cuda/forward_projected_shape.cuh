// The projected forward's arguments, and who has what of a block's shared memory. See forward_projected.cuh.
#pragma once

#include "copy_engine.cuh"
#include "forward_problem.cuh"

namespace dcngen::window {

constexpr int kProjectedChannels = 128;  // of y and of the result

struct ForwardProjected {
  CUtensorMap input_map, taps_map, weight_map, output_map, projected_map;  // output_map only where y is written
  const void* input;
  const void* bias;  // may be null
  int64_t image_bytes;
  OffsetScale scale;
  FarContext far;
  TileGrid grid;
  int tiles;

  explicit ForwardProjected(const ProjectedArgs& args)
      : input(args.input), bias(args.bias),
        image_bytes(args.p.height_in * args.p.width_in * args.p.input_pixel_stride * value_bytes(args.p)),
        scale(args.p.offset_scale), far(args.p), grid(args.p), tiles(static_cast<int>(grid.count(args.p.batch))) {}
};

// CHANNELS of a group: 32 or 64. OUTPUT: y is written too.
template <int CHANNELS_, bool OUTPUT_>
struct ProjectedShape {
  static constexpr int CHANNELS = CHANNELS_;
  static constexpr bool OUTPUT = OUTPUT_;
  static constexpr int WARPGROUPS = 3, THREADS = WARPGROUPS * 128;
  static constexpr int TASKS = kProjectedChannels / 2 / CHANNELS;  // of a warp, two groups each
  static constexpr int PASS_CHUNKS = 4, PASSES = CHANNELS / 8 / PASS_CHUNKS;
  using Tile = PixelTile<12, 12>;

  // Offsets and masks of two groups from the 16-byte piece below on; an odd number of pieces.
  static constexpr int TAPS_PITCH = 144;
  static_assert(2 * (2 * kGroupValues + 7) <= TAPS_PITCH && TAPS_PITCH % 32 == 16, "");
  // Of a warpgroup. A "panel" is 64 channels. Staged are, by each warp, S (a unit in either half), then the results.
  static constexpr int PANEL_BYTES = 64 * 128, WARP_PANEL_BYTES = PANEL_BYTES / 4;
  static constexpr int STAGED_AT = 2 * Tile::BYTES, TAPS_AT = STAGED_AT + 2 * PANEL_BYTES;
  static constexpr int RECORDS_AT = TAPS_AT + 64 * TAPS_PITCH;
  static constexpr int WARPGROUP_BYTES = RECORDS_AT + 4 * FarRecords::BYTES;
  static_assert(StencilMatrix::BYTES <= WARP_PANEL_BYTES && WARPGROUP_BYTES % 1024 == 0, "");
  // Of a block: the weight (128 rows of 64 values a panel), the warpgroups, the bias, barriers.
  static constexpr int WEIGHT_PANEL_BYTES = kProjectedChannels * 128, WEIGHT_BYTES = 2 * WEIGHT_PANEL_BYTES;
  static constexpr int BIAS_AT = WEIGHT_BYTES + WARPGROUPS * WARPGROUP_BYTES;
  static constexpr int BARRIERS_AT = BIAS_AT + kProjectedChannels * 4;
  // Of the weight; a warpgroup's: its input, then each warp's offsets and masks.
  static constexpr int WARPGROUP_BARRIERS = 1 + 4;
  static constexpr int BYTES = BARRIERS_AT + (1 + WARPGROUPS * WARPGROUP_BARRIERS) * 8;
  static_assert(BYTES <= 227 * 1024, "");
};

}  // namespace dcngen::window
