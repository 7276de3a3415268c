// A kernel with the mistake that is asked for: what the emulation is there to show; and its rounding. See
// test_machine.py.
#include "copy_engine.cuh"
#include "instructions.cuh"

namespace {

using namespace dcngen::window;

constexpr int kThreads = 64, kBytes = 1024;

enum Mistake {
  kNone, kTooFewAtABarrier, kTwoPlacesOfAWarp, kALaneThatEnded, kOutside, kOutsideByPointer, kMisaligned, kNeverWritten,
  kNoWaitForACopy, kNoBarrierAfterWrites, kNoSyncwarpAfterWrites, kABarrierOfNoCopy, kNoWaitForABox, kNoWaitForAStore,
  kGlobalOutside, kGlobalMisaligned, kTooMuchMemory, kNowhere, kEndlessRecursion,
  kReadInAWarp, kReadInABlock, kWriteAfterRead, kNoFence,
};

float call_itself(volatile float* sums, int depth) {
  volatile float own[64] = {sums[0]};
  return own[depth % 64] + (depth < 0 ? 0.f : call_itself(own, depth + 1)) + own[0];
}

// The sum of the numbers 0 to 63, of `numbers`, by way of shared memory.
__global__ void faulty_kernel(const __grid_constant__ CUtensorMap map, const float* numbers, float* result,
                              int mistake) {
  extern __shared__ __align__(1024) float memory[];
  __shared__ float sums[2];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const uint32_t begin = smem_address(memory), barrier = begin + kBytes - 8;
  if (mistake == kTooFewAtABarrier && thread < 16) __syncwarp();
  if (mistake == kTwoPlacesOfAWarp) lane < 16 ? __syncwarp() : void(__any_sync(kAllLanes, 1));
  if (mistake == kALaneThatEnded && thread == 40) return;
  if (mistake == kOutside) store_shared(begin + kBytes, 0);
  if (mistake == kOutsideByPointer && thread == 63) memory[kBytes / 4] = 0.f;
  if (mistake == kMisaligned) load_shared16(begin + 8);
  if (mistake == kGlobalOutside) copy_async16(begin, numbers + 64, true);
  if (mistake == kNowhere && thread == 5) *reinterpret_cast<volatile float*>(0x1000ul) = 0.f;
  if (mistake == kEndlessRecursion) *result = call_itself(sums, thread);
  if (mistake == kGlobalMisaligned) copy_async16(begin, numbers + 1, true);
  if (mistake == kABarrierOfNoCopy || mistake == kNoWaitForABox) {
    if (thread == 0) {
      barrier_init(barrier);
      barrier_expect(barrier, 256);
    }
    __syncthreads();
    if (mistake == kABarrierOfNoCopy) barrier_wait(barrier, 0);
    if (thread == 0) load_box(begin, map, 0, 0, 0, 0, barrier);
    return;
  }
  if (mistake == kNoWaitForAStore && thread == 0) store_box(map, begin + 256, 0, 0, 0, 0);
  if (mistake == kReadInAWarp) {
    store_shared(begin + 4 * thread, 0);
    __shfl_sync(kAllLanes, lane, 0);  // lanes meet, but their accesses are not in order
    load_shared(begin + 4 * (thread ^ 1));
  }
  if (mistake == kReadInABlock || mistake == kWriteAfterRead) {
    store_shared(begin + 4 * thread, 0);
    mistake == kReadInABlock ? __syncwarp() : __syncthreads();
    load_shared(begin + 4 * (thread ^ 32));
    if (mistake == kWriteAfterRead) store_shared(begin + 4 * thread, 0);
    return;
  }
  if (mistake == kNoFence) {
    if (warp == 0) store_shared16(begin + 16 * lane, 0, 0, 0, 0);
    if (lane != 9) publish_to_copies();
    __syncthreads();
    if (thread == 0) store_box(map, begin, 0, 0, 0, 0);
    if (thread == 0) store_wait_read();
    return;
  }

  if (mistake != kNeverWritten && thread < 16) copy_async16(begin + 16 * thread, numbers + 4 * thread, true);
  copy_commit();
  if (mistake != kNoWaitForACopy) copy_wait<0>();
  __syncthreads();
  float sum = memory[(thread + 32) % 64];
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  float* const of_lanes = memory + 64 * (1 + warp);
  of_lanes[lane] = sum;
  if (mistake != kNoSyncwarpAfterWrites) __syncwarp();
  if (lane == 0) sums[warp] = of_lanes[17];
  if (mistake != kNoBarrierAfterWrites) __syncthreads();
  if (thread == 0) *result = sums[0] + sums[1];
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* emulation_mistake(float* numbers, float* result,
                                                                                int mistake) {
  CUtensorMap map;
  const PixelTensor tensor = {numbers, 4, 1, 1, 4, 16, 16};
  cudaError_t error = encode_box_map(map, tensor, {16, 4, 1, false});
  const int bytes = mistake == kTooMuchMemory ? 64 * 1024 : kBytes;
  if (error == cudaSuccess) {
    error = dcngen::launch(faulty_kernel, 1, kThreads, bytes, nullptr, false, map, numbers, result, mistake);
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// Rounds `count` floats to 16 bits.
extern "C" __attribute__((visibility("default"))) void emulation_round(const float* from, uint16_t* to, int64_t count,
                                                                       bool half) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t pair = half ? Dtype<__half>::pack(0.f, from[i]) : Dtype<__nv_bfloat16>::pack(0.f, from[i]);
    to[i] = static_cast<uint16_t>(pair >> 16);
  }
}
