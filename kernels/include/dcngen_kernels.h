/* The C interface of the compiled DCNv4 operator: pointers, sizes, a stream; no torch, no Python.
 *
 * Two shared libraries implement it: libdcngen_cpu (dcngen_cpu_*) and libdcngen_cuda (dcngen_cuda_*).
 * Every function returns 0 on success; otherwise the library's *_last_error() holds a message for the calling thread.
 *
 * Layouts (channels last), all sizes and strides in elements:
 *   input        (batch, height_in,  width_in,  groups * group_channels)
 *   offset_mask  (batch, height_out, width_out, P), P >= 3 * groups * taps; group g begins at 3 * taps * g with
 *                2 * taps interleaved offsets (x0, y0, x1, y1, ...) and then taps mask values
 *   output       (batch, height_out, width_out, groups * group_channels)
 * Pixels of one tensor are dense among themselves: pixel (n, y, x) begins at ((n * height + y) * width + x) * pixel_stride,
 * channels have stride 1. A pixel_stride larger than the channel count lets a tensor be a slice of a wider one.
 * Taps run with the width index outer: tap k = i * kernel_h + j, i over width; remove_center skips the middle tap.
 */
#ifndef DCNGEN_KERNELS_H
#define DCNGEN_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define DCNGEN_API __declspec(dllexport)
#else
#define DCNGEN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define DCNGEN_ABI_VERSION 3

typedef enum { DCNGEN_FLOAT32 = 0, DCNGEN_FLOAT16 = 1, DCNGEN_BFLOAT16 = 2 } dcngen_dtype;

typedef struct {
  int64_t batch, height_in, width_in, height_out, width_out;
  int64_t input_pixel_stride;            /* of input */
  int64_t offset_mask_pixel_stride;      /* of offset_mask */
  int64_t output_pixel_stride;           /* of output (forward) and grad_output (backward) */
  int64_t grad_input_pixel_stride;       /* backward only */
  int64_t grad_offset_mask_pixel_stride; /* backward only */
  int32_t offset_mask_channels;          /* P: how many channels of grad_offset_mask are written (the padding gets 0) */
  int32_t groups, group_channels;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  float offset_scale;
  int32_t remove_center; /* 0 or 1 */
  int32_t softmax;       /* 0 or 1: masks are logits, softmax over the taps of a group */
  int32_t dtype;         /* dcngen_dtype, of all tensors */
  int32_t deterministic; /* 1: only kernels whose results do not depend on the order of execution */
} dcngen_dcnv4_params;

/* CPU. num_threads <= 0 means all cores. */
DCNGEN_API int dcngen_cpu_abi_version(void);
DCNGEN_API const char* dcngen_cpu_last_error(void);
DCNGEN_API const char* dcngen_cpu_isa(void); /* "avx512", "avx2", "baseline", "neon": what the running machine uses */
DCNGEN_API int dcngen_cpu_dcnv4_forward(const dcngen_dcnv4_params* params, const void* input, const void* offset_mask,
                                        void* output, int num_threads);
DCNGEN_API int dcngen_cpu_dcnv4_backward(const dcngen_dcnv4_params* params, const void* grad_output, const void* input,
                                         const void* offset_mask, void* grad_input, void* grad_offset_mask,
                                         int num_threads);

/* CUDA. `device` is the index of the device that owns the pointers, `stream` a cudaStream_t of that device.
 * Nothing allocates, synchronises or touches another stream, so every call can be captured into a graph.
 * workspace: device memory of at least dcngen_cuda_dcnv4_backward_workspace_size bytes (0 means none is needed);
 * its contents on entry do not matter. */
DCNGEN_API int dcngen_cuda_abi_version(void);
DCNGEN_API const char* dcngen_cuda_last_error(void);
DCNGEN_API const char* dcngen_cuda_architectures(void); /* e.g. "90": what was compiled in */
DCNGEN_API int dcngen_cuda_device_count(void);          /* < 0: no usable driver, see last_error */
DCNGEN_API int dcngen_cuda_dcnv4_forward(const dcngen_dcnv4_params* params, const void* input, const void* offset_mask,
                                         void* output, int device, void* stream);
/* The forward and a product after it in one kernel: projected = output * weight^T + bias, pixel by pixel, with weight
 * (channels, channels) and projected (batch, height_out, width_out, channels), both contiguous, channels =
 * groups * group_channels. bias may be NULL, and output, which then is not written. Only where projected_applies is 1,
 * and with pointers to multiples of 16 bytes; an error elsewhere. */
DCNGEN_API int dcngen_cuda_dcnv4_projected_applies(const dcngen_dcnv4_params* params, int device);
DCNGEN_API int dcngen_cuda_dcnv4_forward_projected(const dcngen_dcnv4_params* params, const void* input,
                                                   const void* offset_mask, const void* weight, const void* bias,
                                                   void* output, void* projected, int device, void* stream);
/* grad_sums: NULL, or, where backward_has_sums is 1, room for the sums of both gradients over all pixels:
 * offset_mask_channels floats for grad_offset_mask, then groups * group_channels for grad_input. */
DCNGEN_API int dcngen_cuda_dcnv4_backward_has_sums(const dcngen_dcnv4_params* params);
DCNGEN_API int64_t dcngen_cuda_dcnv4_backward_workspace_size(const dcngen_dcnv4_params* params, int with_sums);
DCNGEN_API int dcngen_cuda_dcnv4_backward(const dcngen_dcnv4_params* params, const void* grad_output, const void* input,
                                          const void* offset_mask, void* grad_input, void* grad_offset_mask,
                                          float* grad_sums, void* workspace, int device, void* stream);
/* A linear layer, output (rows, out_features) = input (rows, in_features) * weight^T + bias, and its gradients but the
 * weight's; float16 or bfloat16, all tensors contiguous, pointers to multiples of 16 bytes. bias may be NULL.
 * linear_parts: in how many parts the backward sums; 0 where there is a kernel for the forward alone, -1 where there is
 * none for these sizes on this device.
 * weight_transposed (in_features, out_features). bias_sums (linear_parts, out_features): the bias's gradient, once its
 * rows are added. */
DCNGEN_API int dcngen_cuda_linear_parts(int64_t rows, int32_t in_features, int32_t out_features, int32_t dtype,
                                        int device);
DCNGEN_API int dcngen_cuda_linear_forward(const void* input, const void* weight, const void* bias, void* output,
                                          int64_t rows, int32_t in_features, int32_t out_features, int32_t dtype,
                                          int device, void* stream);
DCNGEN_API int dcngen_cuda_linear_backward(const void* grad_output, const void* weight_transposed, void* grad_input,
                                           float* bias_sums, int64_t rows, int32_t in_features, int32_t out_features,
                                           int32_t dtype, int device, void* stream);

#ifdef __cplusplus
}
#endif
#endif
