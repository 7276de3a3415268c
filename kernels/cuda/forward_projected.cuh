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

#include "forward_blend.cuh"
#include "forward_projected_shape.cuh"
#include "forward_window.cuh"
#include "warpgroup.cuh"

namespace dcngen::window {

// y of a warp's 16 pixels and two groups, sampled from memory at any place in the gather kernel's arithmetic, to
// `staged` from 16-byte chunk `first` on. `values` is the first pixel's first offset in shared memory, `image` the
// first of the channels, (x0, y0) the first pixel.
template <typename T, typename Shape>
__device__ __forceinline__ void gather_task(const FarContext& c, const char* image, uint32_t values, uint32_t staged,
                                            int first, int x0, int y0, int lane) {
  constexpr int LANES = 2 * Shape::CHANNELS / 8;  // of a pixel, 16 bytes each
  const int chunk = lane % LANES, to_chunk = first + chunk;
#pragma unroll 1
  for (int m = lane / LANES; m < 16; m += 32 / LANES) {
    const uint32_t from = values + m * Shape::TAPS_PITCH + chunk / (LANES / 2) * (2 * kGroupValues);
    const uint4 result = gather_samples<T>(c, reinterpret_cast<const uint4*>(image) + chunk, from, x0 + (m & 3),
                                           y0 + (m >> 2));
    const uint32_t row = staged + to_chunk / 8 * Shape::PANEL_BYTES + m * 128;
    store_shared16(row + ((to_chunk % 8 ^ (m & 7)) << 4), result.x, result.y, result.z, result.w);
  }
  __syncwarp();
}

// A warp of the kernel. Its lane 0 asks the copy engine for the warp's own offsets, masks and results, the leader's
// also for the warpgroup's input. A tile has tasks, by which y becomes left operands (sample_task), and then the
// product with the weight.
template <typename T, typename Shape>
struct ProjectedWarp {
  using Tile = typename Shape::Tile;
  static constexpr int STEPS = kProjectedChannels / 16;  // products over k = 16
  using Operands = uint32_t[STEPS][4];                   // y of 16 pixels
  using Result = float[kProjectedChannels / 8][4];       // fragments, as of warpgroup_mma

  const ForwardProjected& p;
  const int lane, warp, warpgroup;
  const bool leader;
  const int block_x, block_y;  // of the warp's pixels in the tile
  const int m, unit_of_lane;   // a lane's (pixel, group) of a task is row m of a unit; unit u is group 2 * task + u
  uint32_t weight, input, staged, taps_at, records;  // shared memory
  uint32_t weight_here, input_here, taps_here;       // barriers
  uint32_t parity = 0, taps_parity = 0;              // of the next waits for input, for offsets and masks

  __device__ __forceinline__ ProjectedWarp(const ForwardProjected& problem, uint32_t memory, int thread)
      : p(problem), lane(thread & 31), warp(thread >> 5 & 3), warpgroup(thread >> 7), leader(warp == 0 && lane == 0),
        block_x((warp & 1) * 4), block_y((warp >> 1) * 4), m(lane & 15), unit_of_lane(lane >> 4) {
    weight = memory;
    input = weight + Shape::WEIGHT_BYTES + warpgroup * Shape::WARPGROUP_BYTES;
    staged = input + Shape::STAGED_AT + warp * Shape::WARP_PANEL_BYTES;
    taps_at = input + Shape::TAPS_AT + warp * 16 * Shape::TAPS_PITCH;
    records = input + Shape::RECORDS_AT + warp * FarRecords::BYTES;
    weight_here = weight + Shape::BARRIERS_AT;
    input_here = weight_here + 8 + warpgroup * Shape::WARPGROUP_BARRIERS * 8;
    taps_here = input_here + 8 + warp * 8;
  }

  // ------------------------------------------------------------------------------------------------------------ copies

