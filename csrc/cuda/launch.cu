#include "launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace softmax_ext::cuda {

// Defined in the file of each type.
template <class T>
cudaError_t launch_forward_typed(const ForwardArgs& args, const Plan& plan, void* scratch,
                                 cudaStream_t stream);
template <class T>
cudaError_t launch_backward_typed(const BackwardArgs& args, const Plan& plan, void* scratch,
                                  cudaStream_t stream);

cudaError_t launch_forward(const ForwardArgs& args, const Plan& plan, void* scratch,
                           cudaStream_t stream) {
  if (plan.blocks == 0) return cudaSuccess;
  switch (args.output_dtype) {
    case DType::kFloat16:
      return launch_forward_typed<__half>(args, plan, scratch, stream);
    case DType::kBFloat16:
      return launch_forward_typed<__nv_bfloat16>(args, plan, scratch, stream);
    case DType::kFloat32:
      return launch_forward_typed<float>(args, plan, scratch, stream);
    case DType::kFloat64:
      return launch_forward_typed<double>(args, plan, scratch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_backward(const BackwardArgs& args, const Plan& plan, void* scratch,
                            cudaStream_t stream) {
  if (plan.blocks == 0) return cudaSuccess;
  switch (args.output_dtype) {
    case DType::kFloat16:
      return launch_backward_typed<__half>(args, plan, scratch, stream);
    case DType::kBFloat16:
      return launch_backward_typed<__nv_bfloat16>(args, plan, scratch, stream);
    case DType::kFloat32:
      return launch_backward_typed<float>(args, plan, scratch, stream);
    case DType::kFloat64:
      return launch_backward_typed<double>(args, plan, scratch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace softmax_ext::cuda
