#include "launch_scores.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_scores_typed<__nv_bfloat16>(const ScoreForwardArgs&, const Plan&, void*,
                                                        cudaStream_t);

}  // namespace softmax_ext::cuda