  // By one thread of the block.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < 1 + Shape::WARPGROUPS * Shape::WARPGROUP_BARRIERS; ++i) barrier_init(weight_here + i * 8);
    barrier_publish();
  }
  __device__ __forceinline__ void begin_weight() const {
    barrier_expect(weight_here, Shape::WEIGHT_BYTES);
    for (int i = 0; i < 2; ++i) {
      load_box(weight + i * Shape::WEIGHT_PANEL_BYTES, p.weight_map, i * 64, 0, 0, 0, weight_here);
    }
  }

  static __device__ __forceinline__ int first_value(int task) { return task * 2 * kGroupValues; }
  __device__ __forceinline__ void begin_taps(int tile, int task) const {
    const TileGrid::Place at = p.grid.locate(tile);
    barrier_expect(taps_here, 16 * Shape::TAPS_PITCH);
    load_box(taps_at, p.taps_map, first_value(task) & ~7, at.x + block_x, at.y + block_y, at.image, taps_here);
  }
  __device__ __forceinline__ void begin_input(int tile) const {
    const TileGrid::Place at = p.grid.locate(tile);
    barrier_expect(input_here, 2 * Tile::BYTES);
    for (int i = 0; i < 2; ++i) {
      load_box(input + i * Tile::BYTES, p.input_map, i * 64, at.x - p.far.pad_w - 1, at.y - p.far.pad_h - 1, at.image,
               input_here);
    }
  }
  // The warp's staged pixels to memory.
  __device__ __forceinline__ void begin_store(const CUtensorMap& map, int tile) const {
    publish_to_copies();
    __syncwarp();
    if (lane != 0) return;
    const TileGrid::Place at = p.grid.locate(tile);
    for (int i = 0; i < 2; ++i) {
      store_box(map, staged + i * Shape::PANEL_BYTES, i * 64, at.x + block_x, at.y + block_y, at.image);
    }
    store_commit();
  }
  // Where fragments of 16 rows x 16 channels are staged: the lane's row of the four matrices of one store or load.
  __device__ __forceinline__ uint32_t staged_step(int step) const {
    const int row = lane & 15, chunk = step % 4 * 2 + (lane >> 4);
    return staged + step / 4 * Shape::PANEL_BYTES + row * 128 + ((chunk ^ (row & 7)) << 4);
  }
  // What was staged for the tile before may be overwritten; the tile's first task asks.
  __device__ __forceinline__ void free_staged(int task) const {
    if (task > 0) return;
    if (lane == 0) store_wait_read();
    __syncwarp();
  }
  // The tile's first task waits, also where it does not use it: it must not be asked for again while it arrives.
  __device__ __forceinline__ void wait_for_input(int task) const {
    if (task == 0) barrier_wait(input_here, parity);
  }

  // ------------------------------------------------------------------------------------------------- samples of a task

  struct TaskSamples {
    uint32_t values;         // of the first pixel's first group, in shared memory
    Taps taps;               // the lane's
    unsigned far, unit_far;  // far samples of the lane; how many each unit has (16 bits a unit)
    bool many_far;           // the warp gathers
    const char* image;       // the first of the task's channels; set where there may be far samples
  };

