#include "scores.h"

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <array>
#include <utility>
#include <vector>

#include "cuda.h"
#include "softmax.h"
#include "softmax_ext/score_plan.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

// What is to broadcast to the input; with one number a row: of size 1 along the last dim.
void check_broadcast(const char* function, const char* argument, const at::Tensor& tensor,
                     const at::Tensor& input, bool a_row) {
  const auto sizes = tensor.sym_sizes(), to = input.sym_sizes();
  bool fits = sizes.size() <= to.size();
  for (size_t k = 1; fits && k <= sizes.size(); ++k) {
    const c10::SymInt& size = sizes[sizes.size() - k];
    fits = size == 1 || (!(a_row && k == 1) && size == to[to.size() - k]);
  }
  TORCH_CHECK(fits, function, "(): argument '", argument, "' of shape ", sizes,
              " cannot be broadcast to 'input' of shape ", to,
              a_row ? " with one number for each row" : "");
  TORCH_CHECK(tensor.device() == input.device(), function,
              "(): Expected all tensors to be on the same device, but found 'input' on ",
              input.device(), " and '", argument, "' on ", tensor.device());
  check_storage(function, argument, tensor);
}

// Whether the kernels read and write the rows of a tensor where they lie: with their elements one after
// another, and on CUDA from where vectors begin.
bool is_taken(const at::Tensor& tensor) {
  if (tensor.size(-1) == 1) return true;
  if (tensor.stride(-1) != 1) return false;
  if (!tensor.is_cuda()) return true;
  Dims dims{static_cast<int>(std::min<int64_t>(tensor.dim() - 1, Dims::kMax)), 0, {}};
  Strides strides{1, {}};
  for (int k = 0; k < dims.outer; ++k) {
    dims.sizes[k] = tensor.size(k);
    strides.of[k] = tensor.stride(k);
  }
  return tensor.dim() - 1 <= Dims::kMax &&
         cuda::takes_score_rows(tensor.size(-1), tensor.const_data_ptr(),
                                static_cast<int64_t>(tensor.itemsize()), dims, strides);
}

