// The CPU schedules. Compiled once for each instruction set, which SOFTMAX_EXT_ISA names.
//
//   rows         inner == 1: a thread takes whole rows. A row of one chunk is read once into cache;
//                a longer one chunk by chunk for its state, then for the output.
//   split rows   inner == 1, fewer long rows than threads: the chunks of a row are shared out.
//   columns      inner > 1: a thread takes tiles of neighbouring columns, in blocks along dim.
//   short columns, packed columns
//                a step along dim of at most 512 bytes, as computed: dims of up to 64 steps by
//                registers of columns, of several slices where a step has less (up to 32 steps in a
//                backward); longer ones by chunks of up to 16 rows of several steps each, which
//                threads share if slices are few. A backward of 17 to 64 steps that are whole
//                registers goes by tiles.
//
// A row is always reduced by the same chunks (blocks) in the same order, so its result depends
// neither on the batch it is in nor on the number of threads. A column's may depend on inner. Input of
// another type is first rounded to the output's, in the output's memory, one row or tile at a time.
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <numeric>
#include <type_traits>

#include "launch.h"
#include "softmax_ext/formula.h"
#include "softmax_ext/online_state.h"
#include "vec.h"

namespace softmax_ext::cpu {
namespace {

// Of a row: small enough to stay in the first-level cache between two looks, and for each lane of the
// four registers that sum it to have no more than 64 terms.
template <class A>
constexpr int64_t kChunk =
    std::min<int64_t>(16384 / static_cast<int64_t>(sizeof(A)), 256 * Vec<A>::kSize);

// The largest dim whose columns stay in registers or in the first-level cache.
constexpr int64_t kShortDim = 64;

// Bytes of a row that stays in the second-level cache, with its output.
constexpr int64_t kKeptRow = 1 << 19;

// Columns of a tile: their states and formulas stay in the first-level cache.
template <class A>
constexpr int64_t kTile = 2048 / static_cast<int64_t>(sizeof(A));

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items of so many elements each that are worth waking a thread for: 1024 registers, each about 5 ns
// of work whatever they hold. A pool that is awake takes 1 us for it, one that sleeps 40 and more.
template <class A>
constexpr int64_t grain(int64_t elements) {
  return ceil_div(1024, ceil_div(elements, Vec<A>::kSize));
}

template <class F>
void parallel_for(const Threads& threads, int64_t size, int64_t grain, F body) {
  threads.parallel_for(
      size, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<F*>(context))(begin, end);
        stream_fence();
      },
      &body);
}

// A few slices of a tensor, each `next` from the one before.
template <class T>
struct Few {
  T* first;
  int64_t next;

  SOFTMAX_EXT_INLINE T* operator[](int64_t k) const { return first + k * next; }
  SOFTMAX_EXT_INLINE void skip(int64_t count) { first += count * next; }
};

// `size` slices along one outer dim. `index` is of the first.
struct Group {
  int64_t size;
  int64_t index[Dims::kMax];
};

// The slices of a tensor whose columns lie side by side: a step from another is `step` elements apart.
template <class T>
struct Slices {
  const Dims* dims;
  const Strides* strides;
  T* data;
  int64_t step;

  Slices(const Dims& dims, const Strides& strides, T* data)
      : dims(&dims), strides(&strides), data(data), step(strides.dim) {}

  SOFTMAX_EXT_INLINE T* operator[](int64_t slice) const {
    return data + outer_offset(*dims, *strides, dims->outer, slice);
  }
  SOFTMAX_EXT_INLINE Few<T> operator()(const Group& group, int along) const {
    return {data + outer_offset(*dims, *strides, group.index), strides->of[along]};
  }
};

// All slices of a call, in groups along one outer dim: in each tensor these are even, so that the next one
// is an addition away.
class Groups {
 public:
  // Of at most `most` slices each, which are worked on `few` at a time. along_last: no other dim will do.
  Groups(const Dims& dims, int64_t few, int64_t most, std::initializer_list<const Strides*> tensors,
         bool along_last)
      : most_(most), loops_(dims.outer), along_(dims.outer - 1) {
    // Along the dim of which the fewest are left over; of equals, the last.
    const auto times = [&](int k) { return ceil_div(dims.sizes[k], few); };
    for (int k = along_; k-- > 0 && !along_last;) {
      if (dims.sizes[k] * times(along_) > dims.sizes[along_] * times(k)) along_ = k;
    }
    size_ = dims.sizes[along_];
    // Its loop is outside those of dims with shorter strides in some tensor, which is so walked in tiles:
    // small ones, to stay in the first-level cache.
    int place = 0;
    const auto is_within = [&](const Strides* strides) {
      return strides->of[place] != 0 && strides->of[place] < strides->of[along_];
    };
    while (place < along_ && std::none_of(tensors.begin(), tensors.end(), is_within)) ++place;
    if (place < along_ && !along_last) most_ = std::clamp<int64_t>(32, few, most);
    for (int j = 0; j < loops_; ++j) {
      order_[j] = j < place || j > along_ ? j : j == place ? along_ : j - 1;
      sizes_[j] = j == place ? ceil_div(size_, most_) : dims.sizes[order_[j]];
      count_ *= sizes_[j];
    }
  }

  int64_t count() const { return count_; }
  int along() const { return along_; }

  SOFTMAX_EXT_INLINE Group operator[](int64_t i) const {
    Group group;
    for (int j = loops_ - 1; j > 0; --j) {
      group.index[order_[j]] = i % sizes_[j];
      i /= sizes_[j];
    }
    group.index[order_[0]] = i;
    int64_t& first = group.index[along_];
    first *= most_;
    group.size = std::min(most_, size_ - first);
    return group;
  }

 private:
  int64_t most_, size_, count_ = 1;
  int loops_, along_;
  int order_[Dims::kMax];  // of the outer dims
  int64_t sizes_[Dims::kMax];
};

// step(i, lanes) for each vector of [0, n); the last may be partial.
template <int kSize, class Step>
SOFTMAX_EXT_INLINE void for_each_vector(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kSize <= n; i += kSize) step(i, All{});
  if (i < n) step(i, First{n - i});
}

// Folds [0, n) into one vector: step(accumulator, i, lanes) returns the accumulator's new value.
// Four accumulators hide the latency of a step.
template <class V, class Step, class Merge>
SOFTMAX_EXT_INLINE V fold(int64_t n, V identity, Step step, Merge merge) {
  constexpr int kSize = V::kSize;
  V a0 = identity, a1 = identity;
  int64_t i = 0;
  if (n < 4 * kSize) {  // what the rest would come to, without the merges of nothing
    for (; i + kSize <= n; i += kSize) a0 = step(a0, i, All{});
    return i < n ? merge(a0, step(a1, i, First{n - i})) : a0;
  }
  V a2 = identity, a3 = identity;
  for (; i + 4 * kSize <= n; i += 4 * kSize) {
    a0 = step(a0, i, All{});
    a1 = step(a1, i + kSize, All{});
    a2 = step(a2, i + 2 * kSize, All{});
    a3 = step(a3, i + 3 * kSize, All{});
  }
  for (; i + kSize <= n; i += kSize) a0 = step(a0, i, All{});
  if (i < n) a1 = step(a1, i, First{n - i});
  return merge(merge(a0, a1), merge(a2, a3));
}

// ---- forward, over the last dim -----------------------------------------------------------------

template <class A>
constexpr A kLowest = -static_cast<A>(INFINITY);

template <class T>
constexpr bool kDivides = sizeof(T) == 8 && !kFusedMultiplyAdd;

// The policy of Forward: no element is above its row's max. What is rounded to 16 bits afterwards
// can do with the reciprocal alone, and doubles without a fused multiply-add are divided.
template <class T, class V>
struct Share : Full<V> {
  static SOFTMAX_EXT_INLINE V exp(V x) { return exp_of_nonpositive(x); }
  // e / sum is e times the reciprocal and what that is rounded off, rounded once; `correction` is that, or
  // the sum where one divides by it.
  static SOFTMAX_EXT_INLINE V quotient(V e, V correction, V reciprocal) {
    if constexpr (sizeof(T) == 2) return e * reciprocal;
    if constexpr (kDivides<T>) return e / correction;
    return fma_of(e, reciprocal, e * correction);
  }
};

// The formula of log-softmax, and what its log_sum is rounded off.
template <class V>
struct ExactLogSoftmax : Forward<Op::kLogSoftmax, V> {
  V rest;

  template <class F>
  static SOFTMAX_EXT_INLINE ExactLogSoftmax map(const ExactLogSoftmax& other, F f) {
    return {Forward<Op::kLogSoftmax, V>::map(other, f), f(other.rest)};
  }
  SOFTMAX_EXT_INLINE V of(V x) const { return ((x - this->max) - rest) - this->log_sum; }
};

template <Op op, class T, class V = Vec<compute_t<T>>>
using forward_t = std::conditional_t<op == Op::kSoftmax || sizeof(T) == 2,
                                     Forward<op, V, Share<T, V>>, ExactLogSoftmax<V>>;

// The formula for a row's max and its sum + rest, where rest is an ulp of the sum or so, which 16 bits
// do without. In each lane for another row, or the same.
template <Op op, class T, class V = Vec<compute_t<T>>>
SOFTMAX_EXT_INLINE forward_t<op, T> formula_of(V max, V sum, V rest) {
  forward_t<op, T> formula;
  formula.max = max;
  if constexpr (op == Op::kSoftmax) {
    const V one(1);
    formula.reciprocal = one / sum;
    const V off = fma_of(-formula.reciprocal, sum, one);
    formula.correction =
        kDivides<T> ? sum : fma_of(-formula.reciprocal, rest, off) * formula.reciprocal;
  } else if constexpr (sizeof(T) == 2) {
    V rest_of_log;
    formula.log_sum = log_of(sum, V(0), &rest_of_log);
  } else {
    formula.log_sum = log_of(sum, rest, &formula.rest);
  }
  return formula;
}

