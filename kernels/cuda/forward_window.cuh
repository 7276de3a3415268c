// The window forward: one block computes a tile of output pixels x 64 channels by dense products (see window.cuh).
//
// A warp owns 32 (pixel, group) pairs at a time, one a lane: two units of a 4x4 pixel block and one group. Each lane
// turns its offsets and masks into a row of its unit's matrix S while the input tile is still arriving; then the warp
// multiplies S by the window. Far samples are left out of S; where a warp has few of them their corners become further
// columns of its products, else its pixels are left to the gather kernel, which is launched after this one. In a small
// problem (ALONE) the warp gathers them itself: a second launch would cost more than that, on the host and the device.
#pragma once

#include "forward_blend.cuh"
#include "forward_window_shape.cuh"

namespace dcngen::window {

// sums[j][..] += S * window for the CHUNKS chunks of 8 channels from `chunk` on; `corner` is window pixel (0, 0).
template <typename Tile, typename T, int CHUNKS>
__device__ __forceinline__ void multiply(float (&sums)[CHUNKS][4], const uint32_t (&a)[4][4], uint32_t tile, int row,
                                         int column, int chunk, int lane) {
  constexpr int ROW_BYTES = Tile::COLUMNS * kTilePixelBytes;
  const int r = lane & 7, i = lane >> 3;
  if constexpr (CHUNKS == 1) {
    const uint32_t from = Tile::address(tile, row + i, column + r, chunk);
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, from + 2 * s * ROW_BYTES);
      Dtype<T>::mma(sums[0], a[s], b[0], b[1]);
      Dtype<T>::mma(sums[0], a[s + 1], b[2], b[3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < CHUNKS; j += 2) {
      const uint32_t from = Tile::address(tile, row + (i & 1), column + r, chunk + j + (i >> 1));
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        uint32_t b[4];
        load_matrices_transposed(b, from + 2 * s * ROW_BYTES);
        Dtype<T>::mma(sums[j], a[s], b[0], b[1]);
        Dtype<T>::mma(sums[j + 1], a[s], b[2], b[3]);
      }
    }
  }
}

// Rounds the sums of 16 pixels and writes them as 16-byte pieces, turned through shared memory (`staging`).
template <typename Shape, typename T, typename PixelAt>
__device__ __forceinline__ void store_result(const float (&sums)[Shape::PASS_CHUNKS][4], uint32_t staging, T* output,
                                             int64_t output_stride, int lane, PixelAt pixel_at) {
  constexpr int CHUNKS = Shape::PASS_CHUNKS;
  constexpr int MATRICES = CHUNKS < 4 ? 2 * CHUNKS : 4, COLUMNS = MATRICES / 2;  // of one store: 16 pixels x COLUMNS
  const int row = lane & 15, column = lane >> 4;
#pragma unroll
  for (int j = 0; j < CHUNKS; j += COLUMNS) {
    uint32_t r[MATRICES];
#pragma unroll
    for (int i = 0; i < MATRICES; ++i) {
      const float* pair = sums[j + i / 2] + i % 2 * 2;
      r[i] = Dtype<T>::pack(pair[0], pair[1]);
    }
    store_matrices(staging + Shape::staged_at(row, j + (COLUMNS == 2 ? column : 0)), r);
  }
  __syncwarp();
#pragma unroll
  for (int item = lane; item < 16 * CHUNKS; item += 32) {
    const int m = item / CHUNKS, chunk = item % CHUNKS, pixel = pixel_at(m);
    const uint4 value = load_shared16(staging + Shape::staged_at(m, chunk));
    if (pixel >= 0) store_global16(output + pixel * output_stride + chunk * 8, value);
  }
  __syncwarp();
}

