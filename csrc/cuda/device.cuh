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

// Of which types there are kernels, and whether of each for log_softmax and of casts of bfloat16 too.
// Those left out have the accesses to memory of others: the host executor's sanitizers look at no more.
#if defined(SOFTMAX_EXT_SIMT_TYPES)
template <class T, class... Types>
constexpr bool is_one_of = (std::is_same_v<T, Types> || ...);
template <class T>
constexpr bool is_compiled = is_one_of<T, SOFTMAX_EXT_SIMT_TYPES>;
constexpr bool kAllValues = false;
#else
template <class T>
constexpr bool is_compiled = true;
constexpr bool kAllValues = true;
#endif

// launch(element) with one of the type.
template <class Launch>
cudaError_t with_type(DType dtype, Launch launch) {
  const auto of = [&]([[maybe_unused]] auto element) {
    if constexpr (is_compiled<decltype(element)>) {
      return launch(element);
    } else {
      return cudaErrorInvalidValue;
    }
  };
  switch (dtype) {
    case DType::kFloat16:
      return of(__half{});
    case DType::kBFloat16:
      return of(__nv_bfloat16{});
    case DType::kFloat32:
      return of(float{});
    case DType::kFloat64:
      return of(double{});
    default:
      return cudaErrorInvalidValue;
  }
}

// exp takes many instructions: it is worth more to take it once than to save a meeting, or a store to
// shared memory.
template <class T>
constexpr bool kDearExp = sizeof(T) == 8;

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
template <Op op, class Out>
using gradient_precision_t = std::conditional_t<std::is_same_v<Out, __nv_bfloat16>, Rounded<24>,
                                                typename PrecisionOf<op, Out>::type>;
template <Op op, class A, class Out>
using backward_t = Backward<op, A, gradient_precision_t<op, Out>>;

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
#pragma unroll
  for (int half = words / 2; half > 0 && 4 * half >= step; half /= 2) {
#pragma unroll
    for (int w = 0; w < words + half; ++w) {
      both[w] = (shift & (4 * half)) != 0 ? both[w + half] : both[w];
    }
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

// The next lane's vector number k, of vectors that lie side by side over the lanes of a warp and go
// on in the first lane with number k + 1, which is `beyond`.
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

__device__ __forceinline__ int misalignment(const void* pointer, int bytes) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(bytes));
}

// --- A part of a row in registers ----------------------------------------------------------------

// Elements side by side, all that a row has or a chunk. A lane has vectors lane, lane + 32, ...
//
// Its vectors are those of the memory that is written, so that they are written as they are: the
// first has `lead` elements in front of the part, and of a part that fills its vectors as many of the
// last elements are in the vector behind them.
struct Part {
  int lane;
  int size;    // elements; 0 for a row that does not exist
  int left;    // elements of the row from the part on, or more than the part's vector behind takes
  bool first;  // of the row
  int lead;

  // Counted from the beginning of the first vector: where the row begins, of what is there, and ends.
  __device__ __forceinline__ int begin() const { return first ? lead : 0; }
  __device__ __forceinline__ int end() const { return lead + left; }
  // Whether the row ends in these vectors, or in the one behind them.
  template <int width>
  __device__ __forceinline__ bool ends() const {
    return left < size + width;
  }
  // The elements of the row's last part that its vectors, of `room` elements, have no room for.
  __device__ __forceinline__ int rest(int room) const {
    return left == size ? lead + size - room : 0;
  }
};

// A row of whole vectors in aligned memory. A lane has vectors lane, lane + lanes, ...
struct WholePart {
  int lane;
  int lanes;  // that share it, a power of two
  int size;
};

// The lead of a row written to `to`, in vectors of `width` elements: where there is a choice, since a
// vector is written in two pieces, that of the row read.
template <int width, class In, class Out>
__device__ __forceinline__ int lead_of(const In* from, const Out* to) {
  constexpr int kOfPiece = limits::kVectorBytes / static_cast<int>(sizeof(Out));
  constexpr int kPiece = width < kOfPiece ? width : kOfPiece;
  const int lead = misalignment(to, kPiece * sizeof(Out)) / static_cast<int>(sizeof(Out));
  if constexpr (kPiece < width) {
    const int of_read = misalignment(from, width * sizeof(In)) / static_cast<int>(sizeof(In));
    if (of_read % kPiece == lead) return of_read;
  }
  return lead;
}

