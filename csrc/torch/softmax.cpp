#include "softmax.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorUtils.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/native/Resize.h>

#include <utility>

#include "cuda.h"
#include "softmax_ext/plan.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

// What each call relies on, before it allocates or changes anything. The shape comes of it.
Shape check_forward(const at::Tensor& input, int64_t dim, Op op) {
  const Shape shape = to_shape(input, dim);
  check_storage(name(op), "input", input);
  return shape;
}

Shape check_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                     at::ScalarType input_dtype, Op op) {
  check_gradient(grad_output, output, dim, input_dtype, op);
  return to_shape(output, dim);
}

void launch(const ForwardArgs& args, at::Device device) {
  if (device.is_cpu()) {
    cpu::kernels().launch_forward(args, threads(args.shape));
  } else {
    launch_on_cuda(args, device);
  }
}

void launch(const BackwardArgs& args, at::Device device) {
  if (device.is_cpu()) {
    cpu::kernels().launch_backward(args, threads(args.shape));
  } else {
    launch_on_cuda(args, device);
  }
}

// Kernels have the casts of mixed precision; others are made before, or after. Those of the CPU read an input
// of any type.
bool needs_cast(at::Device device, at::ScalarType load, at::ScalarType store, int inputs) {
  return !(device.is_cpu() && inputs == 1) && !is_native(to_dtype(load), to_dtype(store), inputs);
}

void run_forward(const at::Tensor& input, const Shape& shape, int64_t dim, Op op,
                 const at::Tensor& output, bool output_is_new) {
  if (input.numel() == 0) return;
  if (needs_cast(input.device(), input.scalar_type(), output.scalar_type(), 1)) {
    run_forward(input.to(output.scalar_type()), shape, dim, op, output, output_is_new);
    return;
  }
  ForwardArgs args{input.const_data_ptr(),
                   output.mutable_data_ptr(),
                   to_dtype(input.scalar_type()),
                   to_dtype(output.scalar_type()),
                   shape,
                   op,
                   output_is_new};
  // Those of the CPU place other input where the output is to be.
  if (find_strides({{&input, &args.input_strides}, {&output, &args.output_strides}}, dim,
                   args.dims) &&
      (input.device().is_cpu() ||
       is_direct(input, shape, args.dims, args.input_strides, cpu::kShortDim))) {
    launch(args, input.device());
  } else {
    run_forward(input.contiguous(), shape, dim, op, output, output_is_new);
  }
}

void run_backward(const at::Tensor& grad_output, const at::Tensor& output, const Shape& shape,
                  int64_t dim, Op op, const at::Tensor& grad_input, bool grad_input_is_new) {
  if (output.numel() == 0) return;
  BackwardArgs args{grad_output.const_data_ptr(),
                    output.const_data_ptr(),
                    grad_input.mutable_data_ptr(),
                    to_dtype(output.scalar_type()),
                    to_dtype(grad_input.scalar_type()),
                    shape,
                    op,
                    grad_input_is_new};
  const bool found = find_strides({{&grad_output, &args.grad_output_strides},
                                   {&output, &args.output_strides},
                                   {&grad_input, &args.grad_input_strides}},
                                  dim, args.dims);
  const auto is_taken = [&](const at::Tensor& tensor, const Strides& strides) {
    return found && is_direct(tensor, shape, args.dims, strides, cpu::kGatheredDim);
  };
  // A gradient that is not direct goes through grad_input on the CPU, if there is room.
  const bool takes_gradient =
      is_taken(grad_output, args.grad_output_strides) ||
      (found && output.device().is_cpu() && args.output_dtype == args.grad_input_dtype &&
       args.output != args.grad_input);
  if (takes_gradient && is_taken(output, args.output_strides)) {
    launch(args, output.device());
  } else {
    run_backward(takes_gradient ? grad_output : grad_output.contiguous(), output.contiguous(),
                 shape, dim, op, grad_input, grad_input_is_new);
  }
}

}  // namespace

at::ScalarType output_dtype(const at::Tensor& input, std::optional<at::ScalarType> dtype,
                            const char* function) {
  const at::ScalarType result = dtype.value_or(input.scalar_type());
  if (is_kernel_output_dtype(result)) return result;
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, function, "(): not implemented for ",
      dtype.has_value() ? "argument 'dtype' = " : "an argument 'input' of dtype ", result,
      "; expected Half, BFloat16, Float or Double",
      dtype.has_value() ? "" : " (an input of another dtype needs the argument 'dtype')");
}