template <Op op, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE forward_t<op, T> formula_of(OnlineState<double> row) {
  const A sum = static_cast<A>(row.sum);
  return formula_of<op, T>(Vec<A>(static_cast<A>(row.max)), Vec<A>(sum),
                           Vec<A>(static_cast<A>(row.sum - sum)));
}

// The largest of x, lane by lane.
template <class T, class V = Vec<compute_t<T>>>
SOFTMAX_EXT_INLINE V lane_max(const T* x, int64_t n) {
  constexpr auto kFill = kLowest<compute_t<T>>;
  return fold(
      n, V(kFill),
      [=](V max, int64_t i, auto lanes)
          SOFTMAX_EXT_LAMBDA { return max_of(load(x + i, lanes, kFill), max); },
      Max{});
}

template <class Lanes>
constexpr bool kWhole = std::is_same_v<Lanes, All>;

// The sum of exp(x - max), lane by lane. With kKeep, the exps of whole vectors are left in `kept`;
// those of a partial one only if keep_all, since a load of it would wait for its store.
template <bool kKeep, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Vec<A> lane_sum_of_exp(const T* x, A* kept, int64_t n, A max,
                                          bool keep_all = false) {
  using V = Vec<A>;
  const V shift = shift_of(V(max));
  return fold(
      n, V(A(0)),
      [=](V sum, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        const V e = exp_of_nonpositive(load(x + i, lanes, kLowest<A>) - shift);
        if constexpr (kKeep) {
          if (kWhole<decltype(lanes)> || keep_all) store(kept + i, lanes, e);
        }
        return sum + e;
      },
      Add{});
}

// How an output is written.
enum class Write { kCached, kStreamed };

// y[i] = value(i, lanes), computed from elements of type From, for each vector of [0, n).
template <Write write, class From, class T, class Value>
SOFTMAX_EXT_INLINE void store_each(T* y, int64_t n, Value value) {
  constexpr int64_t kSize = Vec<compute_t<From>>::kSize;
  int64_t begin = 0;
  if constexpr (write == Write::kStreamed) {
    constexpr int64_t kBytes = kSize * sizeof(T);
    const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(y)) % kBytes;
    if (beyond != 0) {
      begin = std::min(n, (kBytes - beyond) / static_cast<int64_t>(sizeof(T)));
      store(y, First{begin}, value(0, First{begin}));
    }
    for (; begin + kSize <= n; begin += kSize) stream(y + begin, value(begin, All{}));
  }
  for_each_vector<kSize>(n - begin, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
    store_as<From>(y + begin + i, lanes, value(begin + i, lanes));
  });
}

template <Write write, class T, class Formula>
SOFTMAX_EXT_INLINE void store_output(const T* x, T* y, int64_t n, Formula formula) {
  using A = compute_t<T>;
  store_each<write, T>(y, n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
    return formula.of(load(x + i, lanes, A(0)));
  });
}

// formulas[r], of row r, in all lanes.
template <class F>
SOFTMAX_EXT_INLINE F of_lane(const F& formulas, int64_t r) {
  return F::map(formulas, [=](const auto& of_rows) SOFTMAX_EXT_LAMBDA {
    return std::decay_t<decltype(of_rows)>(of_rows.raw[r]);
  });
}

// `rows` rows of at most a register each, which are read once.
template <Op op, class T>
void forward_rows_of_a_register(const Few<const T>& x, const Few<T>& y, int64_t n, int64_t rows) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const First lanes{n};
  V values[V::kSize], of_rows[V::kSize];
  alignas(64) A maxes[V::kSize] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x[r];
    values[r] = n == V::kSize ? load(row, All{}, kLowest<A>) : load(row, lanes, kLowest<A>);
    of_rows[r] = values[r];
  }
  max_over_lanes(of_rows, rows, maxes);
  for (int64_t r = 0; r < rows; ++r) {
    of_rows[r] = exp_of_nonpositive(values[r] - shift_of(V(maxes[r])));
    if constexpr (op == Op::kSoftmax) values[r] = of_rows[r];
  }
  const ExactSum<V> sum = exact_sum_over_lanes(of_rows, rows);
  const auto formulas = formula_of<op, T>(load(maxes, All{}, A(0)), sum.sum, sum.rest);
  for (int64_t r = 0; r < rows; ++r) {
    const auto formula = of_lane(formulas, r);
    V result;
    if constexpr (op == Op::kSoftmax) {
      result = formula.of_exp(values[r]);
    } else {
      result = formula.of(values[r]);
    }
    if (n == V::kSize) {
      store(y[r], All{}, result);
    } else {
      store(y[r], lanes, result);
    }
  }
}

// `rows` rows of n elements, together or alone at most one chunk. Step by step for all of them, which
// hides the latency of each step.
template <Op op, Write write, class T>
void forward_short_rows(const Few<const T>& x, const Few<T>& y, int64_t n, int64_t rows) {
  using A = compute_t<T>;
  using V = Vec<A>;
  if (n <= V::kSize) return forward_rows_of_a_register<op>(x, y, n, rows);
  // The exps are kept in the output's memory, or beside it where that is narrower, or streamed to.
  constexpr bool kKeep = op == Op::kSoftmax;
  constexpr bool kStreamed = write == Write::kStreamed;
  constexpr bool kInOutput = std::is_same_v<T, A> && !kStreamed;
  alignas(64) A scratch[kKeep && !kInOutput ? kChunk<A> : 1];
  const auto kept_of = [&](int64_t r) SOFTMAX_EXT_LAMBDA -> A* {
    if constexpr (kInOutput) return y[r];
    return scratch + (kKeep ? r * n : 0);
  };
  V lanes[V::kSize];
  alignas(64) A maxes[V::kSize] = {};
  for (int64_t r = 0; r < rows; ++r) lanes[r] = lane_max(x[r], n);
  max_over_lanes(lanes, rows, maxes);
  for (int64_t r = 0; r < rows; ++r) {
    lanes[r] = lane_sum_of_exp<kKeep>(x[r], kept_of(r), n, maxes[r], /*keep_all=*/kStreamed);
  }
  const ExactSum<V> sum = exact_sum_over_lanes(lanes, rows);
  const auto formulas = formula_of<op, T>(load(maxes, All{}, A(0)), sum.sum, sum.rest);
  for (int64_t r = 0; r < rows; ++r) {
    const auto formula = of_lane(formulas, r);
    const T* row = x[r];
    const A* kept = kept_of(r);
    store_each<write, T>(y[r], n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      if constexpr (kKeep && (kWhole<decltype(lanes)> || kStreamed)) {
        return formula.of_exp(load(kept + i, lanes, A(0)));
      } else {
        return formula.of(load(row + i, lanes, A(0)));
      }
    });
  }
}

// work(size, slices of each tensor) for all slices, when they can be read: in groups of at most `most`, for
// work on `few` at a time.
template <class A, class Input, class Work, class... T>
void for_each_group(const Shape& shape, const Dims& dims, const Input& input, int64_t few,
                    int64_t most, const Threads& threads, Work work, const Slices<T>&... tensors) {
  const Groups groups(dims, few, most, {tensors.strides...}, input.is_placed());
  parallel_for(threads, groups.count(), ceil_div(grain<A>(shape.dim * shape.inner), most),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const Group group = groups[i];
                   input.place_group(group, groups.along(), shape);
                   work(group.size, tensors(group, groups.along())...);
                 }
               });
}

// work(count, rows of each tensor) for all rows, of at most one chunk each: as many as have at most `elements`
// together, from one to one for each lane of a register.
template <class A, class Input, class Work, class... T>
void for_each_few_rows(const Shape& shape, const Dims& dims, const Input& input, int64_t elements,
                       const Threads& threads, Work work, const Slices<T>&... tensors) {
  const int64_t few = std::clamp<int64_t>(elements / shape.dim, 1, Vec<A>::kSize);
  const int64_t most = few < Vec<A>::kSize ? few : 4 * few;
  for_each_group<A>(
      shape, dims, input, few, std::max(most, input.together()), threads,
      [&](int64_t size, Few<T>... rows) {
        for (; size > 0; size -= few, (rows.skip(few), ...)) work(std::min(few, size), rows...);
      },
      tensors...);
}

struct Sum {
  double sum;
};

SOFTMAX_EXT_INLINE Sum combine(Sum a, Sum b) { return {a.sum + b.sum}; }

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(std::malloc(sizeof(T) * size))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }

 private:
  T* data_;
};

