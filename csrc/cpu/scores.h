// Rows of scores: what becomes of a row's elements before softmax, and which rows a call has.
//
// Elements are read once into a buffer in the first-level cache, as scores; what softmax does with them
// is done there. Registers of a row are counted from its first element, and summed in four sums in turns,
// so that what takes no part in the row, which adds nothing, need not be looked at.
#pragma once

#include <algorithm>
#include <limits>

#include "rows.h"
#include "softmax_ext/scores.h"

namespace softmax_ext::cpu {
namespace {

constexpr int64_t kSums = 4;

template <class A>
constexpr int64_t kStretch = kSums * Vec<A>::kSize;

constexpr int64_t round_down(int64_t n, int64_t to) { return n / to * to; }
constexpr int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// ---- arithmetic ---------------------------------------------------------------------------------

template <class T, int... kLane>
SOFTMAX_EXT_INLINE typename Vec<T>::RawInt lane_numbers(std::integer_sequence<int, kLane...>) {
  return typename Vec<T>::RawInt{kLane...};
}

// x in the lanes that stand for elements, `fill` in the others.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> filled(Vec<T> x, All, T) {
  return x;
}
template <class T>
SOFTMAX_EXT_INLINE Vec<T> filled(Vec<T> x, First lanes, T fill) {
  using RawInt = typename Vec<T>::RawInt;
  const RawInt numbers = lane_numbers<T>(std::make_integer_sequence<int, Vec<T>::kSize>{});
  return numbers < RawInt{} + static_cast<decltype(numbers[0] + 0)>(lanes.count) ? x.raw
                                                                                 : Vec<T>(fill).raw;
}

// x where it is not -inf, else 0.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> zero_where_lowest(Vec<T> x, Vec<T> y) {
  return y.raw == Vec<T>(kLowest<T>).raw ? typename Vec<T>::Raw{} : x.raw;
}

template <class T>
struct TanhConstants;

// Odd polynomials, or their quotients, of Moshier, "Methods and Programs for Mathematical Functions" (1989).
template <>
struct TanhConstants<float> {
  static SOFTMAX_EXT_INLINE VecF small(VecF x, VecF square) {
    VecF p(-5.70498872745e-3f);
    p = fma_of(p, square, VecF(2.06390887954e-2f));
    p = fma_of(p, square, VecF(-5.37397155531e-2f));
    p = fma_of(p, square, VecF(1.33314422036e-1f));
    p = fma_of(p, square, VecF(-3.33332819422e-1f));
    return fma_of(p * square, x, x);
  }
};
template <>
struct TanhConstants<double> {
  static SOFTMAX_EXT_INLINE VecD small(VecD x, VecD square) {
    VecD p(-9.64399179425052238628e-1);
    p = fma_of(p, square, VecD(-9.92877231001918586564e1));
    p = fma_of(p, square, VecD(-1.61468768441708447952e3));
    VecD q = square + VecD(1.12811678491632931402e2);
    q = fma_of(q, square, VecD(2.23548839060100448583e3));
    q = fma_of(q, square, VecD(4.84406305325125486048e3));
    return fma_of(x * square, p / q, x);
  }
};

// Within two units in the last place; a NaN stays one.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> tanh_of(Vec<T> x) {
  const Vec<T> size = x.raw < typename Vec<T>::Raw{} ? -x.raw : x.raw;
  const Vec<T> e = exp_of_nonpositive(size * Vec<T>(T(-2)));
  const Vec<T> large = (Vec<T>(T(1)) - e) / (Vec<T>(T(1)) + e);
  const Vec<T> of_sign = x.raw < typename Vec<T>::Raw{} ? -large.raw : large.raw;
  const Vec<T> small = TanhConstants<T>::small(x, x * x);
  return size.raw < Vec<T>(T(0.625)).raw ? small.raw : of_sign.raw;
}

// ---- masks --------------------------------------------------------------------------------------

struct NoMask {};

template <class A>
struct OneForAll {
  A value;
};

// So many bytes as a register has lanes.
template <class A, class Lanes>
SOFTMAX_EXT_INLINE typename Vec<A>::RawInt load_bytes(const Bool* mask, Lanes lanes) {
  constexpr int kSize = Vec<A>::kSize;
  typedef uint8_t Bytes __attribute__((vector_size(kSize)));
  Bytes bytes{};
  if constexpr (kWhole<Lanes>) {
    std::memcpy(&bytes, mask, kSize);
  } else {
#if defined(SOFTMAX_EXT_AVX512)
    const __m128i some = _mm_maskz_loadu_epi8(mask_of(lanes), mask);
    std::memcpy(&bytes, &some, kSize);
#else
    for (int64_t k = 0; k < lanes.count; ++k) bytes[k] = mask[k].byte;
#endif
  }
  return __builtin_convertvector(bytes, typename Vec<A>::RawInt);
}

