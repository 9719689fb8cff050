#include "operators.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/TensorUtils.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/launch.h"
#include "../cpu/memory.h"
#include "cuda.h"
#include "softmax_ext/plan.h"

namespace softmax_ext {
namespace {

constexpr c10::DispatchKeySet kTakenKeys =
    c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::AutogradFunctionality,
                         c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect,
                         c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

Shape to_shape(const at::Tensor& tensor, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, tensor.dim());
  const at::IntArrayRef sizes = tensor.sizes();
  if (sizes.empty()) return {1, 1, 1};
  return {c10::multiply_integers(sizes.slice(0, dim)), sizes[dim],
          c10::multiply_integers(sizes.slice(dim + 1))};
}

// What each call relies on, before it allocates or changes anything. The shape comes of it.
Shape check_forward(const at::Tensor& input, int64_t dim, Op op) {
  const Shape shape = to_shape(input, dim);
  check_storage(op, "input", input);
  return shape;
}

Shape check_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                     at::ScalarType input_dtype, Op op) {
  check_gradient(grad_output, output, dim, input_dtype, op);
  return to_shape(output, dim);
}

// A contiguous tensor to be written, and whether its memory may not have been yet.
struct NewTensor {
  at::Tensor tensor;
  bool is_new;
};

NewTensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device) {
  if (!device.is_cpu()) return {at::empty(sizes, at::TensorOptions(device).dtype(dtype)), true};
  c10::Allocator* const allocator = c10::GetCPUAllocator();
  const size_t size = c10::elementSize(dtype);
  size_t bytes = 0;
  cpu::Memory memory{nullptr, true};
  // An allocator of the user's own is asked for all.
  if (static_cast<size_t>(c10::multiply_integers(sizes)) >= cpu::kLargeOutput / size &&
      allocator == c10::GetDefaultCPUAllocator()) {
    bytes = at::detail::computeStorageNbytesContiguous(sizes, size);  // which may be too many
    memory = cpu::take_memory(bytes);
  }
  if (memory.data == nullptr) {
    // What at::empty ends in, without its dispatch.
    at::Tensor tensor = at::detail::empty_cpu(sizes, dtype);
    cpu::prefer_huge_pages(tensor.mutable_data_ptr(), tensor.nbytes());
    return {tensor, true};
  }
  c10::profiledCPUMemoryReporter().New(memory.data, bytes);
  const auto free = [](void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    cpu::free_memory(data);
  };
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                       c10::DataPtr(memory.data, memory.data, free, at::kCPU), allocator,
                       /*resizable=*/true);
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
      c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return {tensor, memory.is_new};
}

