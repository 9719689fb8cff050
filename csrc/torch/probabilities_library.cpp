// Cross-entropy with probabilities in autograd's graph, and as the dispatcher knows it, torch.ops.softmax_ext:
// what a compiled graph calls.
#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda.h"
#include "node.h"
#include "node_type.h"
#include "probabilities.h"
#include "tensors.h"
#include "transforms.h"

namespace softmax_ext {
namespace {

using Maybe = std::optional<at::Tensor>;
using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kForward = "softmax_ext::cross_entropy_of_probabilities";
constexpr const char* kBackward = "softmax_ext::cross_entropy_of_probabilities_backward";
constexpr const char* kForwardSchema =
    "softmax_ext::cross_entropy_of_probabilities(Tensor input, Tensor target, Tensor? weight, "
    "int reduction, float label_smoothing, float z_loss, float factor, float softcap, "
    "bool wants_lse) -> (Tensor loss, Tensor lse, Tensor kept)";
constexpr const char* kBackwardSchema =
    "softmax_ext::cross_entropy_of_probabilities_backward(Tensor grad_loss, Tensor? grad_lse, "
    "Tensor input, Tensor target, Tensor? weight, Tensor lse, Tensor kept, int reduction, "
    "float label_smoothing, float z_loss, float factor, float softcap, bool of_input, "
    "bool of_target) -> (Tensor, Tensor)";

#define SOFTMAX_EXT_PROBABILITY_OPTIONS \
  int64_t reduction, double label_smoothing, double z_loss, double factor, double softcap

LossOptions options_of(SOFTMAX_EXT_PROBABILITY_OPTIONS) {
  return {reduction, /*ignore_index=*/-100, label_smoothing, z_loss, factor, softcap};
}

Maybe if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? Maybe(tensor) : std::nullopt;
}

struct ProbabilitiesGradient {
  static constexpr const char* kName = "SoftmaxExtCrossEntropyOfProbabilitiesBackward";
  static constexpr std::array kSaved = {"self", "target", "weight", "lse", "kept"};
  static constexpr std::array kMembers = {"reduction", "label_smoothing", "z_loss",   "factor",
                                          "softcap",   "of_input",        "of_target"};

  int64_t reduction;
  double label_smoothing, z_loss, factor, softcap;
  bool of_input, of_target;

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads,
                                            const std::array<at::Tensor, 5>& saved) const {
    const at::Tensor grad_lse = grads.size() > 1 ? grads[1] : at::Tensor();
    if (!grads[0].defined() && !grad_lse.defined()) return {at::Tensor(), at::Tensor()};
    const auto& [input, target, saved_weight, lse, kept] = saved;
    const Maybe weight = if_defined(saved_weight);
    const at::Tensor grad_loss = grads[0].defined() ? grads[0]
                                 : reduction == at::Reduction::None
                                     ? at::zeros_like(lse, input.options())
                                     : at::zeros({}, input.options());
    const LossTensors tensors{input, target, weight};
    const LossOptions options = options_of(reduction, label_smoothing, z_loss, factor, softcap);
    const auto taken = [](const at::Tensor& tensor) {
      return !tensor.defined() || kernels_take(tensor);
    };
    if (at::GradMode::is_enabled()) {
      const auto result = composed_probabilities_gradient(grad_loss, grad_lse, tensors, options,
                                                          of_input, of_target);
      return {result.input, result.target};
    }
    if (taken(grad_loss) && taken(grad_lse) && std::all_of(saved.begin(), saved.end(), taken)) {
      const auto result = probabilities_backward(grad_loss, grad_lse, tensors, {{}, lse, kept},
                                                 options, of_input, of_target);
      return {result.input, result.target};
    }
    static const auto handle =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow(kBackward, "")
            .typed<Two(const at::Tensor&, const Maybe&, const at::Tensor&, const at::Tensor&,
                       const Maybe&, const at::Tensor&, const at::Tensor&, int64_t, double, double,
                       double, double, bool, bool)>();
    const auto [of_the_input, of_the_target] =
        handle.call(grad_loss, if_defined(grad_lse), input, target, weight, lse, kept, reduction,
                    label_smoothing, z_loss, factor, softcap, of_input, of_target);
    return {of_the_input, of_the_target};
  }
};

