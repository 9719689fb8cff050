// The operators on torch tensors. Without autograd; autograd.h adds that.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "softmax_ext/problem.h"

namespace softmax_ext {

// Whether there are kernels for this device in this build.
bool kernels_run_on(at::Device device);

// Whether the kernels take a call on this tensor, here and now. They do not take what is not plain
// strided memory on the CPU (or on a GPU, where built for it), nor a call that something else must
// see: functorch transforms, forward-mode tangents, fake tensors and other modes, tracing,
// autocast. Such a call goes to the registered operators or to torch's own.
bool kernels_take(const at::Tensor& tensor);

// Whether there are keys, of a tensor or of a thread, besides those of plain memory, autograd and
// autocast.
bool has_other_keys(c10::DispatchKeySet keys);

// A conversion to one of the kernels' output types can be part of the kernel.
bool is_kernel_dtype(at::ScalarType dtype);         // as input
bool is_kernel_output_dtype(at::ScalarType dtype);  // as output: floating

// The output's type, checked: floating, with an integer input only if asked for.
at::ScalarType output_dtype(const at::Tensor& input, std::optional<at::ScalarType> dtype, Op op);

// The kernels' name of such a type.
DType to_dtype(at::ScalarType dtype);

// Raises unless all that a tensor sees is in its storage, which may have been resized to less.
void check_storage(Op op, const char* argument, const at::Tensor& tensor);

// An input of a type that the kernels do not take, as one that they do.
at::Tensor cast(const at::Tensor& input, at::ScalarType dtype, Op op);

// Raises, as torch would, unless these can be the arguments of a backward call: on any device, of
// shapes that may be symbolic.
void check_gradient(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                    at::ScalarType input_dtype, Op op);

// Where the elements of a tensor lie, seen as (outer, dim, inner); none where it has too many dims.
struct Layout {
  Shape shape;
  Dims dims;
  Strides strides;
};
std::optional<Layout> layout_of(const at::Tensor& tensor, int64_t dim);

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
