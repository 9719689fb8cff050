// What the kernels are made of: element types, vectors of 16 bytes, the part of a row that a warp has
// in registers, and the tree that a row is reduced in.
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

// What is computed before the result is rounded to Out.
template <Op op, class Out>
struct PrecisionOf {
  using type = Full<computed_t<Out>>;
};
template <Op op>
struct PrecisionOf<op, __half> {
  using type = Rounded<0>;
};
template <>
struct PrecisionOf<Op::kSoftmax, __nv_bfloat16> {
  using type = Rounded<24>;
};
template <>
struct PrecisionOf<Op::kLogSoftmax, __nv_bfloat16> {
  using type = Rounded<0>;
};

template <Op op, class A, class Out>
using forward_t = Forward<op, A, typename PrecisionOf<op, Out>::type>;
// The exponential in a gradient; bfloat16 has the range of float32.
template <Op op, class A, class Out>
using backward_t = Backward<op, A,
                            std::conditional_t<std::is_same_v<Out, __nv_bfloat16>, Rounded<24>,
                                               typename PrecisionOf<op, Out>::type>>;

// --- Vectors -------------------------------------------------------------------------------------

// 16 or 8 bytes, which one access reads or writes.
template <int words>
struct Words {
  uint32_t word[words];
};
using Vector = Words<4>;

template <class T>
constexpr int kWidth = limits::kVectorBytes / static_cast<int>(sizeof(T));

// Vectors of a lane, and elements of a row, in a chunk: what a warp has in registers.
template <class T>
constexpr int kChunkVectors = chunk_vectors(sizeof(T));
template <class T>
constexpr int kChunk = kChunkVectors<T> * limits::kWarp * kWidth<T>;

template <int words>
using word_t = std::conditional_t<words == 4, uint4, uint2>;

template <int words>
__device__ __forceinline__ Words<words> load_words(const void* from) {
  const auto loaded = load_word<word_t<words>>(from);
  Words<words> result;
  memcpy(&result, &loaded, sizeof(result));
  return result;
}

template <bool global, int words>
__device__ __forceinline__ void store_words(void* to, const Words<words>& x) {
  word_t<words> word;
  memcpy(&word, &x, sizeof(word));
  store_word<global>(to, word);
}

// Of two equal numbers of elements.
template <class T, class Bits>
__device__ __forceinline__ Bits max_of_elements(const Bits& a, const Bits& b) {
  constexpr int kCount = static_cast<int>(sizeof(Bits) / sizeof(T));
  T from_a[kCount];
  T from_b[kCount];
  memcpy(from_a, &a, sizeof(a));
  memcpy(from_b, &b, sizeof(b));
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    from_a[v] = ToElement<T>::of(
        max_of(from_element<computed_t<T>>(from_a[v]), from_element<computed_t<T>>(from_b[v])));
  }
  Bits max;
  memcpy(&max, from_a, sizeof(max));
  return max;
}

template <class T, class A>
__device__ __forceinline__ Vector filled(A value) {
  T data[kWidth<T>];
#pragma unroll
  for (int v = 0; v < kWidth<T>; ++v) data[v] = ToElement<T>::of(value);
  Vector vector;
  memcpy(&vector, data, sizeof(vector));
  return vector;
}

template <class T, class A>
__device__ __forceinline__ void unpack(const Vector& vector, A (&x)[kWidth<T>]) {
  T data[kWidth<T>];
  memcpy(data, &vector, sizeof(data));
#pragma unroll
  for (int v = 0; v < kWidth<T>; ++v) x[v] = from_element<A>(data[v]);
}

// Element by element, two at a time where they are of 16 bits; the other one where one is NaN.
__device__ __forceinline__ uint32_t max_of_pair(__half*, uint32_t a, uint32_t b) {
  uint32_t max;
  SOFTMAX_EXT_PTX(max = max_of_elements<__half>(a, b), asm("max.f16x2 %0, %1, %2;"
                                                           : "=r"(max)
                                                           : "r"(a), "r"(b)));
  return max;
}
__device__ __forceinline__ uint32_t max_of_pair(__nv_bfloat16*, uint32_t a, uint32_t b) {
  uint32_t max;
  SOFTMAX_EXT_PTX(max = max_of_elements<__nv_bfloat16>(a, b), asm("max.bf16x2 %0, %1, %2;"
                                                                  : "=r"(max)
                                                                  : "r"(a), "r"(b)));
  return max;
}

template <class T>
__device__ __forceinline__ Vector max_of_vectors(const Vector& a, const Vector& b) {
  if constexpr (sizeof(T) == 2) {
    Vector max;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      max.word[w] = max_of_pair(static_cast<T*>(nullptr), a.word[w], b.word[w]);
    }
    return max;
  } else {
    return max_of_elements<T>(a, b);
  }
}

