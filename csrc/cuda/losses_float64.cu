#include "launch_losses.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_loss<double>(const LossForwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<double>(const LossBackwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<double>(const ProbabilityForwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<double>(const ProbabilityBackwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<double>(const DivergenceForwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<double>(const DivergenceBackwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);

}  // namespace softmax_ext::cuda
