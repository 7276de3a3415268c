// The runtime's and the driver's functions: one device with two multiprocessors, so that what is chosen by
// their number is reached by small problems, and launches that end before they return.
#include <cstring>
#include <map>
#include <string>

#include "cuda.h"
#include "cuda_runtime.h"

namespace {

constexpr int kUnaskedSharedBytes = 48 * 1024;

std::map<const void*, int> most_shared_bytes;

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  switch (error) {
    case cudaErrorInvalidValue: return "invalid value";
    case cudaErrorInvalidConfiguration: return "invalid launch";
    case cudaErrorMisalignedAddress: return "misaligned address";
    case cudaErrorNotSupported: return "not supported";
    case cudaErrorLaunchFailure: text = emulation::last_failure(); return text.c_str();
    default: return "another error";
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 2; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::kMostSharedBytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = __CUDA_ARCH__ / 100; break;
    case cudaDevAttrComputeCapabilityMinor: *value = __CUDA_ARCH__ / 10 % 10; break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t i = 0; i < height; ++i) std::memset(static_cast<char*>(to) + i * pitch, value, width);
  return cudaSuccess;
}

cudaError_t emulation::set_most_shared_bytes(const void* kernel, int bytes) {
  if (bytes > kMostSharedBytes) return cudaErrorInvalidValue;
  most_shared_bytes[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t emulation::launch(const void* kernel, const dim3& blocks, const dim3& threads, size_t shared_bytes,
                              void (*thread)(const void*), const void* argument) {
  const auto found = most_shared_bytes.find(kernel);
  const int asked = found == most_shared_bytes.end() ? 0 : found->second, most = std::max(asked, kUnaskedSharedBytes);
  const bool fits = blocks.x > 0 && blocks.x < 1u << 31 && threads.x > 0 && threads.x <= 1024 &&
                    blocks.y * blocks.z * threads.y * threads.z == 1 && shared_bytes <= static_cast<size_t>(most);
  if (!fits) return cudaErrorInvalidConfiguration;
  const Grid grid = {{blocks.x, 1, 1}, {threads.x, 1, 1}, shared_bytes};
  return run_grid(grid, thread, argument) ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (std::string(name) != "cuTensorMapEncodeTiled") return cudaErrorInvalidValue;
  *entry = reinterpret_cast<void*>(cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// The driver's rules for tensors of four dimensions.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* first,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  CUtensorMap made = {};
  made.first = static_cast<char*>(first);
  made.value_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT32 ? 4 : 2;
  made.swizzle_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << static_cast<int>(swizzle);
  bool good = rank == 4 && reinterpret_cast<uintptr_t>(first) % 16 == 0;
  for (cuuint32_t i = 0; good && i < 4; ++i) {
    good = sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    made.size[i] = static_cast<int64_t>(sizes[i]), made.box[i] = static_cast<int>(box[i]);
    made.stride[i] = i == 0 ? made.value_bytes : static_cast<int64_t>(strides[i - 1]);
    good = good && (i == 0 || (made.stride[i] % 16 == 0 && made.stride[i] < int64_t{1} << 40));
  }
  const int row_bytes = made.box[0] * made.value_bytes;
  good = good && row_bytes % 16 == 0 && (made.swizzle_bytes == 0 || row_bytes <= made.swizzle_bytes);
  if (good) *map = made;
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
