#include "softmax_override.h"

#include <ATen/TensorUtils.h>
#include <ATen/ops/_log_softmax_backward_data_cpu_dispatch.h>
#include <ATen/ops/_log_softmax_cpu_dispatch.h>
#include <ATen/ops/_softmax_backward_data_cpu_dispatch.h>
#include <ATen/ops/_softmax_cpu_dispatch.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <optional>

#include "cuda.h"
#include "losses_override.h"
#include "softmax.h"
#include "tensors.h"

#if defined(SOFTMAX_EXT_CUDA)
#include <ATen/ops/_log_softmax_backward_data_cuda_dispatch.h>
#include <ATen/ops/_log_softmax_cuda_dispatch.h>
#include <ATen/ops/_softmax_backward_data_cuda_dispatch.h>
#include <ATen/ops/_softmax_cuda_dispatch.h>
#endif

namespace softmax_ext {
namespace {

std::atomic<bool> is_on{false};

}  // namespace

bool override_is_on() { return is_on.load(std::memory_order_relaxed); }

namespace {

// torch's own kernels of one operator on one device, without the dispatcher.
struct TorchKernels {
  at::Tensor (*forward)(const at::Tensor&, int64_t, bool);
  at::Tensor& (*forward_out)(const at::Tensor&, int64_t, bool, at::Tensor&);
  at::Tensor (*backward)(const at::Tensor&, const at::Tensor&, int64_t, at::ScalarType);
  at::Tensor& (*backward_out)(const at::Tensor&, const at::Tensor&, int64_t, at::ScalarType,
                              at::Tensor&);
};

constexpr TorchKernels kSoftmaxOnCpu = {at::cpu::_softmax, at::cpu::_softmax_outf,
                                        at::cpu::_softmax_backward_data,
                                        at::cpu::_softmax_backward_data_outf};
constexpr TorchKernels kLogSoftmaxOnCpu = {at::cpu::_log_softmax, at::cpu::_log_softmax_outf,
                                           at::cpu::_log_softmax_backward_data,
                                           at::cpu::_log_softmax_backward_data_outf};
#if defined(SOFTMAX_EXT_CUDA)
constexpr TorchKernels kSoftmaxOnCuda = {at::cuda::_softmax, at::cuda::_softmax_outf,
                                         at::cuda::_softmax_backward_data,
                                         at::cuda::_softmax_backward_data_outf};
constexpr TorchKernels kLogSoftmaxOnCuda = {at::cuda::_log_softmax, at::cuda::_log_softmax_outf,
                                            at::cuda::_log_softmax_backward_data,
                                            at::cuda::_log_softmax_backward_data_outf};
#endif

// The result's type where the kernels take the call: float16 may become float32 on CUDA, as there in
// torch.
std::optional<at::ScalarType> taken(const at::Tensor& self, bool half_to_float) {
  const at::ScalarType dtype = self.scalar_type();
  if (!override_is_on() || !is_kernel_output_dtype(dtype)) return {};
  if (!half_to_float) return dtype;
  if (self.is_cuda() && dtype == at::kHalf) return at::kFloat;
  return {};
}

// torch's own log_softmax backward reads past the end of the shorter one.
void check_same_size(const char* caller, const at::Tensor& grad_output, const at::Tensor& output) {
  if (!override_is_on()) return;
  at::checkSameSize(caller, {grad_output, "grad", 1}, {output, "output", 2});
}

bool takes(const at::Tensor& grad_output, const at::Tensor& output, at::ScalarType input_dtype) {
  const at::ScalarType dtype = output.scalar_type();
  return override_is_on() && is_kernel_output_dtype(dtype) && grad_output.scalar_type() == dtype &&
         grad_output.device() == output.device() &&
         (input_dtype == dtype ||
          (output.is_cuda() && dtype == at::kFloat && input_dtype == at::kHalf));
}

template <Op op, const TorchKernels& torchs>
struct Override {
  static constexpr const char* kBackward =
      op == Op::kSoftmax ? "softmax_backward" : "log_softmax_backward";

  static at::Tensor forward(const at::Tensor& self, int64_t dim, bool half_to_float) {
    const auto dtype = taken(self, half_to_float);
    if (!dtype) return torchs.forward(self, dim, half_to_float);
    return softmax_ext::forward(self, dim, *dtype, op);
  }

  static at::Tensor& forward_out(const at::Tensor& self, int64_t dim, bool half_to_float,
                                 at::Tensor& out) {
    const auto dtype = taken(self, half_to_float);
    if (dtype != out.scalar_type() || out.device() != self.device()) {
      return torchs.forward_out(self, dim, half_to_float, out);
    }
    softmax_ext::forward_out(self, dim, *dtype, op, out);
    return out;
  }

  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                             at::ScalarType input_dtype) {
    check_same_size(kBackward, grad_output, output);
    if (!takes(grad_output, output, input_dtype)) {
      return torchs.backward(grad_output, output, dim, input_dtype);
    }
    return softmax_ext::backward(grad_output, output, dim, input_dtype, op);
  }

  static at::Tensor& backward_out(const at::Tensor& grad_output, const at::Tensor& output,
                                  int64_t dim, at::ScalarType input_dtype, at::Tensor& grad_input) {
    check_same_size(kBackward, grad_output, output);
    if (!takes(grad_output, output, input_dtype) || grad_input.scalar_type() != input_dtype ||
        grad_input.device() != output.device()) {
      return torchs.backward_out(grad_output, output, dim, input_dtype, grad_input);
    }
    softmax_ext::backward_out(grad_output, output, dim, op, grad_input);
    return grad_input;
  }
};

template <Op op, const TorchKernels& torchs>
void implement(torch::Library& library, const std::string& name) {
  using Kernels = Override<op, torchs>;
  const auto impl = [&](const std::string& overload, auto function) {
    library.impl((name + overload).c_str(), function);
  };
  impl("", TORCH_FN(Kernels::forward));
  impl(".out", TORCH_FN(Kernels::forward_out));
  impl("_backward_data", TORCH_FN(Kernels::backward));
  impl("_backward_data.out", TORCH_FN(Kernels::backward_out));
}

template <const TorchKernels& softmax, const TorchKernels& log_softmax>
torch::Library implement(c10::DispatchKey key) {
  torch::Library library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  implement<Op::kSoftmax, softmax>(library, "_softmax");
  implement<Op::kLogSoftmax, log_softmax>(library, "_log_softmax");
  return library;
}

// torch warns, once for a process, that an operator has a second kernel. That is what was asked for.
class Silence : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

}  // namespace

void override_torch(bool on) {
  static const auto libraries = [] {
    Silence silence;
    const c10::WarningUtils::WarningHandlerGuard guard(&silence);
    std::vector<torch::Library> libraries = override_losses();
    libraries.push_back(implement<kSoftmaxOnCpu, kLogSoftmaxOnCpu>(c10::DispatchKey::CPU));
#if defined(SOFTMAX_EXT_CUDA)
    libraries.push_back(implement<kSoftmaxOnCuda, kLogSoftmaxOnCuda>(c10::DispatchKey::CUDA));
#endif
    return libraries;
  }();
  is_on.store(on, std::memory_order_relaxed);
}

}  // namespace softmax_ext
