// The schedule for inner sizes above 1. A block has blockDim.z items, each of blockDim.x * width
// columns side by side of one outer index; blockDim.y threads share a column (a row of softmax).
// Any dim: each element is read once where blockDim.y threads hold all of dim, else twice, the
// second time from the end on, and written once. A thread reads each element before it writes it,
// and no other thread touches that element, so the memory written may be that of an input.
#pragma once

#include "device.cuh"

namespace softmax_ext::cuda {

// The columns of one thread and the steps that it goes along dim: `depth` elements of each column,
// blockDim.y apart, at a time.
struct Columns {
  Lanes lanes;
  int size;        // columns of the item; 0 for an item that does not exist
  int64_t offset;  // of its first column
  int64_t inner;
  int64_t dim;
};

template <int depth, class In, class A>
__device__ __forceinline__ void load_columns(const In& input, const Columns& at, int64_t d, A fill,
                                             A* x) {
#pragma unroll
  for (int k = 0; k < depth; ++k) {
    const int64_t row = d + k * static_cast<int>(blockDim.y) + threadIdx.y;
    load_tile<1>(input.from(at.offset + row * at.inner), at.lanes, row < at.dim ? at.size : 0, fill,
                 x + k * In::kWidth);
  }
}

template <int depth, int width, class Out, class A>
__device__ __forceinline__ void store_columns(const Out& output, const Columns& at, int64_t d,
                                              const A* x) {
#pragma unroll
  for (int k = 0; k < depth; ++k) {
    const int64_t row = d + k * static_cast<int>(blockDim.y) + threadIdx.y;
    store_tile<1, width>(output.from(at.offset + row * at.inner), at.lanes,
                         row < at.dim ? at.size : 0, x + k * width);
  }
}

// Calls body(columns) until every item has been had. Threads without an item come along, for the
// barriers in body.
template <int width, class Body>
__device__ __forceinline__ void for_each_item(Shape shape, bool vectorized, Body body) {
  const Lanes lanes{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), vectorized};
  const int across = static_cast<int>(blockDim.x) * width;
  const int64_t items_of_one = (shape.inner + across - 1) / across;
  const int64_t items = shape.outer * items_of_one;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.z;
#pragma unroll 1
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.z; begin < items;
       begin += stride) {
    const int64_t item = begin + threadIdx.z;
    const int64_t outer = item / items_of_one;
    const int64_t first = (item - outer * items_of_one) * across;
    body(Columns{lanes, item < items ? tile_size(shape.inner - first, across) : 0,
                 outer * shape.dim * shape.inner + first, shape.inner, shape.dim});
  }
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kStridedThreads,
                                  sizeof(computed_t<typename In::Element>) == 4 ? 2 : 1)
    strided_forward_kernel(In input, Out output, Shape shape, bool vectorized) {
  using A = computed_t<typename In::Element>;
  constexpr int kWidth = In::kWidth;
  constexpr int kDepth = strided_vectors<In, 1>;
  SOFTMAX_EXT_DYNAMIC_SHARED(A, buffer);
  const int64_t step = kDepth * static_cast<int>(blockDim.y);
  const int64_t last = (shape.dim - 1) / step * step;
  for_each_item<kWidth>(shape, vectorized, [&](const Columns& columns) {
    A x[kDepth * kWidth];
    OnlineState<A> states[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) states[v] = OnlineState<A>::empty();
#pragma unroll 1
    for (int64_t d = 0; d <= last; d += step) {
      load_columns<kDepth>(input, columns, d, Max::identity<A>(), x);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) accumulate<kDepth, kWidth>(states[v], x + v);
    }

    A max[kWidth];
    A sum[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) max[v] = states[v].max;
    across_reduce<Max>(max, buffer);
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      sum[v] = states[v].sum * exp_of_difference(states[v].max, max[v]);
    }
    across_reduce<Sum>(sum, buffer);
    Forward<op, A> formulas[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) formulas[v] = Forward<op, A>(max[v], sum[v]);

#pragma unroll 1
    for (int64_t d = last; d >= 0; d -= step) {
      if (d != last) load_columns<kDepth>(input, columns, d, Max::identity<A>(), x);
#pragma unroll
      for (int e = 0; e < kDepth * kWidth; ++e) x[e] = formulas[e % kWidth].of(x[e]);
      store_columns<kDepth, kWidth>(output, columns, d, x);
    }
  });
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kStridedThreads,
                                  sizeof(computed_t<typename In::Element>) == 4 ? 2 : 1)
    strided_backward_kernel(In grad_output, In output, Out grad_input, Shape shape,
                            bool vectorized) {
  using A = computed_t<typename In::Element>;
  constexpr int kWidth = In::kWidth;
  constexpr int kDepth = strided_vectors<In, 2>;
  SOFTMAX_EXT_DYNAMIC_SHARED(A, buffer);
  const int64_t step = kDepth * static_cast<int>(blockDim.y);
  const int64_t last = (shape.dim - 1) / step * step;
  for_each_item<kWidth>(shape, vectorized, [&](const Columns& columns) {
    A grad[kDepth * kWidth];
    A y[kDepth * kWidth];
    const auto load = [&](int64_t d) {
      load_columns<kDepth>(grad_output, columns, d, A(0), grad);
      load_columns<kDepth>(output, columns, d, A(0), y);
    };

    A sum[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) sum[v] = 0;
#pragma unroll 1
    for (int64_t d = 0; d <= last; d += step) {
      load(d);
#pragma unroll
      for (int e = 0; e < kDepth * kWidth; ++e) {
        sum[e % kWidth] += Backward<op, A>::term(grad[e], y[e]);
      }
    }
    across_reduce<Sum>(sum, buffer);

#pragma unroll 1
    for (int64_t d = last; d >= 0; d -= step) {
      if (d != last) load(d);
#pragma unroll
      for (int e = 0; e < kDepth * kWidth; ++e) {
        grad[e] = Backward<op, A>{sum[e % kWidth]}.of(grad[e], y[e]);
      }
      store_columns<kDepth, kWidth>(grad_input, columns, d, grad);
    }
  });
}

}  // namespace softmax_ext::cuda
