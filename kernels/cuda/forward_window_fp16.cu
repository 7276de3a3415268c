// The window forward for fp16, and the question of which copies the device's code uses.
#include "forward_launch.cuh"

namespace dcngen::window {

// Whether the code that runs on the current device was compiled for sm_90 or later, asked once a device.
bool bulk_copies() {
  static NumberPerDevice known;  // 1: no, 2: yes
  return known.get([](int) {
    cudaFuncAttributes attributes;
    const auto kernel = forward_window_kernel<__half, ForwardShape<64, true>>;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 ? 2 : 1;
  }) == 2;
}

template cudaError_t forward_window_typed<__half>(const ForwardArgs&, cudaStream_t);

}  // namespace dcngen::window
