// The window forward's second kernel: the pixels that the first one left because many of their samples are far.
//
// A warp takes one unit: 16 pixels x 128 bytes of channels. A lane gathers 16 bytes of a pixel, the lanes of a pixel
// a whole line of the first-level cache, which gets most of a multiprocessor's memory. Each sample's place is computed
// once and shared by the lanes of its group. A unit that the first kernel did not leave costs one read of the output.
#pragma once

#include "forward_bulk.cuh"
#include "forward_far.cuh"

namespace dcngen::window {

struct ForwardGather {
  const void* input;
  const void* offset_mask;
  void* output;
  int64_t input_stride, offset_mask_stride, output_stride;  // elements from pixel to pixel
  int64_t height_width_in;                                  // pixels of an image
  int height_out, width_out, slices, offset_mask_bytes;
  uint32_t units;
  FarContext far;
  FastDivide slices_per_group, chunks, units_x, units_y;
};

// The sum over four corners of 16 bytes of channels.
template <typename T>
struct Blend;

// One sample in pairs of halves with weights rounded as those of the stencils are; samples are added in fp32.
template <>
struct Blend<__half> {
  using Weights = uint2;
  static constexpr int VALUES = 8;
  static __device__ __forceinline__ void store(uint32_t to, const float (&w)[4]) {
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(to), "r"(Dtype<__half>::pack(w[0], w[1])),
                 "r"(Dtype<__half>::pack(w[2], w[3]))
                 : "memory");
  }
  static __device__ __forceinline__ Weights load(uint32_t from) {
    Weights v;
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
    return v;
  }
  static __device__ __forceinline__ __half2 half2(uint32_t word) { return *reinterpret_cast<const __half2*>(&word); }
  static __device__ __forceinline__ void add(float (&sum)[8], const Weights& w, const uint4 (&v)[4]) {
    const __half2 upper = half2(w.x), lower = half2(w.y);
    const uint32_t corners[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w},
                                    {v[1].x, v[1].y, v[1].z, v[1].w},
                                    {v[2].x, v[2].y, v[2].z, v[2].w},
                                    {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      __half2 s = __hmul2(__low2half2(upper), half2(corners[0][i]));
      s = __hfma2(__high2half2(upper), half2(corners[1][i]), s);
      s = __hfma2(__low2half2(lower), half2(corners[2][i]), s);
      s = __hfma2(__high2half2(lower), half2(corners[3][i]), s);
      sum[2 * i] += __low2float(s);
      sum[2 * i + 1] += __high2float(s);
    }
  }
};

struct FloatWeights {
  using Weights = float4;
  static __device__ __forceinline__ void store(uint32_t to, const float (&w)[4]) {
    store_shared16f(to, {w[0], w[1], w[2], w[3]});
  }
  static __device__ __forceinline__ Weights load(uint32_t from) { return load_shared16f(from); }
};

// bf16 has too few bits for sums of corners: fp32.
template <>
struct Blend<__nv_bfloat16> : FloatWeights {
  static constexpr int VALUES = 8;
  static __device__ __forceinline__ void add(float (&sum)[8], const Weights& w, const uint4 (&v)[4]) {
    const float weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const uint32_t words[4] = {v[corner].x, v[corner].y, v[corner].z, v[corner].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] = fmaf(weights[corner], Dtype<__nv_bfloat16>::low(words[i]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(weights[corner], Dtype<__nv_bfloat16>::high(words[i]), sum[2 * i + 1]);
      }
    }
  }
};

template <>
struct Blend<float> : FloatWeights {
  static constexpr int VALUES = 4;
  static __device__ __forceinline__ void add(float (&sum)[4], const Weights& w, const uint4 (&v)[4]) {
    const float weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const uint32_t words[4] = {v[corner].x, v[corner].y, v[corner].z, v[corner].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(weights[corner], __uint_as_float(words[i]), sum[i]);
    }
  }
};

template <typename T>
__device__ __forceinline__ uint4 pack_result(const float (&v)[Blend<T>::VALUES]) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  } else {
    using D = Dtype<T>;
    return make_uint4(D::pack(v[0], v[1]), D::pack(v[2], v[3]), D::pack(v[4], v[5]), D::pack(v[6], v[7]));
  }
}

