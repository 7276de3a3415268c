// The kernels for any machine of the architecture: SSE2 on x86-64, NEON on aarch64, 4 lanes.
#define DCNGEN_WIDE_LANES 4
#define DCNGEN_DOT_LANES 4
#if defined(__ARM_NEON)
#define DCNGEN_ISA_NAME "neon"
#else
#define DCNGEN_ISA_NAME "baseline"
#endif
#define DCNGEN_KERNELS kBaselineKernels
#include "kernels.inl"
