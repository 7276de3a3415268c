// What the entry points (api.cu) and the kernels agree on: each kernel family answers whether it applies and launches.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "dcngen_kernels.h"

namespace dcngen {

using Params = dcngen_dcnv4_params;

struct ForwardArgs {
  Params p;
  const void* input;
  const void* offset_mask;
  void* output;
};

// The forward with a product after it: projected = output * weight^T + bias.
struct ProjectedArgs {
  Params p;
  const void* input;
  const void* offset_mask;
  const void* weight;  // (channels, channels)
  const void* bias;    // may be null
  void* output;        // may be null: not written then
  void* projected;
};

// A linear layer's forward, or the backward for its input; see linear.cuh.
struct LinearArgs {
  const void* left;    // input or grad_output
  const void* weight;  // transposed in the backward
  const void* bias;    // forward; may be null
  void* result;
  float* sums;  // backward: of left's columns, (linear_parts, out_features)
  int64_t rows;
  int in_features, out_features;
  int dtype;
};

struct BackwardArgs {
  Params p;
  const void* grad_output;
  const void* input;
  const void* offset_mask;
  void* grad_input;
  void* grad_offset_mask;
  float* grad_sums;  // may be null: not computed
  void* workspace;
};

// Launches a kernel and answers with this launch's own error. (cudaGetLastError after <<<>>> would also report, as
// ours, what an earlier call left behind.) `after_previous`: the kernel begins with griddepcontrol.wait, so its blocks
// may take their places on the device while the kernel before it in the stream ends.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
                   bool after_previous, const Arguments&... arguments) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = after_previous ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A number of every device that calls come from, asked for once. ask(device) answers 0 where it cannot tell: such a
// call is made again.
class NumberPerDevice {
 public:
  template <typename Ask>
  int get(Ask ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (device >= kDevices) return ask(device);
    int number = known_[device].load();
    if (number == 0) known_[device] = number = ask(device);
    return number;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> known_[kDevices] = {};
};

// Whether the current device has compute capability 9.0: machine code for sm_90a runs there alone.
inline bool device_is_sm_90() {
  static NumberPerDevice known;  // 1: no, 2: yes
  return known.get([](int device) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
      return 0;
    }
    return major == 9 && minor == 0 ? 2 : 1;
  }) == 2;
}

// Does something once for every device that calls come from; a call that failed is made again.
class OncePerDevice {
 public:
  template <typename Function>
  cudaError_t run(Function function) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (done_.load(std::memory_order_acquire) & bit) return cudaSuccess;
    error = function();
    if (error == cudaSuccess) done_.fetch_or(bit, std::memory_order_release);
    return error;
  }

 private:
  std::atomic<uint64_t> done_{0};
};

// Shared memory that a block can have wherever the kernels without a look at the device run: on sm_86, sm_89 and sm_120.
inline constexpr int kMostSharedBytes = 99 * 1024;

// Launches KERNEL, whose blocks always have so many bytes of shared memory: more than a block has unasked.
template <auto KERNEL, typename... Arguments>
cudaError_t launch_with_memory(int64_t blocks, int threads, int shared_bytes, cudaStream_t stream, bool after_previous,
                               const Arguments&... arguments) {
  static OncePerDevice prepared;
  const cudaError_t error = prepared.run(
      [&] { return cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes); });
  if (error != cudaSuccess) return error;
  return launch(KERNEL, blocks, threads, shared_bytes, stream, after_previous, arguments...);
}

inline int value_bytes(const Params& p) { return p.dtype == DCNGEN_FLOAT32 ? 4 : 2; }
inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// What all window kernels are for: 3x3, stride 1, dilation 1, masks as they are.
inline bool plain_3x3(const Params& p) {
  return p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 &&
         p.dilation_w == 1 && !p.remove_center && !p.softmax;
}

inline __host__ __device__ int taps(const Params& p) { return p.kernel_h * p.kernel_w - (p.remove_center ? 1 : 0); }

// plain_*.cu: any shape, any dtype; a gather forward, a gather for offset and mask gradients, atomics for the input's.
cudaError_t forward_plain(const ForwardArgs& args, cudaStream_t stream);
int64_t backward_plain_workspace(const Params& p);
cudaError_t backward_plain(const BackwardArgs& args, cudaStream_t stream);

namespace window {
// Whether the code that runs on the current device was compiled for sm_90 or later; forward_window_fp16.cu.
bool bulk_copies();
// Of the current device; forward_window.cu.
int multiprocessors();
}  // namespace window

// small_map_*.cu: maps of at most 4x4 pixels. The backward needs no workspace.
bool small_map_applies(const Params& p);
cudaError_t forward_small_map(const ForwardArgs& args, cudaStream_t stream);
bool backward_small_map_applies(const Params& p);
cudaError_t backward_small_map(const BackwardArgs& args, cudaStream_t stream);
// medium_map_*.cu: likewise, of at most 8x8 pixels.
bool medium_map_applies(const Params& p);
cudaError_t forward_medium_map(const ForwardArgs& args, cudaStream_t stream);
bool backward_medium_map_applies(const Params& p);
int64_t backward_medium_map_workspace(const Params& p);  // of the sums, which it has
cudaError_t backward_medium_map(const BackwardArgs& args, cudaStream_t stream);

// forward_window.cu / backward_window.cu: dense products over a bounded window (see kernels/README.md).
bool forward_window_applies(const Params& p);
cudaError_t forward_window(const ForwardArgs& args, cudaStream_t stream);
// forward_projected.cu: sm_90a alone.
bool forward_projected_applies(const Params& p);
cudaError_t forward_projected(const ProjectedArgs& args, cudaStream_t stream);
// linear.cu: sm_90a alone.
int linear_parts(int64_t rows, int in_features, int out_features, int dtype);  // as dcngen_cuda_linear_parts
cudaError_t linear_forward(const LinearArgs& args, cudaStream_t stream);
cudaError_t linear_backward(const LinearArgs& args, cudaStream_t stream);
bool backward_window_applies(const Params& p);
int64_t backward_window_workspace(const Params& p, bool with_sums);
bool backward_window_sums(const Params& p);  // whether it has them
cudaError_t backward_window(const BackwardArgs& args, cudaStream_t stream);

}  // namespace dcngen
