// The CUDA kernels' interface: make the plan and launch it on the stream of the current device.
// They return what cudaGetLastError says after the launch.
#pragma once

#include <cuda_runtime.h>

#include "softmax_ext/plan.h"
#include "softmax_ext/problem.h"

namespace softmax_ext::cuda {

cudaError_t launch_forward(const ForwardArgs& args, const DeviceProperties& device,
                           cudaStream_t stream);
cudaError_t launch_backward(const BackwardArgs& args, const DeviceProperties& device,
                            cudaStream_t stream);

}  // namespace softmax_ext::cuda
