// Rows of cross-entropy, a few at a time: up to a register of them, each in its lane, beside the loops over
// their elements. With inner 1 those are rows side by side, else columns. And their gradients, which a
// forward call may make as well.
#pragma once

#include <algorithm>
#include <limits>

#include "columns.h"
#include "scores.h"
#include "softmax_ext/losses.h"

namespace softmax_ext::cpu {
namespace {

// Of tensors that are all read where they lie.
struct InPlace : Unplaced {
  static constexpr bool is_placed() { return false; }
  static void place_group(const Group&, int, const Shape&) {}
};

// The strides of numbers of rows, side by side, along the outer dims; a slice has `inner` of them.
inline Strides row_strides(const Dims& dims, int64_t inner) {
  Strides strides{};
  for (int k = dims.outer - 1; k >= 0; --k) {
    strides.of[k] = inner;
    inner *= dims.sizes[k];
  }
  return strides;
}

// A score of each element, in lanes.
template <bool kGeneral, class V>
struct ScoreOf {
  SOFTMAX_EXT_INLINE explicit ScoreOf(const Loss&) {}
  SOFTMAX_EXT_INLINE V operator()(V x) const { return x; }
  // dx from dz, where z is the score.
  SOFTMAX_EXT_INLINE V gradient(V dz, V) const { return dz; }
};

template <class V>
struct ScoreOf<true, V> {
  V factor, softcap, inverse;
  bool is_capped;

  SOFTMAX_EXT_INLINE explicit ScoreOf(const Loss& loss) : is_capped(loss.softcap != 0) {
    using A = std::decay_t<decltype(factor.raw[0])>;
    factor = V(static_cast<A>(loss.factor));
    softcap = V(static_cast<A>(loss.softcap));
    inverse = V(is_capped ? A(1) / static_cast<A>(loss.softcap) : A(0));
  }
  SOFTMAX_EXT_INLINE V operator()(V x) const {
    const V z = x * factor;
    return is_capped ? capped_of(z, softcap, inverse) : z;
  }
  SOFTMAX_EXT_INLINE V gradient(V dz, V z) const {
    dz = dz * factor;
    if (!is_capped) return dz;
    const V t = z * inverse;
    return dz * fma_of(-t, t, V(1));
  }
};

// `count` numbers of rows from `row` on, `next` apart, each in its lane.
template <class A>
SOFTMAX_EXT_INLINE Vec<A> load_rows(const void* data, int64_t row, int64_t next, int64_t count) {
  using V = Vec<A>;
  const A* const from = static_cast<const A*>(data) + row;
  if (next == 1 && count == V::kSize) return load(from, All{}, A(0));
  alignas(64) A values[V::kSize] = {};
  for (int64_t k = 0; k < count; ++k) values[k] = from[k * next];
  return load(values, All{}, A(0));
}
template <class A>
SOFTMAX_EXT_INLINE void store_rows(void* data, int64_t row, int64_t next, int64_t count,
                                   Vec<A> values) {
  A* const to = static_cast<A*>(data) + row;
  if (next == 1 && count == Vec<A>::kSize) return store(to, All{}, values);
  for (int64_t k = 0; k < count; ++k) to[k * next] = values.raw[k];
}

// The targets of up to a register of rows. Lanes without a row are ignored.
template <class A>
struct Targets {
  using V = Vec<A>;
  using RawInt = typename V::RawInt;

  RawInt target;  // -1: ignored
  V weight;       // of it; 0 where it is ignored

  // Of `count` rows, target k `next` elements from the one before.
  SOFTMAX_EXT_INLINE Targets(const Loss& loss, const int64_t* targets, int64_t next,
                             int64_t count) {
    alignas(64) Lane lanes[V::kSize];
    const auto lane_of = [=](int64_t y) SOFTMAX_EXT_LAMBDA {
      return static_cast<Lane>(y == loss.ignore_index ? -1 : y);
    };
    if (next == 1 && count == V::kSize) {
      for (int k = 0; k < V::kSize; ++k) lanes[k] = lane_of(targets[k]);
    } else {
      for (int k = 0; k < V::kSize; ++k) lanes[k] = k < count ? lane_of(targets[k * next]) : -1;
    }
    std::memcpy(&target, lanes, sizeof(target));
    if (loss.weight == nullptr) {
      weight = if_counts(V(A(1)));
      return;
    }
    alignas(64) A weights[V::kSize] = {};
    for (int64_t k = 0; k < count; ++k) {
      if (lanes[k] >= 0) weights[k] = static_cast<const A*>(loss.weight)[lanes[k]];
    }
    weight = load(weights, All{}, A(0));
  }

