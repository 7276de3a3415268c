#include "backward_launch.cuh"

namespace dcngen::backward {
cudaError_t backward_fp16(const BackwardArgs& args, Tile shape, cudaStream_t stream) {
  return backward_typed<__half>(args, shape, stream);
}
}  // namespace dcngen::backward
