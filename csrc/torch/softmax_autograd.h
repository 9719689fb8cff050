// softmax and log-softmax with autograd: what softmax_ext._C binds.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "softmax_ext/problem.h"

namespace softmax_ext {

// torch.softmax(input, dim, dtype) or torch.log_softmax, with their errors.
at::Tensor softmax(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype,
                   Op op);

// The same into `out`, without a gradient.
void softmax_out(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype, Op op,
                 at::Tensor& out);

// The same into the input, of which autograd keeps nothing else.
void softmax_in_place(at::Tensor& input, int64_t dim, Op op);

// softmax(-input) into the input.
void softmin_in_place(at::Tensor& input, int64_t dim);

// Gives the nodes' Python objects their names and attributes; once, at import.
void add_node_types();

}  // namespace softmax_ext
