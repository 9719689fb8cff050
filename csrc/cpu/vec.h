// One register of floats or doubles, for the instruction set that this file is compiled for.
//
// Arithmetic is that of the compiler's vector extension, so the portable version is the same code
// with 16-byte registers (SSE2, NEON, ...). AVX2 and AVX-512 replace what the extension cannot say:
// fused multiply-add, max, 16-bit conversions, partial loads and stores, scaling by 2^n.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "softmax_ext/math.h"
#include "softmax_ext/portability.h"

// Not where every access is checked: a function then has its checks once, or they take minutes to compile.
#if defined(__SANITIZE_ADDRESS__)
#define SOFTMAX_EXT_INLINE inline
#define SOFTMAX_EXT_LAMBDA
#else
#define SOFTMAX_EXT_INLINE inline __attribute__((always_inline))
#define SOFTMAX_EXT_LAMBDA __attribute__((always_inline))
#endif

namespace softmax_ext::cpu {
// Everything is local to the translation unit: the linker must not share it between instruction
// sets.
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SOFTMAX_EXT_AVX512 1
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define SOFTMAX_EXT_AVX2 1
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr bool kFusedMultiplyAdd = kRegisterBytes > 16;

// 16-bit elements are read into floats and rounded from floats, in registers.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Any byte but 0 is true: a view of other bytes as bool has them, and a C++ bool must not.
struct Bool {
  uint8_t byte;
};

template <class T>
constexpr bool kIsFloating =
    std::is_floating_point_v<T> || std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>;

// The type that an element is computed in.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The lanes of a register that stand for elements: all of them, or the first few.
struct All {};
struct First {
  int64_t count;
};

template <class To, class From>
SOFTMAX_EXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

typedef float RawFloat __attribute__((vector_size(kRegisterBytes)));
typedef double RawDouble __attribute__((vector_size(kRegisterBytes)));
typedef int32_t RawInt32 __attribute__((vector_size(kRegisterBytes)));
typedef int64_t RawInt64 __attribute__((vector_size(kRegisterBytes)));

template <class T>
struct Vec {
  static constexpr int kSize = kRegisterBytes / static_cast<int>(sizeof(T));
  using Raw = std::conditional_t<sizeof(T) == 4, RawFloat, RawDouble>;
  using RawInt = std::conditional_t<sizeof(T) == 4, RawInt32, RawInt64>;

  Raw raw;

  Vec() = default;
  SOFTMAX_EXT_INLINE Vec(Raw raw) : raw(raw) {}
  SOFTMAX_EXT_INLINE Vec(T value) : raw(value - Raw{}) {}

  SOFTMAX_EXT_INLINE Vec operator-() const { return -raw; }
  friend SOFTMAX_EXT_INLINE Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend SOFTMAX_EXT_INLINE Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend SOFTMAX_EXT_INLINE Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend SOFTMAX_EXT_INLINE Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
};

using VecF = Vec<float>;
using VecD = Vec<double>;

// ---- scalar conversions -------------------------------------------------------------------------

template <class T>
SOFTMAX_EXT_INLINE T to_float(T x) {
  return x;
}

SOFTMAX_EXT_INLINE float to_float(Bool x) { return x.byte != 0; }

SOFTMAX_EXT_INLINE float to_float(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

SOFTMAX_EXT_INLINE float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinite or NaN
    return bit_cast<float>(sign | 0x7f800000 | (magnitude << 13));
  }
  // 2^-24 for subnormals; else the exponent is moved from bias 15 to bias 127.
  const float value = magnitude < 0x0400 ? static_cast<float>(magnitude) * 0x1p-24f
                                         : bit_cast<float>((magnitude << 13) + 0x38000000);
  return bit_cast<float>(sign | bit_cast<uint32_t>(value));
}

SOFTMAX_EXT_INLINE void round_to(float x, BFloat16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

SOFTMAX_EXT_INLINE void round_to(float x, Float16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;                     // NaN
  } else if (magnitude >= 0x47800000) {  // 2^16 and above
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    result = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000) | result);
}

SOFTMAX_EXT_INLINE void round_to(double x, float* to) { *to = static_cast<float>(x); }
SOFTMAX_EXT_INLINE void round_to(float x, double* to) { *to = x; }

// To 16 bits by way of a float rounded to odd, so that the second rounding sees what the first cut
// off (Boldo and Melquiond, "When double rounding is odd", 2005).
template <class T>
SOFTMAX_EXT_INLINE void round_to(double x, T* to) {
  const float nearest = static_cast<float>(x);
  uint32_t bits = bit_cast<uint32_t>(nearest);
  if (nearest != x && x == x) {
    if (std::fabs(nearest) > std::fabs(x)) --bits;
    bits |= 1;
  }
  round_to(bit_cast<float>(bits), to);
}

// ---- loads and stores: lanes without an element hold `fill` -------------------------------------
//
// stream is a store past the caches, where the instruction set has one, to memory aligned to what it
// writes; other threads may see it only after a fence.
constexpr bool kStreams = kRegisterBytes > 16;

