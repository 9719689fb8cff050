// The CUDA kernels' interface: launch a plan of make_plan for the arguments, on the stream of the
// current device. `scratch` is the plan's scratch memory, of which the contents do not matter. They
// return the error of the launch; that of the run shows later.
#pragma once

#include <cuda_runtime.h>

#include "softmax_ext/plan.h"
#include "softmax_ext/problem.h"
#include "softmax_ext/scores.h"

namespace softmax_ext::cuda {

cudaError_t launch_forward(const ForwardArgs& args, const Plan& plan, void* scratch,
                           cudaStream_t stream);
cudaError_t launch_backward(const BackwardArgs& args, const Plan& plan, void* scratch,
                            cudaStream_t stream);

// The same of scores; score_plan.h has their plans.
cudaError_t launch_score_forward(const ScoreForwardArgs& args, const Plan& plan, void* scratch,
                                 cudaStream_t stream);
cudaError_t launch_score_backward(const ScoreBackwardArgs& args, const Plan& plan, void* scratch,
                                  cudaStream_t stream);

}  // namespace softmax_ext::cuda
