// softmax and log-softmax on the CPU. Compiled once for each instruction set, which SOFTMAX_EXT_ISA names: so
// everything here and in the headers with a schedule is in an unnamed namespace or always inlined, or
// the linker could hand one instruction set's code to a processor without it.
#include "columns.h"
#include "dispatch.h"
#include "narrow_columns.h"
#include "rows.h"

namespace softmax_ext::cpu {
namespace {

template <Op op>
void launch_forward(const ForwardArgs& args, const Threads& threads) {
  const bool streamed = args.output != args.input && !is_placed(args) &&
                        is_streamed(args.shape, args.dims, args.output_strides, args.output,
                                    args.output_dtype, args.output_is_new);
  visit(args.output_dtype, [&](auto element) {
    using T = decltype(element);
    if (args.shape.inner == 1) {
      forward_rows<op, T>(args, threads, streamed);
    } else if (is_narrow(args.shape, args.output_dtype)) {
      if (args.shape.dim <= kShortDim) return forward_short_columns<op, T>(args, threads);
      forward_packed_columns<op, T>(args, threads);
    } else {
      forward_columns<op, T>(args, threads, streamed);
    }
  });
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_forward)(const ForwardArgs& args, const Threads& threads) {
  args.op == Op::kSoftmax ? launch_forward<Op::kSoftmax>(args, threads)
                          : launch_forward<Op::kLogSoftmax>(args, threads);
}

}  // namespace softmax_ext::cpu
