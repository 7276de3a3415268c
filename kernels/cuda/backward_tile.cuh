// The window backward of one tile: offset and mask gradients and the owned input gradient, on tensor cores.
//
// Frame: u = input coordinates. Output pixel p has its middle tap at u = p + shift, shift = 1 - pad. A tap whose
// displacement d from its own integer place satisfies |d| < 1 in x and y ("near") reads only the 3x3 pixels around
// that place, so the nine taps together are a 5x5 stencil around p with weights
//   W[j + 1 + b][i + 1 + a] += m * hat_b(dy) * hat_a(dx),  hat_-1 = max(-d, 0), hat_0 = 1 - |d|, hat_1 = max(d, 0)
// that sit at fixed register indices. A unit is 8x4 pixels, one warp, one pixel a lane: two 4x4 blocks.
//   T(16 x 64) = grad_output(block) * input(8x8 window)^T gives each pixel its 25 products with the window;
//     a tap's three gradients are differences of 9 of them.
//   grad_input(16 x D) = S(16 x 64) * grad_output(8x8 window), S[q, p] = W_p[q - p], q in the block.
// Every p stores its 25 weights once, as the 6 rows x 8 columns of the 4-aligned frame they fall in, in pieces of
// 2 rows x 4 columns (16 bytes): a piece is one row of a transposed 8x8 fragment of S for the block that covers it.
#pragma once

#include "backward_products.cuh"
#include "backward_sums.cuh"

namespace dcngen::backward {

template <int D, int UNITS_X, int UNITS_Y>
struct TileShape {
  static constexpr int kWarps = UNITS_X * UNITS_Y, kThreads = 32 * kWarps;
  static constexpr int kWidth = 8 * UNITS_X, kHeight = 4 * UNITS_Y;
  static constexpr int kPitch = kWidth + 4, kRows = kHeight + 4, kSlots = kPitch * kRows;  // with the halo of 2
  static constexpr int kRing = kSlots - kWidth * kHeight;
  static_assert(kPitch % 8 == 4, "the swizzles' address arithmetic counts on it");

