// Cross-entropy (softmax_ext/losses.h) of rows and of columns, and its gradient.
//
//   who shares a row                       how they meet
//   8 to 32 lanes of a warp                shuffles
//   a block, of each part of a long row    shuffles, shared memory; of several parts
//                                          the states, in a launch of their own
//   of a column, a thread or several       shared memory
//
// Forward, a thread goes once through its elements, a batch at a time, with a running state. Backward reads and
// writes each element once, and the memory written may be that of the input. Rows of a multiple of kScoreWidth
// elements are had by as many neighbours, others and columns by single elements. A row's bits depend on its
// elements, its length and the types alone.
#pragma once

#include <cfloat>

#include "score_kernels.cuh"
#include "softmax_ext/loss_plan.h"

namespace softmax_ext::cuda {

// How a launch is shared out. A block is (threads along a row, rows), of columns (columns, threads along).
struct LossSharing {
  OuterDims outer;
  int64_t rows;
  int64_t inner;
  int64_t parts;  // of a row
  int64_t part;   // elements of each
  int width;      // neighbours that a thread has
  bool of_columns;
  bool combines;  // what is read are the states of the parts

  __device__ __forceinline__ int parts_of(int64_t dim) const {
    return static_cast<int>((dim + part - 1) / part);
  }
};

// A row, or a part of one, as a thread has it.
struct LossPlace {
  int64_t row;
  int64_t part;
  bool exists;  // one that does not comes along, as row 0
  Lanes lanes;
  OuterIndex index;
  int64_t column;

  __device__ __forceinline__ explicit LossPlace(const LossSharing& sharing)
      : lanes{static_cast<int>(sharing.of_columns ? threadIdx.y : threadIdx.x),
              static_cast<int>(sharing.of_columns ? blockDim.y : blockDim.x), sharing.width} {
    const unsigned rows = sharing.of_columns ? blockDim.x : blockDim.y;
    const unsigned own = sharing.of_columns ? threadIdx.x : threadIdx.y;
    int64_t item = int64_t{blockIdx.x} * rows + own;
    exists = item < sharing.rows * sharing.parts;
    if (!exists) item = 0;
    row = sharing.parts == 1 ? item : item / sharing.parts;
    part = item - row * sharing.parts;
    const int64_t slice = sharing.of_columns ? row / sharing.inner : row;
    column = row - slice * sharing.inner;
    if (!sharing.of_columns) column = 0;
    index = sharing.outer.index(slice);
  }
  template <class E>
  __device__ __forceinline__ E* in(E* data, const Strides& strides) const {
    return data + index.offset(strides) + column;
  }
};

// A target as a row has it.
template <class A>
struct LossTarget {
  int64_t y;  // -1: the row does not count
  A weight;   // 0 there

  __device__ __forceinline__ LossTarget(const Loss& loss, int64_t row, int64_t dim)
      : y(loss.target[row]), weight(0) {
    // What is neither has failed before; it only must not be read.
    if (y == loss.ignore_index || y < 0 || y >= dim) y = -1;
    if (y >= 0) weight = loss.weight == nullptr ? A(1) : static_cast<const A*>(loss.weight)[y];
  }
};

template <class A>
__device__ __forceinline__ A weight_of(const Loss& loss, int64_t c) {
  return loss.weight == nullptr ? A(1) : static_cast<const A*>(loss.weight)[c];
}

// What elements become.
template <class A>
struct LossScore {
  A factor, softcap, inverse;

