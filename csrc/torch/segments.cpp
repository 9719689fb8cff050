#include "segments.h"

#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scatter_reduce.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <utility>

#include "../cpu/segments_order.h"
#include "cuda.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

// f(int32_t{}) or f(int64_t{}).
template <class F>
void visit_index(at::ScalarType dtype, F f) {
  dtype == at::kInt ? f(int32_t{}) : f(int64_t{});
}

void check_index(const char* function, const char* argument, const at::Tensor& index,
                 const at::Tensor& input) {
  const at::ScalarType dtype = index.scalar_type();
  TORCH_CHECK(dtype == at::kInt || dtype == at::kLong, function, "(): expected argument '",
              argument, "' to have dtype Int or Long, but got ", dtype);
  TORCH_CHECK(index.dim() == 1, function, "(): expected argument '", argument,
              "' to have 1 dimension, but got ", index.dim());
  TORCH_CHECK(index.device() == input.device(), function,
              "(): Expected all tensors to be on the same device, but found 'input' on ",
              input.device(), " and '", argument, "' on ", index.device());
  check_storage(function, argument, index);
}

void check_length(const char* function, const char* argument, const at::Tensor& index,
                  const at::Tensor& input, int64_t dim) {
  TORCH_SYM_CHECK(index.sym_size(0).sym_eq(input.sym_size(dim)), function,
                  "(): expected argument '", argument, "' to have the length of 'input' along dim ",
                  dim, ", ", input.sym_size(dim), ", but got ", index.sym_size(0));
}

// Plain memory that a kernel reads.
at::Tensor as_pointers(const at::Tensor& ptr) { return ptr.to(at::kLong).contiguous(); }

Segments to_segments(const SortedSegments& sorted) {
  return {sorted.ptr->numel() - 1, sorted.ptr->const_data_ptr<int64_t>(),
          sorted.order ? sorted.order->const_data_ptr<int64_t>() : nullptr};
}

std::optional<int64_t> as_int(const std::optional<c10::SymInt>& value) {
  if (!value) return std::nullopt;
  return value->guard_int(__FILE__, __LINE__);
}

SortedSegments sort_segments_on_device(const char* function, const at::Tensor& input,
                                       const SegmentTensors& segments, int64_t dim,
                                       const std::optional<c10::SymInt>& num_segments) {
  SortedSegments sorted;
  if (segments.ptr) {
    sorted.ptr = as_pointers(*segments.ptr);
    if (segments.order) sorted.order = as_pointers(*segments.order);
  } else {
    const int64_t count = count_segments(segments, num_segments).guard_int(__FILE__, __LINE__);
    at::Tensor index = *segments.index;
    // Of half as many bits it is sorted in half the time. What is out of range stays that.
    if (index.scalar_type() == at::kLong && count < INT32_MAX) {
      index = index.clamp(-1, count).to(at::kInt);
    }
    const auto [numbers, order] = at::sort(index, /*stable=*/true, /*dim=*/0);
    // A value that is no segment's leaves pointers that do not go from 0 to the size.
    sorted.ptr = at::searchsorted(numbers, at::arange(count + 1, numbers.options()));
    sorted.order = order;
  }
  TORCH_CHECK_INDEX(sorted.ptr->numel() > 1 || input.size(dim) == 0, function,
                    "(): expected a segment for each of the ", input.size(dim),
                    " elements of 'input' along dim ", dim, ", but there are no segments");
  return sorted;
}

void launch(const SegmentsForwardArgs& args, at::Device device) {
  if (!device.is_cpu()) return launch_on_cuda(args, device);
  cpu::kernels().launch_segments_forward(args, threads(args.shape));
}

void launch(const SegmentsBackwardArgs& args, at::Device device) {
  if (!device.is_cpu()) return launch_on_cuda(args, device);
  cpu::kernels().launch_segments_backward(args, threads(args.shape));
}

}  // namespace