// Of masked accesses and streaming stores, which the compiler does not check: reads what is not theirs.
template <class T>
SOFTMAX_EXT_INLINE void check_access([[maybe_unused]] const T* p, [[maybe_unused]] int64_t count) {
#if defined(__SANITIZE_ADDRESS__)
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  const void* wrong = __asan_region_is_poisoned(const_cast<T*>(p), bytes);
  if (wrong != nullptr) static_cast<void>(*static_cast<const volatile char*>(wrong));
#endif
}

// Copies fewer elements than a register has, by moves of 32, 16, 8, 4 and 2 bytes.
template <class T>
SOFTMAX_EXT_INLINE void copy_elements(T* to, const T* from, int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  char* target = reinterpret_cast<char*>(to);
  const char* source = reinterpret_cast<const char*>(from);
  const auto move = [&](auto size) SOFTMAX_EXT_LAMBDA {
    if constexpr (size() >= sizeof(T) && size() < Vec<compute_t<T>>::kSize * sizeof(T)) {
      if ((bytes & size()) == 0) return;
      std::memcpy(target, source, size());
      target += size();
      source += size();
    }
  };
  move(std::integral_constant<size_t, 32>{});
  move(std::integral_constant<size_t, 16>{});
  move(std::integral_constant<size_t, 8>{});
  move(std::integral_constant<size_t, 4>{});
  move(std::integral_constant<size_t, 2>{});
}

#if defined(SOFTMAX_EXT_AVX512)

SOFTMAX_EXT_INLINE __mmask16 mask_of(First lanes) {
  return static_cast<__mmask16>((1u << lanes.count) - 1);
}

SOFTMAX_EXT_INLINE VecF widen(const Float16*, __m256i bits) { return _mm512_cvtph_ps(bits); }
SOFTMAX_EXT_INLINE VecF widen(const BFloat16*, __m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
SOFTMAX_EXT_INLINE __m256i narrow(const Float16*, VecF x) {
  return _mm512_cvtps_ph(x.raw, _MM_FROUND_TO_NEAREST_INT);
}
// x is a number or a plain NaN, which is still one when something has been added to its lower half.
SOFTMAX_EXT_INLINE __m256i narrow(const BFloat16*, VecF x) {
  const __m512i bits = _mm512_castps_si512(x.raw);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
  const __m512i upper = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,
                                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded));
}

SOFTMAX_EXT_INLINE VecF load(const float* p, All, float) { return _mm512_loadu_ps(p); }
SOFTMAX_EXT_INLINE VecF load(const float* p, First lanes, float fill) {
  check_access(p, lanes.count);
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask_of(lanes), p);
}
SOFTMAX_EXT_INLINE VecD load(const double* p, All, double) { return _mm512_loadu_pd(p); }
SOFTMAX_EXT_INLINE VecD load(const double* p, First lanes, double fill) {
  check_access(p, lanes.count);
  return _mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>(mask_of(lanes)), p);
}
template <class T>
SOFTMAX_EXT_INLINE VecF load(const T* p, All, float) {
  return widen(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class T>
SOFTMAX_EXT_INLINE VecF load(const T* p, First lanes, float fill) {
  check_access(p, lanes.count);
  const __mmask16 mask = mask_of(lanes);
  const VecF x = widen(p, _mm256_maskz_loadu_epi16(mask, p));
  return _mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, x.raw);
}

SOFTMAX_EXT_INLINE void store(float* p, All, VecF x) { _mm512_storeu_ps(p, x.raw); }
SOFTMAX_EXT_INLINE void store(double* p, All, VecD x) { _mm512_storeu_pd(p, x.raw); }
template <class T>
SOFTMAX_EXT_INLINE void store(T* p, All, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, x));
}

SOFTMAX_EXT_INLINE void stream_fence() { _mm_sfence(); }
SOFTMAX_EXT_INLINE void stream(float* p, VecF x) {
  check_access(p, VecF::kSize);
  _mm512_stream_ps(p, x.raw);
}
SOFTMAX_EXT_INLINE void stream(double* p, VecD x) {
  check_access(p, VecD::kSize);
  _mm512_stream_pd(p, x.raw);
}
template <class T>
SOFTMAX_EXT_INLINE void stream(T* p, VecF x) {
  check_access(p, VecF::kSize);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, x));
}

#else

// What memory at p holds, whatever its alignment.
template <class To, class T>
SOFTMAX_EXT_INLINE To read(const T* p) {
  To to;
  std::memcpy(&to, p, sizeof(to));
  return to;
}

SOFTMAX_EXT_INLINE VecF load(const float* p, All, float) { return read<RawFloat>(p); }
SOFTMAX_EXT_INLINE VecD load(const double* p, All, double) { return read<RawDouble>(p); }
SOFTMAX_EXT_INLINE void store(float* p, All, VecF x) { std::memcpy(p, &x.raw, sizeof(x.raw)); }
SOFTMAX_EXT_INLINE void store(double* p, All, VecD x) { std::memcpy(p, &x.raw, sizeof(x.raw)); }

#if defined(SOFTMAX_EXT_AVX2)

