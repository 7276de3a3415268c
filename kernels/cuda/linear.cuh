// A linear layer with many rows and few features, as the projections are on large maps: memory limits it.
//
//   forward    output (rows x N) = input (rows x K) * weight^T + bias
//   backward   grad_input (rows x N) = grad_output (rows x K) * weight, and the sums of grad_output's columns
//
// Blocks stay on their multiprocessor with the weight in shared memory; where that is too large, neighbouring blocks share
// the result's columns and read the same rows. A warpgroup computes 64 rows at a time; its left operand comes by the copy
// engine, in panels of 64 features that follow one another through a ring. The bias is what sums begin with; columns are
// summed on the tensor cores while their panel is there.
#pragma once

#include "copy_engine.cuh"
#include "warpgroup.cuh"

namespace dcngen::linear {

using namespace window;

constexpr int kPanel = 64;     // features of a panel: rows of 128 bytes
constexpr int kTileRows = 64;  // of a warpgroup
constexpr int kPanelBytes = kTileRows * 128;
constexpr int kMemory = 227 * 1024;  // of a block

struct LinearProblem {
  CUtensorMap left_map, weight_map, result_map;
  const void* bias;  // forward; may be null
  float* sums;       // backward: (warpgroups of all blocks, K)
  int tiles;
  int inner_panels;  // of what is summed over
  int outer_panels;  // of the result, a block's
  int all_panels;    // of the result
  int shares;        // how many blocks share the result's panels
};

// Who has what of a block's shared memory: the weight (of each inner panel all rows), then the warpgroups (ring,
// results), the bias, the barriers (the weight's, then the ring's of each warpgroup).
struct LinearMemory {
  static constexpr int STAGES = 4, RESULTS = 2;
  static constexpr int WARPGROUP_BYTES = (STAGES + RESULTS) * kPanelBytes;
  static constexpr int BARRIER_BYTES = (1 + 4 * STAGES) * 8;

  static constexpr __host__ __device__ int weight_bytes(int inner, int outer) { return inner * outer * kPanelBytes; }
  static constexpr __host__ __device__ int rest_bytes(int outer) { return outer * kPanel * 4 + BARRIER_BYTES; }
  static constexpr __host__ __device__ int warpgroups(int inner, int outer) {
    const int most = (kMemory - weight_bytes(inner, outer) - rest_bytes(outer)) / WARPGROUP_BYTES;
    return most < 4 ? most : 4;
  }
  static constexpr __host__ __device__ int bytes(int inner, int outer) {
    return weight_bytes(inner, outer) + warpgroups(inner, outer) * WARPGROUP_BYTES + rest_bytes(outer);
  }
};
// How many blocks share a result of so many panels: two warpgroups have room beside each one's weight.
constexpr __host__ __device__ int shares(int inner, int outer) {
  int n = 1;
  while (LinearMemory::warpgroups(inner, (outer + n - 1) / n) < 2) ++n;
  return n;
}
static_assert(shares(4, 4) == 1 && shares(4, 6) == 2 && shares(4, 8) == 2 && shares(4, 11) == 3, "");
static_assert(LinearMemory::warpgroups(2, 6) == 2 && LinearMemory::warpgroups(4, 4) == 2, "");

// Panels of the left operand, in the order in which a warpgroup needs them. One thread asks.
class Ring {
 public:
  __device__ __forceinline__ Ring(const LinearProblem& problem, uint32_t memory, uint32_t barriers, int first_tile,
                                  int stride)
      : p_(problem), memory_(memory), barriers_(barriers), tile_(first_tile), stride_(stride) {}

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < LinearMemory::STAGES; ++i) barrier_init(barriers_ + i * 8);
  }
  __device__ __forceinline__ void begin_first() {
    for (int i = 0; i < LinearMemory::STAGES; ++i) begin_next(i);
  }
  // The address of the next panel, once it is there.
  __device__ __forceinline__ uint32_t wait() const {
    barrier_wait(barriers_ + stage_ * 8, parity_);
    return memory_ + stage_ * kPanelBytes;
  }
  // All have read it: its place is the next one's that is asked for.
  __device__ __forceinline__ void release(bool leader) {
    if (leader) begin_next(stage_);
    if (++stage_ == LinearMemory::STAGES) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  __device__ __forceinline__ void begin_next(int stage) {
    if (tile_ >= p_.tiles) return;
    const uint32_t barrier = barriers_ + stage * 8;
    barrier_expect(barrier, kPanelBytes);
    load_box(memory_ + stage * kPanelBytes, p_.left_map, panel_ * kPanel, tile_ * kTileRows, 0, 0, barrier);
    if (++panel_ == p_.inner_panels) {
      panel_ = 0;
      tile_ += stride_;
    }
  }

  const LinearProblem& p_;
  const uint32_t memory_, barriers_;
  int tile_, panel_ = 0;  // of the next to ask for
  const int stride_;
  int stage_ = 0;  // of the next to wait for
  uint32_t parity_ = 0;
};