// Bytes `shift` and on of `low` with `high` behind it; shift is a multiple of `step` in [0, size).
template <int step, int words>
__device__ __forceinline__ Words<words> shifted(const Words<words>& low, const Words<words>& high,
                                                int shift) {
  uint32_t both[2 * words];
#pragma unroll
  for (int w = 0; w < words; ++w) {
    both[w] = low.word[w];
    both[words + w] = high.word[w];
  }
  // By halves of what is left, so that every index is known to the compiler.
  if constexpr (words == 4) {
#pragma unroll
    for (int w = 0; w < 6; ++w) both[w] = (shift & 8) != 0 ? both[w + 2] : both[w];
  }
  if constexpr (step <= 4) {
#pragma unroll
    for (int w = 0; w <= words; ++w) both[w] = (shift & 4) != 0 ? both[w + 1] : both[w];
  }
  Words<words> result;
#pragma unroll
  for (int w = 0; w < words; ++w) {
    result.word[w] =
        step < 4 ? __funnelshift_r(both[w], both[w + 1], static_cast<unsigned>(shift & 3) * 8)
                 : both[w];
  }
  return result;
}

__device__ __forceinline__ int misalignment(const void* pointer, int bytes) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(bytes));
}

// --- A part of a row in registers ----------------------------------------------------------------

// Its size, and the thread's place among those that have it: vectors lane, lane + 32, ... Fewer than 32
// threads have one vector each.
struct Part {
  int lane;
  int size;  // elements; 0 for a row that does not exist
};

// The neighbour's vector number k, of vectors that lie side by side over the lanes of a warp and go on
// in the first (last) lane with number k + 1 (k - 1), which is `beyond`.
template <int words>
__device__ __forceinline__ Words<words> from_next_lane(const Words<words>& own,
                                                       const Words<words>& beyond, int lane) {
  Words<words> result;
#pragma unroll
  for (int w = 0; w < words; ++w) {
    const uint32_t value = lane == 0 ? beyond.word[w] : own.word[w];
    result.word[w] = __shfl_sync(0xffffffffu, value, lane + 1);
  }
  return result;
}
template <int words>
__device__ __forceinline__ Words<words> from_previous_lane(const Words<words>& own,
                                                           const Words<words>& beyond, int lane) {
  Words<words> result;
#pragma unroll
  for (int w = 0; w < words; ++w) {
    const uint32_t value = lane == limits::kWarp - 1 ? beyond.word[w] : own.word[w];
    result.word[w] = __shfl_sync(0xffffffffu, value, lane + limits::kWarp - 1);
  }
  return result;
}

// x gets the part's vectors, whatever the alignment of `from`, and `fill` behind its end. Memory is
// read by 16 bytes, only within the part: at its ends by elements. Of a part that is not aligned,
// which takes a whole warp, the aligned vectors are read and shifted.
template <class T, int vectors, class A>
__device__ __forceinline__ void load_part(const T* from, Part part, A fill, Vector (&x)[vectors]) {
  constexpr int kBytes = limits::kVectorBytes;
  constexpr int kSize = static_cast<int>(sizeof(T));
  const int shift = misalignment(from, kBytes);
  const char* const begin = reinterpret_cast<const char*>(from) - shift;
  const int end = shift + part.size * kSize;  // bytes from `begin`
  const int last = end / kBytes;              // the vector that is not whole, if there is one
  const Vector beyond = filled<T>(fill);

  // Of a vector that is not whole, the elements of the part.
  const auto load_end = [&](int vector) {
    T data[kWidth<T>];
    memcpy(data, &beyond, sizeof(data));
#pragma unroll
    for (int v = 0; v < kWidth<T>; ++v) {
      const int byte = vector * kBytes + v * kSize;
      if (byte >= shift && byte < end) data[v] = *reinterpret_cast<const T*>(begin + byte);
    }
    Vector result;
    memcpy(&result, data, sizeof(result));
    return result;
  };
  Vector ending = beyond;
  if (end % kBytes != 0) ending = load_end(last);
  const auto load = [&](int vector) {
    Vector result = vector == last ? ending : beyond;
    if (vector < last) result = load_words<4>(begin + int64_t{vector} * kBytes);
    return result;
  };

  if (shift == 0) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) x[k] = load(k * limits::kWarp + part.lane);
    return;
  }
  x[0] = part.lane == 0 ? load_end(0) : load(part.lane);
#pragma unroll
  for (int k = 1; k < vectors; ++k) x[k] = load(k * limits::kWarp + part.lane);
  const Vector behind = load(vectors * limits::kWarp + part.lane);
