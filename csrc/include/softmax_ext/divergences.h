// Divergences of two softmaxes: the arguments of a forward and a backward call. Of a row, with p of the
// teacher's logits times factor, q of the student's, and m = beta p + (1 - beta) q:
//
//   loss = beta KL(p || m) + (1 - beta) KL(q || m), or KL(p || q) for beta 0 and KL(q || p) for 1
//
// times its weight; a row of the weight 0 is not read.
#pragma once

#include "softmax_ext/portability.h"
#include "softmax_ext/problem.h"

namespace softmax_ext {

enum class Divergence { kForward, kReverse, kBetween };  // beta 0, 1 and between

constexpr Divergence divergence_of(double beta) {
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

// The gradients of an element's logits. log_p and log_q are log(p / m) and log(q / m); of what is 0 as p or q
// is, they may be anything finite.
template <Divergence kind, class V>
SOFTMAX_EXT_FUNCTION V gradient_of_teacher(const DivergenceRow<V>& row, V beta, V p, V q, V log_p) {
  if constexpr (kind == Divergence::kReverse) return p - q;
  const V result = p * (log_p - row.teacher_kl);
  return kind == Divergence::kBetween ? beta * result : result;
}
template <Divergence kind, class V>
SOFTMAX_EXT_FUNCTION V gradient_of_student(const DivergenceRow<V>& row, V beta, V p, V q, V log_q) {
  if constexpr (kind == Divergence::kForward) return q - p;
  const V result = q * (log_q - row.student_kl);
  return kind == Divergence::kBetween ? (V(1) - beta) * result : result;
}

}  // namespace softmax_ext
