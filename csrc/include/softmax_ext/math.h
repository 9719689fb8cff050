// The scalar functions that the formulas use; the CPU kernels add overloads for their vectors.
#pragma once

#include <cmath>

#include "softmax_ext/portability.h"

namespace softmax_ext {

SOFTMAX_EXT_HOST_DEVICE float exp_of(float x) { return ::expf(x); }
SOFTMAX_EXT_HOST_DEVICE double exp_of(double x) { return ::exp(x); }
SOFTMAX_EXT_HOST_DEVICE float log_of(float x) { return ::logf(x); }
SOFTMAX_EXT_HOST_DEVICE double log_of(double x) { return ::log(x); }
SOFTMAX_EXT_HOST_DEVICE float fma_of(float a, float b, float c) { return ::fmaf(a, b, c); }
SOFTMAX_EXT_HOST_DEVICE double fma_of(double a, double b, double c) { return ::fma(a, b, c); }

// The larger of the two; b where they cannot be ordered. A NaN in a row is never lost that way: it
// reaches the row's sum through exp.
template <class T>
SOFTMAX_EXT_HOST_DEVICE T max_of(T a, T b) {
  return a > b ? a : b;
}

// exp(a - b) with a <= b, where both may be -inf: an empty share then counts nothing instead of
// the NaN that (-inf) - (-inf) gives.
template <class T>
SOFTMAX_EXT_HOST_DEVICE T exp_of_difference(T a, T b) {
  return exp_of(b == -static_cast<T>(INFINITY) ? a : a - b);
}

}  // namespace softmax_ext
