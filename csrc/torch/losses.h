// Cross-entropy of class indices by the kernels, and its place in autograd's graph. What the
// kernels do not take is composed of torch's functions, in softmax_ext/functional/losses.py.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "softmax_ext/losses.h"

namespace softmax_ext {

struct LossTensors {
  const at::Tensor& input;                  // (C), (N, C) or (N, C, ...)
  const at::Tensor& target;                 // int64, of the input's shape without C
  const std::optional<at::Tensor>& weight;  // (C), of the input's dtype
};

struct LossOptions {
  int64_t reduction = at::Reduction::Mean;
  int64_t ignore_index = -100;
  double smoothing = 0, z_loss = 0, factor = 1, softcap = 0;
};

// Of a call: the loss, of the input's dtype; of the rows, of the type computed in, lse and, one behind the
// other, what it is rounded off and the log-probability of the target; the sum of the weights of the targets,
// a double, which a mean is divided by; and the entropy of the rows, if it is wanted.
struct LossResults {
  at::Tensor loss, lse, kept, total, entropy;
  at::Tensor scale = {};  // RowLosses::scale
};

// What a call is to give besides the loss.
struct LossWants {
  bool lse = false, entropy = false;
};

// The gradients of what a call gave, of their dtypes; all but the first may be undefined.
struct LossResultGrads {
  at::Tensor loss, lse, entropy;
};

// The gradient that a call makes of its logits, over these: that of the sum, over the rows, of loss (a number,
// or one a row; undefined: 1, of a mean divided as it is) times a row's loss and of lse (undefined: 0) times
// its lse. Of the type computed in.
struct LossGradientOver {
  at::Tensor loss, lse;
};

// The losses of the rows, of the type computed in, and the others. On CUDA their sum or mean as well, a double,
// which the host has no look at. If defined, scale is what the gradient over a mean's input is still to be divided
// by, a power of two: float16 has no room for a probability divided by the number of rows before that has the scale
// of the loss.
struct RowLosses {
  at::Tensor losses, lse, kept, total, reduced, entropy, scale;
};

inline int64_t class_dim(const at::Tensor& input) { return input.dim() > 1 ? 1 : 0; }

// Whether the classes lie side by side and not along the class dim of a contiguous tensor: the gradient lies so
// too.
bool classes_are_moved(const at::Tensor& input);

// Raises unless these can be the arguments of a call, by all that shows without a look at values; sizes
// may be symbolic.
void check_loss(const LossTensors& tensors, const LossOptions& options);
void check_loss_options(const LossOptions& options);

// The same of what is over the input of a call, and of a gradient's call.
void check_gradient_over(const LossGradientOver& over, const LossTensors& tensors);
void check_loss_gradient(const LossResultGrads& grads, const LossTensors& tensors,
                         const LossResults& results, const LossOptions& options);

// By the kernels; each checks all that they rely on, also that targets are in range.
RowLosses row_losses(const LossTensors& tensors, const LossOptions& options, LossWants wants,
                     const LossGradientOver* over = nullptr);
LossResults loss_forward(const LossTensors& tensors, const LossOptions& options, LossWants wants,
                         const LossGradientOver* over = nullptr);
at::Tensor loss_backward(const LossResultGrads& grads, const LossTensors& tensors,
                         const LossResults& results, const LossOptions& options);

// The gradient by differentiable operators.
at::Tensor composed_loss_gradient(const LossResultGrads& grads, const LossTensors& tensors,
                                  const LossOptions& options);

// With autograd, of tensors that kernels_take: loss, and what else is wanted. in_place: where there is a
// gradient to be made, it is made now, over the logits, which are of no more use then; it is of the loss alone.
LossResults cross_entropy(const LossTensors& tensors, const LossOptions& options, LossWants wants,
                          bool in_place);

// Gives the nodes' Python objects their names and attributes; once, at import.
void add_loss_node_types();

}  // namespace softmax_ext