  static constexpr int round_up(int bytes) { return (bytes + 1023) / 1024 * 1024; }
  static constexpr int most(int a, int b) { return a > b ? a : b; }
  // Region A: the input tile, then staging of both results. B: grad_output. C: offset_mask and, behind it, T of one
  // block a warp, then the weights W of all pixels.
  static constexpr int kPixelBytes = 2 * D, kTileBytes = kSlots * kPixelBytes;
  static constexpr int kOffsetMaskBytes = kSlots * 64, kProducts = 672 * 4, kWeights = kSlots * 96;
  static constexpr int kInputStage = 32 * kPixelBytes, kOffsetMaskStage = 32 * 56;  // a warp
  static constexpr int kRegionA = round_up(most(kTileBytes, kWarps * (kInputStage + kOffsetMaskStage)));
  static constexpr int kRegionB = round_up(kTileBytes);
  static constexpr int kRegionC = most(kWeights, kOffsetMaskBytes + kWarps * kProducts);
  // The barrier stands behind grad_output where rounding leaves room: at D = 16 a fifth block then fits.
  static constexpr int kEnd = kRegionA + kRegionB + kRegionC;
  static constexpr int kBarrier = kRegionB - kTileBytes >= 16 ? kRegionA + kTileBytes : kEnd;
  static constexpr int kShared = kBarrier < kEnd ? kEnd : kEnd + 16;
  // Five blocks leave a thread 96 registers, which is enough if the tails of offset_mask are fetched late.
  static constexpr bool kFive = D == 16 && kThreads == 128;
  // Blocks of a multiprocessor: by its shared memory, of which a block has 1 KB more, in units of 128 bytes, but leave a
  // thread at least 128 registers.
  static constexpr int kByMemory = 228 * 1024 / ((kShared + 127) / 128 * 128 + 1024);
  static constexpr int kByRegisters = kFive ? 5 : 512 / kThreads;
  static constexpr int kBlocks = kByMemory < kByRegisters ? kByMemory : kByRegisters;
};

// Writes the warp's staged gradients of offset_mask, 27 numbers a pixel: half a warp a pixel, a word a lane. An odd
// group begins in the middle of a word of memory; the one number that shares its word with another group goes alone.
// Where SUMS, the unit's go to `row_of_sums`. (Pixels outside the output had a grad_output of 0: so are theirs.)
template <typename T, int D, bool SUMS>
__device__ __forceinline__ void write_offset_mask(const TileArgs& args, uint32_t stage, int n, int group, int u_x,
                                                  int u_y, int lane, float* row_of_sums, bool far) {
  const int word = lane & 15, odd = group & 1, x0 = u_x - args.shift_x, y0 = u_y - args.shift_y;
  const bool alone = word == (odd ? 0 : 13), pair = word <= 13 && !alone;
  const int64_t stride = args.grad_offset_mask_stride, row_stride = stride * args.width_out;
  uint16_t* row = static_cast<uint16_t*>(args.grad_offset_mask) +
                  (int64_t{n} * args.height_out + y0) * row_stride + (x0 + (lane >> 4)) * stride + 27 * group;
  // The last two lanes of a half have no word. They read a neighbour's, since behind a pixel may be another warp's stage.
  const uint32_t from = stage + 56 * (lane >> 4) + 4 * (word < 14 ? word : 13);
  WordSums<T> sums(lane);
#pragma unroll
  for (int y = 0; y < 4; ++y, row += row_stride) {
    const bool row_inside = y0 + y >= 0 && y0 + y < args.height_out;
    if (!SUMS && !row_inside) continue;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = window::load_shared(from + 56 * (8 * y + 2 * i));
    if (SUMS) sums.add(words);
    if (!row_inside) continue;
    uint16_t* to = row + 2 * word - odd;
#pragma unroll
    for (int x = 0; x < 8; x += 2, to += 2 * stride) {
      const uint32_t at = from + 56 * (8 * y + x), v = words[x / 2];
      const uint32_t before = window::load_shared(word == 0 ? at : at - 4);
      const uint32_t both = odd ? __funnelshift_l(before, v, 16) : v;
      const bool inside = static_cast<unsigned>(x0 + x + (lane >> 4)) < static_cast<unsigned>(args.width_out);
      if (pair && inside) *reinterpret_cast<uint32_t*>(to) = both;
      if (alone && inside) to[odd] = static_cast<uint16_t>(v);
    }
  }
  if (SUMS) store_number_sums<D>(row_of_sums, sums, far, lane);
}

template <typename T, int D, int UNITS_X, int UNITS_Y, bool SUMS>
__global__ void __launch_bounds__(TileShape<D, UNITS_X, UNITS_Y>::kThreads, TileShape<D, UNITS_X, UNITS_Y>::kBlocks)
    tile_kernel(const __grid_constant__ Maps maps, const TileArgs args) {
#if __CUDA_ARCH__ >= 900
  using Shape = TileShape<D, UNITS_X, UNITS_Y>;
  constexpr int kPitch = Shape::kPitch;
  extern __shared__ __align__(1024) uint8_t tile_shared[];  // the swizzles of the copy engine go by address
  const uint32_t region_a = window::smem_address(tile_shared);
  const uint32_t region_b = region_a + Shape::kRegionA, region_c = region_b + Shape::kRegionB;
  const uint32_t barrier = region_a + Shape::kBarrier;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;

  uint32_t index = blockIdx.x;
  const int group = args.by_group.split(index), tile_x = args.by_tiles_x.split(index);
  const int tile_y = args.by_tiles_y.split(index), n = index;
  const int u_x0 = args.origin_x + tile_x * Shape::kWidth, u_y0 = args.origin_y + tile_y * Shape::kHeight;

  const GroupNumbers numbers(group);
  if (thread == 0) {
    window::barrier_init(barrier);
    window::barrier_publish();
    window::barrier_expect(barrier, 2 * Shape::kTileBytes + Shape::kOffsetMaskBytes);
    const int x = u_x0 - 2, y = u_y0 - 2;
    window::load_box(region_a, maps.input, group * D, x, y, n, barrier);
    window::load_box(region_b, maps.grad_output, group * D, x - args.shift_x, y - args.shift_y, n, barrier);
    window::load_box(region_c, maps.offset_mask, numbers.first, x - args.shift_x, y - args.shift_y, n, barrier);
    if (SUMS && blockIdx.x < args.groups) args.finished_sums[blockIdx.x] = 0;
  }
  const int unit_x = 8 * (warp % UNITS_X), unit_y = 4 * (warp / UNITS_X);  // in the tile; the window begins there too
  const int u_x = u_x0 + unit_x, u_y = u_y0 + unit_y;
  const bool active = u_x < args.end_x && u_y < args.end_y;
  const int window_slot = unit_y * kPitch + unit_x;
  const int x = unit_x + 2 + (lane & 7), y = unit_y + 2 + (lane >> 3), slot = y * kPitch + x;
  const int ow0 = u_x0 - 2 - args.shift_x, oh0 = u_y0 - 2 - args.shift_y;  // output pixel of slot 0
  constexpr int kPasses = (Shape::kRing + Shape::kThreads - 1) / Shape::kThreads;
  uint32_t tail, ring_tail[kPasses];
  const auto fetch_tails = [&] {
    tail = numbers.tail(args, n, ow0 + x, oh0 + y);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      int rx, ry;
      const int number = thread + pass * Shape::kThreads;
      ring_pixel<Shape>(number < Shape::kRing ? number : 0, rx, ry);
      ring_tail[pass] = numbers.tail(args, n, ow0 + rx, oh0 + ry);
    }
  };
  if (!Shape::kFive) fetch_tails();
  window::let_next_kernel_begin();
  __syncthreads();
  window::barrier_wait(barrier, 0);

