// Elements of two rows of logits, and what a divergence of their softmaxes is made of.
#pragma once

#include "scores.h"
#include "softmax_ext/divergences.h"

namespace softmax_ext::cpu {
namespace {

// exp(-d) = sum((-d)^k / k!): from k = 2 on, to half an ulp for |d| <= 1.
template <class A>
struct DivergenceConstants;

template <>
struct DivergenceConstants<float> {
  static constexpr float kSeries[] = {1.f / 2,     -1.f / 6,      1.f / 24,
                                      -1.f / 120,  1.f / 720,     -1.f / 5040,
                                      1.f / 40320, -1.f / 362880, 1.f / 3628800};
};

template <>
struct DivergenceConstants<double> {
  static constexpr double kSeries[] = {1. / 2,
                                       -1. / 6,
                                       1. / 24,
                                       -1. / 120,
                                       1. / 720,
                                       -1. / 5040,
                                       1. / 40320,
                                       -1. / 362880,
                                       1. / 3628800,
                                       -1. / 39916800,
                                       1. / 479001600,
                                       -1. / 6227020800,
                                       1. / 87178291200,
                                       -1. / 1307674368000,
                                       1. / 20922789888000,
                                       -1. / 355687428096000,
                                       1. / 6402373705728000};
};

// a d - a + b, where d is log(a / b): what KL(a || b) sums, and not below 0. Where a and b are close, their
// difference is not taken. b where a is 0, whatever d is.
template <class A>
SOFTMAX_EXT_INLINE Vec<A> divergence_term(Vec<A> a, Vec<A> b, Vec<A> d) {
  using V = Vec<A>;
  constexpr auto& kSeries = DivergenceConstants<A>::kSeries;
  constexpr int kDegree = static_cast<int>(sizeof(kSeries) / sizeof(A)) - 1;
  V series(kSeries[kDegree]);
  for (int k = kDegree - 1; k >= 0; --k) series = fma_of(series, d, V(kSeries[k]));
  const V one(A(1)), near = a * (d * d * series), far = fma_of(a, d - one, b);
  const auto is_near = (d.raw <= one.raw) & (d.raw >= (-one).raw);
  const V term = is_near ? near.raw : far.raw;
  return a.raw == typename V::Raw{} ? b.raw : term.raw;
}

template <class V>
struct Elements {
  V p, q;          // of teacher and student
  V log_p, log_q;  // log(p / m), log(q / m); for beta 0 and 1 m is the other one
};

// Of elements of a row, which is the same in all lanes: p and q, and a and b, the scores of the teacher and the
// student below the row's largest.
template <Divergence kind, class V>
SOFTMAX_EXT_INLINE Elements<V> elements_of(const DivergenceRow<V>& row, V beta, V a, V b, V p,
                                           V q) {
  const V d = (a - b) - row.log_ratio;
  if constexpr (kind != Divergence::kBetween) return {p, q, d, -d};
  // log(m / p) = log(1 + (1 - beta) (exp(-d) - 1)), and log(m / q) with beta and d: of the larger one of p and q.
  const V zero(0), one(1);
  const auto is_less = d.raw < zero.raw;
  const V size = is_less ? d.raw : (-d).raw;
  const V share = is_less ? beta.raw : (one - beta).raw;
  const V less = share * expm1_of_nonpositive(size), sum = one + less;
  V rest;
  const V log = -log_of(sum, (one - sum) + less, &rest);
  const V log_p = is_less ? (log + d).raw : log.raw;
  const V log_q = is_less ? log.raw : (log - d).raw;
  return {p, q, log_p, log_q};
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
