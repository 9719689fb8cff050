// Which launch of the CUDA kernels of scores (score_kernels.cuh) runs: the schedules of plan.h for rows of
// the type that is computed in.
//
// What the gradient of a mask sums goes through the rows that share a row of the mask, one after another,
// by one team; few rows of a mask are had in parts of these, as many as the shape asks for.
#pragma once

#include <algorithm>

#include "softmax_ext/plan.h"
#include "softmax_ext/scores.h"

namespace softmax_ext {

namespace limits {
// A row of at most so many elements is had by a part of a warp, each lane with as many.
constexpr int kShortScores = 256;
constexpr int kShortScoreItems = 8;
constexpr int kFewestScoreLanes = 8;
// Warps of a block that shares a row: in float64, exp and tanh take more registers.
constexpr int kScoreWarps = 12;
constexpr int kScoreWarpsFloat64 = 8;
// Neighbours that a lane has of rows of a multiple of them.
constexpr int kScoreWidth = 4;
// Rows of a mask and parts of the rows that share one, in all, where there are so many; and the fewest and
// the most rows that are one part.
constexpr int64_t kMaskTeams = 4096;
constexpr int64_t kFewestSharing = 8;
constexpr int64_t kMostSharing = 64;
}  // namespace limits

// Lanes that share a short row.
constexpr int score_lanes(int64_t dim) {
  int lanes = limits::kFewestScoreLanes;
  while (lanes * limits::kShortScoreItems < dim) lanes *= 2;
  return lanes;
}

constexpr int score_warps(DType wide) {
  return wide == DType::kFloat64 ? limits::kScoreWarpsFloat64 : limits::kScoreWarps;
}

constexpr int score_width(int64_t dim) {
  return dim % limits::kScoreWidth == 0 ? limits::kScoreWidth : 1;
}

// Parts of the `sharing` rows that share each of the `rows` rows of a mask: of the shape alone, so that
// a gradient's bits are the same on every device.
constexpr int64_t mask_gradient_parts(int64_t rows, int64_t sharing) {
  using detail::ceil_div;
  const int64_t filling = std::min(ceil_div(limits::kMaskTeams, rows),  //
                                   ceil_div(sharing, limits::kFewestSharing));
  const int64_t each =
      ceil_div(sharing, std::max(filling, ceil_div(sharing, limits::kMostSharing)));
  return ceil_div(sharing, each);  // none without rows
}

// Chunks of a row, of which each gives a number for the gradient of a scale.
constexpr int64_t score_chunks(int64_t dim, DType dtype) {
  if (dim <= limits::kShortScores) return 1;
  const int64_t bytes = dtype == DType::kFloat64 ? 8 : 4;
  return detail::ceil_div(
      dim, int64_t{limits::kWarp} * chunk_vectors(bytes) * limits::kVectorBytes / bytes);
}

// Of the dims of a call with the gradient of a mask: those that it is summed over.
inline int64_t mask_sharing(const ScoreBackwardArgs& args) {
  int64_t sharing = 1;
  for (int k = 0; k < args.dims.outer; ++k) {
    if (args.grad_mask != nullptr && args.grad_mask_strides.of[k] == 0) {
      sharing *= args.dims.sizes[k];
    }
  }
  return sharing;
}

// What teams have one after another: rows, or parts of those that share one of a mask.
inline int64_t score_items(const ScoreForwardArgs& args) { return args.shape.outer; }
inline int64_t score_items(const ScoreBackwardArgs& args) {
  return args.shape.outer / mask_sharing(args) * args.grad_mask_parts;
}

namespace detail {

// As if nothing were aligned or followed each other: that is for the kernels alone.
constexpr Workload score_workload(int64_t items, int64_t dim, DType dtype, int inputs,
                                  bool online) {
  const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  return {{items, dim, 1}, wide,      wide,   inputs,
          /*aligned=*/1,   /*run=*/0, online, score_warps(wide)};
}

}  // namespace detail

inline Workload workload(const ScoreForwardArgs& args) {
  return detail::score_workload(score_items(args), args.shape.dim, args.output_dtype, 1, true);
}
inline Workload workload(const ScoreBackwardArgs& args) {
  const int inputs = args.output == nullptr ? 1 : 2;
  return detail::score_workload(score_items(args), args.shape.dim, args.output_dtype, inputs,
                                false);
}

// The plan of that schedule for a workload of scores.
constexpr Plan make_score_plan(const Workload& work, const DeviceProperties& device,
                               Schedule schedule) {
  const int64_t rows = work.shape.outer;
  if (work.shape.numel() == 0 || schedule == Schedule::kPacked) return Plan{};
  if (schedule != Schedule::kWarp || work.shape.dim > limits::kShortScores) {
    return make_plan(work, device, schedule);
  }
  Plan plan = detail::start(Schedule::kWarp, detail::Sizes(work));
  plan.group = score_lanes(work.shape.dim);
  plan.vectors = limits::kShortScoreItems / plan.width;
  plan.items = limits::kShortRowThreads / plan.group;
  while (plan.items * plan.group > limits::kWarp &&
         detail::ceil_div(rows, plan.items) < device.sm_count) {
    plan.items /= 2;
  }
  plan.blocks = std::min(detail::ceil_div(rows, plan.items), limits::kMaxBlocks);
  return plan;
}

constexpr Plan make_score_plan(const Workload& work, const DeviceProperties& device) {
  return make_score_plan(work, device, choose(work, device));
}

namespace cuda {

// Whether the kernels have these dims; their indices are divided in 31 bits.
constexpr bool takes_scores(const Shape& shape, const Dims& dims) {
  return dims.outer <= limits::kOuterDims && (dims.outer == 1 || shape.outer <= limits::kMaxOuter);
}

// Whether rows of a tensor begin where the kernels can read or write them.
inline bool takes_score_rows(int64_t dim, const void* data, int64_t element_bytes, const Dims& dims,
                             const Strides& strides) {
  const int width = score_width(dim);
  if (data == nullptr || width == 1 || strides.dim == 0) return true;
  bool taken =
      reinterpret_cast<uintptr_t>(data) %
          static_cast<uintptr_t>(std::min<int64_t>(width * element_bytes, limits::kVectorBytes)) ==
      0;
  for (int k = 0; k < dims.outer; ++k) {
    taken = taken && (dims.sizes[k] == 1 || strides.of[k] % width == 0);
  }
  return taken;
}

inline bool takes_score_rows(const ScoreForwardArgs& args) {
  const auto taken = [&](const void* data, DType dtype, const Strides& strides) {
    return takes_score_rows(args.shape.dim, data, size_of(dtype), args.dims, strides);
  };
  return taken(args.input, args.input_dtype, args.input_strides) &&
         taken(args.output, args.output_dtype, args.output_strides) &&
         taken(args.scores.mask, args.scores.mask_dtype, args.scores.mask_strides);
}

inline bool takes_score_rows(const ScoreBackwardArgs& args) {
  const DType dtype = args.output_dtype;
  const auto taken = [&](const void* data, DType of_data, const Strides& strides) {
    return takes_score_rows(args.shape.dim, data, size_of(of_data), args.dims, strides);
  };
  const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  return taken(args.grad_output, dtype, args.grad_output_strides) &&
         taken(args.output, dtype, args.output_strides) &&
         taken(args.grad_input, dtype, args.grad_input_strides) &&
         taken(args.input, dtype, args.input_strides) &&
         taken(args.scores.mask, args.scores.mask_dtype, args.scores.mask_strides) &&
         taken(args.grad_mask, wide, args.grad_mask_strides);
}

}  // namespace cuda

}  // namespace softmax_ext
