// The CPU schedules. Compiled once for each instruction set, which SOFTMAX_EXT_ISA names.
//
//   rows         inner == 1: a thread takes whole rows. A row of one chunk is read once into cache;
//                a longer one chunk by chunk for its state, then for the output.
//   split rows   inner == 1, fewer long rows than threads: the chunks of a row are shared out.
//   columns      inner > 1: a thread takes tiles of neighbouring columns, in blocks along dim.
//   short columns, packed columns
//                a step along dim of at most 512 bytes, as computed: dims of up to 64 steps by
//                registers of columns, of several slices where a step has less; longer ones by
//                chunks of up to 16 rows of several steps each, which threads share if slices are few.
//
// A row is always reduced by the same chunks (blocks) in the same order, so its result depends
// neither on the batch it is in nor on the number of threads. A column's may depend on inner. Input of
// another type is first rounded to the output's, in the output's memory, one row or tile at a time.
#include <algorithm>
#include <cstdlib>
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

// Along dim, in the columns schedule: a block of a tile stays in cache between two looks. Memory is
// always walked along inner: a walk along dim can meet loads that share their address modulo 4096
// with a store still under way, and wait for it.
constexpr int64_t kBlock = 16;

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

// y[i] = value(i, lanes), of type A, for each vector of [0, n).
template <Write write, class A, class T, class Value>
SOFTMAX_EXT_INLINE void store_each(T* y, int64_t n, Value value) {
  constexpr int64_t kSize = Vec<A>::kSize;
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
    store_as(y + begin + i, lanes, value(begin + i, lanes));
  });
}

template <Write write, class T, class Formula>
SOFTMAX_EXT_INLINE void store_output(const T* x, T* y, int64_t n, Formula formula) {
  using A = compute_t<T>;
  store_each<write, A>(y, n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
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

// `rows` neighbouring rows of at most a register each, which are read once.
template <Op op, class T>
void forward_rows_of_a_register(const T* x, T* y, int64_t n, int64_t rows) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const First lanes{n};
  V values[V::kSize], of_rows[V::kSize];
  alignas(64) A maxes[V::kSize] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * n;
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
      store(y + r * n, All{}, result);
    } else {
      store(y + r * n, lanes, result);
    }
  }
}

// `rows` neighbouring rows of n elements, together or alone at most one chunk. Step by step for all
// of them, which hides the latency of each step.
template <Op op, Write write, class T>
void forward_short_rows(const T* x, T* y, int64_t n, int64_t rows) {
  using A = compute_t<T>;
  using V = Vec<A>;
  if (n <= V::kSize) return forward_rows_of_a_register<op>(x, y, n, rows);
  // The exps are kept in the output's memory, or beside it where that is narrower, or streamed to.
  constexpr bool kKeep = op == Op::kSoftmax;
  constexpr bool kStreamed = write == Write::kStreamed;
  constexpr bool kInOutput = std::is_same_v<T, A> && !kStreamed;
  alignas(64) A scratch[kKeep && !kInOutput ? kChunk<A> : 1];
  A* kept = scratch;
  if constexpr (kInOutput) kept = y;
  V lanes[V::kSize];
  alignas(64) A maxes[V::kSize] = {};
  for (int64_t r = 0; r < rows; ++r) lanes[r] = lane_max(x + r * n, n);
  max_over_lanes(lanes, rows, maxes);
  for (int64_t r = 0; r < rows; ++r) {
    lanes[r] = lane_sum_of_exp<kKeep>(x + r * n, kept + r * n, n, maxes[r], /*keep_all=*/kStreamed);
  }
  const ExactSum<V> sum = exact_sum_over_lanes(lanes, rows);
  const auto formulas = formula_of<op, T>(load(maxes, All{}, A(0)), sum.sum, sum.rest);
  for (int64_t r = 0; r < rows; ++r) {
    const auto formula = of_lane(formulas, r);
    store_each<write, A>(y + r * n, n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      const int64_t k = r * n + i;
      if constexpr (kKeep && (kWhole<decltype(lanes)> || kStreamed)) {
        return formula.of_exp(load(kept + k, lanes, A(0)));
      } else {
        return formula.of(load(x + k, lanes, A(0)));
      }
    });
  }
}

