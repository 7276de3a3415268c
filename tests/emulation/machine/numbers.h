// Numbers of 16 bits: to float exactly, from float to the nearest, to the even one of two; NaN becomes the one that the
// device's arithmetic yields.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulation {

inline uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline float bfloat_float(uint32_t low_half) { return bits_float(low_half << 16); }
inline uint16_t bfloat_bits(float v) {
  const uint32_t bits = float_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float half_float(uint32_t low_half) {
  const uint32_t magnitude = (low_half & 0x7fffu) << 13, sign = (low_half & 0x8000u) << 16;
  const uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112f);  // numbers below the normal ones too
  return bits_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
}
inline uint16_t half_bits(float v) {
  const uint32_t bits = float_bits(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 is nearer to what is no number
  if (magnitude < 0x38800000u) {  // below 2^-14: the unit in the last place is that of 0.5 as a float
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}

inline uint32_t half_pair(float low, float high) { return half_bits(low) | uint32_t{half_bits(high)} << 16; }
inline uint32_t bfloat_pair(float low, float high) { return bfloat_bits(low) | uint32_t{bfloat_bits(high)} << 16; }

}  // namespace emulation
