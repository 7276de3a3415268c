// The window forward for fp32: the same stencils as for 16-bit values (window.cuh), applied by fp32 multiply-adds,
// since the tensor cores round fp32 operands to ten bits.
//
// A block computes 8x8 output pixels x 32 channels. First a thread a (pixel, group) turns offsets and masks into a
// stencil in shared memory; then every thread computes four neighbouring pixels x four channels from an input window of
// 5 x 8 pixels, and adds the far samples by a gather. A warp with many of them leaves its 16 pixels to the gather
// kernel; a small problem (`alone`) has none, and the threads gather them as they do few.
#include "forward_gather.cuh"
#include "forward_problem.cuh"

namespace dcngen::window {
namespace {

constexpr int kTile = TileGrid::SIDE, kPixels = kTile * kTile, kQuads = kPixels / 4, kChannels = 32, kThreads = 128;
constexpr int kQuadStencilBytes = 25 * 16;  // of four neighbouring pixels: weight k of pixel i is word 4 * k + i

// CHANNELS of a slice; a block computes SLICES of them.
template <int CHANNELS_>
struct Shape {
  static constexpr int CHANNELS = CHANNELS_, SLICES = kChannels / CHANNELS;
  using Tile = PixelTile<kTile + 4, kTile + 4>;
  using Span = GroupSpan<SLICES, 4>;
  static constexpr int TAPS_AT = Tile::BYTES, STENCILS_AT = TAPS_AT + kPixels * Span::PITCH;
  static constexpr int FAR_AT = STENCILS_AT + SLICES * kQuads * kQuadStencilBytes;
  static constexpr int BYTES = FAR_AT + SLICES * kPixels * 4;
  static constexpr int BY_MEMORY = 227 * 1024 / (BYTES + 1024), MIN_BLOCKS = BY_MEMORY < 6 ? BY_MEMORY : 6;
};

// Stencil and far bits of one (pixel, group) from its 27 values at `values`; `stencil_at` is the pixel's first weight.
__device__ __forceinline__ unsigned make_stencil(uint32_t values, uint32_t stencil_at, const OffsetScale& scale) {
  float stencil[5][5];
  clear_stencil(stencil);
  unsigned far = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const int k = i * 3 + j;
      const float dx = scale.displacement(__uint_as_float(load_shared(values + 8 * k)), i - 1);
      const float dy = scale.displacement(__uint_as_float(load_shared(values + 8 * k + 4)), j - 1);
      const float mask = __uint_as_float(load_shared(values + 8 * kTaps + 4 * k));
      const bool near = fabsf(dx) <= 1.f && fabsf(dy) <= 1.f;
      far |= near ? 0 : 1u << k;
      add_tap(stencil, i, j, near ? dx : 0.f, near ? dy : 0.f, near ? mask : 0.f);
    }
  }
#pragma unroll
  for (int k = 0; k < 25; ++k) store_shared(stencil_at + k * 16, __float_as_uint(stencil[k / 5][k % 5]));
  return far;
}

// sum += the far taps of output pixel (x, y), whose offsets stand at `values` in shared memory; `image` points to the
// first of four channels.
__device__ __forceinline__ void add_far(float (&sum)[4], unsigned far, const FarContext& c, uint32_t values,
                                        const float* image, int x, int y) {
#pragma unroll 1
  for (; far; far &= far - 1) {
    const int k = __ffs(far) - 1;
    const Corners corners = corners_of_tap<float>(c, x, y, k, values);
    uint4 v[4] = {};  // finite where the sample does not count
    corners.load(v, c, reinterpret_cast<const uint4*>(image));
    uint32_t weights[4];
    Blend<float>::pack(weights, corners.weight);
    Blend<float>::add(sum, weights, v);
  }
}

// Whether more than kMostFar samples a slice of the warp's 16 pixels (two rows of the tile) are far, on average.
template <typename S>
__device__ __forceinline__ bool many_far(uint32_t far_at, const ForwardTiles& p, int first_slice, int y0, int x0,
                                         int thread) {
  int count = 0;
#pragma unroll
  for (int item = thread % 32; item < 16 * S::SLICES; item += 32) {
    const int slice = item / 16, pixel = thread / 32 * 16 + item % 16;
    const bool exists =
        first_slice + slice < p.slices && y0 + pixel / kTile < p.height_out && x0 + pixel % kTile < p.width_out;
    if (exists) count += __popc(load_shared(far_at + (slice * kPixels + pixel) * 4));
  }
  return __reduce_add_sync(kAllLanes, count) > kMostFar * S::SLICES;
}

