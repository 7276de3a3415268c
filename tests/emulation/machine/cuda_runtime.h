// Stands in for the CUDA runtime's header: the language's words, its types, and the runtime's functions that are used.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>

#include "intrinsics.h"
#include "ptx.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

inline const emulation::Index &threadIdx = emulation::thread_index, &blockIdx = emulation::block_index;
inline const emulation::Index &blockDim = emulation::block_size, &gridDim = emulation::grid_size;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
const char* cudaGetErrorString(cudaError_t error);

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxL1 = 0 };
struct cudaFuncAttributes {
  int ptxVersion = __CUDA_ARCH__ / 10;
};
namespace emulation {
cudaError_t set_most_shared_bytes(const void* kernel, int bytes);
cudaError_t launch(const void* kernel, const dim3& blocks, const dim3& threads, size_t shared_bytes,
                   void (*thread)(const void*), const void* argument);
}  // namespace emulation

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  *attributes = {};
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return emulation::set_most_shared_bytes(reinterpret_cast<const void*>(kernel), value);
}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const std::tuple<void (*)(Parameters...), std::tuple<Parameters...>> call(kernel, {arguments...});
  const auto thread = [](const void* argument) {
    const auto& [function, parameters] = *static_cast<const decltype(call)*>(argument);
    std::apply(function, parameters);
  };
  return emulation::launch(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                           config->dynamicSmemBytes, thread, &call);
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault = 0 };
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* found);
