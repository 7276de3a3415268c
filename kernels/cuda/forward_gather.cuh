// The window forward's second kernel: the pixels that the first one left because many of their samples are far.
//
// A warp takes one unit: 16 pixels x 128 bytes of channels. A lane gathers 16 bytes of a pixel, the lanes of a pixel
// a whole line of the first-level cache, which gets most of a multiprocessor's memory. Each sample's place is computed
// once and shared by the lanes of its group. A unit that the first kernel did not leave costs one read of the output.
#pragma once

#include "forward_problem.cuh"
#include "forward_samples.cuh"

namespace dcngen::window {

constexpr int kStripUnits = 8;

struct ForwardGather : ForwardProblem {
  int64_t image_bytes, image_taps_bytes, image_output_bytes;
  uint32_t pixel_taps_bytes, pixel_output_bytes;  // from pixel to pixel
  uint32_t units;
  GatherContext far;
  FastDivide strip, units_y, strips;

  ForwardGather(const ForwardArgs& args, int slice_channels, int unit_channels, int unit_w, int unit_h);
};

// A unit is UNIT_W x 16 / UNIT_W pixels and SLICES slices of CHANNELS channels, as the first kernel's warps have them.
// SKIP: asks before each load whether any of its samples counts.
template <typename T, int CHANNELS_, int SLICES_, int UNIT_W_, bool SKIP_ = false>
struct GatherShape {
  static constexpr bool SKIP = SKIP_;
  using Skipping = GatherShape<T, CHANNELS_, SLICES_, UNIT_W_, true>;
  static constexpr int CHANNELS = CHANNELS_, SLICES = SLICES_, UNIT_W = UNIT_W_, UNIT_H = 16 / UNIT_W;
  static constexpr int VALUES = Blend<T>::VALUES, LANES = CHANNELS * SLICES / VALUES;  // of a pixel
  static constexpr int PIXELS = 32 / LANES;                                            // of one load
  static constexpr int PAIR_LANES = CHANNELS / VALUES;  // of a (pixel, group): they share its nine places
  using Span = GroupSpan<SLICES, static_cast<int>(sizeof(T))>;
  // Of a pixel in shared memory: lanes without a ninth tap read one beyond its values, and use nothing of it. No
  // multiple of 128 bytes, so that the pixels of a load lie in different banks.
  static constexpr int TAPS_READ = (kTaps + PAIR_LANES - 1) / PAIR_LANES * PAIR_LANES, VALUE = sizeof(T);
  static constexpr int VALUES_READ = (SLICES - 1) * kGroupValues + 2 * kTaps + TAPS_READ;
  static constexpr int PIECES = (VALUES_READ * VALUE + 31 - VALUE) / 16;
  static constexpr int PITCH = (PIECES % 8 == 0 ? PIECES + 1 : PIECES) * 16, WARP_BYTES = PIXELS * PITCH;
  static constexpr int WARPS = LANES < 8 ? 16 : 32, THREADS = WARPS * 32;
  static_assert(PIECES >= Span::NEEDED, "what is copied fits");
};

// Where a unit lies. A map is cut into strips at most eight units wide, so that units with neighbouring numbers cover a
// compact region: what their samples share is then small enough for the first-level cache.
struct GatherUnit {
  int chunk, x0, y0, image;
};
template <typename Shape>
__device__ __forceinline__ GatherUnit locate_unit(const ForwardGather& p, uint32_t rest) {
  GatherUnit unit;
  const uint32_t in_strip = p.strip.split(rest);
  unit.y0 = static_cast<int>(p.units_y.split(rest)) * Shape::UNIT_H;
  unit.x0 = static_cast<int>(p.strips.split(rest) * p.strip.divisor + in_strip) * Shape::UNIT_W;
  unit.chunk = static_cast<int>(p.chunks.split(rest));
  unit.image = static_cast<int>(rest);
  return unit;
}

// A lane's part in copying the offsets and masks of a unit's pixels: 16-byte pieces of every PER-th pixel.
template <typename Shape>
struct TapsCopy {
  using Span = typename Shape::Span;
  static constexpr int PIECE_LANES = Span::NEEDED <= 4 ? 4 : Span::NEEDED <= 8 ? 8 : 16, PER = 32 / PIECE_LANES;
  static constexpr int PARTS = (Span::NEEDED + PIECE_LANES - 1) / PIECE_LANES;
  static_assert(Shape::UNIT_W % PER == 0, "the lanes' pixels lie in one row");
  const char* from;  // the lane's piece of the unit's first pixel, or of that pixel's neighbour
  uint32_t to;
  int piece, bytes;  // bytes of a pixel from the piece on