SOFTMAX_EXT_INLINE VecF widen(const Float16*, __m128i bits) { return _mm256_cvtph_ps(bits); }
SOFTMAX_EXT_INLINE VecF widen(const BFloat16*, __m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
SOFTMAX_EXT_INLINE __m128i narrow(const Float16*, VecF x) {
  return _mm256_cvtps_ph(x.raw, _MM_FROUND_TO_NEAREST_INT);
}
// As with AVX-512.
SOFTMAX_EXT_INLINE __m128i narrow(const BFloat16*, VecF x) {
  const __m256i bits = _mm256_castps_si256(x.raw);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i wide = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
template <class T>
SOFTMAX_EXT_INLINE VecF load(const T* p, All, float) {
  return widen(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SOFTMAX_EXT_INLINE VecF load(const float* p, First lanes, float fill) {
  check_access(p, lanes.count);
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes.count)), index);
  return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask),
                          _mm256_castsi256_ps(mask));
}
SOFTMAX_EXT_INLINE VecD load(const double* p, First lanes, double fill) {
  check_access(p, lanes.count);
  const __m256i index = _mm256_setr_epi64x(0, 1, 2, 3);
  const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(lanes.count), index);
  return _mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, mask),
                          _mm256_castsi256_pd(mask));
}
template <class T>
SOFTMAX_EXT_INLINE void store(T* p, All, VecF x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, x));
}
SOFTMAX_EXT_INLINE void stream_fence() { _mm_sfence(); }
SOFTMAX_EXT_INLINE void stream(float* p, VecF x) {
  check_access(p, VecF::kSize);
  _mm256_stream_ps(p, x.raw);
}
SOFTMAX_EXT_INLINE void stream(double* p, VecD x) {
  check_access(p, VecD::kSize);
  _mm256_stream_pd(p, x.raw);
}
template <class T>
SOFTMAX_EXT_INLINE void stream(T* p, VecF x) {
  check_access(p, VecF::kSize);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(p, x));
}

#else

template <class T>
SOFTMAX_EXT_INLINE VecF load(const T* p, All, float) {
  VecF x;
  for (int k = 0; k < VecF::kSize; ++k) x.raw[k] = to_float(p[k]);
  return x;
}
template <class T>
SOFTMAX_EXT_INLINE void store(T* p, All, VecF x) {
  for (int k = 0; k < VecF::kSize; ++k) round_to(x.raw[k], p + k);
}
SOFTMAX_EXT_INLINE void stream_fence() {}
template <class T>
SOFTMAX_EXT_INLINE void stream(T* p, Vec<compute_t<T>> x) {
  store(p, All{}, x);
}

#endif

// Through registers: a load of what was stored in parts just before would wait for these stores.
template <class T, int... kLane>
SOFTMAX_EXT_INLINE Vec<compute_t<T>> load_lanes(const T* p, First lanes, compute_t<T> fill,
                                                std::integer_sequence<int, kLane...>) {
  Vec<compute_t<T>> x(fill);
  ((kLane < lanes.count ? void(x.raw[kLane] = to_float(p[kLane])) : void()), ...);
  return x;
}

template <class T>
SOFTMAX_EXT_INLINE Vec<compute_t<T>> load(const T* p, First lanes, compute_t<T> fill) {
  constexpr int kSize = Vec<compute_t<T>>::kSize;
  return load_lanes(p, lanes, fill, std::make_integer_sequence<int, kSize>{});
}

#endif

// Exactly the bytes of the elements: the next row's first load may share its address modulo 4096
// with this store, and would wait for a masked store of a whole register.
template <class T>
SOFTMAX_EXT_INLINE void store(T* p, First lanes, Vec<compute_t<T>> x) {
  T all[Vec<compute_t<T>>::kSize];
  store(all, All{}, x);
  copy_elements(p, all, lanes.count);
}

// A NaN as any other: quiet, and with nothing in the half of it that bfloat16 has not. What is computed
// from 16-bit elements has no others.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> plain_nan(Vec<T> x) {
  return x.raw == x.raw ? x.raw : Vec<T>(std::numeric_limits<T>::quiet_NaN()).raw;
}

// Rounds each lane once, from the type computed in, from elements of type From, to the one stored.
template <class From, class T, class Lanes, class A = compute_t<From>>
SOFTMAX_EXT_INLINE void store_as(T* p, Lanes lanes, Vec<A> x) {
  if constexpr (std::is_same_v<From, T>) {
    store(p, lanes, x);
  } else if constexpr (std::is_same_v<compute_t<T>, A>) {
    store(p, lanes, plain_nan(x));
  } else {
    int64_t count = Vec<A>::kSize;
    if constexpr (std::is_same_v<Lanes, First>) count = lanes.count;
    for (int64_t k = 0; k < count; ++k) round_to(x.raw[k], p + k);
  }
}

// ---- the functions that formula.h uses ----------------------------------------------------------

