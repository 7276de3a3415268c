// The sums of both gradients over all pixels, for half types: the gradient of a bias that was added to input and
// offset_mask. Every warp of the tile kernel sums up what it has staged anyway, on the tensor cores, and leaves a row of
// its unit; sum_kernel adds the rows in a fixed order. It runs after the kernels for far samples, since they write numbers
// of grad_offset_mask anew: of units with such samples it reads all of them.
#pragma once

#include "backward_samples.cuh"

namespace dcngen::backward {

// A unit's row: the sums of its D channels, those of its 27 numbers, and 1 where it has far samples, else 0.
template <int D>
constexpr int kSumRow = D + 28;

// Sums of the words that a lane reads, apart for both halves. A product with identities adds up registers: with A's
// lower and upper eight columns both times the identity, every lane gets its own four words back in its own
// accumulators, as floats: an instruction where unpacking and adding them takes sixteen.
template <typename T>
class WordSums {
 public:
  __device__ __forceinline__ explicit WordSums(int lane) {
    const int row = lane >> 2, column = lane & 3;
    const uint32_t one = row & 1 ? HalfTraits<T>::kOne << 16 : HalfTraits<T>::kOne;
    identity_ = row >> 1 == column ? one : 0u;
  }
  __device__ __forceinline__ void add(const uint32_t (&words)[4]) {
    HalfTraits<T>::mma(sums_, words, identity_, identity_);
  }
  __device__ __forceinline__ float low() const { return sums_[0] + sums_[2]; }
  __device__ __forceinline__ float high() const { return sums_[1] + sums_[3]; }

 private:
  uint32_t identity_;
  float sums_[4] = {};
};

__device__ __forceinline__ void store_pair(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}

// The part of a unit's row for its numbers. Lanes l and l + 16 have summed the same word l of different pixels.
template <int D, typename T>
__device__ __forceinline__ void store_number_sums(float* row, const WordSums<T>& sums, bool far, int lane) {
  float low = sums.low(), high = sums.high();
  low += __shfl_xor_sync(window::kAllLanes, low, 16);
  high += __shfl_xor_sync(window::kAllLanes, high, 16);
  if (lane < 14) store_pair(row + D + 2 * lane, low, lane < 13 ? high : far ? 1.f : 0.f);
}

// How much of the bilinear weights of a sample at (x, y) lies on the map; 0 for places that are no numbers.
__device__ __forceinline__ float share_on_map(float x, float y, int width, int height) {
  return __saturatef(fminf(x + 1.f, width - x)) * __saturatef(fminf(y + 1.f, height - y));
}

// The part for the channels: ones, for pixels on the map, times the staged input gradient; and what the kernels for far
// samples add to it, wherever that is: `share` (mask times share_on_map, all far samples of the lane's pixel) times
// grad_output, whose tile has the unit's first pixel at `slot`.
template <typename T, int D, int PITCH>
__device__ __forceinline__ void sum_input_gradient(const TileArgs& args, uint32_t stage, uint32_t grad_output, int slot,
                                                   float share, float* row, int u_x, int u_y, int lane) {
  const auto inside = [](int u, int length) { return static_cast<unsigned>(u) < static_cast<unsigned>(length); };
  const int x = u_x + 2 * (lane & 3);
  const uint32_t columns = (inside(x, args.width_in) ? HalfTraits<T>::kOne : 0u) |
                           (inside(x + 1, args.width_in) ? HalfTraits<T>::kOne << 16 : 0u);
  const bool far = __any_sync(window::kAllLanes, share != 0.f);
  uint32_t ones[2][4], shares[2][4] = {};
#pragma unroll
  for (int y = 0; y < 4; ++y) {
    ones[y / 2][y % 2 * 2] = inside(u_y + y, args.height_in) ? columns : 0u;
    ones[y / 2][y % 2 * 2 + 1] = 0u;
    if (!far) continue;
    const float left = __shfl_sync(window::kAllLanes, share, 8 * y + 2 * (lane & 3));
    const float right = __shfl_sync(window::kAllLanes, share, 8 * y + 2 * (lane & 3) + 1);
    shares[y / 2][y % 2 * 2] = HalfTraits<T>::pack(left, right);
  }
  const int pixel = lane & 15, high = lane >> 4;
#pragma unroll
  for (int pair = 0; pair < D / 16; ++pair) {
    float sums[2][4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t r[4];
      load_fragments<true>(r, stage + tile_offset<D>(16 * k + pixel, 2 * pair + high));
      HalfTraits<T>::mma(sums[0], ones[k], r[0], r[1]);
      HalfTraits<T>::mma(sums[1], ones[k], r[2], r[3]);
      if (!far) continue;
      const int place = slot + (2 * k + (pixel >> 3)) * PITCH + (pixel & 7);
      load_fragments<true>(r, grad_output + tile_offset<D>(place, 2 * pair + high));
      HalfTraits<T>::mma(sums[0], shares[k], r[0], r[1]);
      HalfTraits<T>::mma(sums[1], shares[k], r[2], r[3]);
    }
    const bool second = lane & 4;
    if (lane < 8) {
      store_pair(row + 16 * pair + 2 * lane, second ? sums[1][0] : sums[0][0], second ? sums[1][1] : sums[0][1]);
    }
  }
}

template <int D>
__device__ __forceinline__ void store_no_sums(float* row, int lane) {
  for (int i = lane; i < kSumRow<D>; i += 32) row[i] = 0.f;
}

constexpr int kSumWarps = 8;

struct SumArgs {
  FarArgs far;
  float* partial;  // of every group and block: a row
  float* sums;     // of all channels of grad_offset_mask, then of grad_input
  int rows;        // of a group
  int blocks;      // of a group
};

// The columns of rows that a lane adds up: lane, lane + 32, ...
template <int D>
struct RowSums {
  static constexpr int kPieces = (kSumRow<D> + 31) / 32, kFar = D + 27;
  float value[kPieces] = {};
  static __device__ __forceinline__ void load(float (&to)[kPieces], const float* row, bool real, int lane) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = lane + 32 * i;
      to[i] = real && column < kSumRow<D> ? __ldcg(row + column) : 0.f;
    }
  }
  static __device__ __forceinline__ bool is_far(const float (&row)[kPieces]) {
    return __shfl_sync(window::kAllLanes, row[kFar / 32], kFar % 32) != 0.f;
  }
  // Not the numbers of a unit with far samples.
  __device__ __forceinline__ void add(const float (&row)[kPieces], bool far, int lane) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) value[i] += far && lane + 32 * i >= D ? 0.f : row[i];
  }
};

