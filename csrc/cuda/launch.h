// The CUDA kernels' interface: launch the plan of plan_forward or plan_backward for the arguments, on
// the stream of the current device. They return the error of the launch; that of the run shows later.
#pragma once

#include <cuda_runtime.h>

#include "softmax_ext/plan.h"
#include "softmax_ext/problem.h"

namespace softmax_ext::cuda {

cudaError_t launch_forward(const ForwardArgs& args, const Plan& plan, cudaStream_t stream);
cudaError_t launch_backward(const BackwardArgs& args, const Plan& plan, cudaStream_t stream);

}  // namespace softmax_ext::cuda
