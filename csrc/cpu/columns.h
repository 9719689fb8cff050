// The schedule of inner sizes above 1: a thread takes tiles of neighbouring columns, in blocks along dim,
// which are reduced in the same order whatever the batch and the number of threads. A column's result
// may depend on inner. Input of another type is first rounded to the output's, in the output's memory,
// one tile at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "formulas.h"
#include "input.h"

namespace softmax_ext::cpu {
namespace {

// Columns of a tile: their states and formulas stay in the first-level cache.
template <class A>
constexpr int64_t kTile = 2048 / static_cast<int64_t>(sizeof(A));

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

// Whether the next step, so many elements on, lies in another page: the processor does not foresee its first
// lines.
template <class T>
constexpr bool is_far(int64_t step) {
  return step * static_cast<int64_t>(sizeof(T)) >= 4096;
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

// y = value, computed from elements of type From. Past the caches, y is aligned to what a register of results
// has.
template <class From, class T, class Lanes>
SOFTMAX_EXT_INLINE void write_vector(bool streamed, T* y, Lanes lanes, Vec<compute_t<From>> value) {
  if (streamed && kWhole<Lanes>) {
    stream(y, value);
  } else {
    store_as<From>(y, lanes, value);
  }
}

template <Op op, class T>
void forward_columns(const ForwardArgs& args, const Threads& threads, bool streamed) {
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
        write_vector<T>(streamed, y + c, lanes, formulas[c / kSize].of(load(x + c, lanes, A(0))));
      });
    }
  });
}

template <Op op, class T, class G>
void backward_columns(const BackwardArgs& args, const Threads& threads, bool streamed) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kSize = V::kSize;
  const int64_t dim = args.shape.dim;
  const Gradients<T, G> tensors(args);
  const int64_t grad_step = tensors.grads.slices.step, y_step = tensors.outputs.step;
  const int64_t grad_input_step = tensors.grad_inputs.step;
  const bool ahead =
      is_ahead<op>(streamed) && dim * kTile<A> * static_cast<int64_t>(sizeof(T)) <= kKeptRow;
  const bool far = is_far<T>(y_step);
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
          if (ahead) __builtin_prefetch(y + c);
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
          write_vector<T>(streamed, grad_input + k * grad_input_step + c, lanes,
                          formula.of(load(grad + k * grad_step + c, lanes, A(0)),
                                     load(y + k * y_step + c, lanes, A(0))));
        }
      });
    });
  });
}

}  // namespace
}  // namespace softmax_ext::cpu
