// Whether the window backward applies, and its launch. See backward_tile.cuh for the method.
#include "backward_launch.cuh"

namespace dcngen {
namespace {

// The bulk copy engine needs a device and code of sm_90, a tile its shared memory. All devices of a machine are taken
// to be alike.
bool device_fits(const Params& p) {
  static const int available = [] {
    int device = 0, bytes = 0;
    const bool known =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
    return known && window::bulk_copies() ? bytes : 0;
  }();
  return available >= (p.dtype == DCNGEN_FLOAT32 ? backward::shared_bytes<float>(p.group_channels)
                                                 : backward::shared_bytes<__half>(p.group_channels));
}

}  // namespace

bool backward_window_applies(const Params& p) {
  const int vector = p.dtype == DCNGEN_FLOAT32 ? 4 : 8;  // elements in 16 bytes
  const bool width = p.group_channels == 16 || p.group_channels == 32 || p.group_channels == 64;
  const bool vectors = p.input_pixel_stride % vector == 0 && p.offset_mask_pixel_stride % vector == 0 &&
                       p.output_pixel_stride % vector == 0 && p.grad_input_pixel_stride % vector == 0 &&
                       p.grad_offset_mask_pixel_stride % vector == 0;
  const bool outputs = p.height_out > 0 && p.width_out > 0;  // the copy engine knows no empty tensor
  if (!plain_3x3(p) || !width || !vectors || !outputs) return false;
  return backward::count_blocks(p, backward::choose_tile(p)) < int64_t{1} << 30 && device_fits(p);
}

int64_t backward_window_workspace(const Params& p, bool with_sums) {
  return backward::Workspace(p, backward::choose_tile(p), with_sums).bytes;
}

bool backward_window_sums(const Params& p) {
  return p.dtype != DCNGEN_FLOAT32 && p.batch > 0 && p.height_in > 0 && p.width_in > 0;
}

cudaError_t backward_window(const BackwardArgs& args, cudaStream_t stream) {
  const void* pointers[] = {args.grad_output, args.input, args.offset_mask, args.grad_input, args.grad_offset_mask};
  for (const void* pointer : pointers) {
    if (!aligned16(pointer)) return cudaErrorMisalignedAddress;
  }
  const backward::Tile tile = backward::choose_tile(args.p);
  switch (args.p.dtype) {
    case DCNGEN_FLOAT32: return backward::backward_fp32(args, tile, stream);
    case DCNGEN_FLOAT16: return backward::backward_fp16(args, tile, stream);
    default: return backward::backward_bf16(args, tile, stream);
  }
}

}  // namespace dcngen
