// Vectors of L floats (GCC and Clang vector extensions), and their loads, stores and sums for each storage type.
// L = 1 is a plain float, so that the tail of an odd channel count runs through the same code.
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace dcngen_cpu {
namespace {

struct Half {  // IEEE binary16
  uint16_t bits;
};
struct Bfloat {  // the upper half of a float
  uint16_t bits;
};

template <int L>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef uint32_t Word __attribute__((vector_size(4 * L)));
  typedef int32_t Flag __attribute__((vector_size(4 * L)));
  typedef uint16_t Short __attribute__((vector_size(2 * L)));
};
template <>
struct Lanes<1> {
  typedef float Float;
  typedef uint32_t Word;
  typedef uint16_t Short;
};

template <int L>
using Vec = typename Lanes<L>::Float;

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <int L>
inline Vec<L> splat(float value) {
  if constexpr (L == 1) {
    return value;
  } else {
    return value - Vec<L>{};
  }
}

// --- widening and narrowing of 16-bit lanes ---

template <int L>
inline typename Lanes<L>::Word widen(const void* from) {
  typename Lanes<L>::Short narrow;
  __builtin_memcpy(&narrow, from, sizeof(narrow));
  if constexpr (L == 1) {
    return narrow;
  } else {
    return __builtin_convertvector(narrow, typename Lanes<L>::Word);
  }
}

template <int L>
inline void narrow_to(void* to, typename Lanes<L>::Word word) {
  typename Lanes<L>::Short narrow;
  if constexpr (L == 1) {
    narrow = static_cast<uint16_t>(word);
  } else {
    narrow = __builtin_convertvector(word, typename Lanes<L>::Short);
  }
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

// float16 in software, for machines without conversion instructions. Exponents differ by 112; moving the 15 bits of
// magnitude into place and scaling by 2^112 also sets subnormals right.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  uint32_t bits = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x0f800000u) bits = magnitude | 0x7f800000u;  // infinity, NaN
  return bits_as<float>(bits | (uint32_t{half} & 0x8000u) << 16);
}

// Round to nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 2^16 and more
  } else if (magnitude < 0x38800000u) {
    // Subnormal: in [0.5, 1) a float's spacing is that of subnormal halves, so the addition rounds.
    half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

// --- loads ---

template <int L>
inline Vec<L> load(const float* from) {
  Vec<L> to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}

template <int L>
inline Vec<L> load(const Bfloat* from) {
  return bits_as<Vec<L>>(widen<L>(from) << 16);
}

template <int L>
inline Vec<L> load(const Half* from) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
#if defined(__F16C__)
  if constexpr (L == 8) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  if constexpr (L == 4) return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  if constexpr (L == 1) return _cvtsh_ss(from->bits);
#elif defined(__aarch64__)
  if constexpr (L == 4) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
  }
#endif
  float to[L];
  for (int l = 0; l < L; ++l) to[l] = half_to_float(from[l].bits);
  return load<L>(to);
}

// --- stores: one rounding, to nearest even ---

template <int L>
inline void store(float* to, Vec<L> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <int L>
inline void store(Bfloat* to, Vec<L> value) {
  using Word = typename Lanes<L>::Word;
  const Word bits = bits_as<Word>(value);
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Word quiet_nan = (bits >> 16) | 0x40u;
  narrow_to<L>(to, (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

template <int L>
inline void store(Half* to, Vec<L> value) {
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
#if defined(__F16C__)
  if constexpr (L == 8) {
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  if constexpr (L == 4) {
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__aarch64__)
  if constexpr (L == 4) {
    return vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(value)));
  }
#endif
  float from[L];
  store<L>(from, value);
  for (int l = 0; l < L; ++l) to[l].bits = float_to_half(from[l]);
}

// Copies `count` elements between storage types through float.
template <class To, class From>
inline void convert(To* to, const From* from, int64_t count) {
  constexpr int L = DCNGEN_WIDE_LANES;
  int64_t c = 0;
  for (; c + L <= count; c += L) store<L>(to + c, load<L>(from + c));
  for (; c < count; ++c) store<1>(to + c, load<1>(from + c));
}

// --- sums over lanes: to[i] += sum of the lanes of v_i ---

template <int L>
inline void add_sums(float* to, Vec<L> v0, Vec<L> v1, Vec<L> v2, Vec<L> v3) {
  Vec<4> sums;
#if defined(__AVX__)
  if constexpr (L == 8) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v0, v1), _mm256_hadd_ps(v2, v3));
    sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    return store<4>(to, load<4>(to) + sums);
  }
#endif
  if constexpr (L == 4) {
#if defined(__SSE__)
    _MM_TRANSPOSE4_PS(v0, v1, v2, v3);
    sums = (v0 + v1) + (v2 + v3);
#elif defined(__aarch64__)
    sums = vpaddq_f32(vpaddq_f32(v0, v1), vpaddq_f32(v2, v3));
#else
    for (int l = 0; l < 4; ++l) sums = sums + Vec<4>{v0[l], v1[l], v2[l], v3[l]};
#endif
  } else if constexpr (L == 1) {
    sums = Vec<4>{v0, v1, v2, v3};
  }
  store<4>(to, load<4>(to) + sums);
}

}  // namespace
}  // namespace dcngen_cpu