void check_gradient(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                    at::ScalarType input_dtype, Op op) {
  const at::ScalarType dtype = output.scalar_type();
  TORCH_CHECK(
      grad_output.device() == output.device(), name(op),
      "_backward(): Expected all tensors to be on the same device, but found 'grad_output' on ",
      grad_output.device(), " and 'output' on ", output.device());
  for (const auto& [argument, tensor] :
       {std::pair("grad_output", &grad_output), std::pair("output", &output)}) {
    TORCH_CHECK_NOT_IMPLEMENTED(is_kernel_output_dtype(tensor->scalar_type()), name(op),
                                "_backward(): not implemented for an argument '", argument,
                                "' of dtype ", tensor->scalar_type(),
                                "; expected Half, BFloat16, Float or Double");
  }
  TORCH_CHECK_NOT_IMPLEMENTED(is_kernel_output_dtype(input_dtype), name(op),
                              "_backward(): not implemented for argument 'input_dtype' = ",
                              input_dtype, "; expected Half, BFloat16, Float or Double");
  TORCH_CHECK(grad_output.scalar_type() == dtype, name(op), "_backward(): expected scalar type ",
              dtype, " but found ", grad_output.scalar_type(),
              ": argument 'grad_output' must have the dtype of 'output'");
  const auto is_symbolic = [](const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  if (is_symbolic(grad_output) || is_symbolic(output)) {
    TORCH_SYM_CHECK(sym_equals(grad_output.sym_sizes(), output.sym_sizes()), name(op),
                    "_backward(): Expected argument 'grad_output' to have same size as 'output'");
  } else {
    at::checkSameSize(op == Op::kSoftmax ? "softmax_backward" : "log_softmax_backward",
                      {grad_output, "grad_output", 1}, {output, "output", 2});
  }
  (void)at::maybe_wrap_dim(dim, output.dim());
  check_storage(name(op), "grad_output", grad_output);
  check_storage(name(op), "output", output);
}

at::Tensor cast(const at::Tensor& input, at::ScalarType dtype, Op op) {
  check_storage(name(op), "input", input);
  return input.to(dtype);
}

at::Tensor forward(const at::Tensor& input, int64_t dim, at::ScalarType dtype, Op op) {
  const Shape shape = check_forward(input, dim, op);
  const NewTensor output = empty(input.sizes(), dtype, input.device());
  run_forward(input, shape, at::maybe_wrap_dim(dim, input.dim()), op, output.tensor, output.is_new);
  return output.tensor;
}

void forward_out(const at::Tensor& input, int64_t dim, at::ScalarType dtype, Op op,
                 const at::Tensor& out) {
  TORCH_CHECK(out.scalar_type() == dtype, name(op), "(): expected argument 'out' to have dtype ",
              dtype, ", but got ", out.scalar_type());
  TORCH_CHECK(out.device() == input.device(), name(op), "(): expected argument 'out' on ",
              input.device(), " like 'input', but got ", out.device());
  const Shape shape = check_forward(input, dim, op);
  check_storage(name(op), "out", out);
  at::native::resize_output(out, input.sizes());
  at::assert_no_internal_overlap(out);
  dim = at::maybe_wrap_dim(dim, input.dim());
  if (input.is_contiguous() && out.is_contiguous()) {
    at::assert_no_partial_overlap(out, input);
  } else if (!is_written_in_place(out, dim, cpu::kShortDim) || !can_be_read(input, out)) {
    out.copy_(forward(input, dim, dtype, op));
    return;
  }
  // First, since it refuses an inference tensor.
  out.unsafeGetTensorImpl()->bump_version();
  run_forward(input, shape, dim, op, out, /*output_is_new=*/false);
}

void forward_in_place(const at::Tensor& input, int64_t dim, Op op) {
  const Shape shape = check_forward(input, dim, op);
  dim = at::maybe_wrap_dim(dim, input.dim());
  if (is_written_in_place(input, dim, cpu::kShortDim)) {
    run_forward(input, shape, dim, op, input, /*output_is_new=*/false);
  } else {
    input.copy_(forward(input, dim, input.scalar_type(), op));
  }
}

at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                    at::ScalarType dtype, Op op) {
  const Shape shape = check_backward(grad_output, output, dim, dtype, op);
  if (needs_cast(output.device(), output.scalar_type(), dtype, 2)) {
    // In the wider type: the gradient is rounded once.
    const at::ScalarType wide = c10::promoteTypes(output.scalar_type(), dtype);
    if (output.scalar_type() == wide) {
      return backward(grad_output, output, dim, wide, op).to(dtype);
    }
    return backward(grad_output.to(wide), output.to(wide), dim, dtype, op);
  }
  const NewTensor grad_input = empty(output.sizes(), dtype, output.device());
  run_backward(grad_output, output, shape, at::maybe_wrap_dim(dim, output.dim()), op,
               grad_input.tensor, grad_input.is_new);
  return grad_input.tensor;
}

void backward_out(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim, Op op,
                  const at::Tensor& grad_input) {
  const at::ScalarType dtype = grad_input.scalar_type();
  const Shape shape = check_backward(grad_output, output, dim, dtype, op);
  TORCH_CHECK(grad_input.device() == output.device(), name(op),
              "_backward(): expected the gradient's memory on ", output.device(), ", but got ",
              grad_input.device());
  check_storage(name(op), "grad_input", grad_input);
  at::native::resize_output(grad_input, output.sizes());
  if (grad_input.is_contiguous() && grad_output.is_contiguous() && output.is_contiguous()) {
    at::assert_no_partial_overlap(grad_input, grad_output);
    at::assert_no_partial_overlap(grad_input, output);
  }
  dim = at::maybe_wrap_dim(dim, output.dim());
  if (is_written_in_place(grad_input, dim, cpu::kGatheredDim) &&
      can_be_read(grad_output, grad_input) && can_be_read(output, grad_input) &&
      !needs_cast(output.device(), output.scalar_type(), dtype, 2)) {
    run_backward(grad_output, output, shape, dim, op, grad_input, /*grad_input_is_new=*/false);
  } else {
    grad_input.copy_(backward(grad_output, output, dim, dtype, op));
  }
}

}  // namespace softmax_ext
