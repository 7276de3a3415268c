// Whether the linear layer's kernels apply to a call and its device, and their launch.
#include "linear.cuh"

namespace dcngen {

namespace linear {
// One file a dtype, compiled for sm_90a.
cudaError_t forward_bf16(const LinearArgs& args, cudaStream_t stream);
cudaError_t forward_fp16(const LinearArgs& args, cudaStream_t stream);
cudaError_t backward_bf16(const LinearArgs& args, cudaStream_t stream);
cudaError_t backward_fp16(const LinearArgs& args, cudaStream_t stream);
}  // namespace linear

#ifdef DCNGEN_SM_90A
int linear_parts(int64_t rows, int in_features, int out_features, int dtype) {
  const bool forward = (in_features == 128 || in_features == 256) && out_features % 64 == 0 && out_features >= 128 &&
                       out_features <= 768 && rows > 0 && rows < int64_t{1} << 31 &&
                       (dtype == DCNGEN_FLOAT16 || dtype == DCNGEN_BFLOAT16) && device_is_sm_90();
  if (!forward) return -1;
  // Where the whole weight, and two warpgroups at least, fit a multiprocessor's shared memory.
  const bool backward = in_features == 128 ? out_features <= 384 : out_features == 256;
  if (!backward) return 0;
  return window::multiprocessors() *
         linear::LinearMemory::warpgroups(out_features / linear::kPanel, in_features / linear::kPanel);
}

cudaError_t linear_forward(const LinearArgs& args, cudaStream_t stream) {
  if (!aligned16(args.left) || !aligned16(args.weight) || !aligned16(args.result)) return cudaErrorMisalignedAddress;
  return (args.dtype == DCNGEN_FLOAT16 ? linear::forward_fp16 : linear::forward_bf16)(args, stream);
}

cudaError_t linear_backward(const LinearArgs& args, cudaStream_t stream) {
  if (!aligned16(args.left) || !aligned16(args.weight) || !aligned16(args.result)) return cudaErrorMisalignedAddress;
  return (args.dtype == DCNGEN_FLOAT16 ? linear::backward_fp16 : linear::backward_bf16)(args, stream);
}
#else
int linear_parts(int64_t, int, int, int) { return -1; }
cudaError_t linear_forward(const LinearArgs&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t linear_backward(const LinearArgs&, cudaStream_t) { return cudaErrorNotSupported; }
#endif

}  // namespace dcngen
