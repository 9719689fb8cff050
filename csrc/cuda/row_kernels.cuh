// The schedules for inner size 1: a group of blockDim.x threads has a row, a block blockDim.y rows.
//
//   schedule   keeps a row in              limit on dim                             reads  writes
//   registers  `vectors` 16-byte vectors   512 threads x vectors x elements in a    1      1
//              of each thread              vector: 2048 to 16384 by type
//   shared     the block's shared memory   what the device lets a block have        1      1
//   streaming  nothing                     none                                     2      1
//
// A thread reads each element before it writes it, and no other thread touches that element, so
// the memory written may be that of an input.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace softmax_ext::cuda {

__device__ __forceinline__ Lanes row_lanes(bool vectorized) {
  return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), vectorized};
}

// The last multiple of `step` below `size`; negative where there is none.
template <class Index>
__device__ __forceinline__ Index last_step(Index size, int step) {
  return (size + step - 1) / step * step - step;
}

// Calls body(row, exists) until every row has been had. Threads whose row does not exist come
// along, for the barriers and shuffles in body.
template <class Body>
__device__ __forceinline__ void for_each_row(int64_t rows, Body body) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
#pragma unroll 1
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows;
       first += stride) {
    const int64_t row = first + threadIdx.y;
    body(row, row < rows);
  }
}

template <Op op, int vectors, class In, class Out>
__global__ void __launch_bounds__(limits::kMaxThreads, min_blocks<In, vectors, 1>)
    registers_forward_kernel(In input, Out output, int64_t rows, int dim, bool vectorized) {
  using A = computed_t<typename In::Element>;
  constexpr int kElements = vectors * In::kWidth;
  const Lanes lanes = row_lanes(vectorized);
  for_each_row(rows, [&](int64_t row, bool exists) {
    const int size = exists ? dim : 0;
    A x[kElements];
    load_tile<vectors>(input.from(row * dim), lanes, size, Max::identity<A>(), x);

    A max = x[0];
#pragma unroll
    for (int e = 1; e < kElements; ++e) max = max_of(max, x[e]);
    max = group_reduce<Max>(max);

    A sum = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const A exponential = exp_of(x[e] - max);
      sum += exponential;
      if constexpr (op == Op::kSoftmax) x[e] = exponential;
    }
    const Forward<op, A> formula(max, group_reduce<Sum>(sum));

#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if constexpr (op == Op::kSoftmax) {
        x[e] = formula.of_exp(x[e]);
      } else {
        x[e] = formula.of(x[e]);
      }
    }
    store_tile<vectors, In::kWidth>(output.from(row * dim), lanes, size, x);
  });
}

template <Op op, int vectors, class In, class Out>
__global__ void __launch_bounds__(limits::kMaxThreads, min_blocks<In, vectors, 2>)
    registers_backward_kernel(In grad_output, In output, Out grad_input, int64_t rows, int dim,
                              bool vectorized) {
  using A = computed_t<typename In::Element>;
  constexpr int kElements = vectors * In::kWidth;
  const Lanes lanes = row_lanes(vectorized);
  for_each_row(rows, [&](int64_t row, bool exists) {
    const int size = exists ? dim : 0;
    A grad[kElements];
    A y[kElements];
    load_tile<vectors>(grad_output.from(row * dim), lanes, size, A(0), grad);
    load_tile<vectors>(output.from(row * dim), lanes, size, A(0), y);

    A sum = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum += Backward<op, A>::term(grad[e], y[e]);
    const Backward<op, A> formula{group_reduce<Sum>(sum)};

#pragma unroll
    for (int e = 0; e < kElements; ++e) grad[e] = formula.of(grad[e], y[e]);
    store_tile<vectors, In::kWidth>(grad_input.from(row * dim), lanes, size, grad);
  });
}