// For each row, of more than one chunk: a state by reduce(row, begin, size) for each chunk, when that can
// be read; all combined in order; then store(row, begin, size, of_chunk, of_row) for each chunk. States
// are kept in double.
template <class State, class A, class Input, class Reduce, class Store>
void reduce_and_store(int64_t rows, int64_t dim, const Input& input, const Threads& threads,
                      Reduce reduce, Store store) {
  using softmax_ext::combine;
  constexpr int64_t chunk = kChunk<A>;
  const int64_t chunks = ceil_div(dim, chunk);
  const auto reduce_chunk = [&](int64_t row, int64_t k, bool is_placed) {
    const int64_t size = std::min(chunk, dim - k * chunk);
    if (!is_placed) input.place_rows(row, 1, k * chunk, size);
    return reduce(row, k * chunk, size);
  };
  const auto combine_chunks = [=](const State* states) {
    State state = states[0];
    for (int64_t k = 1; k < chunks; ++k) state = combine(state, states[k]);
    return state;
  };
  const auto store_chunk = [=](int64_t row, int64_t k, State of_chunk, State of_row) {
    store(row, k * chunk, std::min(chunk, dim - k * chunk), of_chunk, of_row);
  };
  if (rows >= threads.count) {
    parallel_for(threads, rows, /*grain=*/1, [&](int64_t begin, int64_t end) {
      const Buffer<State> buffer(chunks);
      State* const states = buffer.data();
      for (int64_t row = begin, placed = begin; row < end; ++row) {
        if (const int64_t few = std::min(input.together(), end - row); row == placed && few > 1) {
          input.place_rows(row, few, 0, dim);
          placed = row + few;
        }
        for (int64_t k = 0; k < chunks; ++k) states[k] = reduce_chunk(row, k, row < placed);
        const State of_row = combine_chunks(states);
        for (int64_t k = 0; k < chunks; ++k) store_chunk(row, k, states[k], of_row);
      }
    });
    return;
  }
  const Buffer<State> buffer(rows * chunks + rows);
  State* const states = buffer.data();
  State* const of_rows = states + rows * chunks;
  parallel_for(threads, rows * chunks, grain<A>(chunk), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) states[t] = reduce_chunk(t / chunks, t % chunks, false);
  });
  for (int64_t row = 0; row < rows; ++row) of_rows[row] = combine_chunks(states + row * chunks);
  parallel_for(threads, rows * chunks, grain<A>(chunk), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      store_chunk(t / chunks, t % chunks, states[t], of_rows[t / chunks]);
    }
  });
}

// ---- input of another type, or not side by side -------------------------------------------------

// n elements that are `apart`, rounded to T.
template <class T, class From>
SOFTMAX_EXT_INLINE void convert(const From* x, int64_t apart, T* y, int64_t n) {
  using A = compute_t<T>;
  constexpr int kSize = Vec<A>::kSize;
  for_each_vector<kSize>(n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
    if constexpr (kIsFloating<From> && std::is_same_v<compute_t<From>, A>) {
      if (apart == 1) {
        store(y + i, lanes, plain_nan(load(x + i, lanes, A(0))));
        return;
      }
    }
    Vec<A> values(static_cast<A>(to_float(x[i * apart])));
    int64_t count = apart == 0 ? 0 : kSize;
    if constexpr (std::is_same_v<decltype(lanes), First>) count = std::min(count, lanes.count);
    for (int64_t k = 1; k < count; ++k) {
      values.raw[k] = static_cast<A>(to_float(x[(i + k) * apart]));
    }
    store(y + i, lanes, std::is_same_v<T, From> ? values : plain_nan(values));
  });
}

// Copies `slices` times `steps` stretches of n elements, of 4 bytes or more.
template <class T>
void copy_stretches(T* to, int64_t to_slice, int64_t to_step, const T* from, int64_t from_slice,
                    int64_t from_step, int64_t slices, int64_t steps, int64_t n) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  // By moves of so many bytes, the last of which may overlap the one before.
  const auto copy_all = [=](auto size) SOFTMAX_EXT_LAMBDA {
    constexpr int64_t kMove = size();
    const int64_t last = bytes - kMove;
    for (int64_t s = 0; s < slices; ++s) {
      for (int64_t d = 0; d < steps; ++d) {
        char* target = reinterpret_cast<char*>(to + s * to_slice + d * to_step);
        const char* source = reinterpret_cast<const char*>(from + s * from_slice + d * from_step);
        for (int64_t i = 0; i < last; i += kMove) std::memcpy(target + i, source + i, kMove);
        std::memcpy(target + last, source + last, kMove);
      }
    }
  };
  if (bytes >= 64) return copy_all(std::integral_constant<int, 64>{});
  if (bytes >= 32) return copy_all(std::integral_constant<int, 32>{});
  if (bytes >= 16) return copy_all(std::integral_constant<int, 16>{});
  if (bytes >= 8) return copy_all(std::integral_constant<int, 8>{});
  copy_all(std::integral_constant<int, 4>{});
}

// Where a line of memory has elements of neighbouring rows: `rows` times n elements, those of a row
// `apart` in x and side by side in y.
template <class T>
void transpose(const T* x, int64_t apart, T* y, int64_t y_next, int64_t rows, int64_t n) {
  using A = compute_t<T>;
  constexpr int64_t kSize = Vec<A>::kSize;
  for (int64_t i = 0; i < n; i += kSize) {
    const int64_t width = std::min(kSize, n - i);
    for_each_vector<kSize>(rows, [=](int64_t r, auto lanes) SOFTMAX_EXT_LAMBDA {
      Vec<A> square[kSize];
      for (int64_t k = 0; k < kSize; ++k) {
        square[k] = load(x + r + (i + std::min(k, width - 1)) * apart, lanes, A(0));
      }
      transpose(square);
      for (int64_t k = 0; k < std::min(kSize, rows - r); ++k) {
        T* to = y + (r + k) * y_next + i;
        if (width == kSize) {
          store(to, All{}, square[k]);
        } else {
          store(to, First{width}, square[k]);
        }
      }
    });
  }
}

// `rows` times n elements, rounded to T: of x, rows are x_next apart, and the elements of each `apart`.
template <class T, class From>
void convert(const From* x, int64_t x_next, int64_t apart, T* y, int64_t y_next, int64_t rows,
             int64_t n) {
  constexpr int64_t kSize = Vec<compute_t<T>>::kSize;
  if constexpr (std::is_same_v<T, From>) {
    if (apart == 1 && n * static_cast<int64_t>(sizeof(T)) >= 4) {
      return copy_stretches(y, 0, y_next, x, 0, x_next, 1, rows, n);
    }
    if (x_next == 1 && apart > 1 && rows > kSize / 4) {
      return transpose(x, apart, y, y_next, rows, n);
    }
  }
  if (x_next == n * apart && y_next == n) {
    n *= rows;
    rows = 1;
  }
  // Where a line of memory has elements of neighbouring rows, it is read once.
  const int64_t width = x_next < apart ? kSize : n;
  for (int64_t i = 0; i < n; i += width) {
    for (int64_t r = 0; r < rows; ++r) {
      convert(x + r * x_next + i * apart, apart, y + r * y_next + i, std::min(width, n - i));
    }
  }
}

// f(const From*) for elements of a type From.
template <class F>
void visit(DType dtype, const void* data, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(static_cast<const Float16*>(data));
    case DType::kBFloat16:
      return f(static_cast<const BFloat16*>(data));
    case DType::kFloat32:
      return f(static_cast<const float*>(data));
    case DType::kFloat64:
      return f(static_cast<const double*>(data));
    case DType::kBool:
      return f(static_cast<const Bool*>(data));
    case DType::kUInt8:
      return f(static_cast<const uint8_t*>(data));
    case DType::kInt8:
      return f(static_cast<const int8_t*>(data));
    case DType::kInt16:
      return f(static_cast<const int16_t*>(data));
    case DType::kInt32:
      return f(static_cast<const int32_t*>(data));
    case DType::kInt64:
      return f(static_cast<const int64_t*>(data));
  }
}

// A tensor to be read as elements of T: itself where it is direct and has them; otherwise it is placed,
// in parts, in the memory of the result, and read there.
template <class T>
class Input {
 public:
  Input(const void* data, DType dtype, const Strides& strides, bool is_placed, const Shape& shape,
        const Dims& dims, const Slices<T>& result)
      : slices(dims, is_placed ? *result.strides : strides,
               is_placed ? result.data : static_cast<const T*>(data)),
        data_(data),
        dtype_(dtype),
        dims_(dims),
        strides_(strides),
        is_placed_(is_placed),
        result_(result),
        together_(is_placed && shape.inner == 1 && strides.of[dims.outer - 1] < strides.dim
                      ? 64 / size_of(dtype)
                      : int64_t{1}) {}

  Slices<const T> slices;

  bool is_placed() const { return is_placed_; }

  // Rows to be placed together: those that a line of memory has a part of.
  int64_t together() const { return together_; }

  // n elements of `count` rows, from element i on. inner is 1.
  SOFTMAX_EXT_INLINE void place_rows(int64_t row, int64_t count, int64_t i, int64_t n) const {
    if (!is_placed_) return;
    const int last = dims_.outer - 1;
    for (const int64_t end = row + count; row < end;) {
      const int64_t some = std::min(end - row, dims_.sizes[last] - row % dims_.sizes[last]);
      place(outer_offset(dims_, strides_, dims_.outer, row) + i * strides_.dim, strides_.of[last],
            strides_.dim, result_[row] + i, result_.strides->of[last], some, n);
      row += some;
    }
  }

  void place_group(const Group& group, int along, const Shape& shape) const {
    if (!is_placed_) return;
    const int64_t offset = outer_offset(dims_, strides_, group.index), next = strides_.of[along];
    const Few<T> to = result_(group, along);
    // Where the elements of each lie evenly, so do those of all.
    const int64_t apart = shape.inner == 1 ? strides_.dim : strides_.of[dims_.outer];
    if (dims_.inner <= 1 && strides_.dim == shape.inner * apart && result_.step == shape.inner) {
      place(offset, next, apart, to.first, to.next, group.size, shape.dim * shape.inner);
      return;
    }
    for (int64_t s = 0; s < group.size; ++s) {
      place_columns(offset + s * next, to[s], 0, shape.inner, 0, shape.dim);
    }
  }

  // The steps [begin, end) of `width` columns of a slice. inner is more than 1.
  SOFTMAX_EXT_INLINE void place_columns(int64_t slice, int64_t column, int64_t width, int64_t begin,
                                        int64_t end) const {
    if (!is_placed_) return;
    place_columns(outer_offset(dims_, strides_, dims_.outer, slice), result_[slice], column, width,
                  begin, end);
  }

