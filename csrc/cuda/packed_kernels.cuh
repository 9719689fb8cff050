// The packed schedule: rows that are short, or of which the elements lie between those of others
// (inner > 1), so that a warp's accesses to one row would be narrow or far apart.
//
// A block has a slab at a time: all rows of some outer indices, which are one piece of each tensor's
// memory. It goes to shared memory by 16 bytes across the rows' borders, and the results come back the same way,
// whatever the alignment. One read, one write; limit: a slab fits the block's shared memory.
//
//   kernel        between, a row is had by   limit on a row
//   packed_short  a thread, in registers     inner size 1; 4 vectors
//   packed        1 to 32 threads, a vector  inner size 1; 32 vectors
//                 each, in registers
//   packed_       1 to 32 threads, parts     inner sizes above 1; 4 parts a thread
//   columns       each (column_tree.cuh)
//
// A block reads its slab before it writes it, and touches no other, so the memory written may be that
// of an input.
#pragma once

#include "column_tree.cuh"
#include "outer_strides.cuh"

namespace softmax_ext::cuda {

struct Packing {
  int outer;  // indices of a slab
  int bytes;  // of a slab of an input in shared memory
  int group;  // threads of a row
  // Outer indices that lie one after another, in slabs of which the last may have fewer.
  int64_t run;
  Divisor slabs_of_run;
  int64_t slabs;
  OuterStrides strides;
};

// `elements` of T in shared memory, as they lie in global memory from `global` on: at the same place
// in 16 bytes; padded, with room left behind every 32 words (slab_bytes in plan.h).
template <class T, bool padded>
class Slab {
 public:
  __device__ __forceinline__ Slab(unsigned char* memory, const T* global, int elements)
      : memory_(memory),
        shift_(misalignment(global, limits::kVectorBytes)),
        end_(shift_ + elements * kSize) {}

  __device__ __forceinline__ T& operator[](int i) const {
    return *reinterpret_cast<T*>(at(shift_ + i * kSize));
  }

  // By all threads of the block.
  __device__ __forceinline__ void copy_from(const T* global) const {
    const char* const begin = reinterpret_cast<const char*>(global) - shift_;
    for_each_vector([&](int first, auto index_of) {
      Vector x[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (is_whole(index_of(first, j))) {
          x[j] = load_words<4>(begin + int64_t{index_of(first, j)} * limits::kVectorBytes);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int vector = index_of(first, j);
        if (is_whole(vector)) {
          put(vector * limits::kVectorBytes, x[j]);
        } else {
          for_each_element(vector, [&](int byte) {
            *reinterpret_cast<T*>(at(byte)) = *reinterpret_cast<const T*>(begin + byte);
          });
        }
      }
    });
  }

  __device__ __forceinline__ void copy_to(T* global) const {
    char* const begin = reinterpret_cast<char*>(global) - shift_;
    for_each_vector([&](int first, auto index_of) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int vector = index_of(first, j);
        if (is_whole(vector)) {
          store_words<true>(begin + int64_t{vector} * limits::kVectorBytes,
                            get(vector * limits::kVectorBytes));
        } else {
          for_each_element(vector, [&](int byte) {
            *reinterpret_cast<T*>(begin + byte) = *reinterpret_cast<const T*>(at(byte));
          });
        }
      }
    });
  }

 private:
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kPad = kSize > 4 ? kSize : 4;
  static constexpr int kBatch = 4;  // loads in flight

