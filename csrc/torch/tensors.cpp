#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/memory.h"
#include "cuda.h"
#include "softmax_ext/plan.h"

namespace softmax_ext {
namespace {

constexpr c10::DispatchKeySet kTakenKeys =
    c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::AutogradFunctionality,
                         c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect,
                         c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

// The address of the first element, and the first address behind the last one.
std::pair<uintptr_t, uintptr_t> reach(const at::Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(),
                                                          tensor.itemsize())};
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

void check_storage(const char* function, const char* argument, const at::Tensor& tensor) {
  const at::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  if (!impl->has_storage() || impl->has_symbolic_sizes_strides() || tensor.numel() == 0) return;
  const size_t size = tensor.itemsize(), offset = tensor.storage_offset();
  const size_t bytes =
      tensor.is_contiguous()
          ? (offset + static_cast<size_t>(tensor.numel())) * size
          : at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), size, offset);
  const size_t available = tensor.storage().nbytes();
  TORCH_CHECK(bytes <= available, function, "(): argument '", argument, "' requires a storage of ",
              std::to_string(bytes), " bytes, but its storage has ", std::to_string(available));
}

Shape to_shape(const at::Tensor& tensor, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, tensor.dim());
  const at::IntArrayRef sizes = tensor.sizes();
  if (sizes.empty()) return {1, 1, 1};
  return {c10::multiply_integers(sizes.slice(0, dim)), sizes[dim],
          c10::multiply_integers(sizes.slice(dim + 1))};
}

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

bool find_strides(c10::ArrayRef<Argument> tensors, int64_t dim, Dims& dims) {
  const auto is_contiguous = [](const Argument& argument) {
    return argument.tensor->is_contiguous();
  };
  if (std::all_of(tensors.begin(), tensors.end(), is_contiguous)) return true;
  const at::IntArrayRef sizes = tensors.front().tensor->sizes();
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

std::optional<Layout> layout_of(const at::Tensor& tensor, int64_t dim) {
  const Shape shape = to_shape(tensor, dim);
  Layout layout{shape, contiguous_dims(shape), contiguous_strides(shape)};
  dim = at::maybe_wrap_dim(dim, tensor.dim());
  if (!find_strides({{&tensor, &layout.strides}}, dim, layout.dims)) return std::nullopt;
  return layout;
}

bool is_direct(const at::Tensor& tensor, const Shape& shape, const Dims& dims,
               const Strides& strides, int64_t short_dim) {
  if (tensor.is_contiguous()) return true;
  const DType dtype = to_dtype(tensor.scalar_type());
  return tensor.device().is_cpu()
             ? cpu::is_direct(shape, dims, strides, dtype, short_dim)
             : cuda::is_direct(shape, dims, strides, tensor.const_data_ptr(), dtype);
}

bool can_be_read(const at::Tensor& input, const at::Tensor& output) {
  const auto [begin, end] = reach(input);
  const auto [output_begin, output_end] = reach(output);
  if (end <= output_begin || output_end <= begin) return true;
  return begin == output_begin && input.strides() == output.strides() &&
         input.itemsize() == output.itemsize();
}

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

bool is_written_in_place(const at::Tensor& output, int64_t dim, int64_t short_dim) {
  if (output.is_contiguous() || output.numel() == 0) return true;
  if (!is_without_overlap(output)) return false;
  const std::optional<Layout> layout = layout_of(output, dim);
  return layout && is_direct(output, layout->shape, layout->dims, layout->strides, short_dim);
}

}  // namespace softmax_ext
