#include "autograd.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/SequenceNumber.h>
#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "library.h"
#include "node.h"
#include "node_type.h"
#include "operators.h"

namespace softmax_ext {
namespace {

using torch::autograd::variable_list;

// What a profiler or an execution trace is told of a call that no dispatcher sees.
#define SOFTMAX_EXT_RECORD(name, ...)                                                            \
  RECORD_FUNCTION((name), (std::vector<c10::IValue>{__VA_ARGS__}),                               \
                  at::GradMode::is_enabled() ? static_cast<int64_t>(at::sequence_number::peek()) \
                                             : int64_t{-1})

template <class F>
auto visit(Op op, F f) {
  if (op == Op::kSoftmax) return f(std::integral_constant<Op, Op::kSoftmax>{});
  return f(std::integral_constant<Op, Op::kLogSoftmax>{});
}

template <Op op>
at::Tensor softmax_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                            at::ScalarType input_dtype);

// The gradient of the input. It needs nothing but the output.
template <Op op>
struct InputGradient {
  static constexpr const char* kName =
      op == Op::kSoftmax ? "SoftmaxExtSoftmaxBackward" : "SoftmaxExtLogSoftmaxBackward";
  static constexpr std::array kSaved = {"result"};
  static constexpr std::array kMembers = {"dim", "input_dtype"};

  int64_t dim;
  at::ScalarType input_dtype;

  variable_list operator()(const variable_list& grads,
                           const std::array<at::Tensor, 1>& saved) const {
    if (!grads[0].defined()) return {at::Tensor()};
    return {softmax_backward<op>(grads[0], saved[0], dim, input_dtype)};
  }
};

// The gradient's own gradient. With v the incoming gradient and sums over dim:
//   softmax      dx = y (g - sum(g y))     dg = y (v - sum(v y))    dy = v (g - sum(g y)) - g sum(v y)
//   log-softmax  dx = g - exp(y) sum(g)    dg = v - sum(v exp(y))   dy = -v exp(y) sum(g)
template <Op op>
struct GradientOfGradient {
  static constexpr const char* kName = op == Op::kSoftmax ? "SoftmaxExtSoftmaxBackwardBackward"
                                                          : "SoftmaxExtLogSoftmaxBackwardBackward";
  static constexpr std::array kSaved = {"grad_output", "output"};
  static constexpr std::array kMembers = {"dim"};

  int64_t dim;

  variable_list operator()(const variable_list& grads,
                           const std::array<at::Tensor, 2>& saved) const {
    if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
    const at::Tensor& g = saved[0];
    const at::Tensor& y = saved[1];
    check_storage(op, "grad", grads[0]);
    const at::Tensor v = grads[0].to(y.scalar_type());
    check_gradient(g, y, dim, y.scalar_type(), op);
    check_gradient(v, y, dim, y.scalar_type(), op);
    const auto sum = [&](const at::Tensor& x) { return x.sum(dim, /*keepdim=*/true); };
    if constexpr (op == Op::kSoftmax) {
      return {softmax_backward<op>(v, y, dim, y.scalar_type()),
              v * (g - sum(g * y)) - g * sum(v * y)};
    } else {
      const at::Tensor weighted = v * y.exp();
      return {v - sum(weighted), -weighted * sum(g)};
    }
  }
};

template <Op op>
auto members(InputGradient<op>& f) {
  return std::tie(f.dim, f.input_dtype);
}
template <Op op>
auto members(const InputGradient<op>& f) {
  return std::tie(f.dim, f.input_dtype);
}
template <Op op>
auto members(GradientOfGradient<op>& f) {
  return std::tie(f.dim);
}
template <Op op>
auto members(const GradientOfGradient<op>& f) {
  return std::tie(f.dim);
}

// Gives `output` (`grad_input`) its place in the graph, if a gradient is wanted.
template <Op op>
void record_forward(const at::Tensor& input, const at::Tensor& output, int64_t dim) {
  if (!torch::autograd::compute_requires_grad(input)) return;
  auto node =
      make_node(torch::autograd::collect_next_edges(input),
                InputGradient<op>{at::maybe_wrap_dim(dim, input.dim()), input.scalar_type()});
  auto& saving = *node;
  set_history(output, std::move(node));
  saving.save(0, output, /*is_output=*/true);
}

template <Op op>
void record_backward(const at::Tensor& grad_output, const at::Tensor& output,
                     const at::Tensor& grad_input, int64_t dim) {
  if (!torch::autograd::compute_requires_grad(grad_output, output)) return;
  const auto node = make_node(torch::autograd::collect_next_edges(grad_output, output),
                              GradientOfGradient<op>{at::maybe_wrap_dim(dim, output.dim())});
  node->save(0, grad_output, /*is_output=*/false);
  node->save(1, output, /*is_output=*/false);
  set_history(grad_input, node);
}

template <Op op>
at::Tensor softmax_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                            at::ScalarType input_dtype) {
  if (!kernels_take(grad_output) || !kernels_take(output)) {  // batched gradients, for one
    return dispatch_backward(grad_output, output, dim, input_dtype, op);
  }
  SOFTMAX_EXT_RECORD(
      (op == Op::kSoftmax ? "softmax_ext::softmax_backward" : "softmax_ext::log_softmax_backward"),
      grad_output, output, dim, input_dtype);
  const at::Tensor grad_input = backward(grad_output, output, dim, input_dtype, op);
  record_backward<op>(grad_output, output, grad_input, dim);
  return grad_input;
}