  __device__ __forceinline__ unsigned char* at(int byte) const {
    return memory_ + byte + (padded ? byte / (32 * 4) * kPad : 0);
  }
  // The vector at `byte`, which is a multiple of 16; the room left lies anywhere in it.
  __device__ __forceinline__ void put(int byte, const Vector& x) const {
    if constexpr (padded) {
#pragma unroll
      for (int w = 0; w < 4; ++w) *reinterpret_cast<uint32_t*>(at(byte + w * 4)) = x.word[w];
    } else {
      store_words<false>(at(byte), x);
    }
  }
  __device__ __forceinline__ Vector get(int byte) const {
    if constexpr (padded) {
      Vector x;
#pragma unroll
      for (int w = 0; w < 4; ++w) x.word[w] = *reinterpret_cast<const uint32_t*>(at(byte + w * 4));
      return x;
    } else {
      return load_words<4>(at(byte));
    }
  }
  __device__ __forceinline__ bool is_whole(int vector) const {
    return (vector > 0 || shift_ == 0) && (vector + 1) * limits::kVectorBytes <= end_;
  }
  template <class Body>
  __device__ __forceinline__ void for_each_vector(Body body) const {
    const int threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x); first * limits::kVectorBytes < end_;
         first += kBatch * threads) {
      body(first, [threads](int first, int j) { return first + j * threads; });
    }
  }
  // Those of the slab in a vector that is not whole.
  template <class Body>
  __device__ __forceinline__ void for_each_element(int vector, Body body) const {
#pragma unroll 1
    for (int v = 0; v < kWidth<T>; ++v) {
      const int byte = vector * limits::kVectorBytes + v * kSize;
      if (byte >= shift_ && byte < end_) body(byte);
    }
  }

  unsigned char* memory_;
  int shift_;
  int end_;  // bytes from the first whole 16
};

// The elements of a row that a thread has: those of vector `lane` of the row; of a column its parts.
struct PackedRow {
  int lane;
  int group;
  int dim;  // 0 for a row that does not exist
  int inner;
  int begin;  // of the row in the slab

  // Calls body(v, place, whether it exists) for the elements of the thread's vector.
  template <int width, class Body>
  __device__ __forceinline__ void for_each(Body body) const {
    const int first = lane * width;
    int place = begin + first * inner;
#pragma unroll
    for (int v = 0; v < width; ++v) {
      body(v, place, first + v < dim);
      place += inner;
    }
  }
};

// Calls body(row) for the rows of a slab of `outer` outer indices; all threads of a warp come along.
template <class Body>
__device__ __forceinline__ void for_each_packed_row(const Shape& shape, int outer, int group,
                                                    Body body) {
  const int dim = static_cast<int>(shape.dim);
  const int inner = static_cast<int>(shape.inner);
  const int rows = outer * inner;
  const int at_a_time = static_cast<int>(blockDim.x) / group;
  const int lane = static_cast<int>(threadIdx.x) % group;
#pragma unroll 1
  for (int first = 0; first < rows; first += at_a_time) {
    const int row = first + static_cast<int>(threadIdx.x) / group;
    const int of_outer = inner == 1 ? row : row / inner;
    body(PackedRow{lane, group, row < rows ? dim : 0, inner,
                   of_outer * dim * inner + (row - of_outer * inner)});
  }
}

