#include "transforms.h"

#include <ATen/WrapDimUtils.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/PlumbingHelper.h>
#include <ATen/functorch/TensorWrapper.h>

#include <algorithm>

namespace softmax_ext {
namespace {

constexpr c10::DispatchKeySet kTransformKeys =
    c10::functorch_transforms_ks |
    c10::DispatchKeySet({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                         c10::DispatchKey::FuncTorchDynamicLayerBackMode});

// What is within all wrappers of transforms.
const at::Tensor& innermost(const at::Tensor& tensor) {
  if (const auto* batched = at::functorch::maybeGetBatchedImpl(tensor)) {
    return innermost(batched->value());
  }
  if (const auto* differentiated = at::functorch::maybeGetTensorWrapper(tensor)) {
    return innermost(differentiated->value());
  }
  if (const at::Tensor* const value = legacy_value(tensor)) return innermost(*value);
  return tensor;
}

}  // namespace

bool operators_take(const at::Tensor& tensor) {
  if (!kernels_run_on(tensor.device())) return false;
  const c10::DispatchKeySet of_thread = c10::impl::tls_local_dispatch_key_set().included_;
  return !has_other_keys(innermost(tensor).key_set() | (of_thread - kTransformKeys));
}

at::Tensor Batch::align(at::Tensor tensor) const {
  while (tensor.dim() < count + std::max<int64_t>(rank, 1)) tensor = tensor.unsqueeze(count);
  return first == 0 ? tensor : tensor.movedim(0, first);
}

int64_t Batch::physical(int64_t dim) const {
  dim = at::maybe_wrap_dim(dim, rank);
  return dim < first ? dim : dim + count;
}

std::optional<Batch> unwrap(const std::vector<at::Tensor*>& tensors) {
  const auto layer = at::functorch::maybeCurrentDynamicLayer();
  TORCH_CHECK(layer.has_value(),
              "a tensor of torch.vmap was used outside of the function that it maps");
  const int64_t level = layer->layerId();
  int64_t rank = 0;
  std::optional<int64_t> first;
  c10::SymInt size;
  std::vector<std::optional<int64_t>> dims;
  for (at::Tensor* const tensor : tensors) {
    rank = std::max(rank, tensor->dim());
    auto [value, dim] = at::functorch::unwrapTensorAtLevel(*tensor, level);
    if (dim && !first) {
      first = dim;
      size = value.sym_size(*dim);
    }
    *tensor = std::move(value);
    dims.push_back(dim);
  }
  if (!first) return {};
  const Batch batch{rank, *first, 1, [level, first](const at::Tensor& result) {
                      return at::functorch::makeBatched(result, first, level);
                    }};
  for (size_t k = 0; k < tensors.size(); ++k) {
    at::Tensor& tensor = *tensors[k];
    // A view would not keep the order in memory of an outer vmap's dims.
    if (dims[k] == first && rank > 0 && tensor.dim() == rank + 1) continue;
    if (dims[k]) {
      tensor = tensor.movedim(*dims[k], 0);
    } else {
      c10::SymDimVector sizes{size};
      for (const c10::SymInt& each : tensor.sym_sizes()) sizes.push_back(each);
      tensor = tensor.expand_symint(sizes);
    }
    tensor = batch.align(std::move(tensor));
  }
  return batch;
}

}  // namespace softmax_ext
