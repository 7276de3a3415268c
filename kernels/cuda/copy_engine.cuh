// The bulk copy engine (TMA) of sm_90 and later; nothing older may call its device functions. One thread asks for a box
// of a tensor. Loads: the engine writes the box to shared memory with zeros outside the tensor, which is the operator's
// boundary rule, and a barrier in shared memory tells the others when it has arrived. Stores: parts outside the tensor
// are left out.
#pragma once

#include <cuda.h>

#include "launch.h"

namespace dcngen::window {

// ------------------------------------------------------------------------------------------------------------ barriers

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the completion of a barrier's phase: parity 0, 1, 0, ... for the first, second, third ...
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --------------------------------------------------------------------------------------------------------------- boxes

// Copies the map's box at (channel, x, y, image) to shared memory and counts its bytes on the barrier.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int channel, int x, int y, int image,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image)
      : "memory");
}

// What this thread wrote to shared memory becomes visible to the copy engine.
__device__ __forceinline__ void publish_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Writes shared memory to the map's box at (channel, x, y, image).
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t from, int channel, int x, int y, int image) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::"l"(&map),
               "r"(from), "r"(channel), "r"(x), "r"(y), "r"(image)
               : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until the copy engine has read all but the last PENDING, or written all, that this thread has asked it to store.
template <int PENDING = 0>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// --------------------------------------------------------------------------------------------- tensor maps (host side)

// A (batch, height, width, channels) tensor; pixel_stride in values.
struct PixelTensor {
  const void* first;
  int value_bytes;
  int64_t batch, height, width, channels, pixel_stride;
};

// Tensors with the pixels of the operator's input, and of its output.
inline PixelTensor input_pixels(const Params& p, const void* first, int64_t channels, int64_t pixel_stride) {
  return {first, value_bytes(p), p.batch, p.height_in, p.width_in, channels, pixel_stride};
}
inline PixelTensor output_pixels(const Params& p, const void* first, int64_t channels, int64_t pixel_stride) {
  return {first, value_bytes(p), p.batch, p.height_out, p.width_out, channels, pixel_stride};
}

// What one copy moves. `swizzled`: the 16-byte chunks of a row of 32, 64 or 128 bytes (one pixel's) are permuted.
struct Box {
  int channels, width, height;
  bool swizzled;
};

inline cudaError_t encode_box_map(CUtensorMap& map, const PixelTensor& tensor, const Box& box) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                               cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(tensor.channels), static_cast<cuuint64_t>(tensor.width),
                               static_cast<cuuint64_t>(tensor.height), static_cast<cuuint64_t>(tensor.batch)};
  const cuuint64_t pixel = static_cast<cuuint64_t>(tensor.pixel_stride) * tensor.value_bytes;
  const cuuint64_t strides[3] = {pixel, pixel * sizes[1], pixel * sizes[1] * sizes[2]};
  const cuuint32_t box_sizes[4] = {static_cast<cuuint32_t>(box.channels), static_cast<cuuint32_t>(box.width),
                                   static_cast<cuuint32_t>(box.height), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  // Copies move bits: of the type only the size counts.
  const auto type = tensor.value_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const int row_bytes = box.channels * tensor.value_bytes;
  const CUtensorMapSwizzle swizzle = !box.swizzled     ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : row_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                     : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                       : CU_TENSOR_MAP_SWIZZLE_128B;
  const CUresult result = encode(&map, type, 4, const_cast<void*>(tensor.first), sizes, strides, box_sizes, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<cudaError_t>(result);  // the runtime numbers its errors as the driver does
}

}  // namespace dcngen::window
