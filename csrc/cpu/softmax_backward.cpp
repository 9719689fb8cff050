// Their gradients on the CPU. Compiled once for each instruction set, which SOFTMAX_EXT_ISA names: so
// everything here and in the headers with a schedule is in an unnamed namespace or always inlined, or
// the linker could hand one instruction set's code to a processor without it.
#include "columns.h"
#include "dispatch.h"
#include "narrow_columns.h"
#include "rows.h"

namespace softmax_ext::cpu {
namespace {

template <Op op, class T, class G = T>
void launch_backward(const BackwardArgs& args, const Threads& threads, bool streamed) {
  if (args.shape.inner == 1) return backward_rows<op, T, G>(args, threads, streamed);
  if constexpr (std::is_same_v<T, G>) {
    const int64_t dim = args.shape.dim, inner = args.shape.inner;
    const bool is_short = dim <= kShortDim,
               gathered = !is_in_registers<T, Pass::kBackward>(inner, false);
    const bool narrow = is_narrow(args.shape, args.output_dtype);
    if (narrow && dim > (gathered ? kGatheredDim : kShortDim)) {
      return backward_packed_columns<op, T>(args, threads);
    }
    // Wider slices are not gathered, and one is not shared by threads.
    const bool in_place =
        args.grad_input == args.grad_output || args.grad_input == args.output || is_placed(args);
    if (narrow || (is_short && !streamed && !is_far<T>(args.output_strides.dim) &&
                   args.shape.outer >= threads.count &&
                   is_in_registers<T, Pass::kBackward>(inner, in_place))) {
      return backward_short_columns<op, T>(args, threads);
    }
  }
  backward_columns<op, T, G>(args, threads, streamed);
}

// The types are those of is_native: one, or those of the casts of mixed precision.
template <Op op>
void launch_backward(const BackwardArgs& args, const Threads& threads) {
  if (args.grad_input_dtype != args.output_dtype) {
    return args.grad_input_dtype == DType::kFloat16
               ? launch_backward<op, float, Float16>(args, threads, /*streamed=*/false)
               : launch_backward<op, float, BFloat16>(args, threads, /*streamed=*/false);
  }
  const bool streamed = args.grad_input != args.grad_output && args.grad_input != args.output &&
                        !is_placed(args) &&
                        is_streamed(args.shape, args.dims, args.grad_input_strides, args.grad_input,
                                    args.grad_input_dtype, args.grad_input_is_new);
  visit(args.output_dtype,
        [&](auto element) { launch_backward<op, decltype(element)>(args, threads, streamed); });
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_backward)(const BackwardArgs& args, const Threads& threads) {
  args.op == Op::kSoftmax ? launch_backward<Op::kSoftmax>(args, threads)
                          : launch_backward<Op::kLogSoftmax>(args, threads);
}

}  // namespace softmax_ext::cpu
