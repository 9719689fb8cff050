// Cross-entropy in autograd's graph, and as the dispatcher knows it, torch.ops.softmax_ext: what a compiled
// graph calls.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "cuda.h"
#include "losses.h"
#include "node.h"
#include "node_type.h"
#include "tensors.h"
#include "transforms.h"

namespace softmax_ext {
namespace {

using Maybe = std::optional<at::Tensor>;
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kForward = "softmax_ext::cross_entropy";
constexpr const char* kBackward = "softmax_ext::cross_entropy_backward";
constexpr const char* kForwardSchema =
    "softmax_ext::cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, "
    "int ignore_index, float label_smoothing, float z_loss, float factor, float softcap, "
    "bool wants_lse, bool wants_entropy) -> (Tensor loss, Tensor lse, Tensor kept, Tensor total, "
    "Tensor entropy)";
constexpr const char* kBackwardSchema =
    "softmax_ext::cross_entropy_backward(Tensor grad_loss, Tensor? grad_lse, "
    "Tensor? grad_entropy, Tensor input, Tensor target, Tensor? weight, Tensor lse, Tensor kept, "
    "Tensor total, Tensor? entropy, int reduction, int ignore_index, float label_smoothing, "
    "float z_loss, float factor, float softcap) -> Tensor";

constexpr const char* kRows = "softmax_ext::cross_entropy_of_rows_";
constexpr const char* kRowsSchema =
    "softmax_ext::cross_entropy_of_rows_(Tensor(a!) input, Tensor target, Tensor? weight, "
    "Tensor? grad_loss, Tensor? grad_lse, int ignore_index, float label_smoothing, float z_loss, "
    "float factor, float softcap) -> (Tensor losses, Tensor lse)";

#define SOFTMAX_EXT_LOSS_OPTIONS                                                                 \
  int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss, double factor, \
      double softcap

Maybe if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? Maybe(tensor) : std::nullopt;
}

struct CrossEntropyGradient {
  static constexpr const char* kName = "SoftmaxExtCrossEntropyBackward";
  static constexpr std::array kSaved = {"self", "target", "weight", "lse",
                                        "kept", "total",  "entropy"};
  static constexpr std::array kMembers = {"reduction", "ignore_index", "label_smoothing",
                                          "z_loss",    "factor",       "softcap"};

  int64_t reduction, ignore_index;
  double label_smoothing, z_loss, factor, softcap;

  LossOptions options() const {
    return {reduction, ignore_index, label_smoothing, z_loss, factor, softcap};
  }

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads,
                                            const std::array<at::Tensor, 7>& saved) const {
    const at::Tensor grad_lse = grads.size() > 1 ? grads[1] : at::Tensor();
    const at::Tensor grad_entropy = grads.size() > 2 ? grads[2] : at::Tensor();
    if (!grads[0].defined() && !grad_lse.defined() && !grad_entropy.defined()) {
      return {at::Tensor()};
    }
    const auto& [input, target, saved_weight, lse, kept, total, entropy] = saved;
    const Maybe weight = if_defined(saved_weight);
    const at::Tensor grad_loss =
        grads[0].defined() ? grads[0]
        : reduction == at::Reduction::None
            ? at::zeros_like(lse, lse.options().dtype(input.scalar_type()))
            : at::zeros_like(total, total.options().dtype(input.scalar_type()));
    const LossTensors tensors{input, target, weight};
    const LossResultGrads of_results{grad_loss, grad_lse, grad_entropy};
    const auto taken = [](const at::Tensor& tensor) {
      return !tensor.defined() || kernels_take(tensor);
    };
    if (at::GradMode::is_enabled()) {
      return {composed_loss_gradient(of_results, tensors, options())};
    }
    if (taken(grad_loss) && taken(grad_lse) && taken(grad_entropy) &&
        std::all_of(saved.begin(), saved.end(), taken)) {
      return {loss_backward(of_results, tensors, {{}, lse, kept, total, entropy}, options())};
    }
    static const auto handle =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow(kBackward, "")
            .typed<at::Tensor(const at::Tensor&, const Maybe&, const Maybe&, const at::Tensor&,
                              const at::Tensor&, const Maybe&, const at::Tensor&, const at::Tensor&,
                              const at::Tensor&, const Maybe&, int64_t, int64_t, double, double,
                              double, double)>();
    return {handle.call(grad_loss, if_defined(grad_lse), if_defined(grad_entropy), input, target,
                        weight, lse, kept, total, if_defined(entropy), reduction, ignore_index,
                        label_smoothing, z_loss, factor, softcap)};
  }
};

