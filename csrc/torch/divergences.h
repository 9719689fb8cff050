// Divergences of two softmaxes by the kernels of the CPU, and their place in autograd's graph. What the kernels
// do not take is composed of torch's functions, in softmax_ext/functional/divergences.py.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "softmax_ext/divergences.h"

namespace softmax_ext {

struct DivergenceTensors {
  const at::Tensor& student;                // (..., C)
  const at::Tensor& teacher;                // of the student's shape and dtype
  const std::optional<at::Tensor>& weight;  // (...), of any dtype but complex
};

// One of at::Reduction, or kBatchMean. The means are of the rows whose weight is not 0: Mean of all their
// elements, kBatchMean of the rows.
constexpr int64_t kBatchMean = at::Reduction::END;

struct DivergenceCall {
  int64_t reduction = kBatchMean;
  double beta = 0, factor = 1;
};

// Of a call: the loss, of the input's dtype; and, of the type computed in, a DivergenceRow of each row.
struct DivergenceResults {
  at::Tensor loss, kept;
};

struct DivergenceGradients {
  at::Tensor student, teacher;  // undefined where not wanted
};

// Raises unless these can be the arguments of a call, by all that shows without a look at values; sizes
// may be symbolic.
void check_divergence(const DivergenceTensors& tensors, const DivergenceCall& call);

// The same of a gradient's call.
void check_divergence_gradient(const at::Tensor& grad_loss, const DivergenceTensors& tensors,
                               const at::Tensor& kept, const DivergenceCall& call);

// By the kernels; each checks all that they rely on.
DivergenceResults divergence_forward(const DivergenceTensors& tensors, const DivergenceCall& call);
DivergenceGradients divergence_backward(const at::Tensor& grad_loss,
                                        const DivergenceTensors& tensors, const at::Tensor& kept,
                                        const DivergenceCall& call, bool of_student,
                                        bool of_teacher);

// The gradients by differentiable operators.
DivergenceGradients composed_divergence_gradient(const at::Tensor& grad_loss,
                                                 const DivergenceTensors& tensors,
                                                 const DivergenceCall& call, bool of_student,
                                                 bool of_teacher);

// The loss with autograd, of tensors that kernels_take.
at::Tensor kl_div_with_logits(const DivergenceTensors& tensors, const DivergenceCall& call);

// Gives the node's Python object its name and attributes; once, at import.
void add_divergence_node_type();

}  // namespace softmax_ext
