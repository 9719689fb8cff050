#include "launch_losses.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_loss<__half>(const LossForwardArgs&, const LossPlan&, void*,
                                         cudaStream_t);
template cudaError_t launch_loss<__half>(const LossBackwardArgs&, const LossPlan&, cudaStream_t);

}  // namespace softmax_ext::cuda
