// Cross-entropy on the CPU, compiled once for each instruction set as softmax_forward.cpp is. Each element is
// read once, and where its gradient is made as well, once more from a cache. The schedules, with those of
// rows.h and columns.h:
//
//   rows         of at most a chunk, a few at a time; longer ones chunk by chunk.
//   split rows   fewer long rows than threads: the chunks of a row are shared out.
//   columns      inner sizes above 1: tiles of neighbouring columns, in blocks along dim.
//
// A general call makes scores of the elements of a row first, in a buffer.
#include "dispatch.h"
#include "losses.h"

namespace softmax_ext::cpu {
namespace {

// The sum of exp(z - max): what the largest elements add, 1 each, and all others. Where a row is sure of one
// class, the others are what its loss and gradient are made of, and beside a 1 they would be lost.
template <class S>
struct ExpSum {
  S ones, others;
};

template <class V>
SOFTMAX_EXT_INLINE ExpSum<V> operator+(ExpSum<V> a, ExpSum<V> b) {
  return {a.ones + b.ones, a.others + b.others};
}

// Of z - max.
template <class V>
SOFTMAX_EXT_INLINE ExpSum<V> exp_sum_of(V below_max) {
  const typename V::Raw zero{}, one = V(1).raw;
  const V e = exp_of_nonpositive(below_max);
  const auto is_max = below_max.raw == zero;
  return {V(is_max ? one : zero), V(is_max ? zero : e.raw)};
}

// The sum for a larger max.
template <class V>
SOFTMAX_EXT_INLINE ExpSum<ExactSum<V>> rescaled(ExpSum<ExactSum<V>> sum, V old_max, V max) {
  const typename V::Raw zero{};
  const auto is_same = old_max.raw == max.raw;
  const V ones = sum.ones.sum;
  sum.others.add(V(is_same ? zero : ones.raw));
  sum.others.scale(exp_of_nonpositive(old_max - shift_of(max)));
  return {V(is_same ? ones.raw : zero), sum.others};
}

// log(ones + others) and what it is rounded off.
template <class V>
SOFTMAX_EXT_INLINE V log_of(V ones, ExactSum<V> others, V* rest) {
  V rest_of_sum;
  const V sum = sum_of(ones, others.sum, &rest_of_sum);
  return log_of(sum, zero_if_nan(rest_of_sum + others.rest), rest);
}

// What is summed of the scores of a row, lane by lane.
template <class V>
struct LossSums {
  static constexpr int kSize = V::kSize;
  ExpSum<V> exp;
  V score;    // of w (z - shift)
  V weight;   // of w
  V product;  // of exp(z - shift) (z - shift)