at::Tensor as_taken(const at::Tensor& tensor) {
  return is_taken(tensor) ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

c10::DimVector rows_of(const at::Tensor& tensor) {
  c10::DimVector sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = 1;
  return sizes;
}

at::Tensor empty_of_rows(const at::Tensor& tensor, at::ScalarType dtype, int64_t numbers = 1) {
  c10::DimVector sizes = rows_of(tensor);
  sizes.back() = numbers;
  return at::empty(sizes, tensor.options().dtype(dtype));
}

// The sum over what a tensor was broadcast to. torch's sum of many elements to one is other bits for another
// number of threads.
at::Tensor summed_to(at::Tensor gradient, const at::Tensor& tensor) {
  constexpr int64_t kMany = 1 << 15, kParts = 1024;
  if (tensor.numel() == 1 && gradient.numel() >= kMany) {
    const int64_t more = (kParts - gradient.numel() % kParts) % kParts;
    gradient = at::constant_pad_nd(gradient.flatten(), {0, more}).view({-1, kParts}).sum(0);
    return gradient.sum().reshape(tensor.sizes()).to(tensor.scalar_type());
  }
  return at::sum_to(std::move(gradient), tensor.sizes()).to(tensor.scalar_type());
}

// The tensors of a launch, each expanded to the shape of the scores.
class Call {
 public:
  Call(at::IntArrayRef sizes, const Shape& shape) : sizes_(sizes), shape_(shape) {
    tensors_.reserve(kMost);
    arguments_.reserve(kMost);
  }

  // Its first element.
  const void* add(const at::Tensor& tensor, Strides& strides) {
    tensors_.push_back(tensor.sizes() == sizes_ ? tensor : tensor.expand(sizes_));
    strides = contiguous_strides(shape_);
    arguments_.push_back({&tensors_.back(), &strides});
    return tensor.const_data_ptr();
  }

  void add_scores(const ScoreTensors& tensors, const ScoreOptions& options, at::ScalarType wide,
                  Scores& scores) {
    const auto guard = [](const c10::SymInt& value) { return value.guard_int(__FILE__, __LINE__); };
    scores.factor = options.factor;
    scores.softcap = options.softcap;
    scores.left = guard(options.left);
    scores.right = guard(options.right);
    scores.offset = guard(options.offset);
    if (tensors.scale.defined()) {
      scores.scale =
          static_cast<const double*>(add(tensors.scale.to(at::kDouble), scores.scale_strides));
    }
    if (tensors.sink.defined()) {
      scores.sink =
          static_cast<const double*>(add(tensors.sink.to(at::kDouble), scores.sink_strides));
    } else {
      scores.sink_of_all = options.sink;
    }
    if (tensors.mask.defined()) {
      at::Tensor mask = tensors.mask;
      const at::ScalarType dtype = mask.scalar_type();
      const bool taken = dtype == at::kBool || dtype == wide ||
                         (wide == at::kFloat && (dtype == at::kHalf || dtype == at::kBFloat16));
      if (!taken) mask = mask.to(wide);
      if (mask.dim() > 0) mask = as_taken(mask);
      scores.mask_dtype = to_dtype(mask.scalar_type());
      scores.mask = add(mask, scores.mask_strides);
    }
    // The query's index, as where an element of a tensor of one for each lies.
    if (options.is_bounded()) {
      add(at::empty({sizes_[sizes_.size() - 2], 1}, at::kByte), scores.query_strides);
    }
  }

  // False where the tensors have too many dims.
  bool find(Dims& dims) const {
    return find_strides(arguments_, static_cast<int64_t>(sizes_.size()) - 1, dims);
  }

 private:
  static constexpr size_t kMost = 12;

  at::IntArrayRef sizes_;
  Shape shape_;
  std::vector<at::Tensor> tensors_;
  std::vector<Argument> arguments_;
};

void launch_on_cpu(const ScoreForwardArgs& args) {
  cpu::kernels().launch_score_forward(args, threads(args.shape));
}
void launch_on_cpu(const ScoreBackwardArgs& args) {
  cpu::kernels().launch_score_backward(args, threads(args.shape));
}

// False where the device's kernels do not take the dims.
template <class Args>
bool launch(const Args& args, at::Device device) {
  if (device.is_cpu()) {
    launch_on_cpu(args);
    return true;
  }
  if (!cuda::takes_scores(args.shape, args.dims)) return false;
  launch_on_cuda(args, device);
  return true;
}

bool run_forward(const at::Tensor& input, const ScoreTensors& tensors, const ScoreOptions& options,
                 const at::Tensor& output, bool output_is_new, const at::Tensor& lse) {
  const at::ScalarType dtype = input.scalar_type();
  ScoreForwardArgs args{
      {input.const_data_ptr(), output.defined() ? output.mutable_data_ptr() : nullptr,
       to_dtype(dtype), to_dtype(dtype), to_shape(input, -1),
       options.op == ScoreOp::kSoftmax ? Op::kSoftmax : Op::kLogSoftmax, output_is_new}};
  Call call(input.sizes(), args.shape);
  call.add(input, args.input_strides);
  if (output.defined()) call.add(output, args.output_strides);
  call.add_scores(tensors, options, at::toOpMathType(dtype), args.scores);
  if (lse.defined()) {
    call.add(lse, args.lse_strides);
    args.lse = lse.mutable_data_ptr();
  }
  return call.find(args.dims) && launch(args, input.device());
}

}  // namespace