cpu::Threads threads(const Shape& shape) {
  // Too little for a second thread, and for asking whether there is one.
  constexpr int64_t kFew = 2048;
  if (shape.numel() <= kFew) {
    return {1, [](int64_t size, int64_t, cpu::Threads::Body body, void* context) {
              body(context, 0, size);
            }};
  }
  return {at::in_parallel_region() ? 1 : at::get_num_threads(),
          [](int64_t size, int64_t grain, cpu::Threads::Body body, void* context) {
            at::parallel_for(0, size, grain,
                             [=](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

void launch(const ForwardArgs& args, at::Device device) {
  if (device.is_cpu()) {
    cpu::kernels().launch_forward(args, threads(args.shape));
  } else {
    launch_on_cuda(args, device);
  }
}

void launch(const BackwardArgs& args, at::Device device) {
  if (device.is_cpu()) {
    cpu::kernels().launch_backward(args, threads(args.shape));
  } else {
    launch_on_cuda(args, device);
  }
}

// The GPU kernels have the casts of mixed precision; others are made before, or after.
bool needs_cast(at::Device device, at::ScalarType load, at::ScalarType store, int inputs) {
  return !device.is_cpu() && !is_native(to_dtype(load), to_dtype(store), inputs);
}

// A tensor of a call, and where its strides go.
struct Argument {
  const at::Tensor* tensor;
  Strides* strides;
};

// Sets the dims of a call and the strides of its tensors, which are those of contiguous ones; false if
// they are too many. dim is not negative.
bool find_strides(std::initializer_list<Argument> tensors, int64_t dim, Dims& dims) {
  const auto is_contiguous = [](const Argument& argument) {
    return argument.tensor->is_contiguous();
  };
  if (std::all_of(tensors.begin(), tensors.end(), is_contiguous)) return true;
  const at::IntArrayRef sizes = tensors.begin()->tensor->sizes();
  int count = 0;
  // Neighbours that are one dim in all tensors are one here.
  const auto add = [&](int64_t begin, int64_t end) {
    const int first = count;
    for (int64_t k = begin; k < end; ++k) {
      if (sizes[k] == 1) continue;
      const auto goes_on = [&](const Argument& argument) {
        return argument.strides->of[count - 1] == argument.tensor->stride(k) * sizes[k];
      };
      if (count > first && std::all_of(tensors.begin(), tensors.end(), goes_on)) {
        dims.sizes[count - 1] *= sizes[k];
      } else if (count < Dims::kMax) {
        dims.sizes[count++] = sizes[k];
      } else {
        return false;
      }
      for (const Argument& argument : tensors)
        argument.strides->of[count - 1] = argument.tensor->stride(k);
    }
    return true;
  };
  if (!add(0, dim)) return false;
  if (count == 0) {
    dims.sizes[count++] = 1;
    for (const Argument& argument : tensors) argument.strides->of[0] = 0;
  }
  dims.outer = count;
  if (!add(dim + 1, static_cast<int64_t>(sizes.size()))) return false;
  dims.inner = count - dims.outer;
  if (sizes[dim] > 1) {
    for (const Argument& argument : tensors) argument.strides->dim = argument.tensor->stride(dim);
  }
  return true;
}

// The address of the first element, and the first address behind the last one.
std::pair<uintptr_t, uintptr_t> reach(const at::Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(),
                                                          tensor.itemsize())};
}

// Whether `input` can be read where it lies while `output` is written: no two elements share memory,
// or only each the same one's.
bool can_be_read(const at::Tensor& input, const at::Tensor& output) {
  const auto [begin, end] = reach(input);
  const auto [output_begin, output_end] = reach(output);
  if (end <= output_begin || output_end <= begin) return true;
  return begin == output_begin && input.strides() == output.strides() &&
         input.itemsize() == output.itemsize();
}

// Whether no two elements share memory; not of every such tensor.
bool is_without_overlap(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // strides and sizes
  for (int64_t k = 0; k < tensor.dim(); ++k) {
    if (tensor.size(k) > 1) dims.emplace_back(tensor.stride(k), tensor.size(k));
  }
  std::sort(dims.begin(), dims.end());
  int64_t last = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= last) return false;
    last += (size - 1) * stride;
  }
  return true;
}

// Whether the kernels of its device read and write a tensor of these strides where it lies. short_dim:
// of cpu::is_direct.
bool is_direct(const at::Tensor& tensor, const Shape& shape, const Dims& dims,
               const Strides& strides, int64_t short_dim) {
  if (tensor.is_contiguous()) return true;
  const DType dtype = to_dtype(tensor.scalar_type());
  return tensor.device().is_cpu()
             ? cpu::is_direct(shape, dims, strides, dtype, short_dim)
             : cuda::is_direct(shape, dims, strides, tensor.const_data_ptr(), dtype);
}

// Whether the kernels write `output` where it lies. Otherwise a new result is copied there.
bool is_written_in_place(const at::Tensor& output, int64_t dim, int64_t short_dim) {
  if (output.is_contiguous() || output.numel() == 0) return true;
  if (!is_without_overlap(output)) return false;
  const std::optional<Layout> layout = layout_of(output, dim);
  return layout && is_direct(output, layout->shape, layout->dims, layout->strides, short_dim);
}

void run_forward(const at::Tensor& input, const Shape& shape, int64_t dim, Op op,
                 const at::Tensor& output, bool output_is_new) {
  if (input.numel() == 0) return;
  if (needs_cast(input.device(), input.scalar_type(), output.scalar_type(), 1)) {
    run_forward(input.to(output.scalar_type()), shape, dim, op, output, output_is_new);
    return;
  }
  ForwardArgs args{input.const_data_ptr(),
                   output.mutable_data_ptr(),
                   to_dtype(input.scalar_type()),
                   to_dtype(output.scalar_type()),
                   shape,
                   op,
                   output_is_new};
  // Those of the CPU place other input where the output is to be.
  if (find_strides({{&input, &args.input_strides}, {&output, &args.output_strides}}, dim,
                   args.dims) &&
      (input.device().is_cpu() ||
       is_direct(input, shape, args.dims, args.input_strides, cpu::kShortDim))) {
    launch(args, input.device());
  } else {
    run_forward(input.contiguous(), shape, dim, op, output, output_is_new);
  }
}

void run_backward(const at::Tensor& grad_output, const at::Tensor& output, const Shape& shape,
                  int64_t dim, Op op, const at::Tensor& grad_input, bool grad_input_is_new) {
  if (output.numel() == 0) return;
  BackwardArgs args{grad_output.const_data_ptr(),
                    output.const_data_ptr(),
                    grad_input.mutable_data_ptr(),
                    to_dtype(output.scalar_type()),
                    to_dtype(grad_input.scalar_type()),
                    shape,
                    op,
                    grad_input_is_new};
  const bool found = find_strides({{&grad_output, &args.grad_output_strides},
                                   {&output, &args.output_strides},
                                   {&grad_input, &args.grad_input_strides}},
                                  dim, args.dims);
  const auto is_taken = [&](const at::Tensor& tensor, const Strides& strides) {
    return found && is_direct(tensor, shape, args.dims, strides, cpu::kGatheredDim);
  };
  // A gradient that is not direct goes through grad_input on the CPU, if there is room.
  const bool takes_gradient =
      is_taken(grad_output, args.grad_output_strides) ||
      (found && output.device().is_cpu() && args.output_dtype == args.grad_input_dtype &&
       args.output != args.grad_input);
  if (takes_gradient && is_taken(output, args.output_strides)) {
    launch(args, output.device());
  } else {
    run_backward(takes_gradient ? grad_output : grad_output.contiguous(), output.contiguous(),
                 shape, dim, op, grad_input, grad_input_is_new);
  }
}

}  // namespace

