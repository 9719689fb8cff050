#include "loss_tensors.h"

#include <ATen/ops/scalar_tensor.h>

#include <array>
#include <cstdint>

#include "tensors.h"

namespace softmax_ext {

void LossCheck::check_logits() const {
  TORCH_CHECK_NOT_IMPLEMENTED(is_kernel_output_dtype(logits.scalar_type()), function,
                              "(): not implemented for an argument '", name, "' of dtype ",
                              logits.scalar_type(), "; expected Half, BFloat16, Float or Double");
  TORCH_CHECK(logits.dim() > 0, function, "(): expected argument '", name,
              "' to have 1 dimension or more, but got 0");
  check_storage(function, name, logits);
}

void LossCheck::check_device(const char* argument, const at::Tensor& tensor) const {
  TORCH_CHECK(tensor.device() == logits.device(), function,
              "(): Expected all tensors to be on the same device, but found '", name, "' on ",
              logits.device(), " and '", argument, "' on ", tensor.device());
  check_storage(function, argument, tensor);
}

void LossCheck::check_dtype(const char* argument, const at::Tensor& tensor) const {
  TORCH_CHECK(tensor.scalar_type() == logits.scalar_type(), function, "(): expected scalar type ",
              logits.scalar_type(), " but found ", tensor.scalar_type(), ": argument '", argument,
              "' must have the dtype of '", name, "'");
}

void LossCheck::check_class_weight(const std::optional<at::Tensor>& weight,
                                   const c10::SymInt& classes) const {
  if (!weight) return;
  TORCH_CHECK(weight->dim() == 1 && weight->sym_size(0) == classes, function,
              "(): weight tensor should be defined either for all ", classes,
              " classes or no classes but got weight tensor of shape: ", weight->sym_sizes());
  check_dtype("weight", *weight);
  check_device("weight", *weight);
}

void LossCheck::check_reduction(int64_t reduction, int64_t end) const {
  TORCH_CHECK_VALUE(reduction >= 0 && reduction < end, function, "(): ", reduction,
                    " is not a valid value for reduction");
}

void LossCheck::check_given(const char* argument, const at::Tensor& tensor, at::ScalarType dtype,
                            c10::SymIntArrayRef sizes) const {
  TORCH_CHECK(tensor.scalar_type() == dtype, function, "_backward(): expected scalar type ", dtype,
              " but found ", tensor.scalar_type(), " for argument '", argument, "'");
  TORCH_SYM_CHECK(sym_equals(tensor.sym_sizes(), sizes), function, "_backward(): Expected '",
                  argument, "' to have the size ", sizes, ", but got ", tensor.sym_sizes());
  check_device(argument, tensor);
}

double sum_of(const at::Tensor& numbers) {
  return of_numbers(numbers, [&](const auto* first) {
    constexpr int64_t kSums = 8;
    const int64_t count = numbers.numel();
    std::array<double, kSums> sums{};
    int64_t k = 0;
    for (; k + kSums <= count; k += kSums) {
      for (int64_t j = 0; j < kSums; ++j) sums[j] += static_cast<double>(first[k + j]);
    }
    for (; k < count; ++k) sums[0] += static_cast<double>(first[k]);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
           ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  });
}

at::Tensor reduced(const at::Tensor& row_loss, const Divisor& divisor, at::ScalarType dtype) {
  if (!row_loss.is_cpu()) return divisor.of(row_loss.sum(at::kDouble) / divisor.number).to(dtype);
  return at::scalar_tensor(sum_of(row_loss) / divisor.number, row_loss.options().dtype(dtype));
}

const void* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
void* mutable_data_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

}  // namespace softmax_ext