// Calls few(first, count) for all rows of at most one chunk each: as many as have at most `elements`
// together, from one to one for each lane of a register.
template <class A, class Few>
void for_each_short_row(const Shape& shape, int64_t elements, const Threads& threads, Few few) {
  const int64_t count = std::clamp<int64_t>(elements / shape.dim, 1, Vec<A>::kSize);
  parallel_for(threads, shape.rows(), grain<A>(shape.dim), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += count) few(row, std::min(count, end - row));
  });
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

// For each row, of more than one chunk: a state by reduce(row, begin, size) for each chunk, all
// combined in order, then store(row, begin, size, of_chunk, of_row) for each chunk. States are kept
// in double.
template <class State, class A, class Reduce, class Store>
void reduce_and_store(int64_t rows, int64_t dim, const Threads& threads, Reduce reduce,
                      Store store) {
  using softmax_ext::combine;
  constexpr int64_t chunk = kChunk<A>;
  const int64_t chunks = ceil_div(dim, chunk);
  const auto reduce_chunk = [=](int64_t row, int64_t k) {
    return reduce(row, k * chunk, std::min(chunk, dim - k * chunk));
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
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t k = 0; k < chunks; ++k) states[k] = reduce_chunk(row, k);
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
    for (int64_t t = begin; t < end; ++t) states[t] = reduce_chunk(t / chunks, t % chunks);
  });
  for (int64_t row = 0; row < rows; ++row) of_rows[row] = combine_chunks(states + row * chunks);
  parallel_for(threads, rows * chunks, grain<A>(chunk), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      store_chunk(t / chunks, t % chunks, states[t], of_rows[t / chunks]);
    }
  });
}

// ---- input of another type ----------------------------------------------------------------------

template <class T, class From>
void convert(const From* x, T* y, int64_t n) {
  using A = compute_t<T>;
  constexpr int kSize = Vec<A>::kSize;
  for_each_vector<kSize>(n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
    if constexpr (kIsFloating<From> && std::is_same_v<compute_t<From>, A>) {
      store(y + i, lanes, load(x + i, lanes, A(0)) * Vec<A>(A(1)));  // no signalling NaN
    } else {
      Vec<A> values(A(0));
      int64_t count = kSize;
      if constexpr (std::is_same_v<decltype(lanes), First>) count = lanes.count;
      for (int64_t k = 0; k < count; ++k) values.raw[k] = static_cast<A>(to_float(x[i + k]));
      store(y + i, lanes, values);
    }
  });
}

// Rounds n elements of the input, from `offset` on, to T.
template <class T>
void convert(const void* input, DType dtype, int64_t offset, T* y, int64_t n) {
  switch (dtype) {
    case DType::kFloat16:
      return convert(static_cast<const Float16*>(input) + offset, y, n);
    case DType::kBFloat16:
      return convert(static_cast<const BFloat16*>(input) + offset, y, n);
    case DType::kFloat32:
      return convert(static_cast<const float*>(input) + offset, y, n);
    case DType::kFloat64:
      return convert(static_cast<const double*>(input) + offset, y, n);
    case DType::kBool:
      return convert(static_cast<const Bool*>(input) + offset, y, n);
    case DType::kUInt8:
      return convert(static_cast<const uint8_t*>(input) + offset, y, n);
    case DType::kInt8:
      return convert(static_cast<const int8_t*>(input) + offset, y, n);
    case DType::kInt16:
      return convert(static_cast<const int16_t*>(input) + offset, y, n);
    case DType::kInt32:
      return convert(static_cast<const int32_t*>(input) + offset, y, n);
    case DType::kInt64:
      return convert(static_cast<const int64_t*>(input) + offset, y, n);
  }
}