  __device__ __forceinline__ TapsCopy(const ForwardGather& p, const GatherUnit& unit, int first_byte, uint32_t own,
                                      int lane)
      : piece(lane % PIECE_LANES), bytes(p.offset_mask_bytes - first_byte - piece * 16) {
    const int q = lane / PIECE_LANES;
    const uint32_t pixel = static_cast<uint32_t>(unit.y0) * p.width_out + unit.x0 + q;
    from = static_cast<const char*>(p.offset_mask) + unit.image * p.image_taps_bytes +
           uint64_t{pixel} * p.pixel_taps_bytes + first_byte + piece * 16;
    to = own + q * Shape::PITCH + piece * 16;
    // Columns beyond the map are not there, as are bytes beyond the pixel.
    columns = p.width_out - unit.x0 - q;
  }
  // Begins copying the pixels of one load from `first_pixel` of the unit on.
  __device__ __forceinline__ void begin(const ForwardGather& p, const GatherUnit& unit, int first_pixel) const {
    const int column = first_pixel % Shape::UNIT_W, row = first_pixel / Shape::UNIT_W;
    const char* pixel = from + uint64_t{static_cast<uint32_t>(row * p.width_out + column)} * p.pixel_taps_bytes;
#pragma unroll
    for (int q = 0; q < Shape::PIXELS; q += PER) {
      const bool exists =
          column + q % Shape::UNIT_W < columns && unit.y0 + row + q / Shape::UNIT_W < p.height_out;
      const char* at = pixel + uint64_t{static_cast<uint32_t>(q / Shape::UNIT_W * p.width_out + q % Shape::UNIT_W)} *
                                   p.pixel_taps_bytes;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        if (piece + part * PIECE_LANES >= Span::NEEDED) break;
        copy_async16(to + q * Shape::PITCH + part * PIECE_LANES * 16, at + part * PIECE_LANES * 16,
                     exists && part * PIECE_LANES * 16 < bytes);
      }
    }
    copy_commit();
  }

 private:
  int columns;
};

// The sum over a lane's nine samples.
template <typename T, typename Shape>
__device__ __forceinline__ void gather_pixel(float (&sum)[Shape::VALUES], const GatherContext& c, LaneTaps lane,
                                             const LaneImage& image) {
  constexpr int kLanes = Shape::PAIR_LANES, kRun = kLanes < 4 ? kLanes : 4;  // longer runs would spill registers
  uint4 corners[4] = {};  // finite, whatever the registers held, where samples do not count
  auto add = [&](const Sample<T>& sample) {
    if (Shape::SKIP && !__any_sync(kAllLanes, sample.pixel != kNoPixel)) return;
    image.load(corners, sample.pixel);
    Blend<T>::add(sum, sample.weights, corners);
  };
  Sample<T> own;
  own.template place<kLanes>(c, lane);
#pragma unroll 1
  for (int first = 0; first < kTaps - 1; first += kRun) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const Sample<T> sample = own.template of_lane<kLanes>(kRun < kLanes ? first % kLanes + i : i);
      if (kRun == kLanes && i + 1 == kRun) own.template place<kLanes>(c, lane);
      add(sample);
    }
  }
  if (kRun < kLanes) own.template place<kLanes>(c, lane);
  add(own.template of_lane<kLanes>(0));
}