  // y of two groups becomes left operands. Asks for the next offsets and masks, of this tile or the `next`, as soon as
  // these have been read.
  __device__ __forceinline__ void sample_task(Operands& y, int task, int tile, int next) {
    barrier_wait(taps_here, taps_parity);
    taps_parity ^= 1;
    TaskSamples samples = {taps_at + (first_value(task) & 7) * 2};
    samples.taps = load_taps(samples.values + m * Shape::TAPS_PITCH + unit_of_lane * 2 * kGroupValues);
    if (__any_sync(kAllLanes, may_be_far<T>(samples.taps, p.scale))) handle_far(y, samples, task, tile);
    __syncwarp();
    if (lane == 0) {
      if (task + 1 < Shape::TASKS) {
        begin_taps(tile, task + 1);
      } else if (next < p.tiles) {
        begin_taps(next, 0);
      }
    }
    if (samples.many_far) {
      wait_for_input(task);
      return;
    }
    stage_stencils(samples, task);
    wait_for_input(task);
    __syncwarp();
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) multiply_unit(y, samples, task, unit);
    __syncwarp();
  }

  // As in forward_tile: far samples of the lane, and of each unit. Few become records, many are gathered into y.
  __device__ __forceinline__ void handle_far(Operands& y, TaskSamples& samples, int task, int tile) const {
    const TileGrid::Place at = p.grid.locate(tile);
    const int x0 = at.x + block_x, y0 = at.y + block_y;
    samples.far = far_taps<T>(samples.taps, p.scale);
    samples.unit_far = __reduce_add_sync(kAllLanes, __popc(samples.far) << 16 * unit_of_lane);
    samples.many_far = (samples.unit_far & 0xffff) > kMostFar || samples.unit_far >> 16 > kMostFar;
    samples.image = static_cast<const char*>(p.input) + at.image * p.image_bytes + 2 * task * Shape::CHANNELS * 2;
    if (samples.many_far) {
      constexpr int TASK_STEPS = Shape::CHANNELS / 8;
      free_staged(task);
      gather_task<T, Shape>(p.far, samples.image, samples.values, staged, 2 * task * TASK_STEPS, x0, y0, lane);
#pragma unroll
      for (int step = task * TASK_STEPS; step < (task + 1) * TASK_STEPS; ++step) {
        load_matrices(y[step], staged_step(step));
      }
    } else if (samples.unit_far != 0) {
      FarRecords::store<T>(records, samples.far, far_of_unit(samples, unit_of_lane), lane, [&](int row, int k) {
        return corners_of_tap<T>(p.far, x0 + (row & 3), y0 + (row >> 2), k,
                                 samples.values + row * Shape::TAPS_PITCH + unit_of_lane * 2 * kGroupValues);
      });
    }
  }
  static __device__ __forceinline__ int far_of_unit(const TaskSamples& samples, int unit) {
    return static_cast<int>(samples.unit_far >> 16 * unit & 0xffff);
  }

  __device__ __forceinline__ void stage_stencils(const TaskSamples& samples, int task) const {
    float stencil[5][5];
    if (samples.unit_far != 0) {
      stencil_weights<T, true>(stencil, samples.taps, p.scale, samples.far);
    } else {
      stencil_weights<T>(stencil, samples.taps, p.scale);
    }
    free_staged(task);
    StencilMatrix::store_row<T>(staged + unit_of_lane * Shape::PANEL_BYTES, m, stencil);
  }

  // S of a unit, and its far samples, times the input.
  __device__ __forceinline__ void multiply_unit(Operands& y, const TaskSamples& samples, int task, int unit) const {
    constexpr int CHUNKS = Shape::PASS_CHUNKS;
    const uint32_t matrix = staged + unit * Shape::PANEL_BYTES;
    const uint32_t of_unit = records + unit * FarRecords::UNIT_BYTES;
    const int num_far = far_of_unit(samples, unit);
    uint32_t a[4][4];
    StencilMatrix::load(a, matrix, lane);
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < Shape::PASSES; ++pass) {
      const int chunk = (2 * task + unit) * (Shape::CHANNELS / 8) + pass * CHUNKS;
      const char* image = samples.image + (unit * Shape::CHANNELS + pass * CHUNKS * 8) * 2;
      float sums[CHUNKS][4] = {};
      if (num_far > 0) begin_far_step<CHUNKS>(p.far, of_unit, num_far, 0, image, matrix, lane);
      multiply<Tile, T>(sums, a, input + chunk / 8 * Tile::BYTES, block_y, block_x, chunk % 8, lane);
      for (int step = 0; step * 4 < num_far; ++step) {
        if (step > 0) begin_far_step<CHUNKS>(p.far, of_unit, num_far, step, image, matrix, lane);
        finish_far_step<T>(sums, of_unit, num_far, step, matrix, lane);
      }
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j) {
        y[(chunk + j) / 2][j % 2 * 2] = Dtype<T>::pack(sums[j][0], sums[j][1]);
        y[(chunk + j) / 2][j % 2 * 2 + 1] = Dtype<T>::pack(sums[j][2], sums[j][3]);
      }
    }
  }

  // ------------------------------------------------------------------------------------------------ y and the product

  __device__ __forceinline__ void store_output(const Operands& y, int tile) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) store_matrices(staged_step(step), y[step]);
    begin_store(p.output_map, tile);
  }

  // result = bias + y * weight^T, by the four warps together.
  __device__ __forceinline__ void multiply_weight(Result& result, const Operands& y, const float* bias) const {
#pragma unroll
    for (int j = 0; j < kProjectedChannels / 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(bias + j * 8 + (lane & 3) * 2);
      result[j][0] = result[j][2] = pair.x;
      result[j][1] = result[j][3] = pair.y;
    }
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const uint32_t panel = weight + step / 4 * Shape::WEIGHT_PANEL_BYTES;
      warpgroup_mma<T>(result, y[step], right_operand(panel + step % 4 * 32));
    }
    warpgroup_commit();
    warpgroup_wait();
  }

  __device__ __forceinline__ void store_result(const Result& result, int tile) const {
    if (Shape::OUTPUT && lane == 0) store_wait_read();  // y was staged there
    __syncwarp();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const float(&u)[4] = result[2 * step], (&v)[4] = result[2 * step + 1];
      const uint32_t r[4] = {Dtype<T>::pack(u[0], u[1]), Dtype<T>::pack(u[2], u[3]), Dtype<T>::pack(v[0], v[1]),
                             Dtype<T>::pack(v[2], v[3])};
      store_matrices(staged_step(step), r);
    }
    begin_store(p.projected_map, tile);
  }
};

