#include "probabilities.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>

#include <cmath>

#include "loss_tensors.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

constexpr const char* kFunction = "cross_entropy";

LossCheck checks_of(const at::Tensor& input) { return {kFunction, "input", input}; }

// What a launch needs besides results: the two tensors with classes side by side, and weights.
struct Rows {
  at::Tensor input, target, weight;
  Shape shape;
  Dims dims;
  Strides input_strides, target_strides;
  Loss loss;

  Rows(const LossTensors& tensors, const LossOptions& options)
      : input(tensors.input),
        target(tensors.target),
        shape(to_shape(input, -1)),
        dims(contiguous_dims(shape)),
        input_strides(contiguous_strides(shape)),
        target_strides(input_strides),
        loss{} {
    for (at::Tensor* const tensor : {&input, &target}) {
      if (tensor->stride(-1) != 1) *tensor = tensor->contiguous();
    }
    find_strides({{&input, &input_strides}, {&target, &target_strides}}, input.dim() - 1, dims);
    if (tensors.weight) {
      weight = tensors.weight->to(at::toOpMathType(input.scalar_type())).contiguous();
      loss.weight = weight.const_data_ptr();
    }
    loss.smoothing = options.smoothing;
    loss.z_loss = options.z_loss;
    loss.factor = options.factor;
    loss.softcap = options.softcap;
  }
};

c10::SymDimVector kept_sizes(const at::Tensor& input) {
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = ProbabilityRow<float>::kCount;
  return sizes;
}

}  // namespace

void check_probabilities(const LossTensors& tensors, const LossOptions& options) {
  const auto& [input, target, weight] = tensors;
  const LossCheck checks = checks_of(input);
  checks.check_logits();
  TORCH_CHECK(input.dim() <= 2, kFunction,
              "(): expected argument 'input' to have 1 or 2 dimensions, but got ", input.dim());
  TORCH_CHECK_VALUE(target.sym_sizes() == input.sym_sizes(), kFunction,
                    "(): Expected argument 'target' to have the size ", input.sym_sizes(),
                    " of 'input', but got ", target.sym_sizes());
  checks.check_dtype("target", target);
  checks.check_device("target", target);
  checks.check_class_weight(weight, input.sym_size(-1));
  checks.check_reduction(options.reduction, at::Reduction::END);
  check_loss_options(options);
}

ProbabilityResults probabilities_forward(const LossTensors& tensors, const LossOptions& options) {
  check_probabilities(tensors, options);
  const at::Tensor& input = tensors.input;
  const at::ScalarType wide = at::toOpMathType(input.scalar_type());
  const Rows rows(tensors, options);
  const at::IntArrayRef of_rows = input.sizes().slice(0, input.dim() - 1);
  at::Tensor row_loss = empty(of_rows, wide, input.device()).tensor;
  ProbabilityResults results;
  results.lse = empty(of_rows, wide, input.device()).tensor;
  results.kept = empty(C10_AS_INTARRAYREF_SLOW(kept_sizes(input)), wide, input.device()).tensor;
  if (input.numel() == 0) {
    row_loss.zero_();
    results.lse.fill_(-INFINITY);
    results.kept.zero_();
  } else {
    const ProbabilityForwardArgs args{rows.input.const_data_ptr(),
                                      rows.target.const_data_ptr(),
                                      to_dtype(input.scalar_type()),
                                      rows.shape,
                                      rows.dims,
                                      rows.input_strides,
                                      rows.target_strides,
                                      rows.loss,
                                      row_loss.mutable_data_ptr(),
                                      results.lse.mutable_data_ptr(),
                                      results.kept.mutable_data_ptr()};
    launch(args, input.device(), cpu::kernels().launch_probability_forward);
  }
  if (options.reduction == at::Reduction::None) {
    results.loss = row_loss.to(input.scalar_type());
    return results;
  }
  const bool is_mean = options.reduction == at::Reduction::Mean;
  results.loss = reduced(row_loss, {is_mean ? static_cast<double>(row_loss.numel()) : 1, {}},
                         input.scalar_type());
  return results;
}

