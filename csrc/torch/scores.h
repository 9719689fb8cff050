// softmax, log-softmax and logsumexp of scores over the last dim (softmax_ext/scores.h says what those
// are), with autograd. Kernels on the CPU; elsewhere, and under transforms, a composition.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "softmax_ext/scores.h"

namespace softmax_ext {

// What scores are made of, besides tensors.
struct ScoreOptions {
  ScoreOp op = ScoreOp::kSoftmax;
  double factor = 1, softcap = 0;
  c10::SymInt left = -1, right = -1, offset = 0;
  double sink = -INFINITY;

  bool is_bounded() const { return left >= 0 || right >= 0; }
};

// Undefined where there is none.
struct ScoreTensors {
  at::Tensor input, scale, mask, sink;

  bool is_safe(const ScoreOptions& options) const { return mask.defined() || options.is_bounded(); }
};

// The gradients of ScoreTensors that are wanted.
struct ScoreWanted {
  bool input = true, scale = false, mask = false, sink = false;
};

// Raises, as torch would, unless these can be the arguments of a call; gives the result's type.
at::ScalarType check_scores(const ScoreTensors& tensors, const ScoreOptions& options,
                            std::optional<at::ScalarType> dtype);

// The same of a gradient's call; shapes may be symbolic.
void check_score_gradient(const at::Tensor& g, const at::Tensor& y, const at::Tensor& lse,
                          const ScoreTensors& tensors, const ScoreOptions& options,
                          at::ScalarType input_dtype, const ScoreWanted& wanted);

// The call by differentiable operators of torch and of this package, on whatever torch runs on: result and,
// as the type computed in, lse.
// by_torch: of no operators of this package.
std::tuple<at::Tensor, at::Tensor> composed_scores(const ScoreTensors& tensors,
                                                   const ScoreOptions& options,
                                                   std::optional<at::ScalarType> dtype,
                                                   bool by_torch = false);

// The gradients the same way, of the result y and its gradient g. The input is needed for a softcap, the
// gradient of a scale, and logsumexp.
ScoreTensors composed_score_gradients(const at::Tensor& g, const at::Tensor& y,
                                      const ScoreTensors& tensors, const ScoreOptions& options,
                                      at::ScalarType input_dtype, const ScoreWanted& wanted);

// The call that reaches a kernel, for tensors that kernels_take. lse is undefined unless it is wanted.
std::tuple<at::Tensor, at::Tensor> score_forward(const ScoreTensors& tensors,
                                                 const ScoreOptions& options,
                                                 std::optional<at::ScalarType> dtype,
                                                 bool wants_lse);
// Into the input's memory.
at::Tensor score_forward_in_place(const ScoreTensors& tensors, const ScoreOptions& options,
                                  bool wants_lse);
ScoreTensors score_backward(const at::Tensor& g, const at::Tensor& y, const at::Tensor& lse,
                            const ScoreTensors& tensors, const ScoreOptions& options,
                            at::ScalarType input_dtype, const ScoreWanted& wanted);

// With autograd.
at::Tensor score_softmax(const ScoreTensors& tensors, const ScoreOptions& options,
                         std::optional<at::ScalarType> dtype);
void score_softmax_in_place(ScoreTensors& tensors, const ScoreOptions& options);

// Gives the nodes' Python objects their names and attributes; once, at import.
void add_score_node_types();

}  // namespace softmax_ext
