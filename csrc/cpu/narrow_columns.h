// The schedules of inner sizes above 1 where a step along dim has at most 512 bytes, as computed. Lanes
// are the columns of several slices, or of several steps.
//
//   short columns    dims of up to 64 steps (of a backward that is gathered up to 32): by registers of
//                    columns, of several slices where a step has less. Of a backward also steps of less
//                    than 4096 bytes, where they are registers and slices enough for all threads.
//   packed columns   longer ones: by chunks of up to 16 rows of several steps each, which threads share
//                    if slices are few.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "columns.h"

namespace softmax_ext::cpu {
namespace {

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
// of the one before, unless these have been overwritten. A forward does not repeat exps where these
// would be a third of all.
enum class Pass { kForward, kBackward };
template <class T, Pass pass>
bool is_in_registers(int64_t inner, bool in_place) {
  constexpr int64_t kSize = Vec<compute_t<T>>::kSize;
  constexpr int64_t kFew = pass == Pass::kForward ? 3 : 1;
  return inner % kSize == 0 || (inner > kFew * kSize && !in_place);
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
        if (is_in_registers<T, Pass::kForward>(inner, in_place)) {
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
SOFTMAX_EXT_INLINE void backward_registers(const T* grad, int64_t grad_step, const T* y,
                                           int64_t y_step, T* grad_input, int64_t grad_input_step,
                                           int64_t dim) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const auto at = [](const T* p, int k)
                      SOFTMAX_EXT_LAMBDA { return load(p + k * V::kSize, All{}, A(0)); };
  ColumnBackward<op, V> formulas[count];
  // The processor does not foresee the next slice, which is most often in another page.
  constexpr int kOfLine = std::max<int>(64 / sizeof(T) / V::kSize, 1);  // registers
  const auto sum_of_block = [&](int64_t begin, V* sums) SOFTMAX_EXT_LAMBDA {
    std::fill_n(sums, count, V(A(0)));
    for (int64_t d = begin; d < std::min(begin + kBlock, dim); ++d) {
      for (int k = 0; k < count; k += kOfLine) {
        __builtin_prefetch(grad + (dim + d) * grad_step + k * V::kSize);
        __builtin_prefetch(y + (dim + d) * y_step + k * V::kSize);
      }
      for (int k = 0; k < count; ++k) {
        sums[k] =
            ColumnBackward<op, V>::add(sums[k], at(grad + d * grad_step, k), at(y + d * y_step, k));
      }
    }
  };
  V first[count];
  sum_of_block(0, first);
  for (int k = 0; k < count; ++k) formulas[k].sum = first[k];
  if (dim > kBlock) {
    ExactSum<V> sums[count];
    for (int k = 0; k < count; ++k) sums[k] = ExactSum<V>(first[k]);
    for (int64_t begin = kBlock; begin < dim; begin += kBlock) {
      V more[count];
      sum_of_block(begin, more);
      for (int k = 0; k < count; ++k) sums[k].add(more[k]);
    }
    for (int k = 0; k < count; ++k) formulas[k].sum = sums[k].rounded();
  }
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
        if (is_in_registers<T, Pass::kBackward>(inner, in_place)) {
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

}  // namespace
}  // namespace softmax_ext::cpu