#if defined(SOFTMAX_EXT_AVX512)
// b where the two cannot be ordered, as max_of for scalars.
SOFTMAX_EXT_INLINE VecF max_of(VecF a, VecF b) { return _mm512_max_ps(a.raw, b.raw); }
SOFTMAX_EXT_INLINE VecF min_of(VecF a, VecF b) { return _mm512_min_ps(a.raw, b.raw); }
SOFTMAX_EXT_INLINE VecD max_of(VecD a, VecD b) { return _mm512_max_pd(a.raw, b.raw); }
SOFTMAX_EXT_INLINE VecD min_of(VecD a, VecD b) { return _mm512_min_pd(a.raw, b.raw); }
SOFTMAX_EXT_INLINE VecF fma_of(VecF a, VecF b, VecF c) {
  return _mm512_fmadd_ps(a.raw, b.raw, c.raw);
}
SOFTMAX_EXT_INLINE VecD fma_of(VecD a, VecD b, VecD c) {
  return _mm512_fmadd_pd(a.raw, b.raw, c.raw);
}
#elif defined(SOFTMAX_EXT_AVX2)
SOFTMAX_EXT_INLINE VecF max_of(VecF a, VecF b) { return _mm256_max_ps(a.raw, b.raw); }
SOFTMAX_EXT_INLINE VecF min_of(VecF a, VecF b) { return _mm256_min_ps(a.raw, b.raw); }
SOFTMAX_EXT_INLINE VecD max_of(VecD a, VecD b) { return _mm256_max_pd(a.raw, b.raw); }
SOFTMAX_EXT_INLINE VecD min_of(VecD a, VecD b) { return _mm256_min_pd(a.raw, b.raw); }
SOFTMAX_EXT_INLINE VecF fma_of(VecF a, VecF b, VecF c) {
  return _mm256_fmadd_ps(a.raw, b.raw, c.raw);
}
SOFTMAX_EXT_INLINE VecD fma_of(VecD a, VecD b, VecD c) {
  return _mm256_fmadd_pd(a.raw, b.raw, c.raw);
}
#else
template <class T>
SOFTMAX_EXT_INLINE Vec<T> max_of(Vec<T> a, Vec<T> b) {
  return a.raw > b.raw ? a.raw : b.raw;
}
template <class T>
SOFTMAX_EXT_INLINE Vec<T> min_of(Vec<T> a, Vec<T> b) {
  return a.raw < b.raw ? a.raw : b.raw;
}
template <class T>
SOFTMAX_EXT_INLINE Vec<T> fma_of(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
#endif

// exp(x) is 2^n * exp(r) with n = round(x / ln 2) and r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2].
// ln 2 is taken in two parts, the first short enough that its product with n is exact (Cody and
// Waite, 1980); exp(r) is 1 + r + r^2 q(r) with q a minimax polynomial for the relative error
// (2^-28 for float, 2^-57 for double).
template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  // exp is 0 below kZero. 2^n at kLowest is still in range, and the product with it far enough below
  // all subnormal numbers: one that could be rounded to such takes some processors 100 cycles.
  static constexpr float kZero = -104.0f;
  static constexpr float kLowest = -170.0f;
  static constexpr float kHighest = 89.0f;  // exp overflows
  static constexpr float kLn2High = 0x1.63p-1f;
  static constexpr float kLn2Low = -0x1.bd0106p-13f;
  static constexpr float kRound = 0x1.8p23f;  // added and taken away, it rounds to an integer
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr int kUp = 120;  // 2^(n + kUp) is normal from kLowest to 0
  static constexpr float kDown = 0x1p-120f;
  static constexpr float kPolynomial[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f4p-5f,
                                          0x1.123a20p-7f, 0x1.6a23c8p-10f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kZero = -746.0;
  static constexpr double kLowest = -1000.0;
  static constexpr double kHighest = 710.0;
  static constexpr double kLn2High = 0x1.62e4p-1;
  static constexpr double kLn2Low = 0x1.7f7d1cf79abcap-20;
  static constexpr double kRound = 0x1.8p52;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr int kUp = 1000;
  static constexpr double kDown = 0x1p-1000;
  static constexpr double kPolynomial[] = {
      0x1.000000000000ap-1,  0x1.55555555554f9p-3,  0x1.555555555083fp-5,  0x1.1111111127d05p-7,
      0x1.6c16c18438ab3p-10, 0x1.a01a012a11caep-13, 0x1.a01999e26baabp-16, 0x1.71df25ae6b8eap-19,
      0x1.28ad9b8387350p-22, 0x1.ad7f44a01e787p-26};
};

// The signs that the argument of exp may have: in the first case, n is 0 or less.
enum class Sign { kNonpositive, kAny };

// q * 2^n, where that is exp(x), with one rounding also where the result is subnormal.
template <Sign sign, class T>
SOFTMAX_EXT_INLINE Vec<T> scale(Vec<T> q, Vec<T> n, [[maybe_unused]] Vec<T> x) {
#if defined(SOFTMAX_EXT_AVX512)
  // Of lanes below kZero, q and n may be anything. A NaN is not below.
  if constexpr (sizeof(T) == 4) {
    const __mmask16 counts =
        _mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(ExpConstants<T>::kZero), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(counts, q.raw, n.raw);
  } else {
    const __mmask8 counts =
        _mm512_cmp_pd_mask(x.raw, _mm512_set1_pd(ExpConstants<T>::kZero), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_pd(counts, q.raw, n.raw);
  }
#else
  // Two factors, as 2^n itself may be too small for a normal number. Adding kRound and the bias
  // leaves the biased exponent in the lowest bits.
  using C = ExpConstants<T>;
  const auto power = [](Vec<T> exponent, int more) SOFTMAX_EXT_LAMBDA {
    const auto bits =
        bit_cast<typename Vec<T>::RawInt>(exponent + Vec<T>(C::kRound + C::kBias + T(more)));
    return Vec<T>(bit_cast<typename Vec<T>::Raw>(bits << C::kMantissaBits));
  };
  if constexpr (sign == Sign::kNonpositive) return q * power(n, C::kUp) * Vec<T>(C::kDown);
  const Vec<T> half = (n * Vec<T>(T(0.5)) + Vec<T>(C::kRound)) - Vec<T>(C::kRound);
  return (q * power(half, 0)) * power(n - half, 0);
#endif
}

// For x of the sign named, or NaN.
template <Sign sign, class T>
SOFTMAX_EXT_INLINE Vec<T> exp_of_signed(Vec<T> x) {
  using C = ExpConstants<T>;
#if !defined(SOFTMAX_EXT_AVX512)
  x = max_of(Vec<T>(C::kLowest), x);  // a NaN passes
#endif
  const Vec<T> n =
      fma_of(x, Vec<T>(T(1.44269504088896340736)), Vec<T>(C::kRound)) - Vec<T>(C::kRound);
  Vec<T> r = fma_of(n, Vec<T>(-C::kLn2High), x);
  r = fma_of(n, Vec<T>(-C::kLn2Low), r);
  constexpr int kDegree = static_cast<int>(sizeof(C::kPolynomial) / sizeof(T)) - 1;
  Vec<T> q(C::kPolynomial[kDegree]);
  for (int k = kDegree - 1; k >= 0; --k) q = fma_of(q, r, Vec<T>(C::kPolynomial[k]));
  // 1 + r + r^2 q, with one rounding of r where products are rounded on their own.
  if constexpr (kFusedMultiplyAdd) {
    q = fma_of(q, r, Vec<T>(T(1)));
    q = fma_of(q, r, Vec<T>(T(1)));
  } else {
    q = (r * r * q + r) + Vec<T>(T(1));
  }
  return scale<sign>(q, n, x);
}

template <class T>
SOFTMAX_EXT_INLINE Vec<T> exp_of_nonpositive(Vec<T> x) {
  return exp_of_signed<Sign::kNonpositive>(x);
}

template <class T>
SOFTMAX_EXT_INLINE Vec<T> exp_of(Vec<T> x) {
  return exp_of_signed<Sign::kAny>(min_of(Vec<T>(ExpConstants<T>::kHighest), x));
}

// a + b, rounded, and what is rounded off (Knuth, "The Art of Computer Programming", volume 2, 4.2.2).
template <class T>
SOFTMAX_EXT_INLINE T sum_of(T a, T b, T* rest) {
  const T sum = a + b;
  const T of_b = sum - a;
  *rest = (a - (sum - of_b)) + (b - of_b);
  return sum;
}

template <class T>
struct LogConstants;

template <>
struct LogConstants<float> {
  static constexpr int32_t kSqrtHalf = 0x3f3504f3;
};

template <>
struct LogConstants<double> {
  static constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
};

// log(1 + f) = f + small, with 1 + f in [sqrt(1/2), sqrt(2)), and `add` added to small.
//
// f - f^2/2 + f^3 p(f), with p a minimax polynomial for the relative error (2^-30).
SOFTMAX_EXT_INLINE VecF small_of_log(VecF f, VecF add) {
  constexpr float kPolynomial[] = {0x1.555548p-2f,  -0x1.000006p-2f, 0x1.99a4b6p-3f,
                                   -0x1.555c4cp-3f, 0x1.23376ap-3f,  -0x1.fc2224p-4f,
                                   0x1.e6f066p-4f,  -0x1.de3b6ap-4f, 0x1.1456e2p-4f};
  const VecF square = f * f;
  VecF p(kPolynomial[8]);
  for (int k = 7; k >= 0; --k) p = fma_of(p, f, VecF(kPolynomial[k]));
  return fma_of(square, VecF(-0.5f), fma_of(f * square, p, add));
}

// With s = f / (2 + f), f - f^2/2 + s (f^2/2 + s^2 p(s^2)); p is that of FreeBSD's e_log.c (2^-58).
SOFTMAX_EXT_INLINE VecD small_of_log(VecD f, VecD add) {
  constexpr double kPolynomial[] = {
      0x1.5555555555593p-1, 0x1.999999997fa04p-2, 0x1.2492494229359p-2, 0x1.c71c51d8e78afp-3,
      0x1.7466496cb03dep-3, 0x1.39a09d078c69fp-3, 0x1.2f112df3e5244p-3};
  const VecD s = f / (f + VecD(2.0)), square = s * s, half = f * f * VecD(0.5);
  VecD p(kPolynomial[6]);
  for (int k = 5; k >= 0; --k) p = fma_of(p, square, VecD(kPolynomial[k]));
  return fma_of(s, fma_of(square, p, half), add) - half;
}

// log(x + more), and what it is rounded off, of a row's sum: x is 1 or more, or NaN, or 0 where the row is
// all -inf and its output NaN whatever the logarithm is; `more` is an ulp of it or so. x is 2^n * (1 + f).
template <class T>
SOFTMAX_EXT_INLINE Vec<T> log_of(Vec<T> x, Vec<T> more, Vec<T>* rest) {
  using C = ExpConstants<T>;
  using Raw = typename Vec<T>::Raw;
  using RawInt = typename Vec<T>::RawInt;
  const Vec<T> one(T(1));
  const auto bits = bit_cast<RawInt>(x);
  const RawInt exponent = (bits - LogConstants<T>::kSqrtHalf) >> C::kMantissaBits;
  // The integer in the low bits of kRound.
  const Vec<T> n =
      Vec<T>(bit_cast<Raw>(exponent + bit_cast<RawInt>(Vec<T>(C::kRound)))) - Vec<T>(C::kRound);
  const RawInt scale = exponent << C::kMantissaBits;
  const Vec<T> f = Vec<T>(bit_cast<Raw>(bits - scale)) - one;
  // What `more` adds: more / x, to a few percent, with 1 - f + f^2 for 1 / (1 + f).
  const Vec<T> inverse = Vec<T>(bit_cast<Raw>(bit_cast<RawInt>(one) - scale));
  const Vec<T> of_more = (more * inverse) * fma_of(f, f, one - f);
  const Vec<T> small = small_of_log(f, fma_of(n, Vec<T>(C::kLn2Low), of_more));
  // The product is exact. Of two summands the first is the larger, or 0 (Dekker, "A floating-point
  // technique for extending the available precision", 1971), or both are far below an ulp of n ln 2.
  const Vec<T> of_n = n * Vec<T>(C::kLn2High), of_f = f + small, log = of_n + of_f;
  *rest = (of_f - (log - of_n)) + (small - (of_f - f));
  return x.raw == x.raw ? log.raw : x.raw;
}

template <class T>
SOFTMAX_EXT_INLINE Vec<T> zero_if_nan(Vec<T> x) {
  return x.raw == x.raw ? x.raw : typename Vec<T>::Raw{};
}

// A running sum, and what its additions have rounded off (Neumaier, "Rundungsfehleranalyse einiger
// Verfahren zur Summation endlicher Summen", 1974): its error does not grow with dim.
template <class V>
struct ExactSum {
  V sum;
  V rest;

  ExactSum() = default;
  SOFTMAX_EXT_INLINE ExactSum(V sum) : sum(sum), rest(V(0)) {}
  SOFTMAX_EXT_INLINE ExactSum(V sum, V rest) : sum(sum), rest(rest) {}

  SOFTMAX_EXT_INLINE void add(V term) {
    V lost;
    sum = sum_of(sum, term, &lost);
    rest = rest + lost;
  }

  SOFTMAX_EXT_INLINE void scale(V factor) {
    sum = sum * factor;
    rest = rest * factor;
  }

  // An infinite sum has no rest.
  SOFTMAX_EXT_INLINE V rounded() const { return sum + zero_if_nan(rest); }

  friend SOFTMAX_EXT_INLINE ExactSum operator+(ExactSum a, ExactSum b) {
    a.add(b.sum);
    a.rest = a.rest + b.rest;
    return a;
  }
};

// x, or 0 where x is -inf: what to subtract from elements of which it is the largest.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> shift_of(Vec<T> max) {
  const typename Vec<T>::Raw infinity = Vec<T>(-static_cast<T>(INFINITY)).raw;
  return max.raw == infinity ? typename Vec<T>::Raw{} : max.raw;
}

// ---- over the lanes -----------------------------------------------------------------------------
//
// Halves are combined, then quarters, and so on; both functions do so in the same order.

// Lanes of a and b, seen as segments of 2 * kHalf lanes each: the first (kHigh: the second) halves
// of a's segments, then of b's.
template <int kHalf, bool kHigh, class T, int... kLane>
SOFTMAX_EXT_INLINE Vec<T> halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(
      a.raw, b.raw, (kLane / kHalf * 2 * kHalf + kLane % kHalf + (kHigh ? kHalf : 0))...);
}

