// From a plan to the kernel instances. Each segments_*.cu file instantiates launch_segments for one
// type, so that they compile side by side.
#pragma once

#include <algorithm>

#include "launch_segments.h"
#include "segment_kernels.cuh"

namespace softmax_ext::cuda {

constexpr int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }

template <class T, class Args>
SegmentCall<T> call_of(const Args& args, const SegmentPlan& plan, void* scratch) {
  SegmentCall<T> call{};
  call.scale = static_cast<computed_t<T>>(args.scale);
  call.shape = args.shape;
  call.segments = args.segments;
  call.across_bits = log2_of(plan.across);
  call.along_bits = log2_of(plan.along);
  call.tiles = static_cast<int>(args.shape.outer > 0 ? plan.slices / args.shape.outer : 0);
  call.block_rows = static_cast<int>(plan.block_rows);
  call.lists = SegmentLists::in(scratch, plan);
  call.states = static_cast<unsigned char*>(scratch) + plan.states;
  call.state_slots = plan.state_slots;
  return call;
}

// What a direction has: its kernels.
template <class T>
struct SegmentKernels {
  void (*warp)(SegmentCall<T>);
  void (*block)(SegmentCall<T>, bool);
  void (*combine)(SegmentCall<T>);  // null where nothing is summed
  bool of_segments;                 // its results are
};

template <SegmentOp op, int columns, class T>
SegmentKernels<T> kernels_of(const SegmentsForwardArgs&) {
  return {segment_warp_forward_kernel<op, columns, T>, segment_block_forward_kernel<op, columns, T>,
          segment_combine_forward_kernel<T>, op == SegmentOp::kLogSumExp};
}
template <SegmentOp op, int columns, class T>
SegmentKernels<T> kernels_of(const SegmentsBackwardArgs&) {
  return {segment_warp_backward_kernel<op, columns, T>,
          segment_block_backward_kernel<op, columns, T>,
          op == SegmentOp::kLogSumExp ? nullptr : segment_combine_backward_kernel<T>, false};
}

template <int columns, class T, class Args>
SegmentKernels<T> kernels_of(const Args& args) {
  switch (args.op) {
    case SegmentOp::kSoftmax:
      return kernels_of<SegmentOp::kSoftmax, columns, T>(args);
    case SegmentOp::kLogSoftmax:
      return kernels_of<SegmentOp::kLogSoftmax, columns, T>(args);
    case SegmentOp::kLogSumExp:
      break;
  }
  return kernels_of<SegmentOp::kLogSumExp, columns, T>(args);
}

template <class T, class Args>
cudaError_t launch_plan(const Args& args, const SegmentCall<T>& call, const SegmentPlan& plan,
                        cudaStream_t stream) {
  const SegmentKernels<T> kernels =
      plan.columns == 1 ? kernels_of<1, T>(args) : kernels_of<kWidth<T>, T>(args);
  cudaError_t error = cudaSuccess;
  const auto launch = [&](auto kernel, int64_t slices, int64_t blocks, size_t shared, auto... how) {
    if (error != cudaSuccess) return;
    const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(blocks));
    error = launch_kernel(kernel, grid, dim3(limits::kSegmentThreads), shared, {}, stream, call,
                          how...);
  };
  launch(kernels.warp, plan.slices, plan.warp_blocks, 0);
  if (plan.has_long(args.shape)) launch(kernels.block, plan.slices, plan.part_blocks, 0, false);
  if (plan.has_parts(args.shape) && kernels.combine != nullptr) {
    launch(kernels.combine, args.shape.outer * args.shape.inner, plan.combine_blocks,
           limits::kGridTerms * sizeof(computed_t<T>));
    launch(kernels.block, plan.slices, plan.part_blocks, 0, true);
  }
  return error;
}

template <class T>
void set_tensors(const SegmentsForwardArgs& args, SegmentCall<T>& call) {
  call.inputs[0] = static_cast<const T*>(args.input);
  call.result = static_cast<T*>(args.output);
}

template <class T>
void set_tensors(const SegmentsBackwardArgs& args, SegmentCall<T>& call) {
  const bool of_segments = args.op == SegmentOp::kLogSumExp;
  const T** const given = of_segments ? call.of_segments : call.inputs;
  given[0] = static_cast<const T*>(args.grad_output);
  given[1] = static_cast<const T*>(args.output);
  if (of_segments) call.inputs[0] = static_cast<const T*>(args.input);
  call.result = static_cast<T*>(args.grad_input);
}

template <class T, class Args>
cudaError_t launch_segments(const Args& args, const SegmentPlan& plan, void* scratch,
                            cudaStream_t stream) {
  SegmentCall<T> call = call_of<T>(args, plan, scratch);
  set_tensors(args, call);
  return launch_plan(args, call, plan, stream);
}

}  // namespace softmax_ext::cuda