// Calls body(offset, outer) for each slab of the block: of a tensor's number, the element that it
// begins with there; its outer indices.
template <class Body>
__device__ __forceinline__ void for_each_slab(const Shape& shape, const Packing& packing,
                                              Body body) {
#pragma unroll 1
  for (int64_t slab = blockIdx.x; slab < packing.slabs; slab += gridDim.x) {
    int64_t first = slab * packing.outer;
    int64_t end = shape.outer;
    if (packing.run < shape.outer) {
      const int64_t run = packing.slabs_of_run.quotient(static_cast<uint32_t>(slab));
      end = (run + 1) * packing.run;
      first = run * packing.run + (slab - run * packing.slabs_of_run.size) * packing.outer;
    }
    const int64_t left = end - first;
    body([&](int tensor) { return packing.strides.offset(tensor, first); },
         left < packing.outer ? static_cast<int>(left) : packing.outer);
  }
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kLargePackedThreads, 1)
    packed_forward_kernel(const In* input, Out* output, Shape shape, Packing packing) {
  using A = computed_t<In>;
  using P = typename PrecisionOf<op, Out>::type;
  constexpr int kWidth = cuda::kWidth<In>;
  constexpr bool kKeepExps = op == Op::kSoftmax && kDearExp<In>;
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  const int64_t of_outer = shape.dim * shape.inner;
  for_each_slab(shape, packing, [&](auto offset, int outer) {
    const int elements = outer * static_cast<int>(of_outer);
    const In* const from = input + offset(0);
    const Slab<In, true> in(memory, from, elements);
    const Slab<Out, true> out(memory + packing.bytes, output + offset(1), elements);
    in.copy_from(from);
    __syncthreads();
    for_each_packed_row(shape, outer, packing.group, [&](const PackedRow& row) {
      A x[kWidth];
      A max = -static_cast<A>(INFINITY);
      // As a loop, for up to two registers less.
#pragma unroll 1
      for (int turn = 0; turn < 1; ++turn) {
        row.for_each<kWidth>([&](int v, int place, bool exists) {
          x[v] = exists ? from_element<A>(in[place]) : -static_cast<A>(INFINITY);
        });
        max = max_of(max, max_in(x));
      }
      max = warp_reduce<Max>(max, row.group);
      const A shift = shift_by(max);
      A exps[kWidth];
#pragma unroll
      for (int v = 0; v < kWidth; ++v) exps[v] = P::exp(x[v] - shift);
      const A sum = warp_reduce<Sum>(add_of(A(0), sum_of(exps)), row.group);
      const forward_t<op, A, Out> formula(max, sum);
      row.for_each<kWidth>([&](int v, int place, bool exists) {
        if (!exists) return;
        if constexpr (kKeepExps) {
          out[place] = ToElement<Out>::of(formula.of_exp(exps[v]));
        } else {
          out[place] = ToElement<Out>::of(formula.of(x[v]));
        }
      });
    });
    __syncthreads();
    out.copy_to(output + offset(1));
  });
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kLargePackedThreads, 1)
    packed_backward_kernel(const In* grad_output, const In* output, Out* grad_input, Shape shape,
                           Packing packing) {
  using A = computed_t<In>;
  using B = backward_t<op, A, Out>;
  constexpr int kWidth = cuda::kWidth<In>;
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  const int64_t of_outer = shape.dim * shape.inner;
  for_each_slab(shape, packing, [&](auto offset, int outer) {
    const int elements = outer * static_cast<int>(of_outer);
    const In* const from_grad = grad_output + offset(0);
    const In* const from_y = output + offset(1);
    const Slab<In, true> grad(memory, from_grad, elements);
    const Slab<In, true> y(memory + packing.bytes, from_y, elements);
    const Slab<Out, true> out(memory + 2 * packing.bytes, grad_input + offset(2), elements);
    grad.copy_from(from_grad);
    y.copy_from(from_y);
    __syncthreads();
    for_each_packed_row(shape, outer, packing.group, [&](const PackedRow& row) {
      A sum = 0;
      // As a loop, for up to two registers less.
#pragma unroll 1
      for (int turn = 0; turn < 1; ++turn) {
        A terms[kWidth]{};
        row.for_each<kWidth>([&](int v, int place, bool exists) {
          if (exists) terms[v] = B::term(from_element<A>(grad[place]), from_element<A>(y[place]));
        });
        sum = add_of(sum, sum_of(terms));
      }
      const B formula{row_sum(warp_reduce<Sum>(sum, row.group))};
      row.for_each<kWidth>([&](int, int place, bool exists) {
        if (!exists) return;
        out[place] =
            ToElement<Out>::of(formula.of(from_element<A>(grad[place]), from_element<A>(y[place])));
      });
    });
    __syncthreads();
    out.copy_to(grad_input + offset(2));
  });
}

// --- Columns -------------------------------------------------------------------------------------

// Parts lane, lane + 32, ... of a column in slabs; `slabs` has one of each input. One part after
// another goes through the same code; what is kept of each, by constant indices, is in registers.
template <class Pass, class Slabs, class Out>
__device__ __forceinline__ void run_packed_column(const PackedRow& row, const ColumnSplit& split,
                                                  const Slabs& slabs, const Out& out) {
  using State = typename Pass::State;
  using A = typename Pass::A;
  constexpr int kParts = limits::kPackedParts;
  constexpr bool kKeepsExp = Pass::kKeepsExp && kDearExp<typename Pass::Element>;  // in the slab
  const auto for_each_part = [&](auto body) {
#pragma unroll 1
    for (int k = 0; k < kParts && k * row.group < split.parts; ++k) {
      const int first = (k * row.group + row.lane) * split.steps;
      const auto place = [&](int s) { return row.begin + (first + s) * row.inner; };
      const auto load = [&](int s, typename Pass::Step& x) {
#pragma unroll
        for (int i = 0; i < Pass::kInputs; ++i) x[i].load(&slabs[i][place(s)]);
      };
      const int left = row.dim - first;
      body(k, left < 0 ? 0 : min(left, split.steps), load, place);
    }
  };
  State states[kParts]{};
  for_each_part([&](int k, int size, auto load, [[maybe_unused]] auto place) {
    State state[1];
    const auto keep = [&](int s, const A(&terms)[1]) {
      if constexpr (kKeepsExp) slabs[0][place(s)] = terms[0];
    };
    sum_part<Pass>(size, load, keep, state);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (i == k) states[i] = state[0];
    }
  });
  State sums[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) sums[i] = states[i];
