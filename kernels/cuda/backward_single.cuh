// The tile of backward_tile.cuh for float: the same stencil, one pixel a lane, but products on the ordinary units (the
// tensor cores would round to tf32). In these a lane has a column of its unit, four pixels, and every fourth piece of
// four channels: what it reads from shared memory, which sets the pace, then serves four pixels. A tile holds 32
// channels a row (16 where D = 16), and D / 32 such parts one behind the other.
#pragma once

#include "backward_stencil.cuh"

namespace dcngen::backward {

template <int D, int UNITS_X, int UNITS_Y>
struct SingleShape {
  static constexpr int kWarps = UNITS_X * UNITS_Y, kThreads = 32 * kWarps;
  static constexpr int kWidth = 8 * UNITS_X, kHeight = 4 * UNITS_Y;
  static constexpr int kPitch = kWidth + 4, kRows = kHeight + 4, kSlots = kPitch * kRows;
  static constexpr int kRing = kSlots - kWidth * kHeight;
  static_assert(kPitch % 8 == 4, "the swizzles' address arithmetic counts on it");

  static constexpr int kRowChannels = D < 32 ? D : 32, kParts = D / kRowChannels;
  static constexpr int kPartBytes = kSlots * 4 * kRowChannels, kTileBytes = kParts * kPartBytes;
  static constexpr int kOffsetMaskBytes = kSlots * 128;  // then the weights, 100 bytes a pixel
  static constexpr int kInputStage = 32 * 4 * D, kOffsetMaskStage = 32 * 108;  // a warp
  static constexpr int kStages = kWarps * (kInputStage + kOffsetMaskStage);
  static constexpr int kRegionA = ((kTileBytes > kStages ? kTileBytes : kStages) + 1023) / 1024 * 1024;
  static constexpr int kShared = kRegionA + kTileBytes + kOffsetMaskBytes + 16 /* barrier */;
  // Blocks of a multiprocessor: by its shared memory, but leave a thread the whole register file's 255.
  static constexpr int kByMemory = 227 * 1024 / (kShared + 1024), kByRegisters = 256 / kThreads;
  static constexpr int kBlocks = kByMemory < kByRegisters ? kByMemory : kByRegisters;
};

// The 27 numbers of one (pixel, group) as they lie in memory.
struct SingleOffsetMask {
  float value[27];
  __device__ __forceinline__ float2 displacement(int k, float scale) const {
    return make_float2(fmaf(scale, value[2 * k], (scale - 1.f) * (k / 3 - 1)),
                       fmaf(scale, value[2 * k + 1], (scale - 1.f) * (k % 3 - 1)));
  }
};

// `skip`: how far behind the 16-byte boundary that the tile begins at.
__device__ __forceinline__ SingleOffsetMask load_single(uint32_t tile, int slot, int skip) {
  SingleOffsetMask om;
#pragma unroll
  for (int i = 0; i < 27; ++i) {
    const int at = skip + i;
    om.value[i] = __uint_as_float(window::load_shared(tile + tile_offset<64>(slot, at >> 2) + 4 * (at & 3)));
  }
  return om;
}

// As remove_far of the half types.
__device__ __forceinline__ unsigned remove_far(SingleOffsetMask& om, float scale) {
  unsigned far = 0;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    const float2 d = om.displacement(k, scale);
    if (!(fabsf(d.x) < 1.f && fabsf(d.y) < 1.f)) far |= 1u << k;
    if (!(fabsf(d.x) <= 1.f && fabsf(d.y) <= 1.f)) om.value[2 * k] = om.value[2 * k + 1] = om.value[18 + k] = 0.f;
  }
  return far;
}

__device__ __forceinline__ void store_weights(uint32_t to, const float (&w)[5][5]) {
#pragma unroll
  for (int i = 0; i < 25; ++i) window::store_shared(to + 4 * i, __float_as_uint(w[i / 5][i % 5]));
}

__device__ __forceinline__ void pixel_weights(const SingleOffsetMask& om, float scale, uint32_t to) {
  float w[5][5] = {};
#pragma unroll
  for (int k = 0; k < 9; ++k) add_tap(w, k / 3, k % 3, om.displacement(k, scale), om.value[18 + k]);
  store_weights(to, w);
}

