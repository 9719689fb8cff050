// torch's tensors as the kernels see them: types, shapes, strides and memory. Of no one operator.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../cpu/launch.h"
#include "softmax_ext/problem.h"

namespace softmax_ext {

// Whether there are kernels for this device in this build.
bool kernels_run_on(at::Device device);

// Whether the kernels take a call on this tensor, here and now. They do not take what is not plain
// strided memory on the CPU (or on a GPU, where built for it), nor a call that something else must
// see: functorch transforms, forward-mode tangents, fake tensors and other modes, tracing,
// autocast. Such a call goes to the registered operators or to torch's own.
bool kernels_take(const at::Tensor& tensor);

// Whether there are keys, of a tensor or of a thread, besides those of plain memory, autograd and
// autocast.
bool has_other_keys(c10::DispatchKeySet keys);

// A conversion to one of the kernels' output types can be part of the kernel.
bool is_kernel_dtype(at::ScalarType dtype);         // as input
bool is_kernel_output_dtype(at::ScalarType dtype);  // as output: floating

// The kernels' name of such a type.
DType to_dtype(at::ScalarType dtype);

// Raises unless all that a tensor sees is in its storage, which may have been resized to less.
void check_storage(const char* function, const char* argument, const at::Tensor& tensor);

// The shape seen from `dim`, which is checked.
Shape to_shape(const at::Tensor& tensor, int64_t dim);

// A contiguous tensor to be written, and whether its memory may not have been yet.
struct NewTensor {
  at::Tensor tensor;
  bool is_new;
};

// Uninitialised.
NewTensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device);

// torch's thread pool, or this thread alone where there is too little to do.
cpu::Threads threads(const Shape& shape);

// A tensor of a call, and where its strides go.
struct Argument {
  const at::Tensor* tensor;
  Strides* strides;
};

// Sets the dims of a call and the strides of its tensors, which are those of contiguous ones; false if
// they are too many. dim is not negative.
bool find_strides(c10::ArrayRef<Argument> tensors, int64_t dim, Dims& dims);

// Where the elements of a tensor lie, seen as (outer, dim, inner); none where it has too many dims.
struct Layout {
  Shape shape;
  Dims dims;
  Strides strides;
};
std::optional<Layout> layout_of(const at::Tensor& tensor, int64_t dim);

// Whether the kernels of its device read and write a tensor of these strides where it lies. short_dim:
// of cpu::is_direct.
bool is_direct(const at::Tensor& tensor, const Shape& shape, const Dims& dims,
               const Strides& strides, int64_t short_dim);

// Whether `input` can be read where it lies while `output` is written: no two elements share memory,
// or only each the same one's.
bool can_be_read(const at::Tensor& input, const at::Tensor& output);

// Whether no two elements share memory; not of every such tensor.
bool is_without_overlap(const at::Tensor& tensor);

// Whether the kernels write `output` where it lies. Otherwise a new result is copied there.
bool is_written_in_place(const at::Tensor& output, int64_t dim, int64_t short_dim);

}  // namespace softmax_ext
