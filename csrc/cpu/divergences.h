// What the kernels of divergences share.
#pragma once

#include "scores.h"
#include "softmax_ext/divergences.h"

namespace softmax_ext::cpu {
namespace {

// What softmax_ext/divergences.h asks of vectors.
template <class T>
SOFTMAX_EXT_INLINE auto is_less(Vec<T> a, Vec<T> b) {
  return a.raw < b.raw;
}
template <class T>
SOFTMAX_EXT_INLINE auto is_zero(Vec<T> a) {
  return a.raw == typename Vec<T>::Raw{};
}
template <class Answers, class T>
SOFTMAX_EXT_INLINE Vec<T> where(Answers answers, Vec<T> yes, Vec<T> no) {
  return answers ? yes.raw : no.raw;
}
template <class T>
SOFTMAX_EXT_INLINE Vec<T> expm1_of(Vec<T> x) {
  return expm1_of_nonpositive(x);
}
template <class T>
SOFTMAX_EXT_INLINE Vec<T> log1p_of(Vec<T> x) {
  const Vec<T> one(T(1)), sum = one + x;
  Vec<T> rest;
  return log_of(sum, (one - sum) + x, &rest);
}

template <class A>
SOFTMAX_EXT_INLINE DivergenceRow<Vec<A>> in_lanes(const DivergenceRow<A>& row) {
  return {row.teacher_max, row.teacher_share, row.student_max, row.student_share,
          row.log_ratio,   row.teacher_kl,    row.student_kl};
}

template <class A>
bool is_left_out(const DivergenceOptions& of, int64_t row) {
  return of.weight != nullptr && static_cast<const A*>(of.weight)[row] == 0;
}

template <class F>
void visit(Divergence kind, F f) {
  switch (kind) {
    case Divergence::kForward:
      return f(std::integral_constant<Divergence, Divergence::kForward>{});
    case Divergence::kReverse:
      return f(std::integral_constant<Divergence, Divergence::kReverse>{});
    case Divergence::kBetween:
      return f(std::integral_constant<Divergence, Divergence::kBetween>{});
  }
}

}  // namespace
}  // namespace softmax_ext::cpu
