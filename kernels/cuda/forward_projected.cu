// Whether the projected forward applies to a call and its device, and its launch.
#include "launch.h"

namespace dcngen {

namespace window {
// One file a dtype, compiled for sm_90a.
cudaError_t forward_projected_bf16(const ProjectedArgs& args, cudaStream_t stream);
cudaError_t forward_projected_fp16(const ProjectedArgs& args, cudaStream_t stream);
}  // namespace window

#ifdef DCNGEN_SM_90A
namespace {

bool fits(const Params& p) {
  const int64_t channels = int64_t{p.groups} * p.group_channels;
  const int64_t tiles = p.batch * ((p.height_out + 7) / 8) * ((p.width_out + 7) / 8);
  return forward_window_applies(p) && p.dtype != DCNGEN_FLOAT32 && channels == 128 &&
         (p.group_channels == 32 || p.group_channels == 64) && tiles < int64_t{1} << 30;
}

}  // namespace

bool forward_projected_applies(const Params& p) { return fits(p) && device_is_sm_90(); }

cudaError_t forward_projected(const ProjectedArgs& args, cudaStream_t stream) {
  const void* const pointers[] = {args.input, args.offset_mask, args.weight, args.output, args.projected};
  for (const void* pointer : pointers) {
    if (!aligned16(pointer)) return cudaErrorMisalignedAddress;
  }
  if (!forward_projected_applies(args.p)) return cudaErrorNotSupported;
  return args.p.dtype == DCNGEN_FLOAT16 ? window::forward_projected_fp16(args, stream)
                                        : window::forward_projected_bf16(args, stream);
}
#else
bool forward_projected_applies(const Params&) { return false; }
cudaError_t forward_projected(const ProjectedArgs&, cudaStream_t) { return cudaErrorNotSupported; }
#endif

}  // namespace dcngen