template <int kHalf, class T, class Combine>
SOFTMAX_EXT_INLINE auto combine_halves(Vec<T> a, Vec<T> b, Combine combine) {
  using Lanes = std::make_integer_sequence<int, Vec<T>::kSize>;
  return combine(halves<kHalf, false>(a, b, Lanes{}), halves<kHalf, true>(a, b, Lanes{}));
}

// Exchanges rows and lanes. A step takes the even lanes of two neighbouring rows for one row, and the odd
// ones for another: it moves the last bit of a lane's number to the front of its row's.
template <class T>
SOFTMAX_EXT_INLINE void transpose(Vec<T>* square) {
  constexpr int kSize = Vec<T>::kSize;
  using Lanes = std::make_integer_sequence<int, kSize>;
  for (int size = kSize; size > 1; size /= 2) {
    Vec<T> next[kSize];
    for (int k = 0; k < kSize / 2; ++k) {
      next[k] = halves<1, false>(square[2 * k], square[2 * k + 1], Lanes{});
      next[k + kSize / 2] = halves<1, true>(square[2 * k], square[2 * k + 1], Lanes{});
    }
    for (int k = 0; k < kSize; ++k) square[k] = next[k];
  }
}

// Lane k is lane lanes[k] of x.
#if defined(SOFTMAX_EXT_AVX512)
SOFTMAX_EXT_INLINE VecF permute(VecF x, RawInt32 lanes) {
  return _mm512_permutexvar_ps(bit_cast<__m512i>(lanes), x.raw);
}
SOFTMAX_EXT_INLINE VecD permute(VecD x, RawInt64 lanes) {
  return _mm512_permutexvar_pd(bit_cast<__m512i>(lanes), x.raw);
}
#elif defined(SOFTMAX_EXT_AVX2)
SOFTMAX_EXT_INLINE VecF permute(VecF x, RawInt32 lanes) {
  return _mm256_permutevar8x32_ps(x.raw, bit_cast<__m256i>(lanes));
}
SOFTMAX_EXT_INLINE VecD permute(VecD x, RawInt64 lanes) {
  const RawInt64 halves = (lanes << 1) | ((lanes << 33) | (int64_t{1} << 32));
  return bit_cast<RawDouble>(permute(VecF(bit_cast<RawFloat>(x)), bit_cast<RawInt32>(halves)));
}
#else
template <class T>
SOFTMAX_EXT_INLINE Vec<T> permute(Vec<T> x, typename Vec<T>::RawInt lanes) {
  Vec<T> result;
  for (int k = 0; k < Vec<T>::kSize; ++k) result.raw[k] = x.raw[lanes[k]];
  return result;
}
#endif

