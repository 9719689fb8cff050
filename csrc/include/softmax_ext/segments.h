// The arguments of a call on segments: rows of different lengths side by side along one dim.
#pragma once

#include <cstdint>

#include "softmax_ext/problem.h"

namespace softmax_ext {

enum class SegmentOp : int { kSoftmax = 0, kLogSoftmax = 1, kLogSumExp = 2 };

constexpr const char* name(SegmentOp op) {
  return op == SegmentOp::kSoftmax      ? "segment_softmax"
         : op == SegmentOp::kLogSoftmax ? "segment_log_softmax"
                                        : "segment_logsumexp";
}

// Segment s has the steps pointers[s] to pointers[s + 1] - 1 along dim: of the tensor, or, where there
// is an `order`, of that, which names the tensor's. pointers[0] is 0, and pointers[count] the dim's
// size.
struct Segments {
  int64_t count;
  const int64_t* pointers;
  const int64_t* order;  // or null
};

// output = op(input * scale) over each segment. All are contiguous; of kLogSumExp the output has a step
// a segment along dim.
struct SegmentsForwardArgs {
  const void* input;
  void* output;
  DType dtype;  // floating; of all
  Shape shape;  // of the input
  Segments segments;
  SegmentOp op;
  double scale;
};

// grad_input = the gradient of op, given its output and the gradient of that; of kLogSumExp its input
// as well.
struct SegmentsBackwardArgs {
  const void* grad_output;
  const void* output;
  const void* input;  // null but of kLogSumExp
  void* grad_input;
  DType dtype;
  Shape shape;
  Segments segments;
  SegmentOp op;
  double scale;
};

}  // namespace softmax_ext