// In every lane, what the first lanes of the warp have an element each of.
template <class T>
__device__ __forceinline__ Vector gathered(T element, int lane) {
  Vector result;
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    memcpy(&bits, &element, sizeof(bits));
    const uint32_t next = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits), lane + 1);
    const uint32_t pair = next << 16 | bits;
#pragma unroll
    for (int w = 0; w < 4; ++w) result.word[w] = __shfl_sync(0xffffffffu, pair, 2 * w);
  } else {
    constexpr int kWords = sizeof(T) / 4;
    uint32_t words[kWords];
    memcpy(words, &element, sizeof(words));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      result.word[w] = __shfl_sync(0xffffffffu, words[w % kWords], w / kWords);
    }
  }
  return result;
}

// The other way: element number `lane`, of those that lane `source` has.
template <class T, int width>
__device__ __forceinline__ T scattered(const T (&data)[width], int source, int lane) {
  constexpr int kWords = width * static_cast<int>(sizeof(T)) / 4;
  constexpr int kOwn = sizeof(T) == 8 ? 2 : 1;
  uint32_t words[kWords];
  memcpy(words, data, sizeof(words));
  uint32_t own[kOwn]{};
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint32_t word = __shfl_sync(0xffffffffu, words[w], source);
    if (lane * static_cast<int>(sizeof(T)) / (4 * kOwn) == w / kOwn) own[w % kOwn] = word;
  }
  if (sizeof(T) == 2 && lane % 2 == 1) own[0] >>= 16;
  T element;
  memcpy(&element, own, sizeof(element));
  return element;
}

// x gets the part's vectors, with `fill` where the row has no elements; `behind`, in the first lane,
// the one behind them, if the part is to be summed. Memory is read by 16 bytes, and only within the
// row: a vector that it does not fill is read by elements. What is not aligned as that written is
// shifted.
template <class T, int vectors, class A>
__device__ __forceinline__ void load_part(const T* from, Part part, bool summed, A fill,
                                          Vector (&x)[vectors], Vector& behind) {
  constexpr int kWidth = cuda::kWidth<T>;
  constexpr int kSize = static_cast<int>(sizeof(T));
  const char* const first = reinterpret_cast<const char*>(from) - part.lead * kSize;
  const int shift = misalignment(first, limits::kVectorBytes);
  const T* const base = reinterpret_cast<const T*>(first - shift);
  const int begin = part.begin() + shift / kSize;
  const int end = part.end() + shift / kSize;
  const Vector beyond = filled<T>(fill);

  const T* const own = base + part.lane * kWidth;
  const auto load = [&](int k) {
    constexpr int kStep = limits::kWarp * kWidth;
    Vector result = beyond;
    const int place = k * kStep + part.lane * kWidth;
    if ((k > 0 || place >= begin) && place + kWidth <= end) result = load_words<4>(own + k * kStep);
    return result;
  };
#pragma unroll
  for (int k = 0; k < vectors; ++k) x[k] = load(k);
  const bool any_behind = (part.lead != 0 && summed) || shift != 0;
  behind = beyond;
  if (any_behind && part.lane < 2) behind = load(vectors);

  const auto load_elements = [&](int vector) {
    T element = ToElement<T>::of(fill);
    const int place = vector * kWidth + part.lane;
    if (part.lane < kWidth && place >= begin && place < end) element = base[place];
    const Vector loaded = gathered(element, part.lane);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector == k * limits::kWarp + part.lane) x[k] = loaded;
    }
    if (vector == vectors * limits::kWarp + part.lane) behind = loaded;
  };
  if (begin % kWidth != 0) load_elements(begin / kWidth);
  if (part.ends<kWidth>() && end % kWidth != 0) load_elements(end / kWidth);
  if (shift != 0) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      x[k] = shifted<kSize>(
          x[k], from_next_lane(x[k], k + 1 < vectors ? x[k + 1] : behind, part.lane), shift);
    }
    behind = shifted<kSize>(behind, from_next_lane(behind, behind, part.lane), shift);
  }
}

