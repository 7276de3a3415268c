#include "backward_launch.cuh"

namespace dcngen::backward {
cudaError_t backward_bf16(const BackwardArgs& args, Tile shape, cudaStream_t stream) {
  return backward_typed<__nv_bfloat16>(args, shape, stream);
}
}  // namespace dcngen::backward
