// Cross-entropy with probabilities as targets by the kernels of the CPU, and its place in autograd's graph. What the
// kernels do not take is composed of torch's functions, in softmax_ext/functional/losses.py.
#pragma once

#include "losses.h"
#include "softmax_ext/probabilities.h"

namespace softmax_ext {

// LossTensors are here: input (C) or (N, C), target of its shape and dtype, weight (C) of its dtype. ignore_index
// is not used.
//
// Of a call: the loss, of the input's dtype; of the rows, of the type computed in, lse and a ProbabilityRow.
struct ProbabilityResults {
  at::Tensor loss, lse, kept;
};

struct ProbabilityGradients {
  at::Tensor input, target;  // undefined where not wanted
};

// Raises unless these can be the arguments of a call, by all that shows without a look at values; sizes may
// be symbolic.
void check_probabilities(const LossTensors& tensors, const LossOptions& options);

// The same of a gradient's call.
void check_probabilities_gradient(const at::Tensor& grad_loss, const at::Tensor& grad_lse,
                                  const LossTensors& tensors, const ProbabilityResults& results,
                                  const LossOptions& options);

// By the kernels; each checks all that they rely on.
ProbabilityResults probabilities_forward(const LossTensors& tensors, const LossOptions& options);
ProbabilityGradients probabilities_backward(const at::Tensor& grad_loss, const at::Tensor& grad_lse,
                                            const LossTensors& tensors,
                                            const ProbabilityResults& results,
                                            const LossOptions& options, bool of_input,
                                            bool of_target);

// The gradients by differentiable operators.
ProbabilityGradients composed_probabilities_gradient(const at::Tensor& grad_loss,
                                                     const at::Tensor& grad_lse,
                                                     const LossTensors& tensors,
                                                     const LossOptions& options, bool of_input,
                                                     bool of_target);

// With autograd, of tensors that kernels_take: loss, and lse if it is wanted.
ProbabilityResults cross_entropy_of_probabilities(const LossTensors& tensors,
                                                  const LossOptions& options, bool wants_lse);

// Gives the node's Python object its name and attributes; once, at import.
void add_probabilities_node_type();

}  // namespace softmax_ext
