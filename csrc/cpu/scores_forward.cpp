// Softmax, log-softmax and logsumexp of scores on the CPU, compiled once for each instruction set as
// softmax_forward.cpp is. The schedules are those of rows.h:
//
//   rows         of at most a chunk, a few at a time; longer ones chunk by chunk, for their state and then
//                for the output.
//   split rows   fewer long rows than threads: the chunks of a row are shared out.
#include "dispatch.h"
#include "scores.h"

namespace softmax_ext::cpu {
namespace {

// The formula of a row, or of one in each lane. Of a safe row of which nothing takes part, 0 or -inf.
template <Op op, class T, class V>
SOFTMAX_EXT_INLINE forward_t<op, T> formula_of_scores(V max, V sum, V rest, bool is_safe) {
  if (!is_safe) return formula_of<op, T>(max, sum, rest);
  const typename V::Raw zero{};
  return formula_of<op, T>(shift_of(max), V(sum.raw == zero ? V(1).raw : sum.raw), rest);
}

// log(sum(exp(z))), of a row or of one in each lane.
template <class V>
SOFTMAX_EXT_INLINE V lse_of(V max, V sum, V rest) {
  const typename V::Raw zero{};
  V rest_of_log;
  const V log = log_of(V(sum.raw == zero ? V(1).raw : sum.raw), rest, &rest_of_log);
  return max + (log + rest_of_log);
}

// The same where an element is infinite, of which the sum knows only that it is not a number.
template <class A>
A lse_of_infinite(const A* z, Registers<A> registers, A lse) {
  for (int64_t i = registers.begin; i < registers.end; ++i) {
    if (z[i] != z[i]) return lse;
  }
  return -kLowest<A>;
}

// What takes no part in a row of which the result is NaN keeps its own.
template <class T, class A>
void store_dead(const A* z, T* y, int64_t n, Registers<A> registers, A dead) {
  for (int64_t i = registers.begin; i < std::min(registers.end, n); ++i) {
    if (z[i] == kLowest<A>) store(y + i, First{1}, Vec<A>(dead));
  }
}

template <Op op, class A>
constexpr A kDead = op == Op::kSoftmax ? A(0) : kLowest<A>;

// Some rows of a call.
template <class T, class A = compute_t<T>>
struct ScoreRows {
  Few<const T> x;
  Few<T> y;
  Few<A> lse;
  ScoresOfRows<A> scores;

  ScoreRows(const ScoreForwardArgs& args, const Place& place)
      : x(place.operator()<T>(args.input, args.input_strides)),
        y(place.operator()<T>(args.output, args.output_strides)),
        lse(place.operator()<A>(args.lse, args.lse_strides)),
        scores(args.scores, place, args.shape.dim) {}

