// The tree that a column (inner > 1) is summed in, whoever has it: dim is split in a power of two of
// parts, as many steps each (column_parts in plan.h), and
//
//   a part    is summed by one thread, a group of steps after another, against the part's max;
//   parts     i and i + half are combined, for half the number of parts, a quarter, ... and 1.
//
// Those that a thread, a block, or a cluster's block have are every so many of them: a subtree.
#pragma once

#include "device.cuh"

namespace softmax_ext::cuda {

struct ColumnSplit {
  int parts;  // of a column
  int steps;  // of a part
};

// `bytes` bytes that one access reads or writes.
template <int bytes>
using packet_t = std::conditional_t<
    bytes == 16, uint4,
    std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, uint32_t, uint16_t>>>;

// `columns` neighbours of T, as they are in memory.
template <class T, int columns>
struct Packet {
  static constexpr int kBytes = columns * static_cast<int>(sizeof(T));
  static constexpr int kPieceBytes = std::min(kBytes, limits::kVectorBytes);
  static constexpr int kPieces = kBytes / kPieceBytes;
  using Piece = packet_t<kPieceBytes>;
  Piece pieces[kPieces];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      pieces[p] = load_word<Piece>(reinterpret_cast<const Piece*>(from) + p);
    }
  }
  // From shared memory.
  __device__ __forceinline__ Packet read() const {
    Packet packet;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) packet.pieces[p] = load_word<Piece>(pieces + p);
    return packet;
  }
  // To a packet in shared memory, by wait_for_copies().
  static __device__ __forceinline__ void copy(Packet* shared, const T* from) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      copy_word<Piece>(shared->pieces + p, reinterpret_cast<const Piece*>(from) + p);
    }
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      store_word<true>(reinterpret_cast<Piece*>(to) + p, pieces[p]);
    }
  }
  template <class A>
  __device__ __forceinline__ void unpack(A (&x)[columns]) const {
    T data[columns];
    memcpy(data, pieces, sizeof(data));
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] = from_element<A>(data[c]);
  }
  // Column by column the larger.
  __device__ __forceinline__ void raise(const Packet& other) {
    if constexpr (sizeof(T) == 2 && kBytes >= 4) {
      uint32_t words[kBytes / 4];
      uint32_t others[kBytes / 4];
      memcpy(words, pieces, sizeof(words));
      memcpy(others, other.pieces, sizeof(others));
#pragma unroll
      for (int w = 0; w < kBytes / 4; ++w) {
        words[w] = max_of_pair(static_cast<T*>(nullptr), words[w], others[w]);
      }
      memcpy(pieces, words, sizeof(words));
    } else {
      *this = max_of_elements<T>(*this, other);
    }
  }
  static __device__ __forceinline__ Packet filled(computed_t<T> value) {
    computed_t<T> x[columns];
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] = value;
    return of(x);
  }
  template <class A>
  static __device__ __forceinline__ Packet of(const A (&x)[columns]) {
    T data[columns];
#pragma unroll
    for (int c = 0; c < columns; ++c) data[c] = ToElement<T>::of(x[c]);
    Packet packet;
    memcpy(packet.pieces, data, sizeof(data));
    return packet;
  }
};

// Steps that are loaded before the first is used, and summed before they are added to others; exp
// leaves float64 registers for fewer.
template <class T>
constexpr int kGroupSteps = sizeof(T) == 8 ? 2 : 4;

// What is read of neighbouring columns in one step.
template <Op op, int columns, class In, class Out>
struct ForwardColumns {
  using A = computed_t<In>;
  using State = OnlineState<A>;
  using Formula = forward_t<op, A, Out>;
  using P = typename PrecisionOf<op, Out>::type;
  using Element = In;
  using Result = Out;
  static constexpr int kInputs = 1;
  static constexpr int kColumns = columns;
  // exp(x - max of the part) has room where x was, and is taken once.
  static constexpr bool kKeepsExp = op == Op::kSoftmax && sizeof(In) == sizeof(A);
  using Step = Packet<In, columns>[1];

  static __device__ __forceinline__ A neutral() { return -static_cast<A>(INFINITY); }
  static __device__ __forceinline__ void terms(const Step& x, const A (&shift)[columns],
                                               A (&result)[columns]) {
    x[0].unpack(result);
#pragma unroll
    for (int c = 0; c < columns; ++c) result[c] = P::exp(result[c] - shift[c]);
  }
  static __device__ __forceinline__ void results(const Step& x, const Formula (&formulas)[columns],
                                                 A (&result)[columns]) {
    x[0].unpack(result);
#pragma unroll
    for (int c = 0; c < columns; ++c) result[c] = formulas[c].of(result[c]);
  }
  static __device__ __forceinline__ Formula formula(State state) {
    return Formula(state.max, state.sum);
  }
};

