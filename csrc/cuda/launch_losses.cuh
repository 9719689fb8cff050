// From a plan to the kernel instances of cross-entropy. Each losses_*.cu file instantiates the functions at the
// end for one type, so that they compile side by side.
#pragma once

#include "launch_losses.h"
#include "loss_kernels.cuh"

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

template <class T>
cudaError_t launch_loss(const LossForwardArgs& args, const LossPlan& plan, void* states,
                        cudaStream_t stream) {
  using A = computed_t<T>;
  static_assert(sizeof(LossState<A>) == limits::kLossNumbers * sizeof(A),
                "what a plan has room for");
  auto* const of_parts = static_cast<LossState<A>*>(states);
  LossSharing sharing = loss_sharing_of(args.shape, args.dims, plan);
  cudaError_t error =
      launch_kernel(loss_forward_kernel<T>, dim3(static_cast<unsigned>(plan.blocks)),
                    loss_block_of(plan), 0, {}, stream, args, sharing, of_parts);
  if (error != cudaSuccess || plan.parts == 1) return error;
  constexpr int64_t kRows = limits::kLossThreads / limits::kWarp;
  sharing.parts = 1;
  sharing.combines = true;
  return launch_kernel(loss_forward_kernel<T>,
                       dim3(static_cast<unsigned>(detail::ceil_div(sharing.rows, kRows))),
                       dim3(limits::kWarp, kRows), 0, {}, stream, args, sharing, of_parts);
}

template <class T>
cudaError_t launch_loss(const LossBackwardArgs& args, const LossPlan& plan, cudaStream_t stream) {
  return launch_kernel(loss_backward_kernel<T>, dim3(static_cast<unsigned>(plan.blocks)),
                       loss_block_of(plan), 0, {}, stream, args,
                       loss_sharing_of(args.shape, args.dims, plan));
}

}  // namespace softmax_ext::cuda