template <typename T, typename Shape>
__device__ __forceinline__ void gather_unit(const ForwardGather& p, const GatherUnit& unit, uint32_t own, int lane) {
  constexpr int VALUE = sizeof(T);
  const int first_slice = unit.chunk * Shape::SLICES, in_pixel = lane % Shape::LANES * Shape::VALUES;
  const int slice = first_slice + in_pixel / Shape::CHANNELS, lane_pixel = lane / Shape::LANES;
  const int byte = (first_slice * Shape::CHANNELS + in_pixel) * VALUE;
  const bool has_channels = slice < p.slices;
  LaneImage image = {static_cast<const char*>(p.input) + unit.image * p.image_bytes + (has_channels ? byte : 0),
                     p.far.pixel_bytes, p.far.next_pixel, p.far.next_row};
  asm volatile("" : "+l"(image.first));  // one value, else the compiler adds its parts at every corner
  const int first_byte = Shape::Span::first_byte(static_cast<int>(p.slices_per_group.divide(first_slice)));
  const int group = static_cast<int>(p.slices_per_group.divide(slice)), first_tap = lane % Shape::PAIR_LANES;
  const uint32_t values = own + lane_pixel * Shape::PITCH + group * kGroupValues * VALUE - first_byte;
  LaneTaps places;
  places.offsets = values + first_tap * 2 * VALUE;
  places.masks = values + (2 * kTaps + first_tap) * VALUE;
  places.tap = static_cast<float>(first_tap - kTaps / 2);
  const TapsCopy<Shape> copy(p, unit, first_byte, own, lane);
  copy.begin(p, unit, 0);
#pragma unroll 1
  for (int first_pixel = 0, next = 0; first_pixel < 16; first_pixel = next) {
    // Rows below the map are left out. Asked as a vote, by which the compiler knows that all lanes agree.
    const int next_row = unit.y0 + (first_pixel + Shape::PIXELS) / Shape::UNIT_W;
    next = __any_sync(kAllLanes, next_row < p.height_out) ? first_pixel + Shape::PIXELS : 16;
    const int q = first_pixel + lane_pixel, x = unit.x0 + q % Shape::UNIT_W, y = unit.y0 + q / Shape::UNIT_W;
    const bool exists = has_channels && y < p.height_out && x < p.width_out;
    // Where there is no pixel no sample counts, so nothing is read.
    places.centre_x = exists ? static_cast<float>(x + 1 - p.far.pad_w) : -1e30f;
    places.centre_y = static_cast<float>(y + 1 - p.far.pad_h);
    copy_wait<0>();
    __syncwarp();
    float sum[Shape::VALUES] = {};
    gather_pixel<T, Shape>(sum, p.far, places, image);
    __syncwarp();
    if (next < 16) copy.begin(p, unit, next);
    if (exists) {
      char* output = static_cast<char*>(p.output) + unit.image * p.image_output_bytes + byte;
      store_global16(output + static_cast<uint64_t>(y * p.width_out + x) * p.pixel_output_bytes, pack_result<T>(sum));
    }
  }
}

// The output's first value of a unit, the first kernel's mark where it left the unit; null where there is no such unit.
template <typename T, typename Shape>
__device__ __forceinline__ const T* begin_of_unit(const ForwardGather& p, uint32_t number) {
  const GatherUnit unit = locate_unit<Shape>(p, number);
  if (number >= p.units || unit.x0 >= p.width_out) return nullptr;
  const uint32_t pixel = static_cast<uint32_t>(unit.y0) * p.width_out + unit.x0;
  return reinterpret_cast<const T*>(static_cast<const char*>(p.output) + unit.image * p.image_output_bytes +
                                    uint64_t{pixel} * p.pixel_output_bytes) +
         unit.chunk * Shape::SLICES * Shape::CHANNELS;
}

// The units of a block that were left, a bit each, 32 a warp; warps take them in turn.
struct LeftUnits {
  uint32_t of_warp[32];
  int next;
};

// The number of the next unit that was left, counted from the block's first (32 a warp); -1 when there is none.
template <int WARPS>
__device__ __forceinline__ int take_unit(LeftUnits& units, int lane) {
  int at = 0;
  if (lane == 0) at = atomicAdd(&units.next, 1);
  at = __shfl_sync(kAllLanes, at, 0);
  const uint32_t mask = lane < WARPS ? units.of_warp[lane] : 0;
  int upto = __popc(mask);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += before;
  }
  const unsigned beyond = __ballot_sync(kAllLanes, upto > at);
  const int warp = __ffs(beyond) - 1;  // -1: there is none, and what follows is not used
  const uint32_t found = __shfl_sync(kAllLanes, mask, warp);
  const int before = __shfl_sync(kAllLanes, upto, warp) - __popc(found);
  const bool is_it = beyond != 0 && (found >> lane & 1) && __popc(found & ((1u << lane) - 1)) == at - before;
  // A reduction, so that the compiler knows the result to be equal in all lanes: a unit's values are uniform then.
  return __reduce_max_sync(kAllLanes, is_it ? warp * 32 + lane : -1);
}

