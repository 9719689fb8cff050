#include "autograd.h"

#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "operators.h"

namespace softmax_ext {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// What the nodes keep besides tensors.
struct NodeState {
  int64_t dim;
  at::ScalarType input_dtype;
  Op op;
};

at::Tensor softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                            NodeState state);

// Nodes as torch's generated ones, where torch::autograd::Function would cost a small call half as
// much again as torch's own operator.
class SoftmaxNode : public Node {
 public:
  SoftmaxNode(NodeState state) : state_(state) {}

  std::string name() const override {
    return state_.op == Op::kSoftmax ? "SoftmaxExtSoftmaxBackward" : "SoftmaxExtLogSoftmaxBackward";
  }

  void save(const at::Tensor& output) { output_ = SavedVariable(output, /*is_output=*/true); }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return {at::Tensor()};
    return {softmax_backward(grads[0], output_.unpack(getptr()), state_)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    output_.reset_data();
  }

 private:
  NodeState state_;
  SavedVariable output_;
};

// The gradient's own gradient. With v the incoming gradient and sums over dim:
//   softmax      dx = y (g - sum(g y))     dg = y (v - sum(v y))    dy = v (g - sum(g y)) - g sum(v y)
//   log-softmax  dx = g - exp(y) sum(g)    dg = v - sum(v exp(y))   dy = -v exp(y) sum(g)
class SoftmaxBackwardNode : public Node {
 public:
  SoftmaxBackwardNode(NodeState state, const at::Tensor& grad_output, const at::Tensor& output)
      : state_(state), grad_output_(grad_output, false), output_(output, false) {}

  std::string name() const override {
    return state_.op == Op::kSoftmax ? "SoftmaxExtSoftmaxBackwardBackward"
                                     : "SoftmaxExtLogSoftmaxBackwardBackward";
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
    const at::Tensor g = grad_output_.unpack();
    const at::Tensor y = output_.unpack();
    const at::Tensor v = grads[0].to(y.scalar_type());
    const auto sum = [&](const at::Tensor& x) { return x.sum(state_.dim, /*keepdim=*/true); };
    if (state_.op == Op::kSoftmax) {
      return {softmax_backward(v, y, {state_.dim, y.scalar_type(), state_.op}),
              v * (g - sum(g * y)) - g * sum(v * y)};
    }
    const at::Tensor weighted = v * y.exp();
    return {v - sum(weighted), -weighted * sum(g)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    grad_output_.reset_data();
    output_.reset_data();
  }

 private:
  NodeState state_;
  SavedVariable grad_output_;
  SavedVariable output_;
};

// A std::shared_ptr up to torch 2.12 or so, a c10::intrusive_ptr since.
using NodePointer = decltype(std::declval<Node&>().getptr());

template <class N, class Pointer = NodePointer, class... Arguments>
auto make_node(torch::autograd::edge_list&& edges, Arguments&&... arguments) {
  const auto finish = [&](auto node) {
    node->set_next_edges(std::move(edges));
    return node;
  };
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    // deleteNode spares the destruction of a long graph a deep recursion.
    return finish(std::shared_ptr<N>(new N(std::forward<Arguments>(arguments)...),
                                     [](auto* node) { deleteNode(node); }));
  } else {
    return finish(c10::make_intrusive<N>(std::forward<Arguments>(arguments)...));
  }
}

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
  at::Tensor grad_input = backward(grad_output, output, state.dim, state.input_dtype, state.op);
  if (torch::autograd::compute_requires_grad(grad_output, output)) {
    set_history(grad_input, make_node<SoftmaxBackwardNode>(
                                torch::autograd::collect_next_edges(grad_output, output), state,
                                grad_output, output));
  }
  return grad_input;
}

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
  const at::Tensor output = forward(input, dim, result, op);
  if (torch::autograd::compute_requires_grad(input)) {
    const auto node = make_node<SoftmaxNode>(torch::autograd::collect_next_edges(input),
                                             NodeState{dim, input.scalar_type(), op});
    set_history(output, node);
    node->save(output);
  }
  return output;
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
  TORCH_CHECK(!torch::autograd::compute_requires_grad(input, out), name(op),
              "(): functions with out=... arguments don't support automatic differentiation, but "
              "one of the arguments requires grad.");
  const at::Tensor converted = is_kernel_dtype(input.scalar_type()) ? input : input.to(result);
  forward_out(converted, dim, result, op, out);
}

}  // namespace softmax_ext
