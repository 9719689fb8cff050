// Rows of cross-entropy, a few at a time: up to a register of them, each in its lane, beside the loops over
// their elements. With inner 1 those are rows side by side, else columns.
#pragma once

#include <algorithm>

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

}  // namespace
}  // namespace softmax_ext::cpu