  __device__ __forceinline__ explicit LossScore(const Loss& loss)
      : factor(static_cast<A>(loss.factor)), softcap(static_cast<A>(loss.softcap)) {
    inverse = softcap == A(0) ? A(0) : A(1) / softcap;
  }
  __device__ __forceinline__ A capped(A z) const {
    return mul_of(softcap, tanh_of(mul_of(z, inverse)));
  }
  __device__ __forceinline__ A of(A x) const {
    const A z = mul_of(x, factor);
    return softcap == A(0) ? z : capped(z);
  }
  // The first `size` of a batch.
  template <int items>
  __device__ __forceinline__ void of_batch(Lanes lanes, int size, A (&z)[items]) const {
    for_each_item<items>(lanes, size, [&](int i) { z[i] = mul_of(z[i], factor); });
    if (softcap != A(0)) {
      for_each_in_turns([&](A& s) { s = capped(s); }, z);
    }
  }
  // dx from dz, of a score z.
  __device__ __forceinline__ A gradient(A dz, A z) const {
    dz = mul_of(dz, factor);
    const A t = mul_of(z, inverse);
    return softcap == A(0) ? dz : mul_of(dz, fma_of(-t, t, A(1)));
  }
};

// Elements of a thread that are on their way at a time.
template <class A>
constexpr int kLossForwardItems = sizeof(A) == 8 ? 8 : 16;
constexpr int kLossBackwardItems = 8;
// The same of each of two tensors.
template <class A>
constexpr int kLossPairItems = sizeof(A) == 8 ? 4 : 8;

// body(first, size, width) for the batches of a row, or of a part of one: elements from `first` on, `width`
// neighbours for each thread.
template <int items, class Body>
__device__ __forceinline__ void for_each_batch(const LossSharing& sharing, const LossPlace& place,
                                               int64_t dim, Body body) {
  const int room = items * place.lanes.lanes;
  const int64_t begin = place.part * sharing.part;
  const int64_t end = min(begin + sharing.part, dim);
  with_width(place.lanes, [&](auto width) {
#pragma unroll 1
    for (int64_t first = begin; first < end; first += room) {
      body(first, static_cast<int>(min(end - first, int64_t{room})), width);
    }
  });
}

// Whether `width` neighbours can be had at once.
template <int width, class T>
__device__ __forceinline__ bool is_aligned(const T* row) {
  constexpr int kBytes = width * static_cast<int>(sizeof(T));
  return misalignment(row, kBytes < limits::kVectorBytes ? kBytes : limits::kVectorBytes) == 0;
}

// The `size` elements of a row from `first` on; `step` is the distance of two.
template <int width, int items, class A, class T>
__device__ __forceinline__ void load_batch(const T* row, int64_t step, int64_t first, Lanes lanes,
                                           int size, A fill, A (&x)[items]) {
  const T* const own = row + first * step;
  const bool aligned = is_aligned<width>(row);
#pragma unroll
  for (int i = 0; i < items; i += width) {
    const int k = lanes.lane * width + place_of<width>(lanes, i);
    T neighbours[width]{};
    if (k < size) {
      if (width > 1 && aligned) {
        load_neighbours(own + k, neighbours);
      } else {
#pragma unroll
        for (int v = 0; v < width; ++v) neighbours[v] = own[(k + v) * step];
      }
    }
#pragma unroll
    for (int v = 0; v < width; ++v) {
      x[i + v] = k < size ? from_element<A>(neighbours[v]) : fill;
    }
  }
}

// The scores of that, and -infinity for what is not there.
template <int width, int items, class A, class T>
__device__ __forceinline__ void load_scores(const LossScore<A>& score, const T* row, int64_t step,
                                            int64_t first, Lanes lanes, int size, A (&z)[items]) {
  constexpr A kLowest = -static_cast<A>(INFINITY);
  load_batch<width>(row, step, first, lanes, size, kLowest, z);
  score.of_batch(lanes, size, z);
  if (score.softcap == A(0)) return;
  for_each_item<items>(lanes, size, [&](int i) {
    if (lanes.lane * width + place_of<width>(lanes, i) >= size) z[i] = kLowest;
  });
}

template <int width, int items, class A, class T>
__device__ __forceinline__ void store_batch(T* row, int64_t step, int64_t first, Lanes lanes,
                                            int size, const A (&x)[items]) {
  T* const own = row + first * step;
  const bool aligned = is_aligned<width>(row);
#pragma unroll
  for (int i = 0; i < items; i += width) {
    const int k = lanes.lane * width + place_of<width>(lanes, i);
    if (k >= size) continue;
    if constexpr (width > 1) {
      if (aligned) {
        A neighbours[width];
#pragma unroll
        for (int v = 0; v < width; ++v) neighbours[v] = x[i + v];
        Pieces<T, width>::of(neighbours).store(own + k);
        continue;
      }
    }
#pragma unroll
    for (int v = 0; v < width; ++v) own[(k + v) * step] = ToElement<T>::of(x[i + v]);
  }
}

// --- Forward -------------------------------------------------------------------------------------

// x, and the least number for -infinity: times an exp that is 0, it is 0.
template <class A>
__device__ __forceinline__ A at_least_finite(A x) {
  return max_of(sizeof(A) == 4 ? A(-FLT_MAX) : static_cast<A>(-DBL_MAX), x);
}

// What is known of some elements of a row. The largest ones add 1 each to the sum of exp(z - max), apart from
// all others: where a row is sure of one class, those are what its loss and its gradient are made of.
template <class A>
struct LossState {
  A max;
  A ones, others;
  A score;    // of w (z - shift_by(max)), where there is smoothing
  A weight;   // of w
  A product;  // of exp(z - max) (z - max), where the entropy is wanted

