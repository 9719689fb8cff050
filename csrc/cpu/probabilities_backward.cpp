// The gradients of cross-entropy with probabilities on the CPU, compiled once for each instruction set as
// softmax_forward.cpp is. Each element is read from memory once, and each gradient written once. Chunks are had
// one by one, whatever rows they are of.
#include "dispatch.h"
#include "losses.h"
#include "softmax_ext/probabilities.h"

namespace softmax_ext::cpu {
namespace {

template <bool kGeneral, class T>
void gradients_of_probabilities(const ProbabilityBackwardArgs& args, const Threads& threads,
                                bool streamed) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const int64_t dim = args.shape.dim, chunks = ceil_div(dim, kChunk<A>);
  const Slices<const T> input(args.dims, args.input_strides, static_cast<const T*>(args.input));
  const Slices<const T> target(args.dims, args.target_strides, static_cast<const T*>(args.target));
  const Loss& loss = args.loss;
  const auto value = [](double x) { return V(static_cast<A>(x)); };
  const V of_target = value(1 - loss.smoothing);
  const V of_each = value(loss.smoothing / static_cast<double>(dim));
  const auto store_chunk = [&](int64_t t) {
    const int64_t row = t / chunks, first = t % chunks * kChunk<A>;
    const int64_t n = std::min(kChunk<A>, dim - first);
    const T* const x = input[row] + first;
    const ProbabilityRow<A> of_row = static_cast<const ProbabilityRow<A>*>(args.kept)[row];
    const V g = V(static_cast<const A*>(args.grad)[row * args.grad_step]) * value(args.grad_factor);
    const V shift(of_row.max), share(of_row.share), log_sum(of_row.log_sum);
    const ScoreOf<kGeneral, V> score_of(loss);
    if (args.grad_input != nullptr) {
      const T* const p = target[row] + first;
      V of_all = g * V(of_row.total);
      if (loss.z_loss != 0) {
        of_all = of_all + g * value(2 * loss.z_loss) * V(static_cast<const A*>(args.lse)[row]);
      }
      if (args.grad_lse != nullptr) of_all = of_all + V(static_cast<const A*>(args.grad_lse)[row]);
      of_all = of_all * share;
      store_each<T>(streamed, static_cast<T*>(args.grad_input) + row * dim + first, n,
                    [=, &loss](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
                      const V z = score_of(load(x + i, lanes, A(0)));
                      const V u = weights_of<A>(loss, first + i, lanes) *
                                  fma_of(load(p + i, lanes, A(0)), of_target, of_each);
                      return score_of.gradient(of_all * exp_of_nonpositive(z - shift) - g * u, z);
                    });
    }
    if (args.grad_target != nullptr) {
      store_each<T>(streamed, static_cast<T*>(args.grad_target) + row * dim + first, n,
                    [=, &loss](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
                      const V z = score_of(load(x + i, lanes, A(0)));
                      return g * of_target * weights_of<A>(loss, first + i, lanes) *
                             (log_sum - (z - shift));
                    });
    }
  };
  parallel_for(threads, args.shape.rows() * chunks, grain<A>(2 * std::min(dim, kChunk<A>)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) store_chunk(t);
               });
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_probability_backward)(const ProbabilityBackwardArgs& args,
                                                     const Threads& threads) {
  bool streamed = true;
  for (void* const grad : {args.grad_input, args.grad_target}) {
    streamed &= grad == nullptr ||
                is_streamed(args.shape, contiguous_dims(args.shape), contiguous_strides(args.shape),
                            grad, args.dtype, args.grads_are_new);
  }
  const bool is_general = args.loss.factor != 1 || args.loss.softcap != 0;
  visit(args.dtype, [&](auto element) {
    using T = decltype(element);
    is_general ? gradients_of_probabilities<true, T>(args, threads, streamed)
               : gradients_of_probabilities<false, T>(args, threads, streamed);
  });
}

}  // namespace softmax_ext::cpu