// x in the lanes that stand for elements, `fill` in the others.
template <class T, int... kLane>
SOFTMAX_EXT_INLINE Vec<T> first_of(Vec<T> x, First lanes, T fill,
                                   std::integer_sequence<int, kLane...>) {
  const typename Vec<T>::RawInt numbers = {kLane...};
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return numbers < static_cast<Lane>(lanes.count) ? x.raw : Vec<T>(fill).raw;
}
template <class T>
SOFTMAX_EXT_INLINE Vec<T> first_of(Vec<T> x, First lanes, T fill) {
  return first_of(x, lanes, fill, std::make_integer_sequence<int, Vec<T>::kSize>{});
}

struct Add {
  template <class V>
  SOFTMAX_EXT_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};

struct Max {
  template <class V>
  SOFTMAX_EXT_INLINE V operator()(V a, V b) const {
    return max_of(a, b);
  }
};

#if defined(SOFTMAX_EXT_AVX512)
SOFTMAX_EXT_INLINE float max_over_lanes(VecF x) { return _mm512_reduce_max_ps(x.raw); }
SOFTMAX_EXT_INLINE double max_over_lanes(VecD x) { return _mm512_reduce_max_pd(x.raw); }
SOFTMAX_EXT_INLINE float sum_over_lanes(VecF x) { return _mm512_reduce_add_ps(x.raw); }
SOFTMAX_EXT_INLINE double sum_over_lanes(VecD x) { return _mm512_reduce_add_pd(x.raw); }
#else
template <int kHalf, class T, class Combine>
SOFTMAX_EXT_INLINE T over_lanes(Vec<T> x, Combine combine) {
  x = combine_halves<kHalf>(x, x, combine);
  if constexpr (kHalf > 1) {
    return over_lanes<kHalf / 2>(x, combine);
  } else {
    return x.raw[0];
  }
}

