#include "launch_segments.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_segments<__nv_bfloat16>(const SegmentsForwardArgs&, const SegmentPlan&,
                                                    void*, cudaStream_t);
template cudaError_t launch_segments<__nv_bfloat16>(const SegmentsBackwardArgs&, const SegmentPlan&,
                                                    void*, cudaStream_t);

}  // namespace softmax_ext::cuda
