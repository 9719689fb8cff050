// segment_softmax, segment_log_softmax and segment_logsumexp on the CPU. Compiled once for each
// instruction set, as softmax_forward.cpp.
#include <cmath>

#include "dispatch.h"
#include "segments_schedule.h"

namespace softmax_ext::cpu {
namespace {

// A column of some rows: their maximum, a number or inf, and the sum of exp(x - max).
struct MaxAndSum {
  double max, sum;
};

// `both`: the maximum of two states or more. A share that has it counts as it is, infinite or not.
inline double share_of(const MaxAndSum& state, double both) {
  return state.max == both ? state.sum : state.sum * std::exp(state.max - both);
}

inline double logsumexp_of(const MaxAndSum& state) {
  return state.sum == 0 ? -INFINITY : state.max + std::log(state.sum);
}

template <class T>
T rounded(double x) {
  if constexpr (std::is_same_v<T, double>) return x;
  T result;
  round_to(x, &result);
  return result;
}

template <SegmentOp op, class T>
class SegmentForward {
 public:
  using Compute = compute_t<T>;
  using State = MaxAndSum;

  SegmentForward(const SegmentsForwardArgs& args, const Tiles<Compute>& tiles)
      : shape_(args.shape),
        count_(args.segments.count),
        tiles_(tiles),
        scale_(Compute(args.scale)),
        input_(static_cast<const T*>(args.input), args.shape, args.segments.order != nullptr),
        output_(static_cast<T*>(args.output), args.shape,
                kIsElementwise && args.segments.order != nullptr),
        results_(static_cast<T*>(args.output)),
        exps_(kIsSoftmax ? tiles.steps(chunk_rows(args.shape.inner)) * V::kSize : 1) {}

  void empty(int64_t o, int64_t s) const {
    if constexpr (!kIsElementwise) {
      std::fill_n(result(o, s), shape_.inner, rounded<T>(-INFINITY));
    }
  }

  void open(int64_t o, const RowsOf& rows) {
    input_.gather(o, rows);
    if constexpr (kIsElementwise) output_.open(o, rows);
  }
  void close(int64_t o, const RowsOf& rows) const {
    if constexpr (kIsElementwise) output_.scatter(o, rows);
  }

  void whole(int64_t o, int64_t s, int64_t first, int64_t count) const {
    const T* const input = input_.at(first);
    T* const output = kIsElementwise ? output_.at(first) : result(o, s);
    tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) SOFTMAX_EXT_LAMBDA {
      visit_few(tile.steps(count), [&](auto steps) SOFTMAX_EXT_LAMBDA {
        if constexpr (steps() > 0) {
          few<steps()>(tile, input + c, count, output + c);
        } else {
          many(tile, input + c, count, output + c);
        }
      });
    });
  }

