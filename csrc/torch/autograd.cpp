#include "autograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/autograd/custom_function.h>

#include "operators.h"

namespace softmax_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a node keeps besides tensors, in one value: a dictionary entry each would cost more than the
// kernel of a small call.
struct NodeState {
  int64_t dim;
  at::ScalarType input_dtype;
  Op op;

  void save(AutogradContext* context) const {
    context->saved_data["state"] =
        (dim << 16) | (static_cast<int64_t>(input_dtype) << 8) | static_cast<int64_t>(op);
  }

  static NodeState load(AutogradContext* context) {
    const int64_t packed = context->saved_data["state"].toInt();
    return {packed >> 16, static_cast<at::ScalarType>((packed >> 8) & 0xff),
            static_cast<Op>(packed & 0xff)};
  }
};

at::Tensor softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                            NodeState state);

// The gradient's own gradient. With v the incoming gradient and sums over dim:
//   softmax      g_in = y (g - sum(g y))     dg = y (v - sum(v y))     dy = v (g - sum(g y)) - g sum(v y)
//   log-softmax  g_in = g - exp(y) sum(g)    dg = v - sum(v exp(y))    dy = -v exp(y) sum(g)
struct SoftmaxBackward : torch::autograd::Function<SoftmaxBackward> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& grad_output,
                            const at::Tensor& output, NodeState state) {
    context->save_for_backward({grad_output, output});
    state.save(context);
    return softmax_ext::backward(grad_output, output, state.dim, state.input_dtype, state.op);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const NodeState state = NodeState::load(context);
    const at::Tensor &g = saved[0], &y = saved[1];
    const at::Tensor v = grads[0].to(y.scalar_type());
    const auto sum = [&](const at::Tensor& x) { return x.sum(state.dim, /*keepdim=*/true); };
    at::Tensor grad_g, grad_y;
    if (state.op == Op::kSoftmax) {
      grad_g = softmax_backward(v, y, {state.dim, y.scalar_type(), state.op});
      grad_y = v * (g - sum(g * y)) - g * sum(v * y);
    } else {
      const at::Tensor weighted = v * y.exp();
      grad_g = v - sum(weighted);
      grad_y = -weighted * sum(g);
    }
    return {grad_g, grad_y, at::Tensor()};
  }
};

at::Tensor softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                            NodeState state) {
  if (!kernels_take(grad_output) || !kernels_take(output)) {
    // Batched gradients, for one. torch's own operator casts only from float to half.
    const auto dtype = output.scalar_type();
    return (state.op == Op::kSoftmax
                ? at::_softmax_backward_data(grad_output, output, state.dim, dtype)
                : at::_log_softmax_backward_data(grad_output, output, state.dim, dtype))
        .to(state.input_dtype);
  }
  if (at::GradMode::is_enabled() && (grad_output.requires_grad() || output.requires_grad())) {
    return SoftmaxBackward::apply(grad_output, output, state);
  }
  return softmax_ext::backward(grad_output, output, state.dim, state.input_dtype, state.op);
}

struct Softmax : torch::autograd::Function<Softmax> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, int64_t dim,
                            at::ScalarType dtype, Op op) {
    const at::Tensor output = softmax_ext::forward(input, dim, dtype, op);
    context->save_for_backward({output});
    NodeState{dim, input.scalar_type(), op}.save(context);
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    return {softmax_backward(grads[0], saved[0], NodeState::load(context)), at::Tensor(),
            at::Tensor(), at::Tensor()};
  }
};

// The output's type, checked: floating, with an integer input only if asked for.
at::ScalarType output_dtype(const at::Tensor& input, std::optional<at::ScalarType> dtype, Op op) {
  const at::ScalarType result = dtype.value_or(input.scalar_type());
  if (is_kernel_output_dtype(result)) return result;
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, name(op), "(): not implemented for ",
      dtype.has_value() ? "argument 'dtype' = " : "an argument 'input' of dtype ", result,
      "; expected Half, BFloat16, Float or Double",
      dtype.has_value() ? "" : " (an input of another dtype needs the argument 'dtype')");
}

}  // namespace

at::Tensor softmax(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype,
                   Op op) {
  if (!kernels_take(input)) {
    return op == Op::kSoftmax ? at::softmax(input, dim, dtype) : at::log_softmax(input, dim, dtype);
  }
  dim = at::maybe_wrap_dim(dim, input.dim());
  const at::ScalarType result = output_dtype(input, dtype, op);
  if (!is_kernel_dtype(input.scalar_type())) {
    return softmax(input.to(result), dim, std::nullopt, op);
  }
  if (at::GradMode::is_enabled() && input.requires_grad()) {
    return Softmax::apply(input, dim, result, op);
  }
  return forward(input, dim, result, op);
}

void softmax_out(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype, Op op,
                 at::Tensor& out) {
  if (!kernels_take(input) || !kernels_take(out)) {
    op == Op::kSoftmax ? at::softmax_out(out, input, dim, dtype)
                       : at::log_softmax_out(out, input, dim, dtype);
    return;
  }
  dim = at::maybe_wrap_dim(dim, input.dim());
  const at::ScalarType result = output_dtype(input, dtype, op);
  TORCH_CHECK(!(at::GradMode::is_enabled() && (input.requires_grad() || out.requires_grad())),
              name(op),
              "(): functions with out=... arguments don't support automatic differentiation, but "
              "one of the arguments requires grad.");
  const at::Tensor converted = is_kernel_dtype(input.scalar_type()) ? input : input.to(result);
  forward_out(converted, dim, result, op, out);
}

}  // namespace softmax_ext
