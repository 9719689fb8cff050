#include "autograd.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "library.h"
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

  void save(const at::Tensor& output, bool is_inplace_on_view = false) {
    output_ = SavedVariable(output, /*is_output=*/true, is_inplace_on_view);
  }

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

// Gives `output` (`grad_input`) its place in the graph, if a gradient is wanted.
void record_forward(const at::Tensor& input, const at::Tensor& output, int64_t dim, Op op) {
  if (!torch::autograd::compute_requires_grad(input)) return;
  const auto node = make_node<SoftmaxNode>(
      torch::autograd::collect_next_edges(input),
      NodeState{at::maybe_wrap_dim(dim, input.dim()), input.scalar_type(), op});
  set_history(output, node);
  node->save(output);
}

void record_backward(const at::Tensor& grad_output, const at::Tensor& output,
                     const at::Tensor& grad_input, NodeState state) {
  if (!torch::autograd::compute_requires_grad(grad_output, output)) return;
  set_history(grad_input, make_node<SoftmaxBackwardNode>(
                              torch::autograd::collect_next_edges(grad_output, output), state,
                              grad_output, output));
}

at::Tensor softmax_backward(const at::Tensor& grad_output, const at::Tensor& output,
                            NodeState state) {
  if (!kernels_take(grad_output) || !kernels_take(output)) {  // batched gradients, for one
    return dispatch_backward(grad_output, output, state.dim, state.input_dtype, state.op);
  }
  const at::Tensor grad_input =
      backward(grad_output, output, state.dim, state.input_dtype, state.op);
  record_backward(grad_output, output, grad_input, state);
  return grad_input;
}

bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

}  // namespace

at::Tensor softmax(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype,
                   Op op) {
  if (!kernels_take(input)) return torch_forward(input, dim, dtype, op);
  dim = at::maybe_wrap_dim(dim, input.dim());
  const at::ScalarType result = output_dtype(input, dtype, op);
  if (!is_kernel_dtype(input.scalar_type())) {
    return softmax(input.to(result), dim, std::nullopt, op);
  }
  const at::Tensor output = forward(input, dim, result, op);
  record_forward(input, output, dim, op);
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

void softmax_in_place(at::Tensor& input, int64_t dim, Op op) {
  if (!kernels_take(input)) {
    input.copy_(torch_forward(input, dim, std::nullopt, op));
    return;
  }
  dim = at::maybe_wrap_dim(dim, input.dim());
  output_dtype(input, std::nullopt, op);
  const bool recorded = torch::autograd::compute_requires_grad(input);
  torch::autograd::check_inplace(input, recorded);
  at::assert_no_internal_overlap(input);
  const auto edges =
      recorded ? torch::autograd::collect_next_edges(input) : torch::autograd::edge_list();
  torch::autograd::increment_version(input);
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    forward_in_place(input, dim, op);
  }
  if (!recorded) return;
  auto node = make_node<SoftmaxNode>(torch::autograd::edge_list(edges),
                                     NodeState{dim, input.scalar_type(), op});
  torch::autograd::rebase_history(input, node);
  node->save(input, /*is_inplace_on_view=*/input.is_view());
}

at::Tensor recorded_forward(const at::Tensor& input, int64_t dim,
                            std::optional<at::ScalarType> dtype, Op op) {
  if (has_tangent(input)) return torch_forward(input, dim, dtype, op);
  if (!is_kernel_dtype(input.scalar_type())) {
    return recorded_forward(input.to(output_dtype(input, dtype, op)), dim, std::nullopt, op);
  }
  at::Tensor output;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = dispatch_forward(input, dim, dtype, op);
  }
  record_forward(input, output, dim, op);
  return output;
}

at::Tensor recorded_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                             at::ScalarType input_dtype, Op op) {
  if (has_tangent(grad_output) || has_tangent(output)) {
    return torch_backward(grad_output, output, dim, input_dtype, op);
  }
  at::Tensor grad_input;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    grad_input = dispatch_backward(grad_output, output, dim, input_dtype, op);
  }
  record_backward(grad_output, output, grad_input,
                  {at::maybe_wrap_dim(dim, output.dim()), input_dtype, op});
  return grad_input;
}

}  // namespace softmax_ext