// Where fragments of 16 rows x 16 features of a panel are: the lane's row of the four matrices of one load or store.
__device__ __forceinline__ uint32_t fragment_row(uint32_t first_row, int step, int lane) {
  const int row = lane & 15, chunk = step * 2 + (lane >> 4);
  return first_row + row * 128 + ((chunk ^ (row & 7)) << 4);
}

using Fragments = float[kPanel / 8][4];  // sums of 16 rows x 64 features, by a warp

// A warp's rows of a result panel, rounded, to memory; in turn through the warp's staging places.
template <typename T>
class Results {
 public:
  __device__ __forceinline__ Results(const LinearProblem& problem, uint32_t staging, int lane)
      : p_(problem), staging_(staging), lane_(lane) {}

  __device__ __forceinline__ void store(const float (*sums)[4], int panel, int row) {
    const uint32_t staged = staging_ + place_ * kPanelBytes;
    place_ = (place_ + 1) % LinearMemory::RESULTS;
    if (lane_ == 0) store_wait_read<LinearMemory::RESULTS - 1>();
    __syncwarp();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const float(&u)[4] = sums[2 * step], (&v)[4] = sums[2 * step + 1];
      const uint32_t r[4] = {Dtype<T>::pack(u[0], u[1]), Dtype<T>::pack(u[2], u[3]), Dtype<T>::pack(v[0], v[1]),
                             Dtype<T>::pack(v[2], v[3])};
      store_matrices(fragment_row(staged, step, lane_), r);
    }
    publish_to_copies();
    __syncwarp();
    if (lane_ != 0) return;
    store_box(p_.result_map, staged, panel * kPanel, row, 0, 0);
    store_commit();
  }

 private:
  const LinearProblem& p_;
  const uint32_t staging_;
  const int lane_;
  int place_ = 0;
};

// What both kernels begin with.
struct LinearBlock {
  int thread, lane, warp, warpgroup, warpgroups, first_tile, stride;
  int first_panel, panels;  // of the result
  uint32_t weight, own, bias, barriers;
  bool leader;

  __device__ __forceinline__ LinearBlock(const LinearProblem& p, const void* memory)
      : thread(static_cast<int>(threadIdx.x)), lane(thread & 31), warp(thread >> 5 & 3), warpgroup(thread >> 7),
        warpgroups(static_cast<int>(blockDim.x) >> 7), leader(warp == 0 && lane == 0) {
    weight = smem_address(memory);
    own = weight + LinearMemory::weight_bytes(p.inner_panels, p.outer_panels) +
          warpgroup * LinearMemory::WARPGROUP_BYTES;
    bias = own + (warpgroups - warpgroup) * LinearMemory::WARPGROUP_BYTES;
    barriers = bias + p.outer_panels * kPanel * 4;
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    first_tile = block / p.shares * warpgroups + warpgroup;
    stride = blocks / p.shares * warpgroups;
    first_panel = block % p.shares * p.outer_panels;
    panels = min(p.outer_panels, p.all_panels - first_panel);
  }
  __device__ __forceinline__ Ring ring(const LinearProblem& p) const {
    return Ring(p, own, barriers + 8 + warpgroup * LinearMemory::STAGES * 8, first_tile, stride);
  }
  template <typename T>
  __device__ __forceinline__ Results<T> results(const LinearProblem& p) const {
    return Results<T>(p, own + LinearMemory::STAGES * kPanelBytes + warp * (kPanelBytes / 4), lane);
  }
  // Barriers, then the weight and the first panels are asked for.
  __device__ __forceinline__ void begin(const LinearProblem& p, Ring& ring) const {
    if (leader) {
      if (warpgroup == 0) barrier_init(barriers);
      ring.init_barriers();
      barrier_publish();
    }
    __syncthreads();
    let_next_kernel_begin();
    wait_for_previous_kernel();
    if (!leader) return;
    ring.begin_first();
    if (warpgroup > 0) return;
    barrier_expect(barriers, LinearMemory::weight_bytes(p.inner_panels, panels));
    for (int inner = 0; inner < p.inner_panels; ++inner) {
      for (int outer = 0; outer < panels; ++outer) {
        load_box(weight + (inner * p.outer_panels + outer) * kPanelBytes, p.weight_map, inner * kPanel,
                 (first_panel + outer) * kPanel, 0, 0, barriers);
      }
    }
  }
};

