// segment_softmax, segment_log_softmax and segment_logsumexp as operators of transforms.h, and their
// derivatives, each written once. Of the input x, c the scale, the output y and its gradient g, with sums
// over segments, and of logsumexp y and g of an element's segment:
//   softmax      dx = c y (g - sum(g y))
//   log-softmax  dx = c (g - exp(y) sum(g))
//   logsumexp    dx = c g exp(c x - y)
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "segments.h"
#include "softmax_formulas.h"
#include "transforms.h"

namespace softmax_ext {

using MaybeTensor = const std::optional<at::Tensor>&;
using MaybeSize = std::optional<c10::SymInt>;

template <SegmentOp op>
struct SegmentBackward;

template <SegmentOp op>
struct SegmentInputGradient;

template <SegmentOp op>
struct SegmentGradientOfGradient;

namespace detail {

inline std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}
inline at::Tensor or_undefined(MaybeTensor tensor) { return tensor.value_or(at::Tensor()); }

// What a node saved of the segments.
struct SavedSegments {
  std::optional<at::Tensor> ptr, index, order;

  SavedSegments(const at::Tensor& ptr, const at::Tensor& index, const at::Tensor& order)
      : ptr(if_defined(ptr)), index(if_defined(index)), order(if_defined(order)) {}
  SegmentTensors tensors() const { return {ptr, index, order}; }
};

// Sums over the segments of x, whose values have been checked.
inline SegmentSums sums_of(const SegmentTensors& segments, int64_t dim, const at::Tensor& x,
                           const MaybeSize& num_segments = {}) {
  return {segments, dim, x.sym_size(dim), num_segments};
}

}  // namespace detail

template <SegmentOp op>
struct SegmentForward {
  static constexpr const char* kName = op == SegmentOp::kSoftmax ? "softmax_ext::segment_softmax"
                                       : op == SegmentOp::kLogSoftmax
                                           ? "softmax_ext::segment_log_softmax"
                                           : "softmax_ext::segment_logsumexp";
  static constexpr const char* kSchema =
      op == SegmentOp::kSoftmax ? "softmax_ext::segment_softmax(Tensor input, Tensor? ptr, Tensor? "
                                  "index, Tensor? order, int dim, float scale, SymInt? "
                                  "num_segments=None) -> Tensor"
      : op == SegmentOp::kLogSoftmax
          ? "softmax_ext::segment_log_softmax(Tensor input, Tensor? ptr, Tensor? index, Tensor? "
            "order, int dim, float scale, SymInt? num_segments=None) -> Tensor"
          : "softmax_ext::segment_logsumexp(Tensor input, Tensor? ptr, Tensor? index, Tensor? "
            "order, int dim, float scale, SymInt? num_segments=None) -> Tensor";
  static constexpr size_t kDim = 4;

  static at::Tensor kernel(const at::Tensor& input, MaybeTensor ptr, MaybeTensor index,
                           MaybeTensor order, int64_t dim, double scale, MaybeSize num_segments) {
    return segment_forward(input, {ptr, index, order}, dim, scale, num_segments, op);
  }