 private:
  // The slice begins at `offset`, and goes to y.
  void place_columns(int64_t offset, T* y, int64_t column, int64_t width, int64_t begin,
                     int64_t end) const {
    const int last = dims_.outer + dims_.inner - 1;
    offset += begin * strides_.dim;
    y += begin * result_.step;
    for (const int64_t end_column = column + width; column < end_column;) {
      const int64_t some =
          std::min(end_column - column, dims_.sizes[last] - column % dims_.sizes[last]);
      place(offset + inner_offset(dims_, strides_, column), strides_.dim, strides_.of[last],
            y + column, result_.step, end - begin, some);
      column += some;
    }
  }
  void place(int64_t offset, int64_t next, int64_t apart, T* y, int64_t y_next, int64_t rows,
             int64_t n) const {
    visit(dtype_, data_, [=](auto x) { convert(x + offset, next, apart, y, y_next, rows, n); });
  }

  const void* data_;
  DType dtype_;
  const Dims& dims_;
  const Strides& strides_;
  bool is_placed_;
  Slices<T> result_;
  int64_t together_;
};

bool is_placed(const ForwardArgs& args) {
  return args.input_dtype != args.output_dtype ||
         !is_direct(args.shape, args.dims, args.input_strides, args.input_dtype, kShortDim);
}

bool is_placed(const BackwardArgs& args) {
  return args.grad_input_dtype == args.output_dtype &&
         !is_direct(args.shape, args.dims, args.grad_output_strides, args.output_dtype,
                    kGatheredDim);
}

template <class T>
Slices<T> output_of(const ForwardArgs& args) {
  return {args.dims, args.output_strides, static_cast<T*>(args.output)};
}

template <class T>
Input<T> input_of(const ForwardArgs& args) {
  return {args.input, args.input_dtype, args.input_strides, is_placed(args),
          args.shape, args.dims,        output_of<T>(args)};
}

// Of a backward.
template <class T, class G>
struct Gradients {
  Slices<const T> outputs;
  Slices<G> grad_inputs;
  Input<T> grads;

  explicit Gradients(const BackwardArgs& args)
      : outputs(args.dims, args.output_strides, static_cast<const T*>(args.output)),
        grad_inputs(args.dims, args.grad_input_strides, static_cast<G*>(args.grad_input)),
        grads(args.grad_output, args.output_dtype, args.grad_output_strides, is_placed(args),
              args.shape, args.dims,
              {args.dims, args.grad_input_strides, static_cast<T*>(args.grad_input)}) {}
};

template <Op op, class T, Write write>
void forward_rows(const ForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const int64_t rows = args.shape.rows(), dim = args.shape.dim;
  const Slices<T> output = output_of<T>(args);
  const Input<T> input = input_of<T>(args);
  if (dim <= kChunk<A>) {
    for_each_few_rows<A>(
        args.shape, args.dims, input, kChunk<A> / 2, threads,
        [&](int64_t count, const Few<const T>& x, const Few<T>& y) {
          // The processor does not foresee rows that lie behind as much of something else.
          if (x.next >= 2 * dim) {
            constexpr int64_t kLine = 64 / sizeof(T);
            for (int64_t r = count; r < 2 * count; ++r) {
              for (int64_t i = 0; i < dim; i += kLine) __builtin_prefetch(x[r] + i);
            }
          }
          forward_short_rows<op, write>(x, y, dim, count);
        },
        input.slices, output);
    return;
  }
  // Where a row stays in cache, the exps of a chunk are kept in the output's memory. They are
  // relative to the chunk's max, and so are weighted by exp(that - the row's max). An output that is
  // streamed keeps none, but has the same bits.
  constexpr bool kByChunk = op == Op::kSoftmax && std::is_same_v<T, A>;
  constexpr bool kKeep = kByChunk && write == Write::kCached;
  const bool by_chunk = kByChunk && dim * static_cast<int64_t>(sizeof(A)) <= kKeptRow;
  reduce_and_store<OnlineState<double>, A>(
      rows, dim, input, threads,
      [&](int64_t row, int64_t i, int64_t n) {
        const T* x = input.slices[row] + i;
        const A max = max_over_lanes(lane_max(x, n));
        if constexpr (kKeep) {
          if (by_chunk) {
            const auto sum = lane_sum_of_exp<true>(x, output[row] + i, n, max, /*keep_all=*/true);
            return OnlineState<double>{max, exact_sum_over_lanes(sum)};
          }
        }
        A* const nowhere = nullptr;
        const auto sum = lane_sum_of_exp<false>(x, nowhere, n, max);
        return OnlineState<double>{max, exact_sum_over_lanes(sum)};
      },
      [&](int64_t row, int64_t i, int64_t n, OnlineState<double> of_chunk,
          OnlineState<double> of_row) {
        const T* x = input.slices[row] + i;
        T* y = output[row] + i;
        const auto formula = formula_of<op, T>(of_row);
        if constexpr (kByChunk) {
          if (by_chunk) {
            const V weight(static_cast<A>(exp_of_difference(of_chunk.max, of_row.max)));
            const V shift = shift_of(V(static_cast<A>(of_chunk.max)));
            const T* kept = y;
            store_each<write, T>(y, n, [=](int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
              const V e = kKeep ? load(kept + k, lanes, A(0))
                                : exp_of_nonpositive(load(x + k, lanes, kLowest<A>) - shift);
              return formula.of_exp(e * weight);
            });
            return;
          }
        }
        store_output<write>(x, y, n, formula);
      });
}

// A first look at the output while stores pass the caches would wait behind them.
template <Op op, Write write>
constexpr bool kAhead = op == Op::kLogSoftmax && write == Write::kStreamed;

// What the gradient of a row needs summed, lane by lane. `ahead`: the output is fetched before it is used.
template <Op op, class T, class V = Vec<compute_t<T>>>
SOFTMAX_EXT_INLINE V lane_sum_of_terms(const T* grad, const T* y, int64_t n, bool ahead) {
  using A = compute_t<T>;
  return fold(
      n, V(A(0)),
      [=](V sum, int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
        if (ahead) __builtin_prefetch(y + k);
        return sum + Backward<op, V>::term(load(grad + k, lanes, A(0)), load(y + k, lanes, A(0)));
      },
      Add{});
}

template <Op op, Write write, class T, class G, class A = compute_t<T>>
SOFTMAX_EXT_INLINE void store_gradient(const T* grad, const T* y, G* grad_input, int64_t n, A sum) {
  const Backward<op, Vec<A>> formula{sum};
  store_each<write, T>(grad_input, n, [=](int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
    return formula.of(load(grad + k, lanes, A(0)), load(y + k, lanes, A(0)));
  });
}

template <Op op, Write write, class T, class G>
void backward_short_rows(Few<const T> grads, Few<const T> outputs, Few<G> grad_inputs, int64_t dim,
                         int64_t rows) {
  using A = compute_t<T>;
  using V = Vec<A>;
  V lanes[V::kSize];
  alignas(64) A sums[V::kSize];
  for (int64_t r = 0; r < rows; ++r) {
    lanes[r] = lane_sum_of_terms<op>(grads[r], outputs[r], dim, kAhead<op, write>);
  }
  rounded_sum_over_lanes(lanes, rows, sums);
  for (int64_t r = 0; r < rows; ++r) {
    store_gradient<op, write>(grads[r], outputs[r], grad_inputs[r], dim, sums[r]);
  }
}

template <Op op, class T, class G, Write write>
void backward_rows(const BackwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim;
  const Gradients<T, G> tensors(args);
  if (dim <= kChunk<A>) {
    for_each_few_rows<A>(
        args.shape, args.dims, tensors.grads, kChunk<A> / 4, threads,
        [&](int64_t count, const Few<const T>& grads, const Few<const T>& outputs,
            const Few<G>& grad_inputs) {
          backward_short_rows<op, write>(grads, outputs, grad_inputs, dim, count);
        },
        tensors.grads.slices, tensors.outputs, tensors.grad_inputs);
    return;
  }
  const bool ahead = kAhead<op, write> && dim * static_cast<int64_t>(sizeof(T)) <= kKeptRow;
  reduce_and_store<Sum, A>(
      args.shape.rows(), dim, tensors.grads, threads,
      [&](int64_t row, int64_t i, int64_t n) {
        return Sum{exact_sum_over_lanes(lane_sum_of_terms<op>(tensors.grads.slices[row] + i,
                                                              tensors.outputs[row] + i, n, ahead))};
      },
      [&](int64_t row, int64_t i, int64_t n, Sum, Sum of_row) {
        store_gradient<op, write>(tensors.grads.slices[row] + i, tensors.outputs[row] + i,
                                  tensors.grad_inputs[row] + i, n, static_cast<A>(of_row.sum));
      });
}

// ---- over another dim ---------------------------------------------------------------------------

// tile(slice, first column, width) for each tile of columns.
template <class A, class Tile>
void for_each_tile(const Shape& shape, const Threads& threads, Tile tile) {
  constexpr int64_t kSize = Vec<A>::kSize;
  const int64_t wanted = ceil_div(threads.count, shape.outer);
  const int64_t share = ceil_div(ceil_div(shape.inner, wanted), kSize) * kSize;
  const int64_t width = std::min(share, kTile<A>);
  const int64_t tiles = ceil_div(shape.inner, width);
  parallel_for(threads, shape.outer * tiles, grain<A>(shape.dim * width),
               [=](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   const int64_t column = t % tiles * width;
                   tile(t / tiles, column, std::min(width, shape.inner - column));
                 }
               });
}

// block(begin, end) for each block of steps along dim.
template <class Block>
SOFTMAX_EXT_INLINE void for_each_block(int64_t dim, Block block) {
  for (int64_t d = 0; d < dim; d += kBlock) block(d, std::min(d + kBlock, dim));
}

