// What the kernels are made of: element types, tensors that are read and written, tiles of a row,
// and reductions over the threads that share one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "softmax_ext/formula.h"
#include "softmax_ext/online_state.h"
#include "softmax_ext/plan.h"
#include "softmax_ext/portability.h"

namespace softmax_ext::cuda {

// --- Element types -------------------------------------------------------------------------------

// The type that is computed in.
template <class T>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};
template <class T>
using computed_t = typename Computed<T>::type;

// By intrinsics only: PyTorch's build switches the half types' operators and conversions off.
template <class A, class T>
__device__ __forceinline__ A from_element(T x) {
  return static_cast<A>(x);
}
template <class A>
__device__ __forceinline__ A from_element(__half x) {
  return __half2float(x);
}
template <class A>
__device__ __forceinline__ A from_element(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Rounds once, to nearest even.
template <class T>
struct ToElement {
  template <class A>
  static __device__ __forceinline__ T of(A x) {
    return static_cast<T>(x);
  }
};
template <>
struct ToElement<__half> {
  static __device__ __forceinline__ __half of(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ __half of(double x) { return __double2half(x); }
};
template <>
struct ToElement<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 of(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ __nv_bfloat16 of(double x) { return __double2bfloat16(x); }
};

// --- Tensors -------------------------------------------------------------------------------------

// Elements side by side in memory, read and written by accesses of 16 bytes, or of 8 where there
// are no more.
template <class T, int width>
struct Vector {
  using Word = std::conditional_t<sizeof(T) * width % sizeof(uint4) == 0, uint4, uint2>;
  static constexpr int kWords = static_cast<int>(sizeof(T) * width / sizeof(Word));
  static_assert(kWords * sizeof(Word) == sizeof(T) * width);
  T data[width];

  static __device__ __forceinline__ Vector load(const T* from) {
    Word words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      words[w] = load_word<Word>(reinterpret_cast<const Word*>(from) + w);
    Vector vector;
    memcpy(vector.data, words, sizeof(words));
    return vector;
  }

  template <bool global>
  __device__ __forceinline__ void store(T* to) const {
    Word words[kWords];
    memcpy(words, data, sizeof(words));
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      store_word<global>(reinterpret_cast<Word*>(to) + w, words[w]);
    }
  }
};

// Elements from an offset on, which are read.
template <class T>
struct Input {
  using Element = T;
  static constexpr int kWidth = limits::kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr bool kVectors = true;
  const T* data;

  __device__ __forceinline__ Input from(int64_t offset) const { return {data + offset}; }

  template <class A>
  __device__ __forceinline__ A load(int i) const {
    return from_element<A>(data[i]);
  }
  __device__ __forceinline__ Vector<T, kWidth> load_vector(int i) const {
    return Vector<T, kWidth>::load(data + i);
  }
};

// Elements of a type that only the call knows, each cast to T first.
template <class T>
struct CastInput {
  using Element = T;
  static constexpr int kWidth = 1;
  static constexpr bool kVectors = false;
  const void* data;
  DType dtype;
  int64_t offset;

  __device__ __forceinline__ CastInput from(int64_t more) const {
    return {data, dtype, offset + more};
  }

  template <class A>
  __device__ __forceinline__ A load(int i) const {
    return from_element<A>(ToElement<T>::of(element<A>(offset + i)));
  }

 private:
  template <class A>
  __device__ __forceinline__ A element(int64_t i) const {
    switch (dtype) {
      case DType::kFloat16:
        return at<A, __half>(i);
      case DType::kBFloat16:
        return at<A, __nv_bfloat16>(i);
      case DType::kFloat32:
        return at<A, float>(i);
      case DType::kFloat64:
        return at<A, double>(i);
      case DType::kBool:
        return at<A, uint8_t>(i) != 0 ? A(1) : A(0);
      case DType::kUInt8:
        return at<A, uint8_t>(i);
      case DType::kInt8:
        return at<A, int8_t>(i);
      case DType::kInt16:
        return at<A, int16_t>(i);
      case DType::kInt32:
        return at<A, int32_t>(i);
      case DType::kInt64:
        return at<A, int64_t>(i);
    }
    return A(0);
  }
  template <class A, class U>
  __device__ __forceinline__ A at(int64_t i) const {
    return from_element<A>(static_cast<const U*>(data)[i]);
  }
};

// Elements from an offset on, which are written; in global or in shared memory.
template <class T, bool global = true>
struct Output {
  static constexpr bool kVectors = true;
  T* data;

  __device__ __forceinline__ Output from(int64_t offset) const { return {data + offset}; }

  template <class A>
  __device__ __forceinline__ void store(int i, A x) const {
    data[i] = ToElement<T>::of(x);
  }
  template <int width, class A>
  __device__ __forceinline__ void store_vector(int i, const A* x) const {
    Vector<T, width> vector;
#pragma unroll
    for (int v = 0; v < width; ++v) vector.data[v] = ToElement<T>::of(x[v]);
    vector.template store<global>(data + i);
  }
};

// Elements of a floating type that only the call knows.
struct CastOutput {
  static constexpr bool kVectors = false;
  void* data;
  DType dtype;
  int64_t offset;

  __device__ __forceinline__ CastOutput from(int64_t more) const {
    return {data, dtype, offset + more};
  }

  template <class A>
  __device__ __forceinline__ void store(int i, A x) const {
    switch (dtype) {
      case DType::kFloat16:
        return put<__half>(offset + i, x);
      case DType::kBFloat16:
        return put<__nv_bfloat16>(offset + i, x);
      case DType::kFloat32:
        return put<float>(offset + i, x);
      default:
        return put<double>(offset + i, x);
    }
  }

 private:
  template <class T, class A>
  __device__ __forceinline__ void put(int64_t i, A x) const {
    static_cast<T*>(data)[i] = ToElement<T>::of(x);
  }
};

// The vectors that a thread holds at a time, as the plan has it; `inputs` tensors are read.
template <class In>
constexpr int words_of_element =
    words_of(sizeof(computed_t<typename In::Element>) == 8 ? DType::kFloat64 : DType::kFloat32);
template <class In, int inputs>
constexpr int registers_vectors =
    vectors_within(limits::kRegistersWords, In::kWidth, words_of_element<In>, inputs);
template <class In, int inputs>
constexpr int streaming_vectors =
    vectors_at_a_time(limits::kStreamingWords, In::kWidth, words_of_element<In>, inputs);
template <class In, int inputs>
constexpr int strided_vectors =
    vectors_at_a_time(limits::kStridedWords, In::kWidth, words_of_element<In>, inputs);

// Blocks of kMaxThreads that an SM has room for at least: 2 leave each thread 64 registers, and 1
// leaves it 128. Stated so that the compiler does not spill to have room for more.
template <class In, int vectors, int inputs>
constexpr int min_blocks =
    sizeof(computed_t<typename In::Element>) == 4 && vectors * In::kWidth * inputs <= 16 ? 2 : 1;

// --- Tiles ---------------------------------------------------------------------------------------

// A tile is what a group of threads takes of a row at a time: `vectors` vectors of `width` elements
// by each. Vectorized, a thread's vectors are `group` vectors apart; otherwise its elements are
// `group` elements apart. Either way the threads' accesses lie side by side.
struct Lanes {
  int lane;
  int group;
  bool vectorized;
};

// Elements of the tile, of `step` elements, of which `left` may be left.
template <class Index>
__device__ __forceinline__ int tile_size(Index left, int step) {
  return left < step ? static_cast<int>(left) : step;
}

// x gets `fill` for elements beyond `size`, which are not touched.
template <int vectors, class In, class A>
__device__ __forceinline__ void load_tile(const In& input, Lanes lanes, int size, A fill, A* x) {
  constexpr int kWidth = In::kWidth;
  if constexpr (In::kVectors) {
    if (lanes.vectorized) {
      // Filled before they are converted: a 16-bit vector in flight has half the registers.
      using T = typename In::Element;
      Vector<T, kWidth> loaded[vectors];
#pragma unroll
      for (int k = 0; k < vectors; ++k) {
        const int i = (k * lanes.group + lanes.lane) * kWidth;
#pragma unroll
        for (int v = 0; v < kWidth; ++v) loaded[k].data[v] = ToElement<T>::of(fill);
        if (i < size) loaded[k] = input.load_vector(i);
      }
#pragma unroll
      for (int e = 0; e < vectors * kWidth; ++e) {
        x[e] = from_element<A>(loaded[e / kWidth].data[e % kWidth]);
      }
      return;
    }
  }
  In at = input.from(lanes.lane);
  int left = size - lanes.lane;
#pragma unroll
  for (int e = 0; e < vectors * kWidth; ++e) {
    x[e] = left > 0 ? at.template load<A>(0) : fill;
    at = at.from(lanes.group);
    left -= lanes.group;
  }
}

template <int vectors, int width, class Out, class A>
__device__ __forceinline__ void store_tile(const Out& output, Lanes lanes, int size, const A* x) {
  if constexpr (Out::kVectors && width > 1) {
    if (lanes.vectorized) {
#pragma unroll
      for (int k = 0; k < vectors; ++k) {
        const int i = (k * lanes.group + lanes.lane) * width;
        if (i < size) output.template store_vector<width>(i, x + k * width);
      }
      return;
    }
  }
  Out at = output.from(lanes.lane);
  int left = size - lanes.lane;
#pragma unroll
  for (int e = 0; e < vectors * width; ++e) {
    if (left > 0) at.store(0, x[e]);
    at = at.from(lanes.group);
    left -= lanes.group;
  }
}

// --- Reductions ----------------------------------------------------------------------------------

struct Max {
  template <class A>
  static __device__ __forceinline__ A identity() {
    return -static_cast<A>(INFINITY);
  }
  template <class A>
  static __device__ __forceinline__ A of(A a, A b) {
    return max_of(a, b);
  }
};

struct Sum {
  template <class A>
  static __device__ __forceinline__ A identity() {
    return A(0);
  }
  template <class A>
  static __device__ __forceinline__ A of(A a, A b) {
    return a + b;
  }
};

// Over the lanes of a warp that differ in the bits below `group`, a power of two. All 32 take part.
template <class Reduction, class A>
__device__ __forceinline__ A warp_reduce(A value, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) {
    value = Reduction::of(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// Over the threads of one threadIdx.y: blockDim.x of them, a power of two within a warp, or whole
// warps, which then are the block. The block's threads all take part and get the same bits.
template <class Reduction, class A>
__device__ __forceinline__ A group_reduce(A value) {
  const int group = static_cast<int>(blockDim.x);
  if (group <= limits::kWarp) return warp_reduce<Reduction>(value, group);
  SOFTMAX_EXT_STATIC_SHARED(A, partials, limits::kMaxThreads / limits::kWarp);
  const int lane = static_cast<int>(threadIdx.x) % limits::kWarp;
  value = warp_reduce<Reduction>(value, limits::kWarp);
  if (lane == 0) partials[threadIdx.x / limits::kWarp] = value;
  __syncthreads();
  value = lane < group / limits::kWarp ? partials[lane] : Reduction::template identity<A>();
  __syncthreads();  // before partials is written again
  return warp_reduce<Reduction>(value, limits::kWarp);
}

// Over the threads of one threadIdx.x and z, blockDim.y of them, a power of two: each of `width`
// values. `buffer` has room for those of all threads. The block's threads all take part.
template <class Reduction, int width, class A>
__device__ __forceinline__ void across_reduce(A (&values)[width], A* buffer) {
  const int y = static_cast<int>(threadIdx.y);
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const int thread =
      static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
#pragma unroll
  for (int v = 0; v < width; ++v) buffer[v * threads + thread] = values[v];
  for (int step = static_cast<int>(blockDim.y) / 2; step > 0; step /= 2) {
    __syncthreads();
    if (y < step) {
      const int other = thread + step * static_cast<int>(blockDim.x);
#pragma unroll
      for (int v = 0; v < width; ++v) {
        values[v] = Reduction::of(values[v], buffer[v * threads + other]);
        buffer[v * threads + thread] = values[v];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < width; ++v) {
    values[v] = buffer[v * threads + thread - y * static_cast<int>(blockDim.x)];
  }
  __syncthreads();  // before buffer is written again
}

// --- Running states ------------------------------------------------------------------------------

// Adds elements to a state, which is rescaled once for all of them.
template <int count, int stride, class A>
__device__ __forceinline__ void accumulate(OnlineState<A>& state, const A* x) {
  A max = state.max;
#pragma unroll
  for (int i = 0; i < count; ++i) max = max_of(max, x[i * stride]);
  // All -inf so far: they count nothing, where exp(-inf - max) would be NaN.
  const A shift = max == -static_cast<A>(INFINITY) ? A(0) : max;
  A sum = state.sum * exp_of(state.max - shift);
#pragma unroll
  for (int i = 0; i < count; ++i) sum += exp_of(x[i * stride] - shift);
  state = {max, sum};
}

}  // namespace softmax_ext::cuda
