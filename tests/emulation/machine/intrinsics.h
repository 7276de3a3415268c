// Vector types and the device's built-in functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "machine.h"
#include "numbers.h"

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// ------------------------------------------------------------------------------------------------------------ numbers

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

inline uint32_t __float_as_uint(float v) { return emulation::float_bits(v); }
inline float __uint_as_float(uint32_t v) { return emulation::bits_float(v); }
inline float __int_as_float(int v) { return emulation::bits_float(static_cast<uint32_t>(v)); }
inline float __saturatef(float v) { return v > 0.f ? v < 1.f ? v : 1.f : 0.f; }  // 0 of a NaN
inline float __fadd_rd(float a, float b) {
  const double sum = static_cast<double>(a) + b;  // exact but where one is lost beside the other
  const float nearest = static_cast<float>(sum);
  return nearest > sum ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t order) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (order >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  return std::max(a & 0xffffu, b & 0xffffu) | std::max(a >> 16, b >> 16) << 16;
}

// ------------------------------------------------------------------------------------------------------------- memory

inline uint32_t __cvta_generic_to_shared(const void* pointer) { return emulation::shared_address(pointer); }
template <typename T>
T __ldg(const T* from) {
  return *static_cast<const T*>(emulation::global(from, sizeof(T), sizeof(T)));
}
template <typename T>
T __ldcg(const T* from) {
  return __ldg(from);
}
// Blocks run one after another, and a thread leaves the core only where it waits.
template <typename T, typename Value>
T atomicAdd(T* to, Value value) {
  const T before = *to;
  *to = before + static_cast<T>(value);
  return before;
}
inline void __threadfence() {}

// ------------------------------------------------------------------------------------------------- barriers and warps

inline void __syncthreads() { emulation::meet_block("__syncthreads", false); }
inline int __syncthreads_or(int value) { return emulation::meet_block("__syncthreads_or", value != 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::meet_lanes(mask, "__syncwarp", nullptr, nullptr); }

namespace emulation {

struct Exchange {
  uint32_t value, result;
  int source;  // the lane
};
inline void exchange(Exchange* const* lanes, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (!(mask >> lanes[lane]->source & 1)) fail("a lane reads that of a lane which does not take part");
    lanes[lane]->result = lanes[lanes[lane]->source]->value;
  }
}
template <typename T>
T value_of_lane(unsigned mask, const char* name, T value, int source) {
  static_assert(sizeof(T) == 4, "shuffles of 32 bits alone");
  Exchange own = {0, 0, source};
  std::memcpy(&own.value, &value, 4);
  meet(mask, name, own, exchange);
  std::memcpy(&value, &own.result, 4);
  return value;
}

struct Vote {
  uint32_t value, result;
};
template <typename Reduce>
uint32_t vote(unsigned mask, const char* name, uint32_t value, Reduce) {
  Vote own = {value, 0};
  meet<Vote>(mask, name, own, [](Vote* const* lanes, unsigned of) {
    uint32_t result = 0;
    bool first = true;
    for (int lane = 0; lane < 32; ++lane) {
      if (!(of >> lane & 1)) continue;
      result = first ? Reduce::first(lanes[lane]->value, lane) : Reduce::next(result, lanes[lane]->value, lane);
      first = false;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (of >> lane & 1) lanes[lane]->result = result;
    }
  });
  return own.result;
}
struct Ballot {
  static uint32_t first(uint32_t value, int lane) { return (value != 0 ? 1u : 0u) << lane; }
  static uint32_t next(uint32_t result, uint32_t value, int lane) { return result | first(value, lane); }
};
struct Sum {
  static uint32_t first(uint32_t value, int) { return value; }
  static uint32_t next(uint32_t result, uint32_t value, int) { return result + value; }
};
struct SignedMost {
  static uint32_t first(uint32_t value, int) { return value; }
  static uint32_t next(uint32_t result, uint32_t value, int) {
    return static_cast<uint32_t>(std::max(static_cast<int32_t>(result), static_cast<int32_t>(value)));
  }
};

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulation::current->lane, first = lane & ~(width - 1);
  return emulation::value_of_lane(mask, "__shfl_sync", value, first | (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = emulation::current->lane;
  return emulation::value_of_lane(mask, "__shfl_up_sync", value, (lane & (width - 1)) >= delta ? lane - delta : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::value_of_lane(mask, "__shfl_xor_sync", value, (emulation::current->lane ^ bits) & 31);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
  return emulation::vote(mask, "__ballot_sync", value != 0, emulation::Ballot());
}
inline int __any_sync(unsigned mask, int value) {
  return emulation::vote(mask, "__any_sync", value != 0, emulation::Ballot()) != 0;
}
inline int __all_sync(unsigned mask, int value) { return !__any_sync(mask, !value); }
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return static_cast<T>(emulation::vote(mask, "__reduce_add_sync", static_cast<uint32_t>(value), emulation::Sum()));
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return static_cast<int>(
      emulation::vote(mask, "__reduce_max_sync", static_cast<uint32_t>(value), emulation::SignedMost()));
}
