#include "softmax_autograd.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "node.h"
#include "node_type.h"
#include "softmax.h"
#include "softmax_formulas.h"
#include "tensors.h"
#include "transforms.h"

namespace softmax_ext {
namespace {

template <class F>
auto visit(Op op, F f) {
  if (op == Op::kSoftmax) return f(std::integral_constant<Op, Op::kSoftmax>{});
  return f(std::integral_constant<Op, Op::kLogSoftmax>{});
}

// A call that the kernels do not take: by the registered operators, else by torch's own.
at::Tensor forward_elsewhere(const at::Tensor& input, int64_t dim,
                             std::optional<at::ScalarType> dtype, Op op) {
  return visit(op, [&](auto op) {
    return operators_take(input) ? Rules<Forward<op()>>::dispatch(input, dim, dtype)
                                 : Forward<op()>::torchs(input, dim, dtype);
  });
}

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
  check_storage(name(op), "input", input);
}

// A result that was made elsewhere.
void copy_in_place(at::Tensor& input, const at::Tensor& output, Op op) {
  check_inference(input, op);
  input.copy_(output);
}

}  // namespace

at::Tensor softmax(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype,
                   Op op) {
  if (!kernels_take(input)) return forward_elsewhere(input, dim, dtype, op);
  return visit(op, [&](auto op) { return Rules<Forward<op()>>::run(input, dim, dtype); });
}

void softmax_out(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype, Op op,
                 at::Tensor& out) {
  if (!kernels_take(input) || !kernels_take(out)) {
    if (kernels_take(input)) check_storage(name(op), "input", input);
    if (kernels_take(out)) check_storage(name(op), "out", out);
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
    copy_in_place(input, forward_elsewhere(input, dim, std::nullopt, op), op);
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
    const auto node = make_node(std::move(edges), Forward<op()>::gradient(input, dim, {}));
    torch::autograd::rebase_history(input, node);
    node->save(0, input, /*is_output=*/true, /*is_inplace_on_view=*/input.is_view());
  });
}

void softmin_in_place(at::Tensor& input, int64_t dim) {
  if (!kernels_take(input)) {
    const at::Tensor output = forward_elsewhere(input.neg(), dim, std::nullopt, Op::kSoftmax);
    copy_in_place(input, output, Op::kSoftmax);
    return;
  }
  check_in_place(input, dim, Op::kSoftmax);
  input.neg_();
  softmax_in_place(input, dim, Op::kSoftmax);
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
