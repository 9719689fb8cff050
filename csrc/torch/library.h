// The operators that the dispatcher knows, torch.ops.softmax_ext: what a compiled graph calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "softmax_ext/problem.h"

namespace softmax_ext {

// Calls of these operators, by whatever the tensors and this thread ask for.
at::Tensor dispatch_forward(const at::Tensor& input, int64_t dim,
                            std::optional<at::ScalarType> dtype, Op op);
at::Tensor dispatch_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                             at::ScalarType input_dtype, Op op);

// The same by torch's own operators, which have the rules of every transform and mode.
at::Tensor torch_forward(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype,
                         Op op);
at::Tensor torch_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                          at::ScalarType input_dtype, Op op);

}  // namespace softmax_ext
