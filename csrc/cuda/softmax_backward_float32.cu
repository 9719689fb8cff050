#include "launch_typed.cuh"

namespace softmax_ext::cuda {

template cudaError_t launch_typed<float>(const BackwardArgs&, const Plan&, void*, cudaStream_t);

}  // namespace softmax_ext::cuda