template <class T>
SOFTMAX_EXT_INLINE T max_over_lanes(Vec<T> x) {
  return over_lanes<Vec<T>::kSize / 2>(x, Max{});
}
template <class T>
SOFTMAX_EXT_INLINE T sum_over_lanes(Vec<T> x) {
  return over_lanes<Vec<T>::kSize / 2>(x, Add{});
}
#endif

template <int kHalf, class T, class Combine>
SOFTMAX_EXT_INLINE void over_lanes_of_all(Vec<T>* x, T* result, Combine combine) {
  for (int k = 0; k < kHalf; ++k) {
    x[k] = combine_halves<kHalf>(x[2 * k], x[2 * k + 1], combine);
  }
  if constexpr (kHalf > 1) {
    over_lanes_of_all<kHalf / 2>(x, result, combine);
  } else {
    store(result, All{}, x[0]);
  }
}

// result[k] = max_over_lanes(x[k]), or sum, for k < count <= kSize. kSize at once take the steps of
// four or so. x is overwritten.
template <class T>
SOFTMAX_EXT_INLINE void max_over_lanes(Vec<T>* x, int64_t count, T* result) {
  constexpr int kSize = Vec<T>::kSize;
  if (count == kSize) return over_lanes_of_all<kSize / 2>(x, result, Max{});
  for (int64_t k = 0; k < count; ++k) result[k] = max_over_lanes(x[k]);
}
template <class T>
SOFTMAX_EXT_INLINE void sum_over_lanes(Vec<T>* x, int64_t count, T* result) {
  constexpr int kSize = Vec<T>::kSize;
  if (count == kSize) return over_lanes_of_all<kSize / 2>(x, result, Add{});
  for (int64_t k = 0; k < count; ++k) result[k] = sum_over_lanes(x[k]);
}

// The same of floats, from here on in double: neighbouring halves of a register as doubles, added.
typedef float HalfRawFloat __attribute__((vector_size(kRegisterBytes / 2)));

