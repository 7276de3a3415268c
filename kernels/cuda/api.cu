// The C entry points: check the device, choose a kernel family, launch on the caller's stream.
#include <cstdio>
#include <string>

#include "launch.h"

namespace dcngen {
namespace {

thread_local std::string last_error;

int fail(const std::string& message) {
  last_error = message;
  return 1;
}

int check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return 0;
  return fail(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes `device` current for one call and puts the caller's device back. It is set even where it already is the current
// one: a thread that has launched nothing yet (autograd's, in its first backward) has no context, and the driver's
// functions, unlike the runtime's, do not make one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
    switched_ = error_ == cudaSuccess && previous_ != device;
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool switched_ = false;
  cudaError_t error_ = cudaSuccess;
};

bool nothing_to_write(const Params& p) { return p.batch == 0 || p.height_out == 0 || p.width_out == 0; }

// One image must be addressable with 32-bit pixel indices; the batch as a whole need not be.
const char* unsupported(const Params& p) {
  constexpr int64_t kMax = int64_t{1} << 30;
  if (p.height_in * p.width_in > kMax || p.height_out * p.width_out > kMax) return "an image has more than 2^30 pixels";
  if (p.dtype < DCNGEN_FLOAT32 || p.dtype > DCNGEN_BFLOAT16) return "unknown dtype";
  if (p.groups < 1 || p.group_channels < 1 || taps(p) < 1) return "groups, group_channels and taps must be at least 1";
  return nullptr;
}

}  // namespace
}  // namespace dcngen

using namespace dcngen;

extern "C" {

int dcngen_cuda_abi_version(void) { return DCNGEN_ABI_VERSION; }

const char* dcngen_cuda_last_error(void) { return last_error.c_str(); }

const char* dcngen_cuda_architectures(void) {
#ifdef DCNGEN_ARCHITECTURES
  return DCNGEN_ARCHITECTURES;
#else
  return "";
#endif
}

int dcngen_cuda_device_count(void) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice) return 0;
  if (error != cudaSuccess) {
    fail(std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error));
    return -1;
  }
  return count;
}

int dcngen_cuda_dcnv4_forward(const dcngen_dcnv4_params* params, const void* input, const void* offset_mask,
                              void* output, int device, void* stream) {
  if (const char* reason = unsupported(*params)) return fail(std::string("dcnv4 forward: ") + reason);
  if (nothing_to_write(*params)) return 0;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return check(guard.error(), "dcnv4 forward: selecting the device");
  const ForwardArgs args{*params, input, offset_mask, output};
  const auto run = small_map_applies(args.p)        ? forward_small_map
                   : medium_map_applies(args.p)     ? forward_medium_map
                   : forward_window_applies(args.p) ? forward_window
                                                    : forward_plain;
  return check(run(args, static_cast<cudaStream_t>(stream)), "dcnv4 forward");
}

int dcngen_cuda_dcnv4_projected_applies(const dcngen_dcnv4_params* params, int device) {
  if (unsupported(*params) != nullptr) return 0;
  const DeviceGuard guard(device);
  return guard.error() == cudaSuccess && forward_projected_applies(*params) ? 1 : 0;
}

int dcngen_cuda_dcnv4_forward_projected(const dcngen_dcnv4_params* params, const void* input, const void* offset_mask,
                                        const void* weight, const void* bias, void* output, void* projected,
                                        int device, void* stream) {
  if (const char* reason = unsupported(*params)) return fail(std::string("dcnv4 projected forward: ") + reason);
  if (nothing_to_write(*params)) return 0;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return check(guard.error(), "dcnv4 projected forward: selecting the device");
  const ProjectedArgs args{*params, input, offset_mask, weight, bias, output, projected};
  return check(forward_projected(args, static_cast<cudaStream_t>(stream)), "dcnv4 projected forward");
}

int dcngen_cuda_dcnv4_backward_has_sums(const dcngen_dcnv4_params* params) {
  if (backward_small_map_applies(*params)) return 0;
  if (backward_medium_map_applies(*params)) return 1;
  return backward_window_applies(*params) && backward_window_sums(*params) ? 1 : 0;
}

int64_t dcngen_cuda_dcnv4_backward_workspace_size(const dcngen_dcnv4_params* params, int with_sums) {
  if (backward_small_map_applies(*params)) return 0;
  if (backward_medium_map_applies(*params)) return with_sums ? backward_medium_map_workspace(*params) : 0;
  return backward_window_applies(*params) ? backward_window_workspace(*params, with_sums != 0)
                                          : backward_plain_workspace(*params);
}

int dcngen_cuda_dcnv4_backward(const dcngen_dcnv4_params* params, const void* grad_output, const void* input,
                               const void* offset_mask, void* grad_input, void* grad_offset_mask, float* grad_sums,
                               void* workspace, int device, void* stream) {
  if (const char* reason = unsupported(*params)) return fail(std::string("dcnv4 backward: ") + reason);
  if (params->batch == 0 || params->height_in == 0 || params->width_in == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return check(guard.error(), "dcnv4 backward: selecting the device");
  if (grad_sums != nullptr && !dcngen_cuda_dcnv4_backward_has_sums(params)) {
    return fail("dcnv4 backward: this backward has no grad_sums; pass NULL");
  }
  const BackwardArgs args{*params,    grad_output,      input,     offset_mask,
                          grad_input, grad_offset_mask, grad_sums, workspace};
  const auto run = backward_small_map_applies(args.p)    ? backward_small_map
                   : backward_medium_map_applies(args.p) ? backward_medium_map
                   : backward_window_applies(args.p)     ? backward_window
                                                         : backward_plain;
  return check(run(args, static_cast<cudaStream_t>(stream)), "dcnv4 backward");
}

int dcngen_cuda_linear_parts(int64_t rows, int32_t in_features, int32_t out_features, int32_t dtype, int device) {
  const DeviceGuard guard(device);
  return guard.error() == cudaSuccess ? linear_parts(rows, in_features, out_features, dtype) : -1;
}

int dcngen_cuda_linear_forward(const void* input, const void* weight, const void* bias, void* output, int64_t rows,
                               int32_t in_features, int32_t out_features, int32_t dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return check(guard.error(), "linear forward: selecting the device");
  if (linear_parts(rows, in_features, out_features, dtype) < 0) return fail("linear forward: no kernel for these sizes");
  const LinearArgs args{input, weight, bias, output, nullptr, rows, in_features, out_features, dtype};
  return check(linear_forward(args, static_cast<cudaStream_t>(stream)), "linear forward");
}

int dcngen_cuda_linear_backward(const void* grad_output, const void* weight_transposed, void* grad_input,
                                float* bias_sums, int64_t rows, int32_t in_features, int32_t out_features,
                                int32_t dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return check(guard.error(), "linear backward: selecting the device");
  if (linear_parts(rows, in_features, out_features, dtype) < 1) return fail("linear backward: no kernel for these sizes");
  const LinearArgs args{grad_output, weight_transposed, nullptr,      grad_input, bias_sums,
                        rows,        in_features,       out_features, dtype};
  return check(linear_backward(args, static_cast<cudaStream_t>(stream)), "linear backward");
}

}  // extern "C"
