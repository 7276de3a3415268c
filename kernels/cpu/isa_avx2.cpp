// The kernels with AVX2, FMA and F16C: 8 lanes.
#define DCNGEN_WIDE_LANES 8
#define DCNGEN_DOT_LANES 8
#define DCNGEN_ISA_NAME "avx2"
#define DCNGEN_KERNELS kAvx2Kernels
#include "kernels.inl"