  float products[5][5];
  if (active) {
    pixel_products<T, D, kPitch>(products, region_a, region_b,
                                 region_c + Shape::kOffsetMaskBytes + warp * Shape::kProducts, window_slot, lane);
  }
  if (Shape::kFive) fetch_tails();
  OffsetMask om = numbers.load(region_c, slot, tail);
  OffsetMask ring[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    int rx, ry;
    const int number = thread + pass * Shape::kThreads;
    ring_pixel<Shape>(number < Shape::kRing ? number : 0, rx, ry);
    ring[pass] = numbers.load(region_c, ry * kPitch + rx, ring_tail[pass]);
  }
  __syncthreads();  // the input tile, the offsets and T have been read: results and weights may take their place

  const uint32_t stage = region_a + warp * Shape::kInputStage;
  const uint32_t offset_mask_stage =
      region_a + Shape::kWarps * Shape::kInputStage + warp * Shape::kOffsetMaskStage;
  const uint32_t unit = blockIdx.x * Shape::kWarps + warp;  // there are fewer than 2^30 blocks
  const auto row_of_sums = [&] { return SUMS ? args.sums + int64_t{unit} * kSumRow<D> : nullptr; };
  float far_share = 0.f;
  if (active) {
    const int px = u_x0 - 2 + x, py = u_y0 - 2 + y;  // the pixel's u
    const bool inside = px >= args.shift_x && px < args.width_out + args.shift_x && py >= args.shift_y &&
                        py < args.height_out + args.shift_y;
    unsigned far = remove_far<T>(om, args.scale, args.reach, [&](int k, float2 d, float mask) {
      if (!SUMS) return;
      const float on_map = share_on_map(px + k / 3 - 1 + d.x, py + k % 3 - 1 + d.y, args.width_in, args.height_in);
      if (on_map > 0.f) far_share = fmaf(mask, on_map, far_share);
    });
    if (!inside) far = 0, far_share = 0.f;
    const bool some_far = note_far_samples(args, unit, far, lane);
    pixel_gradients<T>(om, products, px, py, args.scale, offset_mask_stage + 56 * lane,
                       WeightFrame(region_c + 96 * slot, x, y));
    __syncwarp();
    write_offset_mask<T, D, SUMS>(args, offset_mask_stage, n, group, u_x, u_y, lane, row_of_sums(), some_far);
  } else {
    if (lane == 0) args.far_units[unit] = 0;
    if (SUMS) store_no_sums<D>(row_of_sums(), lane);
    store_no_weights(region_c + 96 * slot);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    int rx = 0, ry = 0;
    const int number = thread + pass * Shape::kThreads;
    if (number < Shape::kRing) ring_pixel<Shape>(number, rx, ry);
    const int px = u_x0 - 2 + rx - args.shift_x, py = u_y0 - 2 + ry - args.shift_y;
    const bool inside = px >= 0 && px < args.width_out && py >= 0 && py < args.height_out;
    const bool some_inside = __any_sync(window::kAllLanes, inside && number < Shape::kRing);
    const uint32_t to = region_c + 96 * (ry * kPitch + rx);
    if (number >= Shape::kRing) continue;
    if (some_inside) {
      remove_far<T>(ring[pass], args.scale, args.reach, [](int, float2, float) {});
      pixel_weights<T>(ring[pass], args.scale, WeightFrame(to, rx, ry));
    } else {
      store_no_weights(to);
    }
  }
  __syncthreads();
  if (active) {
    multiply_weights<T, D, kPitch>(stage, region_c, region_b, window_slot, lane);
    window::publish_to_copies();
    __syncwarp();
    const bool has_input = u_x >= 0 && u_y >= 0 && u_x < args.width_in && u_y < args.height_in;
    if (lane == 0 && has_input) {
      window::store_box(maps.grad_input, stage, group * D, u_x, u_y, n);
      window::store_commit();
    }
    if (SUMS) {
      sum_input_gradient<T, D, kPitch>(args, stage, region_b, window_slot + 2 * kPitch + 2, far_share,
                                       row_of_sums(), u_x, u_y, lane);
    }
    // Here registers are free.
    if (group == args.groups - 1) clear_padding<uint16_t>(args, n, u_x - args.shift_x, u_y - args.shift_y, lane);
    if (lane == 0) window::store_wait_read();
  }
#endif
}

}  // namespace dcngen::backward