__device__ __forceinline__ void pixel_gradients(const SingleOffsetMask& om, const float (&products)[5][5], int u_x,
                                                int u_y, float scale, uint32_t to, uint32_t weights) {
  float w[5][5] = {};
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    const int i = k / 3, j = k % 3;
    const float from_x = u_x + i == 0 ? __int_as_float(1) : 0.f, from_y = u_y + j == 0 ? __int_as_float(1) : 0.f;
    const float2 d = om.displacement(k, scale);
    const float m = om.value[18 + k], factor = scale * m;
    const TapGradient gradient = tap_gradient(products, i, j, d, from_x, from_y);
    window::store_shared(to + 8 * k, __float_as_uint(factor * gradient.x));
    window::store_shared(to + 8 * k + 4, __float_as_uint(factor * gradient.y));
    window::store_shared(to + 72 + 4 * k, __float_as_uint(gradient.mask));
    add_tap(w, i, j, d, m);
  }
  store_weights(weights, w);
}

constexpr int kColumn = 4;  // pixels of a unit's column

// Which part of its unit's products a lane has.
struct ColumnLane {
  int column, quarter;  // of the unit; of a row's pieces: quarter, quarter + 4, ...
  __device__ __forceinline__ explicit ColumnLane(int lane) : column(lane & 7), quarter(lane >> 3) {}
};

// Addresses in a part of a tile, for any piece of 16 bytes: the 8x5 pixels that the 5x5 windows of a column cover.
template <int ROW_CHANNELS, int PITCH>
struct ColumnWindow {
  uint32_t address[5];  // of the first row, piece 0
  // `slot`: the column's first pixel.
  __device__ __forceinline__ ColumnWindow(uint32_t part, int slot) {
#pragma unroll
    for (int c = 0; c < 5; ++c) address[c] = part + tile_offset<2 * ROW_CHANNELS>(slot - 2 * PITCH + c - 2, 0);
  }
  // One row down flips one bit of the swizzle, as in Window.
  __device__ __forceinline__ float4 load(int row, int column, int piece) const {
    const uint32_t flip = (piece << 4) ^ (row & 1 ? 2 * ROW_CHANNELS : 0);
    return window::load_shared16f((address[column] ^ flip) + row * PITCH * 4 * ROW_CHANNELS);
  }
};

// Sums of four lanes, each of them over a quarter of the channels of four pixels: a lane gets that of the pixel which
// has its quarter's number. Two exchanges, each of the half that the other lane wants.
__device__ __forceinline__ void sum_quarters(float (&mine)[5][5], const float (&sums)[kColumn][25], int quarter) {
  const bool lower = quarter & 2, odd = quarter & 1;
#pragma unroll
  for (int i = 0; i < 25; ++i) {
    float half[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const float send = lower ? sums[y][i] : sums[y + 2][i], keep = lower ? sums[y + 2][i] : sums[y][i];
      half[y] = keep + __shfl_xor_sync(window::kAllLanes, send, 16);
    }
    const float send = odd ? half[0] : half[1], keep = odd ? half[1] : half[0];
    mine[i / 5][i % 5] = keep + __shfl_xor_sync(window::kAllLanes, send, 8);
  }
}

// Each lane's 25 products of its pixel with the window of inputs around it. `slot`: the unit's first pixel.
template <typename Shape>
__device__ __forceinline__ void single_products(float (&products)[5][5], uint32_t input, uint32_t grad_output, int slot,
                                                int lane) {
  constexpr int kRowChannels = Shape::kRowChannels, kPitch = Shape::kPitch;
  const ColumnLane own(lane);
  float sums[kColumn][25] = {};
#pragma unroll 1
  for (int part = 0; part < Shape::kParts; ++part) {
    const ColumnWindow<kRowChannels, kPitch> x(input + part * Shape::kPartBytes, slot + own.column);
    const ColumnWindow<kRowChannels, kPitch> pixels(grad_output + part * Shape::kPartBytes, slot + own.column);
#pragma unroll 1
    for (int piece = own.quarter; piece < kRowChannels / 4; piece += 4) {
      float4 g[kColumn];
#pragma unroll
      for (int y = 0; y < kColumn; ++y) g[y] = pixels.load(y + 2, 2, piece);
#pragma unroll
      for (int row = 0; row < kColumn + 4; ++row) {
#pragma unroll
        for (int c = 0; c < 5; ++c) {
          const float4 v = x.load(row, c, piece);
#pragma unroll
          for (int y = 0; y < kColumn; ++y) {
            if (row < y || row > y + 4) continue;
            float& sum = sums[y][(row - y) * 5 + c];
            sum = fmaf(g[y].x, v.x, fmaf(g[y].y, v.y, fmaf(g[y].z, v.z, fmaf(g[y].w, v.w, sum))));
          }
        }
      }
    }
  }
  sum_quarters(products, sums, own.quarter);
}

