// Scores and their derivatives by operators of torch: what every device and every transform has, and the
// gradient's own gradient.
#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>

#include "scores.h"
#include "softmax.h"
#include "softmax_formulas.h"

namespace softmax_ext {
namespace {

at::ScalarType wide_type(at::ScalarType dtype) { return at::toOpMathType(dtype); }

// Where a row's bounds let keys take part, as (queries, keys).
at::Tensor within_bounds(const at::Tensor& input, const ScoreOptions& options) {
  const auto integers = at::TensorOptions(input.device()).dtype(at::kLong);
  const at::Tensor queries = at::arange(c10::Scalar(input.sym_size(-2)), integers).unsqueeze(-1);
  const at::Tensor keys = at::arange(c10::Scalar(input.sym_size(-1)), integers);
  const at::Tensor apart = keys - queries - c10::Scalar(options.offset);
  at::Tensor within;
  if (options.left >= 0) within = apart >= c10::Scalar(-options.left);
  if (options.right >= 0) {
    const at::Tensor before = apart <= c10::Scalar(options.right);
    within = within.defined() ? within.logical_and(before) : before;
  }
  return within;
}

struct Composed {
  at::Tensor z;     // of which what takes no part is -inf
  at::Tensor dead;  // where that is, or undefined where rows are not safe
};

Composed scores_of(const ScoreTensors& tensors, const ScoreOptions& options,
                   at::ScalarType result_dtype) {
  const at::ScalarType wide = wide_type(result_dtype);
  at::Tensor live;
  if (options.is_bounded()) live = within_bounds(tensors.input, options);
  if (tensors.mask.defined() && tensors.mask.scalar_type() == at::kBool) {
    live = live.defined() ? live.logical_and(tensors.mask) : tensors.mask;
  }
  at::Tensor z = tensors.input.to(result_dtype).to(wide);
  // Of what takes no part, the input may be anything.
  if (live.defined()) z = z.masked_fill(live.logical_not(), 0);
  if (options.factor != 1) z = z * options.factor;
  if (tensors.scale.defined()) z = z * tensors.scale.to(wide);
  if (options.softcap != 0) z = (z / options.softcap).tanh() * options.softcap;
  if (!tensors.is_safe(options)) return {z, {}};
  if (tensors.mask.defined() && tensors.mask.scalar_type() != at::kBool) {
    z = z + tensors.mask.to(wide);
  }
  if (live.defined()) z = z.masked_fill(live.logical_not(), -INFINITY);
  const at::Tensor dead = z.eq(-INFINITY);
  return {z.masked_fill(dead, -INFINITY), dead};
}

// The sink as one more element of each row; undefined if there is none.
at::Tensor sink_of(const ScoreTensors& tensors, const ScoreOptions& options, const at::Tensor& z) {
  c10::SymDimVector sizes(z.sym_sizes().begin(), z.sym_sizes().end());
  sizes.back() = 1;
  if (tensors.sink.defined()) return tensors.sink.to(z.scalar_type()).expand_symint(sizes);
  if (options.sink == -INFINITY) return {};
  return at::full_symint(sizes, options.sink, z.options());
}

at::Tensor softmax_of(const at::Tensor& z, bool log, bool by_torch) {
  if (by_torch) return log ? at::log_softmax(z, -1) : at::softmax(z, -1);
  return log ? Rules<Forward<Op::kLogSoftmax>>::call(z, -1, std::nullopt)
             : Rules<Forward<Op::kSoftmax>>::call(z, -1, std::nullopt);
}

// The sum over what a tensor was broadcast to.
at::Tensor sum_to_sizes_of(const at::Tensor& gradient, const at::Tensor& tensor) {
  return at::sum_to(gradient, tensor.sym_sizes()).to(tensor.scalar_type());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> composed_scores(const ScoreTensors& tensors,
                                                   const ScoreOptions& options,
                                                   std::optional<at::ScalarType> dtype,
                                                   bool by_torch) {
  const at::ScalarType result_dtype = check_scores(tensors, options, dtype);
  auto [z, dead] = scores_of(tensors, options, result_dtype);
  const at::Tensor sink = sink_of(tensors, options, z);
  // A row of which nothing takes part is computed as zeros, which have a gradient.
  at::Tensor empty;
  if (dead.defined()) {
    empty = dead.all(-1, /*keepdim=*/true);
    if (sink.defined()) empty = empty.logical_and(sink.eq(-INFINITY));
    z = z.masked_fill(empty, 0);
  }
  const at::Tensor all = sink.defined() ? at::cat({z, sink}, -1) : z;
  at::Tensor lse = at::logsumexp(all, at::IntArrayRef{-1}, /*keepdim=*/true);
  if (dead.defined()) lse = lse.masked_fill(empty, -INFINITY);
  if (options.op == ScoreOp::kLogSumExp) return {lse.to(result_dtype), lse};
  const bool log = options.op == ScoreOp::kLogSoftmax;
  at::Tensor y = softmax_of(all, log, by_torch);
  if (sink.defined()) y = y.narrow_symint(-1, 0, z.sym_size(-1));
  if (dead.defined()) y = y.masked_fill(dead, log ? -INFINITY : 0);
  return {y.to(result_dtype).contiguous(), lse};
}

ScoreTensors composed_score_gradients(const at::Tensor& g, const at::Tensor& y,
                                      const ScoreTensors& tensors, const ScoreOptions& options,
                                      at::ScalarType input_dtype, const ScoreWanted& wanted) {
  const at::ScalarType wide = wide_type(y.scalar_type());
  at::Tensor grad = g.to(wide), dz;
  const at::Tensor output = y.to(wide);
  at::Tensor of_sink;
  if (options.op == ScoreOp::kSoftmax) {
    const at::Tensor dot = sum(grad * output, -1);
    dz = output * (grad - dot);
    if (wanted.sink) of_sink = -(1 - sum(output, -1)) * dot;
  } else if (options.op == ScoreOp::kLogSoftmax) {
    if (tensors.is_safe(options)) grad = grad.masked_fill(output.eq(-INFINITY), 0);
    const at::Tensor total = sum(grad, -1), p = output.exp();
    dz = grad - p * total;
    if (wanted.sink) of_sink = -(1 - sum(p, -1)) * total;
  } else {
    ScoreOptions shares = options;
    shares.op = ScoreOp::kSoftmax;
    const at::Tensor p = std::get<0>(composed_scores(tensors, shares, wide));
    dz = grad * p;
    if (wanted.sink) of_sink = grad * (1 - sum(p, -1));
  }
  ScoreTensors gradients;
  if (wanted.sink) gradients.sink = sum_to_sizes_of(of_sink, tensors.sink);
  if (wanted.mask) gradients.mask = sum_to_sizes_of(dz, tensors.mask);
  if (!wanted.input && !wanted.scale) return gradients;
  at::Tensor x;
  if (wanted.scale || options.softcap != 0) {
    // Of what takes no part, the input may be anything.
    x = tensors.input.to(y.scalar_type()).to(wide);
    if (tensors.is_safe(options)) x = x.masked_fill(dz.eq(0), 0);
  }
  const auto scaled = [&](at::Tensor tensor) {
    if (options.factor != 1) tensor = tensor * options.factor;
    return tensors.scale.defined() ? tensor * tensors.scale.to(wide) : tensor;
  };
  if (options.softcap != 0) {
    const at::Tensor t = (scaled(x) / options.softcap).tanh();
    dz = dz * (1 - t * t);
  }
  if (wanted.input) gradients.input = scaled(dz).to(y.scalar_type()).to(input_dtype);
  if (wanted.scale) gradients.scale = sum_to_sizes_of(dz * x * options.factor, tensors.scale);
  return gradients;
}

}  // namespace softmax_ext
