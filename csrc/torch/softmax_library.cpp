// softmax and log-softmax as the dispatcher knows them, torch.ops.softmax_ext: what a compiled graph
// calls.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "softmax_formulas.h"
#include "transforms.h"

namespace softmax_ext {
namespace {

// As torch's softmax: in float32, unless a type is asked for.
template <Op op>
at::Tensor autocast(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  const bool eligible = at::autocast::firstarg_is_eligible(at::kCUDA, input);
  return Rules<Forward<op>>::dispatch(
      input, dim, eligible ? at::autocast::set_opt_dtype(at::kFloat, dtype) : dtype);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(softmax_ext, library) {
  Rules<Forward<Op::kSoftmax>>::define(library);
  Rules<Forward<Op::kLogSoftmax>>::define(library);
  Rules<Backward<Op::kSoftmax>>::define(library);
  Rules<Backward<Op::kLogSoftmax>>::define(library);
}

TORCH_LIBRARY_IMPL(softmax_ext, AutocastCUDA, library) {
  library.impl("softmax", TORCH_FN(autocast<Op::kSoftmax>));
  library.impl("log_softmax", TORCH_FN(autocast<Op::kLogSoftmax>));
}

}  // namespace softmax_ext
