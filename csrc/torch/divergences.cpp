#include "divergences.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>

#include <cmath>
#include <cstdint>

#include "loss_tensors.h"
#include "softmax_ext/score_plan.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

constexpr const char* kFunction = "kl_div_with_logits";

LossCheck checks_of(const at::Tensor& student) { return {kFunction, "student", student}; }

// The two tensors as the kernels read them: classes side by side.
struct Pair {
  at::Tensor student, teacher;
  Shape shape;
  Dims dims;
  Strides student_strides, teacher_strides;

  explicit Pair(const DivergenceTensors& tensors)
      : student(tensors.student), teacher(tensors.teacher), shape(to_shape(student, -1)) {
    for (at::Tensor* const tensor : {&student, &teacher}) {
      if (tensor->stride(-1) != 1 && shape.dim > 1) *tensor = tensor->contiguous();
    }
    if (!find()) {
      student = student.contiguous();
      teacher = teacher.contiguous();
      find();
    }
  }

 private:
  bool find() {
    dims = contiguous_dims(shape);
    student_strides = teacher_strides = contiguous_strides(shape);
    return find_strides({{&student, &student_strides}, {&teacher, &teacher_strides}},
                        student.dim() - 1, dims) &&
           (student.is_cpu() || cuda::takes_scores(shape, dims));
  }
};

at::Tensor weight_of_rows(const DivergenceTensors& tensors) {
  if (!tensors.weight) return {};
  return tensors.weight->to(at::toOpMathType(tensors.student.scalar_type())).contiguous();
}

Divisor divisor_of(const at::Tensor& weight, const Shape& shape, int64_t reduction) {
  Divisor divisor;
  if (reduction != kBatchMean && reduction != at::Reduction::Mean) return divisor;
  if (!weight.defined()) {
    divisor.number = static_cast<double>(shape.rows());
  } else if (weight.is_cpu()) {
    divisor.number = of_numbers(weight, [&](const auto* of_rows) {
      int64_t counted = 0;
      for (int64_t k = 0; k < weight.numel(); ++k) counted += of_rows[k] != 0;
      return static_cast<double>(counted);
    });
  } else {
    divisor.on_device = (weight != 0).sum();
  }
  if (reduction == at::Reduction::Mean) divisor.number *= static_cast<double>(shape.dim);
  return divisor;
}

DivergenceOptions options_of(const DivergenceCall& call, const at::Tensor& weight) {
  return {call.beta, call.factor, data_of(weight)};
}

c10::SymDimVector kept_sizes(const at::Tensor& student) {
  c10::SymDimVector sizes(student.sym_sizes().begin(), student.sym_sizes().end());
  sizes.back() = DivergenceRow<float>::kCount;
  return sizes;
}

}  // namespace

void check_divergence(const DivergenceTensors& tensors, const DivergenceCall& call) {
  const auto& [student, teacher, weight] = tensors;
  const LossCheck checks = checks_of(student);
  checks.check_logits();
  checks.check_dtype("teacher", teacher);
  checks.check_device("teacher", teacher);
  TORCH_CHECK_VALUE(teacher.sym_sizes() == student.sym_sizes(), kFunction,
                    "(): Expected argument 'teacher' to have the size ", student.sym_sizes(),
                    " of 'student', but got ", teacher.sym_sizes());
  if (weight) {
    const c10::SymIntArrayRef of_rows = student.sym_sizes().slice(0, student.dim() - 1);
    TORCH_CHECK_VALUE(weight->sym_sizes() == of_rows, kFunction,
                      "(): Expected argument 'weight' to have the size ", of_rows,
                      " for a 'student' of the size ", student.sym_sizes(), ", but got ",
                      weight->sym_sizes());
    TORCH_CHECK(!weight->is_complex(), kFunction,
                "(): expected argument 'weight' to be real, but got ", weight->scalar_type());
    checks.check_device("weight", *weight);
  }
  checks.check_reduction(call.reduction, kBatchMean + 1);
  TORCH_CHECK_VALUE(call.beta >= 0 && call.beta <= 1, kFunction,
                    "(): expected argument 'beta' to be from 0 to 1, but got ", call.beta);
  TORCH_CHECK_VALUE(call.factor > 0 && std::isfinite(call.factor), kFunction,
                    "(): expected argument 'factor' to be above 0 and finite, but got ",
                    call.factor);
}

DivergenceResults divergence_forward(const DivergenceTensors& tensors, const DivergenceCall& call) {
  check_divergence(tensors, call);
  const at::Tensor& student = tensors.student;
  const at::ScalarType wide = at::toOpMathType(student.scalar_type());
  const Pair pair(tensors);
  const at::Tensor weight = weight_of_rows(tensors);
  const at::IntArrayRef of_rows = student.sizes().slice(0, student.dim() - 1);
  at::Tensor row_loss = empty(of_rows, wide, student.device()).tensor;
  DivergenceResults results;
  results.kept = empty(C10_AS_INTARRAYREF_SLOW(kept_sizes(student)), wide, student.device()).tensor;
  if (student.numel() == 0) {
    row_loss.zero_();
    results.kept.zero_();
  } else {
    const DivergenceForwardArgs args{pair.student.const_data_ptr(),
                                     pair.teacher.const_data_ptr(),
                                     to_dtype(student.scalar_type()),
                                     pair.shape,
                                     pair.dims,
                                     pair.student_strides,
                                     pair.teacher_strides,
                                     options_of(call, weight),
                                     row_loss.mutable_data_ptr(),
                                     results.kept.mutable_data_ptr()};
    launch(args, student.device(), cpu::kernels().launch_divergence_forward);
  }
  if (call.reduction == at::Reduction::None) {
    results.loss = row_loss.to(student.scalar_type());
    return results;
  }
  results.loss =
      reduced(row_loss, divisor_of(weight, pair.shape, call.reduction), student.scalar_type());
  return results;
}

