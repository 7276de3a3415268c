// Stands in for CUDA's header of the same name: what is used of it.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) : bits(emulation::bfloat_bits(v)) {}
  operator float() const { return emulation::bfloat_float(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __habs2(__nv_bfloat162 v) {
  v.x.bits &= 0x7fff, v.y.bits &= 0x7fff;
  return v;
}
inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto most = [](float x, float y) { return x != x || y != y ? NAN : x > y ? x : y; };
  return __floats2bfloat162_rn(most(a.x, b.x), most(a.y, b.y));
}
