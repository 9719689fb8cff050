// Cross-entropy: the arguments of a forward and a backward call. Of a row x of dim elements, its target y,
// weights w of the classes (1 where there are none) and e = smoothing:
//
//   z    = x factor, or softcap tanh(x factor / softcap)
//   lse  = log(sum(exp(z)))
//   loss = w[y] ((1 - e) (lse - z[y]) + z_loss lse^2) + e / dim sum(w (lse - z))
//   entropy = lse - sum(exp(z - lse) z)
//
// and 0 where the target is ignore_index: of such a row nothing is read unless its lse is wanted.
//
// lse is kept as two numbers of the type computed in, lse itself and what it is rounded off, so that the
// probability of an element, exp((z - lse) - lse_rest), has no error of the size of lse; and so is log_p,
// that of the target's, z[y] - lse.
#pragma once

#include "softmax_ext/portability.h"
#include "softmax_ext/problem.h"

namespace softmax_ext {

struct Loss {
  const int64_t* target;  // of each row, side by side: in [0, dim), or ignore_index
  int64_t ignore_index;
  const void* weight;  // of each class, of the type computed in; or null
  double weight_sum;   // of all classes
  double smoothing, z_loss, factor, softcap;
  const double* weight_sum_on_device =
      nullptr;  // instead of weight_sum, where only the device has it

  // Whether more is asked for than plain cross-entropy, with or without weights.
  SOFTMAX_EXT_FUNCTION bool is_general() const {
    return smoothing != 0 || z_loss != 0 || factor != 1 || softcap != 0;
  }
};

// What the gradients of rows are multiplied by. Numbers of rows lie side by side, in the order of (outer, inner).
struct LossGrads {
  const void* loss;  // of the rows' losses; of one for all if loss_step is 0, and not 1; null: 1
  int64_t loss_step;
  const double* divisor;          // of these, or null
  const void* lse;                // of the rows, or null
  const void* entropy = nullptr;  // of the rows, or null
};

struct LossForwardArgs {
  const void* input;
  DType dtype;
  Shape shape;
  Dims dims;
  Strides input_strides;
  Loss loss;
  void* row_loss;
  void* lse;
  void* lse_rest;
  void* log_p;
  bool wants_lse;    // of rows that are ignored too
  void* grad_input;  // null, or the memory of the input, over which the gradient is written
  LossGrads grads;
  void* entropy = nullptr;  // null where it is not wanted, as without wants_lse
};

struct LossBackwardArgs {
  const void* input;
  void* grad_input;
  DType dtype;
  Shape shape;
  Dims dims;
  Strides input_strides, grad_input_strides;
  bool grad_input_is_new;
  Loss loss;
  const void* lse;
  const void* lse_rest;
  const void* log_p;
  LossGrads grads;
  const void* entropy = nullptr;  // of the rows, where grads has one
};

// The gradient of the scores of a row, or of one in each lane:
//   dz[c] = share p[c] - each w[c], and less `target` where c is y
template <class V>
struct LossGradient {
  V share, each, target, more;  // more: share - target, not as a difference

  // g: the gradient of the row's loss, 0 where it is ignored.
  static SOFTMAX_EXT_FUNCTION LossGradient of(V g, V g_lse, V weight, V lse, V smoothing,
                                              V smoothing_of_each, V weight_sum, V z_loss) {
    LossGradient gradient;
    gradient.target = g * weight * (V(1) - smoothing);
    gradient.each = g * smoothing_of_each;
    gradient.more = gradient.each * weight_sum + g * weight * (z_loss + z_loss) * lse + g_lse;
    gradient.share = gradient.target + gradient.more;
    return gradient;
  }
  SOFTMAX_EXT_FUNCTION V of_other(V p, V weight) const { return share * p - each * weight; }
  // Of y itself, from p - 1, which near p = 1 has digits that p has not.
  SOFTMAX_EXT_FUNCTION V of_target(V p_less_1, V weight) const {
    return target * p_less_1 + (more * (p_less_1 + V(1)) - each * weight);
  }
};

}  // namespace softmax_ext