int64_t check_segments(const char* function, const at::Tensor& input,
                       const SegmentTensors& segments, int64_t dim,
                       const std::optional<c10::SymInt>& num_segments) {
  const auto& [ptr, index, order] = segments;
  TORCH_CHECK_VALUE(ptr.has_value() != index.has_value(), function,
                    "(): expected exactly one of the arguments 'ptr' and 'index', but got ",
                    ptr ? "both" : "neither");
  dim = at::maybe_wrap_dim(dim, input.dim(), /*wrap_scalar=*/false);
  check_storage(function, "input", input);
  if (ptr) {
    check_index(function, "ptr", *ptr, input);
    TORCH_SYM_CHECK(ptr->sym_size(0).sym_ge(1), function,
                    "(): expected argument 'ptr' to have a pointer more than there are segments, "
                    "but got none");
    if (num_segments) {
      TORCH_CHECK_VALUE(*num_segments == ptr->sym_size(0) - 1, function,
                        "(): expected argument 'num_segments' to be ", ptr->sym_size(0) - 1,
                        ", the number of segments of 'ptr', but got ", *num_segments);
    }
  } else {
    check_index(function, "index", *index, input);
    check_length(function, "index", *index, input, dim);
    if (num_segments) {
      TORCH_CHECK_VALUE(*num_segments >= 0, function,
                        "(): expected argument 'num_segments' to be at least 0, but got ",
                        *num_segments);
    }
  }
  if (order) {
    TORCH_CHECK_VALUE(ptr.has_value(), function, "(): an 'order' needs the argument 'ptr'");
    check_index(function, "order", *order, input);
    check_length(function, "order", *order, input, dim);
  }
  return dim;
}

void check_segment_dtype(SegmentOp op, const at::Tensor& input,
                         std::optional<at::ScalarType> dtype) {
  const at::ScalarType result = dtype.value_or(input.scalar_type());
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_kernel_output_dtype(result), name(op), "(): not implemented for ",
      dtype.has_value() ? "argument 'dtype' = " : "an argument 'input' of dtype ", result,
      "; expected Half, BFloat16, Float or Double",
      dtype.has_value() ? "" : " (an input of another dtype needs the argument 'dtype')");
}

c10::SymInt count_segments(const SegmentTensors& segments,
                           const std::optional<c10::SymInt>& num_segments) {
  if (segments.ptr) return segments.ptr->sym_size(0) - 1;
  if (num_segments) return *num_segments;
  const at::Tensor& index = *segments.index;
  return index.sym_numel() == 0 ? 0 : index.max().item<int64_t>() + 1;
}

SortedSegments sort_segments(const char* function, const at::Tensor& input,
                             const SegmentTensors& segments, int64_t dim,
                             const std::optional<c10::SymInt>& num_segments) {
  if (!input.is_cpu()) {
    return sort_segments_on_device(function, input, segments, dim, num_segments);
  }
  const int64_t size = input.size(dim);
  if (segments.ptr) {
    const at::Tensor ptr = as_pointers(*segments.ptr);
    const int64_t* const pointers = ptr.const_data_ptr<int64_t>();
    const int64_t count = ptr.numel() - 1, bad = cpu::find_bad_pointer(pointers, count, size);
    TORCH_CHECK(bad < 0, function, "(): expected argument 'ptr' to go from 0 up to ", size,
                ", the size of 'input' along dim ", dim, ", and never down, but got ",
                pointers[bad], " at ", bad,
                bad > 0 ? " after " + std::to_string(pointers[bad - 1]) : "");
    if (!segments.order) return {ptr, std::nullopt};
    const at::Tensor order = as_pointers(*segments.order);
    const cpu::IndexRange range = cpu::range_of(order.const_data_ptr<int64_t>(), size);
    TORCH_CHECK_INDEX(range.first >= 0 && range.last < size, function,
                      "(): expected argument 'order' to have values from 0 to ", size - 1,
                      ", but got ", range.first < 0 ? range.first : range.last);
    return {ptr, order};
  }
  const at::Tensor index = segments.index->contiguous();
  SortedSegments sorted;
  visit_index(index.scalar_type(), [&](auto element) {
    using Index = decltype(element);
    const Index* const numbers = index.const_data_ptr<Index>();
    const cpu::IndexRange range = cpu::range_of(numbers, size);
    const int64_t count = as_int(num_segments).value_or(range.last + 1);
    TORCH_CHECK_INDEX(range.first >= 0, function,
                      "(): expected argument 'index' to have no negative values, but got ",
                      range.first);
    TORCH_CHECK_INDEX(range.last < count, function,
                      "(): expected argument 'index' to have values below 'num_segments', ", count,
                      ", but got ", range.last);
    sorted.ptr = empty({count + 1}, at::kLong, at::kCPU).tensor;
    int64_t* const pointers = sorted.ptr->mutable_data_ptr<int64_t>();
    if (range.sorted) {
      cpu::find_pointers(numbers, size, pointers, count);
    } else {
      sorted.order = empty({size}, at::kLong, at::kCPU).tensor;
      cpu::sort_by_segment(numbers, size, pointers, count,
                           sorted.order->mutable_data_ptr<int64_t>());
    }
  });
  return sorted;
}

