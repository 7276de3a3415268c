// The linear layer's kernels for bf16; compiled for sm_90a.
#include "linear_launch.cuh"

namespace dcngen::linear {
cudaError_t forward_bf16(const LinearArgs& args, cudaStream_t stream) {
  return forward_typed<__nv_bfloat16>(args, stream);
}
cudaError_t backward_bf16(const LinearArgs& args, cudaStream_t stream) {
  return backward_typed<__nv_bfloat16>(args, stream);
}
}  // namespace dcngen::linear