auto members(ProbabilitiesGradient& f) {
  return std::tie(f.reduction, f.label_smoothing, f.z_loss, f.factor, f.softcap, f.of_input,
                  f.of_target);
}
auto members(const ProbabilitiesGradient& f) {
  return std::tie(f.reduction, f.label_smoothing, f.z_loss, f.factor, f.softcap, f.of_input,
                  f.of_target);
}

void record(const ProbabilityResults& results, const LossTensors& tensors,
            const LossOptions& options, bool wants_lse) {
  const auto& [input, target, weight] = tensors;
  auto node = make_node(
      torch::autograd::collect_next_edges(input, target),
      ProbabilitiesGradient{options.reduction, options.smoothing, options.z_loss, options.factor,
                            options.softcap, input.requires_grad(), target.requires_grad()});
  auto* const saving = &*node;
  if (wants_lse) {
    torch::autograd::set_history(results.loss, node);
    torch::autograd::set_history(results.lse, std::move(node));
  } else {
    torch::autograd::set_history(results.loss, std::move(node));
  }
  saving->save(0, input, /*is_output=*/false);
  saving->save(1, target, /*is_output=*/false);
  if (weight) saving->save(2, *weight, /*is_output=*/false);
  saving->save(3, results.lse, /*is_output=*/wants_lse);
  saving->save(4, results.kept, /*is_output=*/false);
}

void check_weight(const Maybe& weight) {
  TORCH_CHECK(!weight || !weight->requires_grad() || !at::GradMode::is_enabled(),
              "The function 'cross_entropy' is not differentiable with respect to argument "
              "'weight'. This input cannot have requires_grad True.");
}

// ---- what the dispatcher has --------------------------------------------------------------------

Three forward_kernel(const at::Tensor& input, const at::Tensor& target, const Maybe& weight,
                     SOFTMAX_EXT_PROBABILITY_OPTIONS, bool) {
  const ProbabilityResults results = probabilities_forward(
      {input, target, weight}, options_of(reduction, label_smoothing, z_loss, factor, softcap));
  return {results.loss, results.lse, results.kept};
}

Three forward_meta(const at::Tensor& input, const at::Tensor& target, const Maybe& weight,
                   SOFTMAX_EXT_PROBABILITY_OPTIONS, bool) {
  check_probabilities({input, target, weight},
                      options_of(reduction, label_smoothing, z_loss, factor, softcap));
  const auto wide = input.options().dtype(at::toOpMathType(input.scalar_type()));
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.pop_back();
  const at::Tensor loss = reduction == at::Reduction::None
                              ? at::empty_symint(sizes, input.options())
                              : at::empty({}, input.options());
  const at::Tensor lse = at::empty_symint(sizes, wide);
  sizes.push_back(ProbabilityRow<float>::kCount);
  return {loss, lse, at::empty_symint(sizes, wide)};
}

Three forward_autograd(const at::Tensor& input, const at::Tensor& target, const Maybe& weight,
                       SOFTMAX_EXT_PROBABILITY_OPTIONS, bool wants_lse) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !input._fw_grad(/*level=*/0).defined() && !target._fw_grad(/*level=*/0).defined(), kForward,
      ": forward-mode differentiation is not implemented");
  check_weight(weight);
  ProbabilityResults results;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto handle = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow(kForward, "")
                                   .typed<Three(const at::Tensor&, const at::Tensor&, const Maybe&,
                                                int64_t, double, double, double, double, bool)>();
    std::tie(results.loss, results.lse, results.kept) = handle.call(
        input, target, weight, reduction, label_smoothing, z_loss, factor, softcap, wants_lse);
  }
  if (torch::autograd::compute_requires_grad(input, target)) {
    record(results, {input, target, weight},
           options_of(reduction, label_smoothing, z_loss, factor, softcap), wants_lse);
  }
  return {results.loss, results.lse, results.kept};
}

