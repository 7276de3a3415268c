// The window forward for fp16, and the question of which copies the device's code uses.
#include <atomic>

#include "forward_launch.cuh"

namespace dcngen::window {

// Whether the code that runs on the current device was compiled for sm_90 or later, asked once a device.
bool bulk_copies() {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet, 1: no, 2: yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (device < kDevices && known[device] != 0) return known[device] == 2;
  cudaFuncAttributes attributes;
  const auto kernel = forward_window_kernel<__half, ForwardShape<64, true>>;
  const bool yes = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  if (device < kDevices) known[device] = yes ? 2 : 1;
  return yes;
}

template cudaError_t forward_window_typed<__half>(const ForwardArgs&, cudaStream_t);

}  // namespace dcngen::window