  static at::Tensor torchs(const at::Tensor& input, MaybeTensor ptr, MaybeTensor index,
                           MaybeTensor order, int64_t dim, double scale, MaybeSize num_segments) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return composed(input, ptr, index, order, dim, scale, num_segments);
  }

  // With derivatives of its own.
  static at::Tensor composed(const at::Tensor& input, MaybeTensor ptr, MaybeTensor index,
                             MaybeTensor order, int64_t dim, double scale, MaybeSize num_segments) {
    check_segment_dtype(op, input, std::nullopt);
    const SegmentTensors segments{ptr, index, order};
    dim = check_segments(name(op), input, segments, dim, num_segments);
    return segment_forward_by_torch(input, segments, dim, scale, num_segments, op);
  }

  static at::Tensor meta(const at::Tensor& input, MaybeTensor ptr, MaybeTensor index,
                         MaybeTensor order, int64_t dim, double, MaybeSize num_segments) {
    check_segment_dtype(op, input, std::nullopt);
    dim = check_segments(name(op), input, {ptr, index, order}, dim, num_segments);
    c10::SymInt count = 0;
    if constexpr (op == SegmentOp::kLogSumExp) {
      TORCH_CHECK_VALUE(ptr || num_segments, name(op),
                        "(): where values are not known (torch.compile, fake and meta tensors), an "
                        "'index' needs the argument 'num_segments'");
      count = ptr ? ptr->sym_size(0) - 1 : *num_segments;
    }
    return at::empty_symint(segment_sizes(input, dim, op, count), input.options());
  }

  static SegmentInputGradient<op> gradient(const at::Tensor& input, MaybeTensor, MaybeTensor,
                                           MaybeTensor, int64_t dim, double scale,
                                           MaybeSize num_segments) {
    return {at::maybe_wrap_dim(dim, input.dim()), scale, num_segments};
  }

  static auto saved(const at::Tensor& result, const at::Tensor& input, MaybeTensor ptr,
                    MaybeTensor index, MaybeTensor order, int64_t, double, const MaybeSize&) {
    const std::tuple segments(detail::or_undefined(ptr), detail::or_undefined(index),
                              detail::or_undefined(order));
    if constexpr (op == SegmentOp::kLogSumExp) {
      return std::tuple_cat(std::tie(result, input), segments);
    } else {
      return std::tuple_cat(std::tie(result), segments);
    }
  }

  // Of the tangent t:
  //   softmax      the gradient of t, since the Jacobian is symmetric
  //   log-softmax  c (t - sum(exp(y) t))
  //   logsumexp    c sum(t exp(c x - y))
  static at::Tensor tangent(const std::array<at::Tensor, 1>& tangents, const at::Tensor& y,
                            const at::Tensor& input, MaybeTensor ptr, MaybeTensor index,
                            MaybeTensor order, int64_t dim, double scale, MaybeSize num_segments) {
    const at::Tensor& tangent = tangents[0];
    if constexpr (op == SegmentOp::kSoftmax) {
      return Rules<SegmentBackward<op>>::call(tangent, y, ptr, index, order, dim, scale,
                                              num_segments);
    } else {
      dim = at::maybe_wrap_dim(dim, input.dim());
      if (op == SegmentOp::kLogSumExp) num_segments = y.sym_size(dim);
      const SegmentSums sums = detail::sums_of({ptr, index, order}, dim, input, num_segments);
      const at::Tensor t = wide(tangent);
      const at::Tensor result =
          op == SegmentOp::kLogSoftmax
              ? t - sums.total(wide(y).exp() * t)
              : sums.of(t * (wide(input) * scale - sums.spread(wide(y))).exp());
      return (result * scale).to(y.scalar_type());
    }
  }
};

// The gradient of the input, of softmax and log-softmax.
template <SegmentOp op>
struct SegmentBackward {
  static constexpr const char* kName = op == SegmentOp::kSoftmax
                                           ? "softmax_ext::segment_softmax_backward"
                                           : "softmax_ext::segment_log_softmax_backward";
  static constexpr const char* kSchema =
      op == SegmentOp::kSoftmax
          ? "softmax_ext::segment_softmax_backward(Tensor grad_output, Tensor output, Tensor? ptr, "
            "Tensor? index, Tensor? order, int dim, float scale, SymInt? num_segments=None) -> "
            "Tensor"
          : "softmax_ext::segment_log_softmax_backward(Tensor grad_output, Tensor output, Tensor? "
            "ptr, Tensor? index, Tensor? order, int dim, float scale, SymInt? num_segments=None) "
            "-> "
            "Tensor";
  static constexpr size_t kDim = 5;

  static at::Tensor kernel(const at::Tensor& grad_output, const at::Tensor& output, MaybeTensor ptr,
                           MaybeTensor index, MaybeTensor order, int64_t dim, double scale,
                           MaybeSize num_segments) {
    return segment_backward(grad_output, output, std::nullopt, {ptr, index, order}, dim, scale,
                            num_segments, op);
  }

