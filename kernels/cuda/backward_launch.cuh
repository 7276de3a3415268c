// Launches the window backward for one dtype: tensor maps, tile choice, the two kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "backward_far.cuh"
#include "backward_single.cuh"
#include "backward_sums.cuh"
#include "backward_tile.cuh"
#include "backward_wide.cuh"

namespace dcngen::backward {

struct Tile {
  int units_x, units_y;  // of 8x4 pixels
};

// The u range that tiles must cover: every input and the middle tap of every output. It begins at whole units, so that
// no unit lies across the input's upper or left edge: the copy engine does not store there.
struct Extent {
  int begin_x, begin_y, end_x, end_y;
};

inline Extent extent_of(const Params& p) {
  const int shift_x = 1 - p.pad_w, shift_y = 1 - p.pad_h;
  const auto begin = [](int shift, int unit) { return shift < 0 ? -((unit - 1 - shift) / unit * unit) : 0; };
  const auto most = [](int64_t a, int64_t b) { return static_cast<int>(a > b ? a : b); };
  return {begin(shift_x, 8), begin(shift_y, 4), most(p.width_in, p.width_out + shift_x),
          most(p.height_in, p.height_out + shift_y)};
}

inline int tiles_over(int length, int size) { return (length + size - 1) / size; }

// 8x8 for the small maps; else 16x8.
inline Tile choose_tile(const Params& p) {
  const Extent e = extent_of(p);
  return e.end_x - e.begin_x <= 8 ? Tile{1, 2} : Tile{2, 2};
}

inline int64_t count_blocks(const Params& p, Tile tile) {
  const Extent e = extent_of(p);
  return p.batch * p.groups * tiles_over(e.end_x - e.begin_x, 8 * tile.units_x) *
         int64_t{tiles_over(e.end_y - e.begin_y, 4 * tile.units_y)};
}

inline int64_t count_units(const Params& p, Tile tile) { return count_blocks(p, tile) * tile.units_x * tile.units_y; }

// How the far samples are handled.
enum class Windows {
  kNone,    // gathered, all of them
  kAround,  // 16x16 inputs around 8x8 outputs; what does not fit is gathered
  kWhole,   // one window is the map
};

inline Windows choose_windows(const Params& p) {
  // One launch more is at most 2 % of what such a problem takes with near samples alone.
  constexpr int64_t kLarge = 20000000;
  if (p.dtype == DCNGEN_FLOAT32) return Windows::kNone;
  if (p.width_in <= 16 && p.height_in <= 16) return Windows::kWhole;
  const bool large = p.batch * p.height_in * p.width_in * p.groups * p.group_channels >= kLarge;
  return large && p.group_channels >= 32 && !p.deterministic ? Windows::kAround : Windows::kNone;
}

// The workspace: of every unit 16 bits a pixel and a flag; then, where sums are asked for, of every unit a row, of every
// block of the kernel that adds them up another, and of every group a count.
struct Workspace {
  int64_t far_units, sums, partial, finished, bytes;
  int blocks;  // of a group, in sum_kernel
  Workspace(const Params& p, Tile tile, bool with_sums) {
    constexpr int64_t kBlocks = 384, kRows = 4 * kSumWarps;  // three a multiprocessor; half of what one loads at once
    const int64_t units = count_units(p, tile), row = 4 * (p.group_channels + 28);
    const int64_t wanted = kBlocks / p.groups, useful = units / p.groups / kRows;
    blocks = static_cast<int>(std::max<int64_t>(1, std::min(wanted, useful)));
    far_units = 64 * units;
    sums = (far_units + units + 15) / 16 * 16;
    partial = sums + (with_sums ? units * row : 0);
    finished = partial + (with_sums ? int64_t{p.groups} * blocks * row : 0);
    bytes = with_sums ? finished + 4 * p.groups : far_units + units;
  }
};

inline TileArgs tile_args(const BackwardArgs& args, Tile tile) {
  const Params& p = args.p;
  const Extent e = extent_of(p);
  TileArgs t;
  t.offset_mask = args.offset_mask;
  t.grad_offset_mask = args.grad_offset_mask;
  const Workspace at(p, tile, args.grad_sums != nullptr);
  auto* const workspace = static_cast<uint8_t*>(args.workspace);
  t.far_masks = static_cast<uint16_t*>(args.workspace);
  t.far_units = workspace + at.far_units;
  t.sums = args.grad_sums == nullptr ? nullptr : reinterpret_cast<float*>(workspace + at.sums);
  t.finished_sums = reinterpret_cast<uint32_t*>(workspace + at.finished);
  t.offset_mask_stride = p.offset_mask_pixel_stride;
  t.grad_offset_mask_stride = p.grad_offset_mask_pixel_stride;
  t.channels = p.offset_mask_channels;
  t.groups = p.groups;
  t.by_group = window::FastDivide(p.groups);
  t.by_tiles_x = window::FastDivide(tiles_over(e.end_x - e.begin_x, 8 * tile.units_x));
  t.by_tiles_y = window::FastDivide(tiles_over(e.end_y - e.begin_y, 4 * tile.units_y));
  t.width_out = static_cast<int>(p.width_out), t.height_out = static_cast<int>(p.height_out);
  t.width_in = static_cast<int>(p.width_in), t.height_in = static_cast<int>(p.height_in);
  t.origin_x = e.begin_x, t.origin_y = e.begin_y, t.end_x = e.end_x, t.end_y = e.end_y;
  t.shift_x = 1 - p.pad_w, t.shift_y = 1 - p.pad_h;
  t.scale = p.offset_scale;
  // Far samples that a window around the outputs holds, wherever in the 8x8 they begin; a window of the whole map, all.
  t.reach = choose_windows(p) == Windows::kWhole ? 1e30f : 4.f;
  return t;
}

// Maps for tiles with halo of pitch x rows pixels, `row_channels` channels a shared-memory row; results leave by units.
inline cudaError_t encode_maps(Maps& maps, const BackwardArgs& args, int row_channels, int pitch, int rows) {
  const Params& p = args.p;
  const int64_t channels = int64_t{p.groups} * p.group_channels, numbers = 27 * int64_t{p.groups};
  const window::PixelTensor tensors[4] = {
      window::input_pixels(p, args.input, channels, p.input_pixel_stride),
      window::output_pixels(p, args.grad_output, channels, p.output_pixel_stride),
      window::output_pixels(p, args.offset_mask, numbers, p.offset_mask_pixel_stride),
      window::input_pixels(p, args.grad_input, channels, p.grad_input_pixel_stride)};
  const window::Box boxes[4] = {{row_channels, pitch, rows, true},
                                {row_channels, pitch, rows, true},
                                {32, pitch, rows, true},
                                {row_channels, 8, 4, true}};
  CUtensorMap* maps_of[4] = {&maps.input, &maps.grad_output, &maps.offset_mask, &maps.grad_input};
  for (int i = 0; i < 4; ++i) {
    const cudaError_t error = window::encode_box_map(*maps_of[i], tensors[i], boxes[i]);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Launches one instance of a tile kernel whose sizes are Shape's.
template <typename Shape, auto KERNEL>
cudaError_t launch_kernel(int row_channels, const BackwardArgs& args, const TileArgs& tile, int64_t blocks,
                          cudaStream_t stream) {
  Maps maps;
  const cudaError_t error = encode_maps(maps, args, row_channels, Shape::kPitch, Shape::kRows);
  if (error != cudaSuccess) return error;
  return launch_with_memory<KERNEL>(blocks, Shape::kThreads, Shape::kShared, stream, false, maps, tile);
}

template <typename T, int D, int UNITS_X, int UNITS_Y>
cudaError_t launch_tile(const BackwardArgs& args, const TileArgs& tile, cudaStream_t stream) {
  const int64_t blocks = count_blocks(args.p, {UNITS_X, UNITS_Y});
  if constexpr (sizeof(T) == 4) {
    using Shape = SingleShape<D, UNITS_X, UNITS_Y>;
    return launch_kernel<Shape, single_tile_kernel<D, UNITS_X, UNITS_Y>>(Shape::kRowChannels, args, tile, blocks,
                                                                         stream);
  } else {
    using Shape = TileShape<D, UNITS_X, UNITS_Y>;
    return tile.sums == nullptr
               ? launch_kernel<Shape, tile_kernel<T, D, UNITS_X, UNITS_Y, false>>(D, args, tile, blocks, stream)
               : launch_kernel<Shape, tile_kernel<T, D, UNITS_X, UNITS_Y, true>>(D, args, tile, blocks, stream);
  }
}

inline int log2(int power_of_two) {
  int log = 0;
  while (1 << log < power_of_two) ++log;
  return log;
}

template <auto KERNEL, int WARPS>
cudaError_t launch_far_kernel(FarArgs far, cudaStream_t stream) {
  const auto shares = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  const int64_t most = window::multiprocessors();  // blocks
  const int64_t turns = shares(far.units, far.units_per_warp), warps = shares(turns, most);
  far.warps = static_cast<int>(warps < WARPS ? warps : WARPS);
  const int64_t wanted = shares(turns, far.warps);
  static OncePerDevice prepared;
  const cudaError_t error = prepared.run([] {
    // A multiprocessor splits its memory between shared memory and cache anew only while it is idle. Unless the split is
    // asked for, blocks that start while the kernel before ends keep the small cache that it left.
    return cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxL1);
  });
  if (error != cudaSuccess) return error;
  constexpr int kBytes = WARPS * kMostUnits * kUnitSamples * 2;
  return launch_with_memory<KERNEL>(wanted < most ? wanted : most, 32 * WARPS, kBytes, stream, true, far);
}

template <typename T, int D>
cudaError_t launch_far(const FarArgs& far, cudaStream_t stream) {
  if (!far.p.deterministic) return launch_far_kernel<far_kernel<T, D, true>, kFarWarps<T>>(far, stream);
  const cudaError_t error = launch_far_kernel<far_kernel<T, D, false>, kFarWarps<T>>(far, stream);
  if (error != cudaSuccess) return error;
  return launch(far_owner_kernel<T, D>, far.p.batch * far.p.groups, D, 0, stream, false, far);
}

template <typename T, int D, bool WHOLE>
cudaError_t launch_wide(const FarArgs& far, cudaStream_t stream) {
  using Shape = WideShape<D>;
  const int64_t windows = WideWindow<WHOLE>::count(far), most = window::multiprocessors() * Shape::kBlocks;
  return launch_with_memory<wide_kernel<T, D, WHOLE>>(windows < most ? windows : most, kWideThreads,
                                                      Shape::kShared, stream, true, far);
}

// A gather's time goes by samples and channels, that of products over a window does not. By measurement: the far
// samples in reach, of 8x8 outputs, from which on products are faster. A
// reproducible result takes products on small maps.
inline int few_samples(const Params& p, Windows windows) {
  if (windows == Windows::kWhole) return p.deterministic ? 0 : 6400 / p.group_channels;
  return 8192 / p.group_channels;
}

inline FarArgs far_args(const BackwardArgs& args, const TileArgs& tile, Tile shape) {
  constexpr int64_t kFewUnits = 8192;  // one each keeps more warps busy
  const int64_t units = count_units(args.p, shape);
  return {tile, args.p, args.grad_output, args.input, args.grad_input, log2(shape.units_x),
          log2(shape.units_x * shape.units_y), units < kFewUnits ? 1 : kMostUnits, 0,
          few_samples(args.p, choose_windows(args.p)), units};
}

template <typename T, int D>
cudaError_t launch_for_far(const FarArgs& far, cudaStream_t stream) {
  const Params& p = far.p;
  const Windows windows = choose_windows(p);
  if constexpr (sizeof(T) == 2) {
    if (windows == Windows::kWhole) return launch_wide<T, D, true>(far, stream);
    if constexpr (D >= 32) {
      const cudaError_t error =
          windows == Windows::kAround ? launch_wide<T, D, false>(far, stream) : cudaSuccess;
      if (error != cudaSuccess) return error;
    }
  }
  return launch_far<T, D>(far, stream);
}

template <typename T, int D>
cudaError_t launch_sums(const BackwardArgs& args, const FarArgs& far, Tile shape, cudaStream_t stream) {
  const Workspace at(args.p, shape, true);
  float* const partial = reinterpret_cast<float*>(static_cast<uint8_t*>(args.workspace) + at.partial);
  const SumArgs sums{far, partial, args.grad_sums, static_cast<int>(far.units / args.p.groups), at.blocks};
  return launch(sum_kernel<T, D>, int64_t{args.p.groups} * at.blocks, 32 * kSumWarps, 0, stream, true, sums);
}

template <typename T, int D>
cudaError_t launch_all(const BackwardArgs& args, Tile shape, cudaStream_t stream) {
  const TileArgs tile = tile_args(args, shape);
  cudaError_t error = shape.units_x == 1 ? launch_tile<T, D, 1, 2>(args, tile, stream)
                                         : launch_tile<T, D, 2, 2>(args, tile, stream);
  if (error != cudaSuccess) return error;
  const FarArgs far = far_args(args, tile, shape);
  error = launch_for_far<T, D>(far, stream);
  if constexpr (sizeof(T) == 2) {
    if (error == cudaSuccess && tile.sums != nullptr) error = launch_sums<T, D>(args, far, shape, stream);
  }
  return error;
}

// Shared memory that the larger tile takes; some architectures have less than sm_90.
template <typename T>
int shared_bytes(int group_channels) {
  const auto of = [](auto half, auto single) {
    return sizeof(T) == 4 ? decltype(single)::kShared : decltype(half)::kShared;
  };
  switch (group_channels) {
    case 16: return of(TileShape<16, 2, 2>{}, SingleShape<16, 2, 2>{});
    case 32: return of(TileShape<32, 2, 2>{}, SingleShape<32, 2, 2>{});
    default: return of(TileShape<64, 2, 2>{}, SingleShape<64, 2, 2>{});
  }
}

template <typename T>
cudaError_t backward_typed(const BackwardArgs& args, Tile shape, cudaStream_t stream) {
  switch (args.p.group_channels) {
    case 16: return launch_all<T, 16>(args, shape, stream);
    case 32: return launch_all<T, 32>(args, shape, stream);
    default: return launch_all<T, 64>(args, shape, stream);
  }
}

cudaError_t backward_fp16(const BackwardArgs& args, Tile shape, cudaStream_t stream);
cudaError_t backward_bf16(const BackwardArgs& args, Tile shape, cudaStream_t stream);
cudaError_t backward_fp32(const BackwardArgs& args, Tile shape, cudaStream_t stream);

}  // namespace dcngen::backward