// Begins the copies of the input tile (by the whole block) and of the warp's offsets and masks.
template <typename T, typename Shape, typename Image, typename ImageTaps>
__device__ __forceinline__ void begin_copies(const ForwardWindow& p, const OutputTile& at, uint32_t tile, uint32_t own,
                                             int thread, Image image, ImageTaps image_taps, int first_block,
                                             int first_value) {
  using Tile = typename Shape::Tile;
  const int lane = thread & 31, x0 = at.x0 - p.pad_w - 1, y0 = at.y0 - p.pad_h - 1;
  if constexpr (Shape::BULK) {
    const uint32_t barriers = tile + Shape::BARRIERS_AT, of_warp = barriers + 8 + (thread >> 5) * 8;
    if (lane == 0) {
      barrier_init(of_warp);
      if (thread == 0) barrier_init(barriers);
      barrier_publish();
      barrier_expect(of_warp, Shape::WARP_PIXEL_BLOCKS * Shape::TAPS_BYTES);
#pragma unroll
      for (int i = 0; i < Shape::WARP_PIXEL_BLOCKS; ++i) {
        load_box(own + i * Shape::TAPS_BYTES, p.taps_map, first_value, at.x0 + Shape::block_x(first_block + i),
                 at.y0 + Shape::block_y(first_block + i), at.image, of_warp);
      }
      if (thread == 0) {
        barrier_expect(barriers, Tile::BYTES);
        load_box(tile, p.input_map, at.chunk * kTileChannels, x0, y0, at.image, barriers);
      }
    }
    __syncthreads();
  } else {
    copy_offset_mask<typename Shape::Span, 32>(
        own, reinterpret_cast<const char*>(image_taps()), p.offset_mask_stride * 2, first_value * 2,
        p.offset_mask_bytes, Shape::WARP_PIXEL_BLOCKS * 16, lane, [&](int q) {
          const int block = first_block + (q >> 4);
          return at.pixel(p, Shape::block_y(block) + ((q >> 2) & 3), Shape::block_x(block) + (q & 3));
        });
    copy_commit();
    Tile::template copy<Shape::THREADS>(tile, image(), p.height_in, p.width_in, p.input_stride, y0, x0,
                                        at.chunk * kTileChannels, p.channels, thread);
    copy_commit();
  }
}
template <typename Shape>
__device__ __forceinline__ void wait_for_taps(uint32_t tile, int warp) {
  if constexpr (Shape::BULK) {
    barrier_wait(tile + Shape::BARRIERS_AT + 8 + warp * 8, 0);
  } else {
    copy_wait<1>();
    __syncwarp();
  }
}
template <typename Shape>
__device__ __forceinline__ void wait_for_input(uint32_t tile) {
  if constexpr (Shape::BULK) {
    barrier_wait(tile + Shape::BARRIERS_AT, 0);
  } else {
    copy_wait<0>();
    __syncthreads();
  }
}

// All that a warp computes, gathered from memory: for blocks that no gather kernel follows. `own` has the warp's offsets
// and masks, from value `first_value` of a pixel on.
template <typename Shape, typename T>
__device__ __forceinline__ void gather_warp(const ForwardWindow& p, const OutputTile& at, const T* image, T* output,
                                            uint32_t own, int first_block, int first_slice, int first_value,
                                            int lane) {
  constexpr int PIECES = Shape::CHANNELS / 8;  // of a slice, 16 bytes each
#pragma unroll 1
  for (int item = lane; item < 2 * Shape::WARP_TASKS * 16 * PIECES; item += 32) {
    const int unit = item / (16 * PIECES), m = item / PIECES % 16;
    const int unit_block = Shape::SLICES == 1 ? unit : 0, slice = first_slice + unit - unit_block;
    const int y = Shape::block_y(first_block + unit_block) + (m >> 2);
    const int x = Shape::block_x(first_block + unit_block) + (m & 3), pixel = at.pixel(p, y, x);
    if (slice >= p.slices || pixel < 0) continue;
    const int channel = slice * Shape::CHANNELS + item % PIECES * 8;
    const int value = static_cast<int>(p.slices_per_group.divide(slice)) * kGroupValues - first_value;
    const uint32_t values = own + (unit_block * 16 + m) * Shape::Span::PITCH + value * 2;
    store_global16(output + pixel * p.output_stride + channel,
                   gather_samples<T>(p.far, reinterpret_cast<const uint4*>(image + channel), values, at.x0 + x,
                                     at.y0 + y));
  }
}

