// Divergences in autograd's graph, and as the dispatcher knows them, torch.ops.softmax_ext: what a compiled
// graph calls.
#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda.h"
#include "divergences.h"
#include "node.h"
#include "node_type.h"
#include "tensors.h"
#include "transforms.h"

namespace softmax_ext {
namespace {

using Maybe = std::optional<at::Tensor>;
using Two = std::tuple<at::Tensor, at::Tensor>;

constexpr const char* kForward = "softmax_ext::kl_div_with_logits";
constexpr const char* kBackward = "softmax_ext::kl_div_with_logits_backward";
constexpr const char* kForwardSchema =
    "softmax_ext::kl_div_with_logits(Tensor student, Tensor teacher, Tensor? weight, "
    "int reduction, float beta, float factor) -> (Tensor loss, Tensor kept)";
constexpr const char* kBackwardSchema =
    "softmax_ext::kl_div_with_logits_backward(Tensor grad_loss, Tensor student, Tensor teacher, "
    "Tensor? weight, Tensor kept, int reduction, float beta, float factor, bool of_student, "
    "bool of_teacher) -> (Tensor, Tensor)";

struct KlDivWithLogitsGradient {
  static constexpr const char* kName = "SoftmaxExtKlDivWithLogitsBackward";
  static constexpr std::array kSaved = {"student", "teacher", "weight", "kept"};
  static constexpr std::array kMembers = {"reduction", "beta", "factor", "of_student",
                                          "of_teacher"};

  int64_t reduction;
  double beta, factor;
  bool of_student, of_teacher;

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads,
                                            const std::array<at::Tensor, 4>& saved) const {
    const at::Tensor& grad_loss = grads[0];
    if (!grad_loss.defined()) return {at::Tensor(), at::Tensor()};
    const auto& [student, teacher, saved_weight, kept] = saved;
    const Maybe weight = saved_weight.defined() ? Maybe(saved_weight) : std::nullopt;
    const DivergenceTensors tensors{student, teacher, weight};
    const DivergenceCall call{reduction, beta, factor};
    const auto taken = [](const at::Tensor& tensor) {
      return !tensor.defined() || kernels_take(tensor);
    };
    if (at::GradMode::is_enabled()) {
      const auto result =
          composed_divergence_gradient(grad_loss, tensors, call, of_student, of_teacher);
      return {result.student, result.teacher};
    }
    if (taken(grad_loss) && std::all_of(saved.begin(), saved.end(), taken)) {
      const auto result =
          divergence_backward(grad_loss, tensors, kept, call, of_student, of_teacher);
      return {result.student, result.teacher};
    }
    static const auto handle =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow(kBackward, "")
            .typed<Two(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Maybe&,
                       const at::Tensor&, int64_t, double, double, bool, bool)>();
    const auto [of_the_student, of_the_teacher] = handle.call(
        grad_loss, student, teacher, weight, kept, reduction, beta, factor, of_student, of_teacher);
    return {of_the_student, of_the_teacher};
  }
};

auto members(KlDivWithLogitsGradient& f) {
  return std::tie(f.reduction, f.beta, f.factor, f.of_student, f.of_teacher);
}
auto members(const KlDivWithLogitsGradient& f) {
  return std::tie(f.reduction, f.beta, f.factor, f.of_student, f.of_teacher);
}

void record(const DivergenceResults& results, const DivergenceTensors& tensors,
            const DivergenceCall& call) {
  const auto& [student, teacher, weight] = tensors;
  auto node = make_node(torch::autograd::collect_next_edges(student, teacher),
                        KlDivWithLogitsGradient{call.reduction, call.beta, call.factor,
                                                student.requires_grad(), teacher.requires_grad()});
  auto* const saving = &*node;
  torch::autograd::set_history(results.loss, std::move(node));
  saving->save(0, student, /*is_output=*/false);
  saving->save(1, teacher, /*is_output=*/false);
  if (weight) saving->save(2, *weight, /*is_output=*/false);
  saving->save(3, results.kept, /*is_output=*/false);
}

void check_weight(const Maybe& weight) {
  TORCH_CHECK(!weight || !weight->requires_grad() || !at::GradMode::is_enabled(),
              "The function 'kl_div_with_logits' is not differentiable with respect to argument "
              "'weight'. This input cannot have requires_grad True.");
}

// ---- what the dispatcher has --------------------------------------------------------------------

Two forward_kernel(const at::Tensor& student, const at::Tensor& teacher, const Maybe& weight,
                   int64_t reduction, double beta, double factor) {
  const DivergenceResults results =
      divergence_forward({student, teacher, weight}, {reduction, beta, factor});
  return {results.loss, results.kept};
}

Two forward_meta(const at::Tensor& student, const at::Tensor& teacher, const Maybe& weight,
                 int64_t reduction, double beta, double factor) {
  check_divergence({student, teacher, weight}, {reduction, beta, factor});
  const auto wide = student.options().dtype(at::toOpMathType(student.scalar_type()));
  c10::SymDimVector sizes(student.sym_sizes().begin(), student.sym_sizes().end());
  sizes.pop_back();
  const at::Tensor loss = reduction == at::Reduction::None
                              ? at::empty_symint(sizes, student.options())
                              : at::empty({}, student.options());
  sizes.push_back(DivergenceRow<float>::kCount);
  return {loss, at::empty_symint(sizes, wide)};
}

Two forward_autograd(const at::Tensor& student, const at::Tensor& teacher, const Maybe& weight,
                     int64_t reduction, double beta, double factor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !student._fw_grad(/*level=*/0).defined() && !teacher._fw_grad(/*level=*/0).defined(),
      kForward, ": forward-mode differentiation is not implemented");
  check_weight(weight);
  DivergenceResults results;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto handle = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow(kForward, "")
                                   .typed<Two(const at::Tensor&, const at::Tensor&, const Maybe&,
                                              int64_t, double, double)>();
    std::tie(results.loss, results.kept) =
        handle.call(student, teacher, weight, reduction, beta, factor);
  }
  if (torch::autograd::compute_requires_grad(student, teacher)) {
    record(results, {student, teacher, weight}, {reduction, beta, factor});
  }
  return {results.loss, results.kept};
}

