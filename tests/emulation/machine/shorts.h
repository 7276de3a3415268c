// What CUDA's two types of 16 bits have in common.
#pragma once

#include "cuda_runtime.h"

namespace emulation {

template <uint16_t (*TO_BITS)(float), float (*TO_FLOAT)(uint32_t)>
struct Short {
  uint16_t bits;
  Short() = default;
  explicit Short(float v) : bits(TO_BITS(v)) {}
  operator float() const { return TO_FLOAT(bits); }
};
template <typename T>
struct alignas(4) Pair {
  T x, y;
};

}  // namespace emulation

template <typename T>
emulation::Pair<T> __habs2(emulation::Pair<T> v) {
  v.x.bits &= 0x7fff, v.y.bits &= 0x7fff;
  return v;
}
template <typename T>
emulation::Pair<T> __hmax2_nan(emulation::Pair<T> a, emulation::Pair<T> b) {
  const auto most = [](float x, float y) { return T(x != x || y != y ? NAN : x > y ? x : y); };
  return {most(a.x, b.x), most(a.y, b.y)};
}
