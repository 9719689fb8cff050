// How the CUDA kernels of losses (loss_kernels.cuh) share out a call: by its shape alone, so that the
// bits of a row are the same in every batch and on every device.
#pragma once

#include "softmax_ext/losses.h"
#include "softmax_ext/score_plan.h"

namespace softmax_ext {

namespace limits {
constexpr int kLossThreads = 256;  // of a block
constexpr int kLossNumbers = 6;    // of the state of a part of a row
// A row of at most so many elements is had by a warp or a part of one, a longer one by blocks.
constexpr int64_t kLossWarpRow = 1024;
// Elements of a row that a block has: few enough that one row is had by several, and that all of them are
// on their way at a time.
constexpr int64_t kLossPart = 8192;
// Of a column of at least so many elements, so many threads have a share each.
constexpr int64_t kSharedColumn = 32;
constexpr int kColumnSharers = 8;
// Rows that a block sums the losses of, at least; and such blocks, at most.
constexpr int64_t kLossSummands = 4096;
constexpr int64_t kLossSums = 1024;
}  // namespace limits

struct LossPlan {
  bool of_columns;
  int along;      // threads that share a row, or a part of one
  int64_t parts;  // of a row
  int64_t rows;   // or parts of rows, that a block has
  int64_t blocks;
  int64_t summands, sums;  // rows that a block sums, and the blocks that do
  size_t scratch_bytes;    // of a forward call
};

// are_whole: rows are not shared by blocks.
inline LossPlan make_loss_plan(const Shape& shape, DType dtype, bool are_whole = false) {
  using detail::ceil_div;
  LossPlan plan{};
  const int64_t dim = shape.dim, rows = shape.rows();
  plan.of_columns = shape.inner > 1;
  plan.parts = 1;
  if (plan.of_columns) {
    plan.along = dim < limits::kSharedColumn ? 1 : limits::kColumnSharers;
  } else if (dim <= limits::kLossWarpRow) {
    plan.along = dim <= limits::kShortScores ? score_lanes(dim) : limits::kWarp;
  } else {
    plan.along = limits::kLossThreads;
    if (!are_whole) plan.parts = ceil_div(dim, limits::kLossPart);
  }
  plan.rows = limits::kLossThreads / plan.along;
  plan.blocks = ceil_div(rows * plan.parts, plan.rows);
  plan.summands = std::max(limits::kLossSummands, ceil_div(rows, limits::kLossSums));
  plan.sums = ceil_div(rows, plan.summands);
  const int64_t states = plan.parts > 1 ? rows * plan.parts * limits::kLossNumbers : 0;
  const int64_t bytes = dtype == DType::kFloat64 ? 8 : 4;
  plan.scratch_bytes = static_cast<size_t>(2 * plan.sums * 8 + states * bytes);
  return plan;
}

}  // namespace softmax_ext
