// softmax and log-softmax as operators of transforms.h, and their derivatives, each written once.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>

#include "softmax.h"
#include "tensors.h"
#include "transforms.h"

namespace softmax_ext {

template <Op op>
struct Backward;

template <Op op>
struct InputGradient;

template <Op op>
struct GradientOfGradient;

// As the kernels compute: what is made of several calls is rounded once.
inline at::Tensor wide(const at::Tensor& tensor) {
  return tensor.to(at::toOpMathType(tensor.scalar_type()));
}

inline at::Tensor sum(const at::Tensor& tensor, int64_t dim) {
  return tensor.sum(dim, /*keepdim=*/true);
}

// What log-softmax makes of a change of its input: t - sum(exp(y) t), of the output y.
inline at::Tensor centered(const at::Tensor& t, const at::Tensor& y, int64_t dim) {
  return (wide(t) - sum(wide(y).exp() * wide(t), dim)).to(t.scalar_type());
}

// softmax or log-softmax.
template <Op op>
struct Forward {
  static constexpr const char* kName =
      op == Op::kSoftmax ? "softmax_ext::softmax" : "softmax_ext::log_softmax";
  static constexpr const char* kSchema =
      op == Op::kSoftmax
          ? "softmax_ext::softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor"
          : "softmax_ext::log_softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor";
  static constexpr size_t kDim = 1;

  static at::Tensor kernel(const at::Tensor& input, int64_t dim,
                           std::optional<at::ScalarType> dtype) {
    const at::ScalarType result = output_dtype(input, dtype, op);
    return forward(is_kernel_dtype(input.scalar_type()) ? input : cast(input, result, op), dim,
                   result, op);
  }

  static at::Tensor torchs(const at::Tensor& input, int64_t dim,
                           std::optional<at::ScalarType> dtype) {
    return op == Op::kSoftmax ? at::softmax(input, dim, dtype) : at::log_softmax(input, dim, dtype);
  }

  static at::Tensor meta(const at::Tensor& input, int64_t dim,
                         std::optional<at::ScalarType> dtype) {
    (void)at::maybe_wrap_dim(dim, input.dim());
    return at::empty_symint(input.sym_sizes(),
                            input.options().dtype(output_dtype(input, dtype, op)));
  }

  static InputGradient<op> gradient(const at::Tensor& input, int64_t dim,
                                    std::optional<at::ScalarType>) {
    return {at::maybe_wrap_dim(dim, input.dim()), input.scalar_type()};
  }

  static auto saved(const at::Tensor& result, const at::Tensor&, int64_t,
                    std::optional<at::ScalarType>) {
    return std::tie(result);
  }

  static at::Tensor tangent(const std::array<at::Tensor, 1>& tangents, const at::Tensor& y,
                            const at::Tensor&, int64_t dim, std::optional<at::ScalarType>) {
    const at::Tensor t = tangents[0].to(y.scalar_type());
    if constexpr (op == Op::kSoftmax) {
      return Rules<Backward<op>>::call(t, y, dim, y.scalar_type());
    } else {
      return centered(t, y, dim);
    }
  }
};

// The gradient of the input, of the output y and its gradient g. With sums over dim:
//   softmax      dx = y (g - sum(g y))
//   log-softmax  dx = g - exp(y) sum(g)
template <Op op>
struct Backward {
  static constexpr const char* kName =
      op == Op::kSoftmax ? "softmax_ext::softmax_backward" : "softmax_ext::log_softmax_backward";
  static constexpr const char* kSchema =
      op == Op::kSoftmax
          ? "softmax_ext::softmax_backward(Tensor grad_output, Tensor output, int dim, "
            "ScalarType input_dtype) -> Tensor"
          : "softmax_ext::log_softmax_backward(Tensor grad_output, Tensor output, int "
            "dim, ScalarType input_dtype) -> Tensor";
  static constexpr size_t kDim = 2;

  static at::Tensor kernel(const at::Tensor& g, const at::Tensor& y, int64_t dim,
                           at::ScalarType input_dtype) {
    return backward(g, y, dim, input_dtype, op);
  }