#pragma unroll
  for (int k = 0; k < vectors; ++k) {
    x[k] = shifted<kSize>(
        x[k], from_next_lane(x[k], k + 1 < vectors ? x[k + 1] : behind, part.lane), shift);
  }
}

// x is another value now, as far as the compiler knows: it would keep what it has made of x already,
// which may take more registers than x.
__device__ __forceinline__ void forget(Vector& x) {
  SOFTMAX_EXT_PTX(
      (void)x, asm volatile(""
                            : "+r"(x.word[0]), "+r"(x.word[1]), "+r"(x.word[2]), "+r"(x.word[3])));
}

__device__ __forceinline__ void forget(int64_t& x) {
  SOFTMAX_EXT_PTX((void)x, asm volatile("" : "+l"(x)));
}

// Writes a part, vector by vector in the order of load_part, from `width` values each. Only elements
// of the part are written: by 16 bytes (8, where a vector has become half as large), at its ends by
// elements. All lanes of the warp come along, since any of them may have read what one writes.
template <class T, int width>
class PartWriter {
 public:
  __device__ __forceinline__ PartWriter(T* to, Part part)
      : part_(part),
        shift_(misalignment(to, kBytes)),
        begin_(reinterpret_cast<char*>(to) - shift_),
        end_(shift_ + part.size * kSize),
        last_(end_ / kBytes) {
    __syncwarp();
  }

  template <class A>
  __device__ __forceinline__ void put(int k, const A (&x)[width]) {
    T data[width];
#pragma unroll
    for (int v = 0; v < width; ++v) data[v] = ToElement<T>::of(x[v]);
    Words<kWords> pieces[kPieces];
    memcpy(pieces, data, sizeof(pieces));
    const int first = (k * limits::kWarp + part_.lane) * kPieces;
    put_ = k + 1;
    if (shift_ == 0) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) put_piece(first + p, pieces[p]);
      return;
    }
    Words<kWords> before = from_previous_lane(pieces[kPieces - 1], previous_, part_.lane);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const auto piece = shifted<kSize>(before, pieces[p], kBytes - shift_);
      if (k == 0 && p == 0 && part_.lane == 0) {
        put_elements(0, piece);
      } else {
        put_piece(first + p, piece);
      }
      before = pieces[p];
    }
    previous_ = pieces[kPieces - 1];
  }

  // After the last vector: what is left of the part.
  __device__ __forceinline__ void finish() {
    if (shift_ != 0) {
      const auto piece = from_previous_lane(previous_, previous_, part_.lane);
      if (part_.lane == 0) {
        put_piece(put_ * limits::kWarp * kPieces, shifted<kSize>(piece, piece, kBytes - shift_));
      }
    }
    if (has_last_) put_elements(last_, ending_);
  }

 private:
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kBytes = std::min(limits::kVectorBytes, width* kSize);
  static constexpr int kWords = kBytes / 4;
  static constexpr int kPieces = width * kSize / kBytes;  // of a vector

  __device__ __forceinline__ void put_piece(int piece, const Words<kWords>& x) {
    if (piece < last_) store_words<true>(begin_ + int64_t{piece} * kBytes, x);
    if (piece == last_) {
      has_last_ = true;
      ending_ = x;
    }
  }

  __device__ __forceinline__ void put_elements(int piece, const Words<kWords>& x) const {
    T data[kBytes / kSize];
    memcpy(data, &x, sizeof(data));
#pragma unroll
    for (int v = 0; v < kBytes / kSize; ++v) {
      const int byte = piece * kBytes + v * kSize;
      if (byte >= shift_ && byte < end_) *reinterpret_cast<T*>(begin_ + byte) = data[v];
    }
  }

  Part part_;
  int shift_;
  char* begin_;
  int end_;      // bytes from begin_
  int last_;     // the piece that is not whole, if there is one
  int put_ = 0;  // vectors so far
  bool has_last_ = false;
  Words<kWords> previous_{};
  Words<kWords> ending_{};
};

// --- The tree ------------------------------------------------------------------------------------

struct Max {
  template <class A>
  static __device__ __forceinline__ A of(A a, A b) {
    return max_of(a, b);
  }
};

struct Sum {
  template <class A>
  static __device__ __forceinline__ A of(A a, A b) {
    return add_of(a, b);
  }
};

