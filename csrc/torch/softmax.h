// softmax and log-softmax of torch tensors, without autograd; softmax_autograd.h adds that.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "softmax_ext/problem.h"

namespace softmax_ext {

// The output's type, checked: floating, with an integer input only if asked for.
at::ScalarType output_dtype(const at::Tensor& input, std::optional<at::ScalarType> dtype,
                            const char* function);

inline at::ScalarType output_dtype(const at::Tensor& input, std::optional<at::ScalarType> dtype,
                                   Op op) {
  return output_dtype(input, dtype, name(op));
}

// An input of a type that the kernels do not take, as one that they do.
at::Tensor cast(const at::Tensor& input, at::ScalarType dtype, Op op);

// Raises, as torch would, unless these can be the arguments of a backward call: on any device, of
// shapes that may be symbolic.
void check_gradient(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                    at::ScalarType input_dtype, Op op);

// The calls that reach a kernel. Each checks all that the kernel relies on, so that it can be called
// with any strided tensors on a device that kernels_run_on, and any dim.

// softmax or log-softmax of `input`, of a type that is_kernel_dtype, as `dtype`, over `dim`, into a
// new contiguous tensor.
at::Tensor forward(const at::Tensor& input, int64_t dim, at::ScalarType dtype, Op op);

// The same into `out`, resized if need be. Raises as torch.softmax(out=) does.
void forward_out(const at::Tensor& input, int64_t dim, at::ScalarType dtype, Op op,
                 const at::Tensor& out);

// The same into the input, whose elements do not overlap.
void forward_in_place(const at::Tensor& input, int64_t dim, Op op);

// The gradient of the input, as `dtype`, from the output and its gradient (same type and shape).
at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                    at::ScalarType dtype, Op op);

// The same into `grad_input`, as its dtype; resized if need be.
void backward_out(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim, Op op,
                  const at::Tensor& grad_input);

}  // namespace softmax_ext