void check_probabilities_gradient(const at::Tensor& grad_loss, const at::Tensor& grad_lse,
                                  const LossTensors& tensors, const ProbabilityResults& results,
                                  const LossOptions& options) {
  check_probabilities(tensors, options);
  const at::Tensor& input = tensors.input;
  const at::ScalarType wide = at::toOpMathType(input.scalar_type());
  const LossCheck checks = checks_of(input);
  const c10::SymIntArrayRef none, of_rows = input.sym_sizes().slice(0, input.dim() - 1);
  checks.check_given("grad_loss", grad_loss, input.scalar_type(),
                     options.reduction == at::Reduction::None ? of_rows : none);
  checks.check_given("lse", results.lse, wide, of_rows);
  checks.check_given("kept", results.kept, wide, kept_sizes(input));
  if (grad_lse.defined()) checks.check_given("grad_lse", grad_lse, wide, of_rows);
}

ProbabilityGradients probabilities_backward(const at::Tensor& grad_loss, const at::Tensor& grad_lse,
                                            const LossTensors& tensors,
                                            const ProbabilityResults& results,
                                            const LossOptions& options, bool of_input,
                                            bool of_target) {
  check_probabilities_gradient(grad_loss, grad_lse, tensors, results, options);
  const at::Tensor& input = tensors.input;
  const Rows rows(tensors, options);
  bool are_new = false;
  const auto new_gradient = [&](bool is_wanted) {
    if (!is_wanted) return at::Tensor();
    const auto [tensor, is_new] = empty(input.sizes(), input.scalar_type(), input.device());
    are_new |= is_new;
    return tensor;
  };
  ProbabilityGradients grads;
  grads.input = new_gradient(of_input);
  grads.target = new_gradient(of_target);
  if (input.numel() == 0) return grads;
  const at::Tensor g = grad_loss.to(at::toOpMathType(input.scalar_type())).contiguous();
  const at::Tensor lse = results.lse.contiguous(), kept = results.kept.contiguous();
  const at::Tensor g_lse = grad_lse.defined() ? grad_lse.contiguous() : at::Tensor();
  const bool is_mean = options.reduction == at::Reduction::Mean;
  const ProbabilityBackwardArgs args{rows.input.const_data_ptr(),
                                     rows.target.const_data_ptr(),
                                     mutable_data_of(grads.input),
                                     mutable_data_of(grads.target),
                                     to_dtype(input.scalar_type()),
                                     rows.shape,
                                     rows.dims,
                                     rows.input_strides,
                                     rows.target_strides,
                                     are_new,
                                     rows.loss,
                                     lse.const_data_ptr(),
                                     kept.const_data_ptr(),
                                     g.const_data_ptr(),
                                     options.reduction == at::Reduction::None ? 1 : 0,
                                     is_mean ? 1 / static_cast<double>(rows.shape.rows()) : 1,
                                     data_of(g_lse)};
  launch(args, input.device(), cpu::kernels().launch_probability_backward);
  return grads;
}

ProbabilityGradients composed_probabilities_gradient(const at::Tensor& grad_loss,
                                                     const at::Tensor& grad_lse,
                                                     const LossTensors& tensors,
                                                     const LossOptions& options, bool of_input,
                                                     bool of_target) {
  const auto& [input, target, weight] = tensors;
  const at::ScalarType wide = at::toOpMathType(input.scalar_type());
  at::Tensor z = input.to(wide) * options.factor;
  if (options.softcap != 0) z = (z / options.softcap).tanh() * options.softcap;
  const at::Tensor lse = z.logsumexp(-1, /*keepdim=*/true);
  at::Tensor g = grad_loss.to(wide);
  if (options.reduction == at::Reduction::Mean && input.dim() > 1) g = g / input.sym_size(0);
  if (g.dim() > 0) g = g.unsqueeze(-1);
  const at::Tensor of_weight = weight ? g * weight->to(wide) : g;
  ProbabilityGradients grads;
  if (of_target) {
    grads.target = (of_weight * (lse - z) * (1 - options.smoothing))
                       .expand_symint(input.sym_sizes())
                       .to(input.scalar_type());
  }
  if (of_input) {
    const at::Tensor u = of_weight * (target.to(wide) * (1 - options.smoothing) +
                                      options.smoothing / input.sym_size(-1));
    at::Tensor share = u.sum(-1, /*keepdim=*/true) + g * lse * (2 * options.z_loss);
    if (grad_lse.defined()) share = share + grad_lse.unsqueeze(-1);
    at::Tensor dz = share * (z - lse).exp() - u;
    if (options.softcap != 0) dz = dz * (1 - (z / options.softcap).square());
    grads.input = (dz * options.factor).to(input.scalar_type());
  }
  return grads;
}

}  // namespace softmax_ext