// step(d, count) for the steps of [begin, end): `count` at a time, from d on, or one.
constexpr int kStepsTogether = 4;
template <class Step>
SOFTMAX_EXT_INLINE void for_each_steps(int64_t begin, int64_t end, bool together, Step step) {
  int64_t d = begin;
  for (; together && d + kStepsTogether <= end; d += kStepsTogether) {
    step(d, std::integral_constant<int, kStepsTogether>{});
  }
  for (; d < end; ++d) step(d, std::integral_constant<int, 1>{});
}

// Adds the sum of a block that begins at step `begin`.
template <class V>
SOFTMAX_EXT_INLINE void add_block(ExactSum<V>& sum, V block_sum, int64_t begin) {
  if (begin == 0) {
    sum = ExactSum<V>(block_sum);
  } else {
    sum.add(block_sum);
  }
}

// The gradient of a column, with as few roundings as fused multiply-adds allow; a column has the time.
template <Op op, class V>
struct ColumnBackward : Backward<op, V> {
  static constexpr bool kFused = op == Op::kSoftmax && kFusedMultiplyAdd;

  static SOFTMAX_EXT_INLINE V add(V sum, V grad, V output) {
    if constexpr (kFused) return fma_of(grad, output, sum);
    return sum + Backward<op, V>::term(grad, output);
  }
  // Of doubles the difference of the products, one of which is exact. Where grad is the sum, that would be
  // what the other was rounded off.
  SOFTMAX_EXT_INLINE V of(V grad, V output) const {
    if constexpr (kFused && std::is_same_v<V, VecD>) {
      const V difference = fma_of(output, grad, -(output * this->sum));
      const typename V::Raw zero{};
      return (grad - this->sum).raw == zero ? zero : difference.raw;
    }
    return Backward<op, V>::of(grad, output);
  }
};

// Exps of more steps along dim than that are summed four at a time. The sum of a few may be close to 1,
// and then its log has as many digits as what is added to that.
constexpr int64_t kFewSteps = kBlock;

// y = value, computed from elements of type From. Streamed, y is aligned to what a register of results
// has.
template <Write write, class From, class T, class Lanes>
SOFTMAX_EXT_INLINE void write_vector(T* y, Lanes lanes, Vec<compute_t<From>> value) {
  if constexpr (write == Write::kStreamed && kWhole<Lanes>) {
    stream(y, value);
  } else {
    store_as<From>(y, lanes, value);
  }
}

template <Op op, class T, Write write>
void forward_columns(const ForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kSize = V::kSize;
  const int64_t dim = args.shape.dim;
  const Slices<T> output = output_of<T>(args);
  const Input<T> input = input_of<T>(args);
  const int64_t x_step = input.slices.step, y_step = output.step;
  for_each_tile<A>(args.shape, threads, [&](int64_t slice, int64_t column, int64_t width) {
    const T* const x_tile = input.slices[slice] + column;
    T* const y_tile = output[slice] + column;
    V maxes[kTile<A> / kSize];
    ExactSum<V> sums[kTile<A> / kSize];
    std::fill_n(maxes, ceil_div(width, kSize), V(kLowest<A>));
    std::fill_n(sums, ceil_div(width, kSize), ExactSum<V>{V(A(0)), V(A(0))});
    for_each_block(dim, [&](int64_t begin, int64_t end) SOFTMAX_EXT_LAMBDA {
      V shifts[kTile<A> / kSize];
      std::copy_n(maxes, ceil_div(width, kSize), shifts);
      input.place_columns(slice, column, width, begin, end);
      for (int64_t d = begin; d < end; ++d) {
        const T* x = x_tile + d * x_step;
        for_each_vector<kSize>(width, [=, &shifts](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
          V& max = shifts[c / kSize];
          max = max_of(load(x + c, lanes, kLowest<A>), max);
        });
      }
      for (int64_t v = 0; v < ceil_div(width, kSize); ++v) {
        const V old = maxes[v];
        maxes[v] = shifts[v];
        shifts[v] = shift_of(maxes[v]);
        sums[v].scale(exp_of_nonpositive(old - shifts[v]));
      }
      for_each_steps(begin, end, dim > kFewSteps, [&](int64_t d, auto steps) SOFTMAX_EXT_LAMBDA {
        const T* x[steps()];
        for (int64_t k = 0; k < steps(); ++k) x[k] = x_tile + (d + k) * x_step;
        for_each_vector<kSize>(
            width, [=, &shifts, &sums](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
              const V shift = shifts[c / kSize];
              V e[steps()];
              for (int64_t k = 0; k < steps(); ++k) {
                e[k] = exp_of_nonpositive(load(x[k] + c, lanes, kLowest<A>) - shift);
              }
              if constexpr (steps() == 1) {
                sums[c / kSize].add(e[0]);
              } else {
                sums[c / kSize].add((e[0] + e[1]) + (e[2] + e[3]));
              }
            });
      });
    });
    forward_t<op, T> formulas[kTile<A> / kSize];
    for (int64_t v = 0; v < ceil_div(width, kSize); ++v) {
      formulas[v] = formula_of<op, T>(maxes[v], sums[v].sum, sums[v].rest);
    }
    for (int64_t d = 0; d < dim; ++d) {
      const T* x = x_tile + d * x_step;
      T* y = y_tile + d * y_step;
      for_each_vector<kSize>(width, [=, &formulas](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
        write_vector<write, T>(y + c, lanes, formulas[c / kSize].of(load(x + c, lanes, A(0))));
      });
    }
  });
}

template <Op op, class T, class G, Write write>
void backward_columns(const BackwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kSize = V::kSize;
  const int64_t dim = args.shape.dim;
  const Gradients<T, G> tensors(args);
  const int64_t grad_step = tensors.grads.slices.step, y_step = tensors.outputs.step;
  const int64_t grad_input_step = tensors.grad_inputs.step;
  const bool ahead =
      kAhead<op, write> && dim * kTile<A> * static_cast<int64_t>(sizeof(T)) <= kKeptRow;
  // The processor does not foresee the first lines of a step that lies in another page.
  const bool far = y_step * static_cast<int64_t>(sizeof(T)) >= 4096;
  // What is in the first caches waits for instructions; elsewhere memory is walked step by step.
  const bool together = dim <= kShortDim && !far;
  for_each_tile<A>(args.shape, threads, [&](int64_t slice, int64_t column, int64_t width) {
    const T* const grad_tile = tensors.grads.slices[slice] + column;
    const T* const y_tile = tensors.outputs[slice] + column;
    G* const grad_input_tile = tensors.grad_inputs[slice] + column;
    ExactSum<V> sums[kTile<A> / kSize];
    for_each_block(dim, [&](int64_t begin, int64_t end) SOFTMAX_EXT_LAMBDA {
      V block_sums[kTile<A> / kSize];
      std::fill_n(block_sums, ceil_div(width, kSize), V(A(0)));
      tensors.grads.place_columns(slice, column, width, begin, end);
      for_each_steps(begin, end, together, [&](int64_t d, auto steps) SOFTMAX_EXT_LAMBDA {
        const T* grad = grad_tile + d * grad_step;
        const T* y = y_tile + d * y_step;
        for_each_vector<kSize>(width, [=, &block_sums](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
          if constexpr (kAhead<op, write>) {
            if (ahead) __builtin_prefetch(y + c);
          }
          if (steps() == 1 && far) {
            __builtin_prefetch(grad + grad_step + c);
            __builtin_prefetch(y + y_step + c);
          }
          V sum = block_sums[c / kSize];
          for (int64_t k = 0; k < steps(); ++k) {
            sum = ColumnBackward<op, V>::add(sum, load(grad + k * grad_step + c, lanes, A(0)),
                                             load(y + k * y_step + c, lanes, A(0)));
          }
          block_sums[c / kSize] = sum;
        });
      });
      for (int64_t v = 0; v < ceil_div(width, kSize); ++v) {
        add_block(sums[v], block_sums[v], begin);
      }
    });
    ColumnBackward<op, V> formulas[kTile<A> / kSize];
    for (int64_t v = 0; v < ceil_div(width, kSize); ++v) formulas[v].sum = sums[v].rounded();
    for_each_steps(0, dim, together, [&](int64_t d, auto steps) SOFTMAX_EXT_LAMBDA {
      const T* grad = grad_tile + d * grad_step;
      const T* y = y_tile + d * y_step;
      G* grad_input = grad_input_tile + d * grad_input_step;
      for_each_vector<kSize>(width, [=, &formulas](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
        const ColumnBackward<op, V> formula = formulas[c / kSize];
        for (int64_t k = 0; k < steps(); ++k) {
          write_vector<write, T>(grad_input + k * grad_input_step + c, lanes,
                                 formula.of(load(grad + k * grad_step + c, lanes, A(0)),
                                            load(y + k * y_step + c, lanes, A(0))));
        }
      });
    });
  });
}

// ---- over another dim, whose steps are narrow ---------------------------------------------------
//
// Lanes are the columns of several slices, or of several steps.

// Lanes of a tile.
template <class A>
constexpr int64_t kLanes = 2 * kNarrow / static_cast<int64_t>(sizeof(A));

// Elements of the slices that are gathered.
template <class A>
constexpr int64_t kGathered = kShortDim * kNarrow / static_cast<int64_t>(sizeof(A));

// Slices side by side: step d of all of them is a row, from d * stride on, of whole registers.
template <class T, class A = compute_t<T>>
struct Gathered {
  static constexpr int64_t kSize = Vec<A>::kSize;

  int64_t width, stride;
  // No two neighbouring rows share their address modulo 4096.
  alignas(64) T data[kGathered<A> + 2 * kShortDim * kSize];