// Spans of 32 neighbouring units go to the blocks in turn: neighbours share most of what they read, and a region with
// many far samples is spread over the multiprocessors. A block marks its units that were left and its warps take them
// one by one, so that none waits for another with more to do.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) forward_gather_kernel(const __grid_constant__ ForwardGather p) {
  extern __shared__ __align__(128) unsigned char gather_memory[];
  __shared__ LeftUnits units;
  using Mark = LeftMark<T>;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  const uint32_t own = smem_address(gather_memory) + warp * Shape::WARP_BYTES;
  // A thread's units: one of every `step`. Where the mark stands is worked out ahead of the wait.
  const uint32_t step = gridDim.x * blockDim.x;
  uint32_t number = (blockIdx.x + gridDim.x * warp) * 32 + lane;
  const T* begin = begin_of_unit<T, Shape>(p, number);
  if (threadIdx.x == 0) units.next = 0;
  let_next_kernel_begin();
  wait_for_previous_kernel();
  for (uint32_t first = blockIdx.x * 32; first < p.units; first += step, number += step) {
    if (first != blockIdx.x * 32) begin = begin_of_unit<T, Shape>(p, number);
    const bool left =
        begin != nullptr && __ldcg(reinterpret_cast<const typename Mark::Word*>(begin)) == Mark::VALUE;
    if (!__syncthreads_or(left)) continue;
    const unsigned mask = __ballot_sync(kAllLanes, left);
    if (lane == 0) units.of_warp[warp] = mask;
    __syncthreads();
    for (;;) {
      const int taken = take_unit<Shape::WARPS>(units, lane);
      if (taken < 0) break;
      gather_unit<T, Shape>(p, locate_unit<Shape>(p, first + (taken >> 5) * gridDim.x * 32 + (taken & 31)), own, lane);
    }
    __syncthreads();
    if (threadIdx.x == 0) units.next = 0;
  }
}

inline ForwardGather::ForwardGather(const ForwardArgs& args, int slice_channels, int unit_channels, int unit_w,
                                    int unit_h)
    : ForwardProblem(args, slice_channels, unit_channels), far(args.p), units_y(divide_up(height_out, unit_h)) {
  const Params& p = args.p;
  const int64_t value = value_bytes(p);
  image_bytes = p.height_in * p.width_in * p.input_pixel_stride * value;
  image_taps_bytes = p.height_out * p.width_out * p.offset_mask_pixel_stride * value;
  image_output_bytes = p.height_out * p.width_out * p.output_pixel_stride * value;
  pixel_taps_bytes = static_cast<uint32_t>(p.offset_mask_pixel_stride * value);
  pixel_output_bytes = static_cast<uint32_t>(p.output_pixel_stride * value);
  const int units_x = divide_up(width_out, unit_w);
  strips = FastDivide(divide_up(units_x, kStripUnits));
  strip = FastDivide(divide_up(units_x, static_cast<int>(strips.divisor)));
  units = static_cast<uint32_t>(p.batch * chunks.divisor * strips.divisor * strip.divisor * units_y.divisor);
}

template <typename T, typename Shape>
cudaError_t launch_gather(const ForwardArgs& args, cudaStream_t stream) {
  const Params& p = args.p;
  // On small maps many far samples lie outside. A load of wide groups has few (pixel, group) pairs, so often none of
  // its samples counts: asking pays up to 14x14, at 16x16 it takes more time than it saves.
  if constexpr (Shape::PAIR_LANES >= 4 && !Shape::SKIP) {
    if (p.height_in * p.width_in <= 200) return launch_gather<T, typename Shape::Skipping>(args, stream);
  }
  const ForwardGather gather(args, Shape::CHANNELS, Shape::CHANNELS * Shape::SLICES, Shape::UNIT_W, Shape::UNIT_H);
  const auto kernel = forward_gather_kernel<T, Shape>;
  constexpr int kBytes = Shape::WARPS * Shape::WARP_BYTES;
  static_assert(kBytes + sizeof(LeftUnits) <= kMostSharedBytes, "");
  static OncePerDevice prepared;
  const cudaError_t error = prepared.run([&] {
    // Asked for, else blocks that start while the first kernel ends keep its split of cache and shared memory.
    const cudaError_t split =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxL1);
    if (split != cudaSuccess) return split;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  });
  if (error != cudaSuccess) return error;
  const int64_t spans = (gather.units + 31) / 32, most = multiprocessors();
  return launch(kernel, spans < most ? spans : most, Shape::THREADS, kBytes, stream, bulk_copies(), gather);
}

}  // namespace dcngen::window
