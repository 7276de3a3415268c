// Families of kernels that are not emulated: they need warpgroups. They never apply here.
#include "launch.h"

namespace dcngen {

int linear_parts(int64_t, int, int, int) { return -1; }
cudaError_t linear_forward(const LinearArgs&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t linear_backward(const LinearArgs&, cudaStream_t) { return cudaErrorNotSupported; }

}  // namespace dcngen
