// The window forward with a product after it, for bf16; compiled for sm_90a.
#include "forward_projected_launch.cuh"

namespace dcngen::window {
cudaError_t forward_projected_bf16(const ProjectedArgs& args, cudaStream_t stream) {
  return forward_projected_typed<__nv_bfloat16>(args, stream);
}
}  // namespace dcngen::window