c10::SymDimVector segment_sizes(const at::Tensor& input, int64_t dim, SegmentOp op,
                                const c10::SymInt& count) {
  const c10::SymIntArrayRef of_input = input.sym_sizes();
  c10::SymDimVector sizes(of_input.begin(), of_input.end());
  if (op == SegmentOp::kLogSumExp) sizes[dim] = count;
  return sizes;
}

at::Tensor segment_forward(const at::Tensor& input, const SegmentTensors& segments, int64_t dim,
                           double scale, const std::optional<c10::SymInt>& num_segments,
                           SegmentOp op) {
  check_segment_dtype(op, input, std::nullopt);
  dim = check_segments(name(op), input, segments, dim, num_segments);
  const SortedSegments sorted = sort_segments(name(op), input, segments, dim, num_segments);
  at::DimVector sizes(input.sizes());
  if (op == SegmentOp::kLogSumExp) sizes[dim] = sorted.ptr->numel() - 1;
  const at::Tensor x = input.contiguous();
  const at::Tensor output = empty(sizes, input.scalar_type(), input.device()).tensor;
  if (output.numel() == 0) return output;
  launch({x.const_data_ptr(), output.mutable_data_ptr(), to_dtype(input.scalar_type()),
          to_shape(input, dim), to_segments(sorted), op, scale},
         input.device());
  return output;
}

void check_segment_gradient(const at::Tensor& grad_output, const at::Tensor& output,
                            const std::optional<at::Tensor>& input, const SegmentTensors& segments,
                            int64_t dim, SegmentOp op) {
  const at::Tensor& elements = input ? *input : output;
  check_segment_dtype(op, output, std::nullopt);
  dim = check_segments(name(op), elements, segments, dim, std::nullopt);
  const auto check = [&](const char* argument, const at::Tensor& tensor,
                         c10::SymIntArrayRef sizes) {
    TORCH_CHECK(tensor.scalar_type() == output.scalar_type(), name(op),
                "_backward(): expected scalar type ", output.scalar_type(), " but found ",
                tensor.scalar_type(), ": argument '", argument,
                "' must have the dtype of 'output'");
    TORCH_CHECK(tensor.device() == output.device(), name(op),
                "_backward(): Expected all tensors to be on the same device, but found '", argument,
                "' on ", tensor.device(), " and 'output' on ", output.device());
    TORCH_SYM_CHECK(sym_equals(tensor.sym_sizes(), sizes), name(op), "_backward(): Expected '",
                    argument, "' to have the size ", sizes, ", but got ", tensor.sym_sizes());
    check_storage(name(op), argument, tensor);
  };
  check("grad_output", grad_output, output.sym_sizes());
  if (!input) return;
  // Of an index there are as many segments as the output has.
  const c10::SymInt count = segments.ptr ? segments.ptr->sym_size(0) - 1 : output.sym_sizes()[dim];
  check("input", elements, elements.sym_sizes());
  check("output", output, segment_sizes(elements, dim, op, count));
}