  // value where a row counts, else 0.
  SOFTMAX_EXT_INLINE V if_counts(V value) const {
    return target >= 0 ? value.raw : typename V::Raw{};
  }
  // value where the target is class c, else other.
  SOFTMAX_EXT_INLINE V if_is(int64_t c, V value, V other) const {
    return target == static_cast<Lane>(c) ? value.raw : other.raw;
  }

 private:
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
};

// The weight of class c, and of those of a register from it on.
template <class A>
SOFTMAX_EXT_INLINE A weight_of(const Loss& loss, int64_t c) {
  return loss.weight == nullptr ? A(1) : static_cast<const A*>(loss.weight)[c];
}
template <class A, class Lanes>
SOFTMAX_EXT_INLINE Vec<A> weights_of(const Loss& loss, int64_t c, Lanes lanes) {
  if (loss.weight == nullptr) return filled(Vec<A>(A(1)), lanes, A(0));
  return load(static_cast<const A*>(loss.weight) + c, lanes, A(0));
}

// x, and the least number for -infinity: times an exp that is 0, it is 0.
template <class V>
SOFTMAX_EXT_INLINE V at_least_finite(V x) {
  using A = std::decay_t<decltype(x.raw[0])>;
  return max_of(V(std::numeric_limits<A>::lowest()), x);
}

// What is known of up to a register of rows, each in its lane: LossForwardArgs has what these are.
template <class V>
struct LossNumbers {
  V lse, lse_rest, log_p, entropy;
};

// The gradients of up to a register of rows, each in its lane, or of one in all lanes.
template <class V>
struct LossRows {
  LossGradient<V> gradient;
  V lse, rest;
  V of_target;  // what the target's gradient is, before ScoreOf::gradient
  V score;      // of the target
  V entropy, grad_entropy;
  bool has_grad_entropy;

  template <class F>
  static SOFTMAX_EXT_INLINE LossRows map(const LossRows& rows, F f) {
    const LossGradient<V>& g = rows.gradient;
    return {{f(g.share), f(g.each), f(g.target), f(g.more)},
            f(rows.lse),
            f(rows.rest),
            f(rows.of_target),
            f(rows.score),
            f(rows.entropy),
            f(rows.grad_entropy),
            rows.has_grad_entropy};
  }