DType to_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBool:
      return DType::kBool;
    case at::kByte:
      return DType::kUInt8;
    case at::kChar:
      return DType::kInt8;
    case at::kShort:
      return DType::kInt16;
    case at::kInt:
      return DType::kInt32;
    case at::kLong:
      return DType::kInt64;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for ", dtype);
  }
}

bool kernels_run_on(at::Device device) {
  return device.is_cpu() || (kBuiltWithCuda && device.is_cuda());
}

bool has_other_keys(c10::DispatchKeySet keys) {
  return ((keys - kTakenKeys).raw_repr() & ~c10::full_backend_mask) != 0;
}

bool kernels_take(const at::Tensor& tensor) {
  const at::Device device = tensor.device();
  if (!kernels_run_on(device)) return false;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  if (has_other_keys(tensor.key_set() | local.included_)) return false;
  const auto autocast =
      device.is_cpu() ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA;
  if (!local.excluded_.has(autocast)) return false;
  return !tensor._fw_grad(/*level=*/0).defined();
}

bool is_kernel_output_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ||
         dtype == at::kDouble;
}

bool is_kernel_dtype(at::ScalarType dtype) {
  return is_kernel_output_dtype(dtype) || dtype == at::kBool || dtype == at::kByte ||
         dtype == at::kChar || dtype == at::kShort || dtype == at::kInt || dtype == at::kLong;
}

