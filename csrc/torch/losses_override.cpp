#include "losses_override.h"

#include <ATen/ops/cross_entropy_loss_compositeimplicitautograd_dispatch.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "cuda.h"
#include "losses.h"
#include "probabilities.h"
#include "softmax_override.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

enum class Targets { kIndices, kProbabilities };

// What the kernels take the targets for; none where torch has to compute or to refuse the call.
std::optional<Targets> taken(const LossTensors& tensors, const LossOptions& options) {
  const auto& [input, target, weight] = tensors;
  const bool is_plain = override_is_on() && kernels_take(input) && kernels_take(target) &&
                        (!weight || kernels_take(*weight));
  if (!is_plain || !is_kernel_output_dtype(input.scalar_type()) || input.dim() == 0) return {};
  const int64_t dim = class_dim(input);
  const bool is_weight_taken = !weight || (weight->scalar_type() == input.scalar_type() &&
                                           weight->sizes() == input.sizes().slice(dim, 1) &&
                                           !torch::autograd::compute_requires_grad(*weight));
  const bool is_smoothing_taken = options.smoothing >= 0 && options.smoothing <= 1;
  const bool is_reduction_taken = options.reduction >= 0 && options.reduction < at::Reduction::END;
  if (!is_weight_taken || !is_smoothing_taken || !is_reduction_taken) return {};
  if (input.size(dim) == 0) return {};
  if (target.scalar_type() == at::kLong) {
    c10::DimVector sizes(input.sizes().begin(), input.sizes().end());
    sizes.erase(sizes.begin() + dim);
    return target.sizes() == at::IntArrayRef(sizes) ? std::optional(Targets::kIndices)
                                                    : std::nullopt;
  }
  const bool are_probabilities = target.scalar_type() == input.scalar_type() &&
                                 target.sizes() == input.sizes() && input.dim() <= 2 &&
                                 input.numel() > 0 && options.ignore_index < 0;
  return are_probabilities ? std::optional(Targets::kProbabilities) : std::nullopt;
}

// above_autograd: the kernels record the gradient, as the operators do that torch composes it of.
template <bool above_autograd>
at::Tensor cross_entropy_loss(const at::Tensor& input, const at::Tensor& target,
                              const std::optional<at::Tensor>& weight, int64_t reduction,
                              c10::SymInt ignore_index, double label_smoothing) {
  const auto number = ignore_index.maybe_as_int();
  const LossTensors tensors{input, target, weight};
  const LossOptions options{reduction, number.value_or(0), label_smoothing};
  const auto targets = number ? taken(tensors, options) : std::nullopt;
  if (!targets) {
    return at::compositeimplicitautograd::cross_entropy_loss_symint(
        input, target, weight, reduction, ignore_index, label_smoothing);
  }
  if (*targets == Targets::kIndices) {
    return above_autograd ? cross_entropy(tensors, options, LossWants{}, /*in_place=*/false).loss
                          : loss_forward(tensors, options, LossWants{}).loss;
  }
  return above_autograd ? cross_entropy_of_probabilities(tensors, options, /*wants_lse=*/false).loss
                        : probabilities_forward(tensors, options).loss;
}

}  // namespace

std::vector<torch::Library> override_losses() {
  std::vector<torch::Library> libraries;
  const auto implement = [&](c10::DispatchKey key, auto function) {
    libraries.emplace_back(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
    libraries.back().impl("cross_entropy_loss", function);
  };
  implement(c10::DispatchKey::CPU, TORCH_FN(cross_entropy_loss<false>));
  implement(c10::DispatchKey::AutogradCPU, TORCH_FN(cross_entropy_loss<true>));
  if (kBuiltWithCuda) {
    implement(c10::DispatchKey::CUDA, TORCH_FN(cross_entropy_loss<false>));
    implement(c10::DispatchKey::AutogradCUDA, TORCH_FN(cross_entropy_loss<true>));
  }
  return libraries;
}

}  // namespace softmax_ext