// A unit is UNIT_W x 16 / UNIT_W pixels and SLICES slices of CHANNELS channels, as the first kernel's warps have them.
template <typename T, int CHANNELS_, int SLICES_, int UNIT_W_>
struct GatherShape {
  static constexpr int CHANNELS = CHANNELS_, SLICES = SLICES_, UNIT_W = UNIT_W_, UNIT_H = 16 / UNIT_W;
  static constexpr int VALUES = Blend<T>::VALUES, LANES = CHANNELS * SLICES / VALUES;  // of a pixel
  static constexpr int PIXELS = 32 / LANES;                                            // of one load
  static constexpr int STEP_PIXELS = PIXELS * SLICES < 8 ? 8 / SLICES : PIXELS;  // whose places are kept at a time
  static constexpr int PAIRS = STEP_PIXELS * SLICES, PAIR_LANES = 32 / PAIRS;    // lanes that compute a pair's places
  using Span = GroupSpan<SLICES, static_cast<int>(sizeof(T))>;
  static constexpr int WEIGHT_BYTES = sizeof(typename Blend<T>::Weights);
  static constexpr int FIRSTS_AT = PAIRS * kTaps * WEIGHT_BYTES, TAPS_AT = FIRSTS_AT + PAIRS * kTaps * 4;
  static constexpr int WARP_BYTES = TAPS_AT + STEP_PIXELS * Span::PITCH;
  // Warps of a block at most; the launch takes fewer where the device has not the memory. Beside theirs, the list.
  static constexpr int WARPS = WARP_BYTES > 4096 ? 16 : 32, THREADS = WARPS * 32, LIST_BYTES = THREADS * 4 + 128;
  static_assert(PAIRS <= 32 && WARP_BYTES % 16 == 0, "a lane computes places of one pair, and loads are aligned");
};

constexpr uint32_t kNoPlace = ~0u;  // of samples that do not count: on small maps a good part of them

// Where a unit lies.
struct GatherUnit {
  int chunk, x0, y0, image;
};
template <typename Shape>
__device__ __forceinline__ GatherUnit locate_unit(const ForwardGather& p, uint32_t rest) {
  GatherUnit unit;
  unit.x0 = static_cast<int>(p.units_x.split(rest)) * Shape::UNIT_W;
  unit.y0 = static_cast<int>(p.units_y.split(rest)) * Shape::UNIT_H;
  unit.chunk = static_cast<int>(p.chunks.split(rest));
  unit.image = static_cast<int>(rest);
  return unit;
}

// Places of STEP_PIXELS pixels from `first_pixel` of the unit on, in shared memory at `own`.
template <typename T, typename Shape>
__device__ __forceinline__ void store_places(const ForwardGather& p, const GatherUnit& unit, int first_pixel,
                                             uint32_t own, int lane) {
  const T* taps =
      static_cast<const T*>(p.offset_mask) + int64_t{unit.image} * p.height_out * p.width_out * p.offset_mask_stride;
  const int first_slice = unit.chunk * Shape::SLICES;
  const int first_byte = Shape::Span::first_byte(static_cast<int>(p.slices_per_group.divide(first_slice)));
  copy_offset_mask<typename Shape::Span, 32>(
      own + Shape::TAPS_AT, reinterpret_cast<const char*>(taps), p.offset_mask_stride * static_cast<int>(sizeof(T)),
      first_byte, p.offset_mask_bytes, Shape::STEP_PIXELS, lane, [&](int q) {
        const int x = unit.x0 + (first_pixel + q) % Shape::UNIT_W, y = unit.y0 + (first_pixel + q) / Shape::UNIT_W;
        return y < p.height_out && x < p.width_out ? y * p.width_out + x : -1;
      });
  copy_commit();
  copy_wait<0>();
  __syncwarp();
  const int pair = lane / Shape::PAIR_LANES, pixel = pair / Shape::SLICES, slice = first_slice + pair % Shape::SLICES;
  const int group = static_cast<int>(p.slices_per_group.divide(slice));
  const int x = unit.x0 + (first_pixel + pixel) % Shape::UNIT_W, y = unit.y0 + (first_pixel + pixel) / Shape::UNIT_W;
  constexpr int VALUE = sizeof(T);
  const uint32_t values = own + Shape::TAPS_AT + pixel * Shape::Span::PITCH + group * kGroupValues * VALUE - first_byte;
#pragma unroll
  for (int round = 0; round < (kTaps + Shape::PAIR_LANES - 1) / Shape::PAIR_LANES; ++round) {
    const int k = round * Shape::PAIR_LANES + lane % Shape::PAIR_LANES, place = pair * kTaps + k;
    if (k >= kTaps) break;
    const Corners corners(p.far, place_x(p.far, x, k, load_value<T>(values + 2 * k * VALUE)),
                          place_y(p.far, y, k, load_value<T>(values + (2 * k + 1) * VALUE)),
                          load_value<T>(values + (2 * kTaps + k) * VALUE));
    Blend<T>::store(own + place * Shape::WEIGHT_BYTES, corners.weight);
    store_shared(own + Shape::FIRSTS_AT + place * 4, corners.counts ? corners.first : kNoPlace);
  }
  __syncwarp();
}

