#include "launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace softmax_ext::cuda {

// Instantiated in the file of each direction and type.
template <class T, class Args>
cudaError_t launch_typed(const Args& args, const Plan& plan, void* scratch, cudaStream_t stream);

namespace {

template <class Args>
cudaError_t launch(const Args& args, const Plan& plan, void* scratch, cudaStream_t stream) {
  if (plan.blocks == 0) return cudaSuccess;
  switch (args.output_dtype) {
    case DType::kFloat16:
      return launch_typed<__half>(args, plan, scratch, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(args, plan, scratch, stream);
    case DType::kFloat32:
      return launch_typed<float>(args, plan, scratch, stream);
    case DType::kFloat64:
      return launch_typed<double>(args, plan, scratch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_forward(const ForwardArgs& args, const Plan& plan, void* scratch,
                           cudaStream_t stream) {
  return launch(args, plan, scratch, stream);
}

cudaError_t launch_backward(const BackwardArgs& args, const Plan& plan, void* scratch,
                            cudaStream_t stream) {
  return launch(args, plan, scratch, stream);
}

}  // namespace softmax_ext::cuda