  friend SOFTMAX_EXT_INLINE LossSums operator+(LossSums a, LossSums b) {
    return {a.exp + b.exp, a.score + b.score, a.weight + b.weight, a.product + b.product};
  }
};

// What a chunk of a long row adds to it.
struct LossState {
  double max;
  ExpSum<double> exp;
  double score;      // of w z
  double product;    // of exp(z - max) (z - max)
  double of_target;  // the score of the target, in its chunk
};

SOFTMAX_EXT_INLINE LossState combine(LossState a, LossState b) {
  const double max = softmax_ext::max_of(a.max, b.max);
  const auto rescale = [=](LossState& state) SOFTMAX_EXT_LAMBDA {
    if (state.max == max) return;
    const double sum = state.exp.ones + state.exp.others;
    const double factor = exp_of_difference(state.max, max);
    if (sum != 0) state.product = (state.product + (state.max - max) * sum) * factor;
    state.exp = {0.0, sum * factor};
  };
  rescale(a);
  rescale(b);
  return {max,
          {a.exp.ones + b.exp.ones, a.exp.others + b.exp.others},
          a.score + b.score,
          a.product + b.product,
          a.of_target + b.of_target};
}

// The sums of n scores from z on, which are those of classes from `first` on. ahead(i), at element i, fetches
// what is read next.
template <bool kGeneral, class E, class Ahead, class A = compute_t<E>>
SOFTMAX_EXT_INLINE LossSums<Vec<A>> sums_of(const Loss& loss, bool wants_entropy, const E* z,
                                            int64_t first, int64_t n, A max, Ahead ahead) {
  using V = Vec<A>;
  const V shift = shift_of(V(max)), zero(A(0));
  const LossSums<V> none{{zero, zero}, zero, zero, zero};
  if constexpr (kGeneral) {
    if (wants_entropy) {
      const bool is_smooth = loss.smoothing != 0;
      const A fill = shift.raw[0];
      return fold(
          n, none,
          [=](LossSums<V> sums, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
            ahead(i);
            const V below = load(z + i, lanes, kLowest<A>) - shift;
            const ExpSum<V> e = exp_sum_of(below);
            sums.exp = sums.exp + e;
            sums.product = sums.product + e.others * at_least_finite(below);
            if (is_smooth) {
              const V w = weights_of<A>(loss, first + i, lanes);
              sums.score = sums.score + w * (load(z + i, lanes, fill) - shift);
              sums.weight = sums.weight + w;
            }
            return sums;
          },
          Add{});
    }
    if (loss.smoothing != 0) {
      const A fill = shift.raw[0];
      return fold(
          n, none,
          [=](LossSums<V> sums, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
            ahead(i);
            const V w = weights_of<A>(loss, first + i, lanes);
            return sums + LossSums<V>{exp_sum_of(load(z + i, lanes, kLowest<A>) - shift),
                                      w * (load(z + i, lanes, fill) - shift), w, zero};
          },
          Add{});
    }
  }
  return fold(
      n, none,
      [=](LossSums<V> sums, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        ahead(i);
        sums.exp = sums.exp + exp_sum_of(load(z + i, lanes, kLowest<A>) - shift);
        return sums;
      },
      Add{});
}

// Stores what is known of `count` rows from `row` on, `next` apart, each in its lane: log_sum is that of
// exp(z - shift), and log_rest what it is rounded off; of_target is the target's score, score
// sum(w (z - shift)), and mean the sum of p (z - shift).
template <bool kGeneral, class A>
SOFTMAX_EXT_INLINE LossNumbers<Vec<A>> store_losses(const LossForwardArgs& args, int64_t row,
                                                    int64_t next, int64_t count,
                                                    const Targets<A>& targets, Vec<A> max,
                                                    Vec<A> log_sum, Vec<A> log_rest,
                                                    Vec<A> of_target, Vec<A> score, Vec<A> mean) {
  using V = Vec<A>;
  const Loss& of = args.loss;
  const V shift = shift_of(max), lowest(kLowest<A>);
  V rest;
  V lse = sum_of(shift, log_sum, &rest);
  lse = max.raw == lowest.raw ? max.raw : lse.raw;
  rest = zero_if_nan(rest + log_rest);
  const V log_p = (of_target - lse) - rest;
  V loss = -log_p, smooth(A(0));
  if constexpr (kGeneral) {
    const auto value = [](double x) SOFTMAX_EXT_LAMBDA { return V(static_cast<A>(x)); };
    if (of.smoothing != 0) {
      loss = loss * value(1 - of.smoothing);
      smooth = (value(of.weight_sum) * ((lse - shift) + rest) - score) *
               value(of.smoothing / static_cast<double>(args.shape.dim));
    }
    if (of.z_loss != 0) loss = loss + value(of.z_loss) * lse * lse;
  }
  loss = loss * targets.weight + smooth;
  loss = targets.if_counts(loss);
  store_rows(args.row_loss, row, next, count, loss);
  store_rows(args.lse, row, next, count, lse);
  store_rows(args.lse_rest, row, next, count, rest);
  store_rows(args.log_p, row, next, count, log_p);
  if (kGeneral && args.entropy != nullptr) {
    store_rows(args.entropy, row, next, count, (log_sum - mean) + zero_if_nan(log_rest));
  }
  return {lse, rest, log_p, V(A(0))};
}

// The gradient of rows of which a forward call knows the numbers.
template <class A>
SOFTMAX_EXT_INLINE LossRows<Vec<A>> loss_rows(const LossForwardArgs& args, int64_t row,
                                              int64_t next, int64_t count,
                                              const Targets<A>& targets,
                                              const LossNumbers<Vec<A>>& numbers) {
  return loss_rows<A>(args.loss, args.shape.dim, args.grads, row, next, count, targets, numbers);
}

// Whether any of these rows is read.
inline bool is_read(const LossForwardArgs& args, const int64_t* target, int64_t next,
                    int64_t count) {
  if (args.wants_lse) return true;
  for (int64_t k = 0; k < count; ++k) {
    if (target[k * next] != args.loss.ignore_index) return true;
  }
  return false;
}

// Stores the numbers of rows that are not read, and gives them.
template <class A>
SOFTMAX_EXT_INLINE LossNumbers<Vec<A>> store_ignored(const LossForwardArgs& args, int64_t row,
                                                     int64_t next, int64_t count) {
  const Vec<A> zero(A(0));
  for (void* const data : {args.row_loss, args.lse, args.lse_rest, args.log_p}) {
    store_rows(data, row, next, count, zero);
  }
  return {zero, zero, zero, zero};
}

// Where the gradient of a call with one goes: over its input.
template <class T>
T* gradient_over(const LossForwardArgs& args, const T* input) {
  return static_cast<T*>(args.grad_input) + (input - static_cast<const T*>(args.input));
}

// The score of the target of each of `count` rows, in its lane; of a row that is ignored, anything.
template <bool kGeneral, class T, class Row, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Vec<A> scores_of_targets(const Loss& loss, const Targets<A>& targets,
                                            int64_t count, Row row) {
  using V = Vec<A>;
  alignas(64) A elements[V::kSize] = {};
  for (int64_t k = 0; k < count; ++k) {
    const T* const x = row(k);
    elements[k] = to_float(x[std::max<int64_t>(targets.target[k], 0)]);
  }
  return ScoreOf<kGeneral, V>(loss)(load(elements, All{}, A(0)));
}

// `count` rows, together or alone at most a chunk; target is of the first.
template <bool kGeneral, class T, class A = compute_t<T>>
LossNumbers<Vec<A>> loss_of_short_rows(const LossForwardArgs& args, const Few<const T>& x,
                                       const Few<const int64_t>& target, int64_t count) {
  using V = Vec<A>;
  const int64_t dim = args.shape.dim, row = target.first - args.loss.target;
  if (!is_read(args, target.first, target.next, count)) {
    return store_ignored<A>(args, row, target.next, count);
  }
  const int64_t apart = round_up(dim, V::kSize);
  alignas(64) A scratch[kGeneral ? kChunk<A> + V::kSize : 1];
  const ScoreOf<kGeneral, V> score_of(args.loss);
  const auto scores_of = [&](int64_t r) SOFTMAX_EXT_LAMBDA {
    if constexpr (kGeneral) {
      return static_cast<const A*>(scratch + r * apart);
    } else {
      return x[r];
    }
  };
  const bool wants_entropy = kGeneral && args.entropy != nullptr;
  V lanes[V::kSize], ones_of_lanes[V::kSize];
  alignas(64) A maxes[V::kSize] = {}, ones[V::kSize] = {}, scores[V::kSize] = {};
  alignas(64) A products[V::kSize] = {};
  for (int64_t r = 0; r < count; ++r) {
    if constexpr (kGeneral) {
      A* const z = scratch + r * apart;
      const T* const from = x[r];
      for_each_vector<V::kSize>(dim, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        store(z + i, All{}, score_of(load(from + i, lanes, A(0))));
      });
    }
    lanes[r] = lane_max(scores_of(r), dim);
  }
  max_over_lanes(lanes, count, maxes);
  for (int64_t r = 0; r < count; ++r) {
    const auto sums = sums_of<kGeneral>(args.loss, wants_entropy, scores_of(r), 0, dim, maxes[r],
                                        [](int64_t) SOFTMAX_EXT_LAMBDA {});
    lanes[r] = sums.exp.others;
    ones_of_lanes[r] = sums.exp.ones;
    if (kGeneral && args.loss.smoothing != 0) scores[r] = sum_over_lanes(sums.score);
    if (wants_entropy) products[r] = sum_over_lanes(sums.product);
  }
  sum_over_lanes(ones_of_lanes, count, ones);
  const auto others = exact_sum_over_lanes(lanes, count);
  const V of_max = load(ones, All{}, A(0));
  V log_rest;
  const V log_sum = log_of(of_max, others, &log_rest);
  const Targets<A> targets(args.loss, target.first, target.next, count);
  const V of_target = scores_of_targets<kGeneral, T>(
      args.loss, targets, count, [&](int64_t r) SOFTMAX_EXT_LAMBDA { return x[r]; });
  return store_losses<kGeneral>(args, row, target.next, count, targets, load(maxes, All{}, A(0)),
                                log_sum, log_rest, of_target, load(scores, All{}, A(0)),
                                load(products, All{}, A(0)) / (of_max + others.sum));
}

template <bool kGeneral, class T>
void loss_of_rows(const LossForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const int64_t dim = args.shape.dim;
  const Strides of_rows = row_strides(args.dims, 1);
  const Slices<const T> input(args.dims, args.input_strides, static_cast<const T*>(args.input));
  if (dim <= kChunk<A>) {
    const Slices<const int64_t> target(args.dims, of_rows, args.loss.target);
    for_each_few_rows<A>(
        args.shape, args.dims, InPlace{}, kChunk<A> / 2, threads,
        [&](int64_t count, const Few<const T>& x, const Few<const int64_t>& targets) {
          const auto numbers = loss_of_short_rows<kGeneral, T>(args, x, targets, count);
          if (args.grad_input == nullptr) return;
          const auto rows =
              loss_rows<A>(args, targets.first - args.loss.target, targets.next, count,
                           Targets<A>(args.loss, targets.first, targets.next, count), numbers);
          for (int64_t r = 0; r < count; ++r) {
            store_loss_gradient<kGeneral>(/*streamed=*/false, args.loss, args.grads, x[r],
                                          gradient_over(args, x[r]), 0, dim,
                                          targets.first[r * targets.next], of_lane(rows, r));
          }
        },
        input, target);
    return;
  }
  const ScoreOf<kGeneral, V> score_of(args.loss);
  reduce_and_store<LossState, A>(
      args.shape.rows(), dim, Unplaced{}, threads,
      [&](int64_t row, int64_t i, int64_t n) {
        const int64_t* const target = args.loss.target + row;
        if (!is_read(args, target, 1, 1)) return LossState{};
        const T* const x = input[row] + i;
        const int64_t place = *target == args.loss.ignore_index ? -1 : *target - i;
        const auto state_of = [&](const auto* z) {
          const A max = max_over_lanes(lane_max(z, n));
          const auto sums =
              sums_of<kGeneral>(args.loss, args.entropy != nullptr, z, i, n, max,
                                [=](int64_t k) SOFTMAX_EXT_LAMBDA { fetch(x + n + k); });
          const double shift = shift_by(static_cast<double>(max));
          return LossState{max,
                           {sum_over_lanes(sums.exp.ones), exact_sum_over_lanes(sums.exp.others)},
                           sum_over_lanes(sums.score) + shift * sum_over_lanes(sums.weight),
                           sum_over_lanes(sums.product),
                           place < 0 || place >= n ? 0.0 : static_cast<double>(to_float(z[place]))};
        };
        if constexpr (kGeneral) {
          alignas(64) A scratch[kChunk<A> + V::kSize];
          A* const z = scratch;
          for_each_vector<V::kSize>(n, [=](int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
            store(z + k, All{}, score_of(load(x + k, lanes, A(0))));
          });
          return state_of(static_cast<const A*>(z));
        } else {
          return state_of(x);
        }
      },
      [&](int64_t row, int64_t i, int64_t n, LossState, LossState of_row) {
        const bool is_first = i == 0, has_gradient = args.grad_input != nullptr;
        if (!is_first && !has_gradient) return;
        const int64_t* const target = args.loss.target + row;
        const Targets<A> targets(args.loss, target, 1, 1);
        LossNumbers<V> numbers;
        if (!is_read(args, target, 1, 1)) {
          numbers = store_ignored<A>(args, row, 1, is_first);
        } else {
          const A others = static_cast<A>(of_row.exp.others);
          const A rest_of_others = static_cast<A>(of_row.exp.others - others);
          V log_rest;
          const V log_sum = log_of(V(static_cast<A>(of_row.exp.ones)),
                                   ExactSum<V>(V(others), V(rest_of_others)), &log_rest);
          const double shift = shift_by(of_row.max);
          numbers = store_losses<kGeneral>(
              args, row, 1, is_first, targets, V(static_cast<A>(of_row.max)), log_sum, log_rest,
              V(static_cast<A>(of_row.of_target)),
              V(static_cast<A>(of_row.score - shift * args.loss.weight_sum)),
              V(static_cast<A>(of_row.product / (of_row.exp.ones + of_row.exp.others))));
        }
        if (!has_gradient) return;
        const auto rows = loss_rows<A>(args, row, 1, 1, targets, numbers);
        store_loss_gradient<kGeneral>(/*streamed=*/false, args.loss, args.grads, input[row],
                                      gradient_over(args, input[row]), i, n, *target,
                                      of_lane(rows, 0));
      });
}

template <bool kGeneral, class T>
void loss_of_columns(const LossForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kSize = V::kSize;
  constexpr int64_t kVectors = kTile<A> / kSize;
  const int64_t dim = args.shape.dim, inner = args.shape.inner, step = args.input_strides.dim;
  const Slices<const T> input(args.dims, args.input_strides, static_cast<const T*>(args.input));
  const ScoreOf<kGeneral, V> score_of(args.loss);
  const bool is_smooth = kGeneral && args.loss.smoothing != 0;
  const bool wants_entropy = kGeneral && args.entropy != nullptr;
  struct Columns {
    V max{kLowest<A>}, of_target{A(0)}, score{A(0)}, product{A(0)};
    ExpSum<ExactSum<V>> exp{V(A(0)), V(A(0))};
  };
  for_each_tile<A>(args.shape, threads, [&](int64_t slice, int64_t column, int64_t width) {
    const T* const tile = input[slice] + column;
    const int64_t row = slice * inner + column;
    const int64_t* const target = args.loss.target + row;
    const bool any_is_read = is_read(args, target, 1, width);
    const int64_t vectors = ceil_div(width, kSize);
    Columns columns[kVectors];
    double weight = 0;  // of the steps so far
    for_each_block(any_is_read ? dim : 0, [&](int64_t begin, int64_t end) SOFTMAX_EXT_LAMBDA {
      const V so_far(static_cast<A>(weight));
      const T* const x = tile + begin * step;
      // A register of columns: all of its steps, of which it has several, are read before any is used.
      const auto add = [=, &columns](int64_t c, auto lanes, auto steps) SOFTMAX_EXT_LAMBDA {
        Columns& state = columns[c / kSize];
        const Targets<A> targets(args.loss, target + c, 1, std::min<int64_t>(kSize, width - c));
        V z[kBlock], max = state.max;
        for (int k = 0; k < steps; ++k) {
          z[k] = score_of(load(x + k * step + c, lanes, A(0)));
          max = max_of(z[k], max);
        }
        const V shift = shift_of(max);
        ExpSum<V> sum{V(A(0)), V(A(0))};
        V product(A(0));
        if (is_smooth) state.score = state.score + so_far * (shift_of(state.max) - shift);
        for (int k = 0; k < steps; ++k) {
          state.of_target = targets.if_is(begin + k, z[k], state.of_target);
          const V below = z[k] - shift;
          const ExpSum<V> e = exp_sum_of(below);
          sum = sum + e;
          if (wants_entropy) product = product + e.others * at_least_finite(below);
          if (is_smooth) {
            state.score = state.score + V(weight_of<A>(args.loss, begin + k)) * (z[k] - shift);
          }
        }
        if (wants_entropy) {
          const V so_far_summed = state.exp.ones.sum + state.exp.others.sum;
          const V more = (shift_of(state.max) - shift) * so_far_summed;
          state.product = (state.product + more) * exp_of_nonpositive(state.max - shift) + product;
        }
        state.exp = rescaled(state.exp, state.max, max);
        state.exp.ones.add(sum.ones);
        state.exp.others.add(sum.others);
        state.max = max;
      };
      for_each_vector<kSize>(width, [=](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
        if (end - begin == kBlock) {
          add(c, lanes, std::integral_constant<int, kBlock>{});
        } else {
          add(c, lanes, static_cast<int>(end - begin));
        }
      });
      if (is_smooth) {
        for (int64_t d = begin; d < end; ++d) {
          weight += static_cast<double>(weight_of<A>(args.loss, d));
        }
      }
    });
    LossRows<V> rows[kVectors];
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t c = v * kSize, count = std::min<int64_t>(kSize, width - c);
      const Columns& state = columns[v];
      const Targets<A> targets(args.loss, target + c, 1, count);
      LossNumbers<V> numbers;
      if (any_is_read) {
        V log_rest;
        const V log_sum = log_of(state.exp.ones.sum, state.exp.others, &log_rest);
        numbers = store_losses<kGeneral>(
            args, row + c, 1, count, targets, state.max, log_sum, log_rest, state.of_target,
            state.score, state.product / (state.exp.ones.sum + state.exp.others.sum));
      } else {
        numbers = store_ignored<A>(args, row + c, 1, count);
      }
      if (args.grad_input != nullptr) {
        rows[v] = loss_rows<A>(args, row + c, 1, count, targets, numbers);
      }
    }
    if (args.grad_input == nullptr) return;
    store_loss_gradient<kGeneral, T>(/*streamed=*/false, args.loss, args.grads, dim, width, target,
                                     rows, {tile, step}, {gradient_over(args, tile), step});
  });
}

}  // namespace

