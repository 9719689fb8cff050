// The scalar functions that the formulas use; the CPU kernels add overloads for their vectors.
#pragma once

#include <cmath>
#include <cstring>

#include "softmax_ext/portability.h"

namespace softmax_ext {

SOFTMAX_EXT_FUNCTION double exp_of(double x) { return ::exp(x); }
SOFTMAX_EXT_FUNCTION float log_of(float x) { return ::logf(x); }
SOFTMAX_EXT_FUNCTION double log_of(double x) { return ::log(x); }
SOFTMAX_EXT_FUNCTION float log1p_of(float x) { return ::log1pf(x); }
SOFTMAX_EXT_FUNCTION double log1p_of(double x) { return ::log1p(x); }
SOFTMAX_EXT_FUNCTION float expm1_of(float x) { return ::expm1f(x); }
SOFTMAX_EXT_FUNCTION double expm1_of(double x) { return ::expm1(x); }
SOFTMAX_EXT_FUNCTION float tanh_of(float x) { return ::tanhf(x); }
SOFTMAX_EXT_FUNCTION double tanh_of(double x) { return ::tanh(x); }
SOFTMAX_EXT_FUNCTION float fma_of(float a, float b, float c) { return ::fmaf(a, b, c); }
SOFTMAX_EXT_FUNCTION double fma_of(double a, double b, double c) { return ::fma(a, b, c); }

// What is decided for each element: of a vector the answers are in its lanes.
template <class T>
SOFTMAX_EXT_FUNCTION bool is_less(T a, T b) {
  return a < b;
}
template <class T>
SOFTMAX_EXT_FUNCTION bool is_zero(T a) {
  return a == T(0);
}
template <class T>
SOFTMAX_EXT_FUNCTION T where(bool answer, T yes, T no) {
  return answer ? yes : no;
}

// Rounded on their own: a compiler must not fuse them into a multiply-add, here with one neighbour
// and there with another, or the same row would have other bits in another kernel.
#if defined(__CUDACC__)
SOFTMAX_EXT_FUNCTION float add_of(float a, float b) { return __fadd_rn(a, b); }
SOFTMAX_EXT_FUNCTION double add_of(double a, double b) { return __dadd_rn(a, b); }
SOFTMAX_EXT_FUNCTION float mul_of(float a, float b) { return __fmul_rn(a, b); }
SOFTMAX_EXT_FUNCTION double mul_of(double a, double b) { return __dmul_rn(a, b); }
#else
template <class T>
SOFTMAX_EXT_FUNCTION T add_of(T a, T b) {
  return a + b;
}
template <class T>
SOFTMAX_EXT_FUNCTION T mul_of(T a, T b) {
  return a * b;
}
#endif

constexpr float kLog2E = 1.44269502162933349609375f;
constexpr float kLog2ERest = 1.92596299112661746887e-8f;  // log2(e) - kLog2E

#if defined(SOFTMAX_EXT_DEVICE)

// 2^x by the special function unit, within two units in the last place of float32. What would be
// subnormal is 0.
SOFTMAX_EXT_FUNCTION float exp2_of(float x) {
  float y;
  SOFTMAX_EXT_PTX(y = ::exp2f(x); if (y < 0x1p-126f) y = 0, asm("ex2.approx.ftz.f32 %0, %1;"
                                                                : "=f"(y)
                                                                : "f"(x)));
  return y;
}

// exp(x) for x of at most 0: 2^n 2^f, n the integer nearest to x log2(e). n is read off the low bits
// of a float in [2^23, 2^24), with the bias of an exponent; it stays at -126 where 2^n would be
// subnormal, and the product is rounded once. log2(e) has two constants, so that f is exact to
// 2^-24 for every x.
SOFTMAX_EXT_FUNCTION float exp_of(float x) {
  constexpr float kBias = 0x1.8p23f + 127;
  const float shifted = ::fmaxf(::fmaf(x, kLog2E, kBias), kBias - 126);
  const float n = shifted - kBias;
  const float f = ::fmaf(x, kLog2ERest, ::fmaf(x, kLog2E, -n));
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 23;
  float power;
  memcpy(&power, &bits, sizeof(power));
  return exp2_of(f) * power;
}

// The larger of the two; the other one where one is NaN. A NaN in a row is not lost that way: it
// reaches the row's sum through exp.
SOFTMAX_EXT_FUNCTION float max_of(float a, float b) { return ::fmaxf(a, b); }
SOFTMAX_EXT_FUNCTION double max_of(double a, double b) { return ::fmax(a, b); }

#else

SOFTMAX_EXT_FUNCTION float exp_of(float x) { return ::expf(x); }

// The larger of the two; b where they cannot be ordered. A NaN in a row is never lost that way: it
// reaches the row's sum through exp.
template <class T>
SOFTMAX_EXT_FUNCTION T max_of(T a, T b) {
  return a > b ? a : b;
}

#endif

// What is subtracted from a row's elements: its max, or 0 where all are -inf, so that they count
// nothing instead of the NaN that (-inf) - (-inf) gives.
template <class T>
SOFTMAX_EXT_FUNCTION T shift_by(T max) {
  return max == -static_cast<T>(INFINITY) ? T(0) : max;
}

// exp(a - b) with a <= b, where both may be -inf: an empty share counts nothing.
template <class T>
SOFTMAX_EXT_FUNCTION T exp_of_difference(T a, T b) {
  return exp_of(a - shift_by(b));
}

}  // namespace softmax_ext
