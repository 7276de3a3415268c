// Whether the window forward applies, and its launch.
#include <atomic>

#include "forward_launch.cuh"

namespace dcngen {
namespace {

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// How many blocks a launch needs at most: tiles of 8x8 pixels x 32 channels.
int64_t most_blocks(const Params& p) {
  const int64_t tiles = ((p.height_out + 7) / 8) * ((p.width_out + 7) / 8);
  return p.batch * tiles * ((int64_t{p.groups} * p.group_channels + 31) / 32);
}

}  // namespace

window::DeviceLimits window::device_limits() {
  constexpr int kDevices = 64;
  static std::atomic<uint64_t> known[kDevices];  // 0: not asked yet; shared memory in the upper half
  int device = 0, count = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {1, 48 * 1024};
  uint64_t both = device < kDevices ? known[device].load() : 0;
  if (both == 0) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
      return {1, 48 * 1024};
    }
    both = static_cast<uint64_t>(bytes) << 32 | static_cast<uint32_t>(count);
    if (device < kDevices) known[device] = both;
  }
  return {static_cast<int>(both & 0xffffffffu), static_cast<int>(both >> 32)};
}

bool forward_window_applies(const Params& p) {
  const bool plain_3x3 = p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 &&
                         p.dilation_h == 1 && p.dilation_w == 1 && !p.remove_center && !p.softmax;
  // 16-byte accesses; all groups' offsets and masks lie in whole 16-byte pieces of a pixel.
  const int values = p.dtype == DCNGEN_FLOAT32 ? 4 : 8;
  const bool vectors = p.group_channels % 8 == 0 && p.input_pixel_stride % values == 0 &&
                       p.offset_mask_pixel_stride % values == 0 && p.output_pixel_stride % values == 0 &&
                       p.offset_mask_channels % values == 0 &&
                       p.offset_mask_channels >= window::kGroupValues * p.groups;
  // Far samples address an image in 32 bits of 16 bytes; their places are made integers by GatherCorners::kShift.
  constexpr int64_t kMost = int64_t{1} << 23, kMostStride = int64_t{1} << 28;
  const bool addressable = p.height_in * p.width_in * (p.input_pixel_stride / values) < int64_t{1} << 32 &&
                           p.height_in <= kMost && p.width_in <= kMost && p.offset_mask_pixel_stride < kMostStride &&
                           p.output_pixel_stride < kMostStride && p.input_pixel_stride < kMostStride;
  // A block is at most four units of the gather kernel, which numbers up to an eighth more than there are.
  return plain_3x3 && vectors && addressable && 5 * most_blocks(p) < int64_t{1} << 31;
}

cudaError_t forward_window(const ForwardArgs& args, cudaStream_t stream) {
  // Slices of wider tensors may begin anywhere.
  if (!aligned16(args.input) || !aligned16(args.offset_mask) || !aligned16(args.output)) {
    return forward_plain(args, stream);
  }
  if (args.p.dtype == DCNGEN_FLOAT32) return window::forward_window_fp32(args, stream);
  return args.p.dtype == DCNGEN_FLOAT16 ? window::forward_window_typed<__half>(args, stream)
                                        : window::forward_window_typed<__nv_bfloat16>(args, stream);
}

}  // namespace dcngen