auto members(CrossEntropyGradient& f) {
  return std::tie(f.reduction, f.ignore_index, f.label_smoothing, f.z_loss, f.factor, f.softcap);
}
auto members(const CrossEntropyGradient& f) {
  return std::tie(f.reduction, f.ignore_index, f.label_smoothing, f.z_loss, f.factor, f.softcap);
}

// Of logits that were overwritten by their gradient, which a scale, if there is one, still divides.
struct CrossEntropyInPlaceGradient {
  static constexpr const char* kName = "SoftmaxExtCrossEntropyInPlaceBackward";
  static constexpr std::array kSaved = {"gradient", "scale"};
  static constexpr std::array kMembers = {"reduction", "dim"};

  int64_t reduction, dim;
  mutable bool is_spent = false;  // what versions do not say of a tensor of saved-tensor hooks

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads,
                                            const std::array<at::Tensor, 2>& saved) const {
    for (size_t k = 1; k < grads.size(); ++k) {
      TORCH_CHECK(!grads[k].defined(), "cross_entropy(): ", k == 1 ? "lse" : "entropy",
                  " has no gradient where inplace_backward=True has made that of the loss in "
                  "forward");
    }
    if (!grads[0].defined()) return {at::Tensor()};
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "cross_entropy(): the gradient of inplace_backward=True cannot be differentiated "
                "again; call backward without create_graph, or without inplace_backward");
    TORCH_CHECK(
        !is_spent,
        "cross_entropy(): the gradient of inplace_backward=True was given away by an earlier "
        "backward");
    const auto& [gradient, scale] = saved;
    at::Tensor g = reduction == at::Reduction::None ? grads[0].unsqueeze(dim) : grads[0];
    if (scale.defined()) g = g.to(at::kDouble) / scale;
    if (!kernels_take(gradient) || !kernels_take(g)) return {at::mul(gradient, g)};
    if (g.dim() > 0 || !g.device().is_cpu() || g.item<double>() != 1) gradient.mul_(g);
    // A second backward finds that it was modified.
    torch::autograd::increment_version(gradient);
    is_spent = true;
    return {gradient};
  }
};

auto members(CrossEntropyInPlaceGradient& f) { return std::tie(f.reduction, f.dim); }
auto members(const CrossEntropyInPlaceGradient& f) { return std::tie(f.reduction, f.dim); }

// Of whatever else is made of those logits.
struct OverwrittenGradient {
  static constexpr const char* kName = "SoftmaxExtOverwrittenBackward";
  static constexpr std::array<const char*, 0> kSaved = {};
  static constexpr std::array<const char*, 0> kMembers = {};

  torch::autograd::variable_list operator()(const torch::autograd::variable_list&,
                                            const std::array<at::Tensor, 0>&) const {
    TORCH_CHECK(false,
                "cross_entropy(): the logits of a call with inplace_backward=True were used again, "
                "but hold their gradient since");
  }
};

auto members(OverwrittenGradient&) { return std::tuple<>(); }
auto members(const OverwrittenGradient&) { return std::tuple<>(); }

// The node's outputs are loss, lse and entropy, in this order, as far as they are wanted: an entropy comes with
// the lse.
template <class Node>
void set_history(const LossResults& results, LossWants wants, const Node& node) {
  torch::autograd::set_history(results.loss, node);
  if (wants.lse || wants.entropy) torch::autograd::set_history(results.lse, node);
  if (wants.entropy) torch::autograd::set_history(results.entropy, node);
}

void record(const LossResults& results, const LossTensors& tensors, const LossOptions& options,
            LossWants wants) {
  const auto& [input, target, weight] = tensors;
  const auto node =
      make_node(torch::autograd::collect_next_edges(input),
                CrossEntropyGradient{options.reduction, options.ignore_index, options.smoothing,
                                     options.z_loss, options.factor, options.softcap});
  set_history(results, wants, node);
  node->save(0, input, /*is_output=*/false);
  node->save(1, target, /*is_output=*/false);
  if (weight) node->save(2, *weight, /*is_output=*/false);
  node->save(3, results.lse, /*is_output=*/wants.lse || wants.entropy);
  node->save(4, results.kept, /*is_output=*/false);
  node->save(5, results.total, /*is_output=*/false);
  if (wants.entropy) node->save(6, results.entropy, /*is_output=*/true);
}

void check_weight(const Maybe& weight) {
  TORCH_CHECK(!weight || !weight->requires_grad() || !at::GradMode::is_enabled(),
              "The function 'cross_entropy' is not differentiable with respect to argument "
              "'weight'. This input cannot have requires_grad True.");
}

