// segment_softmax, segment_log_softmax and segment_logsumexp on the CPU. Compiled once for each
// instruction set, as softmax_forward.cpp.
#include <cmath>

#include "dispatch.h"
#include "segments_schedule.h"

namespace softmax_ext::cpu {
namespace {

// A column of some rows: their maximum, and the sum of exp(x - max), or of exp(x) where all are -inf.
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
        input_(args.input, args.shape, args.segments.order != nullptr),
        output_(args.output, args.shape, kIsElementwise && args.segments.order != nullptr),
        results_(static_cast<T*>(args.output)),
        exps_(kIsSoftmax ? chunk_rows(args.shape.inner) * V::kSize : 1) {}

  void empty(int64_t o, int64_t s) const {
    if constexpr (!kIsElementwise) {
      std::fill_n(result(o, s), shape_.inner, rounded<T>(-INFINITY));
    }
  }

  void whole(int64_t o, int64_t s, const RowsOf& rows) const {
    const T* const input = input_.of(o * shape_.dim, rows);
    T* const output = output_of(o, s, rows);
    tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) SOFTMAX_EXT_LAMBDA {
      const T* const x = input + c;
      const V max = max_over(tile, x, rows.count);
      const ExactSum<V> sum = sum_over(tile, x, rows.count, max, exps_.data());
      if constexpr (kIsElementwise) {
        const auto formula = formula_of<kOp, T>(max, sum.sum, sum.rest);
        T* const y = output + c;
        tile.for_each_step(
            rows.count, [&](int64_t k, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
              if constexpr (kIsSoftmax) {
                store(y + i, lanes, formula.of_exp(load(exps_.data() + k * V::kSize, All{}, {})));
              } else {
                store(y + i, lanes, formula.of(scaled(x + i, lanes, scale_)));
              }
            });
      } else {
        V rest;
        const V log = log_of(sum.sum, sum.rest, &rest);
        const V lowest(kLowest<Compute>);
        tile.write(output + c, sum.sum.raw == typename V::Raw{} ? lowest.raw
                                                               : ((max + log) + rest).raw);
      }
    });
    if constexpr (kIsElementwise) output_.done(o * shape_.dim, rows);
  }

  void reduce(int64_t o, const RowsOf& rows, State* state) const {
    const T* const input = input_.of(o * shape_.dim, rows);
    tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) {
      const V max = max_over(tile, input + c, rows.count);
      const ExactSum<V> sum = sum_over(tile, input + c, rows.count, max, nullptr);
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

  void finish(int64_t o, int64_t, const RowsOf& rows, const State* states) const {
    if constexpr (kIsElementwise) {
      const T* const input = input_.of(o * shape_.dim, rows);
      T* const output = output_.of(o * shape_.dim, rows);
      tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) {
        Compute max[V::kSize], sum[V::kSize], rest[V::kSize];
        for (int64_t k = 0; k < tile.width(); ++k) {
          max[k] = static_cast<Compute>(states[c + k].max);
          sum[k] = static_cast<Compute>(states[c + k].sum);
          rest[k] = static_cast<Compute>(states[c + k].sum - sum[k]);
        }
        const auto formula =
            formula_of<kOp, T>(tile.spread(max), tile.spread(sum), tile.spread(rest));
        const T* const x = input + c;
        T* const y = output + c;
        tile.for_each_step(rows.count, [&](int64_t, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
          store(y + i, lanes, formula.of(scaled(x + i, lanes, scale_)));
        });
      });
      output_.done(o * shape_.dim, rows);
    }
  }

 private:
  using V = Vec<Compute>;
  static constexpr bool kIsSoftmax = op == SegmentOp::kSoftmax;
  static constexpr bool kIsElementwise = op != SegmentOp::kLogSumExp;
  static constexpr Op kOp = kIsSoftmax ? Op::kSoftmax : Op::kLogSoftmax;

  T* result(int64_t o, int64_t s) const { return results_ + (o * count_ + s) * shape_.inner; }
  T* output_of(int64_t o, int64_t s, const RowsOf& rows) const {
    if constexpr (kIsElementwise) return output_.of(o * shape_.dim, rows);
    return result(o, s);
  }

  SOFTMAX_EXT_INLINE V max_over(const Tile<Compute>& tile, const T* x, int64_t rows) const {
    return tile.max(rows, [&](int64_t i, auto lanes)
                              SOFTMAX_EXT_LAMBDA { return scaled(x + i, lanes, scale_); });
  }

  // Of exp(x - max). Softmax keeps each, unless `exps` is null.
  SOFTMAX_EXT_INLINE ExactSum<V> sum_over(const Tile<Compute>& tile, const T* x, int64_t rows,
                                          V max, Compute* exps) const {
    const V shift = shift_of(max);
    return tile.sum(rows, [&](int64_t k, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      const V value = scaled(x + i, lanes, scale_);
      V e = exp_of_nonpositive(value - shift);
      // An infinite maximum counts as 1.
      if constexpr (!kIsElementwise) e = value.raw == shift.raw ? V(Compute(1)).raw : e.raw;
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
  GatheredRows<T> input_;
  ScatteredRows<T> output_;
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
