// The kernels with AVX-512 (F, BW, DQ, VL): 16 lanes; 8 where sums over lanes are taken, since the wide shuffles
// for them would run on one port alone.
#define DCNGEN_WIDE_LANES 16
#define DCNGEN_DOT_LANES 8
#define DCNGEN_ISA_NAME "avx512"
#define DCNGEN_KERNELS kAvx512Kernels
#include "kernels.inl"