int64_t SOFTMAX_EXT_OF_ISA(find_bad_target)(const int64_t* targets, int64_t rows, int64_t classes,
                                            int64_t ignore_index, int64_t* counted) {
  int64_t ignored = 0, bad = 0;
  for (int64_t k = 0; k < rows; ++k) {
    const bool is_ignored = targets[k] == ignore_index;
    ignored += is_ignored;
    bad += !is_ignored & (static_cast<uint64_t>(targets[k]) >= static_cast<uint64_t>(classes));
  }
  *counted = rows - ignored;
  if (bad == 0) return -1;
  int64_t k = 0;
  while (targets[k] == ignore_index ||
         static_cast<uint64_t>(targets[k]) < static_cast<uint64_t>(classes)) {
    ++k;
  }
  return k;
}

void SOFTMAX_EXT_OF_ISA(launch_loss_forward)(const LossForwardArgs& args, const Threads& threads) {
  visit(args.dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_general = args.loss.is_general() || args.entropy != nullptr;
    if (args.shape.inner > 1) {
      return is_general ? loss_of_columns<true, T>(args, threads)
                        : loss_of_columns<false, T>(args, threads);
    }
    is_general ? loss_of_rows<true, T>(args, threads) : loss_of_rows<false, T>(args, threads);
  });
}

}  // namespace softmax_ext::cpu