  Gathered(int64_t dim, int64_t columns)
      : width(ceil_div(columns, kSize) * kSize), stride(width + kSize) {
    for (int64_t d = 0; d < dim; ++d) {
      store(data + d * stride + width - kSize, All{}, Vec<A>(A(0)));
    }
  }
  // Of slices whose steps are `step` apart.
  void gather(Few<const T> slices, int64_t step, int64_t count, const Shape& shape) {
    copy_stretches(data, shape.inner, stride, slices.first, slices.next, step, count, shape.dim,
                   shape.inner);
  }
  void scatter(Few<T> slices, int64_t step, int64_t count, const Shape& shape) const {
    copy_stretches(slices.first, slices.next, step, data, shape.inner, stride, count, shape.dim,
                   shape.inner);
  }
};

// Slices that are gathered at a time.
template <class A>
int64_t gathered_slices(const Shape& shape) {
  return std::max<int64_t>(std::min(kLanes<A>, kGathered<A> / shape.dim) / shape.inner, 1);
}

// Whether slices are worked on where they are: in whole registers, of which the last may repeat columns
// of the one before, unless these have been overwritten.
template <class T>
bool is_in_registers(int64_t inner, bool in_place) {
  constexpr int64_t kSize = Vec<compute_t<T>>::kSize;
  return inner % kSize == 0 || (inner > 3 * kSize && !in_place);
}

// step(c, count) for each register of `width` columns: for `kTogether` at a time, from c on, for two, or for
// one. The steps of one hide the latency of those of another.
template <class A, int kTogether, class Step>
SOFTMAX_EXT_INLINE void for_each_register(int64_t width, Step step) {
  constexpr int64_t kSize = Vec<A>::kSize;
  int64_t c = 0;
  for (; c + kTogether * kSize <= width; c += kTogether * kSize) {
    step(c, std::integral_constant<int, kTogether>{});
  }
  if constexpr (kTogether > 2) {
    if (c + 2 * kSize <= width) {
      step(c, std::integral_constant<int, 2>{});
      c += 2 * kSize;
    }
  }
  for (; c < width; c += kSize) {
    step(std::min(c, width - kSize), std::integral_constant<int, 1>{});
  }
}

// `count` registers of columns, over a short dim.
template <Op op, int count, class T>
void forward_registers(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t dim) {
  using A = compute_t<T>;
  using V = Vec<A>;
  V values[kShortDim][count];
  V maxes[count], shifts[count];
  std::fill_n(maxes, count, V(kLowest<A>));
  for (int64_t d = 0; d < dim; ++d) {
    for (int k = 0; k < count; ++k) {
      values[d][k] = load(x + d * x_step + k * V::kSize, All{}, A(0));
      maxes[k] = max_of(values[d][k], maxes[k]);
    }
  }
  for (int k = 0; k < count; ++k) shifts[k] = shift_of(maxes[k]);
  const auto exp_at = [&](int64_t d, int k) SOFTMAX_EXT_LAMBDA {
    const V e = exp_of_nonpositive(values[d][k] - shifts[k]);
    if constexpr (op == Op::kSoftmax) values[d][k] = e;
    return e;
  };
  ExactSum<V> sums[count];
  for (int k = 0; k < count; ++k) sums[k] = ExactSum<V>(exp_at(0, k));
  int64_t d = 1;
  for (; dim > kFewSteps && d + 4 <= dim; d += 4) {
    for (int k = 0; k < count; ++k) {
      sums[k].add((exp_at(d, k) + exp_at(d + 1, k)) + (exp_at(d + 2, k) + exp_at(d + 3, k)));
    }
  }
  for (; d < dim; ++d) {
    for (int k = 0; k < count; ++k) sums[k].add(exp_at(d, k));
  }
  forward_t<op, T> formulas[count];
  for (int k = 0; k < count; ++k) {
    formulas[k] = formula_of<op, T>(maxes[k], sums[k].sum, sums[k].rest);
  }
  for (int64_t d = 0; d < dim; ++d) {
    for (int k = 0; k < count; ++k) {
      T* to = y + d * y_step + k * V::kSize;
      if constexpr (op == Op::kSoftmax) {
        store(to, All{}, formulas[k].of_exp(values[d][k]));
      } else {
        store(to, All{}, formulas[k].of(values[d][k]));
      }
    }
  }
}

template <Op op, class T>
void forward_short_columns(const ForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim, inner = args.shape.inner;
  const Slices<T> output = output_of<T>(args);
  const Input<T> input = input_of<T>(args);
  const bool in_place = input.slices.data == output.data;
  const int64_t x_step = input.slices.step, y_step = output.step;
  const int64_t count = gathered_slices<A>(args.shape);
  for_each_group<A>(
      args.shape, args.dims, input, count, count, threads,
      [&](int64_t size, Few<const T> x, Few<T> y) {
        if (is_in_registers<T>(inner, in_place)) {
          for (int64_t s = 0; s < size; ++s) {
            for_each_register<A, 2>(inner, [&](int64_t c, auto count) SOFTMAX_EXT_LAMBDA {
              forward_registers<op, count()>(x[s] + c, x_step, y[s] + c, y_step, dim);
            });
          }
          return;
        }
        Gathered<T> tile(dim, size * inner);
        tile.gather(x, x_step, size, args.shape);
        for_each_register<A, 2>(tile.width, [&](int64_t c, auto count) SOFTMAX_EXT_LAMBDA {
          T* columns = tile.data + c;
          forward_registers<op, count()>(columns, tile.stride, columns, tile.stride, dim);
        });
        tile.scatter(y, y_step, size, args.shape);
      },
      input.slices, output);
}

template <Op op, int count, class T>
void backward_registers(const T* grad, int64_t grad_step, const T* y, int64_t y_step, T* grad_input,
                        int64_t grad_input_step, int64_t dim) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const auto at = [](const T* p, int k)
                      SOFTMAX_EXT_LAMBDA { return load(p + k * V::kSize, All{}, A(0)); };
  ExactSum<V> sums[count];
  for_each_block(dim, [&](int64_t begin, int64_t end) SOFTMAX_EXT_LAMBDA {
    V block_sums[count];
    std::fill_n(block_sums, count, V(A(0)));
    for (int64_t d = begin; d < end; ++d) {
      for (int k = 0; k < count; ++k) {
        block_sums[k] = ColumnBackward<op, V>::add(block_sums[k], at(grad + d * grad_step, k),
                                                   at(y + d * y_step, k));
      }
    }
    for (int k = 0; k < count; ++k) add_block(sums[k], block_sums[k], begin);
  });
  ColumnBackward<op, V> formulas[count];
  for (int k = 0; k < count; ++k) formulas[k].sum = sums[k].rounded();
  for (int64_t d = 0; d < dim; ++d) {
    for (int k = 0; k < count; ++k) {
      store(grad_input + d * grad_input_step + k * V::kSize, All{},
            formulas[k].of(at(grad + d * grad_step, k), at(y + d * y_step, k)));
    }
  }
}

template <Op op, class T>
void backward_short_columns(const BackwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim, inner = args.shape.inner;
  const Gradients<T, T> tensors(args);
  const Slices<const T>&grads = tensors.grads.slices, &outputs = tensors.outputs;
  const Slices<T>& grad_inputs = tensors.grad_inputs;
  const bool in_place = grad_inputs.data == grads.data || grad_inputs.data == outputs.data;
  const int64_t grad_step = grads.step, y_step = outputs.step, to_step = grad_inputs.step;
  const int64_t count = gathered_slices<A>(args.shape);
  for_each_group<A>(
      args.shape, args.dims, tensors.grads, count, count, threads,
      [&](int64_t size, Few<const T> grad, Few<const T> y, Few<T> grad_input) {
        if (is_in_registers<T>(inner, in_place)) {
          for (int64_t s = 0; s < size; ++s) {
            for_each_register<A, 4>(inner, [&](int64_t c, auto count) SOFTMAX_EXT_LAMBDA {
              backward_registers<op, count()>(grad[s] + c, grad_step, y[s] + c, y_step,
                                              grad_input[s] + c, to_step, dim);
            });
          }
          return;
        }
        Gathered<T> of_grads(dim, size * inner), of_outputs(dim, size * inner);
        of_grads.gather(grad, grad_step, size, args.shape);
        of_outputs.gather(y, y_step, size, args.shape);
        for_each_register<A, 4>(of_grads.width, [&](int64_t c, auto count) SOFTMAX_EXT_LAMBDA {
          const int64_t step = of_grads.stride;
          backward_registers<op, count()>(of_grads.data + c, step, of_outputs.data + c, step,
                                          of_grads.data + c, step, dim);
        });
        of_grads.scatter(grad_input, to_step, size, args.shape);
      },
      grads, outputs, grad_inputs);
}

// States of lanes, with room for a register beyond them.
template <class A>
struct LaneArray {
  alignas(64) A data[kLanes<A> + Vec<A>::kSize];

  LaneArray() = default;
  explicit LaneArray(A value) { std::fill_n(data, kLanes<A> + Vec<A>::kSize, value); }

  SOFTMAX_EXT_INLINE Vec<A> at(int64_t c) const { return load(data + c, All{}, A(0)); }
  SOFTMAX_EXT_INLINE void set(int64_t c, Vec<A> value) { store(data + c, All{}, value); }

  // Of the lanes from c on, the first n; `fill` beyond.
  SOFTMAX_EXT_INLINE Vec<A> at(int64_t c, int64_t n, A fill) const {
    return n >= Vec<A>::kSize ? at(c) : load(data + c, First{n}, fill);
  }
};

// How a slice of many narrow steps is seen: `groups` steps are a row of lanes, and `steps` of them, at
// most kBlock rows, a chunk.
template <class A>
struct Packing {
  static constexpr int64_t kSize = Vec<A>::kSize;

  int64_t dim, inner, groups, width, steps, chunks;
  int64_t columns;  // inner, rounded up to whole registers