// The input as elements of T: itself, or the output's memory once that has been converted to.
template <class T>
class Input {
 public:
  Input(const ForwardArgs& args)
      : args_(args),
        is_converted_(args.input_dtype != args.output_dtype),
        y_(static_cast<T*>(args.output)),
        x_(is_converted_ ? y_ : static_cast<const T*>(args.input)) {}

  // The n elements from `offset` on, ready to read.
  const T* at(int64_t offset, int64_t n) const {
    if (is_converted_) convert(args_.input, args_.input_dtype, offset, y_ + offset, n);
    return x_ + offset;
  }

  // Elements that have been made ready.
  const T* again(int64_t offset) const { return x_ + offset; }

 private:
  const ForwardArgs& args_;
  bool is_converted_;
  T* y_;
  const T* x_;
};

template <Op op, class T, Write write>
void forward_rows(const ForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const int64_t rows = args.shape.rows(), dim = args.shape.dim;
  T* y = static_cast<T*>(args.output);
  const Input<T> input(args);
  if (dim <= kChunk<A>) {
    for_each_short_row<A>(args.shape, kChunk<A> / 2, threads, [&](int64_t row, int64_t count) {
      forward_short_rows<op, write>(input.at(row * dim, count * dim), y + row * dim, dim, count);
    });
    return;
  }
  // Where a row stays in cache, the exps of a chunk are kept in the output's memory. They are
  // relative to the chunk's max, and so are weighted by exp(that - the row's max). An output that is
  // streamed keeps none, but has the same bits.
  constexpr bool kByChunk = op == Op::kSoftmax && std::is_same_v<T, A>;
  constexpr bool kKeep = kByChunk && write == Write::kCached;
  const bool by_chunk = kByChunk && dim * static_cast<int64_t>(sizeof(A)) <= kKeptRow;
  reduce_and_store<OnlineState<double>, A>(
      rows, dim, threads,
      [&](int64_t row, int64_t i, int64_t n) {
        const int64_t offset = row * dim + i;
        const T* x = input.at(offset, n);
        const A max = max_over_lanes(lane_max(x, n));
        if constexpr (kKeep) {
          if (by_chunk) {
            const auto sum = lane_sum_of_exp<true>(x, y + offset, n, max, /*keep_all=*/true);
            return OnlineState<double>{max, exact_sum_over_lanes(sum)};
          }
        }
        A* const nowhere = nullptr;
        const auto sum = lane_sum_of_exp<false>(x, nowhere, n, max);
        return OnlineState<double>{max, exact_sum_over_lanes(sum)};
      },
      [&](int64_t row, int64_t i, int64_t n, OnlineState<double> of_chunk,
          OnlineState<double> of_row) {
        const int64_t offset = row * dim + i;
        const T* x = input.again(offset);
        const auto formula = formula_of<op, T>(of_row);
        if constexpr (kByChunk) {
          if (by_chunk) {
            const V weight(static_cast<A>(exp_of_difference(of_chunk.max, of_row.max)));
            const V shift = shift_of(V(static_cast<A>(of_chunk.max)));
            const T* kept = y + offset;
            store_each<write, A>(y + offset, n, [=](int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
              const V e = kKeep ? load(kept + k, lanes, A(0))
                                : exp_of_nonpositive(load(x + k, lanes, kLowest<A>) - shift);
              return formula.of_exp(e * weight);
            });
            return;
          }
        }
        store_output<write>(x, y + offset, n, formula);
      });
}