// Over the lanes of a warp that differ in the bits below `group`, a power of two. All 32 take part
// and get the same bits; that of lanes that add nothing is the same for every group.
template <class Reduction, class A>
__device__ __forceinline__ A warp_reduce(A value, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) {
    value = Reduction::of(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// The state of a chunk, or of a row, in a backward pass.
template <class A>
struct SumState {
  A sum;
};

template <class State>
constexpr bool kHasMax = std::is_same_v<State, OnlineState<decltype(State::sum)>>;

// What another block has written, after the threads have met.
template <class A>
__device__ __forceinline__ OnlineState<A> load_fresh(const OnlineState<A>* from) {
  return {__ldcg(&from->max), __ldcg(&from->sum)};
}
template <class A>
__device__ __forceinline__ SumState<A> load_fresh(const SumState<A>* from) {
  return {__ldcg(&from->sum)};
}

// What a chunk adds to the sum of a row whose largest element is `max`.
template <class A>
__device__ __forceinline__ A term_of(OnlineState<A> chunk, A max) {
  return mul_of(chunk.sum, exp_of_difference(chunk.max, max));
}
template <class A>
__device__ __forceinline__ A term_of(SumState<A> chunk, A) {
  return chunk.sum;
}

template <class A>
__device__ __forceinline__ void raise_max(A& max, OnlineState<A> chunk) {
  max = max_of(max, chunk.max);
}
template <class A>
__device__ __forceinline__ void raise_max(A&, SumState<A>) {}

template <class A>
__device__ __forceinline__ void set_state(OnlineState<A>& state, A max, A sum) {
  state = {max, sum};
}
template <class A>
__device__ __forceinline__ void set_state(SumState<A>& state, A, A sum) {
  state = {sum};
}

// The row's state from those of its chunks, load(chunk), by a warp.
template <class State, class Load>
__device__ __forceinline__ State combine_chunks(int chunks, int lane, Load load) {
  using A = decltype(State::sum);
  A max = -static_cast<A>(INFINITY);
#pragma unroll 1
  for (int chunk = lane; chunk < chunks; chunk += limits::kWarp) raise_max(max, load(chunk));
  if constexpr (kHasMax<State>) max = warp_reduce<Max>(max, limits::kWarp);
  A sum = 0;
#pragma unroll 1
  for (int chunk = lane; chunk < chunks; chunk += limits::kWarp) {
    sum = add_of(sum, term_of(load(chunk), max));
  }
  State state;
  set_state(state, max, warp_reduce<Sum>(sum, limits::kWarp));
  return state;
}

// The same to the bit, by all threads of a block, whose number is a multiple of the warp's; `memory`
// has room for limits::kGridTerms numbers. Only the additions are one after another.
template <class State, class Load>
__device__ __forceinline__ State combine_chunks_of_grid(int chunks, decltype(State::sum)* memory,
                                                        Load load) {
  using A = decltype(State::sum);
  SOFTMAX_EXT_STATIC_SHARED(A, warps, limits::kMostWarps);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  A max = -static_cast<A>(INFINITY);
  if constexpr (kHasMax<State>) {
#pragma unroll 4
    for (int chunk = thread; chunk < chunks; chunk += threads) raise_max(max, load(chunk));
    max = warp_reduce<Max>(max, limits::kWarp);
    if (thread % limits::kWarp == 0) warps[thread / limits::kWarp] = max;
    __syncthreads();
    for (int warp = 0; warp < threads / limits::kWarp; ++warp) max = max_of(max, warps[warp]);
  }
  A sum = 0;
#pragma unroll 1
  for (int first = 0; first < chunks; first += limits::kGridTerms) {
    const int count = min(chunks - first, limits::kGridTerms);
#pragma unroll 4
    for (int i = thread; i < count; i += threads) memory[i] = term_of(load(first + i), max);
    __syncthreads();
    if (thread < limits::kWarp) {
#pragma unroll 8
      for (int i = thread; i < count; i += limits::kWarp) sum = add_of(sum, memory[i]);
    }
    __syncthreads();
  }
  if (thread < limits::kWarp) {
    sum = warp_reduce<Sum>(sum, limits::kWarp);
    if (thread == 0) memory[0] = sum;
  }
  __syncthreads();
  State state;
  set_state(state, max, memory[0]);
  __syncthreads();  // before memory is written again
  return state;
}

template <class A, int width>
__device__ __forceinline__ A max_in(const A (&x)[width]) {
  A max = x[0];
#pragma unroll
  for (int v = 1; v < width; ++v) max = max_of(max, x[v]);
  return max;
}

// The tree's leaves: neighbours that fill a vector.
template <class A, int width>
__device__ __forceinline__ A sum_of(const A (&terms)[width]) {
  A sum = terms[0];
#pragma unroll
  for (int v = 1; v < width; ++v) sum = add_of(sum, terms[v]);
  return sum;
}

}  // namespace softmax_ext::cuda
