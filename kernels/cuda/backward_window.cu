// Whether the window backward applies, and its launch. See backward_tile.cuh for the method.
#include "backward_launch.cuh"

namespace dcngen {
namespace {

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The bulk copy engine needs sm_90. All devices of a machine are taken to be alike.
bool device_has_bulk_copies() {
  static const bool has = [] {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
  }();
  return has;
}

}  // namespace

bool backward_window_applies(const Params& p) {
  const bool half = p.dtype == DCNGEN_FLOAT16 || p.dtype == DCNGEN_BFLOAT16;
  const bool plain_3x3 = p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 &&
                         p.dilation_h == 1 && p.dilation_w == 1 && !p.remove_center && !p.softmax;
  const bool width = p.group_channels == 16 || p.group_channels == 32 || p.group_channels == 64;
  const bool vectors = p.input_pixel_stride % 8 == 0 && p.offset_mask_pixel_stride % 8 == 0 &&
                       p.output_pixel_stride % 8 == 0 && p.grad_input_pixel_stride % 8 == 0 &&
                       p.grad_offset_mask_pixel_stride % 8 == 0;
  // The far samples' reductions have no fixed order.
  if (!half || !plain_3x3 || !width || !vectors || p.deterministic) return false;
  return backward::count_blocks(p, backward::choose_tile(p)) < int64_t{1} << 31 && device_has_bulk_copies();
}

int64_t backward_window_workspace(const Params& p) { return backward::count_units(p, backward::choose_tile(p)); }

cudaError_t backward_window(const BackwardArgs& args, cudaStream_t stream) {
  const void* pointers[] = {args.grad_output, args.input, args.offset_mask, args.grad_input, args.grad_offset_mask};
  for (const void* pointer : pointers) {
    if (!aligned16(pointer)) return cudaErrorMisalignedAddress;
  }
  const backward::Tile tile = backward::choose_tile(args.p);
  return args.p.dtype == DCNGEN_FLOAT16 ? backward::backward_fp16(args, tile, stream)
                                        : backward::backward_bf16(args, tile, stream);
}

}  // namespace dcngen