  explicit Packing(const Shape& shape) : dim(shape.dim), inner(shape.inner) {
    groups = std::min(kLanes<A> / inner, dim / 8);
    const int64_t whole = kSize / std::gcd(kSize, inner);  // so many make whole registers
    if (groups >= whole) groups = groups / whole * whole;
    width = groups * inner;
    chunks = ceil_div(dim, kBlock * groups);
    steps = ceil_div(ceil_div(dim, chunks), groups) * groups;
    chunks = ceil_div(dim, steps);
    columns = ceil_div(inner, kSize) * kSize;
  }

  // Steps of a chunk, and where it begins in its slice.
  int64_t steps_of(int64_t chunk) const { return std::min(steps, dim - chunk * steps); }
  int64_t offset(int64_t chunk) const { return chunk * steps * inner; }

  // step(offset, lanes) for the rows of a chunk of n steps, in the lanes from c on.
  template <class Step>
  SOFTMAX_EXT_INLINE void for_each_row(int64_t n, int64_t c, Step step) const {
    const int64_t end = n * inner;
    int64_t i = c;
    if (c + kSize <= width) {
      for (; i + kSize <= end; i += width) step(i, All{});
    }
    for (; i < end; i += width) step(i, First{std::min(width - c, end - i)});
  }

  // step(offset, lane, lanes) for a chunk of n steps, in the order of memory.
  template <class Step>
  SOFTMAX_EXT_INLINE void for_each_vector_of_rows(int64_t n, Step step) const {
    const int64_t end = n * inner;
    for (int64_t row = 0; row < end; row += width) {
      for_each_vector<kSize>(std::min(width, end - row),
                             [=](int64_t c, auto lanes)
                                 SOFTMAX_EXT_LAMBDA { step(row + c, c, lanes); });
    }
  }

  // Lane by lane step(... step(step(start, row 0), row 1) ...) over the rows of a chunk of n steps, where
  // step is given (value, offset, lane, lanes). In the order of memory, where a load of T has less than
  // a line; otherwise values stay in registers.
  template <class T, class Step>
  SOFTMAX_EXT_INLINE LaneArray<A> fold_rows(int64_t n, A start, Step step) const {
    LaneArray<A> values(start);
    if constexpr (kSize * sizeof(T) < 64) {
      for_each_vector_of_rows(n, [&](int64_t i, int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
        values.set(c, step(values.at(c), i, c, lanes));
      });
    } else {
      for (int64_t c = 0; c < width; c += kSize) {
        Vec<A> value(start);
        for_each_row(n, c, [&](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
          value = step(value, i, c, lanes);
        });
        values.set(c, value);
      }
    }
    return values;
  }
};

// merge(c, from, n) for n lanes from c on and from `from` on, until all groups are in the first.
template <class A, class Merge>
SOFTMAX_EXT_INLINE void fold_groups(const Packing<A>& packing, Merge merge) {
  for (int64_t groups = packing.groups; groups > 1;) {
    const int64_t kept = groups - groups / 2;
    const int64_t from = kept * packing.inner, n = groups / 2 * packing.inner;
    for (int64_t c = 0; c < n; c += Packing<A>::kSize) merge(c, from + c, n - c);
    groups = kept;
  }
}

template <class A>
void fold_max(const Packing<A>& packing, LaneArray<A>& maxes) {
  fold_groups(packing, [&](int64_t c, int64_t from, int64_t n) SOFTMAX_EXT_LAMBDA {
    maxes.set(c, max_of(maxes.at(from, n, kLowest<A>), maxes.at(c)));
  });
}

template <class A>
void fold_sums(const Packing<A>& packing, LaneArray<A>& sums, LaneArray<A>& rests) {
  fold_groups(packing, [&](int64_t c, int64_t from, int64_t n) SOFTMAX_EXT_LAMBDA {
    ExactSum<Vec<A>> sum{sums.at(c), rests.at(c)};
    sum.add(sums.at(from, n, A(0)));
    sums.set(c, sum.sum);
    rests.set(c, sum.rest + rests.at(from, n, A(0)));
  });
}

// What is in the first group, in all.
template <class A>
void spread(const Packing<A>& packing, LaneArray<A>& values) {
  for (int64_t n = packing.inner; n < packing.width; n *= 2) {
    const int64_t more = std::min(n, packing.width - n);
    for (int64_t c = 0; c < more; c += Packing<A>::kSize) values.set(n + c, values.at(c));
  }
}

// For each slice: reduce(slice, chunk, state) makes the states of its chunks, of `size` elements each;
// of these combine(states) makes formulas; store(slice, chunk, state, formulas) writes the chunk.
template <class Formulas, class A, class Reduce, class Combine, class Store>
void reduce_and_store_packed(const Shape& shape, const Packing<A>& packing, int64_t size,
                             const Threads& threads, Reduce reduce, Combine combine, Store store) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));
  const int64_t chunks = packing.chunks;
  size = ceil_div(size, kLine) * kLine;
  const auto aligned = [](const Buffer<A>& buffer) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
    return reinterpret_cast<A*>((address + 63) / 64 * 64);
  };
  if (shape.outer >= threads.count || chunks == 1) {
    parallel_for(threads, shape.outer, grain<A>(shape.dim * shape.inner),
                 [&](int64_t begin, int64_t end) {
                   const Buffer<A> buffer(chunks * size + kLine);
                   A* const states = aligned(buffer);
                   Formulas formulas;
                   for (int64_t s = begin; s < end; ++s) {
                     for (int64_t k = 0; k < chunks; ++k) reduce(s, k, states + k * size);
                     combine(states, size, formulas);
                     for (int64_t k = 0; k < chunks; ++k) store(s, k, states + k * size, formulas);
                   }
                 });
    return;
  }
  const Buffer<A> buffer(shape.outer * chunks * size + kLine);
  A* const states = aligned(buffer);
  const int64_t chunk_grain = grain<A>(packing.steps * packing.inner);
  parallel_for(threads, shape.outer * chunks, chunk_grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) reduce(t / chunks, t % chunks, states + t * size);
  });
  parallel_for(threads, shape.outer * chunks, chunk_grain, [&](int64_t begin, int64_t end) {
    Formulas formulas;
    for (int64_t t = begin; t < end; ++t) {
      if (t == begin || t % chunks == 0)
        combine(states + t / chunks * chunks * size, size, formulas);
      store(t / chunks, t % chunks, states + t * size, formulas);
    }
  });
}

template <Op op, class T>
void forward_packed_columns(const ForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kSize = V::kSize;
  const Packing<A> packing(args.shape);
  const int64_t dim = packing.dim, inner = packing.inner, width = packing.width;
  const int64_t columns = packing.columns;
  const Slices<T> output = output_of<T>(args);
  const Input<T> input = input_of<T>(args);
  // As in forward_rows. Where the output is narrower, the exps are kept behind the chunk's state, and
  // of longer slices: without AVX-512 a second exp costs more than the memory.
  constexpr bool kByChunk = op == Op::kSoftmax;
  constexpr bool kInOutput = std::is_same_v<T, A>;
  const bool by_chunk = kByChunk && dim * inner * static_cast<int64_t>(sizeof(A)) <=
                                        (kInOutput ? kKeptRow : 32 * kKeptRow);
  const int64_t size = 3 * columns + (by_chunk && !kInOutput ? packing.steps * inner : int64_t{0});
  const auto kept_of = [=](T* y, A* state) SOFTMAX_EXT_LAMBDA -> A* {
    if constexpr (kInOutput) {
      return y;
    } else {
      return state + 3 * columns;
    }
  };
  struct Formulas {
    V maxes[kLanes<A> / kSize];  // of the columns
    forward_t<op, T> of_lanes[kLanes<A> / kSize];
  };
  reduce_and_store_packed<Formulas>(
      args.shape, packing, size, threads,
      [&](int64_t slice, int64_t chunk, A* state) {
        const int64_t n = packing.steps_of(chunk), offset = packing.offset(chunk);
        input.place_columns(slice, 0, inner, chunk * packing.steps, chunk * packing.steps + n);
        const T* x = input.slices[slice] + offset;
        A* kept = kept_of(output[slice] + offset, state);
        auto maxes = packing.template fold_rows<T>(
            n, kLowest<A>, [&](V max, int64_t i, int64_t, auto lanes) SOFTMAX_EXT_LAMBDA {
              return max_of(load(x + i, lanes, kLowest<A>), max);
            });
        fold_max(packing, maxes);
        for (int64_t c = 0; c < inner; c += kSize) store(state + c, All{}, maxes.at(c));
        spread(packing, maxes);
        LaneArray<A> shifts, rests(A(0));
        for (int64_t c = 0; c < width; c += kSize) shifts.set(c, shift_of(maxes.at(c)));
        auto sums = packing.template fold_rows<T>(
            n, A(0), [&](V sum, int64_t i, int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
              const V e = exp_of_nonpositive(load(x + i, lanes, kLowest<A>) - shifts.at(c));
              if constexpr (kByChunk) {
                if (by_chunk) store(kept + i, lanes, e);
              }
              return sum + e;
            });
        fold_sums(packing, sums, rests);
        for (int64_t c = 0; c < inner; c += kSize) {
          store(state + columns + c, All{}, sums.at(c));
          store(state + 2 * columns + c, All{}, rests.at(c));
        }
      },
      [&](const A* states, int64_t size, Formulas& formulas) {
        // The formulas are of whole registers: lanes beyond the width have what a logarithm takes.
        LaneArray<A> maxes(A(0)), sums(A(1)), rests(A(0));
        for (int64_t c = 0; c < inner; c += kSize) {
          V max(kLowest<A>);
          for (int64_t k = 0; k < packing.chunks; ++k) {
            max = max_of(load(states + k * size + c, All{}, A(0)), max);
          }
          ExactSum<V> sum{V(A(0)), V(A(0))};
          for (int64_t k = 0; k < packing.chunks; ++k) {
            const A* state = states + k * size + c;
            const V weight = exp_of_nonpositive(load(state, All{}, A(0)) - shift_of(max));
            sum.add(load(state + columns, All{}, A(0)) * weight);
            sum.rest = sum.rest + load(state + 2 * columns, All{}, A(0)) * weight;
          }
          formulas.maxes[c / kSize] = max;
          maxes.set(c, max);
          sums.set(c, sum.sum);
          rests.set(c, sum.rest);
        }
        spread(packing, maxes);
        spread(packing, sums);
        spread(packing, rests);
        for (int64_t c = 0; c < width; c += kSize) {
          formulas.of_lanes[c / kSize] = formula_of<op, T>(maxes.at(c), sums.at(c), rests.at(c));
        }
      },
      [&](int64_t slice, int64_t chunk, A* state, const Formulas& formulas) {
        const int64_t n = packing.steps_of(chunk), offset = packing.offset(chunk);
        T* y = output[slice] + offset;
        if constexpr (kByChunk) {
          if (by_chunk) {
            const A* kept = kept_of(y, state);
            LaneArray<A> weights;
            for (int64_t c = 0; c < inner; c += kSize) {
              weights.set(c, exp_of_nonpositive(load(state + c, All{}, A(0)) -
                                                shift_of(formulas.maxes[c / kSize])));
            }
            spread(packing, weights);
            packing.for_each_vector_of_rows(
                n, [&](int64_t i, int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
                  const V e = load(kept + i, lanes, A(0)) * weights.at(c);
                  store(y + i, lanes, formulas.of_lanes[c / kSize].of_exp(e));
                });
            return;
          }
        }
        const T* x = input.slices[slice] + offset;
        packing.for_each_vector_of_rows(
            n, [&](int64_t i, int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
              store(y + i, lanes, formulas.of_lanes[c / kSize].of(load(x + i, lanes, A(0))));
            });
      });
}

