// The gradient of cross-entropy on the CPU, compiled once for each instruction set as softmax_forward.cpp is.
// Each element is read once and written once. The schedules are those of losses_forward.cpp; chunks of long
// rows are had one by one, whatever rows they are of.
#include "dispatch.h"
#include "losses.h"

namespace softmax_ext::cpu {
namespace {

// Of `count` rows from `row` on, `next` apart, with their targets.
template <class A>
SOFTMAX_EXT_INLINE LossRows<Vec<A>> loss_rows(const LossBackwardArgs& args, int64_t row,
                                              int64_t next, int64_t count, const int64_t* target) {
  const auto of_rows = [=](const void* data)
                           SOFTMAX_EXT_LAMBDA { return load_rows<A>(data, row, next, count); };
  return loss_rows<A>(args.loss, args.shape.dim, args.grads, row, next, count,
                      Targets<A>(args.loss, target, next, count),
                      {of_rows(args.lse), of_rows(args.lse_rest), of_rows(args.log_p),
                       args.entropy == nullptr ? Vec<A>(A(0)) : of_rows(args.entropy)});
}

template <bool kGeneral, class T>
void gradient_of_rows(const LossBackwardArgs& args, const Threads& threads, bool streamed) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim;
  const Strides of_rows = row_strides(args.dims, 1);
  const Slices<const T> input(args.dims, args.input_strides, static_cast<const T*>(args.input));
  const Slices<T> output(args.dims, args.grad_input_strides, static_cast<T*>(args.grad_input));
  const auto rows_of = [&](const int64_t* target, int64_t next, int64_t count) {
    return loss_rows<A>(args, target - args.loss.target, next, count, target);
  };
  if (dim <= kChunk<A>) {
    const Slices<const int64_t> target(args.dims, of_rows, args.loss.target);
    for_each_few_rows<A>(
        args.shape, args.dims, InPlace{}, kChunk<A> / 2, threads,
        [&](int64_t count, const Few<const T>& x, const Few<const int64_t>& targets,
            const Few<T>& y) {
          const auto rows = rows_of(targets.first, targets.next, count);
          for (int64_t r = 0; r < count; ++r) {
            store_loss_gradient<kGeneral>(streamed, args.loss, args.grads, x[r], y[r], 0, dim,
                                          targets.first[r * targets.next], of_lane(rows, r));
          }
        },
        input, target, output);
    return;
  }
  const int64_t chunks = ceil_div(dim, kChunk<A>);
  parallel_for(
      threads, args.shape.rows() * chunks, grain<A>(kChunk<A>), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin / chunks; row * chunks < end; ++row) {
          const int64_t first = std::max<int64_t>(begin - row * chunks, 0) * kChunk<A>;
          const int64_t n = std::min(dim, (end - row * chunks) * kChunk<A>) - first;
          const int64_t* const target = args.loss.target + row;
          store_loss_gradient<kGeneral>(streamed, args.loss, args.grads, input[row], output[row],
                                        first, n, *target, of_lane(rows_of(target, 1, 1), 0));
        }
      });
}

template <bool kGeneral, class T>
void gradient_of_columns(const LossBackwardArgs& args, const Threads& threads, bool streamed) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kSize = V::kSize;
  const int64_t inner = args.shape.inner;
  const int64_t step = args.input_strides.dim, y_step = args.grad_input_strides.dim;
  const Slices<const T> input(args.dims, args.input_strides, static_cast<const T*>(args.input));
  const Slices<T> output(args.dims, args.grad_input_strides, static_cast<T*>(args.grad_input));
  for_each_tile<A>(args.shape, threads, [&](int64_t slice, int64_t column, int64_t width) {
    const int64_t row = slice * inner + column;
    const int64_t* const target = args.loss.target + row;
    LossRows<V> rows[kTile<A> / kSize];
    for (int64_t c = 0; c < width; c += kSize) {
      rows[c / kSize] =
          loss_rows<A>(args, row + c, 1, std::min<int64_t>(kSize, width - c), target + c);
    }
    store_loss_gradient<kGeneral, T>(streamed, args.loss, args.grads, args.shape.dim, width, target,
                                     rows, {input[slice] + column, step},
                                     {output[slice] + column, y_step});
  });
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_loss_backward)(const LossBackwardArgs& args,
                                              const Threads& threads) {
  const bool streamed = is_streamed(args.shape, args.dims, args.grad_input_strides, args.grad_input,
                                    args.dtype, args.grad_input_is_new);
  visit(args.dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_general = args.loss.is_general() || args.grads.entropy != nullptr;
    if (args.shape.inner > 1) {
      return is_general ? gradient_of_columns<true, T>(args, threads, streamed)
                        : gradient_of_columns<false, T>(args, threads, streamed);
    }
    is_general ? gradient_of_rows<true, T>(args, threads, streamed)
               : gradient_of_rows<false, T>(args, threads, streamed);
  });
}

}  // namespace softmax_ext::cpu
