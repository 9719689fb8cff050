#include "probabilities.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/scalar_tensor.h>

#include <cmath>
#include <cstdint>

#include "tensors.h"

namespace softmax_ext {
namespace {

constexpr const char* kFunction = "cross_entropy";

void check_device(const char* argument, const at::Tensor& tensor, const at::Tensor& input) {
  TORCH_CHECK(tensor.device() == input.device(), kFunction,
              "(): Expected all tensors to be on the same device, but found 'input' on ",
              input.device(), " and '", argument, "' on ", tensor.device());
  check_storage(kFunction, argument, tensor);
}

// f(first of the numbers) with their type.
template <class F>
double of_numbers(const at::Tensor& tensor, F f) {
  return tensor.scalar_type() == at::kDouble ? f(tensor.const_data_ptr<double>())
                                             : f(tensor.const_data_ptr<float>());
}

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
  TORCH_CHECK_NOT_IMPLEMENTED(is_kernel_output_dtype(input.scalar_type()), kFunction,
                              "(): not implemented for an argument 'input' of dtype ",
                              input.scalar_type(), "; expected Half, BFloat16, Float or Double");
  TORCH_CHECK(input.dim() == 1 || input.dim() == 2, kFunction,
              "(): expected argument 'input' to have 1 or 2 dimensions, but got ", input.dim());
  check_storage(kFunction, "input", input);
  TORCH_CHECK_VALUE(target.sym_sizes() == input.sym_sizes(), kFunction,
                    "(): Expected argument 'target' to have the size ", input.sym_sizes(),
                    " of 'input', but got ", target.sym_sizes());
  for (const at::Tensor* const tensor : {&target, weight ? &*weight : &target}) {
    const char* const name = tensor == &target ? "target" : "weight";
    TORCH_CHECK(tensor->scalar_type() == input.scalar_type(), kFunction,
                "(): expected scalar type ", input.scalar_type(), " but found ",
                tensor->scalar_type(), ": argument '", name, "' must have the dtype of 'input'");
    check_device(name, *tensor, input);
  }
  TORCH_CHECK(!weight || (weight->dim() == 1 && weight->sym_size(0) == input.sym_size(-1)),
              kFunction,
              "(): weight tensor should be defined either for all classes or no classes");
  TORCH_CHECK(options.smoothing >= 0 && options.smoothing <= 1, kFunction,
              "(): label_smoothing must be between 0.0 and 1.0. Got: ", options.smoothing);
  TORCH_CHECK_VALUE(options.reduction >= 0 && options.reduction < at::Reduction::END, kFunction,
                    "(): ", options.reduction, " is not a valid value for reduction");
  TORCH_CHECK_VALUE(options.softcap >= 0 && std::isfinite(options.softcap), kFunction,
                    "(): expected argument 'softcap' to be above 0 and finite, but got ",
                    options.softcap);
  TORCH_CHECK_VALUE(options.factor > 0 && std::isfinite(options.factor), kFunction,
                    "(): expected argument 'factor' to be above 0 and finite, but got ",
                    options.factor);
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
    cpu::kernels().launch_probability_forward(
        {rows.input.const_data_ptr(), rows.target.const_data_ptr(), to_dtype(input.scalar_type()),
         rows.shape, rows.dims, rows.input_strides, rows.target_strides, rows.loss,
         row_loss.mutable_data_ptr(), results.lse.mutable_data_ptr(),
         results.kept.mutable_data_ptr()},
        threads(rows.shape));
  }
  if (options.reduction == at::Reduction::None) {
    results.loss = row_loss.to(input.scalar_type());
    return results;
  }
  double loss = of_numbers(row_loss, [&](const auto* losses) {
    double sum = 0;
    for (int64_t k = 0; k < row_loss.numel(); ++k) sum += static_cast<double>(losses[k]);
    return sum;
  });
  if (options.reduction == at::Reduction::Mean) loss /= static_cast<double>(row_loss.numel());
  results.loss = at::scalar_tensor(loss, input.options());
  return results;
}

void check_probabilities_gradient(const at::Tensor& grad_loss, const at::Tensor& grad_lse,
                                  const LossTensors& tensors, const ProbabilityResults& results,
                                  const LossOptions& options) {
  check_probabilities(tensors, options);
  const at::Tensor& input = tensors.input;
  const at::ScalarType wide = at::toOpMathType(input.scalar_type());
  const auto check = [&](const char* argument, const at::Tensor& tensor, at::ScalarType dtype,
                         c10::SymIntArrayRef sizes) {
    TORCH_CHECK(tensor.scalar_type() == dtype, kFunction, "_backward(): expected scalar type ",
                dtype, " but found ", tensor.scalar_type(), " for argument '", argument, "'");
    TORCH_SYM_CHECK(sym_equals(tensor.sym_sizes(), sizes), kFunction, "_backward(): Expected '",
                    argument, "' to have the size ", sizes, ", but got ", tensor.sym_sizes());
    check_device(argument, tensor, input);
  };
  const c10::SymIntArrayRef none, of_rows = input.sym_sizes().slice(0, input.dim() - 1);
  check("grad_loss", grad_loss, input.scalar_type(),
        options.reduction == at::Reduction::None ? of_rows : none);
  check("lse", results.lse, wide, of_rows);
  check("kept", results.kept, wide, kept_sizes(input));
  if (grad_lse.defined()) check("grad_lse", grad_lse, wide, of_rows);
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
  const auto data_of = [](const at::Tensor& grad) {
    return grad.defined() ? grad.mutable_data_ptr() : nullptr;
  };
  const at::Tensor g = grad_loss.to(at::toOpMathType(input.scalar_type())).contiguous();
  const at::Tensor lse = results.lse.contiguous(), kept = results.kept.contiguous();
  const at::Tensor g_lse = grad_lse.defined() ? grad_lse.contiguous() : at::Tensor();
  const bool is_mean = options.reduction == at::Reduction::Mean;
  cpu::kernels().launch_probability_backward(
      {rows.input.const_data_ptr(), rows.target.const_data_ptr(), data_of(grads.input),
       data_of(grads.target), to_dtype(input.scalar_type()), rows.shape, rows.dims,
       rows.input_strides, rows.target_strides, are_new, rows.loss, lse.const_data_ptr(),
       kept.const_data_ptr(), g.const_data_ptr(), options.reduction == at::Reduction::None ? 1 : 0,
       is_mean ? 1 / static_cast<double>(rows.shape.rows()) : 1,
       g_lse.defined() ? g_lse.const_data_ptr() : nullptr},
      threads(rows.shape));
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
