#include "library.h"

#include <ATen/WrapDimUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <torch/library.h>

#include "autograd.h"
#include "operators.h"

namespace softmax_ext {
namespace {

using Dtype = std::optional<at::ScalarType>;
using ForwardSignature = at::Tensor(const at::Tensor&, int64_t, Dtype);
using BackwardSignature = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, at::ScalarType);

// What each dispatch key runs. Forward-mode AD, vmap and the like are left to torch.
template <Op op>
struct Kernels {
  static at::Tensor forward(const at::Tensor& input, int64_t dim, Dtype dtype) {
    if (!kernels_run_on(input.device())) return torch_forward(input, dim, dtype, op);
    const at::ScalarType result = output_dtype(input, dtype, op);
    return softmax_ext::forward(
        is_kernel_dtype(input.scalar_type()) ? input : cast(input, result, op), dim, result, op);
  }

  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                             at::ScalarType input_dtype) {
    if (!kernels_run_on(output.device())) {
      return torch_backward(grad_output, output, dim, input_dtype, op);
    }
    return softmax_ext::backward(grad_output, output, dim, input_dtype, op);
  }

  static at::Tensor forward_meta(const at::Tensor& input, int64_t dim, Dtype dtype) {
    (void)at::maybe_wrap_dim(dim, input.dim());
    return at::empty_symint(input.sym_sizes(),
                            input.options().dtype(output_dtype(input, dtype, op)));
  }

  static at::Tensor backward_meta(const at::Tensor& grad_output, const at::Tensor& output,
                                  int64_t dim, at::ScalarType input_dtype) {
    check_gradient(grad_output, output, dim, input_dtype, op);
    return at::empty_symint(output.sym_sizes(), output.options().dtype(input_dtype));
  }

  static at::Tensor forward_autograd(const at::Tensor& input, int64_t dim, Dtype dtype) {
    return recorded_forward(input, dim, dtype, op);
  }

  static at::Tensor backward_autograd(const at::Tensor& grad_output, const at::Tensor& output,
                                      int64_t dim, at::ScalarType input_dtype) {
    return recorded_backward(grad_output, output, dim, input_dtype, op);
  }

  // As torch's softmax: in float32, unless a type is asked for.
  static at::Tensor forward_autocast(const at::Tensor& input, int64_t dim, Dtype dtype) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    const bool eligible = at::autocast::firstarg_is_eligible(at::kCUDA, input);
    return dispatch_forward(input, dim,
                            eligible ? at::autocast::set_opt_dtype(at::kFloat, dtype) : dtype, op);
  }

  static at::Tensor forward_batched(const at::Tensor& input, int64_t dim, Dtype dtype) {
    return torch_forward(input, dim, dtype, op);
  }

  static at::Tensor backward_batched(const at::Tensor& grad_output, const at::Tensor& output,
                                     int64_t dim, at::ScalarType input_dtype) {
    return torch_backward(grad_output, output, dim, input_dtype, op);
  }
};

using Softmax = Kernels<Op::kSoftmax>;
using LogSoftmax = Kernels<Op::kLogSoftmax>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

at::Tensor dispatch_forward(const at::Tensor& input, int64_t dim, Dtype dtype, Op op) {
  static const auto softmax = find<ForwardSignature>("softmax_ext::softmax");
  static const auto log_softmax = find<ForwardSignature>("softmax_ext::log_softmax");
  return (op == Op::kSoftmax ? softmax : log_softmax).call(input, dim, dtype);
}

at::Tensor dispatch_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                             at::ScalarType input_dtype, Op op) {
  static const auto softmax = find<BackwardSignature>("softmax_ext::softmax_backward");
  static const auto log_softmax = find<BackwardSignature>("softmax_ext::log_softmax_backward");
  return (op == Op::kSoftmax ? softmax : log_softmax).call(grad_output, output, dim, input_dtype);
}

at::Tensor torch_forward(const at::Tensor& input, int64_t dim, Dtype dtype, Op op) {
  return op == Op::kSoftmax ? at::softmax(input, dim, dtype) : at::log_softmax(input, dim, dtype);
}

at::Tensor torch_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                          at::ScalarType input_dtype, Op op) {
  check_gradient(grad_output, output, dim, input_dtype, op);
  // torch's own operator casts only from float to half.
  const auto dtype = output.scalar_type();
  return (op == Op::kSoftmax ? at::_softmax_backward_data(grad_output, output, dim, dtype)
                             : at::_log_softmax_backward_data(grad_output, output, dim, dtype))
      .to(input_dtype);
}

TORCH_LIBRARY(softmax_ext, library) {
  const auto define = [&](const std::string& schema) {
    library.def(torch::schema(schema.c_str(), c10::AliasAnalysisKind::FROM_SCHEMA),
                {at::Tag::pt2_compliant_tag});
  };
  for (const std::string name : {"softmax", "log_softmax"}) {
    define(name + "(Tensor input, int dim, ScalarType? dtype=None) -> Tensor");
    define(name +
           "_backward(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> "
           "Tensor");
  }
}

#define SOFTMAX_EXT_IMPL(key, forward, backward)                          \
  TORCH_LIBRARY_IMPL(softmax_ext, key, library) {                         \
    library.impl("softmax", TORCH_FN(Softmax::forward));                  \
    library.impl("log_softmax", TORCH_FN(LogSoftmax::forward));           \
    library.impl("softmax_backward", TORCH_FN(Softmax::backward));        \
    library.impl("log_softmax_backward", TORCH_FN(LogSoftmax::backward)); \
  }

SOFTMAX_EXT_IMPL(CPU, forward, backward)
SOFTMAX_EXT_IMPL(CUDA, forward, backward)
SOFTMAX_EXT_IMPL(Meta, forward_meta, backward_meta)
SOFTMAX_EXT_IMPL(Autograd, forward_autograd, backward_autograd)
SOFTMAX_EXT_IMPL(FuncTorchBatched, forward_batched, backward_batched)

TORCH_LIBRARY_IMPL(softmax_ext, AutocastCUDA, library) {
  library.impl("softmax", TORCH_FN(Softmax::forward_autocast));
  library.impl("log_softmax", TORCH_FN(LogSoftmax::forward_autocast));
}

}  // namespace softmax_ext