template <typename T, typename Shape>
__device__ __forceinline__ void forward_tile(const ForwardWindow& p) {
  extern __shared__ __align__(1024) unsigned char window_memory[];
  using Tile = typename Shape::Tile;
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const uint32_t tile = smem_address(window_memory), own = tile + Tile::BYTES + warp * Shape::WARP_BYTES;
  const OutputTile at(p);
  let_next_kernel_begin();
  wait_for_previous_kernel();

  // Computed where needed: only copies by threads and far samples use them.
  auto image = [&] {
    return static_cast<const T*>(p.input) + int64_t{at.image} * p.height_in * p.width_in * p.input_stride;
  };
  auto first_output = [&] { return int64_t{at.image} * p.height_out * p.width_out; };
  auto image_taps = [&] { return static_cast<const T*>(p.offset_mask) + first_output() * p.offset_mask_stride; };
  T* output = static_cast<T*>(p.output) + first_output() * p.output_stride;

  // The warp's pixel blocks and slices.
  const int first_block = warp / Shape::WARPS_PER_PIXEL_BLOCK * Shape::WARP_PIXEL_BLOCKS;
  const int tile_slice = warp % Shape::WARPS_PER_PIXEL_BLOCK * Shape::WARP_SLICES;  // its first, within the tile
  const int first_slice = at.chunk * Shape::SLICES + tile_slice;
  auto pixel_of = [&](int block, int m) {
    return at.pixel(p, Shape::block_y(block) + (m >> 2), Shape::block_x(block) + (m & 3));
  };
  // A lane's (pixel, group) of a task is row m of a unit; unit u is pixel block first_block + u or slice 2 * task + u.
  const int m = lane & 15, unit_of_lane = lane >> 4;
  const int lane_block = first_block + (Shape::SLICES == 1 ? unit_of_lane : 0);
  auto lane_slice = [&](int task) { return first_slice + (Shape::SLICES == 1 ? 0 : 2 * task + unit_of_lane); };

  const int first_value = static_cast<int>(p.slices_per_group.divide(first_slice)) * kGroupValues & ~7;
  begin_copies<T, Shape>(p, at, tile, own, thread, image, image_taps, first_block, first_value);
  wait_for_taps<Shape>(tile, warp);
  // The 27 values of row 0 of the lane's unit in shared memory.
  auto unit_values = [&](int task) {
    const int group = static_cast<int>(p.slices_per_group.divide(lane_slice(task)));
    return own + (Shape::SLICES == 1 ? unit_of_lane * 16 : 0) * Shape::Span::PITCH +
           (group * kGroupValues - first_value) * 2;
  };
  Taps all_taps[Shape::WARP_TASKS];
#pragma unroll
  for (int task = 0; task < Shape::WARP_TASKS; ++task) {
    all_taps[task] = load_taps(unit_values(task) + m * Shape::Span::PITCH);
  }

  // Far samples of the lane, and of each unit (16 bits a unit).
  unsigned far[Shape::WARP_TASKS], unit_far[Shape::WARP_TASKS];
  bool many_far = false;
#pragma unroll
  for (int task = 0; task < Shape::WARP_TASKS; ++task) {
    far[task] = unit_far[task] = 0;
    if (!__any_sync(kAllLanes, may_be_far<T>(all_taps[task], p.scale))) continue;
    far[task] = far_taps<T>(all_taps[task], p.scale);
    const bool exists = lane_slice(task) < p.slices && pixel_of(lane_block, m) >= 0;
    if (!exists) far[task] = 0;
    unit_far[task] = __reduce_add_sync(kAllLanes, __popc(far[task]) << 16 * unit_of_lane);
    // By the pixels that exist: where the map's border leaves few, the gather kernel has as much less to do.
    const unsigned pixels = __reduce_add_sync(kAllLanes, exists ? 1u << 16 * unit_of_lane : 0);
    many_far |= (unit_far[task] & 0xffff) * 16 > kMostFar * (pixels & 0xffff) ||
                (unit_far[task] >> 16) * 16 > kMostFar * (pixels >> 16);
  }
  if (many_far) {
    if constexpr (Shape::ALONE) {
      gather_warp<Shape>(p, at, image(), output, own, first_block, first_slice, first_value, lane);
    } else if (lane < Shape::WARP_PIXEL_BLOCKS && first_slice < p.slices) {
      const int pixel = pixel_of(first_block + lane, 0);
      T* to = output + pixel * p.output_stride + first_slice * Shape::CHANNELS;
      if (pixel >= 0) *reinterpret_cast<typename LeftMark<T>::Word*>(to) = LeftMark<T>::VALUE;
    }
    wait_for_input<Shape>(tile);  // the block must not end while it arrives
    return;
  }

#pragma unroll
  for (int task = 0; task < Shape::WARP_TASKS; ++task) {
    if (unit_far[task] == 0) continue;
    const uint32_t values = unit_values(task);
    FarRecords::store<T>(own + Shape::RECORDS_AT + task * FarRecords::BYTES, far[task],
                         static_cast<int>(unit_far[task] >> 16 * unit_of_lane & 0xffff), lane, [&](int row, int k) {
                           return corners_of_tap<T>(p.far, at.x0 + Shape::block_x(lane_block) + (row & 3),
                                                    at.y0 + Shape::block_y(lane_block) + (row >> 2), k,
                                                    values + row * Shape::Span::PITCH);
                         });
  }
  __syncwarp();

#pragma unroll
  for (int task = 0; task < Shape::WARP_TASKS; ++task) {
    const Taps& taps = all_taps[task];
    const bool any_far = unit_far[task] != 0;
    {
      float stencil[5][5];
      if (any_far) {
        stencil_weights<T, true>(stencil, taps, p.scale, far[task]);
      } else {
        stencil_weights<T>(stencil, taps, p.scale);
      }
      StencilMatrix::store_row<T>(own + unit_of_lane * StencilMatrix::BYTES, m, stencil);
    }
    if (task == 0) wait_for_input<Shape>(tile);  // also where unused: the block must not end while it arrives
    __syncwarp();

#pragma unroll 1
    for (int unit = 0; unit < 2; ++unit) {
      const int block = first_block + (Shape::SLICES == 1 ? unit : 0);
      const int slice_in_warp = Shape::SLICES == 1 ? 0 : 2 * task + unit;
      const uint32_t matrix = own + unit * StencilMatrix::BYTES;
      const uint32_t records = own + Shape::RECORDS_AT + task * FarRecords::BYTES + unit * FarRecords::UNIT_BYTES;
      const int slice = first_slice + slice_in_warp;
      if (slice >= p.slices) break;
      const int num_far = static_cast<int>(unit_far[task] >> 16 * unit & 0xffff);
      uint32_t a[4][4];
      StencilMatrix::load(a, matrix, lane);
      __syncwarp();
      const int chunk = (tile_slice + slice_in_warp) * (Shape::CHANNELS / 8);
#pragma unroll
      for (int pass = 0; pass < Shape::PASSES; ++pass) {
        const int first_channel = slice * Shape::CHANNELS + pass * Shape::PASS_CHANNELS;
        float sums[Shape::PASS_CHUNKS][4] = {};
        auto begin_far = [&](int step) {
          begin_far_step<Shape::PASS_CHUNKS>(p.far, records, num_far, step, image() + first_channel, matrix, lane);
        };
        if (num_far > 0) begin_far(0);
        multiply<Tile, T>(sums, a, tile, Shape::block_y(block), Shape::block_x(block),
                          chunk + pass * Shape::PASS_CHUNKS, lane);
        for (int step = 0; step * 4 < num_far; ++step) {
          if (step > 0) begin_far(step);
          finish_far_step<T>(sums, records, num_far, step, matrix, lane);
        }
        store_result<Shape, T>(sums, matrix, output + first_channel, p.output_stride, lane,
                               [&](int pixel) { return pixel_of(block, pixel); });
      }
    }
    __syncwarp();
  }
}

// Each architecture compiles the body for its own way of copying; the launch picks the kernel that has one.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, Shape::MIN_BLOCKS)
    forward_window_kernel(const __grid_constant__ ForwardWindow p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (Shape::BULK) forward_tile<T, Shape>(p);
#else
  if constexpr (!Shape::BULK) forward_tile<T, Shape>(p);
#endif
}

}  // namespace dcngen::window