at::ScalarType check_scores(const ScoreTensors& tensors, const ScoreOptions& options,
                            std::optional<at::ScalarType> dtype) {
  const char* const function = name(options.op);
  const at::Tensor& input = tensors.input;
  const at::ScalarType result = output_dtype(input, dtype, function);
  TORCH_CHECK_INDEX(input.dim() >= (options.is_bounded() ? 2 : 1), function,
                    "(): expected argument 'input' to have at least ", options.is_bounded() ? 2 : 1,
                    " dims, got ", input.dim());
  check_storage(function, "input", input);
  for (const auto& [argument, tensor] :
       {std::pair("scale", &tensors.scale), std::pair("sink", &tensors.sink)}) {
    if (!tensor->defined()) continue;
    TORCH_CHECK_TYPE(tensor->is_floating_point(), function, "(): expected argument '", argument,
                     "' of a floating dtype, got ", tensor->scalar_type());
    check_broadcast(function, argument, *tensor, input, /*a_row=*/true);
  }
  if (tensors.mask.defined()) {
    TORCH_CHECK_TYPE(tensors.mask.is_floating_point() || tensors.mask.scalar_type() == at::kBool,
                     function, "(): expected argument 'mask' of a bool or floating dtype, got ",
                     tensors.mask.scalar_type());
    check_broadcast(function, "mask", tensors.mask, input, /*a_row=*/false);
  }
  return result;
}

void check_score_gradient(const at::Tensor& g, const at::Tensor& y, const at::Tensor& lse,
                          const ScoreTensors& tensors, const ScoreOptions& options,
                          at::ScalarType input_dtype, const ScoreWanted& wanted) {
  const char* const function = name(options.op);
  const at::ScalarType dtype = y.scalar_type(), wide = at::toOpMathType(dtype);
  const bool of_lse = options.op == ScoreOp::kLogSumExp;
  check_gradient(g, y, -1, is_kernel_output_dtype(input_dtype) ? input_dtype : dtype,
                 options.op == ScoreOp::kSoftmax ? Op::kSoftmax : Op::kLogSoftmax);
  const bool needs_input = of_lse || options.softcap != 0 || wanted.scale;
  TORCH_CHECK(!needs_input || tensors.input.defined(), function,
              "_backward(): expected an argument 'input'");
  const ScoreTensors of_shape{needs_input ? tensors.input : y, tensors.scale, tensors.mask,
                              tensors.sink};
  (void)check_scores(of_shape, options, dtype);
  TORCH_CHECK(!wanted.scale || tensors.scale.defined(), function,
              "_backward(): expected an argument 'scale'");
  TORCH_CHECK(!wanted.mask || (tensors.mask.defined() && tensors.mask.is_floating_point()),
              function, "_backward(): expected an argument 'mask' of a floating dtype");
  TORCH_CHECK(!wanted.sink || tensors.sink.defined(), function,
              "_backward(): expected an argument 'sink'");
  c10::SymDimVector rows(of_shape.input.sym_sizes().begin(), of_shape.input.sym_sizes().end());
  rows.back() = 1;
  TORCH_CHECK(of_shape.input.device() == y.device(), function,
              "_backward(): Expected all tensors to be on the same device, but found 'input' on ",
              of_shape.input.device(), " and 'result' on ", y.device());
  const c10::SymIntArrayRef sizes = of_lse ? c10::SymIntArrayRef(rows) : of_shape.input.sym_sizes();
  TORCH_SYM_CHECK(
      sym_equals(y.sym_sizes(), sizes), function,
      "_backward(): expected argument 'result' to have the sizes of the input's result");
  if (of_lse || wanted.sink) {
    TORCH_CHECK(lse.defined() && lse.scalar_type() == wide && lse.device() == y.device(), function,
                "_backward(): expected an argument 'lse' of dtype ", wide, " on ", y.device());
    TORCH_SYM_CHECK(sym_equals(lse.sym_sizes(), rows), function,
                    "_backward(): expected argument 'lse' to have a number for each row");
    check_storage(function, "lse", lse);
  }
}

