#include "backward_launch.cuh"

namespace dcngen::backward {
cudaError_t backward_fp32(const BackwardArgs& args, Tile shape, cudaStream_t stream) {
  return backward_typed<float>(args, shape, stream);
}
}  // namespace dcngen::backward
