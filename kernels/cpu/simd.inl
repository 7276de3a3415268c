// Vectors of L floats (GCC and Clang vector extensions), and their loads, stores and sums for each storage type.
// L = 1 is a plain float, so that the tail of an odd channel count runs through the same code.
#include <cstddef>
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

template <int L>
using Flags = typename Lanes<L>::Flag;  // integers; as the result of a comparison -1 where it holds, 0 elsewhere

#if defined(__clang__) || __GNUC__ >= 12
#define DCNGEN_SHUFFLE(L, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DCNGEN_SHUFFLE(L, a, b, ...) __builtin_shuffle(a, b, Flags<L>{__VA_ARGS__})
#endif

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

// --- pairs: even and odd elements of two vectors apart, and together again ---

template <int L>
inline Vec<L> evens(Vec<L> low, Vec<L> high);
template <int L>
inline Vec<L> odds(Vec<L> low, Vec<L> high);
template <int L>
inline Vec<L> joined_low(Vec<L> even, Vec<L> odd);
template <int L>
inline Vec<L> joined_high(Vec<L> even, Vec<L> odd);

#define DCNGEN_PAIRWISE(L, name, ...) \
  template <>                         \
  inline Vec<L> name<L>(Vec<L> a, Vec<L> b) { return DCNGEN_SHUFFLE(L, a, b, __VA_ARGS__); }

DCNGEN_PAIRWISE(4, evens, 0, 2, 4, 6)
DCNGEN_PAIRWISE(4, odds, 1, 3, 5, 7)
DCNGEN_PAIRWISE(4, joined_low, 0, 4, 1, 5)
DCNGEN_PAIRWISE(4, joined_high, 2, 6, 3, 7)
#if defined(__AVX__)
DCNGEN_PAIRWISE(8, evens, 0, 2, 4, 6, 8, 10, 12, 14)
DCNGEN_PAIRWISE(8, odds, 1, 3, 5, 7, 9, 11, 13, 15)
DCNGEN_PAIRWISE(8, joined_low, 0, 8, 1, 9, 2, 10, 3, 11)
DCNGEN_PAIRWISE(8, joined_high, 4, 12, 5, 13, 6, 14, 7, 15)
#endif
#if defined(__AVX512F__)
DCNGEN_PAIRWISE(16, evens, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
DCNGEN_PAIRWISE(16, odds, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#endif
#undef DCNGEN_PAIRWISE

// v[0..3] hold L quadruples one after the other; afterwards v[i] holds element i of each.
template <int L>
inline void split_quadruples(Vec<L> (&v)[4]) {
  const Vec<L> even_low = evens<L>(v[0], v[1]), even_high = evens<L>(v[2], v[3]);
  const Vec<L> odd_low = odds<L>(v[0], v[1]), odd_high = odds<L>(v[2], v[3]);
  v[0] = evens<L>(even_low, even_high);
  v[1] = evens<L>(odd_low, odd_high);
  v[2] = odds<L>(even_low, even_high);
  v[3] = odds<L>(odd_low, odd_high);
}

// --- widening and narrowing of 16-bit lanes ---

template <int L>
inline typename Lanes<L>::Word widen(const void* from) {
  using Word = typename Lanes<L>::Word;
#if defined(__AVX512F__)  // GCC splits the conversion in halves where it is left to it
  if constexpr (L == 16) {
    return bits_as<Word>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
  }
#endif
#if defined(__AVX2__)
  if constexpr (L == 8) return bits_as<Word>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#endif
  typename Lanes<L>::Short narrow;
  __builtin_memcpy(&narrow, from, sizeof(narrow));
  if constexpr (L == 1) {
    return narrow;
  } else {
    return __builtin_convertvector(narrow, Word);
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

template <int L>
inline void put(int32_t* to, Flags<L> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

// Asks for `count` elements of the pixel that comes 16 after this one: the few lines a pixel that one group has are too
// far apart for the processor to see a stream in them. Where that lies behind the tensor's end nothing happens.
template <bool kWrite, class T>
inline void prefetch(const T* pixel, int64_t stride, int count) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pixel) + static_cast<uintptr_t>(16 * stride) * sizeof(T);
  const uintptr_t end = begin + static_cast<uintptr_t>(count) * sizeof(T);
  for (uintptr_t at = begin; at < end; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(at), kWrite);
  __builtin_prefetch(reinterpret_cast<const void*>(end - 1), kWrite);
}

// --- sums over lanes ---

// Lane i: the sum of the lanes of v[i].
template <int L>
inline Vec<4> sums_of(Vec<L> (&v)[4]) {
#if defined(__AVX__)
  if constexpr (L == 8) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  }
#endif
  if constexpr (L == 4) {
    split_quadruples<4>(v);  // a transpose
    return (v[0] + v[1]) + (v[2] + v[3]);
  }
  if constexpr (L == 1) return Vec<4>{v[0], v[1], v[2], v[3]};
}

}  // namespace
}  // namespace dcngen_cpu
