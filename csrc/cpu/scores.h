// Rows of scores: what becomes of a row's elements before softmax, and which rows a call has.
//
// Elements are read once into a buffer in the first-level cache, as scores; what softmax does with them
// is done there. Registers of a row are counted from its first element, and summed in four sums in turns,
// so that what takes no part in the row, which adds nothing, need not be looked at.
#pragma once

#include <algorithm>

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

// x in the lanes that stand for elements, `fill` in the others.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> filled(Vec<T> x, All, T) {
  return x;
}
template <class T>
SOFTMAX_EXT_INLINE Vec<T> filled(Vec<T> x, First lanes, T fill) {
  return first_of(x, lanes, fill);
}

// x where it is not -inf, else 0.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> zero_where_lowest(Vec<T> x, Vec<T> y) {
  return y.raw == Vec<T>(kLowest<T>).raw ? typename Vec<T>::Raw{} : x.raw;
}

// 2^n of integers from -126 to 0.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> power_of_two(Vec<T> n) {
  using C = ExpConstants<T>;
  const auto bits = bit_cast<typename Vec<T>::RawInt>(n + Vec<T>(C::kRound + C::kBias));
  return bit_cast<typename Vec<T>::Raw>(bits << C::kMantissaBits);
}

// a / b, exact to its last place but for few, with b of 1 or more, far from overflow.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> quotient_of(Vec<T> a, Vec<T> b) {
#if defined(SOFTMAX_EXT_AVX512)
  if constexpr (sizeof(T) == 4) {
    const VecF reciprocal = _mm512_rcp14_ps(b.raw), quotient = a * reciprocal;
    return fma_of(fma_of(-quotient, b, a), reciprocal, quotient);
  }
#endif
  return a / b;
}

// exp(x) - 1, exact where x is small too: n is 0 there. For x of at most 0 or a rounding above it, or NaN;
// -1 below -40, to which others come as close as can be said.
template <class T>
SOFTMAX_EXT_INLINE Vec<T> expm1_of_nonpositive(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  x = max_of(V(T(-40)), x);
  const V n = fma_of(x, V(T(1.44269504088896340736)), V(C::kRound)) - V(C::kRound);
  V r = fma_of(n, V(-C::kLn2High), x);
  r = fma_of(n, V(-C::kLn2Low), r);
  constexpr int kDegree = static_cast<int>(sizeof(C::kPolynomial) / sizeof(T)) - 1;
  V q(C::kPolynomial[kDegree]);
  for (int k = kDegree - 1; k >= 0; --k) q = fma_of(q, r, V(C::kPolynomial[k]));
  const V power = power_of_two(n);
  return fma_of(power, fma_of(q * r, r, r), power - V(T(1)));
}

// -m / (2 + m) with m = exp(-2 |x|) - 1. Within 2.5 units in the last place; a NaN stays one.
SOFTMAX_EXT_INLINE VecD tanh_of(VecD x) {
  using V = VecD;
  using RawInt = typename V::RawInt;
  const RawInt sign_bit = bit_cast<RawInt>(V(-0.0));
  const RawInt sign = bit_cast<RawInt>(x) & sign_bit;
  const V size(bit_cast<typename V::Raw>(bit_cast<RawInt>(x) & ~sign_bit));
  const V m = expm1_of_nonpositive(size * V(-2.0));
  const V result = -m / (V(2.0) + m);
  return V(bit_cast<typename V::Raw>(bit_cast<RawInt>(result) | sign));
}

// c tanh(x / c) = (x + x u^2 p(u^2)) / (1 + u^2 q(u^2)), with u = x / c up to where tanh is 1: minimax for the
// relative error (2^-25). Rounding u, and 1 / c, hardly counts. A NaN stays one.
SOFTMAX_EXT_INLINE VecF capped_of(VecF x, VecF c, VecF inverse) {
  constexpr float kNumerator[] = {0x1.121a9ap-3f, 0x1.ca9ed8p-9f, 0x1.5aa37ep-16f, 0x1.cd1a1cp-27f};
  constexpr float kDenominator[] = {0x1.de629ap-2f, 0x1.a82f68p-6f, 0x1.59172ap-12f,
                                    0x1.a30376p-21f};
  const VecF limit = c * VecF(9.0f), one(1.0f);
  x = min_of(limit, max_of(-limit, x));
  const VecF u = x * inverse, square = u * u;
  VecF p(kNumerator[3]), q(kDenominator[3]);
  for (int k = 2; k >= 0; --k) {
    p = fma_of(p, square, VecF(kNumerator[k]));
    q = fma_of(q, square, VecF(kDenominator[k]));
  }
  return quotient_of(fma_of(x * square, p, x), fma_of(q, square, one));
}

