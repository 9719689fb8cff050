// Divergences of two softmaxes: the arguments of a forward and a backward call. Of a row, with p of the
// teacher's logits times factor, q of the student's, and m = beta p + (1 - beta) q:
//
//   loss = beta KL(p || m) + (1 - beta) KL(q || m), or KL(p || q) for beta 0 and KL(q || p) for 1
//
// times its weight; a row of the weight 0 is not read.
#pragma once

#include "softmax_ext/math.h"
#include "softmax_ext/portability.h"
#include "softmax_ext/problem.h"

namespace softmax_ext {

enum class Divergence { kForward, kReverse, kBetween };  // beta 0, 1 and between

SOFTMAX_EXT_FUNCTION Divergence divergence_of(double beta) {
  return beta == 0 ? Divergence::kForward : beta == 1 ? Divergence::kReverse : Divergence::kBetween;
}

struct DivergenceOptions {
  double beta, factor;
  const void* weight;  // of each row, of the type computed in; or null
};

// What is kept of a row between forward and backward, of the type computed in: of either's logits the largest,
// and 1 / sum(exp((x - max) factor)); the logarithm of the quotient of these sums; KL(p || m) and KL(q || m),
// where for beta 0 and 1 m is the other one of the two, and one of these is left out, as 0.
template <class V>
struct DivergenceRow {
  static constexpr int kCount = 7;
  V teacher_max, teacher_share, student_max, student_share, log_ratio, teacher_kl, student_kl;
};

// The tensors lie side by side along dim; inner is 1. Numbers of rows are in the order of the outer dims.
struct DivergenceForwardArgs {
  const void* student;
  const void* teacher;
  DType dtype;
  Shape shape;
  Dims dims;
  Strides student_strides, teacher_strides;
  DivergenceOptions of;
  void* row_loss;
  void* kept;  // a DivergenceRow of each
};

struct DivergenceBackwardArgs {
  const void* student;
  const void* teacher;
  void* grad_student;  // contiguous, or null; so is the other
  void* grad_teacher;
  DType dtype;
  Shape shape;
  Dims dims;
  Strides student_strides, teacher_strides;
  bool grads_are_new;
  DivergenceOptions of;
  const void* kept;
  const void* grad;  // of the rows' losses; of one for all if grad_step is 0, and not 1
  int64_t grad_step;
  double grad_factor;  // what grad is multiplied by
};

template <class V>
struct DivergenceElements {
  V p, q;          // of teacher and student
  V log_p, log_q;  // log(p / m), log(q / m); for beta 0 and 1 m is the other one
};

// Of elements of a row: p and q, and a and b, the scores of the teacher and the student below the row's largest.
template <Divergence kind, class V>
SOFTMAX_EXT_FUNCTION DivergenceElements<V> elements_of(const DivergenceRow<V>& row, V beta, V a,
                                                       V b, V p, V q) {
  const V d = (a - b) - row.log_ratio;
  if constexpr (kind != Divergence::kBetween) {
    return {p, q, d, -d};
  } else {
    // log(m / p) = log(1 + (1 - beta) (exp(-d) - 1)), and log(m / q) with beta and d: of the larger one of p
    // and q.
    const auto is_first = is_less(d, V(0));
    const V less = where(is_first, beta, V(1) - beta) * expm1_of(where(is_first, d, -d));
    const V log = -log1p_of(less);
    return {p, q, where(is_first, log + d, log), where(is_first, log, log - d)};
  }
}

// a d - a + b, where d is log(a / b): what KL(a || b) sums, and not below 0. Where a and b are close, their
// difference is not taken. b where a is 0, whatever d is. A: the type computed in.
template <class A, class V>
SOFTMAX_EXT_FUNCTION V divergence_term(V a, V b, V d) {
  // exp(-d) = sum((-d)^k / k!): from k = 2 on, to half an ulp for |d| <= 1.
  constexpr double kSeries[] = {1. / 2,
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
  constexpr int kDegree = sizeof(A) == 4 ? 8 : 16;
  V series(static_cast<A>(kSeries[kDegree]));
  for (int k = kDegree - 1; k >= 0; --k) {
    series = fma_of(series, d, V(static_cast<A>(kSeries[k])));
  }
  const V square = d * d, one(1);
  const V term = where(is_less(square, one), a * (square * series), fma_of(a, d - one, b));
  return where(is_zero(a), b, term);
}

// What the row's KL(p || m) and KL(q || m) sum.
template <Divergence kind, class A, class V>
SOFTMAX_EXT_FUNCTION void add_terms(const DivergenceElements<V>& of, V beta, V& teacher,
                                    V& student) {
  if constexpr (kind == Divergence::kForward) {
    teacher = teacher + divergence_term<A>(of.p, of.q, of.log_p);
  } else if constexpr (kind == Divergence::kReverse) {
    student = student + divergence_term<A>(of.q, of.p, of.log_q);
  } else {
    const V m = fma_of(beta, of.p, (V(1) - beta) * of.q);
    teacher = teacher + divergence_term<A>(of.p, m, of.log_p);
    student = student + divergence_term<A>(of.q, m, of.log_q);
  }
}

// The loss of a row, without its weight, of KL(p || m) and KL(q || m).
template <class A>
SOFTMAX_EXT_FUNCTION A divergence_loss(double beta, A teacher, A student) {
  if (divergence_of(beta) != Divergence::kBetween) return teacher + student;
  return static_cast<A>(beta) * teacher + static_cast<A>(1 - beta) * student;
}

// The gradients of an element's logits.
template <Divergence kind, class V>
SOFTMAX_EXT_FUNCTION V gradient_of_teacher(const DivergenceRow<V>& row, V beta,
                                           const DivergenceElements<V>& of) {
  if constexpr (kind == Divergence::kReverse) {
    return of.p - of.q;
  } else {
    const V result = of.p * (where(is_zero(of.p), V(0), of.log_p) - row.teacher_kl);
    return kind == Divergence::kBetween ? beta * result : result;
  }
}
template <Divergence kind, class V>
SOFTMAX_EXT_FUNCTION V gradient_of_student(const DivergenceRow<V>& row, V beta,
                                           const DivergenceElements<V>& of) {
  if constexpr (kind == Divergence::kForward) {
    return of.q - of.p;
  } else {
    const V result = of.q * (where(is_zero(of.q), V(0), of.log_q) - row.student_kl);
    return kind == Divergence::kBetween ? (V(1) - beta) * result : result;
  }
}

}  // namespace softmax_ext