#pragma unroll
  for (int half = kParts / 2; half > 0; half /= 2) {
    if (half * row.group >= split.parts) continue;
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] = combine(sums[i], sums[i + half]);
  }
  State state = sums[0];
  for (int offset = row.group / 2; offset > 0; offset /= 2) {
    State other;
    other.sum = __shfl_xor_sync(0xffffffffu, state.sum, offset);
    if constexpr (kHasMax<State>) other.max = __shfl_xor_sync(0xffffffffu, state.max, offset);
    state = combine(state, other);
  }
  const typename Pass::Formula formulas[1] = {Pass::formula(state)};
  for_each_part([&](int k, int size, auto load, auto place) {
    A max[1]{};
    if constexpr (Pass::kKeepsExp) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (i == k) max[0] = states[i].max;
      }
    }
    finish_part<Pass>(size, load, kKeepsExp, max, formulas, [&](int s, const A(&values)[1]) {
      out[place(s)] = ToElement<typename Pass::Result>::of(values[0]);
    });
  });
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kLargePackedThreads, 1)
    packed_columns_forward_kernel(const In* input, Out* output, Shape shape, Packing packing,
                                  ColumnSplit split) {
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  const int64_t of_outer = shape.dim * shape.inner;
  for_each_slab(shape, packing, [&](auto offset, int outer) {
    const int elements = outer * static_cast<int>(of_outer);
    const In* const from = input + offset(0);
    const Slab<In, true> in[1] = {{memory, from, elements}};
    const Slab<Out, true> out(memory + packing.bytes, output + offset(1), elements);
    in[0].copy_from(from);
    __syncthreads();
    for_each_packed_row(shape, outer, packing.group, [&](const PackedRow& row) {
      run_packed_column<ForwardColumns<op, 1, In, Out>>(row, split, in, out);
    });
    __syncthreads();
    out.copy_to(output + offset(1));
  });
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kLargePackedThreads, 1)
    packed_columns_backward_kernel(const In* grad_output, const In* output, Out* grad_input,
                                   Shape shape, Packing packing, ColumnSplit split) {
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  const int64_t of_outer = shape.dim * shape.inner;
  for_each_slab(shape, packing, [&](auto offset, int outer) {
    const int elements = outer * static_cast<int>(of_outer);
    const In* const from[2] = {grad_output + offset(0), output + offset(1)};
    const Slab<In, true> in[2] = {{memory, from[0], elements},
                                  {memory + packing.bytes, from[1], elements}};
    const Slab<Out, true> out(memory + 2 * packing.bytes, grad_input + offset(2), elements);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const In* const of_input = i == 0 ? from[0] : from[1];
      Slab<In, true>(memory + i * packing.bytes, of_input, elements).copy_from(of_input);
    }
    __syncthreads();
    for_each_packed_row(shape, outer, packing.group, [&](const PackedRow& row) {
      run_packed_column<BackwardColumns<op, 1, In, Out>>(row, split, in, out);
    });
    __syncthreads();
    out.copy_to(grad_input + offset(2));
  });
}

// --- A row by a thread ---------------------------------------------------------------------------

// `leaves` vectors of a row, which has `dim` elements. dim is the same for all threads, so that they
// branch together where the row ends.
template <int width, int leaves, class Body>
__device__ __forceinline__ void for_each_of_row(int dim, Body body) {
#pragma unroll
  for (int v = 0; v < leaves * width; ++v) {
    if (v >= dim) break;
    body(v);
  }
}