// ---- what the dispatcher has --------------------------------------------------------------------

// An operator has no result that may be missing: an entropy that is not wanted has no elements.
Five forward_kernel(const at::Tensor& input, const at::Tensor& target, const Maybe& weight,
                    SOFTMAX_EXT_LOSS_OPTIONS, bool wants_lse, bool wants_entropy) {
  LossResults results = loss_forward(
      {input, target, weight}, {reduction, ignore_index, label_smoothing, z_loss, factor, softcap},
      {wants_lse, wants_entropy});
  if (!wants_entropy) results.entropy = at::empty({0}, results.lse.options());
  return {results.loss, results.lse, results.kept, results.total, results.entropy};
}

Five forward_meta(const at::Tensor& input, const at::Tensor& target, const Maybe& weight,
                  SOFTMAX_EXT_LOSS_OPTIONS, bool, bool wants_entropy) {
  check_loss({input, target, weight},
             {reduction, ignore_index, label_smoothing, z_loss, factor, softcap});
  const auto wide = input.options().dtype(at::toOpMathType(input.scalar_type()));
  const auto of_rows = [&](const at::TensorOptions& options) {
    return at::empty_symint(target.sym_sizes(), options);
  };
  const at::Tensor loss =
      reduction == at::Reduction::None ? of_rows(input.options()) : at::empty({}, input.options());
  c10::SymDimVector two(target.sym_sizes().begin(), target.sym_sizes().end());
  two.insert(two.begin(), 2);
  return {loss, of_rows(wide), at::empty_symint(two, wide),
          at::empty({}, input.options().dtype(at::kDouble)),
          wants_entropy ? of_rows(wide) : at::empty({0}, wide)};
}

Five forward_autograd(const at::Tensor& input, const at::Tensor& target, const Maybe& weight,
                      SOFTMAX_EXT_LOSS_OPTIONS, bool wants_lse, bool wants_entropy) {
  TORCH_CHECK_NOT_IMPLEMENTED(!input._fw_grad(/*level=*/0).defined(), kForward,
                              ": forward-mode differentiation is not implemented");
  check_weight(weight);
  LossResults results;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto handle =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow(kForward, "")
            .typed<Five(const at::Tensor&, const at::Tensor&, const Maybe&, int64_t, int64_t,
                        double, double, double, double, bool, bool)>();
    std::tie(results.loss, results.lse, results.kept, results.total, results.entropy) =
        handle.call(input, target, weight, reduction, ignore_index, label_smoothing, z_loss, factor,
                    softcap, wants_lse, wants_entropy);
  }
  if (torch::autograd::compute_requires_grad(input)) {
    record(results, {input, target, weight},
           {reduction, ignore_index, label_smoothing, z_loss, factor, softcap},
           {wants_lse, wants_entropy});
  }
  return {results.loss, results.lse, results.kept, results.total, results.entropy};
}

LossResultGrads grads_of(const at::Tensor& loss, const Maybe& lse, const Maybe& entropy) {
  return {loss, lse.value_or(at::Tensor()), entropy.value_or(at::Tensor())};
}

at::Tensor backward_kernel(const at::Tensor& grad_loss, const Maybe& grad_lse,
                           const Maybe& grad_entropy, const at::Tensor& input,
                           const at::Tensor& target, const Maybe& weight, const at::Tensor& lse,
                           const at::Tensor& kept, const at::Tensor& total, const Maybe& entropy,
                           SOFTMAX_EXT_LOSS_OPTIONS) {
  return loss_backward(grads_of(grad_loss, grad_lse, grad_entropy), {input, target, weight},
                       {{}, lse, kept, total, entropy.value_or(at::Tensor())},
                       {reduction, ignore_index, label_smoothing, z_loss, factor, softcap});
}

at::Tensor backward_composed(const at::Tensor& grad_loss, const Maybe& grad_lse,
                             const Maybe& grad_entropy, const at::Tensor& input,
                             const at::Tensor& target, const Maybe& weight, const at::Tensor&,
                             const at::Tensor&, const at::Tensor&, const Maybe&,
                             SOFTMAX_EXT_LOSS_OPTIONS) {
  return composed_loss_gradient(
      grads_of(grad_loss, grad_lse, grad_entropy), {input, target, weight},
      {reduction, ignore_index, label_smoothing, z_loss, factor, softcap});
}

