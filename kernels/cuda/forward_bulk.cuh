// What sm_90 and later have. Kernels that follow one another closely (launch in launch.h): the later one's blocks take
// their places early and wait before they touch memory. Tiles by the bulk copy engine: one thread asks for a box of a
// tensor, the engine writes it to shared memory with zeros outside the tensor, and a barrier in shared memory tells the
// others when it has arrived.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace dcngen::window {

// --------------------------------------------------------------------------------------------------------- device side

// The next kernel's blocks may take their places once all of this one's have theirs.
__device__ __forceinline__ void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernel before this one in the stream has ended and its results can be read.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the barrier's first completion.
__device__ __forceinline__ void barrier_wait(uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier)
      : "memory");
}
// Copies the map's box at (channel, x, y, image) to shared memory and counts its bytes on the barrier.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, int channel, int x, int y, int image,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image)
      : "memory");
}

// ----------------------------------------------------------------------------------------------------------- host side

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

// A (batch, height, width, channels) tensor of 16-bit values, read in boxes of box_h x box_w pixels x box_channels.
// `swizzled`: the box is 64 channels wide and its 16-byte chunks are permuted by the pixel's number modulo 8.
struct BoxShape {
  int channels, width, height;
  bool swizzled;
};

inline cudaError_t encode_box_map(CUtensorMap& map, const void* tensor, int64_t batch, int64_t height, int64_t width,
                                  int64_t channels, int64_t pixel_stride, BoxShape box) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                               cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(width),
                               static_cast<cuuint64_t>(height), static_cast<cuuint64_t>(batch)};
  const cuuint64_t pixel = static_cast<cuuint64_t>(pixel_stride) * 2;
  const cuuint64_t strides[3] = {pixel, pixel * sizes[1], pixel * sizes[1] * sizes[2]};
  const cuuint32_t box_sizes[4] = {static_cast<cuuint32_t>(box.channels), static_cast<cuuint32_t>(box.width),
                                   static_cast<cuuint32_t>(box.height), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(tensor), sizes, strides,
                                 box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 box.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace dcngen::window