// The row's sum of term(v), as the lanes of a warp that have a vector each would add it.
template <class A, int width, int leaves, class Term>
__device__ __forceinline__ A sum_of_row(int dim, Term term) {
  A sums[leaves]{};
  for_each_of_row<width, leaves>(dim, [&](int v) {
    sums[v / width] = v % width == 0 ? term(v) : add_of(sums[v / width], term(v));
  });
  return sum_of_leaves(sums);
}

template <Op op, int leaves, class In, class Out>
__global__ void __launch_bounds__(limits::kPackedThreads)
    packed_short_forward_kernel(const In* input, Out* output, Shape shape, Packing packing) {
  using A = computed_t<In>;
  using P = typename PrecisionOf<op, Out>::type;
  constexpr int kWidth = cuda::kWidth<In>;
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  const int dim = static_cast<int>(shape.dim);
  for_each_slab(shape, packing, [&](auto offset, int rows) {
    const In* const in_slab = input + offset(0);
    const Slab<In, false> in(memory, in_slab, rows * dim);
    const Slab<Out, false> out(memory + packing.bytes, output + offset(1), rows * dim);
    in.copy_from(in_slab);
    __syncthreads();
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x); row < rows; row += static_cast<int>(blockDim.x)) {
      const In* const from = &in[row * dim];
      Out* const to = &out[row * dim];
      A x[leaves * kWidth];
      A max = -static_cast<A>(INFINITY);
      for_each_of_row<kWidth, leaves>(dim, [&](int v) {
        x[v] = from_element<A>(from[v]);
        max = max_of(max, x[v]);
      });
      const A shift = shift_by(max);
      const A sum = sum_of_row<A, kWidth, leaves>(dim, [&](int v) {
        const A e = P::exp(x[v] - shift);
        if constexpr (op == Op::kSoftmax) x[v] = e;
        return e;
      });
      const forward_t<op, A, Out> formula(max, sum);
      for_each_of_row<kWidth, leaves>(dim, [&](int v) {
        if constexpr (op == Op::kSoftmax) {
          to[v] = ToElement<Out>::of(formula.of_exp(x[v]));
        } else {
          to[v] = ToElement<Out>::of(formula.of(x[v]));
        }
      });
    }
    __syncthreads();
    out.copy_to(output + offset(1));
  });
}

template <Op op, int leaves, class In, class Out>
__global__ void __launch_bounds__(limits::kPackedThreads)
    packed_short_backward_kernel(const In* grad_output, const In* output, Out* grad_input,
                                 Shape shape, Packing packing) {
  using A = computed_t<In>;
  using B = backward_t<op, A, Out>;
  constexpr int kWidth = cuda::kWidth<In>;
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  const int dim = static_cast<int>(shape.dim);
  for_each_slab(shape, packing, [&](auto offset, int rows) {
    const In* const grad_slab = grad_output + offset(0);
    const In* const y_slab = output + offset(1);
    const Slab<In, false> grad(memory, grad_slab, rows * dim);
    const Slab<In, false> y(memory + packing.bytes, y_slab, rows * dim);
    const Slab<Out, false> out(memory + 2 * packing.bytes, grad_input + offset(2), rows * dim);
    grad.copy_from(grad_slab);
    y.copy_from(y_slab);
    __syncthreads();
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x); row < rows; row += static_cast<int>(blockDim.x)) {
      const In* const from_grad = &grad[row * dim];
      const In* const from_y = &y[row * dim];
      Out* const to = &out[row * dim];
      A g[leaves * kWidth];
      A outputs[leaves * kWidth];
      for_each_of_row<kWidth, leaves>(dim, [&](int v) {
        g[v] = from_element<A>(from_grad[v]);
        outputs[v] = from_element<A>(from_y[v]);
      });
      const B formula{row_sum(
          sum_of_row<A, kWidth, leaves>(dim, [&](int v) { return B::term(g[v], outputs[v]); }))};
      for_each_of_row<kWidth, leaves>(
          dim, [&](int v) { to[v] = ToElement<Out>::of(formula.of(g[v], outputs[v])); });
    }
    __syncthreads();
    out.copy_to(grad_input + offset(2));
  });
}

}  // namespace softmax_ext::cuda
