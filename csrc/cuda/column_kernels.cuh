// The columns schedule, for inner sizes above 1: threads side by side (x) take columns side by side,
// as many as one access has; threads along dim (y) take the parts of a column (column_tree.cuh).
//
//   a tile                               blocks                reads   writes
//   that the shared memory of a block    1                     1       1
//   holds
//   of 2 to 16 blocks, sm_90 and later   a cluster             1       1
//   longer                               1, or a cluster       2 or 3  1
//
// An SM has several blocks, of which some load or store while others compute. A thread copies its own
// elements to shared memory, and reads each before it writes it; no other thread touches that
// element, so the memory written may be that of an input.
#pragma once

#include "column_tree.cuh"
#include "outer_strides.cuh"

namespace softmax_ext::cuda {

// Where the columns of each tensor, side by side, begin and go on.
struct ColumnStrides {
  OuterStrides outer;
  int64_t steps[OuterStrides::kTensors];  // along dim
};

// A block, and the tile that it has at the moment.
template <class Pass>
class ColumnBlock {
 public:
  using A = typename Pass::A;
  using State = typename Pass::State;
  using Element = typename Pass::Element;
  using Result = typename Pass::Result;
  static constexpr int kColumns = Pass::kColumns;
  using Inputs = const Element* const (&)[Pass::kInputs];

  __device__ __forceinline__ ColumnBlock(const Shape& shape, const ColumnStrides& strides,
                                         const ColumnSplit& split, const ColumnMemory& places,
                                         bool is_held, unsigned char* memory, int64_t* apart)
      : shape_(shape),
        strides_(strides),
        split_(split),
        is_held_(is_held),
        maxima_(reinterpret_cast<A*>(memory)),
        states_(reinterpret_cast<State*>(memory + places.states)),
        held_(reinterpret_cast<Held*>(memory + places.elements)),
        apart_(apart) {}

  __device__ __forceinline__ int64_t tiles_of_outer() const {
    return (shape_.inner + width() - 1) / width();
  }

  __device__ __forceinline__ void begin(int64_t tile) {
    const int64_t outer = tile / tiles_of_outer();
    const int64_t column =
        (tile - outer * tiles_of_outer()) * width() + static_cast<int>(threadIdx.x) * kColumns;
    const int64_t offset = strides_.outer.offset(Pass::kInputs, outer);
    exists_ = column < shape_.inner;
    offset_ = offset + column;
    if (thread() < Pass::kInputs) {
      apart_[thread()] = strides_.outer.offset(thread(), outer) - offset;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void fetch(Inputs inputs) const {
    if (!is_held_) return;
    for_each_part([&](const Part& part) {
      const Element* from[Pass::kInputs];
#pragma unroll
      for (int i = 0; i < Pass::kInputs; ++i) from[i] = inputs[i] + place(i, part, 0);
#pragma unroll 8
      for (int s = 0; s < part.size; ++s) {
#pragma unroll
        for (int i = 0; i < Pass::kInputs; ++i) {
          Held::copy(held(part, s, i), from[i] + s * strides_.steps[i]);
        }
      }
    });
    wait_for_copies();
  }

  // The states of the thread's parts.
  __device__ __forceinline__ void sum(Inputs inputs) const {
    for_each_part([&](const Part& part) {
      State states[kColumns];
      const auto keep = [&](int s, const A(&terms)[kColumns]) {
        if constexpr (Pass::kKeepsExp) {
          if (is_held_) *held(part, s, 0) = Held::of(terms);
        }
      };
      sum_part<Pass>(part.size, loader(part, inputs), keep, states);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int place = part.number * width() + slot(c);
        states_[place] = states[c];
        if constexpr (Pass::kKeepsExp) maxima_[place] = states[c].max;
      }
    });
  }

  // The first `width` states become those of the whole columns. `tiles`: before this one.
  __device__ __forceinline__ State* meet(const Mail& mail, int64_t tiles) const {
    combine_all(states_, parts());
    if (team() == 1) return states_;
    State* const mailed = states_ + parts() * width();
    mail.begin(tiles == 0, team() * width() * static_cast<int>(sizeof(State)));
    for (int i = thread(); i < team() * width(); i += threads()) {
      mail.send(mailed + rank() * width() + i % width(), states_[i % width()], i / width());
    }
    mail.wait(static_cast<int>(tiles & 1));
    combine_all(mailed, team());
    return mailed;
  }

  __device__ __forceinline__ void store(Inputs inputs, Result* output, const State* states) const {
    typename Pass::Formula formulas[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) formulas[c] = Pass::formula(states[slot(c)]);
    for_each_part([&](const Part& part) {
      A maxima[kColumns];
      if constexpr (Pass::kKeepsExp) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) maxima[c] = maxima_[part.number * width() + slot(c)];
      }
      finish_part<Pass>(
          part.size, loader(part, inputs), is_held_, maxima, formulas,
          [&](int s, const A(&values)[kColumns]) {
            Packet<Result, kColumns>::of(values).store(output + place(Pass::kInputs, part, s));
          });
    });
  }

 private:
  using Held = Packet<Element, kColumns>;
  struct Part {
    int number;  // of the block's
    int turn;    // of the thread's
    int size;
    int64_t first;  // step
  };

