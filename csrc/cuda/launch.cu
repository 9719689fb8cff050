#include "launch.h"

#include "device.cuh"

namespace softmax_ext::cuda {

// Instantiated in the file of each direction and type.
template <class T, class Args>
cudaError_t launch_typed(const Args& args, const Plan& plan, void* scratch, cudaStream_t stream);
template <class T, class Args>
cudaError_t launch_scores_typed(const Args& args, const Plan& plan, void* scratch,
                                cudaStream_t stream);

namespace {

template <class Args>
cudaError_t launch(const Args& args, const Plan& plan, void* scratch, cudaStream_t stream) {
  if (plan.blocks == 0) return cudaSuccess;
  return with_type(args.output_dtype, [&](auto element) {
    return launch_typed<decltype(element)>(args, plan, scratch, stream);
  });
}

template <class Args>
cudaError_t launch_scores(const Args& args, const Plan& plan, void* scratch, cudaStream_t stream) {
  if (plan.blocks == 0) return cudaSuccess;
  return with_type(args.output_dtype, [&](auto element) {
    return launch_scores_typed<decltype(element)>(args, plan, scratch, stream);
  });
}

}  // namespace

cudaError_t launch_forward(const ForwardArgs& args, const Plan& plan, void* scratch,
                           cudaStream_t stream) {
  return launch(args, plan, scratch, stream);
}

cudaError_t launch_backward(const BackwardArgs& args, const Plan& plan, void* scratch,
                            cudaStream_t stream) {
  return launch(args, plan, scratch, stream);
}

cudaError_t launch_score_forward(const ScoreForwardArgs& args, const Plan& plan, void* scratch,
                                 cudaStream_t stream) {
  return launch_scores(args, plan, scratch, stream);
}

cudaError_t launch_score_backward(const ScoreBackwardArgs& args, const Plan& plan, void* scratch,
                                  cudaStream_t stream) {
  return launch_scores(args, plan, scratch, stream);
}

}  // namespace softmax_ext::cuda