Two backward_kernel(const at::Tensor& grad_loss, const at::Tensor& student,
                    const at::Tensor& teacher, const Maybe& weight, const at::Tensor& kept,
                    int64_t reduction, double beta, double factor, bool of_student,
                    bool of_teacher) {
  const auto grads = divergence_backward(grad_loss, {student, teacher, weight}, kept,
                                         {reduction, beta, factor}, of_student, of_teacher);
  return {grads.student, grads.teacher};
}

Two backward_composed(const at::Tensor& grad_loss, const at::Tensor& student,
                      const at::Tensor& teacher, const Maybe& weight, const at::Tensor&,
                      int64_t reduction, double beta, double factor, bool of_student,
                      bool of_teacher) {
  const auto grads = composed_divergence_gradient(
      grad_loss, {student, teacher, weight}, {reduction, beta, factor}, of_student, of_teacher);
  return {grads.student, grads.teacher};
}

Two backward_meta(const at::Tensor& grad_loss, const at::Tensor& student, const at::Tensor& teacher,
                  const Maybe& weight, const at::Tensor& kept, int64_t reduction, double beta,
                  double factor, bool of_student, bool of_teacher) {
  check_divergence_gradient(grad_loss, {student, teacher, weight}, kept, {reduction, beta, factor});
  const auto gradient = [&](bool is_wanted) {
    return is_wanted ? at::empty_symint(student.sym_sizes(), student.options()) : at::Tensor();
  };
  return {gradient(of_student), gradient(of_teacher)};
}

}  // namespace

at::Tensor kl_div_with_logits(const DivergenceTensors& tensors, const DivergenceCall& call) {
  SOFTMAX_EXT_RECORD(kForward, tensors.student, tensors.teacher);
  check_weight(tensors.weight);
  DivergenceResults results;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    results = divergence_forward(tensors, call);
  }
  if (torch::autograd::compute_requires_grad(tensors.student, tensors.teacher)) {
    record(results, tensors, call);
  }
  return results.loss;
}

void add_divergence_node_type() { NodeType<KlDivWithLogitsGradient>::add(); }

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
