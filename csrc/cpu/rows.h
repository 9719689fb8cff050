// The schedules of inner size 1.
//
//   rows         a thread takes whole rows. A row of one chunk is read once into cache; a longer one
//                chunk by chunk for its state, then for the output.
//   split rows   fewer long rows than threads: the chunks of a row are shared out.
//
// A row is always reduced by the same chunks in the same order, so its result depends neither on the
// batch it is in nor on the number of threads. Input of another type is first rounded to the output's,
// in the output's memory, one row at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "formulas.h"
#include "input.h"

namespace softmax_ext::cpu {
namespace {

// Of a row: small enough to stay in the first-level cache between two looks, and for each lane of the
// four registers that sum it to have no more than 64 terms.
template <class A>
constexpr int64_t kChunk =
    std::min<int64_t>(16384 / static_cast<int64_t>(sizeof(A)), 256 * Vec<A>::kSize);

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

// The sum of exp(x - max), lane by lane. With kKeep, the exps of whole vectors are left in `kept`;
// those of a partial one only if keep_all, since a load of it would wait for its store. What is read next lies
// `ahead` elements on, and is fetched meanwhile unless that is 0: the look for the max would wait for memory.
template <bool kKeep, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Vec<A> lane_sum_of_exp(const T* x, A* kept, int64_t n, A max, int64_t ahead,
                                          bool keep_all = false) {
  using V = Vec<A>;
  const V shift = shift_of(V(max));
  return fold(
      n, V(A(0)),
      [=](V sum, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        if (ahead != 0) fetch(x + ahead + i);
        const V e = exp_of_nonpositive(load(x + i, lanes, kLowest<A>) - shift);
        if constexpr (kKeep) {
          if (kWhole<decltype(lanes)> || keep_all) store(kept + i, lanes, e);
        }
        return sum + e;
      },
      Add{});
}

// y[i] = value(i, lanes), computed from elements of type From, for each vector of [0, n). streamed: past the
// caches.
template <class From, class T, class Value>
SOFTMAX_EXT_INLINE void store_each(bool streamed, T* y, int64_t n, Value value) {
  constexpr int64_t kSize = Vec<compute_t<From>>::kSize;
  int64_t begin = 0;
  if (streamed) [[unlikely]] {  // short rows never are
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

template <class T, class Formula>
SOFTMAX_EXT_INLINE void store_output(bool streamed, const T* x, T* y, int64_t n, Formula formula) {
  using A = compute_t<T>;
  store_each<T>(streamed, y, n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
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
template <Op op, class T>
void forward_short_rows(const Few<const T>& x, const Few<T>& y, int64_t n, int64_t rows,
                        bool streamed) {
  using A = compute_t<T>;
  using V = Vec<A>;
  if (n <= V::kSize) return forward_rows_of_a_register<op>(x, y, n, rows);
  // The exps are kept in the output's memory, or beside it where that is narrower, or streamed to.
  constexpr bool kKeep = op == Op::kSoftmax;
  alignas(64) A scratch[kKeep ? kChunk<A> : 1];
  const auto kept_of = [&](int64_t r) SOFTMAX_EXT_LAMBDA -> A* {
    if constexpr (std::is_same_v<T, A>) {
      if (!streamed) return y[r];
    }
    return scratch + (kKeep ? r * n : 0);
  };
  // Half as many bytes come in time from a cache.
  const int64_t ahead = streamed || std::is_same_v<T, A> ? rows * x.next : 0;
  V lanes[V::kSize];
  alignas(64) A maxes[V::kSize] = {};
  for (int64_t r = 0; r < rows; ++r) lanes[r] = lane_max(x[r], n);
  max_over_lanes(lanes, rows, maxes);
  for (int64_t r = 0; r < rows; ++r) {
    lanes[r] = lane_sum_of_exp<kKeep>(x[r], kept_of(r), n, maxes[r], ahead, /*keep_all=*/streamed);
  }
  const ExactSum<V> sum = exact_sum_over_lanes(lanes, rows);
  const auto formulas = formula_of<op, T>(load(maxes, All{}, A(0)), sum.sum, sum.rest);
  for (int64_t r = 0; r < rows; ++r) {
    const auto formula = of_lane(formulas, r);
    const T* row = x[r];
    const A* kept = kept_of(r);
    store_each<T>(streamed, y[r], n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      if constexpr (kKeep) {
        if (kWhole<decltype(lanes)> || streamed) {
          return formula.of_exp(load(kept + i, lanes, A(0)));
        }
      }
      return formula.of(load(row + i, lanes, A(0)));
    });
  }
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

template <Op op, class T>
void forward_rows(const ForwardArgs& args, const Threads& threads, bool streamed) {
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
          forward_short_rows<op>(x, y, dim, count, streamed);
        },
        input.slices, output);
    return;
  }
  // Where a row stays in cache, the exps of a chunk are kept in the output's memory. They are
  // relative to the chunk's max, and so are weighted by exp(that - the row's max). An output that is
  // streamed keeps none, but has the same bits.
  constexpr bool kByChunk = op == Op::kSoftmax && std::is_same_v<T, A>;
  const bool by_chunk = kByChunk && dim * static_cast<int64_t>(sizeof(A)) <= kKeptRow;
  const bool keeps = by_chunk && !streamed;
  reduce_and_store<OnlineState<double>, A>(
      rows, dim, input, threads,
      [&](int64_t row, int64_t i, int64_t n) {
        const T* x = input.slices[row] + i;
        const A max = max_over_lanes(lane_max(x, n));
        if constexpr (kByChunk) {
          if (keeps) {
            const auto sum =
                lane_sum_of_exp<true>(x, output[row] + i, n, max, n, /*keep_all=*/true);
            return OnlineState<double>{max, exact_sum_over_lanes(sum)};
          }
        }
        A* const nowhere = nullptr;
        const auto sum = lane_sum_of_exp<false>(x, nowhere, n, max, n);
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
            store_each<T>(streamed, y, n, [=](int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
              const V e = keeps ? load(kept + k, lanes, A(0))
                                : exp_of_nonpositive(load(x + k, lanes, kLowest<A>) - shift);
              return formula.of_exp(e * weight);
            });
            return;
          }
        }
        store_output(streamed, x, y, n, formula);
      });
}

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

// grad_ahead, y_ahead: how far on that lies which is read next, and fetched meanwhile; 0 if it is not.
template <Op op, class T, class G, class A = compute_t<T>>
SOFTMAX_EXT_INLINE void store_gradient(bool streamed, const T* grad, const T* y, G* grad_input,
                                       int64_t n, A sum, int64_t grad_ahead, int64_t y_ahead) {
  const Backward<op, Vec<A>> formula{sum};
  store_each<T>(streamed, grad_input, n, [=](int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
    if (grad_ahead != 0) {
      fetch(grad + grad_ahead + k);
      fetch(y + y_ahead + k);
    }
    return formula.of(load(grad + k, lanes, A(0)), load(y + k, lanes, A(0)));
  });
}

template <Op op, class T, class G>
void backward_short_rows(Few<const T> grads, Few<const T> outputs, Few<G> grad_inputs, int64_t dim,
                         int64_t rows, bool streamed) {
  using A = compute_t<T>;
  using V = Vec<A>;
  V lanes[V::kSize];
  alignas(64) A sums[V::kSize];
  for (int64_t r = 0; r < rows; ++r) {
    lanes[r] = lane_sum_of_terms<op>(grads[r], outputs[r], dim, is_ahead<op>(streamed));
  }
  rounded_sum_over_lanes(lanes, rows, sums);
  // Softmax's gradient has few instructions to hide it behind.
  const bool is_fetched = op == Op::kLogSoftmax || (streamed && 2 * dim > kChunk<A>);
  const int64_t ahead = is_fetched ? rows : 0;
  for (int64_t r = 0; r < rows; ++r) {
    store_gradient<op>(streamed, grads[r], outputs[r], grad_inputs[r], dim, sums[r],
                       ahead * grads.next, ahead * outputs.next);
  }
}

template <Op op, class T, class G>
void backward_rows(const BackwardArgs& args, const Threads& threads, bool streamed) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim;
  const Gradients<T, G> tensors(args);
  if (dim <= kChunk<A>) {
    for_each_few_rows<A>(
        args.shape, args.dims, tensors.grads, kChunk<A> / 4, threads,
        [&](int64_t count, const Few<const T>& grads, const Few<const T>& outputs,
            const Few<G>& grad_inputs) {
          backward_short_rows<op>(grads, outputs, grad_inputs, dim, count, streamed);
        },
        tensors.grads.slices, tensors.outputs, tensors.grad_inputs);
    return;
  }
  const bool ahead = is_ahead<op>(streamed) && dim * static_cast<int64_t>(sizeof(T)) <= kKeptRow;
  reduce_and_store<Sum, A>(
      args.shape.rows(), dim, tensors.grads, threads,
      [&](int64_t row, int64_t i, int64_t n) {
        return Sum{exact_sum_over_lanes(lane_sum_of_terms<op>(tensors.grads.slices[row] + i,
                                                              tensors.outputs[row] + i, n, ahead))};
      },
      [&](int64_t row, int64_t i, int64_t n, Sum, Sum of_row) {
        store_gradient<op>(streamed, tensors.grads.slices[row] + i, tensors.outputs[row] + i,
                           tensors.grad_inputs[row] + i, n, static_cast<A>(of_row.sum), 0, 0);
      });
}

}  // namespace
}  // namespace softmax_ext::cpu