template <Op op, class T, class G, Write write>
void backward_rows(const BackwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const int64_t dim = args.shape.dim;
  const T* grads = static_cast<const T*>(args.grad_output);
  const T* outputs = static_cast<const T*>(args.output);
  G* grad_inputs = static_cast<G*>(args.grad_input);
  constexpr bool kAhead = op == Op::kLogSoftmax && write == Write::kStreamed;
  const bool ahead = kAhead && dim * static_cast<int64_t>(sizeof(T)) <= kKeptRow;
  const auto lane_sum = [=](int64_t offset, int64_t n) SOFTMAX_EXT_LAMBDA {
    return fold(
        n, V(A(0)),
        [=](V sum, int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
          // A first look at the output while stores pass the caches would wait behind them.
          if constexpr (kAhead) {
            if (ahead) __builtin_prefetch(outputs + offset + k);
          }
          return sum + Backward<op, V>::term(load(grads + offset + k, lanes, A(0)),
                                             load(outputs + offset + k, lanes, A(0)));
        },
        Add{});
  };
  const auto store_gradient = [=](int64_t offset, int64_t n, A sum) SOFTMAX_EXT_LAMBDA {
    const Backward<op, V> formula{sum};
    store_each<write, A>(grad_inputs + offset, n, [=](int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
      return formula.of(load(grads + offset + k, lanes, A(0)),
                        load(outputs + offset + k, lanes, A(0)));
    });
  };
  if (dim <= kChunk<A>) {
    for_each_short_row<A>(args.shape, kChunk<A> / 4, threads, [=](int64_t row, int64_t count) {
      V lanes[V::kSize];
      alignas(64) A sums[V::kSize];
      for (int64_t r = 0; r < count; ++r) lanes[r] = lane_sum((row + r) * dim, dim);
      rounded_sum_over_lanes(lanes, count, sums);
      for (int64_t r = 0; r < count; ++r) store_gradient((row + r) * dim, dim, sums[r]);
    });
    return;
  }
  reduce_and_store<Sum, A>(
      args.shape.rows(), dim, threads,
      [=](int64_t row, int64_t i, int64_t n) {
        return Sum{exact_sum_over_lanes(lane_sum(row * dim + i, n))};
      },
      [=](int64_t row, int64_t i, int64_t n, Sum, Sum of_row) {
        store_gradient(row * dim + i, n, static_cast<A>(of_row.sum));
      });
}

// ---- over another dim ---------------------------------------------------------------------------

// tile(offset of its first element, width) for each tile of columns.
template <class A, class Tile>
void for_each_tile(const Shape& shape, const Threads& threads, Tile tile) {
  constexpr int64_t kSize = Vec<A>::kSize;
  const int64_t wanted = ceil_div(threads.count, shape.outer);
  const int64_t share = ceil_div(ceil_div(shape.inner, wanted), kSize) * kSize;
  const int64_t width = std::min(share, kTile<A>);
  const int64_t tiles = ceil_div(shape.inner, width);
  parallel_for(
      threads, shape.outer * tiles, grain<A>(shape.dim * width), [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t column = t % tiles * width;
          tile(t / tiles * shape.dim * shape.inner + column, std::min(width, shape.inner - column));
        }
      });
}

