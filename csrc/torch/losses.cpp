#include "losses.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda.h"
#include "loss_tensors.h"
#include "softmax_ext/score_plan.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

constexpr const char* kFunction = "cross_entropy";

LossCheck checks_of(const at::Tensor& input) { return {kFunction, "input", input}; }

// The input with its classes along `dim`, as the kernels read it: along the last dim where they are side by
// side, else along the class dim with what follows it side by side.
struct Rows {
  at::Tensor tensor;
  int64_t dim;
  bool is_moved;  // the classes went from the class dim to the last one

  explicit Rows(const at::Tensor& input)
      : tensor(input), dim(class_dim(input)), is_moved(classes_are_moved(input)) {
    if (is_moved) {
      tensor = input.movedim(dim, -1);
      dim = tensor.dim() - 1;
    }
    if (!is_taken()) tensor = tensor.contiguous();
  }

  at::Tensor moved_back(const at::Tensor& of_rows) const {
    return is_moved ? of_rows.movedim(-1, class_dim(of_rows)) : of_rows;
  }

 private:
  bool is_taken() const {
    if (tensor.is_contiguous()) return true;
    const std::optional<Layout> layout = layout_of(tensor, dim);
    if (!layout) return false;
    const auto& [shape, dims, strides] = *layout;
    if (tensor.is_cuda() && !cuda::takes_scores(shape, dims)) return false;
    int64_t stretch = 1;
    for (int k = dims.outer + dims.inner - 1; k >= dims.outer; --k) {
      if (strides.of[k] != stretch) return false;
      stretch *= dims.sizes[k];
    }
    return shape.inner > 1 || strides.dim == 1;
  }
};

// What a launch needs besides the input: targets that are known to be in range, and weights. On CUDA the kernels
// look at their values.
struct Classes {
  at::Tensor target, weight;
  at::Tensor weight_sum_on_device;
  Loss loss;
  double total = 0;  // of the weights of targets, on the CPU

  Classes(const LossTensors& tensors, const LossOptions& options, int64_t count)
      : target(tensors.target.contiguous()), loss{} {
    TORCH_CHECK_NOT_IMPLEMENTED(count <= INT32_MAX, kFunction,
                                "(): not implemented for more than 2**31 - 1 classes, but got ",
                                count);
    const bool on_cuda = target.is_cuda();
    double weight_sum = static_cast<double>(count);
    if (tensors.weight) {
      weight = tensors.weight->to(at::toOpMathType(tensors.weight->scalar_type())).contiguous();
      if (!on_cuda) {
        weight_sum = sum_of(weight);
      } else if (options.smoothing != 0) {
        weight_sum_on_device = weight.sum(at::kDouble);
      }
    }
    const int64_t* const targets = target.const_data_ptr<int64_t>();
    loss = {targets,
            options.ignore_index,
            data_of(weight),
            weight_sum,
            options.smoothing,
            options.z_loss,
            options.factor,
            options.softcap,
            static_cast<const double*>(data_of(weight_sum_on_device))};
    if (on_cuda) return;
    int64_t counted = 0;
    const int64_t bad = cpu::kernels().find_bad_target(targets, target.numel(), count,
                                                       options.ignore_index, &counted);
    TORCH_CHECK_INDEX(bad < 0, "Target ", targets[bad], " is out of bounds: ", kFunction,
                      "(): expected argument 'target' to be ", options.ignore_index,
                      " or from 0 to ", count - 1, ", but element ", bad, " is not");
    total = static_cast<double>(counted);
    if (tensors.weight) {
      total = of_numbers(weight, [&](const auto* weights) {
        double sum = 0;
        for (int64_t k = 0; k < target.numel(); ++k) {
          if (targets[k] != options.ignore_index) sum += static_cast<double>(weights[targets[k]]);
        }
        return sum;
      });
    }
  }
};

// The sizes of LossResults::kept, and the second half of it.
c10::DimVector two_of(at::IntArrayRef sizes) {
  c10::DimVector two(sizes.begin(), sizes.end());
  two.insert(two.begin(), 2);
  return two;
}
void* second_of(const at::Tensor& kept) {
  return static_cast<char*>(kept.data_ptr()) + kept.nbytes() / 2;
}

// The gradient that a forward call has besides, over its input, as a call of its own.
LossBackwardArgs gradient_over(const LossForwardArgs& args) {
  return {args.input,
          args.grad_input,
          args.dtype,
          args.shape,
          args.dims,
          args.input_strides,
          args.input_strides,
          /*grad_input_is_new=*/false,
          args.loss,
          args.lse,
          args.lse_rest,
          args.log_p,
          args.grads};
}

