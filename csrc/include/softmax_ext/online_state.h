// The running state of a row: its largest element and the sum of exp(element - max), which two
// shares of a row combine without a second look at their elements (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", arXiv 1805.02867).
#pragma once

#include "softmax_ext/math.h"

namespace softmax_ext {

template <class T>
struct OnlineState {
  T max;
  T sum;

  static SOFTMAX_EXT_FUNCTION OnlineState empty() {
    return {-static_cast<T>(INFINITY), static_cast<T>(0)};
  }
};

// A share of -inf only (max -inf, sum 0) changes nothing, and a sum of NaN stays NaN.
template <class T>
SOFTMAX_EXT_FUNCTION OnlineState<T> combine(OnlineState<T> a, OnlineState<T> b) {
  const T max = max_of(a.max, b.max);
  return {max, add_of(mul_of(a.sum, exp_of_difference(a.max, max)),
                      mul_of(b.sum, exp_of_difference(b.max, max)))};
}

}  // namespace softmax_ext