// block(begin, end) for each block of steps along dim.
template <class Block>
SOFTMAX_EXT_INLINE void for_each_block(int64_t dim, Block block) {
  for (int64_t d = 0; d < dim; d += kBlock) block(d, std::min(d + kBlock, dim));
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

// y = value. Streamed, y is aligned to what a register of results has.
template <Write write, class T, class Lanes, class A>
SOFTMAX_EXT_INLINE void write_vector(T* y, Lanes lanes, Vec<A> value) {
  if constexpr (write == Write::kStreamed && kWhole<Lanes>) {
    stream(y, value);
  } else {
    store_as(y, lanes, value);
  }
}

template <Op op, class T, Write write>
void forward_columns(const ForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kSize = V::kSize;
  const int64_t dim = args.shape.dim, inner = args.shape.inner;
  T* output = static_cast<T*>(args.output);
  const Input<T> input(args);
  for_each_tile<A>(args.shape, threads, [&](int64_t offset, int64_t width) {
    V maxes[kTile<A> / kSize];
    ExactSum<V> sums[kTile<A> / kSize];
    std::fill_n(maxes, ceil_div(width, kSize), V(kLowest<A>));
    std::fill_n(sums, ceil_div(width, kSize), ExactSum<V>{V(A(0)), V(A(0))});
    for_each_block(dim, [&](int64_t begin, int64_t end) SOFTMAX_EXT_LAMBDA {
      V shifts[kTile<A> / kSize];
      std::copy_n(maxes, ceil_div(width, kSize), shifts);
      for (int64_t d = begin; d < end; ++d) {
        const T* x = input.at(offset + d * inner, width);
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
      const auto add_steps = [&](int64_t d, auto steps) SOFTMAX_EXT_LAMBDA {
        const T* x[4] = {};
        for (int64_t k = 0; k < steps(); ++k) x[k] = input.again(offset + (d + k) * inner);
        for_each_vector<kSize>(
            width, [=, &shifts, &sums](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
              const V shift = shifts[c / kSize];
              V e[4];
              for (int64_t k = 0; k < steps(); ++k) {
                e[k] = exp_of_nonpositive(load(x[k] + c, lanes, kLowest<A>) - shift);
              }
              sums[c / kSize].add(steps() == 4 ? (e[0] + e[1]) + (e[2] + e[3]) : e[0]);
            });
      };
      int64_t d = begin;
      for (; dim > kFewSteps && d + 4 <= end; d += 4) {
        add_steps(d, std::integral_constant<int, 4>{});
      }
      for (; d < end; ++d) add_steps(d, std::integral_constant<int, 1>{});
    });
    forward_t<op, T> formulas[kTile<A> / kSize];
    for (int64_t v = 0; v < ceil_div(width, kSize); ++v) {
      formulas[v] = formula_of<op, T>(maxes[v], sums[v].sum, sums[v].rest);
    }
    for (int64_t d = 0; d < dim; ++d) {
      const T* x = input.again(offset + d * inner);
      T* y = output + offset + d * inner;
      for_each_vector<kSize>(width, [=, &formulas](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
        write_vector<write>(y + c, lanes, formulas[c / kSize].of(load(x + c, lanes, A(0))));
      });
    }
  });
}

template <Op op, class T, class G, Write write>
void backward_columns(const BackwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kSize = V::kSize;
  const int64_t dim = args.shape.dim, inner = args.shape.inner;
  const T* grads = static_cast<const T*>(args.grad_output);
  const T* outputs = static_cast<const T*>(args.output);
  G* grad_inputs = static_cast<G*>(args.grad_input);
  constexpr bool kAhead = op == Op::kLogSoftmax && write == Write::kStreamed;
  const bool ahead = kAhead && dim * kTile<A> * static_cast<int64_t>(sizeof(T)) <= kKeptRow;
  // The processor does not foresee the first lines of a step that lies in another page.
  const bool far = inner * static_cast<int64_t>(sizeof(T)) >= 4096;
  for_each_tile<A>(args.shape, threads, [=](int64_t offset, int64_t width) {
    ExactSum<V> sums[kTile<A> / kSize];
    std::fill_n(sums, ceil_div(width, kSize), ExactSum<V>{V(A(0)), V(A(0))});
    for_each_block(dim, [&](int64_t begin, int64_t end) SOFTMAX_EXT_LAMBDA {
      V block_sums[kTile<A> / kSize];
      std::fill_n(block_sums, ceil_div(width, kSize), V(A(0)));
      for (int64_t d = begin; d < end; ++d) {
        const T* grad = grads + offset + d * inner;
        const T* y = outputs + offset + d * inner;
        for_each_vector<kSize>(width, [=, &block_sums](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
          V& sum = block_sums[c / kSize];
          if constexpr (kAhead) {
            if (ahead) __builtin_prefetch(y + c);  // as in backward_rows
          }
          if (far) {
            __builtin_prefetch(grad + inner + c);
            __builtin_prefetch(y + inner + c);
          }
          sum = ColumnBackward<op, V>::add(sum, load(grad + c, lanes, A(0)),
                                           load(y + c, lanes, A(0)));
        });
      }
      for (int64_t v = 0; v < ceil_div(width, kSize); ++v) sums[v].add(block_sums[v]);
    });
    ColumnBackward<op, V> formulas[kTile<A> / kSize];
    for (int64_t v = 0; v < ceil_div(width, kSize); ++v) formulas[v].sum = sums[v].rounded();
    for (int64_t d = 0; d < dim; ++d) {
      const T* grad = grads + offset + d * inner;
      const T* y = outputs + offset + d * inner;
      G* grad_input = grad_inputs + offset + d * inner;
      for_each_vector<kSize>(width, [=, &formulas](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
        write_vector<write>(
            grad_input + c, lanes,
            formulas[c / kSize].of(load(grad + c, lanes, A(0)), load(y + c, lanes, A(0))));
      });
    }
  });
}

// ---- over another dim, whose steps are narrow ---------------------------------------------------
//
// A step of at most kNarrow bytes does not fill registers, or fills few: lanes are the columns of several
// slices (a slice: dim steps, one after another in memory), or of several steps.

constexpr int64_t kNarrow = 512;

// Lanes of a tile.
template <class A>
constexpr int64_t kLanes = 2 * kNarrow / static_cast<int64_t>(sizeof(A));

// The largest dim of which slices are gathered, and how many elements of them.
constexpr int64_t kShortDim = 64;
template <class A>
constexpr int64_t kGathered = kShortDim * kNarrow / static_cast<int64_t>(sizeof(A));

template <class T>
bool is_narrow(int64_t inner) {
  return inner * static_cast<int64_t>(sizeof(compute_t<T>)) <= kNarrow;
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
  void gather(const T* slices, int64_t count, int64_t dim, int64_t inner) {
    copy_stretches(data, inner, stride, slices, dim * inner, inner, count, dim, inner);
  }
  void scatter(T* slices, int64_t count, int64_t dim, int64_t inner) const {
    copy_stretches(slices, dim * inner, inner, data, inner, stride, count, dim, inner);
  }
};

// few(first, count) for all slices, as many as are gathered at a time.
template <class A, class Few>
void for_each_few_slices(const Shape& shape, const Threads& threads, Few few) {
  const int64_t lanes = std::min(kLanes<A>, kGathered<A> / shape.dim);
  const int64_t count = std::max<int64_t>(lanes / shape.inner, 1);
  parallel_for(threads, shape.outer, grain<A>(shape.dim * shape.inner),
               [=](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; s += count) few(s, std::min(count, end - s));
               });
}

// Whether slices are worked on where they are: in whole registers, of which the last may repeat columns
// of the one before, unless these have been overwritten.
template <class T>
bool is_in_registers(int64_t inner, bool in_place) {
  constexpr int64_t kSize = Vec<compute_t<T>>::kSize;
  return inner % kSize == 0 || (inner > 3 * kSize && !in_place);
}

// step(c, count) for each register of `width` columns: for `kTogether` at a time, from c on, or for one.
template <class A, int kTogether, class Step>
SOFTMAX_EXT_INLINE void for_each_register(int64_t width, Step step) {
  constexpr int64_t kSize = Vec<A>::kSize;
  int64_t c = 0;
  for (; c + kTogether * kSize <= width; c += kTogether * kSize) {
    step(c, std::integral_constant<int, kTogether>{});
  }
  for (; c < width; c += kSize) {
    step(std::min(c, width - kSize), std::integral_constant<int, 1>{});
  }
}

// Registers of columns side by side: the steps of one hide the latency of those of another.
constexpr int kTogether = 2;

// `count` registers of columns, over a short dim.
template <Op op, int count, class T>
void forward_registers(const T* x, T* y, int64_t stride, int64_t dim) {
  using A = compute_t<T>;
  using V = Vec<A>;
  V values[kShortDim][count];
  V maxes[count], shifts[count];
  std::fill_n(maxes, count, V(kLowest<A>));
  for (int64_t d = 0; d < dim; ++d) {
    for (int k = 0; k < count; ++k) {
      values[d][k] = load(x + d * stride + k * V::kSize, All{}, A(0));
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
      T* to = y + d * stride + k * V::kSize;
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
  const int64_t dim = args.shape.dim, inner = args.shape.inner, slice = dim * inner;
  T* output = static_cast<T*>(args.output);
  const Input<T> input(args);
  const bool in_place = input.again(0) == output;
  for_each_few_slices<A>(args.shape, threads, [&](int64_t first, int64_t count) {
    const T* x = input.at(first * slice, count * slice);
    T* y = output + first * slice;
    if (is_in_registers<T>(inner, in_place)) {
      for (int64_t s = 0; s < count; ++s) {
        for_each_register<A, kTogether>(inner, [=](int64_t c, auto count) SOFTMAX_EXT_LAMBDA {
          forward_registers<op, count()>(x + s * slice + c, y + s * slice + c, inner, dim);
        });
      }
      return;
    }
    Gathered<T> tile(dim, count * inner);
    tile.gather(x, count, dim, inner);
    for_each_register<A, kTogether>(tile.width, [&](int64_t c, auto count) SOFTMAX_EXT_LAMBDA {
      forward_registers<op, count()>(tile.data + c, tile.data + c, tile.stride, dim);
    });
    tile.scatter(y, count, dim, inner);
  });
}

template <Op op, int count, class T>
void backward_registers(const T* grad, const T* y, T* grad_input, int64_t stride, int64_t dim) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const auto at = [](const T* p, int64_t i, int k)
                      SOFTMAX_EXT_LAMBDA { return load(p + i + k * V::kSize, All{}, A(0)); };
  ExactSum<V> sums[count];
  std::fill_n(sums, count, ExactSum<V>(V(A(0))));
  for_each_block(dim, [&](int64_t begin, int64_t end) SOFTMAX_EXT_LAMBDA {
    V block_sums[count];
    std::fill_n(block_sums, count, V(A(0)));
    for (int64_t i = begin * stride; i < end * stride; i += stride) {
      for (int k = 0; k < count; ++k) {
        block_sums[k] = ColumnBackward<op, V>::add(block_sums[k], at(grad, i, k), at(y, i, k));
      }
    }
    for (int k = 0; k < count; ++k) {
      if (dim <= kBlock) {
        sums[k].sum = block_sums[k];
      } else {
        sums[k].add(block_sums[k]);
      }
    }
  });
  ColumnBackward<op, V> formulas[count];
  for (int k = 0; k < count; ++k) formulas[k].sum = sums[k].rounded();
  for (int64_t i = 0; i < dim * stride; i += stride) {
    for (int k = 0; k < count; ++k) {
      store(grad_input + i + k * V::kSize, All{}, formulas[k].of(at(grad, i, k), at(y, i, k)));
    }
  }
}

template <Op op, class T>
void backward_short_columns(const BackwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim, inner = args.shape.inner, slice = dim * inner;
  const T* grads = static_cast<const T*>(args.grad_output);
  const T* outputs = static_cast<const T*>(args.output);
  T* grad_inputs = static_cast<T*>(args.grad_input);
  const bool in_place = grad_inputs == grads || grad_inputs == outputs;
  for_each_few_slices<A>(args.shape, threads, [=](int64_t first, int64_t count) {
    const T* grad = grads + first * slice;
    const T* y = outputs + first * slice;
    T* grad_input = grad_inputs + first * slice;
    if (is_in_registers<T>(inner, in_place)) {
      for (int64_t s = 0; s < count; ++s) {
        for_each_register<A, kTogether>(inner, [=](int64_t c, auto count) SOFTMAX_EXT_LAMBDA {
          const int64_t i = s * slice + c;
          backward_registers<op, count()>(grad + i, y + i, grad_input + i, inner, dim);
        });
      }
      return;
    }
    Gathered<T> of_grads(dim, count * inner), of_outputs(dim, count * inner);
    of_grads.gather(grad, count, dim, inner);
    of_outputs.gather(y, count, dim, inner);
    for_each_register<A, kTogether>(of_grads.width, [&](int64_t c, auto count) SOFTMAX_EXT_LAMBDA {
      backward_registers<op, count()>(of_grads.data + c, of_outputs.data + c, of_grads.data + c,
                                      of_grads.stride, dim);
    });
    of_grads.scatter(grad_input, count, dim, inner);
  });
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

  // Steps of a chunk, and where it begins among all slices.
  int64_t steps_of(int64_t chunk) const { return std::min(steps, dim - chunk * steps); }
  int64_t offset(int64_t slice, int64_t chunk) const {
    return (slice * dim + chunk * steps) * inner;
  }

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
  T* output = static_cast<T*>(args.output);
  const Input<T> input(args);
  // As in forward_rows. Where the output is narrower, the exps are kept behind the chunk's state, and
  // of longer slices: without AVX-512 a second exp costs more than the memory.
  constexpr bool kByChunk = op == Op::kSoftmax;
  constexpr bool kInOutput = std::is_same_v<T, A>;
  const bool by_chunk = kByChunk && dim * inner * static_cast<int64_t>(sizeof(A)) <=
                                        (kInOutput ? kKeptRow : 32 * kKeptRow);
  const int64_t size = 3 * columns + (by_chunk && !kInOutput ? packing.steps * inner : int64_t{0});
  const auto kept_of = [=](int64_t offset, A* state) SOFTMAX_EXT_LAMBDA -> A* {
    if constexpr (kInOutput) {
      return output + offset;
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
        const int64_t n = packing.steps_of(chunk), offset = packing.offset(slice, chunk);
        const T* x = input.at(offset, n * inner);
        A* kept = kept_of(offset, state);
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
        const int64_t n = packing.steps_of(chunk), offset = packing.offset(slice, chunk);
        T* y = output + offset;
        if constexpr (kByChunk) {
          if (by_chunk) {
            const A* kept = kept_of(offset, state);
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
        const T* x = input.again(offset);
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
  const T* grads = static_cast<const T*>(args.grad_output);
  const T* outputs = static_cast<const T*>(args.output);
  T* grad_inputs = static_cast<T*>(args.grad_input);
  reduce_and_store_packed<LaneArray<A>>(
      args.shape, packing, 2 * columns, threads,
      [&](int64_t slice, int64_t chunk, A* state) {
        const int64_t n = packing.steps_of(chunk), offset = packing.offset(slice, chunk);
        const T* grad = grads + offset;
        const T* y = outputs + offset;
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
        const int64_t n = packing.steps_of(chunk), offset = packing.offset(slice, chunk);
        const T* grad = grads + offset;
        const T* y = outputs + offset;
        T* grad_input = grad_inputs + offset;
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
bool is_streamed(const Shape& shape, const void* output, DType dtype, bool is_new) {
  constexpr int64_t kBeyondCaches = int64_t{1} << 25, kLine = 64;
  const int64_t size = size_of(dtype);
  if (is_new || shape.numel() * size < kBeyondCaches) return false;
  const int64_t stretch = (shape.inner == 1 ? shape.dim : shape.inner) * size;
  const uintptr_t address = reinterpret_cast<uintptr_t>(output);
  const bool whole_lines = stretch % kLine == 0;
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
  const bool streamed = args.output != args.input && args.input_dtype == args.output_dtype &&
                        is_streamed(args.shape, args.output, args.output_dtype, args.output_is_new);
  visit(args.output_dtype, [&](auto element) {
    visit(streamed, [&](auto write) {
      using T = decltype(element);
      if (args.shape.inner == 1) {
        forward_rows<op, T, write()>(args, threads);
      } else if (is_narrow<T>(args.shape.inner)) {
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
  const bool streamed =
      args.grad_input != args.grad_output && args.grad_input != args.output &&
      args.grad_input_dtype == args.output_dtype &&
      is_streamed(args.shape, args.grad_input, args.grad_input_dtype, args.grad_input_is_new);
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
          // In whole registers, tiles give the same bits, and walk along inner.
          const bool by_tiles = args.shape.dim > kBlock && args.shape.dim <= kShortDim &&
                                is_in_registers<T>(args.shape.inner, /*in_place=*/true);
          if (is_narrow<T>(args.shape.inner) && !by_tiles) {
            if (args.shape.dim <= kShortDim) return backward_short_columns<op, T>(args, threads);
            return backward_packed_columns<op, T>(args, threads);
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