  // The gradient of a score of another class than the target.
  template <bool kGeneral>
  SOFTMAX_EXT_INLINE V of(V z, V weight) const {
    const V log_p = (z - lse) - rest, p = exp_of_nonpositive(log_p);
    const V dz = gradient.of_other(p, weight);
    return kGeneral && has_grad_entropy ? dz - of_entropy(p, log_p) : dz;
  }
  // What the entropy's gradient takes from that of a score.
  SOFTMAX_EXT_INLINE V of_entropy(V p, V log_p) const {
    return grad_entropy * p * (at_least_finite(log_p) + entropy);
  }
};

// Of `count` rows of dim elements from `row` on, `next` apart, with their targets.
template <class A>
SOFTMAX_EXT_INLINE LossRows<Vec<A>> loss_rows(const Loss& loss, int64_t dim, const LossGrads& grads,
                                              int64_t row, int64_t next, int64_t count,
                                              const Targets<A>& targets,
                                              const LossNumbers<Vec<A>>& numbers) {
  using V = Vec<A>;
  const auto value = [](double x) SOFTMAX_EXT_LAMBDA { return V(static_cast<A>(x)); };
  const auto of_rows = [=](const void* data)
                           SOFTMAX_EXT_LAMBDA { return load_rows<A>(data, row, next, count); };
  V g(A(1));
  if (grads.loss != nullptr) {
    g = grads.loss_step == 0 ? V(*static_cast<const A*>(grads.loss)) : of_rows(grads.loss);
  }
  if (grads.divisor != nullptr) g = g * value(1 / *grads.divisor);
  LossRows<V> rows;
  rows.lse = numbers.lse;
  rows.rest = numbers.lse_rest;
  rows.score = numbers.log_p + numbers.lse;
  rows.gradient = LossGradient<V>::of(
      targets.if_counts(g), grads.lse == nullptr ? V(A(0)) : of_rows(grads.lse), targets.weight,
      rows.lse, value(loss.smoothing), value(loss.smoothing / static_cast<double>(dim)),
      value(loss.weight_sum), value(loss.z_loss));
  rows.of_target = rows.gradient.of_target(expm1_of_nonpositive(numbers.log_p), targets.weight);
  rows.has_grad_entropy = grads.entropy != nullptr;
  rows.entropy = numbers.entropy;
  rows.grad_entropy = rows.has_grad_entropy ? of_rows(grads.entropy) : V(A(0));
  if (rows.has_grad_entropy) {
    rows.of_target =
        rows.of_target - rows.of_entropy(exp_of_nonpositive(numbers.log_p), numbers.log_p);
  }
  return rows;
}

// Whether the gradient of a row is 0 whatever its elements are.
inline bool is_ignored(const Loss& loss, const LossGrads& grads, int64_t target) {
  return target == loss.ignore_index && grads.lse == nullptr && grads.entropy == nullptr;
}

// The gradients of the n elements from `first` on of a row, which is one in all lanes; y may be x. A target
// that is ignored is no class, also where ignore_index is one.
template <bool kGeneral, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE void store_loss_gradient(bool streamed, const Loss& loss, const LossGrads& grads,
                                            const T* x, T* y, int64_t first, int64_t n,
                                            int64_t target, const LossRows<Vec<A>>& row) {
  using V = Vec<A>;
  x += first;
  y += first;
  if (is_ignored(loss, grads, target)) {
    store_each<T>(streamed, y, n, [](int64_t, auto) SOFTMAX_EXT_LAMBDA { return V(A(0)); });
    return;
  }
  const ScoreOf<kGeneral, V> score_of(loss);
  const A of_target = score_of.gradient(row.of_target, row.score).raw[0];
  const bool is_smooth = kGeneral && loss.smoothing != 0;
  if (target == loss.ignore_index) target = -1;
  store_each<T>(streamed, y, n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
    const V z = score_of(load(x + i, lanes, A(0)));
    V result =
        row.template of<kGeneral>(z, is_smooth ? weights_of<A>(loss, first + i, lanes) : V(A(0)));
    result = score_of.gradient(result, z);
    const auto lane = static_cast<uint64_t>(target - first - i);
    if (lane < V::kSize) result.raw[lane] = of_target;
    return result;
  });
}

// A tile of columns of a tensor, `step` elements between two steps along dim.
template <class T>
struct LossTile {
  T* first;
  int64_t step;
};

// The gradients of `width` columns side by side, of which rows has a register each; y may be x.
template <bool kGeneral, class T, class V>
SOFTMAX_EXT_INLINE void store_loss_gradient(bool streamed, const Loss& loss, const LossGrads& grads,
                                            int64_t dim, int64_t width, const int64_t* target,
                                            LossRows<V>* rows, LossTile<const T> x, LossTile<T> y) {
  using A = compute_t<T>;
  using RawInt = typename V::RawInt;
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr int kSize = V::kSize;
  const ScoreOf<kGeneral, V> score_of(loss);
  const bool is_smooth = kGeneral && loss.smoothing != 0;
  const bool all_count = grads.lse != nullptr || grads.entropy != nullptr ||
                         std::find(target, target + width, loss.ignore_index) == target + width;
  RawInt targets[kTile<A> / kSize];
  for (int64_t v = 0; v < ceil_div(width, kSize); ++v) {
    const int64_t c = v * kSize;
    targets[v] = Targets<A>(loss, target + c, 1, std::min<int64_t>(kSize, width - c)).target;
    rows[v].of_target = score_of.gradient(rows[v].of_target, rows[v].score);
  }
  for_each_steps(0, dim, true, [&](int64_t d, auto steps) SOFTMAX_EXT_LAMBDA {
    const T* const from = x.first + d * x.step;
    T* const to = y.first + d * y.step;
    for_each_vector<kSize>(width, [=, &targets](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
      const LossRows<V> row = rows[c / kSize];
      const RawInt of_columns = targets[c / kSize];
      for (int k = 0; k < steps(); ++k) {
        const V w(is_smooth ? weight_of<A>(loss, d + k) : A(0));
        const V z = score_of(load(from + k * x.step + c, lanes, A(0)));
        const V other = score_of.gradient(row.template of<kGeneral>(z, w), z);
        const auto is_target = of_columns == static_cast<Lane>(d + k);
        V result = is_target ? row.of_target.raw : other.raw;
        if (!all_count) result = of_columns >= 0 ? result.raw : typename V::Raw{};
        write_vector<T>(streamed, to + k * y.step + c, lanes, result);
      }
    });
  });
}

}  // namespace
}  // namespace softmax_ext::cpu
