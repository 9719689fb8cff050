#include "cuda.h"

#include <c10/util/Exception.h>

#if defined(SOFTMAX_EXT_CUDA)

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "../cuda/launch.h"

namespace softmax_ext {
namespace {

DeviceProperties properties() {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  DeviceProperties properties{};
  properties.sm_count = device->multiProcessorCount;
  properties.max_shared_memory_per_block = static_cast<int>(device->sharedMemPerBlockOptin);
  properties.max_threads_per_sm = device->maxThreadsPerMultiProcessor;
  properties.compute_capability = device->major * 10 + device->minor;
  return properties;
}

}  // namespace

void launch_on_cuda(const ForwardArgs& args, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(cuda::launch_forward(args, properties(), at::cuda::getCurrentCUDAStream()));
}

void launch_on_cuda(const BackwardArgs& args, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(cuda::launch_backward(args, properties(), at::cuda::getCurrentCUDAStream()));
}

}  // namespace softmax_ext

#else

namespace softmax_ext {

void launch_on_cuda(const ForwardArgs&, c10::Device) {
  TORCH_INTERNAL_ASSERT(false, "built without CUDA");
}

void launch_on_cuda(const BackwardArgs&, c10::Device) {
  TORCH_INTERNAL_ASSERT(false, "built without CUDA");
}

}  // namespace softmax_ext

#endif
