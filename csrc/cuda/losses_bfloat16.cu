#include "launch_losses.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_loss<__nv_bfloat16>(const LossForwardArgs&, const LossPlan&, void*,
                                                cudaStream_t);
template cudaError_t launch_loss<__nv_bfloat16>(const LossBackwardArgs&, const LossPlan&,
                                                cudaStream_t);

}  // namespace softmax_ext::cuda
