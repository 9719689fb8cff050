// From a plan to the kernel instances of losses. Each losses_*.cu file instantiates the function at the end for
// one type, so that they compile side by side.
#pragma once

#include <type_traits>

#include "divergence_kernels.cuh"
#include "launch_losses.h"
#include "loss_kernels.cuh"
#include "probability_kernels.cuh"

namespace softmax_ext::cuda {

inline LossSharing loss_sharing_of(const Shape& shape, const Dims& dims, const LossPlan& plan) {
  return {OuterDims(dims),
          shape.rows(),
          shape.inner,
          plan.parts,
          plan.parts > 1 ? limits::kLossPart : shape.dim,
          plan.of_columns ? 1 : score_width(shape.dim),
          plan.of_columns,
          /*combines=*/false};
}

inline dim3 loss_block_of(const LossPlan& plan) {
  const auto along = static_cast<unsigned>(plan.along), rows = static_cast<unsigned>(plan.rows);
  return plan.of_columns ? dim3(rows, along) : dim3(along, rows);
}

// The kernel of a whole call, and, where rows have parts, once more for their states.
template <class Kernel, class Args, class State>
cudaError_t launch_in_parts(Kernel kernel, const Args& args, const LossPlan& plan, State* states,
                            cudaStream_t stream) {
  static_assert(sizeof(State) == limits::kLossNumbers * sizeof(State::max),
                "what a plan has room for");
  LossSharing sharing = loss_sharing_of(args.shape, args.dims, plan);
  cudaError_t error = launch_kernel(kernel, dim3(static_cast<unsigned>(plan.blocks)),
                                    loss_block_of(plan), 0, {}, stream, args, sharing, states);
  if (error != cudaSuccess || plan.parts == 1) return error;
  constexpr int64_t kRows = limits::kLossThreads / limits::kWarp;
  sharing.parts = 1;
  sharing.combines = true;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(detail::ceil_div(sharing.rows, kRows))),
                       dim3(limits::kWarp, kRows), 0, {}, stream, args, sharing, states);
}

template <class Kernel, class Args>
cudaError_t launch_once(Kernel kernel, const Args& args, const LossPlan& plan,
                        cudaStream_t stream) {
  return launch_kernel(kernel, dim3(static_cast<unsigned>(plan.blocks)), loss_block_of(plan), 0, {},
                       stream, args, loss_sharing_of(args.shape, args.dims, plan));
}

// states: room for those of parts, of a forward call whose plan has some.
template <class T, class Args>
cudaError_t launch_loss(const Args& args, const LossPlan& plan, void* states, cudaStream_t stream) {
  auto* const of_parts = static_cast<LossState<computed_t<T>>*>(states);
  if constexpr (std::is_same_v<Args, LossForwardArgs>) {
    return launch_in_parts(loss_forward_kernel<T>, args, plan, of_parts, stream);
  } else if constexpr (std::is_same_v<Args, ProbabilityForwardArgs>) {
    return launch_in_parts(probability_forward_kernel<T>, args, plan, of_parts, stream);
  } else if constexpr (std::is_same_v<Args, LossBackwardArgs>) {
    return launch_once(loss_backward_kernel<T>, args, plan, stream);
  } else if constexpr (std::is_same_v<Args, ProbabilityBackwardArgs>) {
    return launch_once(probability_backward_kernel<T>, args, plan, stream);
  } else if constexpr (std::is_same_v<Args, DivergenceForwardArgs>) {
    return launch_once(divergence_forward_kernel<T>, args, plan, stream);
  } else {
    return launch_once(divergence_backward_kernel<T>, args, plan, stream);
  }
}

}  // namespace softmax_ext::cuda
