#include "launch_losses.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_loss<float>(const LossForwardArgs&, const LossPlan&, void*,
                                        cudaStream_t);
template cudaError_t launch_loss<float>(const LossBackwardArgs&, const LossPlan&, void*,
                                        cudaStream_t);
template cudaError_t launch_loss<float>(const ProbabilityForwardArgs&, const LossPlan&, void*,
                                        cudaStream_t);
template cudaError_t launch_loss<float>(const ProbabilityBackwardArgs&, const LossPlan&, void*,
                                        cudaStream_t);
template cudaError_t launch_loss<float>(const DivergenceForwardArgs&, const LossPlan&, void*,
                                        cudaStream_t);
template cudaError_t launch_loss<float>(const DivergenceBackwardArgs&, const LossPlan&, void*,
                                        cudaStream_t);

}  // namespace softmax_ext::cuda