  // Element i of row k, ahead of its use.
  SOFTMAX_EXT_INLINE void fetch(int64_t k, int64_t i) const {
    __builtin_prefetch(x[k] + i);
    scores.fetch_mask(k, i);
  }
};

// `count` rows of at most a chunk, or one.
template <Op op, class T>
void score_short_rows(const ScoreForwardArgs& args, const ScoreRows<T>& at, int64_t first,
                      int64_t count, bool streamed) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr bool kKeep = op == Op::kSoftmax;
  const int64_t dim = args.shape.dim, apart = round_up(dim, V::kSize) + V::kSize;
  const bool is_safe = args.scores.is_safe();
  alignas(64) A scratch[kChunk<A> + 2 * V::kSize];
  RowScores<A> rows[V::kSize];
  V lanes[V::kSize];
  alignas(64) A maxes[V::kSize] = {}, sinks[V::kSize] = {};
  const auto range_of = [&](int64_t r) SOFTMAX_EXT_LAMBDA { return rows[r].range; };
  for (int64_t r = 0; r < count; ++r) rows[r] = at.scores[first + r];
  Few<const T> x = at.x;
  x.skip(first);
  place_scores(x, scratch, apart, 0, dim, rows, count, lanes);
  max_over_lanes(lanes, count, maxes);
  if (args.scores.has_sink()) {
    for (int64_t r = 0; r < count; ++r) {
      sinks[r] = rows[r].sink;
      maxes[r] = std::max(sinks[r], maxes[r]);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    A* const z = scratch + r * apart;
    lanes[r] =
        sum_of_exp(z, Registers<A>(range_of(r)), maxes[r], [&](int64_t i, V e) SOFTMAX_EXT_LAMBDA {
          if constexpr (kKeep) store(z + i, All{}, e);
          // While there is enough to compute.
          if (streamed) at.fetch(first + count + r, i);
        });
  }
  ExactSum<V> sum = exact_sum_over_lanes(lanes, count);
  const V max = load(maxes, All{}, A(0));
  if (args.scores.has_sink()) {
    sum.add(exp_of_nonpositive(load(sinks, All{}, A(0)) - shift_of(max)));
  }
  if (args.lse != nullptr) {
    const V lse = lse_of(max, sum.sum, sum.rest);
    for (int64_t r = 0; r < count; ++r) {
      A value = lse.raw[r];
      if (args.output == nullptr && maxes[r] == -kLowest<A>) {
        value = lse_of_infinite(scratch + r * apart, Registers<A>(range_of(r)), value);
      }
      *at.lse[first + r] = value;
    }
  }
  if (args.output == nullptr) return;
  const auto formulas = formula_of_scores<op, T>(max, sum.sum, sum.rest, is_safe);
  for (int64_t r = 0; r < count; ++r) {
    const auto formula = of_lane(formulas, r);
    const Registers<A> registers(range_of(r));
    A* const z = scratch + r * apart;
    T* const y = at.y[first + r];
    const bool is_nan = is_safe && sum.sum.raw[r] != sum.sum.raw[r];
    // Before the output, which may be the input.
    alignas(64) A again[kKeep ? kChunk<A> + 2 * V::kSize : 1];
    if constexpr (kKeep) {
      if (is_nan) place_scores(x[r], again, 0, dim, rows[r]);
    }
    store_chunk(streamed, y, dim, registers, kDead<op, A>,
                [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
                  if constexpr (kKeep) {
                    return formula.of_exp(load(z + i, lanes, A(0)));
                  } else {
                    return formula.of(load(z + i, lanes, A(0)));
                  }
                });
    if (is_nan) store_dead(kKeep ? again : z, y, dim, registers, kDead<op, A>);
  }
}

template <Op op, class T>
void score_long_rows(const ScoreForwardArgs& args, const Threads& threads, bool streamed) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const int64_t dim = args.shape.dim;
  const bool is_safe = args.scores.is_safe();
  struct Row {
    const T* x;
    T* y;
    A* lse;
    RowScores<A> scores;
  };
  const auto row_of = [&](int64_t row) {
    int64_t index[Dims::kMax];
    const ScoreRows<T> rows(args, place_of(args.dims, row, index));
    return Row{rows.x[0], rows.y[0], rows.lse[0], rows.scores[0]};
  };
  // As forward_rows: the exps of a chunk are kept in the output's memory where a row stays in cache.
  constexpr bool kByChunk = op == Op::kSoftmax && std::is_same_v<T, A>;
  const bool by_chunk =
      kByChunk && args.output != nullptr && dim * static_cast<int64_t>(sizeof(A)) <= kKeptRow;
  // What is NaN is looked at again.
  const bool keeps = by_chunk && !streamed && !(is_safe && args.input == args.output);
  reduce_and_store<OnlineState<double>, A>(
      args.shape.rows(), dim, Unplaced{}, threads,
      [&](int64_t row, int64_t i, int64_t n) {
        const Row at = row_of(row);
        const Range range = within(at.scores.range, i, n);
        if (range.begin == range.end) return OnlineState<double>::empty();
        alignas(64) A z[kChunk<A> + 2 * V::kSize];
        const A max = max_over_lanes(place_scores(at.x, z, i, n, at.scores));
        const Registers<A> registers(range);
        T* const kept = keeps ? at.y + i : nullptr;
        const V sum = sum_of_exp(z, registers, max, [=](int64_t k, V e) SOFTMAX_EXT_LAMBDA {
          if constexpr (kByChunk) {
            if (kept == nullptr) return;
            if (k + V::kSize <= n) {
              store(kept + k, All{}, e);
            } else {
              store(kept + k, First{n - k}, e);
            }
          }
        });
        return OnlineState<double>{max, exact_sum_over_lanes(sum)};
      },
      [&](int64_t row, int64_t i, int64_t n, OnlineState<double> of_chunk,
          OnlineState<double> of_row) {
        using softmax_ext::combine;
        const Row at = row_of(row);
        if (args.scores.has_sink()) {
          const bool is_empty = at.scores.sink == kLowest<A>;
          of_row = combine(of_row, OnlineState<double>{at.scores.sink, is_empty ? 0.0 : 1.0});
        }
        alignas(64) A z[kChunk<A> + 2 * V::kSize];
        const A max = static_cast<A>(of_row.max), sum = static_cast<A>(of_row.sum);
        const A rest = static_cast<A>(of_row.sum - sum);
        if (args.lse != nullptr && i == 0) {
          A lse = lse_of(V(max), V(sum), V(rest)).raw[0];
          if (args.output == nullptr && max == -kLowest<A>) {
            A of_all = -kLowest<A>;
            for (int64_t j = 0; j < dim; j += kChunk<A>) {
              const int64_t size = std::min(kChunk<A>, dim - j);
              const Range range = within(at.scores.range, j, size);
              place_scores(at.x, z, j, size, at.scores);
              if (lse_of_infinite(z, Registers<A>(range), lse) != of_all) of_all = lse;
            }
            lse = of_all;
          }
          *at.lse = lse;
        }
        if (args.output == nullptr) return;
        const auto formula = formula_of_scores<op, T>(V(max), V(sum), V(rest), is_safe);
        const Range range = within(at.scores.range, i, n);
        const Registers<A> registers(range);
        T* const y = at.y + i;
        const bool is_nan = is_safe && of_row.sum != of_row.sum;
        if (is_nan || !keeps) place_scores(at.x, z, i, n, at.scores);
        const V weight(static_cast<A>(exp_of_difference(of_chunk.max, of_row.max)));
        const V shift = shift_of(V(static_cast<A>(of_chunk.max)));
        const A* const scores = z;
        store_chunk(streamed, y, n, registers, kDead<op, A>,
                    [=](int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
                      if constexpr (kByChunk) {
                        if (keeps) return formula.of_exp(load(y + k, lanes, A(0)) * weight);
                        const V s = load(scores + k, lanes, A(0));
                        return by_chunk ? formula.of_exp(exp_of_nonpositive(s - shift) * weight)
                                        : formula.of(s);
                      } else {
                        return formula.of(load(scores + k, lanes, A(0)));
                      }
                    });
        if (is_nan) store_dead(z, y, n, registers, kDead<op, A>);
      });
}

template <Op op, class T>
void score_rows(const ScoreForwardArgs& args, const Threads& threads, bool streamed) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim;
  if (dim > kChunk<A>) return score_long_rows<op, T>(args, threads, streamed);
  const int64_t apart = round_up(dim, Vec<A>::kSize) + Vec<A>::kSize;
  const int64_t few = std::clamp<int64_t>(kChunk<A> / apart, 1, Vec<A>::kSize);
  for_each_place<A>(args.shape, args.dims, few, {&args.input_strides, &args.output_strides},
                    threads, [&](const Place& place, int64_t size) {
                      const ScoreRows<T> rows(args, place);
                      for (int64_t r = 0; r < size; r += few) {
                        score_short_rows<op, T>(args, rows, r, std::min(few, size - r), streamed);
                      }
                    });
}

template <Op op>
void launch_score_forward(const ScoreForwardArgs& args, const Threads& threads) {
  const bool streamed = args.output != args.input && args.output != nullptr &&
                        is_streamed(args.shape, args.dims, args.output_strides, args.output,
                                    args.output_dtype, args.output_is_new);
  visit(args.output_dtype,
        [&](auto element) { score_rows<op, decltype(element)>(args, threads, streamed); });
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_score_forward)(const ScoreForwardArgs& args,
                                              const Threads& threads) {
  args.op == Op::kSoftmax ? launch_score_forward<Op::kSoftmax>(args, threads)
                          : launch_score_forward<Op::kLogSoftmax>(args, threads);
}

}  // namespace softmax_ext::cpu
