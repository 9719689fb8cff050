#include "launch_losses.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_loss<__half>(const LossForwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<__half>(const LossBackwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<__half>(const ProbabilityForwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<__half>(const ProbabilityBackwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<__half>(const DivergenceForwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<__half>(const DivergenceBackwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);

}  // namespace softmax_ext::cuda
