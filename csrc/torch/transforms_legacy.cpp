// In a file of its own, since the headers of the two kinds of vmap cannot be included together.
#include <ATen/LegacyVmapTransforms.h>

#include <algorithm>

#include "transforms.h"

namespace softmax_ext {

const at::Tensor* legacy_value(const at::Tensor& tensor) {
  const auto* const batched = at::maybeGetBatchedImpl(tensor);
  return batched == nullptr ? nullptr : &batched->value();
}

std::optional<Batch> unwrap_legacy(const std::vector<at::Tensor*>& tensors) {
  std::vector<at::Tensor> logical;
  int64_t rank = 0;
  for (const at::Tensor* const tensor : tensors) {
    logical.push_back(*tensor);
    rank = std::max(rank, tensor->dim());
  }
  const auto views = at::MultiBatchVmapTransform::logicalToPhysical(logical);
  const Batch batch{rank, 0, views[0].numBatchDims(),
                    [map = views[0].getPhysicalToLogicalMap()](const at::Tensor& result) {
                      return map.apply(result);
                    }};
  for (size_t k = 0; k < tensors.size(); ++k) *tensors[k] = batch.align(views[k].tensor());
  return batch;
}

}  // namespace softmax_ext
