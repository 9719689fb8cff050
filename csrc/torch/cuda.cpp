#include "cuda.h"

#include <c10/util/Exception.h>

#if defined(SOFTMAX_EXT_CUDA)

// Of c10 only: the headers of ATen/cuda want the whole toolkit, cuSPARSE and all.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "../cuda/launch.h"
#include "../cuda/launch_losses.h"
#include "../cuda/launch_segments.h"
#include "softmax_ext/score_plan.h"

namespace softmax_ext {
namespace {

int attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Asked for once, for all devices: a call would pay for it.
const DeviceProperties& properties(c10::Device device) {
  static const std::vector<DeviceProperties> all = [] {
    std::vector<DeviceProperties> properties(c10::cuda::device_count());
    for (int k = 0; k < static_cast<int>(properties.size()); ++k) {
      properties[k].sm_count = attribute(cudaDevAttrMultiProcessorCount, k);
      properties[k].max_shared_memory_per_block =
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, k);
      properties[k].compute_capability = attribute(cudaDevAttrComputeCapabilityMajor, k) * 10 +
                                         attribute(cudaDevAttrComputeCapabilityMinor, k);
    }
    return properties;
  }();
  return all.at(device.index());
}

Plan plan_of(const ForwardArgs& args, const DeviceProperties& device) {
  return make_plan(workload(args), device);
}
Plan plan_of(const BackwardArgs& args, const DeviceProperties& device) {
  return make_plan(workload(args), device);
}
Plan plan_of(const ScoreForwardArgs& args, const DeviceProperties& device) {
  return make_score_plan(workload(args), device);
}
Plan plan_of(const ScoreBackwardArgs& args, const DeviceProperties& device) {
  return make_score_plan(workload(args), device);
}

template <class Args, class Launch>
void launch_plan(const Args& args, c10::Device device, Launch launch) {
  const c10::cuda::CUDAGuard guard(device);
  DeviceProperties available = properties(device);
  for (;;) {
    const Plan plan = plan_of(args, available);
    // Of torch's allocator: the memory is reused on this stream only after the kernel, and belongs to
    // the graph's pool where a graph is captured.
    c10::DataPtr scratch;
    if (plan.scratch_bytes > 0) {
      scratch = c10::cuda::CUDACachingAllocator::get()->allocate(plan.scratch_bytes);
    }
    const cudaError_t error = launch(args, plan, scratch.get(), c10::cuda::getCurrentCUDAStream());
    // Blocks that have to run together may not all find room: where a part of the device is given to
    // others, or where few SMs are side by side. Fewer of them give the same bits.
    if (error == cudaErrorInvalidClusterSize && available.has_clusters()) {
      available.most_cluster_blocks =
          plan.team > limits::kClusterBlocks ? limits::kClusterBlocks : 1;
    } else if (error == cudaErrorCooperativeLaunchTooLarge && available.sm_count > 1) {
      available.sm_count /= 2;
    } else {
      C10_CUDA_CHECK(error);
      return;
    }
  }
}

// `sums`: numbers in the state of a column.
template <class Args, class Launch>
void launch_segments(const Args& args, int sums, std::initializer_list<const void*> tensors,
                     c10::Device device, Launch launch) {
  const c10::cuda::CUDAGuard guard(device);
  const auto in_vectors = [](int64_t bytes) { return bytes % limits::kVectorBytes == 0; };
  bool aligned = in_vectors(args.shape.inner * size_of(args.dtype));
  for (const void* const tensor : tensors) {
    aligned = aligned && in_vectors(reinterpret_cast<intptr_t>(tensor));
  }
  const SegmentPlan plan = make_segment_plan(args.shape, args.segments.count, args.dtype, aligned,
                                             sums, properties(device));
  const c10::DataPtr scratch = c10::cuda::CUDACachingAllocator::get()->allocate(plan.scratch_bytes);
  C10_CUDA_CHECK(launch(args, plan, scratch.get(), c10::cuda::getCurrentCUDAStream()));
}

// Of losses, what needs no scratch memory.
template <class Args, class Launch>
void launch_losses(const Args& args, c10::Device device, Launch launch, bool are_whole = false) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch(args, make_loss_plan(args.shape, args.dtype, are_whole),
                        c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

void launch_on_cuda(const ForwardArgs& args, c10::Device device) {
  launch_plan(args, device, cuda::launch_forward);
}

void launch_on_cuda(const BackwardArgs& args, c10::Device device) {
  launch_plan(args, device, cuda::launch_backward);
}

void launch_on_cuda(const ScoreForwardArgs& args, c10::Device device) {
  launch_plan(args, device, cuda::launch_score_forward);
}

void launch_on_cuda(const ScoreBackwardArgs& args, c10::Device device) {
  launch_plan(args, device, cuda::launch_score_backward);
}

void launch_on_cuda(const SegmentsForwardArgs& args, c10::Device device) {
  launch_segments(args, 2, {args.input, args.output}, device, cuda::launch_segments_forward);
}

void launch_on_cuda(const SegmentsBackwardArgs& args, c10::Device device) {
  launch_segments(args, 1, {args.grad_output, args.output, args.input, args.grad_input}, device,
                  cuda::launch_segments_backward);
}

void launch_on_cuda(const LossForwardArgs& args, double* weight, double* loss, bool is_mean,
                    c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const LossPlan plan = make_loss_plan(args.shape, args.dtype);
  const c10::DataPtr scratch = c10::cuda::CUDACachingAllocator::get()->allocate(plan.scratch_bytes);
  C10_CUDA_CHECK(cuda::launch_loss_forward(args, plan, scratch.get(), {weight, loss}, is_mean,
                                           c10::cuda::getCurrentCUDAStream()));
}

void launch_on_cuda(const LossBackwardArgs& args, c10::Device device) {
  launch_losses(args, device, cuda::launch_loss_backward);
}

void launch_on_cuda(const ProbabilityForwardArgs& args, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const LossPlan plan = make_loss_plan(args.shape, args.dtype);
  const c10::DataPtr scratch = c10::cuda::CUDACachingAllocator::get()->allocate(plan.scratch_bytes);
  C10_CUDA_CHECK(cuda::launch_probability_forward(args, plan, scratch.get(),
                                                  c10::cuda::getCurrentCUDAStream()));
}

void launch_on_cuda(const ProbabilityBackwardArgs& args, c10::Device device) {
  launch_losses(args, device, cuda::launch_probability_backward);
}

void launch_on_cuda(const DivergenceForwardArgs& args, c10::Device device) {
  launch_losses(args, device, cuda::launch_divergence_forward, /*are_whole=*/true);
}

void launch_on_cuda(const DivergenceBackwardArgs& args, c10::Device device) {
  launch_losses(args, device, cuda::launch_divergence_backward);
}

}  // namespace softmax_ext

#else

namespace softmax_ext {
namespace {

void not_built() { TORCH_INTERNAL_ASSERT(false, "built without CUDA"); }

}  // namespace

void launch_on_cuda(const ForwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const BackwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const ScoreForwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const ScoreBackwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const SegmentsForwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const SegmentsBackwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const LossForwardArgs&, double*, double*, bool, c10::Device) { not_built(); }
void launch_on_cuda(const LossBackwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const ProbabilityForwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const ProbabilityBackwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const DivergenceForwardArgs&, c10::Device) { not_built(); }
void launch_on_cuda(const DivergenceBackwardArgs&, c10::Device) { not_built(); }

}  // namespace softmax_ext

#endif
