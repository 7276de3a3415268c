// The linear layer's kernels for fp16; compiled for sm_90a.
#include "linear_launch.cuh"

namespace dcngen::linear {
cudaError_t forward_fp16(const LinearArgs& args, cudaStream_t stream) {
  return forward_typed<__half>(args, stream);
}
cudaError_t backward_fp16(const LinearArgs& args, cudaStream_t stream) {
  return backward_typed<__half>(args, stream);
}
}  // namespace dcngen::linear
