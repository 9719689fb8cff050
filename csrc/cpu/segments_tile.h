// A tile: the columns of some rows of one segment that fill a register. A row is the inner elements of
// one step along dim, and rows follow each other in memory.
#pragma once

#include <cstring>

#include "formulas.h"
#include "loops.h"

namespace softmax_ext::cpu {
namespace {

// What to begin with for a maximum that is subtracted: where all elements are -inf, the difference is too.
template <class A>
constexpr A kLowestFinite = std::numeric_limits<A>::lowest();

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

  // The same where there are N = steps(rows), without a branch on the rows of the last.
  template <int N, class Step>
  SOFTMAX_EXT_INLINE void for_each_of(int64_t rows, Step step) const {
    const int64_t stride = together_ * inner_, lanes = together_ * width_;
    if (lanes == kSize) {
      for (int k = 0; k < N - 1; ++k) step(k, k * stride, All{});
    } else {
      for (int k = 0; k < N - 1; ++k) step(k, k * stride, First{lanes});
    }
    step(N - 1, (N - 1) * stride, First{(rows - (N - 1) * together_) * width_});
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

  // The same of the maximum, if that is a number: of nothing but -inf, the lowest number.
  template <class Value>
  SOFTMAX_EXT_INLINE V max(int64_t rows, Value value) const {
    V max(kLowestFinite<A>);
    for_each_step(rows, [&](int64_t, int64_t i, auto lanes)
                            SOFTMAX_EXT_LAMBDA { max = max_of(value(i, lanes), max); });
    return fold(max, Max{});
  }

  // What the rows of a register come to, in all lanes of each column.
  template <class S, class Combine>
  SOFTMAX_EXT_INLINE S fold(S x, Combine combine) const {
    for (int k = 0; (1 << k) < together_; ++k) x = combine(x, exchange(x, exchanged_[k]));
    return x;
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
      : inner_(inner),
        first_(inner, std::min(inner, kSize)),
        last_(inner, (inner - 1) % kSize + 1) {}

  // Registers that one of them has of so many rows, at most.
  int64_t steps(int64_t rows) const { return std::max(first_.steps(rows), last_.steps(rows)); }

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

// What so few values come to, by pairs: a sum of them is off by what three additions round off.
template <int N, class V, class Combine>
SOFTMAX_EXT_INLINE V combine_few(const V* values, Combine combine) {
  if constexpr (N == 1) {
    return values[0];
  } else {
    constexpr int kHalf = (N + 1) / 2;
    return combine(combine_few<kHalf>(values, combine),
                   combine_few<N - kHalf>(values + kHalf, combine));
  }
}

// f(std::integral_constant<int, n>{}) for n of 1 to 8, or f(std::integral_constant<int, 0>{}) for more.
template <class F>
SOFTMAX_EXT_INLINE void visit_few(int64_t n, F f) {
  switch (n) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 6:
      return f(std::integral_constant<int, 6>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

// A store of lanes that a mask names: without a branch, where the instruction set has it.
template <class T, class V>
SOFTMAX_EXT_INLINE void store_masked(T* p, First lanes, V x) {
#if defined(SOFTMAX_EXT_AVX512)
  check_access(p, lanes.count);
  const __mmask16 mask = mask_of(lanes);
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, mask, x.raw);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), x.raw);
  } else {
    _mm256_mask_storeu_epi16(p, mask, narrow(p, x));
  }
#else
  lanes.count == V::kSize ? store(p, All{}, x) : store(p, lanes, x);
#endif
}
template <class T, class V>
SOFTMAX_EXT_INLINE void store_masked(T* p, All lanes, V x) {
  store(p, lanes, x);
}

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