template <Op op, class T>
void backward_packed_columns(const BackwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kSize = V::kSize;
  const Packing<A> packing(args.shape);
  const int64_t inner = packing.inner, columns = packing.columns;
  const Gradients<T, T> tensors(args);
  reduce_and_store_packed<LaneArray<A>>(
      args.shape, packing, 2 * columns, threads,
      [&](int64_t slice, int64_t chunk, A* state) {
        const int64_t n = packing.steps_of(chunk), offset = packing.offset(chunk);
        tensors.grads.place_columns(slice, 0, inner, chunk * packing.steps,
                                    chunk * packing.steps + n);
        const T* grad = tensors.grads.slices[slice] + offset;
        const T* y = tensors.outputs[slice] + offset;
        LaneArray<A> rests(A(0));
        auto sums = packing.template fold_rows<T>(
            n, A(0), [&](V sum, int64_t i, int64_t, auto lanes) SOFTMAX_EXT_LAMBDA {
              return ColumnBackward<op, V>::add(sum, load(grad + i, lanes, A(0)),
                                                load(y + i, lanes, A(0)));
            });
        fold_sums(packing, sums, rests);
        for (int64_t c = 0; c < inner; c += kSize) {
          store(state + c, All{}, sums.at(c));
          store(state + columns + c, All{}, rests.at(c));
        }
      },
      [&](const A* states, int64_t size, LaneArray<A>& sums) {
        for (int64_t c = 0; c < inner; c += kSize) {
          ExactSum<V> sum{V(A(0)), V(A(0))};
          for (int64_t k = 0; k < packing.chunks; ++k) {
            sum.add(load(states + k * size + c, All{}, A(0)));
            sum.rest = sum.rest + load(states + k * size + columns + c, All{}, A(0));
          }
          sums.set(c, sum.rounded());
        }
        spread(packing, sums);
      },
      [&](int64_t slice, int64_t chunk, const A*, const LaneArray<A>& sums) {
        const int64_t n = packing.steps_of(chunk), offset = packing.offset(chunk);
        const T* grad = tensors.grads.slices[slice] + offset;
        const T* y = tensors.outputs[slice] + offset;
        T* grad_input = tensors.grad_inputs[slice] + offset;
        packing.for_each_vector_of_rows(
            n, [&](int64_t i, int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
              const ColumnBackward<op, V> formula{{sums.at(c)}};
              store(grad_input + i, lanes,
                    formula.of(load(grad + i, lanes, A(0)), load(y + i, lanes, A(0))));
            });
      });
}

// ---- launchers ----------------------------------------------------------------------------------

// f(T{}) for the element type T of a floating dtype.
template <class F>
void visit(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Float16{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat32:
      return f(float{});
    default:
      return f(double{});
  }
}

// Past the caches goes what is too large to be found there later: rows of whole lines, or of so many
// that the two at their ends do not count; columns whose steps are whole lines. Memory that is new has
// just been cleared by the system, in the caches; that of an input is there too.
bool is_streamed(const Shape& shape, const Dims& dims, const Strides& strides, const void* output,
                 DType dtype, bool is_new) {
  constexpr int64_t kBeyondCaches = int64_t{1} << 25, kLine = 64;
  const int64_t size = size_of(dtype);
  if (is_new || shape.numel() * size < kBeyondCaches) return false;
  const int64_t stretch = (shape.inner == 1 ? shape.dim : shape.inner) * size;
  const uintptr_t address = reinterpret_cast<uintptr_t>(output);
  bool whole_lines = stretch % kLine == 0 && (shape.inner == 1 || strides.dim * size % kLine == 0);
  for (int k = 0; k < dims.outer; ++k) whole_lines &= strides.of[k] * size % kLine == 0;
  if (shape.inner > 1 && !(whole_lines && address % kLine == 0)) return false;
  // Memory from elsewhere may begin between two elements.
  return address % size == 0 && stretch >= (whole_lines ? 8 : 16) * kLine;
}

// f(std::integral_constant<Write, ...>{}).
template <class F>
void visit(bool streamed, F f) {
  if (streamed) return f(std::integral_constant<Write, Write::kStreamed>{});
  f(std::integral_constant<Write, Write::kCached>{});
}

template <Op op>
void launch_forward(const ForwardArgs& args, const Threads& threads) {
  const bool streamed = args.output != args.input && !is_placed(args) &&
                        is_streamed(args.shape, args.dims, args.output_strides, args.output,
                                    args.output_dtype, args.output_is_new);
  visit(args.output_dtype, [&](auto element) {
    visit(streamed, [&](auto write) {
      using T = decltype(element);
      if (args.shape.inner == 1) {
        forward_rows<op, T, write()>(args, threads);
      } else if (is_narrow(args.shape, args.output_dtype)) {
        if (args.shape.dim <= kShortDim) return forward_short_columns<op, T>(args, threads);
        forward_packed_columns<op, T>(args, threads);
      } else {
        forward_columns<op, T, write()>(args, threads);
      }
    });
  });
}

void launch_forward(const ForwardArgs& args, const Threads& threads) {
  args.op == Op::kSoftmax ? launch_forward<Op::kSoftmax>(args, threads)
                          : launch_forward<Op::kLogSoftmax>(args, threads);
}

template <Op op>
void launch_backward(const BackwardArgs& args, const Threads& threads) {
  const bool streamed = args.grad_input != args.grad_output && args.grad_input != args.output &&
                        !is_placed(args) && args.grad_input_dtype == args.output_dtype &&
                        is_streamed(args.shape, args.dims, args.grad_input_strides, args.grad_input,
                                    args.grad_input_dtype, args.grad_input_is_new);
  visit(args.output_dtype, [&](auto element) {
    visit(args.grad_input_dtype, [&](auto grad_element) {
      visit(streamed, [&](auto write) {
        using T = decltype(element);
        using G = decltype(grad_element);
        constexpr Write kWrite = std::is_same_v<T, G> ? write() : Write::kCached;
        if (args.shape.inner == 1) {
          return backward_rows<op, T, G, kWrite>(args, threads);
        }
        if constexpr (std::is_same_v<T, G>) {
          const int64_t dim = args.shape.dim, inner = args.shape.inner;
          // Over more than a block tiles walk along inner, in whole registers.
          const bool by_tiles =
              dim > kBlock && dim <= kShortDim && is_in_registers<T>(inner, /*in_place=*/true);
          const bool gathered = !is_in_registers<T>(inner, /*in_place=*/false);
          if (is_narrow(args.shape, args.output_dtype) && !by_tiles) {
            if (dim > (gathered ? kGatheredDim : kShortDim)) {
              return backward_packed_columns<op, T>(args, threads);
            }
            return backward_short_columns<op, T>(args, threads);
          }
        }
        backward_columns<op, T, G, kWrite>(args, threads);
      });
    });
  });
}

void launch_backward(const BackwardArgs& args, const Threads& threads) {
  args.op == Op::kSoftmax ? launch_backward<Op::kSoftmax>(args, threads)
                          : launch_backward<Op::kLogSoftmax>(args, threads);
}

#define SOFTMAX_EXT_STRING_(x) #x
#define SOFTMAX_EXT_STRING(x) SOFTMAX_EXT_STRING_(x)
#define SOFTMAX_EXT_CONCAT_(a, b) a##b
#define SOFTMAX_EXT_CONCAT(a, b) SOFTMAX_EXT_CONCAT_(a, b)

}  // namespace

// kernels_baseline, kernels_avx2 or kernels_avx512.
extern const Kernels SOFTMAX_EXT_CONCAT(kernels_, SOFTMAX_EXT_ISA);
const Kernels SOFTMAX_EXT_CONCAT(kernels_, SOFTMAX_EXT_ISA) = {SOFTMAX_EXT_STRING(SOFTMAX_EXT_ISA),
                                                               launch_forward, launch_backward};

}  // namespace softmax_ext::cpu