  static at::Tensor torchs(const at::Tensor& g, const at::Tensor& y, int64_t dim,
                           at::ScalarType input_dtype) {
    check_gradient(g, y, dim, input_dtype, op);
    // torch's own operator casts only from float to half.
    const auto dtype = y.scalar_type();
    return (op == Op::kSoftmax ? at::_softmax_backward_data(g, y, dim, dtype)
                               : at::_log_softmax_backward_data(g, y, dim, dtype))
        .to(input_dtype);
  }

  static at::Tensor meta(const at::Tensor& g, const at::Tensor& y, int64_t dim,
                         at::ScalarType input_dtype) {
    check_gradient(g, y, dim, input_dtype, op);
    return at::empty_symint(y.sym_sizes(), y.options().dtype(input_dtype));
  }

  static GradientOfGradient<op> gradient(const at::Tensor&, const at::Tensor& y, int64_t dim,
                                         at::ScalarType) {
    return {at::maybe_wrap_dim(dim, y.dim())};
  }

  static auto saved(const at::Tensor&, const at::Tensor& g, const at::Tensor& y, int64_t,
                    at::ScalarType) {
    return std::tie(g, y);
  }

  // dx is linear in g, so that g's tangent goes the way of g. With t the tangent of y:
  //   softmax      t (g - sum(g y)) - y sum(g t)
  //   log-softmax  -t exp(y) sum(g)
  static at::Tensor tangent(const std::array<at::Tensor, 2>& tangents, const at::Tensor&,
                            const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                            at::ScalarType input_dtype) {
    at::Tensor result;
    if (tangents[0].defined())
      result = Rules<Backward>::call(tangents[0], output, dim, input_dtype);
    if (!tangents[1].defined()) return result;
    const at::Tensor t = wide(tangents[1]), g = wide(grad_output), y = wide(output);
    const at::Tensor term = op == Op::kSoftmax ? t * (g - sum(g * y, dim)) - y * sum(g * t, dim)
                                               : -t * y.exp() * sum(g, dim);
    return result.defined() ? result + term.to(input_dtype) : term.to(input_dtype);
  }
};

// The gradient of Forward. It needs nothing but the output.
template <Op op>
struct InputGradient {
  static constexpr const char* kName =
      op == Op::kSoftmax ? "SoftmaxExtSoftmaxBackward" : "SoftmaxExtLogSoftmaxBackward";
  static constexpr std::array kSaved = {"result"};
  static constexpr std::array kMembers = {"dim", "input_dtype"};

  int64_t dim;
  at::ScalarType input_dtype;

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads,
                                            const std::array<at::Tensor, 1>& saved) const {
    if (!grads[0].defined()) return {at::Tensor()};
    const bool castable = is_kernel_output_dtype(input_dtype);
    return {Rules<Backward<op>>::call(grads[0], saved[0], dim,
                                      castable ? input_dtype : saved[0].scalar_type())
                .to(input_dtype)};
  }
};

// The gradient of Backward. With v the incoming gradient:
//   softmax      dg = y (v - sum(v y))     dy = v (g - sum(g y)) - g sum(v y)
//   log-softmax  dg = v - sum(v exp(y))    dy = -v exp(y) sum(g)
template <Op op>
struct GradientOfGradient {
  static constexpr const char* kName = op == Op::kSoftmax ? "SoftmaxExtSoftmaxBackwardBackward"
                                                          : "SoftmaxExtLogSoftmaxBackwardBackward";
  static constexpr std::array kSaved = {"grad_output", "output"};
  static constexpr std::array kMembers = {"dim"};

  int64_t dim;

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads,
                                            const std::array<at::Tensor, 2>& saved) const {
    if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
    check_storage(name(op), "grad", grads[0]);
    const at::ScalarType dtype = saved[1].scalar_type();
    const at::Tensor grad = grads[0].to(dtype);
    check_gradient(saved[0], saved[1], dim, dtype, op);
    check_gradient(grad, saved[1], dim, dtype, op);
    const at::Tensor v = wide(grad), g = wide(saved[0]), y = wide(saved[1]);
    if constexpr (op == Op::kSoftmax) {
      return {Rules<Backward<op>>::call(grad, saved[1], dim, dtype),
              (v * (g - sum(g * y, dim)) - g * sum(v * y, dim)).to(dtype)};
    } else {
      return {centered(grad, saved[1], dim), (-v * y.exp() * sum(g, dim)).to(dtype)};
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

}  // namespace softmax_ext