// A leaf of the row's tree for each lane: vector number k as it would be without a lead.
template <class T, int vectors>
__device__ __forceinline__ Vector leaf_of(const Vector (&x)[vectors], const Vector& behind, int k,
                                          Part part) {
  if (part.lead == 0) return x[k];
  const Vector next = from_next_lane(x[k], k + 1 < vectors ? x[k + 1] : behind, part.lane);
  return shifted<sizeof(T)>(x[k], next, part.lead * static_cast<int>(sizeof(T)));
}

template <class T, int vectors, class A>
__device__ __forceinline__ void load_part(const T* from, WholePart part, A fill,
                                          Vector (&x)[vectors]) {
  constexpr int kWidth = cuda::kWidth<T>;
  const T* const own = from + part.lane * kWidth;
  const int step = part.lanes * kWidth;
#pragma unroll
  for (int k = 0; k < vectors; ++k) {
    x[k] = filled<T>(fill);
    if (k * step + part.lane * kWidth < part.size) x[k] = load_words<4>(own + k * step);
  }
}

// x is another value now, as far as the compiler knows: it would keep what it has made of x already,
// which may take more registers than x.
__device__ __forceinline__ void forget(Vector& x) {
  SOFTMAX_EXT_PTX(
      (void)x, asm volatile(""
                            : "+r"(x.word[0]), "+r"(x.word[1]), "+r"(x.word[2]), "+r"(x.word[3])));
}

__device__ __forceinline__ void forget(int& x) {
  SOFTMAX_EXT_PTX((void)x, asm volatile("" : "+r"(x)));
}
__device__ __forceinline__ void forget(int64_t& x) {
  SOFTMAX_EXT_PTX((void)x, asm volatile("" : "+l"(x)));
}

// `width` values as T, to aligned memory, by 16 bytes (8, where a vector has become half as large).
template <class T, int width>
struct Pieces {
  static constexpr int kBytes = width * static_cast<int>(sizeof(T));
  static constexpr int kCount = std::max(1, kBytes / limits::kVectorBytes);
  Words<kBytes / kCount / 4> piece[kCount];

  template <class A>
  static __device__ __forceinline__ Pieces of(const A (&x)[width]) {
    T data[width];
#pragma unroll
    for (int v = 0; v < width; ++v) data[v] = ToElement<T>::of(x[v]);
    Pieces pieces;
    memcpy(&pieces, data, sizeof(pieces));
    return pieces;
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int p = 0; p < kCount; ++p) store_words<true>(to + p * (width / kCount), piece[p]);
  }
};

// Writes a part, vector by vector in the order of load_part, from `width` values each; by elements
// where the row does not fill the vector. All lanes of the warp come along, since any of them may
// have read what one writes.
template <class T, int width, int vectors>
class PartWriter {
 public:
  __device__ __forceinline__ PartWriter(T* to, Part part)
      : lane_(part.lane), first_(to - part.lead), begin_(part.begin()), end_(part.end()) {
    const bool one = begin_ > 0 && end_ < width;  // the first vector is the last
    const bool within = end_ < vectors * limits::kWarp * width;
    if (within && end_ % width != 0 && !one) last_ = end_ / width;
    __syncwarp();
  }

  template <class A>
  __device__ __forceinline__ void put(int k, const A (&x)[width]) {
    constexpr int kStep = limits::kWarp * width;
    const auto pieces = Pieces<T, width>::of(x);
    const int place = k * kStep + lane_ * width;
    if ((k > 0 || place >= begin_) && place + width <= end_) {
      pieces.store(first_ + lane_ * width + k * kStep);
    }
    if (k == 0 && begin_ > 0) put_elements(0, pieces);
    if (k == last_ / limits::kWarp) ending_ = pieces;
  }

  // After the last vector.
  __device__ __forceinline__ void finish() {
    if (last_ >= 0) put_elements(last_, ending_);
  }

 private:
  __device__ __forceinline__ void put_elements(int vector, const Pieces<T, width>& x) const {
    T data[width];
    memcpy(data, &x, sizeof(data));
    const T element = scattered(data, vector % limits::kWarp, lane_);
    const int place = vector * width + lane_;
    if (lane_ < width && place >= begin_ && place < end_) first_[place] = element;
  }