  static at::Tensor torchs(const at::Tensor& grad_output, const at::Tensor& output, MaybeTensor ptr,
                           MaybeTensor index, MaybeTensor order, int64_t dim, double scale,
                           MaybeSize num_segments) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const SegmentTensors segments{ptr, index, order};
    check_segment_gradient(grad_output, output, std::nullopt, segments, dim, op);
    dim = at::maybe_wrap_dim(dim, output.dim());
    const SegmentSums sums = detail::sums_of(segments, dim, output, num_segments);
    const at::Tensor g = wide(grad_output), y = wide(output);
    const at::Tensor result =
        op == SegmentOp::kSoftmax ? y * (g - sums.total(g * y)) : g - y.exp() * sums.total(g);
    return (result * scale).to(output.scalar_type());
  }

  static at::Tensor meta(const at::Tensor& grad_output, const at::Tensor& output, MaybeTensor ptr,
                         MaybeTensor index, MaybeTensor order, int64_t dim, double, MaybeSize) {
    check_segment_gradient(grad_output, output, std::nullopt, {ptr, index, order}, dim, op);
    return at::empty_symint(output.sym_sizes(), output.options());
  }

  static SegmentGradientOfGradient<op> gradient(const at::Tensor&, const at::Tensor& output,
                                                MaybeTensor, MaybeTensor, MaybeTensor, int64_t dim,
                                                double scale, MaybeSize num_segments) {
    return {at::maybe_wrap_dim(dim, output.dim()), scale, num_segments};
  }

  static auto saved(const at::Tensor&, const at::Tensor& grad_output, const at::Tensor& output,
                    MaybeTensor ptr, MaybeTensor index, MaybeTensor order, int64_t, double,
                    const MaybeSize&) {
    return std::tuple_cat(std::tie(grad_output, output),
                          std::tuple(detail::or_undefined(ptr), detail::or_undefined(index),
                                     detail::or_undefined(order)));
  }

  // dx is linear in g. With t the tangent of y:
  //   softmax      c (t (g - sum(g y)) - y sum(g t))
  //   log-softmax  -c t exp(y) sum(g)
  static at::Tensor tangent(const std::array<at::Tensor, 2>& tangents, const at::Tensor&,
                            const at::Tensor& grad_output, const at::Tensor& output,
                            MaybeTensor ptr, MaybeTensor index, MaybeTensor order, int64_t dim,
                            double scale, MaybeSize num_segments) {
    at::Tensor result;
    if (tangents[0].defined()) {
      result = Rules<SegmentBackward>::call(tangents[0], output, ptr, index, order, dim, scale,
                                            num_segments);
    }
    if (!tangents[1].defined()) return result;
    dim = at::maybe_wrap_dim(dim, output.dim());
    const SegmentSums sums = detail::sums_of({ptr, index, order}, dim, output, num_segments);
    const at::Tensor t = wide(tangents[1]), g = wide(grad_output), y = wide(output);
    const at::Tensor by_y = op == SegmentOp::kSoftmax
                                ? t * (g - sums.total(g * y)) - y * sums.total(g * t)
                                : -t * y.exp() * sums.total(g);
    const at::Tensor term = (by_y * scale).to(output.scalar_type());
    return result.defined() ? result + term : term;
  }
};

// The same of logsumexp, which takes its input.
template <>
struct SegmentBackward<SegmentOp::kLogSumExp> {
  static constexpr SegmentOp kOp = SegmentOp::kLogSumExp;
  static constexpr const char* kName = "softmax_ext::segment_logsumexp_backward";
  static constexpr const char* kSchema =
      "softmax_ext::segment_logsumexp_backward(Tensor grad_output, Tensor output, Tensor input, "
      "Tensor? ptr, Tensor? index, Tensor? order, int dim, float scale) -> Tensor";
  static constexpr size_t kDim = 6;

  static at::Tensor kernel(const at::Tensor& grad_output, const at::Tensor& output,
                           const at::Tensor& input, MaybeTensor ptr, MaybeTensor index,
                           MaybeTensor order, int64_t dim, double scale) {
    return segment_backward(grad_output, output, input, {ptr, index, order}, dim, scale, {}, kOp);
  }

