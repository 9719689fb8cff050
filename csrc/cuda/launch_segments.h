// The CUDA kernels of segments: launch a plan of make_segment_plan for the arguments, on the stream of
// the current device. `scratch` is the plan's scratch memory, of which the contents do not matter. They
// return the error of the launch; that of the run, which may be of the pointers' and the order's values,
// shows later.
#pragma once

#include <cuda_runtime.h>

#include "softmax_ext/segments.h"
#include "softmax_ext/segments_plan.h"

namespace softmax_ext::cuda {

cudaError_t launch_segments_forward(const SegmentsForwardArgs& args, const SegmentPlan& plan,
                                    void* scratch, cudaStream_t stream);
cudaError_t launch_segments_backward(const SegmentsBackwardArgs& args, const SegmentPlan& plan,
                                     void* scratch, cudaStream_t stream);

}  // namespace softmax_ext::cuda