at::ScalarType output_dtype(const at::Tensor& input, std::optional<at::ScalarType> dtype, Op op) {
  const at::ScalarType result = dtype.value_or(input.scalar_type());
  if (is_kernel_output_dtype(result)) return result;
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, name(op), "(): not implemented for ",
      dtype.has_value() ? "argument 'dtype' = " : "an argument 'input' of dtype ", result,
      "; expected Half, BFloat16, Float or Double",
      dtype.has_value() ? "" : " (an input of another dtype needs the argument 'dtype')");
}

void check_storage(Op op, const char* argument, const at::Tensor& tensor) {
  const at::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  if (!impl->has_storage() || impl->has_symbolic_sizes_strides() || tensor.numel() == 0) return;
  const size_t size = tensor.itemsize(), offset = tensor.storage_offset();
  const size_t bytes =
      tensor.is_contiguous()
          ? (offset + static_cast<size_t>(tensor.numel())) * size
          : at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), size, offset);
  const size_t available = tensor.storage().nbytes();
  TORCH_CHECK(bytes <= available, name(op), "(): argument '", argument, "' requires a storage of ",
              std::to_string(bytes), " bytes, but its storage has ", std::to_string(available));
}

void check_gradient(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                    at::ScalarType input_dtype, Op op) {
  const at::ScalarType dtype = output.scalar_type();
  TORCH_CHECK(
      grad_output.device() == output.device(), name(op),
      "_backward(): Expected all tensors to be on the same device, but found 'grad_output' on ",
      grad_output.device(), " and 'output' on ", output.device());
  for (const auto& [argument, tensor] :
       {std::pair("grad_output", &grad_output), std::pair("output", &output)}) {
    TORCH_CHECK_NOT_IMPLEMENTED(is_kernel_output_dtype(tensor->scalar_type()), name(op),
                                "_backward(): not implemented for an argument '", argument,
                                "' of dtype ", tensor->scalar_type(),
                                "; expected Half, BFloat16, Float or Double");
  }
  TORCH_CHECK_NOT_IMPLEMENTED(is_kernel_output_dtype(input_dtype), name(op),
                              "_backward(): not implemented for argument 'input_dtype' = ",
                              input_dtype, "; expected Half, BFloat16, Float or Double");
  TORCH_CHECK(grad_output.scalar_type() == dtype, name(op), "_backward(): expected scalar type ",
              dtype, " but found ", grad_output.scalar_type(),
              ": argument 'grad_output' must have the dtype of 'output'");
  const auto is_symbolic = [](const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  if (is_symbolic(grad_output) || is_symbolic(output)) {
    TORCH_SYM_CHECK(sym_equals(grad_output.sym_sizes(), output.sym_sizes()), name(op),
                    "_backward(): Expected argument 'grad_output' to have same size as 'output'");
  } else {
    at::checkSameSize(op == Op::kSoftmax ? "softmax_backward" : "log_softmax_backward",
                      {grad_output, "grad_output", 1}, {output, "output", 2});
  }
  (void)at::maybe_wrap_dim(dim, output.dim());
  check_storage(op, "grad_output", grad_output);
  check_storage(op, "output", output);
}

std::optional<Layout> layout_of(const at::Tensor& tensor, int64_t dim) {
  const Shape shape = to_shape(tensor, dim);
  Layout layout{shape, contiguous_dims(shape), contiguous_strides(shape)};
  dim = at::maybe_wrap_dim(dim, tensor.dim());
  if (!find_strides({{&tensor, &layout.strides}}, dim, layout.dims)) return std::nullopt;
  return layout;
}

at::Tensor cast(const at::Tensor& input, at::ScalarType dtype, Op op) {
  check_storage(op, "input", input);
  return input.to(dtype);
}

at::Tensor forward(const at::Tensor& input, int64_t dim, at::ScalarType dtype, Op op) {
  const Shape shape = check_forward(input, dim, op);
  const NewTensor output = empty(input.sizes(), dtype, input.device());
  run_forward(input, shape, at::maybe_wrap_dim(dim, input.dim()), op, output.tensor, output.is_new);
  return output.tensor;
}

void forward_out(const at::Tensor& input, int64_t dim, at::ScalarType dtype, Op op,
                 const at::Tensor& out) {
  TORCH_CHECK(out.scalar_type() == dtype, name(op), "(): expected argument 'out' to have dtype ",
              dtype, ", but got ", out.scalar_type());
  TORCH_CHECK(out.device() == input.device(), name(op), "(): expected argument 'out' on ",
              input.device(), " like 'input', but got ", out.device());
  const Shape shape = check_forward(input, dim, op);
  check_storage(op, "out", out);
  at::native::resize_output(out, input.sizes());
  at::assert_no_internal_overlap(out);
  dim = at::maybe_wrap_dim(dim, input.dim());
  if (input.is_contiguous() && out.is_contiguous()) {
    at::assert_no_partial_overlap(out, input);
  } else if (!is_written_in_place(out, dim, cpu::kShortDim) || !can_be_read(input, out)) {
    out.copy_(forward(input, dim, dtype, op));
    return;
  }
  // First, since it refuses an inference tensor.
  out.unsafeGetTensorImpl()->bump_version();
  run_forward(input, shape, dim, op, out, /*output_is_new=*/false);
}

void forward_in_place(const at::Tensor& input, int64_t dim, Op op) {
  const Shape shape = check_forward(input, dim, op);
  dim = at::maybe_wrap_dim(dim, input.dim());
  if (is_written_in_place(input, dim, cpu::kShortDim)) {
    run_forward(input, shape, dim, op, input, /*output_is_new=*/false);
  } else {
    input.copy_(forward(input, dim, input.scalar_type(), op));
  }
}

at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim,
                    at::ScalarType dtype, Op op) {
  const Shape shape = check_backward(grad_output, output, dim, dtype, op);
  if (needs_cast(output.device(), output.scalar_type(), dtype, 2)) {
    // In the wider type: the gradient is rounded once.
    const at::ScalarType wide = c10::promoteTypes(output.scalar_type(), dtype);
    if (output.scalar_type() == wide) {
      return backward(grad_output, output, dim, wide, op).to(dtype);
    }
    return backward(grad_output.to(wide), output.to(wide), dim, dtype, op);
  }
  const NewTensor grad_input = empty(output.sizes(), dtype, output.device());
  run_backward(grad_output, output, shape, at::maybe_wrap_dim(dim, output.dim()), op,
               grad_input.tensor, grad_input.is_new);
  return grad_input.tensor;
}

void backward_out(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim, Op op,
                  const at::Tensor& grad_input) {
  const at::ScalarType dtype = grad_input.scalar_type();
  const Shape shape = check_backward(grad_output, output, dim, dtype, op);
  TORCH_CHECK(grad_input.device() == output.device(), name(op),
              "_backward(): expected the gradient's memory on ", output.device(), ", but got ",
              grad_input.device());
  check_storage(op, "grad_input", grad_input);
  at::native::resize_output(grad_input, output.sizes());
  if (grad_input.is_contiguous() && grad_output.is_contiguous() && output.is_contiguous()) {
    at::assert_no_partial_overlap(grad_input, grad_output);
    at::assert_no_partial_overlap(grad_input, output);
  }
  dim = at::maybe_wrap_dim(dim, output.dim());
  if (is_written_in_place(grad_input, dim, cpu::kGatheredDim) &&
      can_be_read(grad_output, grad_input) && can_be_read(output, grad_input) &&
      !needs_cast(output.device(), output.scalar_type(), dtype, 2)) {
    run_backward(grad_output, output, shape, dim, op, grad_input, /*grad_input_is_new=*/false);
  } else {
    grad_input.copy_(backward(grad_output, output, dim, dtype, op));
  }
}

}  // namespace softmax_ext