  static at::Tensor torchs(const at::Tensor& grad_output, const at::Tensor& output,
                           const at::Tensor& input, MaybeTensor ptr, MaybeTensor index,
                           MaybeTensor order, int64_t dim, double scale) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const SegmentTensors segments{ptr, index, order};
    check_segment_gradient(grad_output, output, input, segments, dim, kOp);
    dim = at::maybe_wrap_dim(dim, input.dim());
    const SegmentSums sums = detail::sums_of(segments, dim, input, output.sym_size(dim));
    return (sums.spread(wide(grad_output)) * share(sums, output, input, scale) * scale)
        .to(input.scalar_type());
  }

  static at::Tensor meta(const at::Tensor& grad_output, const at::Tensor& output,
                         const at::Tensor& input, MaybeTensor ptr, MaybeTensor index,
                         MaybeTensor order, int64_t dim, double) {
    check_segment_gradient(grad_output, output, input, {ptr, index, order}, dim, kOp);
    return at::empty_symint(input.sym_sizes(), input.options());
  }

  static SegmentGradientOfGradient<kOp> gradient(const at::Tensor&, const at::Tensor&,
                                                 const at::Tensor& input, MaybeTensor, MaybeTensor,
                                                 MaybeTensor, int64_t dim, double scale);

  static auto saved(const at::Tensor&, const at::Tensor& grad_output, const at::Tensor& output,
                    const at::Tensor& input, MaybeTensor ptr, MaybeTensor index, MaybeTensor order,
                    int64_t, double) {
    return std::tuple_cat(std::tie(grad_output, output, input),
                          std::tuple(detail::or_undefined(ptr), detail::or_undefined(index),
                                     detail::or_undefined(order)));
  }

  // dx is linear in g. With p = exp(c x - y), and the tangents of y and x: c g p (c tx - ty).
  static at::Tensor tangent(const std::array<at::Tensor, 3>& tangents, const at::Tensor&,
                            const at::Tensor& grad_output, const at::Tensor& output,
                            const at::Tensor& input, MaybeTensor ptr, MaybeTensor index,
                            MaybeTensor order, int64_t dim, double scale) {
    at::Tensor result;
    if (tangents[0].defined()) {
      result =
          Rules<SegmentBackward>::call(tangents[0], output, input, ptr, index, order, dim, scale);
    }
    if (!tangents[1].defined() && !tangents[2].defined()) return result;
    dim = at::maybe_wrap_dim(dim, input.dim());
    const SegmentSums sums = detail::sums_of({ptr, index, order}, dim, input, output.sym_size(dim));
    const at::Tensor factor =
        sums.spread(wide(grad_output)) * share(sums, output, input, scale) * scale;
    for (const bool of_input : {false, true}) {
      const at::Tensor& tangent = tangents[of_input ? 2 : 1];
      if (!tangent.defined()) continue;
      const at::Tensor change = of_input ? wide(tangent) * scale : -sums.spread(wide(tangent));
      const at::Tensor term = (factor * change).to(input.scalar_type());
      result = result.defined() ? result + term : term;
    }
    return result;
  }

  // Of each element in its segment: softmax.
  static at::Tensor share(const SegmentSums& sums, const at::Tensor& output,
                          const at::Tensor& input, double scale) {
    return (wide(input) * scale - sums.spread(wide(output))).exp();
  }
};

template <SegmentOp op>
struct SegmentInputGradient {
  static constexpr bool kTakesInput = op == SegmentOp::kLogSumExp;
  static constexpr const char* kName =
      op == SegmentOp::kSoftmax      ? "SoftmaxExtSegmentSoftmaxBackward"
      : op == SegmentOp::kLogSoftmax ? "SoftmaxExtSegmentLogSoftmaxBackward"
                                     : "SoftmaxExtSegmentLogsumexpBackward";
  static constexpr auto kSaved = [] {
    if constexpr (kTakesInput) {
      return std::array{"result", "self", "ptr", "index", "order"};
    } else {
      return std::array{"result", "ptr", "index", "order"};
    }
  }();
  static constexpr std::array kMembers = {"dim", "scale", "num_segments"};

  int64_t dim;
  double scale;
  MaybeSize num_segments;

  torch::autograd::variable_list operator()(
      const torch::autograd::variable_list& grads,
      const std::array<at::Tensor, kSaved.size()>& saved) const {
    if (!grads[0].defined()) return {at::Tensor()};
    constexpr size_t kFirst = kTakesInput ? 2 : 1;
    const detail::SavedSegments segments(saved[kFirst], saved[kFirst + 1], saved[kFirst + 2]);
    const auto& [ptr, index, order] = segments;
    using Gradient = Rules<SegmentBackward<op>>;
    if constexpr (kTakesInput) {
      return {Gradient::call(grads[0], saved[0], saved[1], ptr, index, order, dim, scale)};
    } else {
      return {Gradient::call(grads[0], saved[0], ptr, index, order, dim, scale, num_segments)};
    }
  }
};