Two backward_kernel(const at::Tensor& grad_loss, const Maybe& grad_lse, const at::Tensor& input,
                    const at::Tensor& target, const Maybe& weight, const at::Tensor& lse,
                    const at::Tensor& kept, SOFTMAX_EXT_PROBABILITY_OPTIONS, bool of_input,
                    bool of_target) {
  const auto grads = probabilities_backward(
      grad_loss, grad_lse.value_or(at::Tensor()), {input, target, weight}, {{}, lse, kept},
      options_of(reduction, label_smoothing, z_loss, factor, softcap), of_input, of_target);
  return {grads.input, grads.target};
}

Two backward_composed(const at::Tensor& grad_loss, const Maybe& grad_lse, const at::Tensor& input,
                      const at::Tensor& target, const Maybe& weight, const at::Tensor&,
                      const at::Tensor&, SOFTMAX_EXT_PROBABILITY_OPTIONS, bool of_input,
                      bool of_target) {
  const auto grads = composed_probabilities_gradient(
      grad_loss, grad_lse.value_or(at::Tensor()), {input, target, weight},
      options_of(reduction, label_smoothing, z_loss, factor, softcap), of_input, of_target);
  return {grads.input, grads.target};
}

Two backward_meta(const at::Tensor& grad_loss, const Maybe& grad_lse, const at::Tensor& input,
                  const at::Tensor& target, const Maybe& weight, const at::Tensor& lse,
                  const at::Tensor& kept, SOFTMAX_EXT_PROBABILITY_OPTIONS, bool of_input,
                  bool of_target) {
  check_probabilities_gradient(grad_loss, grad_lse.value_or(at::Tensor()), {input, target, weight},
                               {{}, lse, kept},
                               options_of(reduction, label_smoothing, z_loss, factor, softcap));
  const auto gradient = [&](bool is_wanted) {
    return is_wanted ? at::empty_symint(input.sym_sizes(), input.options()) : at::Tensor();
  };
  return {gradient(of_input), gradient(of_target)};
}

}  // namespace

ProbabilityResults cross_entropy_of_probabilities(const LossTensors& tensors,
                                                  const LossOptions& options, bool wants_lse) {
  SOFTMAX_EXT_RECORD(kForward, tensors.input, tensors.target);
  check_weight(tensors.weight);
  ProbabilityResults results;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    results = probabilities_forward(tensors, options);
  }
  if (torch::autograd::compute_requires_grad(tensors.input, tensors.target)) {
    record(results, tensors, options, wants_lse);
  }
  return results;
}

void add_probabilities_node_type() { NodeType<ProbabilitiesGradient>::add(); }

TORCH_LIBRARY_FRAGMENT(softmax_ext, library) {
  const auto define = [&](const char* schema) {
    library.def(torch::schema(schema, c10::AliasAnalysisKind::FROM_SCHEMA),
                {at::Tag::pt2_compliant_tag});
  };
  const auto implement = [&](const char* name, auto kernel) {
    library.impl(name, torch::dispatch(c10::DispatchKey::CPU, kernel));
    if (kBuiltWithCuda) library.impl(name, torch::dispatch(c10::DispatchKey::CUDA, kernel));
  };
  define(kForwardSchema);
  implement(kForward, TORCH_FN(forward_kernel));
  library.impl(kForward, torch::dispatch(c10::DispatchKey::Meta, forward_meta));
  library.impl(kForward, torch::dispatch(c10::DispatchKey::Autograd, forward_autograd));
  define(kBackwardSchema);
  implement(kBackward, TORCH_FN(backward_kernel));
  library.impl(kBackward, torch::dispatch(c10::DispatchKey::Meta, backward_meta));
  library.impl(kBackward, torch::dispatch(c10::DispatchKey::FuncTorchBatched, backward_composed));
  library.impl(kBackward, torch::dispatch(c10::DispatchKey::Batched, backward_composed));
}

}  // namespace softmax_ext