// The input gradients of a column: their neighbours' grad_output by the weight each of them has for the pixel.
template <typename Shape>
__device__ __forceinline__ void single_input_gradient(uint32_t stage, uint32_t weights, uint32_t grad_output, int slot,
                                                      int lane) {
  constexpr int kRowChannels = Shape::kRowChannels, kPitch = Shape::kPitch;
  const ColumnLane own(lane);
  const int first = slot + own.column;
  float w[kColumn][25];
#pragma unroll
  for (int y = 0; y < kColumn; ++y) {
#pragma unroll
    for (int i = 0; i < 25; ++i) {  // neighbour (i / 5 - 2, i % 5 - 2) sees this pixel at the opposite place
      const int neighbour = first + (y + i / 5 - 2) * kPitch + i % 5 - 2;
      w[y][i] = __uint_as_float(window::load_shared(weights + 100 * neighbour + 4 * (24 - i)));
    }
  }
#pragma unroll 1
  for (int part = 0; part < Shape::kParts; ++part) {
    const ColumnWindow<kRowChannels, kPitch> g(grad_output + part * Shape::kPartBytes, first);
    const uint32_t to = stage + part * 32 * 4 * kRowChannels;
#pragma unroll 1
    for (int piece = own.quarter; piece < kRowChannels / 4; piece += 4) {
      float sum[kColumn][4] = {};
#pragma unroll
      for (int row = 0; row < kColumn + 4; ++row) {
#pragma unroll
        for (int c = 0; c < 5; ++c) {
          const float4 v = g.load(row, c, piece);
#pragma unroll
          for (int y = 0; y < kColumn; ++y) {
            if (row < y || row > y + 4) continue;
            const float weight = w[y][(row - y) * 5 + c];
            sum[y][0] = fmaf(weight, v.x, sum[y][0]), sum[y][1] = fmaf(weight, v.y, sum[y][1]);
            sum[y][2] = fmaf(weight, v.z, sum[y][2]), sum[y][3] = fmaf(weight, v.w, sum[y][3]);
          }
        }
      }
#pragma unroll
      for (int y = 0; y < kColumn; ++y) {
        window::store_shared16(to + tile_offset<2 * kRowChannels>(8 * y + own.column, piece), __float_as_uint(sum[y][0]),
                               __float_as_uint(sum[y][1]), __float_as_uint(sum[y][2]), __float_as_uint(sum[y][3]));
      }
    }
  }
}

// Writes the warp's staged gradients of offset_mask, a pixel at a time.
__device__ __forceinline__ void write_single(const TileArgs& args, uint32_t stage, int n, int group, int u_x, int u_y,
                                             int lane) {
  const int x0 = u_x - args.shift_x, y0 = u_y - args.shift_y;
#pragma unroll 4
  for (int pixel = 0; pixel < 32; ++pixel) {
    const int ow = x0 + (pixel & 7), oh = y0 + (pixel >> 3);
    if (ow < 0 || ow >= args.width_out || oh < 0 || oh >= args.height_out) continue;
    float* to = static_cast<float*>(args.grad_offset_mask) +
                ((int64_t{n} * args.height_out + oh) * args.width_out + ow) * args.grad_offset_mask_stride;
    if (lane < 27) to[27 * group + lane] = __uint_as_float(window::load_shared(stage + 108 * pixel + 4 * lane));
  }
}