SOFTMAX_EXT_INLINE VecD capped_of(VecD x, VecD c, VecD inverse) { return tanh_of(x * inverse) * c; }

// ---- masks --------------------------------------------------------------------------------------

struct NoMask {};

template <class A>
struct OneForAll {
  A value;
};

// s where the mask is true, else -inf.
#if defined(SOFTMAX_EXT_AVX512)
template <class A, class Lanes>
SOFTMAX_EXT_INLINE Vec<A> where_true(const Bool* mask, Lanes lanes, Vec<A> s) {
  __m128i bytes;
  if constexpr (!kWhole<Lanes>) {
    check_access(mask, lanes.count);
    bytes = _mm_maskz_loadu_epi8(mask_of(lanes), mask);
  } else if constexpr (sizeof(A) == 4) {
    bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
  } else {
    bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
  }
  const __mmask16 live = _mm_test_epi8_mask(bytes, bytes);
  // In a register: a load that the compiler makes wait for the mask also waits for stores.
  asm("" : "+v"(s.raw));
  if constexpr (sizeof(A) == 4) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(kLowest<A>), live, s.raw);
  } else {
    return _mm512_mask_mov_pd(_mm512_set1_pd(kLowest<A>), static_cast<__mmask8>(live), s.raw);
  }
}
#else
template <class A, class Lanes>
SOFTMAX_EXT_INLINE Vec<A> where_true(const Bool* mask, Lanes lanes, Vec<A> s) {
  constexpr int kSize = Vec<A>::kSize;
  uint8_t bytes[kSize] = {};
  if constexpr (kWhole<Lanes>) {
    std::memcpy(bytes, mask, kSize);
  } else {
    for (int64_t k = 0; k < lanes.count; ++k) bytes[k] = mask[k].byte;
  }
#if defined(SOFTMAX_EXT_AVX2)
  int64_t packed = 0;
  std::memcpy(&packed, bytes, kSize);
  const __m128i some = _mm_cvtsi64_si128(packed);
  const __m256i dead = sizeof(A) == 4
                           ? _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(some), _mm256_setzero_si256())
                           : _mm256_cmpeq_epi64(_mm256_cvtepu8_epi64(some), _mm256_setzero_si256());
  const auto live = bit_cast<typename Vec<A>::RawInt>(dead) == 0;
#else
  typename Vec<A>::RawInt live;
  for (int k = 0; k < kSize; ++k) live[k] = -(bytes[k] != 0);
#endif
  return live ? s.raw : Vec<A>(kLowest<A>).raw;
}
#endif

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
  return where_true(mask + i, lanes, s);
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
  A softcap;         // 0 if there is none
  const void* mask;  // of the row's first element, or null
  DType mask_dtype;
  bool one_for_all;  // the mask has one element for the row
  Range range;       // of the elements that take part
  A sink;            // -inf if there is none

  SOFTMAX_EXT_INLINE OneForAll<A> mask_for_all() const {
    switch (mask_dtype) {
      case DType::kBool:
        return {A(0)};  // or nothing takes part
      case DType::kFloat16:
        return {to_float(*static_cast<const Float16*>(mask))};
      case DType::kBFloat16:
        return {to_float(*static_cast<const BFloat16*>(mask))};
      default:
        return {*static_cast<const A*>(mask)};
    }
  }

  // f(mask_of): of any row of the call, mask_of(row) is what `masked` takes.
  template <class F>
  SOFTMAX_EXT_INLINE void visit_masks(F f) const {
    const auto elements = [=](auto element) SOFTMAX_EXT_LAMBDA {
      using M = decltype(element);
      f([](const RowScores& row) SOFTMAX_EXT_LAMBDA { return static_cast<const M*>(row.mask); });
    };
    if (mask == nullptr) return f([](const RowScores&) SOFTMAX_EXT_LAMBDA { return NoMask{}; });
    if (one_for_all) {
      return f([](const RowScores& row) SOFTMAX_EXT_LAMBDA { return row.mask_for_all(); });
    }
    if (mask_dtype == DType::kBool) return elements(Bool{});
    if constexpr (std::is_same_v<A, float>) {
      if (mask_dtype == DType::kFloat16) return elements(Float16{});
      if (mask_dtype == DType::kBFloat16) return elements(BFloat16{});
    }
    elements(A{});
  }
};

