// Stands in for CUDA's header of the same name: what is used of it.
#pragma once

#include "shorts.h"

using __half = emulation::Short<emulation::half_bits, emulation::half_float>;
using __half2 = emulation::Pair<__half>;

inline float __half2float(__half v) { return v; }
inline __half __float2half_rn(float v) { return __half(v); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline __half2 __low2half2(__half2 v) { return {v.x, v.x}; }
inline __half2 __high2half2(__half2 v) { return {v.y, v.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __floats2half2_rn(float(a.x) * float(b.x), float(a.y) * float(b.y));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __floats2half2_rn(std::fma(float(a.x), float(b.x), float(c.x)), std::fma(float(a.y), float(b.y), float(c.y)));
}
