// Softmax of scores: what becomes of an element before softmax, and the arguments of a forward and a
// backward call.
//
//   s = x * factor * scale        scale: a number a row
//   s = softcap tanh(s / softcap) unless softcap is 0
//   z = s + mask                  or -inf where a bool mask is false
//
// Key k takes part in the row of query q if q + offset - left <= k <= q + offset + right, of which a
// bound below 0 is none; outside nothing is read. A sink is one more z of a row that takes probability
// and has no output.
//
// A row is safe if there is a mask or a bound: elements whose z is -inf have probability 0 and no gradient
// then, also where all of a row are that.
#pragma once

#include <cmath>

#include "softmax_ext/portability.h"
#include "softmax_ext/problem.h"

namespace softmax_ext {

enum class ScoreOp : int { kSoftmax = 0, kLogSoftmax = 1, kLogSumExp = 2 };

constexpr const char* name(ScoreOp op) {
  return op == ScoreOp::kLogSumExp ? "logsumexp" : name(static_cast<Op>(op));
}

// The elements of a row that take part.
struct Range {
  int64_t begin, end;
};

// Strides are those of the call's dims; of what a row has one of, that along dim is 0.
struct Scores {
  double factor = 1;
  double softcap = 0;
  const double* scale = nullptr;
  const void* mask = nullptr;  // bool, 16 bits, or the type that is computed in
  const double* sink = nullptr;
  double sink_of_all = -INFINITY;  // where `sink` is null
  DType mask_dtype = DType::kBool;
  int64_t left = -1, right = -1, offset = 0;
  Strides scale_strides{}, mask_strides{}, sink_strides{};
  Strides query_strides{};  // of the query's index itself

  SOFTMAX_EXT_FUNCTION bool is_bounded() const { return left >= 0 || right >= 0; }
  SOFTMAX_EXT_FUNCTION bool is_safe() const { return mask != nullptr || is_bounded(); }
  SOFTMAX_EXT_FUNCTION bool has_sink() const {
    return sink != nullptr || sink_of_all != -static_cast<double>(INFINITY);
  }

  SOFTMAX_EXT_FUNCTION Range range(int64_t query, int64_t dim) const {
    const auto clamped = [](int64_t i, int64_t least, int64_t most) {
      return i < least ? least : i > most ? most : i;
    };
    const int64_t diagonal = query + offset;
    const int64_t begin = left < 0 ? 0 : clamped(diagonal - left, 0, dim);
    const int64_t end = right < 0 ? dim : clamped(diagonal + right + 1, begin, dim);
    return {begin, end};
  }
};

constexpr ScoreOp score_op_of(Op op, const void* output) {
  return output == nullptr ? ScoreOp::kLogSumExp : static_cast<ScoreOp>(op);
}

// Of rows: inner is 1. What a row has one of is of the type that is computed in: float, or double where
// results are doubles. lse is log(sum(exp(z))).
struct ScoreForwardArgs : ForwardArgs {  // output null: only lse is wanted
  Scores scores{};
  void* lse = nullptr;  // or null
  Strides lse_strides{};

  constexpr ScoreOp score_op() const { return score_op_of(op, output); }
};

// Of logsumexp grad_output has one element for a row, and output is null.
struct ScoreBackwardArgs : BackwardArgs {
  Scores scores{};
  const void* input =
      nullptr;  // of logsumexp, where there is a softcap, or for grad_scale; else null
  const void* lse = nullptr;   // of logsumexp, or for grad_sink; else null
  void* grad_scale = nullptr;  // of factor * scale, a number a row; or null
  void* grad_sink = nullptr;   // a number a row; or null
  // Of the type computed in, with 0 strides along the outer dims that it is summed over; or a number a row,
  // summed over dim. Or null.
  void* grad_mask = nullptr;
  void* grad_mask_of_rows = nullptr;
  // CUDA: sums that follow each other at grad_mask, of a part each of the rows that share an element; and of
  // grad_scale and grad_mask_of_rows, numbers a row, one for each chunk of it (score_plan.h).
  int64_t grad_mask_parts = 1;
  Strides input_strides{}, row_strides{}, grad_mask_strides{};

  constexpr ScoreOp score_op() const { return score_op_of(op, output); }
};

}  // namespace softmax_ext