// A score of each element, by differentiable operators.
at::Tensor scores_of(const at::Tensor& input, const LossOptions& options) {
  at::Tensor z = input.to(at::toOpMathType(input.scalar_type()));
  if (options.factor != 1) z = z * options.factor;
  return options.softcap == 0 ? z : (z / options.softcap).tanh() * options.softcap;
}

}  // namespace

bool classes_are_moved(const at::Tensor& input) {
  return input.dim() > 2 && input.sym_stride(class_dim(input)) == 1 && !input.is_contiguous();
}

void check_loss_options(const LossOptions& options) {
  TORCH_CHECK(options.smoothing >= 0 && options.smoothing <= 1, kFunction,
              "(): label_smoothing must be between 0.0 and 1.0. Got: ", options.smoothing);
  TORCH_CHECK_VALUE(options.softcap >= 0 && std::isfinite(options.softcap), kFunction,
                    "(): expected argument 'softcap' to be above 0 and finite, but got ",
                    options.softcap);
  TORCH_CHECK_VALUE(options.factor > 0 && std::isfinite(options.factor), kFunction,
                    "(): expected argument 'factor' to be above 0 and finite, but got ",
                    options.factor);
}

void check_loss(const LossTensors& tensors, const LossOptions& options) {
  const auto& [input, target, weight] = tensors;
  const LossCheck checks = checks_of(input);
  checks.check_logits();
  TORCH_CHECK(target.scalar_type() == at::kLong, kFunction,
              "(): expected argument 'target' to have dtype Long, but got ", target.scalar_type());
  checks.check_device("target", target);
  const int64_t dim = class_dim(input);
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  const c10::SymInt classes = sizes[dim];
  sizes.erase(sizes.begin() + dim);
  TORCH_CHECK_VALUE(target.sym_sizes() == c10::SymIntArrayRef(sizes), kFunction,
                    "(): Expected argument 'target' to have the size ", c10::SymIntArrayRef(sizes),
                    " for an 'input' of the size ", input.sym_sizes(), ", but got ",
                    target.sym_sizes());
  checks.check_class_weight(weight, classes);
  checks.check_reduction(options.reduction, at::Reduction::END);
  check_loss_options(options);
}

RowLosses row_losses(const LossTensors& tensors, const LossOptions& options, LossWants wants,
                     const LossGradientOver* over) {
  check_loss(tensors, options);
  const at::Tensor& input = tensors.input;
  const at::ScalarType wide = at::toOpMathType(input.scalar_type());
  const at::IntArrayRef of_rows = tensors.target.sizes();
  at::Tensor grad_loss, grad_lse;
  if (over != nullptr) {
    check_gradient_over(*over, tensors);
    at::assert_no_internal_overlap(input);
    at::assert_no_overlap(input, tensors.target);
    if (tensors.weight) at::assert_no_overlap(input, *tensors.weight);
    if (over->loss.defined()) grad_loss = over->loss.contiguous();
    if (over->lse.defined()) grad_lse = over->lse.contiguous();
  }
  const Rows rows(input);
  const Shape shape = to_shape(rows.tensor, rows.dim);
  const Classes classes(tensors, options, shape.dim);
  const auto empty_of = [&](at::IntArrayRef sizes) {
    return empty(sizes, wide, input.device()).tensor;
  };
  RowLosses results{empty_of(of_rows), empty_of(of_rows), empty_of(two_of(of_rows)),
                    at::Tensor(),      at::Tensor(),      at::Tensor(),
                    at::Tensor()};
  if (wants.entropy) results.entropy = empty_of(of_rows);
  const bool on_cuda = input.is_cuda(), is_mean = options.reduction == at::Reduction::Mean;
  if (on_cuda) {
    results.total = empty({}, at::kDouble, input.device()).tensor;
    results.reduced = empty({}, at::kDouble, input.device()).tensor;
  } else {
    results.total = at::scalar_tensor(classes.total, at::TensorOptions().dtype(at::kDouble));
  }
  if (input.numel() == 0) {
    results.losses.zero_();
    results.lse.fill_(-INFINITY);
    results.kept.zero_();
    if (wants.entropy) results.entropy.zero_();
    if (on_cuda) {
      results.total.zero_();
      results.reduced.fill_(is_mean ? NAN : 0.0);
    }
    return results;
  }
  LossForwardArgs args{rows.tensor.const_data_ptr(),
                       to_dtype(input.scalar_type()),
                       shape,
                       contiguous_dims(shape),
                       contiguous_strides(shape),
                       classes.loss,
                       results.losses.mutable_data_ptr(),
                       results.lse.mutable_data_ptr(),
                       results.kept.mutable_data_ptr(),
                       second_of(results.kept),
                       wants.lse || wants.entropy,
                       /*grad_input=*/nullptr,
                       /*grads=*/{},
                       wants.entropy ? results.entropy.mutable_data_ptr() : nullptr};
  if (over != nullptr) {
    args.grad_input = rows.tensor.mutable_data_ptr();
    args.grads.loss = data_of(grad_loss);
    args.grads.loss_step = grad_loss.defined() && grad_loss.dim() > 0;
    args.grads.lse = data_of(grad_lse);
  }
  find_strides({{&rows.tensor, &args.input_strides}}, rows.dim, args.dims);
  at::Tensor divisor;
  const auto divide = [&] {
    if (over == nullptr || grad_loss.defined() || !is_mean) return;
    divisor = results.total;
    if (input.scalar_type() == at::kHalf) {
      at::Tensor exponent;
      std::tie(divisor, exponent) = at::frexp(results.total);
      results.scale = at::exp2(exponent.to(at::kDouble));
    }
    args.grads.divisor = divisor.const_data_ptr<double>();
  };
  if (on_cuda) {
    launch_on_cuda(args, results.total.mutable_data_ptr<double>(),
                   results.reduced.mutable_data_ptr<double>(), is_mean, input.device());
    // There the gradient is a launch of its own.
    divide();
    if (over != nullptr) launch_on_cuda(gradient_over(args), input.device());
  } else {
    divide();
    cpu::kernels().launch_loss_forward(args, threads(shape));
  }
  if (over != nullptr && !rows.tensor.is_alias_of(input)) {
    input.copy_(rows.moved_back(rows.tensor));
  }
  return results;
}