template <typename T, typename Shape>
__device__ __forceinline__ void projected_tiles(const ForwardProjected& p) {
  extern __shared__ __align__(1024) unsigned char projected_memory[];
  const int thread = static_cast<int>(threadIdx.x);
  float* bias = reinterpret_cast<float*>(projected_memory + Shape::BIAS_AT);
  ProjectedWarp<T, Shape> warp(p, smem_address(projected_memory), thread);
  if (thread == 0) warp.init_barriers();
  let_next_kernel_begin();
  wait_for_previous_kernel();
  if (thread < kProjectedChannels) {
    uint16_t value = 0;
    if (p.bias != nullptr) value = static_cast<const uint16_t*>(p.bias)[thread];
    bias[thread] = Dtype<T>::low(value);
  }
  __syncthreads();

  const int first = static_cast<int>(blockIdx.x) * Shape::WARPGROUPS + warp.warpgroup;
  const int stride = static_cast<int>(gridDim.x) * Shape::WARPGROUPS;
  if (thread == 0) warp.begin_weight();
  if (first < p.tiles) {
    if (warp.lane == 0) warp.begin_taps(first, 0);
    if (warp.leader) warp.begin_input(first);
  }
  barrier_wait(warp.weight_here, 0);

#pragma unroll 1
  for (int tile = first; tile < p.tiles; tile += stride, warp.parity ^= 1) {
    const int next = tile + stride;
    typename ProjectedWarp<T, Shape>::Operands y;
#pragma unroll
    for (int task = 0; task < Shape::TASKS; ++task) warp.sample_task(y, task, tile, next);
    warpgroup_barrier(warp.warpgroup);
    if (warp.leader && next < p.tiles) warp.begin_input(next);
    if (Shape::OUTPUT) warp.store_output(y, tile);
    typename ProjectedWarp<T, Shape>::Result result;
    warp.multiply_weight(result, y, bias);
    warp.store_result(result, tile);
  }
  if (warp.lane == 0) store_wait();
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1)
    forward_projected_kernel(const __grid_constant__ ForwardProjected p) {
  projected_tiles<T, Shape>(p);
}

}  // namespace dcngen::window