  void reduce(int64_t first, int64_t count, State* state) const {
    const T* const input = input_.at(first);
    tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) {
      const V max = max_over(tile, input + c, count);
      const ExactSum<V> sum = sum_over(tile, input + c, count, max, nullptr);
      for (int64_t k = 0; k < tile.width(); ++k) {
        state[c + k] = {max.raw[k], static_cast<double>(sum.sum.raw[k]) + sum.rest.raw[k]};
      }
    });
  }

  void combine(int64_t o, int64_t s, State* states, int64_t n) const {
    for (int64_t c = 0; c < shape_.inner; ++c) {
      State& state = states[c];
      for (int64_t k = 1; k < n; ++k) {
        const State& next = states[k * shape_.inner + c];
        const double both = std::max(state.max, next.max);
        state = {both, share_of(state, both) + share_of(next, both)};
      }
      if constexpr (!kIsElementwise) {
        result(o, s)[c] = rounded<T>(logsumexp_of(state));
      }
    }
  }

  void finish(int64_t, int64_t, int64_t first, int64_t count, const State* states) const {
    if constexpr (kIsElementwise) {
      const T* const input = input_.at(first);
      T* const output = output_.at(first);
      tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) {
        Compute max[V::kSize], sum[V::kSize], rest[V::kSize];
        for (int64_t k = 0; k < tile.width(); ++k) {
          max[k] = static_cast<Compute>(states[c + k].max);
          sum[k] = static_cast<Compute>(states[c + k].sum);
          rest[k] = static_cast<Compute>(states[c + k].sum - sum[k]);
        }
        const auto formula =
            formula_over(tile.spread(max), ExactSum<V>(tile.spread(sum), tile.spread(rest)));
        const T* const x = input + c;
        T* const y = output + c;
        tile.for_each_step(count, [&](int64_t, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
          store(y + i, lanes, formula.of(scaled(x + i, lanes, scale_)));
        });
      });
    }
  }

 private:
  using V = Vec<Compute>;
  static constexpr bool kIsSoftmax = op == SegmentOp::kSoftmax;
  static constexpr bool kIsElementwise = op != SegmentOp::kLogSumExp;
  static constexpr Op kOp = kIsSoftmax ? Op::kSoftmax : Op::kLogSoftmax;

  T* result(int64_t o, int64_t s) const { return results_ + (o * count_ + s) * shape_.inner; }

  // Of so few rows that registers hold them.
  template <int steps>
  SOFTMAX_EXT_INLINE void few(const Tile<Compute>& tile, const T* x, int64_t rows, T* y) const {
    V values[steps], exps[steps];
    tile.template for_each_of<steps>(rows, [&](int k, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      values[k] = scaled(x + i, lanes, scale_);
    });
    V max(kLowestFinite<Compute>);
    for (int k = 0; k < steps; ++k) max = max_of(values[k], max);
    max = tile.fold(max, Max{});
    for (int k = 0; k < steps; ++k) exps[k] = share(values[k], max);
    const V sum = tile.fold(combine_few<steps>(exps, Add{}), Add{});
    if constexpr (kIsElementwise) {
      const auto formula = formula_over(max, ExactSum<V>(sum));
      tile.template for_each_of<steps>(rows, [&](int k, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        if constexpr (kIsSoftmax) {
          store_masked(y + i, lanes, formula.of_exp(exps[k]));
        } else {
          store_masked(y + i, lanes, formula.of(values[k]));
        }
      });
    } else {
      tile.write(y, logsumexp(max, sum));
    }
  }

  SOFTMAX_EXT_INLINE void many(const Tile<Compute>& tile, const T* x, int64_t rows, T* y) const {
    const V max = max_over(tile, x, rows);
    const ExactSum<V> sum = sum_over(tile, x, rows, max, exps_.data());
    if constexpr (kIsElementwise) {
      const auto formula = formula_over(max, sum);
      tile.for_each_step(rows, [&](int64_t k, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        if constexpr (kIsSoftmax) {
          store(y + i, lanes, formula.of_exp(load(exps_.data() + k * V::kSize, All{}, {})));
        } else {
          store(y + i, lanes, formula.of(scaled(x + i, lanes, scale_)));
        }
      });
    } else {
      tile.write(y, logsumexp(max, sum));
    }
  }

  // max, or -inf where all elements are.
  static SOFTMAX_EXT_INLINE V max_or_infinity(V max, V sum) {
    return sum.raw == typename V::Raw{} ? V(kLowest<Compute>).raw : max.raw;
  }

  static SOFTMAX_EXT_INLINE auto formula_over(V max, ExactSum<V> sum) {
    if constexpr (!kIsSoftmax) max = max_or_infinity(max, sum.sum);
    return formula_of<kOp, T>(max, sum.sum, sum.rest);
  }

  static SOFTMAX_EXT_INLINE V logsumexp(V max, ExactSum<V> sum) {
    V rest;
    const V log = log_of(sum.sum, sum.rest, &rest);
    return (max_or_infinity(max, sum.sum) + log) + rest;
  }

  // exp(x - max).
  static SOFTMAX_EXT_INLINE V share(V x, V max) {
    const V e = exp_of_nonpositive(x - max);
    // To logsumexp an infinite maximum counts as 1.
    if constexpr (!kIsElementwise) return x.raw == max.raw ? V(Compute(1)).raw : e.raw;
    return e;
  }

  SOFTMAX_EXT_INLINE V max_over(const Tile<Compute>& tile, const T* x, int64_t rows) const {
    return tile.max(rows, [&](int64_t i, auto lanes)
                              SOFTMAX_EXT_LAMBDA { return scaled(x + i, lanes, scale_); });
  }

  // Of exp(x - max). Softmax keeps each, unless `exps` is null.
  SOFTMAX_EXT_INLINE ExactSum<V> sum_over(const Tile<Compute>& tile, const T* x, int64_t rows,
                                          V max, Compute* exps) const {
    return tile.sum(rows, [&](int64_t k, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      const V e = share(scaled(x + i, lanes, scale_), max);
      if constexpr (kIsSoftmax) {
        if (exps != nullptr) store(exps + k * V::kSize, All{}, e);
      }
      return e;
    });
  }

  Shape shape_;
  int64_t count_;
  const Tiles<Compute>& tiles_;
  V scale_;
  Rows<const T> input_;
  Rows<T> output_;
  T* results_;
  Buffer<Compute> exps_;
};

template <SegmentOp op>
void launch_segments_forward(const SegmentsForwardArgs& args, const Threads& threads) {
  visit(args.dtype, [&](auto element) {
    using T = decltype(element);
    const Tiles<compute_t<T>> tiles(args.shape.inner);
    using Kernel = SegmentForward<op, T>;
    for_each_segment<Kernel>(args.shape, args.segments, threads,
                             [&] { return Kernel(args, tiles); });
  });
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_segments_forward)(const SegmentsForwardArgs& args,
                                                 const Threads& threads) {
  switch (args.op) {
    case SegmentOp::kSoftmax:
      return launch_segments_forward<SegmentOp::kSoftmax>(args, threads);
    case SegmentOp::kLogSoftmax:
      return launch_segments_forward<SegmentOp::kLogSoftmax>(args, threads);
    case SegmentOp::kLogSumExp:
      return launch_segments_forward<SegmentOp::kLogSumExp>(args, threads);
  }
}

}  // namespace softmax_ext::cpu