// The shared and the streaming schedule. Both go forward over the row for its state and back over
// it for the output: the last tile is then still in registers, and the ones before it the likeliest
// to be in a cache. cached: the way back reads the copy that the way forward left in shared memory,
// where each thread finds its own elements.
template <Op op, bool cached, class In, class Out>
__global__ void __launch_bounds__(limits::kMaxThreads, 1)
    streaming_forward_kernel(In input, Out output, int64_t rows, int64_t dim, bool vectorized) {
  using T = typename In::Element;
  using A = computed_t<T>;
  using Index = std::conditional_t<cached, int, int64_t>;
  constexpr int kVectors = streaming_vectors<In, 1>;
  constexpr int kElements = kVectors * In::kWidth;
  SOFTMAX_EXT_DYNAMIC_SHARED(T, cache);
  const Lanes lanes = row_lanes(vectorized);
  const int step = lanes.group * kElements;
  for_each_row(rows, [&](int64_t row, bool exists) {
    const Index size = exists ? static_cast<Index>(dim) : 0;
    const Index last = last_step(size, step);
    A x[kElements];
    const auto load = [&](const auto& from, Index first) {
      load_tile<kVectors>(from, lanes, tile_size(size - first, step), Max::identity<A>(), x);
    };

    auto state = OnlineState<A>::empty();
#pragma unroll 1
    for (Index first = 0; first <= last; first += step) {
      load(input.from(row * dim + first), first);
      if constexpr (cached) {
        store_tile<kVectors, In::kWidth>(Output<T, false>{cache + first}, lanes,
                                         tile_size(size - first, step), x);
      }
      accumulate<kElements, 1>(state, x);
    }
    const A max = group_reduce<Max>(state.max);
    const A sum = group_reduce<Sum>(state.sum * exp_of_difference(state.max, max));
    const Forward<op, A> formula(max, sum);

#pragma unroll 1
    for (Index first = last; first >= 0; first -= step) {
      if (first != last) {
        if constexpr (cached) {
          load(Input<T>{cache + first}, first);
        } else {
          load(input.from(row * dim + first), first);
        }
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) x[e] = formula.of(x[e]);
      store_tile<kVectors, In::kWidth>(output.from(row * dim + first), lanes,
                                       tile_size(size - first, step), x);
    }
  });
}

template <Op op, bool cached, class In, class Out>
__global__ void __launch_bounds__(limits::kMaxThreads, 1)
    streaming_backward_kernel(In grad_output, In output, Out grad_input, int64_t rows, int64_t dim,
                              bool vectorized) {
  using T = typename In::Element;
  using A = computed_t<T>;
  using Index = std::conditional_t<cached, int, int64_t>;
  constexpr int kVectors = streaming_vectors<In, 2>;
  constexpr int kElements = kVectors * In::kWidth;
  SOFTMAX_EXT_DYNAMIC_SHARED(T, cached_grad);
  T* const cached_y = cached_grad + (dim + In::kWidth - 1) / In::kWidth * In::kWidth;
  const Lanes lanes = row_lanes(vectorized);
  const int step = lanes.group * kElements;
  for_each_row(rows, [&](int64_t row, bool exists) {
    const Index size = exists ? static_cast<Index>(dim) : 0;
    const Index last = last_step(size, step);
    A grad[kElements];
    A y[kElements];
    const auto load = [&](const In& grad_from, const In& y_from, Index first) {
      const int left = tile_size(size - first, step);
      load_tile<kVectors>(grad_from, lanes, left, A(0), grad);
      load_tile<kVectors>(y_from, lanes, left, A(0), y);
    };

    A sum = 0;
#pragma unroll 1
    for (Index first = 0; first <= last; first += step) {
      load(grad_output.from(row * dim + first), output.from(row * dim + first), first);
      if constexpr (cached) {
        const int left = tile_size(size - first, step);
        store_tile<kVectors, In::kWidth>(Output<T, false>{cached_grad + first}, lanes, left, grad);
        store_tile<kVectors, In::kWidth>(Output<T, false>{cached_y + first}, lanes, left, y);
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum += Backward<op, A>::term(grad[e], y[e]);
    }
    const Backward<op, A> formula{group_reduce<Sum>(sum)};

#pragma unroll 1
    for (Index first = last; first >= 0; first -= step) {
      if (first != last) {
        if constexpr (cached) {
          load(In{cached_grad + first}, In{cached_y + first}, first);
        } else {
          load(grad_output.from(row * dim + first), output.from(row * dim + first), first);
        }
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) grad[e] = formula.of(grad[e], y[e]);
      store_tile<kVectors, In::kWidth>(grad_input.from(row * dim + first), lanes,
                                       tile_size(size - first, step), grad);
    }
  });
}

}  // namespace softmax_ext::cuda