LossResults loss_forward(const LossTensors& tensors, const LossOptions& options, LossWants wants,
                         const LossGradientOver* over) {
  const RowLosses rows = row_losses(tensors, options, wants, over);
  const at::Tensor& input = tensors.input;
  LossResults results{at::Tensor(), rows.lse, rows.kept, rows.total, rows.entropy, rows.scale};
  if (options.reduction == at::Reduction::None) {
    results.loss = rows.losses.to(input.scalar_type());
    return results;
  }
  if (rows.reduced.defined()) {
    results.loss = rows.reduced.to(input.scalar_type());
    return results;
  }
  double loss = sum_of(rows.losses);
  if (options.reduction == at::Reduction::Mean) loss /= *rows.total.const_data_ptr<double>();
  results.loss = at::scalar_tensor(loss, input.options());
  return results;
}

void check_gradient_over(const LossGradientOver& over, const LossTensors& tensors) {
  const at::ScalarType wide = at::toOpMathType(tensors.input.scalar_type());
  const c10::SymIntArrayRef of_rows = tensors.target.sym_sizes();
  const auto check = [&](const char* argument, const at::Tensor& tensor, bool may_be_one) {
    if (!tensor.defined()) return;
    checks_of(tensors.input).check_device(argument, tensor);
    TORCH_CHECK(tensor.scalar_type() == wide, kFunction, "(): expected scalar type ", wide,
                " but found ", tensor.scalar_type(), " for argument '", argument, "'");
    TORCH_CHECK(tensor.sym_sizes() == of_rows || (may_be_one && tensor.dim() == 0), kFunction,
                "(): Expected '", argument, "' to have the size ", of_rows,
                may_be_one ? " or []" : "", ", but got ", tensor.sym_sizes());
  };
  check("grad_loss", over.loss, /*may_be_one=*/true);
  check("grad_lse", over.lse, /*may_be_one=*/false);
}

void check_loss_gradient(const LossResultGrads& grads, const LossTensors& tensors,
                         const LossResults& results, const LossOptions& options) {
  check_loss(tensors, options);
  const at::Tensor& input = tensors.input;
  const at::ScalarType wide = at::toOpMathType(input.scalar_type());
  const LossCheck checks = checks_of(input);
  const c10::SymIntArrayRef none, of_rows = tensors.target.sym_sizes();
  c10::SymDimVector two(of_rows.begin(), of_rows.end());
  two.insert(two.begin(), 2);
  checks.check_given("grad_loss", grads.loss, input.scalar_type(),
                     options.reduction == at::Reduction::None ? of_rows : none);
  checks.check_given("lse", results.lse, wide, of_rows);
  checks.check_given("kept", results.kept, wide, two);
  checks.check_given("total", results.total, at::kDouble, none);
  if (grads.lse.defined()) checks.check_given("grad_lse", grads.lse, wide, of_rows);
  if (!grads.entropy.defined()) return;
  checks.check_given("grad_entropy", grads.entropy, wide, of_rows);
  TORCH_CHECK(results.entropy.defined(), kFunction,
              "(): expected argument 'entropy' with a 'grad_entropy', but got None");
  checks.check_given("entropy", results.entropy, wide, of_rows);
}