// The gradient of SegmentBackward. With v the incoming gradient:
//   softmax      dg = c y (v - sum(v y))      dy = c (v (g - sum(g y)) - g sum(v y))
//   log-softmax  dg = c (v - sum(v exp(y)))   dy = -c v exp(y) sum(g)
template <SegmentOp op>
struct SegmentGradientOfGradient {
  static constexpr const char* kName = op == SegmentOp::kSoftmax
                                           ? "SoftmaxExtSegmentSoftmaxBackwardBackward"
                                           : "SoftmaxExtSegmentLogSoftmaxBackwardBackward";
  static constexpr std::array kSaved = {"grad_output", "output", "ptr", "index", "order"};
  static constexpr std::array kMembers = {"dim", "scale", "num_segments"};

  int64_t dim;
  double scale;
  MaybeSize num_segments;

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads,
                                            const std::array<at::Tensor, 5>& saved) const {
    if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
    const detail::SavedSegments segments(saved[2], saved[3], saved[4]);
    const SegmentSums sums = detail::sums_of(segments.tensors(), dim, saved[1], num_segments);
    const at::Tensor v = wide(grads[0]), g = wide(saved[0]), y = wide(saved[1]);
    const auto narrow = [&](const at::Tensor& x) { return (x * scale).to(saved[1].scalar_type()); };
    if constexpr (op == SegmentOp::kSoftmax) {
      const at::Tensor of_v = sums.total(v * y);
      return {narrow(y * (v - of_v)), narrow(v * (g - sums.total(g * y)) - g * of_v)};
    } else {
      const at::Tensor weighted = v * y.exp();
      return {narrow(v - sums.total(weighted)), narrow(-weighted * sums.total(g))};
    }
  }
};

// With p = exp(c x - y):
//   logsumexp    dg = c sum(v p)              dy = -c g sum(v p)         dx = c^2 v g p
template <>
struct SegmentGradientOfGradient<SegmentOp::kLogSumExp> {
  static constexpr const char* kName = "SoftmaxExtSegmentLogsumexpBackwardBackward";
  static constexpr std::array kSaved = {"grad_output", "output", "input", "ptr", "index", "order"};
  static constexpr std::array kMembers = {"dim", "scale", "num_segments"};

  int64_t dim;
  double scale;
  MaybeSize num_segments;

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads,
                                            const std::array<at::Tensor, 6>& saved) const {
    if (!grads[0].defined()) return {at::Tensor(), at::Tensor(), at::Tensor()};
    const detail::SavedSegments segments(saved[3], saved[4], saved[5]);
    const SegmentSums sums =
        detail::sums_of(segments.tensors(), dim, saved[2], saved[1].sym_size(dim));
    const at::Tensor g = wide(saved[0]);
    const at::Tensor weighted =
        wide(grads[0]) *
        SegmentBackward<SegmentOp::kLogSumExp>::share(sums, saved[1], saved[2], scale) * scale;
    const at::Tensor sum = sums.of(weighted);
    const auto narrow = [&](const at::Tensor& x) { return x.to(saved[2].scalar_type()); };
    return {narrow(sum), narrow(-g * sum), narrow(weighted * sums.spread(g) * scale)};
  }
};

inline SegmentGradientOfGradient<SegmentOp::kLogSumExp>
SegmentBackward<SegmentOp::kLogSumExp>::gradient(const at::Tensor&, const at::Tensor&,
                                                 const at::Tensor& input, MaybeTensor, MaybeTensor,
                                                 MaybeTensor, int64_t dim, double scale) {
  return {at::maybe_wrap_dim(dim, input.dim()), scale, {}};
}

template <SegmentOp op>
auto members(SegmentInputGradient<op>& f) {
  return std::tie(f.dim, f.scale, f.num_segments);
}
template <SegmentOp op>
auto members(const SegmentInputGradient<op>& f) {
  return std::tie(f.dim, f.scale, f.num_segments);
}
template <SegmentOp op>
auto members(SegmentGradientOfGradient<op>& f) {
  return std::tie(f.dim, f.scale, f.num_segments);
}
template <SegmentOp op>
auto members(const SegmentGradientOfGradient<op>& f) {
  return std::tie(f.dim, f.scale, f.num_segments);
}

}  // namespace softmax_ext