template <Op op, int columns, class In, class Out>
struct BackwardColumns {
  using A = computed_t<In>;
  using State = SumState<A>;
  using Formula = backward_t<op, A, Out>;
  using Element = In;
  using Result = Out;
  static constexpr int kInputs = 2;
  static constexpr int kColumns = columns;
  static constexpr bool kKeepsExp = false;
  using Step = Packet<In, columns>[2];  // the gradient, the output

  static __device__ __forceinline__ A neutral() { return A(0); }
  static __device__ __forceinline__ void terms(const Step& x, const A (&)[columns],
                                               A (&result)[columns]) {
    A outputs[columns];
    x[0].unpack(result);
    x[1].unpack(outputs);
#pragma unroll
    for (int c = 0; c < columns; ++c) result[c] = Formula::term(result[c], outputs[c]);
  }
  static __device__ __forceinline__ void results(const Step& x, const Formula (&formulas)[columns],
                                                 A (&result)[columns]) {
    A outputs[columns];
    x[0].unpack(result);
    x[1].unpack(outputs);
#pragma unroll
    for (int c = 0; c < columns; ++c) result[c] = formulas[c].of(result[c], outputs[c]);
  }
  static __device__ __forceinline__ Formula formula(State state) {
    return Formula{row_sum(state.sum)};
  }
};

// body(s, x) for the steps of a part, of which load(s, x) gives the inputs; those of the last group
// that do not exist are neutral, and have s beyond the size.
template <class Pass, class Load, class Body>
__device__ __forceinline__ void for_each_group(int size, Load load, Body body) {
  constexpr int kSteps = kGroupSteps<typename Pass::Element>;
#pragma unroll 1
  for (int first = 0; first < size; first += kSteps) {
    typename Pass::Step x[kSteps];
#pragma unroll
    for (int g = 0; g < kSteps; ++g) {
      if (first + g < size) {
        load(first + g, x[g]);
      } else {
#pragma unroll
        for (auto& packet : x[g]) packet = packet.filled(Pass::neutral());
      }
    }
    body(first, x);
  }
}

// The states of a part's columns. keep(s, terms) gets what was summed.
template <class Pass, class Load, class Keep>
__device__ __forceinline__ void sum_part(int size, Load load, Keep keep,
                                         typename Pass::State (&states)[Pass::kColumns]) {
  using A = typename Pass::A;
  constexpr int kColumns = Pass::kColumns;
  constexpr int kSteps = kGroupSteps<typename Pass::Element>;
  A max[kColumns]{};
  A shift[kColumns]{};
  if constexpr (kHasMax<typename Pass::State>) {
    auto largest = Packet<typename Pass::Element, kColumns>::filled(Pass::neutral());
    for_each_group<Pass>(size, load, [&](int, const auto& x) {
#pragma unroll
      for (int g = 0; g < kSteps; ++g) largest.raise(x[g][0]);
    });
    largest.unpack(max);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) shift[c] = shift_by(max[c]);
  }
  A sums[kColumns]{};
  for_each_group<Pass>(size, load, [&](int first, const auto& x) {
    A group[kColumns];
#pragma unroll
    for (int g = 0; g < kSteps; ++g) {
      A terms[kColumns];
      Pass::terms(x[g], shift, terms);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) group[c] = g == 0 ? terms[c] : add_of(group[c], terms[c]);
      if (first + g < size) keep(first + g, terms);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c] = add_of(sums[c], group[c]);
  });
#pragma unroll
  for (int c = 0; c < kColumns; ++c) set_state(states[c], max[c], sums[c]);
}

// The results of a part's columns, put(s, values). Where exp is kept, is_kept says whether load gives
// it already; `maxima` are the part's.
template <class Pass, class Load, class Put>
__device__ __forceinline__ void finish_part(
    int size, Load load, bool is_kept, const typename Pass::A (&maxima)[Pass::kColumns],
    const typename Pass::Formula (&formulas)[Pass::kColumns], Put put) {
  using A = typename Pass::A;
  constexpr int kColumns = Pass::kColumns;
  constexpr int kSteps = kGroupSteps<typename Pass::Element>;
  A shift[kColumns];
  A scale[kColumns];
  if constexpr (Pass::kKeepsExp) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      shift[c] = shift_by(maxima[c]);
      scale[c] = exp_of_difference(maxima[c], formulas[c].max);
    }
  }
  for_each_group<Pass>(size, load, [&](int first, const auto& x) {
#pragma unroll
    for (int g = 0; g < kSteps; ++g) {
      if (first + g >= size) break;
      A values[kColumns];
      if constexpr (Pass::kKeepsExp) {
        if (is_kept) {
          x[g][0].unpack(values);
        } else {
          Pass::terms(x[g], shift, values);
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          values[c] = formulas[c].of_exp(mul_of(values[c], scale[c]));
        }
      } else {
        Pass::results(x[g], formulas, values);
      }
      put(first + g, values);
    }
  });
}

}  // namespace softmax_ext::cuda