template <int D, int UNITS_X, int UNITS_Y>
__global__ void __launch_bounds__(SingleShape<D, UNITS_X, UNITS_Y>::kThreads,
                                  SingleShape<D, UNITS_X, UNITS_Y>::kBlocks)
    single_tile_kernel(const __grid_constant__ Maps maps, const TileArgs args) {
#if __CUDA_ARCH__ >= 900
  using Shape = SingleShape<D, UNITS_X, UNITS_Y>;
  constexpr int kPitch = Shape::kPitch;
  extern __shared__ __align__(1024) uint8_t single_shared[];  // the swizzles of the copy engine go by address
  const uint32_t region_a = window::smem_address(single_shared);
  const uint32_t region_b = region_a + Shape::kRegionA, region_c = region_b + Shape::kTileBytes;
  const uint32_t barrier = region_c + Shape::kOffsetMaskBytes;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;

  uint32_t index = blockIdx.x;
  const int group = args.by_group.split(index), tile_x = args.by_tiles_x.split(index);
  const int tile_y = args.by_tiles_y.split(index), n = index;
  const int u_x0 = args.origin_x + tile_x * Shape::kWidth, u_y0 = args.origin_y + tile_y * Shape::kHeight;
  const int skip = (27 * group) & 3;
  if (thread == 0) {
    window::barrier_init(barrier);
    window::barrier_publish();
    window::barrier_expect(barrier, 2 * Shape::kTileBytes + Shape::kOffsetMaskBytes);
    const int x = u_x0 - 2, y = u_y0 - 2;
    for (int part = 0; part < Shape::kParts; ++part) {
      const int channel = group * D + part * Shape::kRowChannels, at = part * Shape::kPartBytes;
      window::load_box(region_a + at, maps.input, channel, x, y, n, barrier);
      window::load_box(region_b + at, maps.grad_output, channel, x - args.shift_x, y - args.shift_y, n, barrier);
    }
    window::load_box(region_c, maps.offset_mask, 27 * group - skip, x - args.shift_x, y - args.shift_y, n, barrier);
  }
  const int unit_x = 8 * (warp % UNITS_X), unit_y = 4 * (warp / UNITS_X);
  const int u_x = u_x0 + unit_x, u_y = u_y0 + unit_y;
  const bool active = u_x < args.end_x && u_y < args.end_y;
  const int x = unit_x + 2 + (lane & 7), y = unit_y + 2 + (lane >> 3), slot = y * kPitch + x;
  window::let_next_kernel_begin();
  __syncthreads();
  window::barrier_wait(barrier, 0);

  const int first_slot = (unit_y + 2) * kPitch + unit_x + 2;  // the unit's
  float products[5][5];
  if (active) single_products<Shape>(products, region_a, region_b, first_slot, lane);
  SingleOffsetMask om = load_single(region_c, slot, skip);
  constexpr int kPasses = (Shape::kRing + Shape::kThreads - 1) / Shape::kThreads;
  SingleOffsetMask ring[kPasses];
  int ring_slot[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    int rx, ry;
    const int number = thread + pass * Shape::kThreads;
    ring_pixel<Shape>(number < Shape::kRing ? number : 0, rx, ry);
    ring_slot[pass] = ry * kPitch + rx;
    ring[pass] = load_single(region_c, ring_slot[pass], skip);
  }
  __syncthreads();  // inputs and offsets have been read: results and weights may take their place

  const uint32_t stage = region_a + warp * Shape::kInputStage;
  const uint32_t offset_mask_stage = region_a + Shape::kWarps * Shape::kInputStage + warp * Shape::kOffsetMaskStage;
  const int px = u_x0 - 2 + x, py = u_y0 - 2 + y;  // the pixel's u
  const bool inside = px >= args.shift_x && px < args.width_out + args.shift_x && py >= args.shift_y &&
                      py < args.height_out + args.shift_y;
  unsigned far = remove_far(om, args.scale);
  if (!inside) far = 0;
  note_far_samples(args, static_cast<int64_t>(blockIdx.x) * Shape::kWarps + warp, far, lane);
  if (active) {
    pixel_gradients(om, products, px, py, args.scale, offset_mask_stage + 108 * lane, region_c + 100 * slot);
    __syncwarp();
    write_single(args, offset_mask_stage, n, group, u_x, u_y, lane);
  } else {
    pixel_weights(om, args.scale, region_c + 100 * slot);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (thread + pass * Shape::kThreads >= Shape::kRing) continue;
    remove_far(ring[pass], args.scale);
    pixel_weights(ring[pass], args.scale, region_c + 100 * ring_slot[pass]);
  }
  __syncthreads();
  if (active) {
    single_input_gradient<Shape>(stage, region_c, region_b, first_slot, lane);
    window::publish_to_copies();
    __syncwarp();
    const bool has_input = u_x >= 0 && u_y >= 0 && u_x < args.width_in && u_y < args.height_in;
    if (lane == 0 && has_input) {
      for (int part = 0; part < Shape::kParts; ++part) {
        window::store_box(maps.grad_input, stage + part * 32 * 4 * Shape::kRowChannels,
                          group * D + part * Shape::kRowChannels, u_x, u_y, n);
        window::store_commit();
      }
    }
    if (group == args.groups - 1) clear_padding<float>(args, n, u_x - args.shift_x, u_y - args.shift_y, lane);
    if (lane == 0) window::store_wait_read();
  }
#endif
}

}  // namespace dcngen::backward