at::Tensor loss_backward(const LossResultGrads& grads, const LossTensors& tensors,
                         const LossResults& results, const LossOptions& options) {
  check_loss_gradient(grads, tensors, results, options);
  const at::Tensor& input = tensors.input;
  const at::ScalarType wide = at::toOpMathType(input.scalar_type());
  const bool is_reduced = options.reduction != at::Reduction::None;
  const Rows rows(input);
  const Shape shape = to_shape(rows.tensor, rows.dim);
  const Classes classes(tensors, options, shape.dim);
  const NewTensor grad_input = empty(rows.tensor.sizes(), input.scalar_type(), input.device());
  if (input.numel() == 0) return rows.moved_back(grad_input.tensor);
  const at::Tensor g = grads.loss.to(wide).contiguous(), lse = results.lse.contiguous();
  const at::Tensor kept = results.kept.contiguous();
  const auto side_by_side = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.contiguous() : tensor;
  };
  const at::Tensor g_lse = side_by_side(grads.lse), g_entropy = side_by_side(grads.entropy);
  const at::Tensor entropy = side_by_side(results.entropy);
  LossBackwardArgs args{
      rows.tensor.const_data_ptr(),
      grad_input.tensor.mutable_data_ptr(),
      to_dtype(input.scalar_type()),
      shape,
      contiguous_dims(shape),
      contiguous_strides(shape),
      contiguous_strides(shape),
      grad_input.is_new,
      classes.loss,
      lse.const_data_ptr(),
      kept.const_data_ptr(),
      second_of(kept),
      {g.const_data_ptr(), is_reduced ? 0 : 1,
       options.reduction == at::Reduction::Mean ? results.total.const_data_ptr<double>() : nullptr,
       data_of(g_lse), data_of(g_entropy)},
      data_of(entropy)};
  find_strides(
      {{&rows.tensor, &args.input_strides}, {&grad_input.tensor, &args.grad_input_strides}},
      rows.dim, args.dims);
  launch(args, input.device(), cpu::kernels().launch_loss_backward);
  return rows.moved_back(grad_input.tensor);
}

at::Tensor composed_loss_gradient(const LossResultGrads& grads, const LossTensors& tensors,
                                  const LossOptions& options) {
  const auto& [input, target, weight] = tensors;
  const auto& [grad_loss, grad_lse, grad_entropy] = grads;
  const int64_t dim = class_dim(input);
  const at::Tensor z = scores_of(input, options);
  const auto zero = [&] { return at::scalar_tensor(0, z.options()); };
  const at::Tensor counts = target != options.ignore_index;
  const at::Tensor classes = at::where(counts, target, 0);
  at::Tensor weights = weight ? weight->to(z.scalar_type()) : at::ones_like(z.select(dim, 0));
  if (weight) weights = weights.index_select(0, classes.flatten()).view_as(target);
  weights = at::where(counts, weights, zero());

  at::Tensor g = grad_loss.to(z.scalar_type());
  if (options.reduction == at::Reduction::Mean) g = g / weights.sum();
  g = at::where(counts, g, zero());
  const at::Tensor log_p = at::log_softmax(z, dim),
                   of_target = g * weights * (1 - options.smoothing);
  at::Tensor share = of_target;
  at::Tensor dz = -at::zeros_like(z).scatter(dim, classes.unsqueeze(dim), of_target.unsqueeze(dim));
  if (options.smoothing != 0) {
    std::vector<int64_t> along(z.dim(), 1);
    along[dim] = -1;
    const at::Tensor each = g * (options.smoothing / static_cast<double>(z.size(dim)));
    const at::Tensor of_all =
        weight ? weight->to(z.scalar_type()).view(along) : at::ones_like(z.detach());
    share = share + each * (weight ? of_all.sum() : of_all.sum(dim));
    dz = dz - each.unsqueeze(dim) * of_all;
  }
  if (options.z_loss != 0) {
    share = share + g * weights * (2 * options.z_loss) * z.logsumexp(dim);
  }
  if (grad_lse.defined()) share = share + grad_lse;
  dz = dz + share.unsqueeze(dim) * log_p.exp();
  if (grad_entropy.defined()) {
    // p log p is 0 at p = 0.
    const at::Tensor p = log_p.exp();
    const at::Tensor finite = at::where(p == 0, zero(), log_p);
    dz = dz - grad_entropy.unsqueeze(dim) * p * (finite - (p * finite).sum(dim, /*keepdim=*/true));
  }
  if (options.softcap != 0) dz = dz * (1 - (z / options.softcap).square());
  if (options.factor != 1) dz = dz * options.factor;
  // Whatever an ignored row holds.
  if (!grad_lse.defined() && !grad_entropy.defined()) {
    dz = at::where(counts.unsqueeze(dim), dz, zero());
  }
  return dz.to(input.scalar_type());
}

}  // namespace softmax_ext
