// Far samples by dense products over a wider window (half types): where many samples of 8x8 output pixels are far, one
// window of 16x16 inputs holds most of them, or, on a map no larger than the window, all of them.
//   T(64 x cells) = grad_output(64 x D) * input(cells x D)^T: a sample's three gradients need four numbers of its row;
//   S(64 x cells): every output pixel adds its samples' corner weights to its own row, so nothing collides;
//   grad_input(cells x D) += S^T * grad_output.
// A block takes one window. On a small map that is all of one group of one image: every sample fits and the sums go to
// memory in a fixed order. On a larger map the window surrounds one 8x8 piece of outputs, the sums are added with one
// reduction a cell instead of four a sample, and samples that do not fit stay marked for far_kernel.
#pragma once

#include "backward_windows.cuh"

namespace dcngen::backward {

// T: warp w computes 16 output pixels (w % 4) by half of the cells (w / 4).
template <typename T, int D>
__device__ __forceinline__ void multiply_cells(uint32_t products, uint32_t input, uint32_t grad_output, int warp,
                                               int lane) {
  using Shape = WideShape<D>;
  constexpr int kAtOnce = D == 16 ? 2 : 1;  // tiles of eight cells
  const int row = 16 * (warp & 3);
  uint32_t a[D / 16][4];
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    load_fragments<false>(a[k], grad_output + tile_offset<D>(row + (lane & 15), 2 * k + (lane >> 4)));
  }
  uint32_t to = products + (row + (lane >> 2)) * Shape::kRow + 8 * (lane & 3);
#pragma unroll (D == 64 ? 1 : 2)
  for (int tile = 0; tile < Shape::kCells / 16; tile += kAtOnce) {
    const int cell = (warp >> 2) * (Shape::kCells / 2) + 8 * tile;
    uint32_t b[D == 16 ? 1 : D / 32][4];
    if constexpr (D == 16) {
      load_fragments<false>(b[0], input + tile_offset<D>(cell + (lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1));
    } else {
#pragma unroll
      for (int part = 0; part < D / 32; ++part) {
        load_fragments<false>(b[part], input + tile_offset<D>(cell + (lane & 7), 4 * part + (lane >> 3)));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float c[4] = {};
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const int at = i * (D / 8) + 2 * k;
        HalfTraits<T>::mma(c, a[k], b[at / 4][at % 4], b[at / 4][at % 4 + 1]);
      }
      const uint32_t at = to + 4 * (cell + 8 * i);
      window::store_shared8(at, __float_as_uint(c[0]), __float_as_uint(c[1]));
      window::store_shared8(at + 8 * Shape::kRow, __float_as_uint(c[2]), __float_as_uint(c[3]));
    }
  }
}

// The gradients of the warp's samples from its rows of T.
template <typename T, int ROW>
__device__ __forceinline__ void look_up_gradients(const WideSample (&samples)[kRounds], const TileArgs& tile,
                                                  uint32_t rows, T* to, int lane) {
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int number = lane + 32 * i, pixel = number / 9;
    const WideSample& sample = samples[i];
    if (!(sample.word & WideSample::kTaken)) continue;
    float dot[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int x = sample.left() + (q & 1), y = sample.top() + (q >> 1);
      const bool inside = static_cast<unsigned>(x) < kWideSide && static_cast<unsigned>(y) < kWideSide;
      dot[q] = inside ? __uint_as_float(window::load_shared(rows + pixel * ROW + 4 * (y * kWideSide + x))) : 0.f;
    }
    store_gradient(to + pixel * static_cast<int>(tile.grad_offset_mask_stride), number - 9 * pixel,
                   corner_gradient(dot, sample.lx, sample.ly), tile.scale * HalfTraits<T>::low(sample.word));
  }
}