  static __device__ __forceinline__ int threads() {
    return static_cast<int>(blockDim.x * blockDim.y);
  }
  static __device__ __forceinline__ int thread() {
    return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  }
  static __device__ __forceinline__ int team() { return static_cast<int>(gridDim.y); }
  static __device__ __forceinline__ int rank() { return static_cast<int>(blockIdx.y); }
  static __device__ __forceinline__ int width() { return static_cast<int>(blockDim.x) * kColumns; }
  // Where the states of the thread's column c are, so that threads side by side use banks side by
  // side.
  static __device__ __forceinline__ int slot(int c) {
    return c * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  // Of the block: every team-th.
  __device__ __forceinline__ int parts() const { return split_.parts / team(); }

  template <class Body>
  __device__ __forceinline__ void for_each_part(Body body) const {
    int turn = 0;
#pragma unroll 1
    for (int number = static_cast<int>(threadIdx.y); number < parts();
         number += static_cast<int>(blockDim.y)) {
      const int64_t first = (int64_t{number} * team() + rank()) * split_.steps;
      const int64_t left = shape_.dim - first;
      const int size =
          !exists_ || left < 0 ? 0 : static_cast<int>(min(left, int64_t{split_.steps}));
      body(Part{number, turn++, size, first});
    }
  }

  // Of tensor i, the element that step s of the part has in the thread's first column.
  __device__ __forceinline__ int64_t place(int i, const Part& part, int s) const {
    int64_t offset = offset_ + (part.first + s) * strides_.steps[i];
    if (i < Pass::kInputs) offset += *static_cast<const volatile int64_t*>(apart_ + i);
    return offset;
  }
  // In shared memory, the packet of input i. Threads side by side have theirs side by side.
  __device__ __forceinline__ Held* held(const Part& part, int s, int i) const {
    const int step = (part.turn * split_.steps + s) * Pass::kInputs + i;
    return held_ + step * threads() + thread();
  }
  __device__ __forceinline__ auto loader(const Part& part, Inputs inputs) const {
    return [this, part, &inputs](int s, typename Pass::Step& x) {
#pragma unroll
      for (int i = 0; i < Pass::kInputs; ++i) {
        if (is_held_) {
          x[i] = held(part, s, i)->read();
        } else {
          x[i].load(inputs[i] + place(i, part, s));
        }
      }
    };
  }

  // The first `width` of `count` times as many states become those of all, by all threads.
  static __device__ __forceinline__ void combine_all(State* states, int count) {
#pragma unroll 1
    for (int half = count / 2; half > 0; half /= 2) {
      __syncthreads();
      for (int i = thread(); i < half * width(); i += threads()) {
        states[i] = combine(states[i], states[i + half * width()]);
      }
    }
    if (count > 1) __syncthreads();
  }

  const Shape& shape_;
  const ColumnStrides& strides_;
  ColumnSplit split_;
  bool is_held_;
  A* maxima_;      // [part][column]
  State* states_;  // [part][column], and behind them [block of the team][column]
  Held* held_;     // [step][input][thread]
  // Of an input, how far behind the place in the result an element lies, in shared memory: read anew
  // where it is needed, it takes no registers.
  int64_t* apart_;
  int64_t offset_ = 0;  // of the thread's first column in the result
  bool exists_ = false;
};

template <class Pass>
__device__ __forceinline__ void run_columns(
    const typename Pass::Element* const (&inputs)[Pass::kInputs], typename Pass::Result* output,
    const Shape& shape, const ColumnStrides& strides, const ColumnSplit& split,
    const ColumnMemory& places, bool is_held) {
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  SOFTMAX_EXT_STATIC_SHARED(uint64_t, barrier, 1);
  SOFTMAX_EXT_STATIC_SHARED(int64_t, apart, Pass::kInputs);
  const Mail mail(barrier);
  if (gridDim.y > 1) mail.open();
  ColumnBlock<Pass> block(shape, strides, split, places, is_held, memory, apart);
  const int64_t tiles = shape.outer * block.tiles_of_outer();
  int64_t done = 0;
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    block.begin(tile);
    block.fetch(inputs);
    block.sum(inputs);
    block.store(inputs, output, block.meet(mail, done++));
    __syncthreads();  // before the states are written again
  }
}

// Of an SM, as the compiler is told: what narrow accesses leave registers for, and wide ones; float64
// takes more of them.
template <int columns, class In>
constexpr int column_blocks = sizeof(In) == 8                                ? 2
                              : columns * sizeof(In) == limits::kVectorBytes ? limits::kColumnBlocks
                                                                             : 4;

template <Op op, int columns, class In, class Out>
__global__ void __launch_bounds__(limits::kMostColumnThreads, column_blocks<columns, In>)
    columns_forward_kernel(const In* input, Out* output, Shape shape, ColumnStrides strides,
                           ColumnSplit split, ColumnMemory places, bool is_held) {
  run_columns<ForwardColumns<op, columns, In, Out>>({input}, output, shape, strides, split, places,
                                                    is_held);
}

template <Op op, int columns, class In, class Out>
__global__ void __launch_bounds__(limits::kMostColumnThreads, column_blocks<columns, In>)
    columns_backward_kernel(const In* grad_output, const In* output, Out* grad_input, Shape shape,
                            ColumnStrides strides, ColumnSplit split, ColumnMemory places,
                            bool is_held) {
  run_columns<BackwardColumns<op, columns, In, Out>>({grad_output, output}, grad_input, shape,
                                                     strides, split, places, is_held);
}

}  // namespace softmax_ext::cuda