at::Tensor backward_meta(const at::Tensor& grad_loss, const Maybe& grad_lse,
                         const Maybe& grad_entropy, const at::Tensor& input,
                         const at::Tensor& target, const Maybe& weight, const at::Tensor& lse,
                         const at::Tensor& kept, const at::Tensor& total, const Maybe& entropy,
                         SOFTMAX_EXT_LOSS_OPTIONS) {
  check_loss_gradient(grads_of(grad_loss, grad_lse, grad_entropy), {input, target, weight},
                      {{}, lse, kept, total, entropy.value_or(at::Tensor())},
                      {reduction, ignore_index, label_smoothing, z_loss, factor, softcap});
  if (!classes_are_moved(input)) return at::empty_symint(input.sym_sizes(), input.options());
  const int64_t dim = class_dim(input);
  return at::empty_symint(input.movedim(dim, -1).sym_sizes(), input.options()).movedim(-1, dim);
}

std::tuple<at::Tensor, at::Tensor> rows_kernel(const at::Tensor& input, const at::Tensor& target,
                                               const Maybe& weight, const Maybe& grad_loss,
                                               const Maybe& grad_lse, int64_t ignore_index,
                                               double label_smoothing, double z_loss, double factor,
                                               double softcap) {
  const LossGradientOver over{grad_loss.value_or(at::Tensor()), grad_lse.value_or(at::Tensor())};
  const RowLosses rows =
      row_losses({input, target, weight},
                 {at::Reduction::None, ignore_index, label_smoothing, z_loss, factor, softcap},
                 {/*lse=*/true, /*entropy=*/false}, grad_loss || grad_lse ? &over : nullptr);
  return {rows.losses, rows.lse};
}

std::tuple<at::Tensor, at::Tensor> rows_meta(const at::Tensor& input, const at::Tensor& target,
                                             const Maybe& weight, const Maybe& grad_loss,
                                             const Maybe& grad_lse, int64_t ignore_index,
                                             double label_smoothing, double z_loss, double factor,
                                             double softcap) {
  const LossTensors tensors{input, target, weight};
  check_loss(tensors,
             {at::Reduction::None, ignore_index, label_smoothing, z_loss, factor, softcap});
  check_gradient_over({grad_loss.value_or(at::Tensor()), grad_lse.value_or(at::Tensor())}, tensors);
  const auto of_rows = [&] {
    return at::empty_symint(target.sym_sizes(),
                            input.options().dtype(at::toOpMathType(input.scalar_type())));
  };
  return {of_rows(), of_rows()};
}

LossResults cross_entropy_in_place(const LossTensors& tensors, const LossOptions& options,
                                   LossWants wants) {
  const at::Tensor& input = tensors.input;
  check_loss(tensors, options);
  torch::autograd::check_inplace(input, /*requires_grad=*/true);
  auto edges = torch::autograd::collect_next_edges(input);
  const auto overwritten = make_node(torch::autograd::edge_list(edges), OverwrittenGradient{});
  const auto node = make_node(
      std::move(edges),
      CrossEntropyInPlaceGradient{options.reduction, std::min<int64_t>(1, input.dim() - 1)});
  LossResults results;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const LossGradientOver over;
    results = loss_forward(tensors, options, wants, &over);
  }
  torch::autograd::increment_version(input);
  set_history(results, wants, node);
  node->save(0, input.detach(), /*is_output=*/false);
  if (results.scale.defined()) node->save(1, results.scale, /*is_output=*/false);
  torch::autograd::rebase_history(input, overwritten);
  return results;
}

}  // namespace

LossResults cross_entropy(const LossTensors& tensors, const LossOptions& options, LossWants wants,
                          bool in_place) {
  SOFTMAX_EXT_RECORD(kForward, tensors.input, tensors.target);
  check_weight(tensors.weight);
  if (in_place && torch::autograd::compute_requires_grad(tensors.input)) {
    return cross_entropy_in_place(tensors, options, wants);
  }
  LossResults results;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    results = loss_forward(tensors, options, wants);
  }
  if (torch::autograd::compute_requires_grad(tensors.input)) {
    record(results, tensors, options, wants);
  }
  return results;
}

void add_loss_node_types() {
  NodeType<CrossEntropyGradient>::add();
  NodeType<CrossEntropyInPlaceGradient>::add();
  NodeType<OverwrittenGradient>::add();
}

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
  define(kRowsSchema);
  implement(kRows, TORCH_FN(rows_kernel));
  library.impl(kRows, torch::dispatch(c10::DispatchKey::Meta, rows_meta));
}

}  // namespace softmax_ext
