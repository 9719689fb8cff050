// What is computed for each element, once for every schedule, host and device.
//
// T is float, double, or a vector of them with the functions of math.h and arithmetic operators.
//
// P is how exact exp and the division are: Full for a result of T, Rounded for one that is rounded to
// 16 bits afterwards.
//
//   Forward<op, T>   made of the row's max and sum of exp(x - max), each a T or a scalar for all of
//                    a vector; gives the output of x, or of e = exp(x - max) where a schedule has
//                    kept that.
//   Backward<op, T>  term() is what is summed over the row; made of that sum, gives the gradient.
#pragma once

#include "softmax_ext/math.h"
#include "softmax_ext/problem.h"

namespace softmax_ext {

template <class T>
struct Full {
  static SOFTMAX_EXT_FUNCTION T exp(T x) { return exp_of(x); }
  static SOFTMAX_EXT_FUNCTION T unscaled(T x) { return x; }

  // What quotient needs beside the reciprocal.
  template <class S>
  static SOFTMAX_EXT_FUNCTION S correction(S sum, S) {
    return sum;
  }
  // e / sum, as exact as a division: one Newton step corrects the product with the reciprocal
  // (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
  static SOFTMAX_EXT_FUNCTION T quotient(T e, T sum, T reciprocal) {
    const T product = mul_of(e, reciprocal);
    return fma_of(fma_of(-product, sum, e), reciprocal, product);
  }
};

#if defined(SOFTMAX_EXT_DEVICE)
// exp(x) 2^exponent, with one rounding of the exponent's argument and that of exp2: what it is off by
// changes the rounding to 16 bits of fewer than one result in a thousand. The factor cancels in
// e / sum. With an exponent of 24 nothing is flushed to 0 that bfloat16 has.
template <int exponent>
struct Rounded {
  static SOFTMAX_EXT_FUNCTION float exp(float x) {
    return exp2_of(fma_of(x, kLog2E, static_cast<float>(exponent)));
  }
  // A factor of what exp gives.
  static SOFTMAX_EXT_FUNCTION float unscaled(float x) {
    return mul_of(x, 1.0f / static_cast<float>(1 << exponent));
  }
  static SOFTMAX_EXT_FUNCTION float correction(float sum, float) { return sum; }
  static SOFTMAX_EXT_FUNCTION float quotient(float e, float, float reciprocal) {
    return mul_of(e, reciprocal);
  }
};
#endif

template <Op op, class T, class P = Full<T>>
struct Forward;

template <class T, class P>
struct Forward<Op::kSoftmax, T, P> {
  T max;
  T correction;
  T reciprocal;

  Forward() = default;
  template <class M, class S>
  SOFTMAX_EXT_FUNCTION Forward(M max, S sum) : Forward(max, sum, S(1) / sum) {}
  template <class M, class S>
  SOFTMAX_EXT_FUNCTION Forward(M max, S sum, S reciprocal)
      : max(max), correction(P::correction(sum, reciprocal)), reciprocal(reciprocal) {}

  // The same formula with each member m of another as f(m).
  template <class U, class F>
  static SOFTMAX_EXT_FUNCTION Forward map(const U& other, F f) {
    Forward result;
    result.max = f(other.max);
    result.correction = f(other.correction);
    result.reciprocal = f(other.reciprocal);
    return result;
  }

  SOFTMAX_EXT_FUNCTION T of(T x) const { return of_exp(P::exp(x - max)); }
  SOFTMAX_EXT_FUNCTION T of_exp(T e) const { return P::quotient(e, correction, reciprocal); }
};

template <class T, class P>
struct Forward<Op::kLogSoftmax, T, P> {
  T max;
  T log_sum;

  Forward() = default;
  template <class M, class S>
  SOFTMAX_EXT_FUNCTION Forward(M max, S sum) : max(max), log_sum(log_of(sum)) {}

  template <class U, class F>
  static SOFTMAX_EXT_FUNCTION Forward map(const U& other, F f) {
    Forward result;
    result.max = f(other.max);
    result.log_sum = f(other.log_sum);
    return result;
  }

  // In this order: max + log_sum would be rounded at the size of max.
  SOFTMAX_EXT_FUNCTION T of(T x) const { return (x - max) - log_sum; }
  // Of the row.
  SOFTMAX_EXT_FUNCTION T logsumexp() const { return max + log_sum; }
};

template <Op op, class T, class P = Full<T>>
struct Backward;

template <class T, class P>
struct Backward<Op::kSoftmax, T, P> {
  T sum;

  static SOFTMAX_EXT_FUNCTION T term(T grad, T output) { return mul_of(grad, output); }
  SOFTMAX_EXT_FUNCTION T of(T grad, T output) const { return output * (grad - sum); }
};

template <class T, class P>
struct Backward<Op::kLogSoftmax, T, P> {
  T sum;

  static SOFTMAX_EXT_FUNCTION T term(T grad, T) { return grad; }
  SOFTMAX_EXT_FUNCTION T of(T grad, T output) const {
    return fma_of(-P::exp(output), P::unscaled(sum), grad);
  }
};

// Of logsumexp: its output and the gradient of that.
template <class T, class P = Full<T>>
struct LogSumExpBackward {
  T grad;
  T output;

  SOFTMAX_EXT_FUNCTION T of(T x) const { return mul_of(P::exp(x - output), P::unscaled(grad)); }
};

}  // namespace softmax_ext
