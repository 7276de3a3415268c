// The window forward for bf16.
#include "forward_launch.cuh"

namespace dcngen::window {
template cudaError_t forward_window_typed<__nv_bfloat16>(const ForwardArgs&, cudaStream_t);
}
