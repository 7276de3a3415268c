// Whether the window forward applies, and its launch.
#include "forward_launch.cuh"

namespace dcngen {
namespace {

// How many blocks a launch needs at most: tiles of 8x8 pixels x 32 channels.
int64_t most_blocks(const Params& p) {
  const int64_t tiles = ((p.height_out + 7) / 8) * ((p.width_out + 7) / 8);
  return p.batch * tiles * ((int64_t{p.groups} * p.group_channels + 31) / 32);
}

}  // namespace

int window::multiprocessors() {
  static NumberPerDevice known;
  const int number = known.get([](int device) {
    int count = 0;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
  });
  return number > 0 ? number : 1;
}

bool forward_window_applies(const Params& p) {
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
  return plain_3x3(p) && vectors && addressable && 5 * most_blocks(p) < int64_t{1} << 31;
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