  int lane_;
  T* first_;  // the part's vectors
  int begin_;
  int end_;        // of the row, from first_
  int last_ = -1;  // the vector that the row ends in, if it does not fill it
  Pieces<T, width> ending_{};
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

// A sum that is -0 where lanes without elements are left out is 0 where their zeros are added.
template <class A>
__device__ __forceinline__ A row_sum(A sum) {
  return add_of(sum, A(0));
}

// The state of a chunk, or of a row, in a backward pass; in a forward one whose max is known.
template <class A>
struct SumState {
  A sum;
};

// The same where the sum waits for the row's max.
template <class A>
struct MaxState {
  A max;
};

template <class A>
__device__ __forceinline__ SumState<A> combine(SumState<A> a, SumState<A> b) {
  return {add_of(a.sum, b.sum)};
}

template <class State>
struct NumberOf;
template <template <class> class State, class A>
struct NumberOf<State<A>> {
  using type = A;
};
template <class State>
using number_t = typename NumberOf<State>::type;

template <class State>
constexpr bool kHasMax = !std::is_same_v<State, SumState<number_t<State>>>;
template <class State>
constexpr bool kHasSum = !std::is_same_v<State, MaxState<number_t<State>>>;

// What another block has written, after the threads have met.
template <class A>
__device__ __forceinline__ OnlineState<A> load_fresh(const OnlineState<A>* from) {
  return {__ldcg(&from->max), __ldcg(&from->sum)};
}
template <class A>
__device__ __forceinline__ SumState<A> load_fresh(const SumState<A>* from) {
  return {__ldcg(&from->sum)};
}
template <class A>
__device__ __forceinline__ MaxState<A> load_fresh(const MaxState<A>* from) {
  return {__ldcg(&from->max)};
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
__device__ __forceinline__ void raise_max(A& max, MaxState<A> chunk) {
  max = max_of(max, chunk.max);
}
template <class A>
__device__ __forceinline__ void raise_max(A&, SumState<A>) {}

template <class A>
__device__ __forceinline__ void set_state(OnlineState<A>& state, A max, A sum) {
  state = {max, sum};
}
template <class A>
__device__ __forceinline__ void set_state(MaxState<A>& state, A max, A) {
  state = {max};
}
template <class A>
__device__ __forceinline__ void set_state(SumState<A>& state, A, A sum) {
  state = {sum};
}

// The row's state from those of its chunks, load(chunk), by a warp.
template <class State, class Load>
__device__ __forceinline__ State combine_chunks(int chunks, int lane, Load load) {
  using A = number_t<State>;
  A max = -static_cast<A>(INFINITY);
#pragma unroll 1
  for (int chunk = lane; chunk < chunks; chunk += limits::kWarp) raise_max(max, load(chunk));
  if constexpr (kHasMax<State>) max = warp_reduce<Max>(max, limits::kWarp);
  A sum = 0;
  if constexpr (kHasSum<State>) {
#pragma unroll 1
    for (int chunk = lane; chunk < chunks; chunk += limits::kWarp) {
      sum = add_of(sum, term_of(load(chunk), max));
    }
    sum = warp_reduce<Sum>(sum, limits::kWarp);
  }
  State state;
  set_state(state, max, sum);
  return state;
}

// The same to the bit, by all threads of a block, whose number is a multiple of the warp's; `memory`
// has room for limits::kGridTerms numbers. Only the additions are one after another.
template <class State, class Load>
__device__ __forceinline__ State combine_chunks_of_grid(int chunks, number_t<State>* memory,
                                                        Load load) {
  using A = number_t<State>;
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
  State state;
  if constexpr (kHasSum<State>) {
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
    set_state(state, max, memory[0]);
  } else {
    state = {max};
  }
  __syncthreads();  // before memory is written again
  return state;
}

// The sum of `count` leaves (a power of two), as the lanes of a warp have it, which add those
// farthest apart first.
template <int count, class A>
__device__ __forceinline__ A sum_of_leaves(A (&leaves)[count]) {
#pragma unroll
  for (int half = count / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) leaves[i] = add_of(leaves[i], leaves[i + half]);
  }
  return leaves[0];
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
