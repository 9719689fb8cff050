// Cross-entropy with probabilities on the CPU, compiled once for each instruction set as softmax_forward.cpp is.
// Each element is read from memory once, chunk by chunk; the chunks of fewer rows than threads are shared out.
#include "dispatch.h"
#include "losses.h"
#include "softmax_ext/probabilities.h"

namespace softmax_ext::cpu {
namespace {

template <class V>
struct ProbabilitySums {
  static constexpr int kSize = V::kSize;
  V exp, score, total;

  friend SOFTMAX_EXT_INLINE ProbabilitySums operator+(ProbabilitySums a, ProbabilitySums b) {
    return {a.exp + b.exp, a.score + b.score, a.total + b.total};
  }
};

// What a chunk adds to its row.
struct ProbabilityState {
  double max, exp;      // exp: of exp(z - max)
  double score, total;  // of u (z - max), of u
};

SOFTMAX_EXT_INLINE ProbabilityState combine(ProbabilityState a, ProbabilityState b) {
  const double max = softmax_ext::max_of(a.max, b.max), shift = shift_by(max);
  const auto score = [=](const ProbabilityState& of) SOFTMAX_EXT_LAMBDA {
    return of.score + of.total * (shift_by(of.max) - shift);
  };
  return {max, a.exp * exp_of_difference(a.max, max) + b.exp * exp_of_difference(b.max, max),
          score(a) + score(b), a.total + b.total};
}

template <bool kGeneral, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE ProbabilityState state_of(const Loss& loss, const T* x, const T* t,
                                             int64_t first, int64_t n, int64_t dim) {
  using V = Vec<A>;
  const ScoreOf<kGeneral, V> score_of(loss);
  const V max = score_of(V(max_over_lanes(lane_max(x, n)))), shift = shift_of(max);
  const V of_target(static_cast<A>(1 - loss.smoothing));
  const V of_each(static_cast<A>(loss.smoothing / static_cast<double>(dim)));
  const ProbabilitySums<V> sums = fold(
      n, ProbabilitySums<V>{V(A(0)), V(A(0)), V(A(0))},
      [=](ProbabilitySums<V> sum, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        const V z = score_of(load(x + i, lanes, A(0))) - shift;
        const V u = weights_of<A>(loss, first + i, lanes) *
                    fma_of(load(t + i, lanes, A(0)), of_target, of_each);
        const V e = filled(exp_of_nonpositive(z), lanes, A(0));
        return ProbabilitySums<V>{sum.exp + e, sum.score + u * z, sum.total + u};
      },
      Add{});
  return {static_cast<double>(max.raw[0]), exact_sum_over_lanes(sums.exp),
          exact_sum_over_lanes(sums.score), exact_sum_over_lanes(sums.total)};
}

template <bool kGeneral, class T>
void loss_of_probabilities(const ProbabilityForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  const int64_t rows = args.shape.rows(), dim = args.shape.dim, chunk = kChunk<A>;
  const int64_t chunks = ceil_div(dim, chunk);
  const Slices<const T> input(args.dims, args.input_strides, static_cast<const T*>(args.input));
  const Slices<const T> target(args.dims, args.target_strides, static_cast<const T*>(args.target));
  const auto look = [&](int64_t row, int64_t k) {
    return state_of<kGeneral>(args.loss, input[row] + k * chunk, target[row] + k * chunk, k * chunk,
                              std::min(chunk, dim - k * chunk), dim);
  };
  const auto store_row = [&](int64_t row, const ProbabilityState* states) {
    ProbabilityState state = states[0];
    for (int64_t k = 1; k < chunks; ++k) state = combine(state, states[k]);
    const double shift = shift_by(state.max), log_sum = softmax_ext::log_of(state.exp);
    const double lse = shift + log_sum;
    static_cast<A*>(args.row_loss)[row] =
        static_cast<A>(state.total * log_sum - state.score +
                       (args.loss.z_loss == 0 ? 0 : args.loss.z_loss * lse * lse));
    static_cast<A*>(args.lse)[row] = static_cast<A>(lse);
    static_cast<ProbabilityRow<A>*>(args.kept)[row] = {
        static_cast<A>(shift), static_cast<A>(1 / state.exp), static_cast<A>(log_sum),
        static_cast<A>(state.total)};
  };
  const Buffer<ProbabilityState> buffer(rows >= threads.count ? 1 : rows * chunks);
  if (rows >= threads.count) {
    parallel_for(threads, rows, grain<A>(2 * dim), [&](int64_t begin, int64_t end) {
      const Buffer<ProbabilityState> states(chunks);
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t k = 0; k < chunks; ++k) states.data()[k] = look(row, k);
        store_row(row, states.data());
      }
    });
    return;
  }
  parallel_for(threads, rows * chunks, grain<A>(2 * chunk), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) buffer.data()[t] = look(t / chunks, t % chunks);
  });
  for (int64_t row = 0; row < rows; ++row) store_row(row, buffer.data() + row * chunks);
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_probability_forward)(const ProbabilityForwardArgs& args,
                                                    const Threads& threads) {
  const bool is_general = args.loss.factor != 1 || args.loss.softcap != 0;
  visit(args.dtype, [&](auto element) {
    using T = decltype(element);
    is_general ? loss_of_probabilities<true, T>(args, threads)
               : loss_of_probabilities<false, T>(args, threads);
  });
}

}  // namespace softmax_ext::cpu