template <int... kLane>
SOFTMAX_EXT_INLINE VecD halves_added(VecF x, std::integer_sequence<int, kLane...>) {
  const HalfRawFloat low = __builtin_shufflevector(x.raw, x.raw, kLane...);
  const HalfRawFloat high = __builtin_shufflevector(x.raw, x.raw, (kLane + VecD::kSize)...);
  return VecD(__builtin_convertvector(low, RawDouble)) +
         VecD(__builtin_convertvector(high, RawDouble));
}
SOFTMAX_EXT_INLINE VecD halves_added(VecF x) {
  return halves_added(x, std::make_integer_sequence<int, VecD::kSize>{});
}

SOFTMAX_EXT_INLINE double exact_sum_over_lanes(VecF x) { return sum_over_lanes(halves_added(x)); }

// The sum of each of `count` <= kSize rows, in its lane.
SOFTMAX_EXT_INLINE ExactSum<VecF> exact_sum_over_lanes(VecF* x, int64_t count) {
  alignas(64) double sums[VecF::kSize] = {};
  for (int64_t k = 0; k < count; k += VecD::kSize) {
    VecD wide[VecD::kSize];
    const int64_t some = count - k < VecD::kSize ? count - k : VecD::kSize;
    for (int64_t j = 0; j < some; ++j) wide[j] = halves_added(x[k + j]);
    sum_over_lanes(wide, some, sums + k);
  }
  // As floats, and what is rounded off.
  const VecD low = load(sums, All{}, 0.0), high = load(sums + VecD::kSize, All{}, 0.0);
  const auto narrow = [](VecD a, VecD b) SOFTMAX_EXT_LAMBDA {
    VecF x;
    const HalfRawFloat parts[] = {__builtin_convertvector(a.raw, HalfRawFloat),
                                  __builtin_convertvector(b.raw, HalfRawFloat)};
    std::memcpy(&x.raw, parts, sizeof(parts));
    return x;
  };
  const VecF sum = narrow(low, high);
  HalfRawFloat parts[2];
  std::memcpy(parts, &sum.raw, sizeof(parts));
  return {sum, narrow(low - VecD(__builtin_convertvector(parts[0], RawDouble)),
                      high - VecD(__builtin_convertvector(parts[1], RawDouble)))};
}

// Of doubles, what the last two additions round off is kept: it is most of the error. The first of
// eight lanes adds nothing to a row of four or fewer.
struct AddExactly {
  template <class V>
  SOFTMAX_EXT_INLINE ExactSum<V> operator()(V a, V b) const {
    return ExactSum<V>(a) + ExactSum<V>(b);
  }
};

template <int kHalf>
SOFTMAX_EXT_INLINE auto add_halves(VecD a, VecD b) {
  return combine_halves<kHalf>(a, b, std::conditional_t<(kHalf > 2), Add, AddExactly>{});
}
template <int kHalf>
SOFTMAX_EXT_INLINE ExactSum<VecD> add_halves(ExactSum<VecD> a, ExactSum<VecD> b) {
  ExactSum<VecD> sum = add_halves<kHalf>(a.sum, b.sum);
  sum.rest = sum.rest + combine_halves<kHalf>(a.rest, b.rest, Add{});
  return sum;
}

// The sum of all lanes, in each.
template <int kHalf = VecD::kSize / 2, class S>
SOFTMAX_EXT_INLINE ExactSum<VecD> add_lanes(S x) {
  const auto sum = add_halves<kHalf>(x, x);
  if constexpr (kHalf > 1) {
    return add_lanes<kHalf / 2>(sum);
  } else {
    return sum;
  }
}

// Of kSize registers, each in its lane.
template <int kHalf = VecD::kSize / 2, class S>
SOFTMAX_EXT_INLINE ExactSum<VecD> add_lanes_of_all(const S* x) {
  decltype(add_halves<kHalf>(x[0], x[0])) sums[kHalf];
  for (int k = 0; k < kHalf; ++k) sums[k] = add_halves<kHalf>(x[2 * k], x[2 * k + 1]);
  if constexpr (kHalf > 1) {
    return add_lanes_of_all<kHalf / 2>(sums);
  } else {
    return sums[0];
  }
}

SOFTMAX_EXT_INLINE double exact_sum_over_lanes(VecD x) { return add_lanes(x).rounded().raw[0]; }

SOFTMAX_EXT_INLINE ExactSum<VecD> exact_sum_over_lanes(VecD* x, int64_t count) {
  if (count == VecD::kSize) return add_lanes_of_all(x);
  alignas(64) double sums[VecD::kSize] = {}, rests[VecD::kSize] = {};
  for (int64_t k = 0; k < count; ++k) {
    const ExactSum<VecD> sum = add_lanes(x[k]);
    sums[k] = sum.sum.raw[0];
    rests[k] = sum.rest.raw[0];
  }
  return {load(sums, All{}, 0.0), load(rests, All{}, 0.0)};
}

// The sums of `count` <= kSize rows as the backward takes them: of floats, in float.
SOFTMAX_EXT_INLINE void rounded_sum_over_lanes(VecF* x, int64_t count, float* result) {
  sum_over_lanes(x, count, result);
}
SOFTMAX_EXT_INLINE void rounded_sum_over_lanes(VecD* x, int64_t count, double* result) {
  store(result, All{}, exact_sum_over_lanes(x, count).rounded());
}

}  // namespace
}  // namespace softmax_ext::cpu
