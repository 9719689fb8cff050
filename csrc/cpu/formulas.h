// The formulas of formula.h as vectors have them, and how a result is written.
#pragma once

#include <type_traits>

#include "softmax_ext/formula.h"
#include "softmax_ext/online_state.h"
#include "vec.h"

namespace softmax_ext::cpu {
namespace {

template <class A>
constexpr A kLowest = -static_cast<A>(INFINITY);

template <class T>
constexpr bool kDivides = sizeof(T) == 8 && !kFusedMultiplyAdd;

// The policy of Forward: no element is above its row's max. What is rounded to 16 bits afterwards
// can do with the reciprocal alone, and doubles without a fused multiply-add are divided.
template <class T, class V>
struct Share : Full<V> {
  static SOFTMAX_EXT_INLINE V exp(V x) { return exp_of_nonpositive(x); }
  // e / sum is e times the reciprocal and what that is rounded off, rounded once; `correction` is that, or
  // the sum where one divides by it.
  static SOFTMAX_EXT_INLINE V quotient(V e, V correction, V reciprocal) {
    if constexpr (sizeof(T) == 2) return e * reciprocal;
    if constexpr (kDivides<T>) return e / correction;
    return fma_of(e, reciprocal, e * correction);
  }
};

// The formula of log-softmax, and what its log_sum is rounded off.
template <class V>
struct ExactLogSoftmax : Forward<Op::kLogSoftmax, V> {
  V rest;

  template <class F>
  static SOFTMAX_EXT_INLINE ExactLogSoftmax map(const ExactLogSoftmax& other, F f) {
    return {Forward<Op::kLogSoftmax, V>::map(other, f), f(other.rest)};
  }
  SOFTMAX_EXT_INLINE V of(V x) const { return ((x - this->max) - rest) - this->log_sum; }
};

template <Op op, class T, class V = Vec<compute_t<T>>>
using forward_t = std::conditional_t<op == Op::kSoftmax || sizeof(T) == 2,
                                     Forward<op, V, Share<T, V>>, ExactLogSoftmax<V>>;

// The formula for a row's max and its sum + rest, where rest is an ulp of the sum or so, which 16 bits
// do without. In each lane for another row, or the same.
template <Op op, class T, class V = Vec<compute_t<T>>>
SOFTMAX_EXT_INLINE forward_t<op, T> formula_of(V max, V sum, V rest) {
  forward_t<op, T> formula;
  formula.max = max;
  if constexpr (op == Op::kSoftmax) {
    const V one(1);
    formula.reciprocal = one / sum;
    const V off = fma_of(-formula.reciprocal, sum, one);
    formula.correction =
        kDivides<T> ? sum : fma_of(-formula.reciprocal, rest, off) * formula.reciprocal;
  } else if constexpr (sizeof(T) == 2) {
    V rest_of_log;
    formula.log_sum = log_of(sum, V(0), &rest_of_log);
  } else {
    formula.log_sum = log_of(sum, rest, &formula.rest);
  }
  return formula;
}

template <Op op, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE forward_t<op, T> formula_of(OnlineState<double> row) {
  const A sum = static_cast<A>(row.sum);
  return formula_of<op, T>(Vec<A>(static_cast<A>(row.max)), Vec<A>(sum),
                           Vec<A>(static_cast<A>(row.sum - sum)));
}

template <class Lanes>
constexpr bool kWhole = std::is_same_v<Lanes, All>;

// A first look at the output while stores pass the caches would wait behind them.
template <Op op>
constexpr bool is_ahead(bool streamed) {
  return op == Op::kLogSoftmax && streamed;
}

}  // namespace
}  // namespace softmax_ext::cpu
