// The window forward with a product after it: y = dcnv4(input, offset_mask), projected = y * weight^T + bias.
//
// A warpgroup computes 8x8 output pixels x 128 channels as forward_window.cuh does, one 4x4 pixel block a warp. Its
// sums, rounded, are already the left operand of the product that follows, so y reaches memory only where it is asked
// for. The weight stays in shared memory and blocks stay on their multiprocessor: a warpgroup asks for the next tile's
// offsets and masks as soon as it has read its own, for the next input as soon as its sums are done.
//
// Far samples: few in a unit are further columns of its product (forward_far.cuh); where there are many, the warp
// gathers its pixels and reads them back as operands. There is no kernel after this one to leave them to.
#pragma once

#include "copy_engine.cuh"
#include "forward_far.cuh"
#include "forward_window.cuh"
#include "warpgroup.cuh"

namespace dcngen::window {

constexpr int kProjectedChannels = 128;  // of y and of the result

struct ForwardProjected {
  CUtensorMap input_map, taps_map, weight_map, output_map, projected_map;  // output_map only where y is written
  const void* input;
  const void* bias;  // may be null
  int64_t image_bytes;
  OffsetScale scale;
  FarContext far;
  int tiles, pad_h, pad_w;
  FastDivide tiles_x, tiles_y;
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

// y of a warp's 16 pixels and two groups, sampled from memory at any place, to `staged` from 16-byte chunk `first` on.
// `values` is the first pixel's first offset in shared memory, `image` the first of the channels, (x0, y0) the first
// pixel.
template <typename T, typename Shape>
__device__ __forceinline__ void gather_task(const FarContext& c, const char* image, uint32_t values, uint32_t staged,
                                            int first, int x0, int y0, int lane) {
  constexpr int LANES = 2 * Shape::CHANNELS / 8;  // of a pixel, 16 bytes each
  const int chunk = lane % LANES, to_chunk = first + chunk;
#pragma unroll 1
  for (int m = lane / LANES; m < 16; m += 32 / LANES) {
    const uint32_t from = values + m * Shape::TAPS_PITCH + chunk / (LANES / 2) * (2 * kGroupValues);
    float sums[8] = {};
#pragma unroll 3
    for (int k = 0; k < kTaps; ++k) {
      const Corners corners(c, place_x(c, x0 + (m & 3), k, load_value<T>(from + 4 * k)),
                            place_y(c, y0 + (m >> 2), k, load_value<T>(from + 4 * k + 2)),
                            load_value<T>(from + (2 * kTaps + k) * 2));
      const uint4* at = reinterpret_cast<const uint4*>(image) + corners.first + chunk;
      const uint4 read[4] = {load_global16(at), load_global16(at + c.pixel_pieces), load_global16(at + c.row_pieces),
                             load_global16(at + c.row_pieces + c.pixel_pieces)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t words[4] = {read[i].x, read[i].y, read[i].z, read[i].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[2 * e] = fmaf(corners.weight[i], Dtype<T>::low(words[e]), sums[2 * e]);
          sums[2 * e + 1] = fmaf(corners.weight[i], Dtype<T>::high(words[e]), sums[2 * e + 1]);
        }
      }
    }
    const uint32_t row = staged + to_chunk / 8 * Shape::PANEL_BYTES + m * 128;
    store_shared16(row + ((to_chunk % 8 ^ (m & 7)) << 4), Dtype<T>::pack(sums[0], sums[1]),
                   Dtype<T>::pack(sums[2], sums[3]), Dtype<T>::pack(sums[4], sums[5]),
                   Dtype<T>::pack(sums[6], sums[7]));
  }
  __syncwarp();
}

template <typename T, typename Shape>
__device__ __forceinline__ void projected_tiles(const ForwardProjected& p) {
  extern __shared__ __align__(1024) unsigned char projected_memory[];
  using Tile = typename Shape::Tile;
  constexpr int STEPS = kProjectedChannels / 16;  // products over k = 16
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31;
  const int warpgroup = thread >> 7, warp = thread >> 5 & 3;
  const bool leader = warp == 0 && lane == 0;  // of the warpgroup

  const uint32_t weight = smem_address(projected_memory);
  const uint32_t input = weight + Shape::WEIGHT_BYTES + warpgroup * Shape::WARPGROUP_BYTES;
  const uint32_t staged = input + Shape::STAGED_AT + warp * Shape::WARP_PANEL_BYTES;
  const uint32_t taps_at = input + Shape::TAPS_AT + warp * 16 * Shape::TAPS_PITCH;
  const uint32_t records = input + Shape::RECORDS_AT + warp * FarRecords::BYTES;
  float* bias = reinterpret_cast<float*>(projected_memory + Shape::BIAS_AT);
  const uint32_t weight_here = weight + Shape::BARRIERS_AT;
  const uint32_t input_here = weight_here + 8 + warpgroup * Shape::WARPGROUP_BARRIERS * 8;
  const uint32_t taps_here = input_here + 8 + warp * 8;

  if (thread == 0) {
    for (int i = 0; i < 1 + Shape::WARPGROUPS * Shape::WARPGROUP_BARRIERS; ++i) barrier_init(weight_here + i * 8);
    barrier_publish();
  }
  let_next_kernel_begin();
  wait_for_previous_kernel();
  if (thread < kProjectedChannels) {
    uint16_t value = 0;
    if (p.bias != nullptr) value = static_cast<const uint16_t*>(p.bias)[thread];
    bias[thread] = Dtype<T>::low(value);
  }
  __syncthreads();

  // Lane 0 of a warp asks the copy engine: for its own offsets, masks and results, the leader's also for the rest.
  const int block_x = (warp & 1) * 4, block_y = (warp >> 1) * 4;
  struct Place {
    int x, y, image;
  };
  auto locate = [&](int tile) {
    uint32_t rest = static_cast<uint32_t>(tile);
    Place at;
    at.x = static_cast<int>(p.tiles_x.split(rest)) * 8;
    at.y = static_cast<int>(p.tiles_y.split(rest)) * 8;
    at.image = static_cast<int>(rest);
    return at;
  };
  auto first_value = [](int task) { return task * 2 * kGroupValues; };
  auto begin_taps = [&](int tile, int task) {
    const Place at = locate(tile);
    barrier_expect(taps_here, 16 * Shape::TAPS_PITCH);
    load_box(taps_at, p.taps_map, first_value(task) & ~7, at.x + block_x, at.y + block_y, at.image, taps_here);
  };
  auto begin_input = [&](int tile) {
    const Place at = locate(tile);
    barrier_expect(input_here, 2 * Tile::BYTES);
    for (int i = 0; i < 2; ++i) {
      load_box(input + i * Tile::BYTES, p.input_map, i * 64, at.x - p.pad_w - 1, at.y - p.pad_h - 1, at.image,
               input_here);
    }
  };
  auto store_staged = [&](const CUtensorMap& map, int tile) {
    const Place at = locate(tile);
    for (int i = 0; i < 2; ++i) {
      store_box(map, staged + i * Shape::PANEL_BYTES, i * 64, at.x + block_x, at.y + block_y, at.image);
    }
    store_commit();
  };
  // Where fragments of 16 rows x 16 channels are staged: the lane's row of the four matrices of one store or load.
  auto staged_step = [&](int step) {
    const int row = lane & 15, chunk = step % 4 * 2 + (lane >> 4);
    return staged + step / 4 * Shape::PANEL_BYTES + row * 128 + ((chunk ^ (row & 7)) << 4);
  };

  const int first = static_cast<int>(blockIdx.x) * Shape::WARPGROUPS + warpgroup;
  const int stride = static_cast<int>(gridDim.x) * Shape::WARPGROUPS;
  if (thread == 0) {
    barrier_expect(weight_here, Shape::WEIGHT_BYTES);
    for (int i = 0; i < 2; ++i) {
      load_box(weight + i * Shape::WEIGHT_PANEL_BYTES, p.weight_map, i * 64, 0, 0, 0, weight_here);
    }
  }
  if (first < p.tiles) {
    if (lane == 0) begin_taps(first, 0);
    if (leader) begin_input(first);
  }
  barrier_wait(weight_here, 0);

  // A lane's (pixel, group) of a task is row m of a unit; unit u is group 2 * task + u.
  const int m = lane & 15, unit_of_lane = lane >> 4;
  uint32_t parity = 0, taps_parity = 0;
#pragma unroll 1
  for (int tile = first; tile < p.tiles; tile += stride, parity ^= 1) {
    const int next = tile + stride;
    uint32_t y[STEPS][4];  // left operands of the second product
#pragma unroll
    for (int task = 0; task < Shape::TASKS; ++task) {
      barrier_wait(taps_here, taps_parity);
      taps_parity ^= 1;
      const uint32_t values = taps_at + (first_value(task) & 7) * 2;
      const Taps taps = load_taps(values + m * Shape::TAPS_PITCH + unit_of_lane * 2 * kGroupValues);
      auto free_staged = [&] {
        if (task > 0) return;
        if (lane == 0) store_wait_read();  // of the tile before
        __syncwarp();
      };

      // As in forward_tile: far samples of the lane, and of each unit.
      unsigned far = 0, unit_far = 0;
      bool many_far = false;
      const char* image = nullptr;  // the first of the task's channels
      if (__any_sync(kAllLanes, may_be_far<T>(taps, p.scale))) {
        const Place at = locate(tile);
        const int x0 = at.x + block_x, y0 = at.y + block_y;
        far = far_taps<T>(taps, p.scale);
        unit_far = __reduce_add_sync(kAllLanes, __popc(far) << 16 * unit_of_lane);
        many_far = (unit_far & 0xffff) > kMostFar || unit_far >> 16 > kMostFar;
        image = static_cast<const char*>(p.input) + at.image * p.image_bytes + 2 * task * Shape::CHANNELS * 2;
        if (many_far) {
          constexpr int TASK_STEPS = Shape::CHANNELS / 8;
          free_staged();
          gather_task<T, Shape>(p.far, image, values, staged, 2 * task * TASK_STEPS, x0, y0, lane);
#pragma unroll
          for (int i = 0; i < TASK_STEPS; ++i) {
            load_matrices(y[task * TASK_STEPS + i], staged_step(task * TASK_STEPS + i));
          }
        } else if (unit_far != 0) {
          FarRecords::store<T>(records, p.far, far, static_cast<int>(unit_far >> 16 * unit_of_lane & 0xffff), lane,
                               [&](int row, int k, float& x, float& y_at, float& mask) {
                                 const uint32_t from =
                                     values + row * Shape::TAPS_PITCH + unit_of_lane * 2 * kGroupValues;
                                 x = place_x(p.far, x0 + (row & 3), k, load_value<T>(from + 4 * k));
                                 y_at = place_y(p.far, y0 + (row >> 2), k, load_value<T>(from + 4 * k + 2));
                                 mask = load_value<T>(from + (2 * kTaps + k) * 2);
                               });
        }
      }
      __syncwarp();
      if (lane == 0) {
        if (task + 1 < Shape::TASKS) {
          begin_taps(tile, task + 1);
        } else if (next < p.tiles) {
          begin_taps(next, 0);
        }
      }
      if (many_far) {
        if (task == 0) barrier_wait(input_here, parity);  // the tile must not be asked for again while it arrives
        continue;
      }

      {
        float stencil[5][5];
        if (unit_far != 0) {
          stencil_weights<T, true>(stencil, taps, p.scale, far);
        } else {
          stencil_weights<T>(stencil, taps, p.scale);
        }
        free_staged();
        StencilMatrix::store_row<T>(staged + unit_of_lane * Shape::PANEL_BYTES, m, stencil);
      }
      if (task == 0) barrier_wait(input_here, parity);
      __syncwarp();
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        const uint32_t matrix = staged + unit * Shape::PANEL_BYTES;
        const uint32_t of_unit = records + unit * FarRecords::UNIT_BYTES;
        const int num_far = static_cast<int>(unit_far >> 16 * unit & 0xffff);
        uint32_t a[4][4];
        StencilMatrix::load(a, matrix, lane);
        __syncwarp();
#pragma unroll
        for (int pass = 0; pass < Shape::PASSES; ++pass) {
          constexpr int CHUNKS = Shape::PASS_CHUNKS;
          const int chunk = (2 * task + unit) * (Shape::CHANNELS / 8) + pass * CHUNKS;
          float sums[CHUNKS][4] = {};
          auto begin_far = [&](int step) {
            begin_far_step<CHUNKS>(p.far, of_unit, num_far, step,
                                   image + (unit * Shape::CHANNELS + pass * CHUNKS * 8) * 2, matrix, lane);
          };
          if (num_far > 0) begin_far(0);
          multiply<Tile, T>(sums, a, input + chunk / 8 * Tile::BYTES, block_y, block_x, chunk % 8, lane);
          for (int step = 0; step * 4 < num_far; ++step) {
            if (step > 0) begin_far(step);
            finish_far_step<T>(sums, of_unit, num_far, step, matrix, lane);
          }
#pragma unroll
          for (int j = 0; j < CHUNKS; ++j) {
            y[(chunk + j) / 2][j % 2 * 2] = Dtype<T>::pack(sums[j][0], sums[j][1]);
            y[(chunk + j) / 2][j % 2 * 2 + 1] = Dtype<T>::pack(sums[j][2], sums[j][3]);
          }
        }
      }
      __syncwarp();
    }
    warpgroup_barrier(warpgroup);
    if (leader && next < p.tiles) begin_input(next);

    if (Shape::OUTPUT) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) store_matrices(staged_step(step), y[step]);
      publish_to_copies();
      __syncwarp();
      if (lane == 0) store_staged(p.output_map, tile);
    }

    float sums[16][4];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(bias + j * 8 + (lane & 3) * 2);
      sums[j][0] = sums[j][2] = pair.x;
      sums[j][1] = sums[j][3] = pair.y;
    }
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const uint32_t panel = weight + step / 4 * Shape::WEIGHT_PANEL_BYTES;
      warpgroup_mma<T>(sums, y[step], right_operand(panel + step % 4 * 32));
    }
    warpgroup_commit();
    warpgroup_wait();

    if (Shape::OUTPUT && lane == 0) store_wait_read();
    __syncwarp();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const float(&u)[4] = sums[2 * step], (&v)[4] = sums[2 * step + 1];
      const uint32_t r[4] = {Dtype<T>::pack(u[0], u[1]), Dtype<T>::pack(u[2], u[3]), Dtype<T>::pack(v[0], v[1]),
                             Dtype<T>::pack(v[2], v[3])};
      store_matrices(staged_step(step), r);
    }
    publish_to_copies();
    __syncwarp();
    if (lane == 0) store_staged(p.projected_map, tile);
  }
  if (lane == 0) store_wait();
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1)
    forward_projected_kernel(const __grid_constant__ ForwardProjected p) {
  projected_tiles<T, Shape>(p);
}

}  // namespace dcngen::window