// INNER panels of the input; at least two of the output.
template <typename T, int INNER>
__global__ void __launch_bounds__(LinearMemory::warpgroups(INNER, 2) * 128, 1)
    linear_forward_kernel(const __grid_constant__ LinearProblem p) {
  extern __shared__ __align__(1024) unsigned char linear_memory[];
  const LinearBlock block(p, linear_memory);
  Ring ring = block.ring(p);
  Results<T> results = block.template results<T>(p);
  block.begin(p, ring);
  for (int i = block.thread; i < block.panels * kPanel; i += static_cast<int>(blockDim.x)) {
    uint16_t value = 0;
    if (p.bias != nullptr) value = static_cast<const uint16_t*>(p.bias)[block.first_panel * kPanel + i];
    store_shared(block.bias + i * 4, __float_as_uint(Dtype<T>::low(value)));
  }
  __syncthreads();
  barrier_wait(block.barriers, 0);

#pragma unroll 1
  for (int tile = block.first_tile; tile < p.tiles; tile += block.stride) {
    uint32_t left[INNER * 4][4];
#pragma unroll
    for (int inner = 0; inner < INNER; ++inner) {
      const uint32_t rows = ring.wait() + block.warp * (kPanelBytes / 4);
#pragma unroll
      for (int step = 0; step < 4; ++step) load_matrices(left[inner * 4 + step], fragment_row(rows, step, block.lane));
      warpgroup_barrier(block.warpgroup);
      ring.release(block.leader);
    }
#pragma unroll 1
    for (int outer = 0; outer < block.panels; ++outer) {
      Fragments sums;
#pragma unroll
      for (int j = 0; j < kPanel / 8; ++j) {
        const uint32_t from = block.bias + (outer * kPanel + j * 8 + (block.lane & 3) * 2) * 4;
        sums[j][0] = sums[j][2] = __uint_as_float(load_shared(from));
        sums[j][1] = sums[j][3] = __uint_as_float(load_shared(from + 4));
      }
      warpgroup_fence();
#pragma unroll
      for (int step = 0; step < INNER * 4; ++step) {
        const uint32_t panel = block.weight + (step / 4 * p.outer_panels + outer) * kPanelBytes;
        warpgroup_mma<T>(sums, left[step], right_operand(panel + step % 4 * 32));
      }
      warpgroup_commit();
      warpgroup_wait();
      results.store(sums, block.first_panel + outer, tile * kTileRows + block.warp * 16);
    }
  }
  if (block.lane == 0) store_wait();
}

// Sums of a panel's columns: ones times the panel. A warp has 16 of them.
template <typename T>
__device__ __forceinline__ void add_columns(float (&sums)[2][4], uint32_t panel, int warp, int lane) {
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
  const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
  const int row = lane & 15, chunk = 2 * warp + (lane >> 4);
  const uint32_t from = panel + row * 128 + ((chunk ^ (row & 7)) << 4);
#pragma unroll
  for (int step = 0; step < kTileRows / 16; ++step) {
    uint32_t b[4];
    load_matrices_transposed(b, from + step * 16 * 128);
    Dtype<T>::mma(sums[0], ones, b[0], b[1]);
    Dtype<T>::mma(sums[1], ones, b[2], b[3]);
  }
}

// INNER panels of grad_output, OUTER of grad_input.
template <typename T, int INNER, int OUTER>
__global__ void __launch_bounds__(LinearMemory::warpgroups(INNER, OUTER) * 128, 1)
    linear_backward_kernel(const __grid_constant__ LinearProblem p) {
  extern __shared__ __align__(1024) unsigned char linear_memory[];
  constexpr int PAIRS = OUTER / 2;  // of result panels: products have 128 columns
  const LinearBlock block(p, linear_memory);
  Ring ring = block.ring(p);
  Results<T> results = block.template results<T>(p);
  block.begin(p, ring);
  barrier_wait(block.barriers, 0);

  float columns[INNER][2][4] = {};
#pragma unroll 1
  for (int tile = block.first_tile; tile < p.tiles; tile += block.stride) {
    float sums[PAIRS][2 * kPanel / 8][4] = {};
#pragma unroll
    for (int inner = 0; inner < INNER; ++inner) {
      const uint32_t panel = ring.wait();
      uint32_t left[4][4];
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        load_matrices(left[step], fragment_row(panel + block.warp * (kPanelBytes / 4), step, block.lane));
      }
      add_columns<T>(columns[inner], panel, block.warp, block.lane);
      warpgroup_barrier(block.warpgroup);
      ring.release(block.leader);
      warpgroup_fence();
#pragma unroll
      for (int pair = 0; pair < PAIRS; ++pair) {
        const uint32_t weight = block.weight + (inner * PAIRS + pair) * 2 * kPanelBytes;
#pragma unroll
        for (int step = 0; step < 4; ++step) warpgroup_mma<T>(sums[pair], left[step], right_operand(weight + step * 32));
      }
      warpgroup_commit();
      warpgroup_wait();
    }
#pragma unroll
    for (int outer = 0; outer < OUTER; ++outer) {
      results.store(sums[outer / 2] + outer % 2 * (kPanel / 8), outer, tile * kTileRows + block.warp * 16);
    }
  }
  if (block.lane == 0) store_wait();

  // Each warpgroup has a row of its own.
  if (block.lane >= 4) return;
  float* to = p.sums + int64_t{block.first_tile} * (INNER * kPanel) + block.warp * 16 + block.lane * 2;
#pragma unroll
  for (int inner = 0; inner < INNER; ++inner, to += kPanel) {
    *reinterpret_cast<float2*>(to) = {columns[inner][0][0], columns[inner][0][1]};
    *reinterpret_cast<float2*>(to + 8) = {columns[inner][1][0], columns[inner][1][1]};
  }
}

}  // namespace dcngen::linear