// S of a warp's row of output pixels: four lanes a pixel, a lane a parity, so that no two add to one cell.
template <typename T, int D>
__device__ __forceinline__ void build_weights(const WideSample (&samples)[kRounds], uint32_t products, int first,
                                              int lane) {
  using Shape = WideShape<D>;
  constexpr int kPieces = Shape::kCells / 8;  // of 16 bytes, a row
#pragma unroll
  for (int i = lane; i < 8 * kPieces; i += 32) {
    window::store_shared16(Shape::weights_row(products, first + i / kPieces) + 16 * (i % kPieces), 0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int number = lane + 32 * i, pixel = number / 9;
    if (number >= kWideSamples) continue;
    const WideSample& sample = samples[i];
    store_record(
        products + (first + pixel) * Shape::kRow + Shape::kWeights + (number - 9 * pixel) * kRecordBytes, sample.left(),
        sample.top(), sample.lx, sample.ly, sample.word & WideSample::kAdds ? HalfTraits<T>::low(sample.word) : 0.f);
  }
  __syncwarp();
  const int odd_x = lane & 1, odd_y = (lane >> 1) & 1, pixel = first + (lane >> 2);
  const uint32_t row = Shape::weights_row(products, pixel);
  const uint32_t records = products + pixel * Shape::kRow + Shape::kWeights;
#pragma unroll 3
  for (int tap = 0; tap < 9; ++tap) {
    const ParityCorner corner(records + tap * kRecordBytes, odd_x, odd_y);
    const uint32_t cell = row + 2 * (corner.x + corner.y * kWideSide);
    const float before = HalfTraits<T>::low(window::load_shared2(cell));
    window::store_shared2(cell, HalfTraits<T>::pack(before + corner.weight, 0.f));
  }
}

// Adds S^T * grad_output: the warp's tiles of 16 cells from `cell` on, all channels.
template <typename T, int D>
__device__ __forceinline__ void multiply_transposed(
    float (&c)[WideShape<D>::kTilesM][WideShape<D>::kTilesN][4], uint32_t products, uint32_t grad_output,
    int cell, int lane) {
  using Shape = WideShape<D>;
  const int low = (lane >> 3) & 1, high = lane >> 4;
#pragma unroll 1
  for (int k = 0; k < 64; k += 16) {
    const uint32_t weights = Shape::weights_row(products, k + 8 * high + (lane & 7)) + 2 * cell + 16 * low;
    uint32_t a[Shape::kTilesM][4];
#pragma unroll
    for (int m = 0; m < Shape::kTilesM; ++m) load_fragments<true>(a[m], weights + 32 * m);
#pragma unroll
    for (int pair = 0; pair < Shape::kTilesN; pair += 2) {
      uint32_t b[4];
      load_fragments<true>(b, grad_output + tile_offset<D>(k + 8 * low + (lane & 7), pair + high));
#pragma unroll
      for (int m = 0; m < Shape::kTilesM; ++m) {
        HalfTraits<T>::mma(c[m][pair], a[m], b[0], b[1]);
        HalfTraits<T>::mma(c[m][pair + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Adds the warp's sums to the input gradient in memory: alone there where WHOLE, else by reductions.
template <typename T, int D, bool WHOLE>
__device__ __forceinline__ void add_to_input_gradient(
    const FarArgs& args, const WideWindow<WHOLE>& window,
    const float (&c)[WideShape<D>::kTilesM][WideShape<D>::kTilesN][4], uint32_t stage, int cell, int lane) {
  using Shape = WideShape<D>;
  const int low = (lane >> 3) & 1, high = lane >> 4;
#pragma unroll
  for (int m = 0; m < Shape::kTilesM; ++m) {
#pragma unroll
    for (int pair = 0; pair < Shape::kTilesN; pair += 2) {
      const auto &left = c[m][pair], &right = c[m][pair + 1];
      window::store_matrices<4>(
          stage + tile_offset<D>(cell + 16 * m + 8 * high + (lane & 7), pair + low),
          {HalfTraits<T>::pack(left[0], left[1]), HalfTraits<T>::pack(right[0], right[1]),
           HalfTraits<T>::pack(left[2], left[3]), HalfTraits<T>::pack(right[2], right[3])});
    }
  }
  __syncwarp();
  const int64_t image = int64_t{window.n} * args.tile.height_in * args.tile.width_in;
  T* grad_input = static_cast<T*>(args.grad_input) + window.group * D;
#pragma unroll 2
  for (int i = lane; i < 16 * Shape::kTilesM * Shape::kTilesN; i += 32) {
    const int at = cell + i / Shape::kTilesN, part = i % Shape::kTilesN;
    const int x = window.x + at % kWideSide, y = window.y + at / kWideSide;
    if (x >= args.tile.width_in || y >= args.tile.height_in) continue;
    const uint4 sum = window::load_shared16(stage + tile_offset<D>(at, part));
    if ((sum.x | sum.y | sum.z | sum.w) == 0) continue;
    T* to = grad_input + (image + int64_t{y} * args.tile.width_in + x) * args.p.grad_input_pixel_stride + 8 * part;
    if constexpr (WHOLE) {
      const uint4 old = *reinterpret_cast<const uint4*>(to);
      *reinterpret_cast<uint4*>(to) = make_uint4(HalfTraits<T>::add_pairs(old.x, sum.x),
                                                 HalfTraits<T>::add_pairs(old.y, sum.y),
                                                 HalfTraits<T>::add_pairs(old.z, sum.z),
                                                 HalfTraits<T>::add_pairs(old.w, sum.w));
    } else {
      HalfTraits<T>::reduce_add(to, sum);
    }
  }
}

// One window by the whole block.
template <typename T, int D, bool WHOLE>
__device__ __forceinline__ void wide_window(const FarArgs& args, uint32_t number, uint32_t shared, int warp, int lane) {
  using Shape = WideShape<D>;
  using Window = WideWindow<WHOLE>;
  const TileArgs& tile = args.tile;
  const Params& p = args.p;
  const uint32_t input = shared, grad_output = input + Shape::kInput, products = grad_output + Shape::kGradOutput;
  const int cell = 16 * Shape::kTilesM * warp;
  float sums[Shape::kTilesM][Shape::kTilesN][4] = {};
  bool some = false;
#pragma unroll 1
  for (int i = 0; i < Window::pieces(args); ++i) {
    // Unknown to the compiler from here on: it would keep dozens of addresses in registers from piece to piece.
    asm volatile("" : "+r"(lane), "+r"(warp));
    const int thread = 32 * warp + lane;
    const int64_t upper = Window::upper_unit(args, number, i), own = upper + (warp < 4 ? 0 : Window::lower(args));
    const unsigned mask = tile.far_masks[32 * own + lane], far = tile.far_units[own] ? mask : 0u;
    const bool any = __syncthreads_or(far != 0);  // also: every warp is done with the products before
    if (!any) continue;

    const Unit unit = locate_unit(args, upper);
    const Window window(args, unit);
    if (!some) {
      copy_cells<T, D, Shape::kCells>(
          input,
          static_cast<const T*>(args.input) +
              int64_t{window.n} * (tile.height_in * tile.width_in) * p.input_pixel_stride + window.group * D,
          p.input_pixel_stride, window.x, window.y, 4, tile.width_in, tile.height_in, thread);
    }
    some = true;
    const int y = unit.u_y - tile.shift_y, x = unit.u_x - tile.shift_x;
    const int64_t first_out = int64_t{window.n} * (tile.height_out * tile.width_out);  // of the image
    copy_cells<T, D, 64>(
        grad_output,
        static_cast<const T*>(args.grad_output) + first_out * p.output_pixel_stride + window.group * D,
        p.output_pixel_stride, x, y, 3, tile.width_out, tile.height_out, thread);
    window::copy_commit();
    const int first = 8 * (warp & 3);
    const int64_t out = first_out + (y + warp) * tile.width_out + x;
    T* to = static_cast<T*>(tile.grad_offset_mask) + out * tile.grad_offset_mask_stride + 27 * window.group;
    WideSample samples[kRounds];
    const unsigned left_over = take_samples<T, WHOLE>(
        samples, tile, static_cast<const T*>(tile.offset_mask) + out * tile.offset_mask_stride + 27 * window.group, to,
        unit.u_x, unit.u_y + warp, far, first, window, lane);
    if (!WHOLE && lane < 8) tile.far_masks[32 * own + first + lane] = static_cast<uint16_t>(left_over);
    window::copy_wait<0>();
    __syncthreads();

    multiply_cells<T, D>(products, input, grad_output, warp, lane);
    __syncthreads();
    look_up_gradients<T, Shape::kRow>(samples, tile, products + 8 * warp * Shape::kRow, to, lane);
    __syncwarp();
    build_weights<T, D>(samples, products, 8 * warp, lane);
    __syncthreads();
    multiply_transposed<T, D>(sums, products, grad_output, cell, lane);
  }
  if (some) {
    const Window window(args, locate_unit(args, Window::upper_unit(args, number, 0)));
    add_to_input_gradient<T, D, WHOLE>(args, window, sums, input, cell, lane);
  }
}

// What a window needs: nothing, a gather of its few far samples, or dense products.
enum class Need { kNothing, kGather, kProducts };

template <bool WHOLE>
__device__ __forceinline__ Need need_of(const FarArgs& args, uint32_t number) {
  using Window = WideWindow<WHOLE>;
  if (!Window::has_far_samples(args, number)) return Need::kNothing;
  const int pieces = Window::pieces(args), lower = Window::lower(args);
  int in_reach = 0;
  for (int i = 0; i < pieces; ++i) {
    const int64_t unit = Window::upper_unit(args, number, i);
    const int a = args.tile.far_units[unit], b = args.tile.far_units[unit + lower];
    in_reach += (a ? a - 1 : 0) + (b ? b - 1 : 0);
  }
  return in_reach < pieces * args.few_samples ? Need::kGather : Need::kProducts;
}

// The windows that need a gather, of those from `first` on: the warps take their units in turn.
template <typename T, int D>
__device__ __forceinline__ void gather_windows(const FarArgs& args, uint32_t first, uint32_t flags, uint16_t* list) {
  using Window = WideWindow<true>;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int turn = 0;
  for (int word = 0; word < kWideWarps; ++word) {
    for (unsigned rest = window::load_shared(flags + 8 * word + 4); rest; rest &= rest - 1) {
      const uint32_t number = first + gridDim.x * (32 * word + __ffs(rest) - 1);
      for (int i = 0; i < 2 * Window::pieces(args); ++i, turn = (turn + 1) % kWideWarps) {
        if (turn != warp) continue;
        const int64_t unit = Window::upper_unit(args, number, i >> 1) + (i & 1 ? Window::lower(args) : 0);
        if (args.tile.far_units[unit]) gather_units<T, D, true>(args, unit, 1u, list, lane);
      }
    }
  }
}

template <typename T, int D, bool WHOLE>
__global__ void __launch_bounds__(kWideThreads, WideShape<D>::kBlocks)
    wide_kernel(const __grid_constant__ FarArgs args) {
#if __CUDA_ARCH__ >= 900
  using Window = WideWindow<WHOLE>;
  extern __shared__ __align__(16) uint8_t wide_shared[];
  const uint32_t memory = window::smem_address(wide_shared);
  const uint32_t flags = memory + WideShape<D>::kShared - 8 * kWideWarps;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t windows = static_cast<uint32_t>(Window::count(args)), step = gridDim.x;
  window::wait_for_previous_kernel();
  // Every thread looks at one of the block's windows. On a small map the warps gather where few samples are far, a unit
  // at a time; then the block takes the windows with many.
  for (uint32_t first = blockIdx.x; first < windows; first += step * kWideThreads) {
    const uint32_t mine = first + step * threadIdx.x;
    const Need need = mine < windows ? need_of<WHOLE>(args, mine) : Need::kNothing;
    const unsigned dense = __ballot_sync(window::kAllLanes, need == Need::kProducts);
    const unsigned sparse = __ballot_sync(window::kAllLanes, need == Need::kGather);
    if (lane == 0) window::store_shared8(flags + 8 * warp, dense, sparse);
    if (!__syncthreads_or((dense | sparse) != 0)) continue;
    if constexpr (WHOLE) {
      gather_windows<T, D>(args, first, flags, reinterpret_cast<uint16_t*>(wide_shared) + warp * kUnitSamples);
      __syncthreads();
    }
    for (int word = 0; word < kWideWarps; ++word) {
      for (unsigned rest = window::load_shared(flags + 8 * word); rest; rest &= rest - 1) {
        wide_window<T, D, WHOLE>(args, first + step * (32 * word + __ffs(rest) - 1), memory, warp, lane);
      }
    }
    __syncthreads();
  }
#endif
}

}  // namespace dcngen::backward
