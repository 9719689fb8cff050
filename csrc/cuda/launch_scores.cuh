// From a plan to the kernel instance of scores. Each scores_*.cu file instantiates the function at the end for
// one direction and type, so that they compile side by side.
#pragma once

#include "launch_typed.cuh"
#include "score_kernels.cuh"

namespace softmax_ext::cuda {

// The call with the dims that the mask's gradient is summed over behind the others.
inline ScoreForwardArgs ordered(const ScoreForwardArgs& args) { return args; }
inline ScoreBackwardArgs ordered(const ScoreBackwardArgs& args) {
  if (args.grad_mask == nullptr) return args;
  ScoreBackwardArgs result = args;
  int next = 0;
  for (const bool shared : {false, true}) {
    for (int k = 0; k < args.dims.outer; ++k) {
      if ((args.grad_mask_strides.of[k] == 0) != shared) continue;
      result.dims.sizes[next] = args.dims.sizes[k];
      const auto move = [&](auto strides) { (result.*strides).of[next] = (args.*strides).of[k]; };
      move(&ScoreBackwardArgs::grad_output_strides);
      move(&ScoreBackwardArgs::output_strides);
      move(&ScoreBackwardArgs::grad_input_strides);
      move(&ScoreBackwardArgs::input_strides);
      move(&ScoreBackwardArgs::row_strides);
      move(&ScoreBackwardArgs::grad_mask_strides);
      for (const auto strides : {&Scores::scale_strides, &Scores::mask_strides,
                                 &Scores::sink_strides, &Scores::query_strides}) {
        (result.scores.*strides).of[next] = (args.scores.*strides).of[k];
      }
      ++next;
    }
  }
  return result;
}

inline int64_t sharing_of(const ScoreForwardArgs&) { return 1; }
inline int64_t sharing_of(const ScoreBackwardArgs& args) { return mask_sharing(args); }
inline int64_t parts_of(const ScoreForwardArgs&) { return 1; }
inline int64_t parts_of(const ScoreBackwardArgs& args) { return args.grad_mask_parts; }

template <class Args>
ScoreTeams score_teams_of(const Args& args, const Plan& plan, void* scratch) {
  const int64_t items = score_items(args), sharing = sharing_of(args), parts = parts_of(args);
  return {teams_of(items, args.shape.dim, plan, scratch),
          OuterDims(args.dims),
          sharing,
          parts,
          (sharing + parts - 1) / parts,
          items / parts * args.shape.dim,
          static_cast<int>(score_chunks(args.shape.dim, args.output_dtype)),
          1 / args.scores.softcap,
          score_width(args.shape.dim)};
}

template <ScoreOp op, class T, class Args>
cudaError_t launch_score_op(const Args& args, const Plan& plan, void* scratch,
                            cudaStream_t stream) {
  if (!takes_scores(args.shape, args.dims) || !takes_score_rows(args)) return cudaErrorInvalidValue;
  const Args call = ordered(args);
  const ScoreTeams teams = score_teams_of(call, plan, scratch);
  // A part without rows would leave its sums as they are.
  if ((teams.parts - 1) * teams.each >= teams.sharing) return cudaErrorInvalidValue;
  const bool is_short = plan.schedule == Schedule::kWarp && args.shape.dim <= limits::kShortScores;
  if constexpr (std::is_same_v<Args, ScoreForwardArgs>) {
    return is_short ? launch(short_scores_forward_kernel<op, T>, plan, stream, call, teams)
                    : launch(scores_forward_kernel<op, T>, plan, stream, call, teams);
  } else {
    return is_short ? launch(short_scores_backward_kernel<op, T>, plan, stream, call, teams)
                    : launch(scores_backward_kernel<op, T>, plan, stream, call, teams);
  }
}

// T: the type of all that is not a number a row, or a mask.
template <class T, class Args>
cudaError_t launch_scores_typed(const Args& args, const Plan& plan, void* scratch,
                                cudaStream_t stream) {
  switch (args.score_op()) {
    case ScoreOp::kSoftmax:
      return launch_score_op<ScoreOp::kSoftmax, T>(args, plan, scratch, stream);
    case ScoreOp::kLogSoftmax:
      return launch_score_op<ScoreOp::kLogSoftmax, T>(args, plan, scratch, stream);
    default:
      return launch_score_op<ScoreOp::kLogSumExp, T>(args, plan, scratch, stream);
  }
}

}  // namespace softmax_ext::cuda
