// The window forward for fp16.
#include "forward_window.cuh"

namespace dcngen::window {
template cudaError_t forward_window_typed<__half>(const ForwardArgs&, cudaStream_t);
}