template <class A, class Lanes>
SOFTMAX_EXT_INLINE Vec<A> masked(Vec<A> s, const NoMask&, int64_t, Lanes) {
  return s;
}
template <class A, class Lanes>
SOFTMAX_EXT_INLINE Vec<A> masked(Vec<A> s, OneForAll<A> mask, int64_t, Lanes) {
  return s + Vec<A>(mask.value);
}
template <class A, class Lanes>
SOFTMAX_EXT_INLINE Vec<A> masked(Vec<A> s, const Bool* mask, int64_t i, Lanes lanes) {
  return load_bytes<A>(mask + i, lanes) != 0 ? s.raw : Vec<A>(kLowest<A>).raw;
}
template <class A, class M, class Lanes>
SOFTMAX_EXT_INLINE Vec<A> masked(Vec<A> s, const M* mask, int64_t i, Lanes lanes) {
  return s + load(mask + i, lanes, A(0));
}

// ---- a row --------------------------------------------------------------------------------------

// What is one for a row.
template <class A>
struct RowScores {
  A scale;
  A softcap, inverse_cap;
  const void* mask;  // of the row's first element, or null
  DType mask_dtype;
  bool one_for_all;  // the mask has one element for the row
  Range range;       // of the elements that take part
  A sink;            // -inf if there is none

  // f(mask, offset): as `masked` takes it.
  template <class F>
  SOFTMAX_EXT_INLINE auto with_mask(F f) const {
    if (mask == nullptr) return f(NoMask{});
    if (one_for_all) {
      A value;
      if (mask_dtype == DType::kBool) {
        value = A(0);  // or nothing takes part
      } else if (mask_dtype == DType::kFloat16) {
        value = to_float(*static_cast<const Float16*>(mask));
      } else if (mask_dtype == DType::kBFloat16) {
        value = to_float(*static_cast<const BFloat16*>(mask));
      } else {
        value = *static_cast<const A*>(mask);
      }
      return f(OneForAll<A>{value});
    }
    if (mask_dtype == DType::kBool) return f(static_cast<const Bool*>(mask));
    if constexpr (std::is_same_v<A, float>) {
      if (mask_dtype == DType::kFloat16) return f(static_cast<const Float16*>(mask));
      if (mask_dtype == DType::kBFloat16) return f(static_cast<const BFloat16*>(mask));
    }
    return f(static_cast<const A*>(mask));
  }
};

template <bool kCapped, class T, class M, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Vec<A> scores_of(const T* x, A* z, int64_t first, int64_t n, M mask,
                                    const RowScores<A>& row) {
  using V = Vec<A>;
  const V scale(row.scale), softcap(row.softcap), inverse(row.inverse_cap);
  return fold(
      n, V(kLowest<A>),
      [=](V max, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        V s = load(x + first + i, lanes, A(0)) * scale;
        if constexpr (kCapped) s = tanh_of(s * inverse) * softcap;
        s = filled(masked(s, mask, first + i, lanes), lanes, kLowest<A>);
        store(z + i, All{}, s);
        return max_of(s, max);
      },
      Max{});
}

// The scores of elements [begin, end) of a row, which has them from x on, in whole registers from z on, and
// the largest of each lane.
template <class T, class A = compute_t<T>>
__attribute__((noinline)) Vec<A> load_scores(const T* x, A* z, int64_t begin, int64_t end,
                                             const RowScores<A>& row) {
  return row.with_mask([&](auto mask) {
    return row.softcap == 0 ? scores_of<false>(x, z, begin, end - begin, mask, row)
                            : scores_of<true>(x, z, begin, end - begin, mask, row);
  });
}

// Registers of a chunk, in elements from its first: [begin, end) has its range, in whole stretches from the
// first on.
template <class A>
struct Registers {
  int64_t begin, end;

  explicit Registers(Range range)
      : begin(round_down(range.begin, kStretch<A>)),
        end(range.begin == range.end ? begin : round_up(range.end, Vec<A>::kSize)) {}
};

// The part of a row's range that is in the chunk of n elements from `first` on, from there.
constexpr Range within(Range range, int64_t first, int64_t n) {
  const int64_t begin = std::clamp<int64_t>(range.begin - first, 0, n);
  return {begin, std::clamp<int64_t>(range.end - first, begin, n)};
}

// The scores of a chunk in place: those outside of the range, as far as registers go, are -inf. z has
// room for a register more than n.
template <class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Vec<A> place_scores(const T* x, A* z, int64_t first, Range range,
                                       const RowScores<A>& row) {
  constexpr int64_t kSize = Vec<A>::kSize;
  if (range.begin == range.end) return Vec<A>(kLowest<A>);
  const Registers<A> registers(range);
  if (range.begin % kSize != 0) store(z + registers.end - kSize, All{}, Vec<A>(kLowest<A>));
  for (int64_t i = registers.begin; i < range.begin; i += kSize) {
    store(z + i, All{}, Vec<A>(kLowest<A>));
  }
  return load_scores(x, z + range.begin, first + range.begin, first + range.end, row);
}

