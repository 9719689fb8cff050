// What is computed for each element, once for every schedule, host and device.
//
// T is float, double, or a vector of them with the functions of math.h and arithmetic operators.
//
//   Forward<op, T>   made of the row's max and sum of exp(x - max), each a T or a scalar for all of
//                    a vector; gives the output of x, or of e = exp(x - max) where a schedule has
//                    kept that.
//   Backward<op, T>  term() is what is summed over the row; made of that sum, gives the gradient.
#pragma once

#include "softmax_ext/math.h"
#include "softmax_ext/problem.h"

namespace softmax_ext {

template <Op op, class T>
struct Forward;

template <class T>
struct Forward<Op::kSoftmax, T> {
  T max;
  T sum;
  T reciprocal;

  Forward() = default;
  template <class M, class S>
  SOFTMAX_EXT_HOST_DEVICE Forward(M max, S sum) : max(max), sum(sum), reciprocal(S(1) / sum) {}

  // The same formula with each member m of another as f(m).
  template <class U, class F>
  static SOFTMAX_EXT_HOST_DEVICE Forward map(const Forward<Op::kSoftmax, U>& other, F f) {
    Forward result;
    result.max = f(other.max);
    result.sum = f(other.sum);
    result.reciprocal = f(other.reciprocal);
    return result;
  }

  SOFTMAX_EXT_HOST_DEVICE T of(T x) const { return of_exp(exp_of(x - max)); }

  // e / sum, as exact as a division: one Newton step corrects the product with the reciprocal
  // (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
  SOFTMAX_EXT_HOST_DEVICE T of_exp(T e) const {
    const T quotient = e * reciprocal;
    return fma_of(fma_of(-quotient, sum, e), reciprocal, quotient);
  }
};

template <class T>
struct Forward<Op::kLogSoftmax, T> {
  T max;
  T log_sum;

  Forward() = default;
  template <class M, class S>
  SOFTMAX_EXT_HOST_DEVICE Forward(M max, S sum) : max(max), log_sum(log_of(sum)) {}

  template <class U, class F>
  static SOFTMAX_EXT_HOST_DEVICE Forward map(const Forward<Op::kLogSoftmax, U>& other, F f) {
    Forward result;
    result.max = f(other.max);
    result.log_sum = f(other.log_sum);
    return result;
  }

  // In this order: max + log_sum would be rounded at the size of max.
  SOFTMAX_EXT_HOST_DEVICE T of(T x) const { return (x - max) - log_sum; }
};

template <Op op, class T>
struct Backward;

template <class T>
struct Backward<Op::kSoftmax, T> {
  T sum;

  static SOFTMAX_EXT_HOST_DEVICE T term(T grad, T output) { return grad * output; }
  SOFTMAX_EXT_HOST_DEVICE T of(T grad, T output) const { return output * (grad - sum); }
};

template <class T>
struct Backward<Op::kLogSoftmax, T> {
  T sum;

  static SOFTMAX_EXT_HOST_DEVICE T term(T grad, T) { return grad; }
  SOFTMAX_EXT_HOST_DEVICE T of(T grad, T output) const {
    return fma_of(-exp_of(output), sum, grad);
  }
};

}  // namespace softmax_ext