template <typename T, typename Shape>
__device__ __forceinline__ void gather_unit(const ForwardGather& p, const GatherUnit& unit, uint32_t own, int lane) {
  const int in_unit = lane % Shape::LANES * Shape::VALUES, slice = in_unit / Shape::CHANNELS;
  const int channel = unit.chunk * Shape::SLICES * Shape::CHANNELS + in_unit;
  const bool has_channels = unit.chunk * Shape::SLICES + slice < p.slices;
  const uint4* image = reinterpret_cast<const uint4*>(
      static_cast<const T*>(p.input) + unit.image * p.height_width_in * p.input_stride + (has_channels ? channel : 0));
  T* output = static_cast<T*>(p.output) + int64_t{unit.image} * p.height_out * p.width_out * p.output_stride + channel;
#pragma unroll 1
  for (int first_pixel = 0; first_pixel < 16; first_pixel += Shape::STEP_PIXELS) {
    store_places<T, Shape>(p, unit, first_pixel, own, lane);
#pragma unroll 1
    for (int in_step = lane / Shape::LANES; in_step < Shape::STEP_PIXELS; in_step += Shape::PIXELS) {
      const int place = (in_step * Shape::SLICES + slice) * kTaps;
      float sum[Shape::VALUES] = {};
#pragma unroll 1
      for (int k = 0; k < kTaps; ++k) {
        const uint32_t first = load_shared(own + Shape::FIRSTS_AT + (place + k) * 4);
        if (first == kNoPlace) continue;
        const uint4* from = image + first;
        const auto weights = Blend<T>::load(own + (place + k) * Shape::WEIGHT_BYTES);
        const uint4 corners[4] = {load_global16(from), load_global16(from + p.far.pixel_pieces),
                                  load_global16(from + p.far.row_pieces),
                                  load_global16(from + p.far.row_pieces + p.far.pixel_pieces)};
        Blend<T>::add(sum, weights, corners);
      }
      const int q = first_pixel + in_step, x = unit.x0 + q % Shape::UNIT_W, y = unit.y0 + q / Shape::UNIT_W;
      if (has_channels && y < p.height_out && x < p.width_out) {
        store_global16(output + (int64_t{y} * p.width_out + x) * p.output_stride, pack_result<T>(sum));
      }
    }
    __syncwarp();
  }
}

// The output's first value of a unit: the first kernel's mark, where it left the unit.
template <typename T, typename Shape>
__device__ __forceinline__ const T* begin_of_unit(const ForwardGather& p, uint32_t number) {
  const GatherUnit unit = locate_unit<Shape>(p, number);
  const int64_t pixel = int64_t{unit.image} * p.height_out * p.width_out + unit.y0 * p.width_out + unit.x0;
  return static_cast<const T*>(p.output) + pixel * p.output_stride + unit.chunk * Shape::SLICES * Shape::CHANNELS;
}