std::tuple<at::Tensor, at::Tensor> score_forward(const ScoreTensors& tensors,
                                                 const ScoreOptions& options,
                                                 std::optional<at::ScalarType> dtype,
                                                 bool wants_lse) {
  const at::ScalarType result_dtype = check_scores(tensors, options, dtype);
  const bool only_lse = options.op == ScoreOp::kLogSumExp;
  const at::Tensor input = as_taken(tensors.input.to(result_dtype));
  NewTensor output{};
  if (!only_lse) output = empty(input.sizes(), result_dtype, input.device());
  at::Tensor lse;
  if (only_lse || wants_lse) lse = empty_of_rows(input, at::toOpMathType(result_dtype));
  if (input.numel() == 0) {
    if (lse.defined()) lse.fill_(-INFINITY);
  } else if (!run_forward(input, tensors, options, output.tensor, output.is_new, lse)) {
    return composed_scores(tensors, options, dtype);
  }
  return {only_lse ? lse.to(result_dtype) : output.tensor, lse};
}

at::Tensor score_forward_in_place(const ScoreTensors& tensors, const ScoreOptions& options,
                                  bool wants_lse) {
  const at::Tensor& input = tensors.input;
  const at::ScalarType result_dtype = check_scores(tensors, options, std::nullopt);
  for (const at::Tensor* const other : {&tensors.scale, &tensors.mask, &tensors.sink}) {
    if (other->defined()) at::assert_no_overlap(input, *other);
  }
  at::Tensor lse;
  if (wants_lse) lse = empty_of_rows(input, at::toOpMathType(result_dtype));
  if (input.numel() == 0) return lse;
  const bool direct = is_taken(input) && is_without_overlap(input);
  if (!direct || !run_forward(input, tensors, options, input, /*output_is_new=*/false, lse)) {
    at::Tensor result;
    std::tie(result, lse) = score_forward(tensors, options, std::nullopt, wants_lse);
    input.copy_(result);
  }
  return lse;
}

