#include "scores.h"

#include <ATen/OpMathType.h>

#include "softmax.h"
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

std::tuple<at::Tensor, at::Tensor> score_forward(const ScoreTensors& tensors,
                                                 const ScoreOptions& options,
                                                 std::optional<at::ScalarType> dtype, bool) {
  return composed_scores(tensors, options, dtype);
}

at::Tensor score_forward_in_place(const ScoreTensors& tensors, const ScoreOptions& options, bool) {
  auto [result, lse] = composed_scores(tensors, options, std::nullopt);
  tensors.input.copy_(result);
  return lse;
}

ScoreTensors score_backward(const at::Tensor& g, const at::Tensor& y, const at::Tensor&,
                            const ScoreTensors& tensors, const ScoreOptions& options,
                            at::ScalarType input_dtype, const ScoreWanted& wanted) {
  return composed_score_gradients(g, y, tensors, options, input_dtype, wanted);
}

}  // namespace softmax_ext
