// The window forward's arguments, and who has what of a block's shared memory. See forward_window.cuh.
#pragma once

#include "copy_engine.cuh"
#include "forward_problem.cuh"
#include "window.cuh"

namespace dcngen::window {

struct ForwardWindow : ForwardTiles {
  CUtensorMap input_map, taps_map;  // of the copy engine; not set where it does not exist
  using ForwardTiles::ForwardTiles;
};

// BULK: tiles come by the copy engine of sm_90, else by the threads. ALONE: no gather kernel follows.
template <int CHANNELS_, bool BULK_, bool ALONE_ = false>
struct ForwardShape {
  static constexpr bool BULK = BULK_, ALONE = ALONE_;
  static constexpr int CHANNELS = CHANNELS_;  // of a slice
  static constexpr int TILE_H = TileGrid::SIDE, TILE_W = TILE_H;
  static constexpr int BLOCKS_X = TILE_W / 4;                   // 4x4 pixel blocks in a row of the tile
  static constexpr int PIXEL_BLOCKS = TILE_H / 4 * BLOCKS_X;
  static constexpr int SLICES = kTileChannels / CHANNELS;       // slices of a block
  static constexpr int TASKS = PIXEL_BLOCKS * SLICES / 2;       // a task is two units
  static constexpr int WARP_TASKS = SLICES >= 4 ? 2 : 1;
  static constexpr int WARPS = TASKS / WARP_TASKS;
  static constexpr int THREADS = WARPS * 32;
  static constexpr int WARP_PIXEL_BLOCKS = SLICES == 1 ? 2 : 1;  // a task's units differ in pixel block or in slice
  static constexpr int WARP_SLICES = SLICES == 1 ? 1 : 2 * WARP_TASKS;
  static constexpr int WARPS_PER_PIXEL_BLOCK = SLICES == 1 ? 1 : SLICES / WARP_SLICES;

  using Tile = PixelTile<TILE_H + 4, TILE_W + 4>;
  using Span = GroupSpan<WARP_SLICES>;
  // A warp reads its offsets and masks before it writes S, so the two share memory.
  static constexpr int TAPS_BYTES = 16 * Span::PITCH;  // of a pixel block
  static constexpr int STENCIL_BYTES = 2 * StencilMatrix::BYTES;
  static constexpr int RECORDS_AT =
      WARP_PIXEL_BLOCKS * TAPS_BYTES > STENCIL_BYTES ? WARP_PIXEL_BLOCKS * TAPS_BYTES : STENCIL_BYTES;
  static constexpr int WARP_BYTES = RECORDS_AT + WARP_TASKS * FarRecords::BYTES;
  static constexpr int BARRIERS_AT = Tile::BYTES + WARPS * WARP_BYTES;  // one of the input tile, one of each warp
  static constexpr int BYTES = BARRIERS_AT + (WARPS + 1) * 8;
  static_assert(BYTES <= kMostSharedBytes, "");
  static_assert(TAPS_BYTES % 128 == 0 && WARP_BYTES % 128 == 0, "the copy engine writes to multiples of 128 bytes");
  // Blocks a multiprocessor should hold: what shared memory allows, but with registers enough that nothing spills.
  static constexpr int REGISTERS = BULK || WARP_TASKS == 1 ? 96 : 128;
  static constexpr int BY_MEMORY = 227 * 1024 / (BYTES + 1024), BY_REGISTERS = 65536 / (REGISTERS * THREADS);
  static constexpr int MIN_BLOCKS = ALONE ? 1 : BY_MEMORY < BY_REGISTERS ? BY_MEMORY : BY_REGISTERS;

  static __device__ __forceinline__ int block_y(int block) { return block / BLOCKS_X * 4; }
  static __device__ __forceinline__ int block_x(int block) { return block % BLOCKS_X * 4; }

  static constexpr int PASS_CHANNELS = CHANNELS < 32 ? CHANNELS : 32;  // channels of one pass of products
  static constexpr int PASSES = CHANNELS / PASS_CHANNELS;
  static constexpr int PASS_CHUNKS = PASS_CHANNELS / 8;
  // The result is staged where the unit's S was: rows of PASS_CHUNKS chunks, permuted against bank conflicts.
  static __device__ __forceinline__ int staged_at(int m, int chunk) {
    return (m * PASS_CHUNKS + (chunk ^ (m * PASS_CHUNKS / 8 % PASS_CHUNKS))) * 16;
  }
};

}  // namespace dcngen::window