ScoreTensors score_backward(const at::Tensor& g, const at::Tensor& y, const at::Tensor& lse,
                            const ScoreTensors& tensors, const ScoreOptions& options,
                            at::ScalarType input_dtype, const ScoreWanted& wanted) {
  const at::ScalarType dtype = y.scalar_type(), wide = at::toOpMathType(dtype);
  const bool of_lse = options.op == ScoreOp::kLogSumExp;
  check_score_gradient(g, y, lse, tensors, options, input_dtype, wanted);
  const bool needs_input = of_lse || options.softcap != 0 || wanted.scale;
  const bool wants_sink = wanted.sink && tensors.sink.defined();
  const ScoreTensors of_shape{needs_input ? tensors.input : y, tensors.scale, tensors.mask,
                              tensors.sink};
  const at::IntArrayRef sizes = of_shape.input.sizes();
  const c10::DimVector rows = rows_of(of_shape.input);
  const auto composed = [&] {
    return composed_score_gradients(g, y, tensors, options, input_dtype, wanted);
  };
  if (of_shape.input.numel() == 0) return composed();
  const at::ScalarType wider =
      is_kernel_output_dtype(input_dtype) ? c10::promoteTypes(dtype, input_dtype) : dtype;
  if (wider != dtype) {
    // The gradient is rounded once.
    ScoreTensors widened = tensors;
    if (needs_input) widened.input = tensors.input.to(dtype).to(wider);
    return score_backward(g.to(wider), y.to(wider),
                          lse.defined() ? lse.to(at::toOpMathType(wider)) : lse, widened, options,
                          input_dtype, wanted);
  }
  const at::Tensor grad = of_lse ? g : as_taken(g), output = as_taken(y);
  const at::Tensor input = needs_input ? as_taken(tensors.input.to(dtype)) : at::Tensor();
  const NewTensor grad_input = empty(sizes, dtype, y.device());
  at::Tensor grad_scale, grad_sink, grad_mask;
  // What is a number of a row is one of each chunk on CUDA, and the gradient of a mask one of each part.
  const bool on_cuda = y.is_cuda();
  const int64_t chunks = on_cuda ? score_chunks(sizes.back(), to_dtype(dtype)) : 1;
  int64_t parts = 1;
  if (wanted.scale) grad_scale = empty_of_rows(of_shape.input, wide, chunks);
  if (wants_sink) grad_sink = empty_of_rows(of_shape.input, wide);
  const bool mask_of_rows =
      wanted.mask && sizes.back() > 1 && (tensors.mask.dim() == 0 || tensors.mask.size(-1) == 1);
  if (wanted.mask) {
    if (mask_of_rows) {
      grad_mask = empty_of_rows(of_shape.input, wide, chunks);
    } else {
      const int64_t of_mask = tensors.mask.numel();
      if (on_cuda) {
        parts = mask_gradient_parts(of_mask / sizes.back(), of_shape.input.numel() / of_mask);
      }
      c10::DimVector all{parts};
      all.append(tensors.mask.sizes().begin(), tensors.mask.sizes().end());
      grad_mask = at::empty(all, y.options().dtype(wide));
    }
  }
  ScoreBackwardArgs args{{grad.const_data_ptr(), of_lse ? nullptr : output.const_data_ptr(),
                          grad_input.tensor.mutable_data_ptr(), to_dtype(dtype), to_dtype(dtype),
                          to_shape(of_shape.input, -1),
                          options.op == ScoreOp::kSoftmax ? Op::kSoftmax : Op::kLogSoftmax,
                          grad_input.is_new}};
  Call call(sizes, args.shape);
  call.add(grad, args.grad_output_strides);
  if (!of_lse) call.add(output, args.output_strides);
  call.add(grad_input.tensor, args.grad_input_strides);
  call.add_scores(of_shape, options, wide, args.scores);
  if (needs_input) args.input = call.add(input, args.input_strides);
  const at::Tensor lse_of_rows = of_lse || wants_sink ? lse.contiguous() : at::Tensor();
  // All that rows have numbers of is contiguous.
  if (lse_of_rows.defined() || grad_scale.defined() || mask_of_rows) {
    call.add(at::empty(rows, at::TensorOptions(at::kMeta).dtype(wide)), args.row_strides);
  }
  if (lse_of_rows.defined()) args.lse = lse_of_rows.const_data_ptr();
  if (wants_sink) args.grad_sink = grad_sink.mutable_data_ptr();
  if (wanted.scale) args.grad_scale = grad_scale.mutable_data_ptr();
  if (mask_of_rows) {
    args.grad_mask_of_rows = grad_mask.mutable_data_ptr();
  } else if (wanted.mask) {
    call.add(grad_mask.select(0, 0), args.grad_mask_strides);
    args.grad_mask = grad_mask.mutable_data_ptr();
    args.grad_mask_parts = parts;
  }
  if (!call.find(args.dims) || !launch(args, y.device())) return composed();
  if (chunks > 1) {
    for (at::Tensor* const of_chunks : {&grad_scale, mask_of_rows ? &grad_mask : nullptr}) {
      if (of_chunks != nullptr && of_chunks->defined()) {
        *of_chunks = of_chunks->sum(-1, /*keepdim=*/true);
      }
    }
  }
  if (grad_mask.defined() && !mask_of_rows) {
    grad_mask = parts == 1 ? grad_mask.select(0, 0) : grad_mask.sum(0);
  }
  ScoreTensors gradients;
  if (wanted.input) gradients.input = grad_input.tensor.to(input_dtype);
  if (wanted.scale) gradients.scale = summed_to(grad_scale.mul_(options.factor), tensors.scale);
  if (wants_sink) gradients.sink = summed_to(grad_sink, tensors.sink);
  if (wanted.mask) gradients.mask = summed_to(grad_mask, tensors.mask);
  return gradients;
}

}  // namespace softmax_ext