// Spans of 32 neighbouring units go to the blocks in turn: neighbours share most of what they read, and a region with
// many far samples is spread over the multiprocessors. A block lists its units that were left; its warps take them from
// the list, so that none waits for another with more to do.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) forward_gather_kernel(const __grid_constant__ ForwardGather p) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  __shared__ uint32_t list[Shape::THREADS];
  __shared__ int length, next;
  using Mark = LeftMark<T>;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  const uint32_t own = smem_address(shared_memory) + warp * Shape::WARP_BYTES;
  // A thread's units: one of every `step`. Where the mark stands is worked out ahead of the wait.
  const uint32_t step = gridDim.x * blockDim.x;
  uint32_t number = (blockIdx.x + gridDim.x * warp) * 32 + lane;
  const T* begin = begin_of_unit<T, Shape>(p, number);
  if (threadIdx.x == 0) length = next = 0;
  let_next_kernel_begin();
  wait_for_previous_kernel();
  for (uint32_t first = blockIdx.x * 32; first < p.units; first += step, number += step) {
    if (first != blockIdx.x * 32) begin = begin_of_unit<T, Shape>(p, number);
    const bool left = number < p.units && __ldcg(reinterpret_cast<const typename Mark::Word*>(begin)) == Mark::VALUE;
    if (!__syncthreads_or(left)) continue;
    const unsigned lanes = __ballot_sync(kAllLanes, left);
    int at = 0;
    if (lane == 0 && lanes != 0) at = atomicAdd(&length, __popc(lanes));
    at = __shfl_sync(kAllLanes, at, 0) + __popc(lanes & ((1u << lane) - 1));
    if (left) list[at] = number;
    __syncthreads();
    for (;;) {
      if (lane == 0) at = atomicAdd(&next, 1);
      at = __shfl_sync(kAllLanes, at, 0);
      if (at >= length) break;
      gather_unit<T, Shape>(p, locate_unit<Shape>(p, list[at]), own, lane);
    }
    __syncthreads();
    if (threadIdx.x == 0) length = next = 0;
  }
}

// Multiprocessors of the current device and the shared memory that a block may have; forward_window.cu.
struct DeviceLimits {
  int multiprocessors, shared_bytes;
};
DeviceLimits device_limits();

template <typename T, typename Shape>
cudaError_t launch_gather(const ForwardArgs& args, cudaStream_t stream) {
  const Params& p = args.p;
  ForwardGather gather;
  gather.input = args.input;
  gather.offset_mask = args.offset_mask;
  gather.output = args.output;
  gather.input_stride = p.input_pixel_stride;
  gather.offset_mask_stride = p.offset_mask_pixel_stride;
  gather.output_stride = p.output_pixel_stride;
  gather.height_width_in = p.height_in * p.width_in;
  gather.height_out = static_cast<int>(p.height_out);
  gather.width_out = static_cast<int>(p.width_out);
  const int channels = p.groups * p.group_channels, unit_channels = Shape::CHANNELS * Shape::SLICES;
  gather.slices = channels / Shape::CHANNELS;
  gather.offset_mask_bytes = p.offset_mask_channels * static_cast<int>(sizeof(T));
  const int chunks = (channels + unit_channels - 1) / unit_channels;
  const int units_x = (gather.width_out + Shape::UNIT_W - 1) / Shape::UNIT_W;
  const int units_y = (gather.height_out + Shape::UNIT_H - 1) / Shape::UNIT_H;
  gather.units = static_cast<uint32_t>(p.batch * chunks * units_x * units_y);
  gather.far = FarContext(p);
  gather.slices_per_group = FastDivide(p.group_channels / Shape::CHANNELS);
  gather.chunks = FastDivide(chunks);
  gather.units_x = FastDivide(units_x);
  gather.units_y = FastDivide(units_y);

  const auto kernel = forward_gather_kernel<T, Shape>;
  const DeviceLimits limits = device_limits();
  const int fitting = (limits.shared_bytes - Shape::LIST_BYTES) / Shape::WARP_BYTES;
  const int warps = fitting < Shape::WARPS ? fitting : Shape::WARPS, bytes = warps * Shape::WARP_BYTES;
  static OncePerDevice prepared;
  const cudaError_t error = prepared.run([&] {
    // Asked for, else blocks that start while the first kernel ends keep its split of cache and shared memory.
    const cudaError_t split =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxL1);
    if (split != cudaSuccess) return split;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  });
  if (error != cudaSuccess) return error;
  const int64_t spans = (gather.units + 31) / 32, most = limits.multiprocessors;
  return launch(kernel, spans < most ? spans : most, warps * 32, bytes, stream, bulk_copies(), gather);
}

}  // namespace dcngen::window