at::Tensor segment_backward(const at::Tensor& grad_output, const at::Tensor& output,
                            const std::optional<at::Tensor>& input, const SegmentTensors& segments,
                            int64_t dim, double scale, std::optional<c10::SymInt> num_segments,
                            SegmentOp op) {
  check_segment_gradient(grad_output, output, input, segments, dim, op);
  const at::Tensor& elements = input ? *input : output;
  dim = at::maybe_wrap_dim(dim, elements.dim());
  if (input && segments.index) num_segments = output.sym_size(dim);
  const SortedSegments sorted = sort_segments(name(op), elements, segments, dim, num_segments);
  const at::Tensor g = grad_output.contiguous(), y = output.contiguous(), x = elements.contiguous();
  const at::Tensor grad_input =
      empty(elements.sizes(), output.scalar_type(), elements.device()).tensor;
  if (grad_input.numel() == 0) return grad_input;
  launch({g.const_data_ptr(), y.const_data_ptr(), input ? x.const_data_ptr() : nullptr,
          grad_input.mutable_data_ptr(), to_dtype(output.scalar_type()), to_shape(elements, dim),
          to_segments(sorted), op, scale},
         elements.device());
  return grad_input;
}

SegmentSums::SegmentSums(const SegmentTensors& segments, int64_t dim, const c10::SymInt& size,
                         const std::optional<c10::SymInt>& num_segments)
    : count_(count_segments(segments, num_segments)), dim_(dim) {
  if (segments.index) {
    owner_ = segments.index->to(at::kLong);
    return;
  }
  const at::Tensor& ptr = *segments.ptr;
  owner_ = at::searchsorted(ptr, at::arange(size, ptr.options()), /*out_int32=*/false,
                            /*right=*/true) -
           1;
  if (segments.order) {
    owner_ = at::empty_like(owner_).index_copy(0, segments.order->to(at::kLong), owner_);
  }
}

at::Tensor SegmentSums::of(const at::Tensor& x) const {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes[dim_] = count_;
  return at::zeros_symint(sizes, x.options()).index_add(dim_, owner_, x);
}

at::Tensor SegmentSums::spread(const at::Tensor& x) const { return x.index_select(dim_, owner_); }

at::Tensor SegmentSums::max(const at::Tensor& x) const {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes[dim_] = count_;
  std::vector<c10::SymInt> along(x.dim(), 1);
  along[dim_] = x.sym_size(dim_);
  const at::Tensor owner = owner_.view_symint(along).expand_as(x);
  return at::full_symint(sizes, -INFINITY, x.options())
      .scatter_reduce(dim_, owner, x.detach(), "amax");
}

at::Tensor segment_forward_by_torch(const at::Tensor& input, const SegmentTensors& segments,
                                    int64_t dim, double scale,
                                    const std::optional<c10::SymInt>& num_segments, SegmentOp op) {
  const c10::SymInt size = input.sym_size(dim);
  const at::Tensor x = input.to(at::toOpMathType(input.scalar_type())) * scale;
  if (segments.ptr) {
    const at::Tensor& ptr = *segments.ptr;
    at::_assert_async((ptr.diff() >= 0).all() & (ptr[0] == 0) & (ptr[-1] == c10::Scalar(size)),
                      std::string(name(op)) +
                          "(): argument 'ptr' must go from 0 up to the size of "
                          "'input' along dim, and never down");
  } else if (num_segments) {
    const at::Tensor& index = *segments.index;
    at::_assert_async(
        ((index >= 0) & (index < c10::Scalar(*num_segments))).all(),
        std::string(name(op)) + "(): argument 'index' must have values from 0 to num_segments - 1");
  }
  const SegmentSums sums(segments, dim, size, num_segments);
  const at::Tensor max = sums.max(x);
  if (op == SegmentOp::kLogSumExp) {
    const at::Tensor shift = at::where(max.isinf(), 0.0, max);
    return (sums.of((x - sums.spread(shift)).exp()).log() + shift).to(input.scalar_type());
  }
  const at::Tensor shifted = x - sums.spread(max), e = shifted.exp(), sum = sums.of(e);
  return (op == SegmentOp::kSoftmax ? e / sums.spread(sum) : shifted - sums.spread(sum.log()))
      .to(input.scalar_type());
}

}  // namespace softmax_ext
