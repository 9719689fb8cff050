#include "launch_losses.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_loss<__nv_bfloat16>(const LossForwardArgs&, const LossPlan&, void*,
                                                cudaStream_t);
template cudaError_t launch_loss<__nv_bfloat16>(const LossBackwardArgs&, const LossPlan&, void*,
                                                cudaStream_t);
template cudaError_t launch_loss<__nv_bfloat16>(const ProbabilityForwardArgs&, const LossPlan&,
                                                void*, cudaStream_t);
template cudaError_t launch_loss<__nv_bfloat16>(const ProbabilityBackwardArgs&, const LossPlan&,
                                                void*, cudaStream_t);
template cudaError_t launch_loss<__nv_bfloat16>(const DivergenceForwardArgs&, const LossPlan&,
                                                void*, cudaStream_t);
template cudaError_t launch_loss<__nv_bfloat16>(const DivergenceBackwardArgs&, const LossPlan&,
                                                void*, cudaStream_t);

}  // namespace softmax_ext::cuda
