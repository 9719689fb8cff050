// Cross-entropy with probabilities as targets: the arguments of a forward and a backward call. Of a row x of dim
// elements and its target t, with the scores z and lse of losses.h and e = smoothing:
//
//   u    = w (t (1 - e) + e / dim)
//   loss = sum(u (lse - z)) + z_loss lse^2
#pragma once

#include "softmax_ext/losses.h"

namespace softmax_ext {

// What is kept of a row between forward and backward, of the type computed in: of its scores the largest,
// 1 / sum(exp(z - max)) and the logarithm of that sum; sum(u).
template <class V>
struct ProbabilityRow {
  static constexpr int kCount = 4;
  V max, share, log_sum, total;
};

// The tensors lie side by side along dim; inner is 1. Of `loss` target and ignore_index are not used.
struct ProbabilityForwardArgs {
  const void* input;
  const void* target;
  DType dtype;
  Shape shape;
  Dims dims;
  Strides input_strides, target_strides;
  Loss loss;
  void* row_loss;
  void* lse;
  void* kept;  // a ProbabilityRow of each
};

struct ProbabilityBackwardArgs {
  const void* input;
  const void* target;
  void* grad_input;  // contiguous, or null; so is the other
  void* grad_target;
  DType dtype;
  Shape shape;
  Dims dims;
  Strides input_strides, target_strides;
  bool grads_are_new;
  Loss loss;
  const void* lse;
  const void* kept;
  const void* grad;  // of the rows' losses; of one for all if grad_step is 0, and not 1
  int64_t grad_step;
  double grad_factor;    // what grad is multiplied by
  const void* grad_lse;  // of the rows, or null
};

}  // namespace softmax_ext