template <typename S>
__global__ void __launch_bounds__(kThreads, S::MIN_BLOCKS) forward_fp32_kernel(const __grid_constant__ ForwardTiles p,
                                                                                const bool alone) {
  extern __shared__ __align__(128) unsigned char fp32_memory[];
  using Tile = typename S::Tile;
  const uint32_t tile = smem_address(fp32_memory);
  const int thread = static_cast<int>(threadIdx.x);
  let_next_kernel_begin();
  wait_for_previous_kernel();
  const OutputTile at(p);
  const int chunk = at.chunk, x0 = at.x0, y0 = at.y0;
  const float* image =
      static_cast<const float*>(p.input) + int64_t{at.image} * p.height_in * p.width_in * p.input_stride;
  const int64_t first_output = int64_t{at.image} * p.height_out * p.width_out;
  const float* image_taps = static_cast<const float*>(p.offset_mask) + first_output * p.offset_mask_stride;
  auto output_at = [&](int64_t pixel, int channel) {
    return static_cast<float*>(p.output) + (first_output + pixel) * p.output_stride + channel;
  };

  const int first_slice = chunk * S::SLICES;
  const int first_byte = S::Span::first_byte(static_cast<int>(p.slices_per_group.divide(first_slice)));
  copy_offset_mask<typename S::Span, kThreads>(
      tile + S::TAPS_AT, reinterpret_cast<const char*>(image_taps), p.offset_mask_stride * 4, first_byte,
      p.offset_mask_bytes, kPixels, thread, [&](int q) { return at.pixel(p, q / kTile, q % kTile); });
  copy_commit();
  Tile::template copy<kThreads>(tile, image, p.height_in, p.width_in, p.input_stride, y0 - p.pad_h - 1,
                                x0 - p.pad_w - 1, chunk * kChannels, p.channels, thread);
  copy_commit();
  copy_wait<1>();
  __syncthreads();

  bool far_here = false;
#pragma unroll 1
  for (int item = thread; item < S::SLICES * kPixels; item += kThreads) {
    const int pixel = item % kPixels, slice = item / kPixels;
    const int group = static_cast<int>(p.slices_per_group.divide(first_slice + slice));
    const uint32_t values = tile + S::TAPS_AT + pixel * S::Span::PITCH + group * kGroupValues * 4 - first_byte;
    const uint32_t stencil = tile + S::STENCILS_AT + (slice * kQuads + pixel / 4) * kQuadStencilBytes + pixel % 4 * 4;
    const unsigned far = make_stencil(values, stencil, p.scale);
    store_shared(tile + S::FAR_AT + item * 4, far);
    far_here |= far != 0;
  }
  copy_wait<0>();
  const bool any_far = __syncthreads_or(far_here);

  // Four pixels of a row (a quad) x four channels.
  const int vector = thread % 8, quad = thread / 8, row = quad / 2, column = quad % 2 * 4;
  if (any_far && !alone && many_far<S>(tile + S::FAR_AT, p, first_slice, y0, x0, thread)) {
    const int64_t pixel = (y0 + thread / 32 * 2) * p.width_out + x0;  // exists, else nothing of the warp's does
    float* to = output_at(pixel, chunk * kChannels);
    if (thread % 32 == 0) *reinterpret_cast<LeftMark<float>::Word*>(to) = LeftMark<float>::VALUE;
    return;
  }
  const int slice = vector * 4 / S::CHANNELS;
  const uint32_t stencil = tile + S::STENCILS_AT + (slice * kQuads + quad) * kQuadStencilBytes;
  float sum[4][4] = {};
#pragma unroll
  for (int y = 0; y < 5; ++y) {
    float4 window[8];
#pragma unroll
    for (int x = 0; x < 8; ++x) window[x] = load_shared16f(Tile::address(tile, row + y, column + x, vector));
#pragma unroll
    for (int x = 0; x < 5; ++x) {
      const float4 weights = load_shared16f(stencil + (y * 5 + x) * 16);
      const float of_pixel[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i][0] = fmaf(of_pixel[i], window[x + i].x, sum[i][0]);
        sum[i][1] = fmaf(of_pixel[i], window[x + i].y, sum[i][1]);
        sum[i][2] = fmaf(of_pixel[i], window[x + i].z, sum[i][2]);
        sum[i][3] = fmaf(of_pixel[i], window[x + i].w, sum[i][3]);
      }
    }
  }

  if (first_slice + slice >= p.slices) return;
  const int channel = chunk * kChannels + vector * 4, oy = y0 + row;
  const int group = static_cast<int>(p.slices_per_group.divide(first_slice + slice));
  const uint4 far = load_shared16(tile + S::FAR_AT + (slice * kPixels + quad * 4) * 4);
  const unsigned far_of[4] = {far.x, far.y, far.z, far.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int ox = x0 + column + i;
    if (oy >= p.height_out || ox >= p.width_out) return;
    const int64_t pixel = oy * p.width_out + ox;
    if (far_of[i]) {
      const uint32_t values = tile + S::TAPS_AT + (row * kTile + column + i) * S::Span::PITCH - first_byte;
      add_far(sum[i], far_of[i], p.far, values + group * kGroupValues * 4, image + channel, ox, oy);
    }
    *reinterpret_cast<float4*>(output_at(pixel, channel)) =
        make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
  }
}

template <typename S>
cudaError_t launch(const ForwardArgs& args, cudaStream_t stream) {
  const ForwardTiles problem(args, S::CHANNELS, kChannels);
  const int64_t blocks = problem.blocks(args.p.batch);
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const bool alone = is_small(blocks);
  const cudaError_t error =
      launch_with_memory<forward_fp32_kernel<S>>(blocks, kThreads, S::BYTES, stream, bulk_copies(), problem, alone);
  if (error != cudaSuccess || alone) return error;
  return launch_gather<float, GatherShape<float, S::CHANNELS, S::SLICES, kTile>>(args, stream);
}

}  // namespace

cudaError_t forward_window_fp32(const ForwardArgs& args, cudaStream_t stream) {
  const int channels = args.p.group_channels;
  if (channels % 32 == 0) return launch<Shape<32>>(args, stream);
  if (channels % 16 == 0) return launch<Shape<16>>(args, stream);
  return launch<Shape<8>>(args, stream);
}

}  // namespace dcngen::window
