#include "launch_segments.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_segments<float>(const SegmentsForwardArgs&, const SegmentPlan&, void*,
                                            cudaStream_t);
template cudaError_t launch_segments<float>(const SegmentsBackwardArgs&, const SegmentPlan&, void*,
                                            cudaStream_t);

}  // namespace softmax_ext::cuda