  static __device__ __forceinline__ LossState empty() {
    return {-static_cast<A>(INFINITY), A(0), A(0), A(0), A(0), A(0)};
  }
  // The same for a larger max.
  __device__ __forceinline__ void raise(A larger) {
    if (larger == max) return;
    const A shift = shift_by(larger), less = shift_by(max) - shift;
    const A sum = add_of(ones, others), factor = exp_of(max - shift);
    product = mul_of(add_of(product, mul_of(sum, less)), factor);
    others = mul_of(sum, factor);
    ones = A(0);
    score = add_of(score, mul_of(weight, less));
    max = larger;
  }
  __device__ __forceinline__ void add(LossState other) {
    const A larger = max_of(max, other.max);
    raise(larger);
    other.raise(larger);
    ones = add_of(ones, other.ones);
    others = add_of(others, other.others);
    score = add_of(score, other.score);
    weight = add_of(weight, other.weight);
    product = add_of(product, other.product);
  }
  // Of `size` scores, -infinity where there is none.
  template <int items>
  __device__ __forceinline__ void add_exps(Lanes lanes, int size, const A (&z)[items],
                                           bool wants_entropy) {
    A larger = max;
    for_each_item<items>(lanes, size, [&](int i) { larger = max_of(larger, z[i]); });
    raise(larger);
    const A shift = shift_by(max);
    for_each_item<items>(lanes, size, [&](int i) {
      const A below = z[i] - shift;
      const A e = below == A(0) ? A(0) : exp_of(below);
      ones = add_of(ones, below == A(0) ? A(1) : A(0));
      others = add_of(others, e);
      if (wants_entropy) product = fma_of(e, at_least_finite(below), product);
    });
  }
  // A class that has the weight w, and a score of z.
  __device__ __forceinline__ void add_weighted(A w, A z) {
    score = fma_of(w, z - shift_by(max), score);
    weight = add_of(weight, w);
  }
  // The states of the parts of a row.
  __device__ __forceinline__ void add_parts(Lanes lanes, const LossState* states, int parts) {
#pragma unroll 1
    for (int k = lanes.lane; k < parts; k += lanes.lanes) add(states[k]);
  }
  // Over the lanes of a warp that share a row.
  __device__ __forceinline__ void reduce(int lanes) {
    raise(warp_reduce<Max>(max, lanes));
    ones = warp_reduce<Sum>(ones, lanes);
    others = warp_reduce<Sum>(others, lanes);
    score = warp_reduce<Sum>(score, lanes);
    weight = warp_reduce<Sum>(weight, lanes);
    product = warp_reduce<Sum>(product, lanes);
  }
};

// Over the threads that share a row, or a part of one: the result is in all of them. By all threads, of each type
// of state once in a kernel.
template <class State>
__device__ __forceinline__ void reduce_row(Lanes lanes, State& state) {
  state.reduce(min(lanes.lanes, limits::kWarp));
  if (lanes.lanes <= limits::kWarp) return;
  SOFTMAX_EXT_STATIC_SHARED(State, states, limits::kLossThreads / limits::kWarp);
  const int lane = lanes.lane % limits::kWarp;
  if (lane == 0) states[lanes.lane / limits::kWarp] = state;
  __syncthreads();
  state = lane < lanes.lanes / limits::kWarp ? states[lane] : state.empty();
  state.reduce(limits::kWarp);
}

// The same of a row or a column: the result is in the first of the threads.
template <class A>
__device__ __forceinline__ void reduce(const LossSharing& sharing, Lanes lanes,
                                       LossState<A>& state) {
  if (!sharing.of_columns) return reduce_row(lanes, state);
  SOFTMAX_EXT_STATIC_SHARED(LossState<A>, states, limits::kLossThreads);
  if (lanes.lanes == 1) return;
  LossState<A>* const column = states + threadIdx.x;
  column[threadIdx.y * blockDim.x] = state;
  __syncthreads();
  if (lanes.lane != 0) return;
#pragma unroll 1
  for (int k = 1; k < lanes.lanes; ++k) state.add(column[k * static_cast<int>(blockDim.x)]);
}

// a + b, and what it is rounded off.
template <class A>
__device__ __forceinline__ A sum_of(A a, A b, A& rest) {
  const A sum = add_of(a, b);
  const A of_b = sum - a;
  rest = (a - (sum - of_b)) + (b - of_b);
  return sum;
}

template <class A>
__device__ __forceinline__ void store_loss(const LossForwardArgs& args, int64_t row, A loss, A lse,
                                           A rest, A log_p) {
  static_cast<A*>(args.row_loss)[row] = loss;
  static_cast<A*>(args.lse)[row] = lse;
  static_cast<A*>(args.lse_rest)[row] = rest;
  static_cast<A*>(args.log_p)[row] = log_p;
}

// Of a row with that state; of_target is the target's score.
template <class A>
__device__ __forceinline__ void store_loss(const LossForwardArgs& args, int64_t row,
                                           const LossTarget<A>& target, const LossState<A>& state,
                                           A of_target) {
  const Loss& of = args.loss;
  const A shift = shift_by(state.max);
  const A log_sum = log_of(state.ones) + log1p_of(state.others / state.ones);
  A rest;
  A lse = sum_of(shift, log_sum, rest);
  if (state.max == -static_cast<A>(INFINITY) && state.others == A(0)) lse = state.max;
  if (!(rest == rest)) rest = A(0);
  const A log_p = (of_target - lse) - rest;
  A loss = mul_of(-log_p, static_cast<A>(1 - of.smoothing));
  if (of.z_loss != 0) loss = add_of(loss, static_cast<A>(of.z_loss) * lse * lse);
  loss = mul_of(loss, target.weight);
  if (of.smoothing != 0) {
    const A smooth = mul_of(state.weight, (lse - shift) + rest) - state.score;
    loss = fma_of(smooth, static_cast<A>(of.smoothing / static_cast<double>(args.shape.dim)), loss);
  }
  store_loss(args, row, target.y < 0 ? A(0) : loss, lse, rest, log_p);
  if (args.entropy != nullptr) {
    const A mean = state.product / add_of(state.ones, state.others);
    static_cast<A*>(args.entropy)[row] = log_sum - mean;
  }
}

// states: of the parts of rows, one row's after another's; where a row has but one, null.
template <class T>
__device__ __forceinline__ void run_loss_forward(const LossForwardArgs& args,
                                                 const LossSharing& sharing,
                                                 LossState<computed_t<T>>* states) {
  using A = computed_t<T>;
  const int64_t dim = args.shape.dim;
  const LossPlace place(sharing);
  const Lanes lanes = place.lanes;
  const LossTarget<A> target(args.loss, place.row, dim);
  const bool is_read = place.exists && (target.y >= 0 || args.wants_lse);
  const LossScore<A> score(args.loss);
  const bool is_smooth = args.loss.smoothing != 0, wants_entropy = args.entropy != nullptr;
  const T* const row = place.in(static_cast<const T*>(args.input), args.input_strides);
  const int64_t step = args.input_strides.dim;
  LossState<A> state = LossState<A>::empty();
  if (sharing.combines) {
    const int parts = sharing.parts_of(dim);
    state.add_parts(lanes, states + place.row * parts, parts);
  } else if (is_read) {
    for_each_batch<kLossForwardItems<A>>(
        sharing, place, dim, [&](int64_t first, int size, auto width) {
          constexpr int kWidth = decltype(width)::value;
          A z[kLossForwardItems<A>];
          load_scores<kWidth>(score, row, step, first, lanes, size, z);
          state.add_exps(lanes, size, z, wants_entropy);
          if (!is_smooth) return;
          int i = 0;
          for_each_in_turns(
              [&](A of_class) {
                const int k = lanes.lane * kWidth + place_of<kWidth>(lanes, i++);
                if (k < size) state.add_weighted(weight_of<A>(args.loss, first + k), of_class);
              },
              z);
        });
  }
  reduce(sharing, lanes, state);
  if (lanes.lane != 0 || !place.exists) return;
  if (sharing.parts > 1) {
    states[place.row * sharing.parts + place.part] = state;
  } else if (is_read) {
    const A of_target = target.y < 0 ? A(0) : score.of(from_element<A>(row[target.y * step]));
    store_loss(args, place.row, target, state, of_target);
  } else {
    store_loss(args, place.row, A(0), A(0), A(0), A(0));
  }
}

// --- Backward ------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void run_loss_backward(const LossBackwardArgs& args,
                                                  const LossSharing& sharing) {
  using A = computed_t<T>;
  const Loss& loss = args.loss;
  const LossGrads& grads = args.grads;
  const int64_t dim = args.shape.dim;
  const LossPlace place(sharing);
  if (!place.exists) return;
  const Lanes lanes = place.lanes;
  const LossTarget<A> target(loss, place.row, dim);
  const LossScore<A> score(loss);
  const auto of_row = [&](const void* data) { return static_cast<const A*>(data)[place.row]; };
  const auto value = [](double x) { return static_cast<A>(x); };
  const bool has_entropy = grads.entropy != nullptr;
  const bool is_zero = target.y < 0 && grads.lse == nullptr && !has_entropy;
  const bool is_smooth = loss.smoothing != 0;
  A lse = A(0), rest = A(0), of_target = A(0), entropy = A(0), grad_entropy = A(0);
  LossGradient<A> gradient{};
  const auto of_entropy = [&](A p, A log_p) {
    return mul_of(mul_of(grad_entropy, p), add_of(at_least_finite(log_p), entropy));
  };
  if (!is_zero) {
    A g(1);
    if (grads.loss != nullptr) {
      g = static_cast<const A*>(grads.loss)[grads.loss_step == 0 ? 0 : place.row];
    }
    if (grads.divisor != nullptr) g = g * value(1 / *grads.divisor);
    if (target.y < 0) g = A(0);
    const double* const sum = loss.weight_sum_on_device;
    lse = of_row(args.lse);
    rest = of_row(args.lse_rest);
    const A log_p = of_row(args.log_p);
    gradient =
        LossGradient<A>::of(g, grads.lse == nullptr ? A(0) : of_row(grads.lse), target.weight, lse,
                            value(loss.smoothing), value(loss.smoothing / static_cast<double>(dim)),
                            value(sum == nullptr ? loss.weight_sum : *sum), value(loss.z_loss));
    of_target = gradient.of_target(expm1_of(log_p), target.weight);
    if (has_entropy) {
      entropy = of_row(args.entropy);
      grad_entropy = of_row(grads.entropy);
      of_target = of_target - of_entropy(exp_of(log_p), log_p);
    }
    of_target = score.gradient(of_target, log_p + lse);
  }
  const T* const input = place.in(static_cast<const T*>(args.input), args.input_strides);
  T* const output = place.in(static_cast<T*>(args.grad_input), args.grad_input_strides);
  const int64_t step = args.input_strides.dim, output_step = args.grad_input_strides.dim;
  for_each_batch<kLossBackwardItems>(sharing, place, dim, [&](int64_t first, int size, auto width) {
    constexpr int kWidth = decltype(width)::value, kItems = kLossBackwardItems;
    A z[kItems]{};
    if (!is_zero) {
      load_batch<kWidth>(input, step, first, lanes, size, A(0), z);
      score.of_batch(lanes, size, z);
      for_each_item<kItems>(lanes, size, [&](int i) {
        const int k = lanes.lane * kWidth + place_of<kWidth>(lanes, i);
        const A w = is_smooth && k < size ? weight_of<A>(loss, first + k) : A(0);
        const A log_p = (z[i] - lse) - rest, p = exp_of(log_p);
        A dz = gradient.of_other(p, w);
        if (has_entropy) dz = dz - of_entropy(p, log_p);
        z[i] = first + k == target.y ? of_target : score.gradient(dz, z[i]);
      });
    }
    store_batch<kWidth>(output, output_step, first, lanes, size, z);
  });
}

// --- Kernels -------------------------------------------------------------------------------------

// Blocks of an SM, as the compiler is told.
template <class T>
constexpr int kLossBlocks = sizeof(T) == 8 ? 2 : 3;

template <class T>
__global__ void __launch_bounds__(limits::kLossThreads, kLossBlocks<T>)
    loss_forward_kernel(LossForwardArgs args, LossSharing sharing,
                        LossState<computed_t<T>>* states) {
  run_loss_forward<T>(args, sharing, states);
}

template <class T>
__global__ void __launch_bounds__(limits::kLossThreads, kLossBlocks<T>)
    loss_backward_kernel(LossBackwardArgs args, LossSharing sharing) {
  run_loss_backward<T>(args, sharing);
}

}  // namespace softmax_ext::cuda