bool has_tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

// torch itself changes an inference tensor before it refuses that.
void check_inference(const at::Tensor& input, Op op) {
  TORCH_CHECK(
      !input.is_inference() || c10::InferenceMode::is_enabled(), name(op),
      "_(): Inplace update to inference tensor outside InferenceMode is not allowed; clone it "
      "first");
}

// Raises where an operation in place is refused, before anything is changed.
void check_in_place(const at::Tensor& input, int64_t dim, Op op) {
  (void)at::maybe_wrap_dim(dim, input.dim());
  (void)output_dtype(input, std::nullopt, op);
  torch::autograd::check_inplace(input, torch::autograd::compute_requires_grad(input));
  at::assert_no_internal_overlap(input);
  check_inference(input, op);
  check_storage(op, "input", input);
}

// The same as torch's operator gives it for what the kernels do not take.
void copy_in_place(at::Tensor& input, const at::Tensor& output, Op op) {
  check_inference(input, op);
  input.copy_(output);
}

}  // namespace

at::Tensor softmax(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype,
                   Op op) {
  if (!kernels_take(input)) return torch_forward(input, dim, dtype, op);
  dim = at::maybe_wrap_dim(dim, input.dim());
  const at::ScalarType result = output_dtype(input, dtype, op);
  if (!is_kernel_dtype(input.scalar_type())) {
    return softmax(cast(input, result, op), dim, std::nullopt, op);
  }
  SOFTMAX_EXT_RECORD((op == Op::kSoftmax ? "softmax_ext::softmax" : "softmax_ext::log_softmax"),
                     input, dim, dtype);
  const at::Tensor output = forward(input, dim, result, op);
  visit(op, [&](auto op) { record_forward<op()>(input, output, dim); });
  return output;
}

void softmax_out(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype, Op op,
                 at::Tensor& out) {
  if (!kernels_take(input) || !kernels_take(out)) {
    if (kernels_take(input)) check_storage(op, "input", input);
    op == Op::kSoftmax ? at::softmax_out(out, input, dim, dtype)
                       : at::log_softmax_out(out, input, dim, dtype);
    return;
  }
  dim = at::maybe_wrap_dim(dim, input.dim());
  const at::ScalarType result = output_dtype(input, dtype, op);
  TORCH_CHECK(!torch::autograd::compute_requires_grad(input, out), name(op),
              "(): functions with out=... arguments don't support automatic differentiation, but "
              "one of the arguments requires grad.");
  SOFTMAX_EXT_RECORD((op == Op::kSoftmax ? "softmax_ext::softmax" : "softmax_ext::log_softmax"),
                     input, dim, dtype, out);
  const at::Tensor converted =
      is_kernel_dtype(input.scalar_type()) ? input : cast(input, result, op);
  forward_out(converted, dim, result, op, out);
}

void softmax_in_place(at::Tensor& input, int64_t dim, Op op) {
  if (!kernels_take(input)) {
    copy_in_place(input, torch_forward(input, dim, std::nullopt, op), op);
    return;
  }
  check_in_place(input, dim, op);
  dim = at::maybe_wrap_dim(dim, input.dim());
  const bool recorded = torch::autograd::compute_requires_grad(input);
  SOFTMAX_EXT_RECORD((op == Op::kSoftmax ? "softmax_ext::softmax_" : "softmax_ext::log_softmax_"),
                     input, dim);
  auto edges = recorded ? torch::autograd::collect_next_edges(input) : torch::autograd::edge_list();
  torch::autograd::increment_version(input);
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    forward_in_place(input, dim, op);
  }
  if (!recorded) return;
  visit(op, [&](auto op) {
    const auto node = make_node(std::move(edges), InputGradient<op()>{dim, input.scalar_type()});
    torch::autograd::rebase_history(input, node);
    node->save(0, input, /*is_output=*/true, /*is_inplace_on_view=*/input.is_view());
  });
}

void softmin_in_place(at::Tensor& input, int64_t dim) {
  if (!kernels_take(input)) {
    const at::Tensor output = torch_forward(input.neg(), dim, std::nullopt, Op::kSoftmax);
    copy_in_place(input, output, Op::kSoftmax);
    return;
  }
  check_in_place(input, dim, Op::kSoftmax);
  input.neg_();
  softmax_in_place(input, dim, Op::kSoftmax);
}

at::Tensor recorded_forward(const at::Tensor& input, int64_t dim,
                            std::optional<at::ScalarType> dtype, Op op) {
  if (has_tangent(input)) return torch_forward(input, dim, dtype, op);
  if (!is_kernel_dtype(input.scalar_type())) {
    return recorded_forward(cast(input, output_dtype(input, dtype, op), op), dim, std::nullopt, op);
  }
  at::Tensor output;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = dispatch_forward(input, dim, dtype, op);
  }
  visit(op, [&](auto op) { record_forward<op()>(input, output, dim); });
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
  visit(op, [&](auto op) { record_backward<op()>(grad_output, output, grad_input, dim); });
  return grad_input;
}

void add_node_types() {
  for (const Op each : {Op::kSoftmax, Op::kLogSoftmax}) {
    visit(each, [](auto op) {
      NodeType<InputGradient<op()>>::add();
      NodeType<GradientOfGradient<op()>>::add();
    });
  }
}

}  // namespace softmax_ext
