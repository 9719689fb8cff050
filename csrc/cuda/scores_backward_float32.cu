#include "launch_scores.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_scores_typed<float>(const ScoreBackwardArgs&, const Plan&, void*,
                                                cudaStream_t);

}  // namespace softmax_ext::cuda