// The scores of n elements of a row from `first` on, in whole registers from z on, and the largest of each
// lane.
template <bool kCapped, class T, class M, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Vec<A> scores_of(const T* x, A* z, int64_t first, int64_t n, M mask,
                                    const RowScores<A>& row) {
  using V = Vec<A>;
  const V scale(row.scale), softcap(row.softcap), inverse(kCapped ? A(1) / row.softcap : A(0));
  return fold(
      n, V(kLowest<A>),
      [=](V max, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        V s = load(x + first + i, lanes, A(0)) * scale;
        if constexpr (kCapped) s = capped_of(s, softcap, inverse);
        s = filled(masked(s, mask, first + i, lanes), lanes, kLowest<A>);
        store(z + i, All{}, s);
        return max_of(s, max);
      },
      Max{});
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

// The scores of a chunk of some rows, of n elements from `first` on, in place: those outside of a row's range, as
// far as registers go, are -inf. Of row r, z + r * apart has them, with room for a register more than n, and
// maxes[r] the largest of each lane.
template <class T, class A = compute_t<T>>
__attribute__((noinline)) void place_scores(const Few<const T>& x, A* z, int64_t apart,
                                            int64_t first, int64_t n, const RowScores<A>* rows,
                                            int64_t count, Vec<A>* maxes) {
  constexpr int64_t kSize = Vec<A>::kSize;
  const auto place = [=](auto is_capped, auto mask_of) SOFTMAX_EXT_LAMBDA {
    for (int64_t r = 0; r < count; ++r) {
      const RowScores<A>& row = rows[r];
      const Range range = within(row.range, first, n);
      if (range.begin == range.end) {
        maxes[r] = Vec<A>(kLowest<A>);
        continue;
      }
      const Registers<A> registers(range);
      A* const to = z + r * apart;
      if (range.begin % kSize != 0) store(to + registers.end - kSize, All{}, Vec<A>(kLowest<A>));
      for (int64_t i = registers.begin; i < range.begin; i += kSize) {
        store(to + i, All{}, Vec<A>(kLowest<A>));
      }
      maxes[r] = scores_of<is_capped()>(x[r], to + range.begin, first + range.begin,
                                        range.end - range.begin, mask_of(row), row);
    }
  };
  rows->visit_masks([=](auto mask_of) SOFTMAX_EXT_LAMBDA {
    rows->softcap == 0 ? place(std::false_type{}, mask_of) : place(std::true_type{}, mask_of);
  });
}

// The same of a row alone.
template <class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Vec<A> place_scores(const T* x, A* z, int64_t first, int64_t n,
                                       const RowScores<A>& row) {
  Vec<A> max;
  place_scores(Few<const T>{x, 0}, z, 0, first, n, &row, 1, &max);
  return max;
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

// The sum of exp(z - max) lane by lane, of which keep(i, exp) gets each.
template <class A, class Keep>
SOFTMAX_EXT_INLINE Vec<A> sum_of_exp(const A* z, Registers<A> registers, A max, Keep keep) {
  using V = Vec<A>;
  const V shift = shift_of(V(max));
  V sums[kSums] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
  for_each_register(registers, [&](int64_t i, int64_t k) SOFTMAX_EXT_LAMBDA {
    const V e = exp_of_nonpositive(load(z + i, All{}, A(0)) - shift);
    keep(i, e);
    sums[k] = sums[k] + e;
  });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// ---- the rows of a call -------------------------------------------------------------------------

// Some rows of a call along one outer dim, and where these lie in a tensor: `next` from one another.
struct Place {
  const Dims* dims;
  const int64_t* index;  // of the first
  int along;

  SOFTMAX_EXT_INLINE int64_t first(const Strides& strides) const {
    return outer_offset(*dims, strides, index);
  }
  template <class T>
  SOFTMAX_EXT_INLINE Few<T> operator()(T* data, const Strides& strides) const {
    if (data == nullptr) return {nullptr, 0};
    return {data + first(strides), strides.of[along]};
  }
  template <class T>
  SOFTMAX_EXT_INLINE Few<T> operator()(void* data, const Strides& strides) const {
    return (*this)(static_cast<T*>(data), strides);
  }
  template <class T>
  SOFTMAX_EXT_INLINE Few<const T> operator()(const void* data, const Strides& strides) const {
    return (*this)(static_cast<const T*>(data), strides);
  }
};

// A row alone. index: kMax numbers, to be kept as long.
inline Place place_of(const Dims& dims, int64_t row, int64_t* index) {
  for (int k = dims.outer - 1; k > 0; --k) {
    index[k] = row % dims.sizes[k];
    row /= dims.sizes[k];
  }
  index[0] = row;
  return {&dims, index, dims.outer - 1};
}

// What scores are made of in some rows.
template <class A>
class ScoresOfRows {
 public:
  ScoresOfRows(const Scores& scores, const Place& place, int64_t dim)
      : scores_(scores),
        dim_(dim),
        scale_(place(scores.scale, scores.scale_strides)),
        sink_(place(scores.sink, scores.sink_strides)),
        mask_(static_cast<const char*>(scores.mask)) {
    row_.softcap = static_cast<A>(scores.softcap);
    row_.mask_dtype = scores.mask_dtype;
    row_.one_for_all = scores.mask_strides.dim == 0 && dim > 1;
    if (mask_ != nullptr) {
      mask_size_ = size_of(scores.mask_dtype);
      mask_ += place.first(scores.mask_strides) * mask_size_;
      mask_next_ = scores.mask_strides.of[place.along] * mask_size_;
    }
    if (scores.is_bounded()) {
      query_ = place.first(scores.query_strides);
      query_next_ = scores.query_strides.of[place.along];
    }
  }

  // The mask of element i of row k, ahead of its use.
  SOFTMAX_EXT_INLINE void fetch_mask(int64_t k, int64_t i) const {
    if (mask_ == nullptr || row_.one_for_all) return;
    __builtin_prefetch(mask_ + k * mask_next_ + i * mask_size_);
  }

  SOFTMAX_EXT_INLINE RowScores<A> operator[](int64_t k) const {
    RowScores<A> row = row_;
    const double scale = scale_.first == nullptr ? scores_.factor : scores_.factor * *scale_[k];
    row.scale = static_cast<A>(scale);
    row.sink = static_cast<A>(sink_.first == nullptr ? scores_.sink_of_all : *sink_[k]);
    row.range =
        scores_.is_bounded() ? scores_.range(query_ + k * query_next_, dim_) : Range{0, dim_};
    row.mask = nullptr;
    if (mask_ != nullptr) {
      row.mask = mask_ + k * mask_next_;
      if (row.one_for_all && row.mask_dtype == DType::kBool &&
          static_cast<const Bool*>(row.mask)->byte == 0) {
        row.range.end = row.range.begin;
      }
    }
    return row;
  }

 private:
  const Scores& scores_;
  int64_t dim_;
  Few<const double> scale_, sink_;
  const char* mask_;
  int64_t mask_size_ = 0, mask_next_ = 0, query_ = 0, query_next_ = 0;
  RowScores<A> row_{};
};

// rows(place, count) for all rows, in places that have some times `few` of them.
template <class A, class Rows>
void for_each_place(const Shape& shape, const Dims& dims, int64_t few,
                    std::initializer_list<const Strides*> tensors, const Threads& threads,
                    Rows rows) {
  const int64_t most = 4 * few;
  // Neighbours lie side by side, unless too few of them do.
  const bool along_last = 2 * dims.sizes[dims.outer - 1] >= few;
  const Groups groups(dims, few, most, tensors, along_last);
  parallel_for(threads, groups.count(), ceil_div(grain<A>(shape.dim), most),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const Group group = groups[i];
                   rows(Place{&dims, group.index, groups.along()}, group.size);
                 }
               });
}

// Of reduce_and_store: rows are read where they lie.
struct Unplaced {
  static constexpr int64_t together() { return 1; }
  static void place_rows(int64_t, int64_t, int64_t, int64_t) {}
};

// y is `value` but for the registers of a chunk of n, which are result(i, lanes).
template <class T, class A = compute_t<T>, class Result>
SOFTMAX_EXT_INLINE void store_chunk(bool streamed, T* y, int64_t n, Registers<A> registers, A value,
                                    Result result) {
  const auto fill = [=](T* to, int64_t count) SOFTMAX_EXT_LAMBDA {
    store_each<T>(streamed, to, count,
                  [=](int64_t, auto) SOFTMAX_EXT_LAMBDA { return Vec<A>(value); });
  };
  const int64_t end = std::min(registers.end, n);
  if (registers.begin > 0) fill(y, registers.begin);
  store_each<T>(streamed, y + registers.begin, end - registers.begin,
                [=](int64_t i, auto lanes)
                    SOFTMAX_EXT_LAMBDA { return result(registers.begin + i, lanes); });
  if (end < n) fill(y + end, n - end);
}

}  // namespace
}  // namespace softmax_ext::cpu