void check_divergence_gradient(const at::Tensor& grad_loss, const DivergenceTensors& tensors,
                               const at::Tensor& kept, const DivergenceCall& call) {
  check_divergence(tensors, call);
  const at::Tensor& student = tensors.student;
  const LossCheck checks = checks_of(student);
  const c10::SymIntArrayRef none, of_rows = student.sym_sizes().slice(0, student.dim() - 1);
  checks.check_given("grad_loss", grad_loss, student.scalar_type(),
                     call.reduction == at::Reduction::None ? of_rows : none);
  checks.check_given("kept", kept, at::toOpMathType(student.scalar_type()), kept_sizes(student));
}

DivergenceGradients divergence_backward(const at::Tensor& grad_loss,
                                        const DivergenceTensors& tensors, const at::Tensor& kept,
                                        const DivergenceCall& call, bool of_student,
                                        bool of_teacher) {
  check_divergence_gradient(grad_loss, tensors, kept, call);
  const at::Tensor& student = tensors.student;
  const Pair pair(tensors);
  const at::Tensor weight = weight_of_rows(tensors);
  bool are_new = false;
  const auto new_gradient = [&](bool is_wanted) {
    if (!is_wanted) return at::Tensor();
    const auto [tensor, is_new] = empty(student.sizes(), student.scalar_type(), student.device());
    are_new |= is_new;
    return tensor;
  };
  DivergenceGradients grads;
  grads.student = new_gradient(of_student);
  grads.teacher = new_gradient(of_teacher);
  if (student.numel() == 0) return grads;
  const Divisor divisor = divisor_of(weight, pair.shape, call.reduction);
  const at::Tensor g =
      divisor.of(grad_loss.to(at::toOpMathType(student.scalar_type()))).contiguous();
  const at::Tensor of_rows = kept.contiguous();
  const DivergenceBackwardArgs args{pair.student.const_data_ptr(),
                                    pair.teacher.const_data_ptr(),
                                    mutable_data_of(grads.student),
                                    mutable_data_of(grads.teacher),
                                    to_dtype(student.scalar_type()),
                                    pair.shape,
                                    pair.dims,
                                    pair.student_strides,
                                    pair.teacher_strides,
                                    are_new,
                                    options_of(call, weight),
                                    of_rows.const_data_ptr(),
                                    g.const_data_ptr(),
                                    call.reduction == at::Reduction::None ? 1 : 0,
                                    1 / divisor.number};
  launch(args, student.device(), cpu::kernels().launch_divergence_backward);
  return grads;
}

DivergenceGradients composed_divergence_gradient(const at::Tensor& grad_loss,
                                                 const DivergenceTensors& tensors,
                                                 const DivergenceCall& call, bool of_student,
                                                 bool of_teacher) {
  const auto& [student, teacher, weight] = tensors;
  const at::ScalarType dtype = student.scalar_type(), wide = at::toOpMathType(dtype);
  const at::Tensor zero = at::scalar_tensor(0, student.options().dtype(wide));
  at::Tensor g = grad_loss.to(wide), counts;
  if (weight) counts = *weight != 0;
  if (call.reduction == kBatchMean || call.reduction == at::Reduction::Mean) {
    c10::SymInt rows = 1;
    for (const auto& size : student.sym_sizes().slice(0, student.dim() - 1)) rows *= size;
    g = weight ? g / counts.sum() : g / rows;
    if (call.reduction == at::Reduction::Mean) g = g / student.sym_size(-1);
  }
  if (weight) g = at::where(counts, g * weight->to(wide), zero);
  if (g.dim() > 0) g = g.unsqueeze(-1);
  const auto log_softmax = [&](const at::Tensor& x) {
    const at::Tensor z = x.to(wide) * call.factor;
    return at::log_softmax(weight ? at::where(counts.unsqueeze(-1), z, zero) : z, -1);
  };
  const at::Tensor log_p = log_softmax(teacher), log_q = log_softmax(student);
  const at::Tensor p = log_p.exp(), q = log_q.exp();
  // a (log(a / b) - KL(a || b)), and 0 where a is.
  const auto of_first = [&](const at::Tensor& a, const at::Tensor& log_a, const at::Tensor& log_b) {
    const at::Tensor is_zero = a == 0;
    const at::Tensor d = at::where(is_zero, zero, log_a) - at::where(is_zero, zero, log_b);
    return a * (d - (a * d).sum(-1, /*keepdim=*/true));
  };
  const auto finish = [&](const at::Tensor& dz) { return (g * dz * call.factor).to(dtype); };
  DivergenceGradients grads;
  if (call.beta == 0) {
    if (of_student) grads.student = finish(q - p);
    if (of_teacher) grads.teacher = finish(of_first(p, log_p, log_q));
  } else if (call.beta == 1) {
    if (of_student) grads.student = finish(of_first(q, log_q, log_p));
    if (of_teacher) grads.teacher = finish(p - q);
  } else {
    const at::Tensor is_zero = (p == 0).logical_and(q == 0);
    const at::Tensor log_m =
        at::logaddexp(at::where(is_zero, zero, log_p) + std::log(call.beta),
                      at::where(is_zero, zero, log_q) + std::log1p(-call.beta));
    if (of_student) grads.student = finish(of_first(q, log_q, log_m) * (1 - call.beta));
    if (of_teacher) grads.teacher = finish(of_first(p, log_p, log_m) * call.beta);
  }
  return grads;
}

}  // namespace softmax_ext