// f(i, sum number) for each register, unrolled by sums.
template <class A, class F>
SOFTMAX_EXT_INLINE void for_each_register(Registers<A> registers, F f) {
  constexpr int64_t kSize = Vec<A>::kSize;
  int64_t i = registers.begin;
  for (; i + kStretch<A> <= registers.end; i += kStretch<A>) {
    for (int64_t k = 0; k < kSums; ++k) f(i + k * kSize, k);
  }
  for (int64_t k = 0; k < kSums - 1; ++k) {
    if (i + k * kSize < registers.end) f(i + k * kSize, k);
  }
}

// The sum of exp(z - max) lane by lane; with kKeep, z is that afterwards.
template <bool kKeep, class A>
SOFTMAX_EXT_INLINE Vec<A> sum_of_exp(A* z, Registers<A> registers, A max) {
  using V = Vec<A>;
  const V shift = shift_of(V(max));
  V sums[kSums] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
  for_each_register(registers, [&](int64_t i, int64_t k) SOFTMAX_EXT_LAMBDA {
    const V e = exp_of_nonpositive(load(z + i, All{}, A(0)) - shift);
    if constexpr (kKeep) store(z + i, All{}, e);
    sums[k] = sums[k] + e;
  });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// ---- the rows of a call -------------------------------------------------------------------------

// Where rows of a call lie: in each tensor, by its strides.
struct Place {
  const Dims* dims;
  const int64_t* index;  // of the first, of each outer dim
  int along;             // the dim of the others

  SOFTMAX_EXT_INLINE int64_t operator()(const Strides& strides, int64_t k) const {
    return outer_offset(*dims, strides, index) + k * strides.of[along];
  }
};

inline Place place_of(const Dims& dims, int64_t row, int64_t* index) {
  for (int k = dims.outer - 1; k > 0; --k) {
    index[k] = row % dims.sizes[k];
    row /= dims.sizes[k];
  }
  index[0] = row;
  return {&dims, index, dims.outer - 1};
}

template <class A>
SOFTMAX_EXT_INLINE RowScores<A> row_scores(const Scores& scores, const Place& place, int64_t k,
                                           int64_t dim) {
  RowScores<A> row;
  double scale = scores.factor;
  if (scores.scale != nullptr) scale *= scores.scale[place(scores.scale_strides, k)];
  row.scale = static_cast<A>(scale);
  row.softcap = static_cast<A>(scores.softcap);
  row.inverse_cap = static_cast<A>(1 / scores.softcap);
  row.range = {0, dim};
  if (scores.is_bounded()) row.range = scores.range(place(scores.query_strides, k), dim);
  row.mask = nullptr;
  if (scores.mask != nullptr) {
    const int64_t offset = place(scores.mask_strides, k) * size_of(scores.mask_dtype);
    row.mask = static_cast<const char*>(scores.mask) + offset;
    row.mask_dtype = scores.mask_dtype;
    row.one_for_all = scores.mask_strides.dim == 0 && dim > 1;
    if (row.one_for_all && scores.mask_dtype == DType::kBool &&
        static_cast<const Bool*>(row.mask)->byte == 0) {
      row.range.end = row.range.begin;
    }
  }
  row.sink = kLowest<A>;
  if (scores.sink != nullptr) {
    row.sink = static_cast<A>(scores.sink[place(scores.sink_strides, k)]);
  }
  return row;
}

// Of reduce_and_store: rows are read where they lie.
struct Unplaced {
  static constexpr int64_t together() { return 1; }
  static void place_rows(int64_t, int64_t, int64_t, int64_t) {}
};

// y is `value` but for the registers of a chunk of n, which are result(i, lanes).
template <Write write, class T, class A = compute_t<T>, class Result>
SOFTMAX_EXT_INLINE void store_chunk(T* y, int64_t n, Registers<A> registers, A value,
                                    Result result) {
  const auto fill = [=](T* to, int64_t count) SOFTMAX_EXT_LAMBDA {
    store_each<write, T>(to, count,
                         [=](int64_t, auto) SOFTMAX_EXT_LAMBDA { return Vec<A>(value); });
  };
  const int64_t end = std::min(registers.end, n);
  if (registers.begin > 0) fill(y, registers.begin);
  store_each<write, T>(y + registers.begin, end - registers.begin,
                       [=](int64_t i, auto lanes)
                           SOFTMAX_EXT_LAMBDA { return result(registers.begin + i, lanes); });
  if (end < n) fill(y + end, n - end);
}

}  // namespace
}  // namespace softmax_ext::cpu