// Lane l < 27: the sum of number l over the pixels of a unit, from memory.
template <typename T>
__device__ __forceinline__ float sum_numbers(const TileArgs& tile, const Unit& unit, int lane) {
  const int x0 = unit.u_x - tile.shift_x, y0 = unit.u_y - tile.shift_y;
  const int left = max(x0, 0), stride = static_cast<int>(tile.grad_offset_mask_stride);
  const T* first = static_cast<const T*>(tile.grad_offset_mask) + 27 * unit.group + min(lane, 26) +
                   int64_t{left} * stride;
  float sum = 0.f;
#pragma unroll 2
  for (int y = 0; y < 4; ++y) {
    // All loads at once, so none under a condition: of a pixel outside the output another one inside.
    const int row = min(max(y0 + y, 0), tile.height_out - 1);
    const T* from = first + (int64_t{unit.n} * tile.height_out + row) * tile.width_out * stride;
    T value[8];
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      value[x] = __ldcg(from + (min(max(x0 + x, 0), tile.width_out - 1) - left) * stride);
    }
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const bool inside = x0 + x >= 0 && x0 + x < tile.width_out && row == y0 + y;
      sum += inside ? static_cast<float>(value[x]) : 0.f;
    }
  }
  return sum;
}

// A share of one group's rows a block; the last of the group's blocks adds up what all of them left.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kSumWarps, 3) sum_kernel(const SumArgs args) {
#if __CUDA_ARCH__ >= 900
  constexpr int kRow = kSumRow<D>, kAtOnce = 8, kPieces = RowSums<D>::kPieces;
  __shared__ float warp_sums[kSumWarps][kRow];
  __shared__ bool is_last;
  const TileArgs& tile = args.far.tile;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, log = args.far.log_units_per_tile;
  const int group = blockIdx.x % tile.groups, block = blockIdx.x / tile.groups, step = args.blocks * kSumWarps;
  const auto unit_number = [&](int row) {
    return ((int64_t{row >> log} * tile.groups + group) << log) + (row & ((1 << log) - 1));
  };
  window::wait_for_previous_kernel();

  RowSums<D> sums;
  float numbers = 0.f;
  for (int base = block * kSumWarps + warp; base < args.rows; base += kAtOnce * step) {
    float loaded[kAtOnce][kPieces];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = base + i * step;
      RowSums<D>::load(loaded[i], tile.sums + (row < args.rows ? unit_number(row) * kRow : 0), row < args.rows, lane);
    }
    unsigned with_far = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool far = RowSums<D>::is_far(loaded[i]);
      sums.add(loaded[i], far, lane);
      if (far) with_far |= 1u << i;
    }
#pragma unroll 1
    for (; with_far; with_far &= with_far - 1) {
      const Unit unit = locate_unit(args.far, unit_number(base + (__ffs(with_far) - 1) * step));
      numbers += sum_numbers<T>(tile, unit, lane);
    }
  }

  // Each warp's sums, then those of all: to `to`, column by column.
  const auto gather = [&](auto to) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (lane + 32 * j < kRow) warp_sums[warp][lane + 32 * j] = sums.value[j];
    }
    __syncwarp();
    if (lane < 27) warp_sums[warp][D + lane] += numbers;
    __syncthreads();
    const int column = threadIdx.x;
    if (column >= RowSums<D>::kFar) return;
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kSumWarps; ++w) total += warp_sums[w][column];
    to(column, total);
  };
  float* partial = args.partial + int64_t{group} * args.blocks * kRow;
  gather([&](int column, float total) { partial[block * kRow + column] = total; });
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(tile.finished_sums + group, 1u) == args.blocks - 1u;
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  sums = RowSums<D>(), numbers = 0.f;
#pragma unroll 4
  for (int row = warp; row < args.blocks; row += kSumWarps) {
    float loaded[kPieces];
    RowSums<D>::load(loaded, partial + row * kRow, true, lane);
    sums.add(loaded, false, lane);
  }
  float* of_channels = args.sums + tile.channels;
  gather([&](int column, float total) {
    if (column < D) {
      of_channels[group * D + column] = total;
    } else {
      args.sums[27 * group + column - D] = total;
    }
  });
  if (group == tile.groups - 1) {
    for (int c = 27 * tile.groups + threadIdx.x; c < tile.channels; c += 32 * kSumWarps) args.sums[c] = 0.f;
  }
#endif
}

}  // namespace dcngen::backward
