// A tile: the columns of some rows of one segment that fill a register. A row is the inner elements of
// one step along dim, and rows follow each other in memory.
#pragma once

#include <cstring>

#include "formulas.h"
#include "loops.h"

namespace softmax_ext::cpu {
namespace {

// A register holds `width` columns of each of `together` rows, a power of two, side by side.
template <class A>
class Tile {
 public:
  using V = Vec<A>;
  static constexpr int kSize = V::kSize;

  Tile(int64_t inner, int64_t width) : inner_(inner), width_(width) {
    while (width == inner && 2 * together_ * width <= kSize) together_ *= 2;
    for (int k = 0; (1 << k) < together_; ++k) {
      for (int64_t lane = 0; lane < kSize; ++lane) {
        const int64_t row = lane / width;
        exchanged_[k][lane] = row < together_ ? (row ^ (1 << k)) * width + lane % width : lane;
      }
    }
    for (int64_t lane = 0; lane < kSize; ++lane) first_row_[lane] = lane % width;
  }

  int64_t width() const { return width_; }

  // Registers of so many rows.
  int64_t steps(int64_t rows) const { return ceil_div(rows, together_); }

  // step(number, offset, lanes) for each register of so many rows; lanes: those that hold elements.
  template <class Step>
  SOFTMAX_EXT_INLINE void for_each_step(int64_t rows, Step step) const {
    const int64_t whole = rows / together_, stride = together_ * inner_;
    const int64_t lanes = together_ * width_;
    if (lanes == kSize) {
      for (int64_t k = 0; k < whole; ++k) step(k, k * stride, All{});
    } else {
      for (int64_t k = 0; k < whole; ++k) step(k, k * stride, First{lanes});
    }
    const int64_t more = rows - whole * together_;
    if (more > 0) step(whole, whole * stride, First{more * width_});
  }

  // The sum of term(number, offset, lanes), 0 in lanes without an element, over all rows: of each column
  // in all lanes of it.
  template <class Term>
  SOFTMAX_EXT_INLINE ExactSum<V> sum(int64_t rows, Term term) const {
    constexpr int64_t kFew = 4;  // terms that are added before what that rounds off is kept
    ExactSum<V> sum(V(A(0)));
    V few(A(0));
    for_each_step(rows, [&](int64_t k, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      few = few + term(k, i, lanes);
      if (k % kFew == kFew - 1) {
        sum.add(few);
        few = V(A(0));
      }
    });
    sum.add(few);
    // Neither of the two comes first: rows side by side agree on the result.
    return fold(sum, [](ExactSum<V> a, ExactSum<V> b) SOFTMAX_EXT_LAMBDA {
      V lost;
      const V both = sum_of(a.sum, b.sum, &lost);
      return ExactSum<V>(both, (a.rest + b.rest) + lost);
    });
  }

  // The same of the maximum.
  template <class Value>
  SOFTMAX_EXT_INLINE V max(int64_t rows, Value value) const {
    V max(kLowest<A>);
    for_each_step(rows, [&](int64_t, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      max = max_of(value(i, lanes), max);
    });
    return fold(max, Max{});
  }

  // One value a column, in all lanes of it.
  template <class T>
  SOFTMAX_EXT_INLINE V spread(const T* values) const {
    const V row = width_ == kSize ? load(values, All{}, A(0)) : load(values, First{width_}, A(0));
    return together_ > 1 ? permute(row, first_row_) : row;
  }

  // The other way round.
  template <class T>
  SOFTMAX_EXT_INLINE void write(T* values, V x) const {
    width_ == kSize ? store(values, All{}, x) : store(values, First{width_}, x);
  }

 private:
  // All rows of a register, in each.
  template <class S, class Combine>
  SOFTMAX_EXT_INLINE S fold(S x, Combine combine) const {
    for (int k = 0; (1 << k) < together_; ++k) x = combine(x, exchange(x, exchanged_[k]));
    return x;
  }

  static SOFTMAX_EXT_INLINE V exchange(V x, typename V::RawInt lanes) { return permute(x, lanes); }
  static SOFTMAX_EXT_INLINE ExactSum<V> exchange(ExactSum<V> x, typename V::RawInt lanes) {
    return {permute(x.sum, lanes), permute(x.rest, lanes)};
  }

  int64_t inner_, width_;
  int together_ = 1;
  typename V::RawInt exchanged_[4];
  typename V::RawInt first_row_;
};

// The tiles of rows of `inner` elements.
template <class A>
class Tiles {
 public:
  static constexpr int64_t kSize = Vec<A>::kSize;

  explicit Tiles(int64_t inner)
      : inner_(inner), first_(inner, std::min(inner, kSize)), last_(inner, (inner - 1) % kSize + 1) {}

  // f(column, tile)
  template <class F>
  SOFTMAX_EXT_INLINE void for_each(F f) const {
    int64_t c = 0;
    for (; c + kSize < inner_; c += kSize) f(c, first_);
    f(c, last_);
  }

 private:
  int64_t inner_;
  Tile<A> first_, last_;
};

// x * scale, and the lowest value in lanes without an element.
template <class T, class Lanes, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Vec<A> scaled(const T* x, Lanes lanes, Vec<A> scale) {
  const Vec<A> product = load(x, lanes, A(0)) * scale;
  if constexpr (kWhole<Lanes>) {
    return product;
  } else {
    return first_of(product, lanes, kLowest<A>);
  }
}

}  // namespace
}  // namespace softmax_ext::cpu
