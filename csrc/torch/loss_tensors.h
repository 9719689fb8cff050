// The tensors of losses: what all of them check, and sums of numbers of rows.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "cuda.h"
#include "tensors.h"

namespace softmax_ext {

// A function and its logits, which its other tensors have to go with. The functions raise.
struct LossCheck {
  const char* function;
  const char* name;  // of the logits
  const at::Tensor& logits;

  // Of the logits themselves: their dtype, one dimension or more, their storage.
  void check_logits() const;
  void check_device(const char* argument, const at::Tensor& tensor) const;
  void check_dtype(const char* argument, const at::Tensor& tensor) const;
  void check_class_weight(const std::optional<at::Tensor>& weight,
                          const c10::SymInt& classes) const;
  void check_reduction(int64_t reduction, int64_t end) const;
  // Of a tensor that a backward call is given.
  void check_given(const char* argument, const at::Tensor& tensor, at::ScalarType dtype,
                   c10::SymIntArrayRef sizes) const;
};

// f(first of the numbers) with their type, which is one that is computed in.
template <class F>
double of_numbers(const at::Tensor& tensor, F f) {
  return tensor.scalar_type() == at::kDouble ? f(tensor.const_data_ptr<double>())
                                             : f(tensor.const_data_ptr<float>());
}

// The sum of contiguous numbers, in an order that only their count decides.
double sum_of(const at::Tensor& numbers);

// What a sum of the rows' losses is divided by: a number, and one that only the device knows.
struct Divisor {
  double number = 1;
  at::Tensor on_device;

  at::Tensor of(const at::Tensor& x) const { return on_device.defined() ? x / on_device : x; }
};

// That, as a number of `dtype` on their device, which nobody waits for.
at::Tensor reduced(const at::Tensor& row_loss, const Divisor& divisor, at::ScalarType dtype);

// By the kernel of the device.
template <class Args>
void launch(const Args& args, c10::Device device,
            void (*on_cpu)(const Args& args, const cpu::Threads& threads)) {
  if (device.is_cuda()) return launch_on_cuda(args, device);
  on_cpu(args, threads(args.shape));
}

// Null where the tensor is not defined.
const void* data_of(const at::Tensor& tensor);
void* mutable_data_of(const at::Tensor& tensor);

}  // namespace softmax_ext
