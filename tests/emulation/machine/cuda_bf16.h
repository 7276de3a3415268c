// Stands in for CUDA's header of the same name: what is used of it.
#pragma once

#include "shorts.h"

using __nv_bfloat16 = emulation::Short<emulation::bfloat_bits, emulation::bfloat_float>;
using __nv_bfloat162 = emulation::Pair<__nv_bfloat16>;

inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
