// The columns schedule, for inner sizes above 1: threads side by side (x) take columns side by side,
// as many as one access has; threads along dim (y) take the rest of a column, which is a row of
// softmax. A block has a tile of columns at a time.
//
// A thread's elements are in groups of `width` neighbours along dim, the leaves of the tree, so that
// a column is summed as it would be as a row. `steps` elements of each of its columns are in
// registers:
//
//   a tile                              blocks             reads               writes
//   of which threads hold all           1                  1                   1
//   of 2 to 8 chunks, sm_90 and later   a cluster, a       1                   1
//                                       chunk each
//   longer                              1                  2, or 3 where not   1
//                                                          even a chunk fits
//
// A thread reads each element before it writes it, and no other thread touches that element, so the
// memory written may be that of an input.
#pragma once

#include "device.cuh"

namespace softmax_ext::cuda {

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

// What a thread has of a tile: `steps` packets of each input from a multiple of the block's steps on.
template <Op op, int columns, class In, class Out>
struct ForwardTile {
  using A = computed_t<In>;
  using State = OnlineState<A>;
  using Formula = forward_t<op, A, Out>;
  using P = typename PrecisionOf<op, Out>::type;
  using Element = In;
  static constexpr int kInputs = 1;
  static constexpr int kColumns = columns;
  static constexpr int kSteps = column_steps(columns, sizeof(In), kInputs);

  const In* input;
  Out* output;
  Packet<In, columns> x[kSteps];

  __device__ __forceinline__ void load(int s, int64_t offset, bool exists) {
    if (!exists) {
      x[s] = Packet<In, columns>::filled(-static_cast<A>(INFINITY));
    } else {
      x[s].load(input + offset);
    }
  }
  // `shift` is what is subtracted from the elements of each column.
  __device__ __forceinline__ void terms(int s, const A (&shift)[columns], A (&result)[columns]) {
    x[s].unpack(result);
#pragma unroll
    for (int c = 0; c < columns; ++c) result[c] = P::exp(result[c] - shift[c]);
  }
  __device__ __forceinline__ void store(int s, const Formula (&formulas)[columns], int64_t offset) {
    A values[columns];
    x[s].unpack(values);
#pragma unroll
    for (int c = 0; c < columns; ++c) values[c] = formulas[c].of(values[c]);
    Packet<Out, columns>::of(values).store(output + offset);
  }
  static __device__ __forceinline__ Formula formula(State state) {
    return Formula(state.max, state.sum);
  }
};

template <Op op, int columns, class In, class Out>
struct BackwardTile {
  using A = computed_t<In>;
  using State = SumState<A>;
  using Formula = backward_t<op, A, Out>;
  using Element = In;
  static constexpr int kInputs = 2;
  static constexpr int kColumns = columns;
  static constexpr int kSteps = column_steps(columns, sizeof(In), kInputs);

  const In* grad_output;
  const In* output;
  Out* grad_input;
  Packet<In, columns> grad[kSteps];
  Packet<In, columns> y[kSteps];

  __device__ __forceinline__ void load(int s, int64_t offset, bool exists) {
    if (!exists) {
      grad[s] = y[s] = Packet<In, columns>::filled(A(0));
    } else {
      grad[s].load(grad_output + offset);
      y[s].load(output + offset);
    }
  }
  __device__ __forceinline__ void terms(int s, const A (&)[columns], A (&result)[columns]) {
    A outputs[columns];
    grad[s].unpack(result);
    y[s].unpack(outputs);
#pragma unroll
    for (int c = 0; c < columns; ++c) result[c] = Formula::term(result[c], outputs[c]);
  }
  __device__ __forceinline__ void store(int s, const Formula (&formulas)[columns], int64_t offset) {
    A values[columns];
    A outputs[columns];
    grad[s].unpack(values);
    y[s].unpack(outputs);
#pragma unroll
    for (int c = 0; c < columns; ++c) values[c] = formulas[c].of(values[c], outputs[c]);
    Packet<Out, columns>::of(values).store(grad_input + offset);
  }
  static __device__ __forceinline__ Formula formula(State state) { return Formula{state.sum}; }
};

// What the threads of a block tell each other, in shared memory. A thread's columns are `across`
// apart there, so that threads side by side use banks side by side.
template <class A, class State>
struct TileMemory {
  A* partials;    // [leaf or thread along dim][column], rows of `pitch`
  A* maxima;      // [column]
  State* states;  // [column]: of the row
  State* chunks;  // [chunk][column]; of many chunks in scratch memory
  A* lane_sums;   // [column][lane], of the pieces of a chunk so far
  int pitch;
};

// a / power, rounded up.
__device__ __forceinline__ int64_t ceil_div_power(int64_t a, int power) {
  return (a + power - 1) >> __popc(power - 1);
}

template <class Tile>
__device__ __forceinline__ void run_columns(Tile& tile, const Shape& shape, void* scratch) {
  using A = typename Tile::A;
  using State = typename Tile::State;
  constexpr int kColumns = Tile::kColumns;
  constexpr int kSteps = Tile::kSteps;
  constexpr int kWidth = cuda::kWidth<typename Tile::Element>;
  constexpr int kLeaves = kSteps / kWidth;  // of a thread
  constexpr bool kForward = Tile::kInputs == 1;
  constexpr int kOfChunk = kChunk<typename Tile::Element>;
  // exp leaves float64 no registers for what the elements of a column share.
  constexpr bool kReload = kForward && sizeof(A) == 8;
  // Steps between which no thread asks whether the column goes on.
  constexpr int kTogether = 8 / kColumns < kWidth ? (8 + kColumns - 1) / kColumns : kWidth;

  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int across = static_cast<int>(blockDim.x), along = static_cast<int>(blockDim.y);
  const int thread = y * across + x;
  const int width = across * kColumns;
  const int of_piece = along * kSteps;
  const int chunks = static_cast<int>((shape.dim + kOfChunk - 1) / kOfChunk);
  // Pieces of what the threads hold: of a chunk, and of dim. One of more than a chunk has all of dim.
  const int of_chunk = of_piece < kOfChunk ? kOfChunk >> __popc(of_piece - 1) : 1;
  const int pieces = static_cast<int>(ceil_div_power(shape.dim, of_piece));
  // A thread adds its own leaves, if they are those that lanes would add first; what a few threads
  // have is combined by each of them, what more have by the lanes of a warp. float64 has no registers
  // left for that.
  const bool folded = sizeof(A) == 4 && pieces == 1 && along * kLeaves <= limits::kWarp;
  const int leaves = folded ? along : along * kLeaves;
  const bool few = folded && along <= 4;

  SOFTMAX_EXT_DYNAMIC_SHARED(A, shared);
  TileMemory<A, State> memory;
  memory.pitch = width + 1;
  memory.partials = shared;
  memory.maxima = shared + along * kLeaves * memory.pitch;
  // Each state whole in 16 bytes, as it is sent.
  memory.states =
      reinterpret_cast<State*>(shared + (along * kLeaves * memory.pitch + width + 3) / 4 * 4);
  memory.chunks = memory.states + width;
  if (chunks > limits::kColumnChunks) {
    memory.lane_sums = reinterpret_cast<A*>(memory.chunks);
    memory.chunks = static_cast<State*>(scratch) + int64_t{blockIdx.x} * chunks * width;
  } else {
    memory.lane_sums = reinterpret_cast<A*>(memory.chunks + (chunks > 1 ? chunks * width : 0));
  }

  const int64_t tiles_of_outer = ceil_div_power(shape.inner, width);
  const int team = static_cast<int>(gridDim.y), rank = static_cast<int>(blockIdx.y);
  // Calls body(column, lane, whether it exists) with `lanes` threads for each column, a power of two
  // up to a warp. All threads come along, for the reductions in body.
  const auto for_each_column = [&](int lanes, auto body) {
    const int bits = __popc(lanes - 1);
    for (int first = 0; first < width; first += across * along >> bits) {
      const int column = first + (thread >> bits);
      body(column, thread & (lanes - 1), column < width);
    }
  };
  const auto slot = [&](int c) { return c * across + x; };
  const auto put_partials = [&](int row, const auto& values) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) memory.partials[row * memory.pitch + slot(c)] = values[c];
  };
  // Of the thread's columns, what few threads have put, as the lanes of a warp would combine it.
  const auto combine_few = [&](auto reduction, auto& values) {
    using Reduction = decltype(reduction);
    if (along == 1) return;
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const A* const column = memory.partials + slot(c);
      A even = column[0];
      A odd = column[memory.pitch];
      if (along > 2) {
        even = Reduction::of(even, column[2 * memory.pitch]);
        odd = Reduction::of(odd, column[3 * memory.pitch]);
      }
      values[c] = Reduction::of(even, odd);
    }
    __syncthreads();
  };
  const auto get_shift = [&](auto& shift) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) shift[c] = shift_by(memory.maxima[slot(c)]);
  };
  const auto get_formulas = [&](auto& formulas) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) formulas[c] = Tile::formula(memory.states[slot(c)]);
  };
  // Lanes beyond the leaves, or the threads along dim, have nothing to add.
  const int lanes_of_leaves = min(leaves, limits::kWarp);
  const int lanes_of_threads = min(along, limits::kWarp);

  SOFTMAX_EXT_STATIC_SHARED(uint64_t, barrier, 1);
  const Mail mail(barrier);
  int turn = 0;
  if (team > 1) mail.open();

#pragma unroll 1
  for (int64_t item = blockIdx.x;; item += gridDim.x) {
    const int64_t outer = item / tiles_of_outer;
    if (outer >= shape.outer) break;
    const int64_t column = (item - outer * tiles_of_outer) * width + x * kColumns;
    const int64_t offset = outer * shape.dim * shape.inner + column;
    const bool exists = column < shape.inner;
    // How far from the thread's first step in a piece the column goes.
    const auto size_in = [&](int piece) {
      const int64_t left = shape.dim - (int64_t{piece} * of_piece + y * kWidth);
      return !exists || left < 0 ? 0 : left < of_piece ? static_cast<int>(left) : of_piece;
    };
    // body(s, whether it exists) for the thread's steps along dim that do, and those together with
    // one.
    const auto for_each_step = [&](int size, auto body) {
#pragma unroll
      for (int leaf = 0; leaf < kLeaves; ++leaf) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          const int distance = leaf * along * kWidth + v;
          if (v % kTogether == 0 && distance >= size) break;
          body(leaf * kWidth + v, kTogether == 1 || distance < size);
        }
      }
    };
    // The same with the place in memory.
    const auto for_each_place = [&](int piece, auto body) {
      int64_t inner = shape.inner;
      forget(inner);  // places are cheaper to compute again than to keep
      int64_t place = offset + (int64_t{piece} * of_piece + y * kWidth) * inner;
      for_each_step(size_in(piece), [&](int s, bool is_there) {
        if (s > 0 && s % kWidth == 0) place += (along - 1) * kWidth * inner;
        body(s, place, is_there);
        place += inner;
      });
    };
    int in_registers = -1;
    const auto load = [&](int piece) {
      if (piece == in_registers) return;
      in_registers = piece;
      for_each_place(piece,
                     [&](int s, int64_t place, bool is_there) { tile.load(s, place, is_there); });
    };

#pragma unroll 1
    for (int chunk = rank; chunk < chunks; chunk += team) {
      const int begin = chunk * of_chunk;
      const int end = min(begin + of_chunk, pieces);
      A shift[kColumns]{};
      if constexpr (kForward) {
        A max[kColumns];
        auto largest = Packet<typename Tile::Element, kColumns>::filled(-static_cast<A>(INFINITY));
#pragma unroll 1
        for (int piece = begin; piece < end; ++piece) {
          load(piece);
          for_each_step(size_in(piece), [&](int s, bool) { largest.raise(tile.x[s]); });
        }
        largest.unpack(max);
        put_partials(y, max);
        if (few) {
          combine_few(Max{}, max);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            if (y == 0) memory.maxima[slot(c)] = max[c];
          }
        } else {
          __syncthreads();
          for_each_column(lanes_of_threads, [&](int column, int lane, bool is_there) {
            A max = -static_cast<A>(INFINITY);
            for (int other = lane; is_there && other < along; other += limits::kWarp) {
              max = max_of(max, memory.partials[other * memory.pitch + column]);
            }
            max = warp_reduce<Max>(max, lanes_of_threads);
            if (is_there && lane == 0) memory.maxima[column] = max;
          });
          __syncthreads();
#pragma unroll
          for (int c = 0; c < kColumns; ++c) max[c] = memory.maxima[slot(c)];
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) shift[c] = shift_by(max[c]);
      }

#pragma unroll 1
      for (int piece = begin; piece < end; ++piece) {
        load(piece);
        A sums[kLeaves][kColumns]{};
        for_each_step(size_in(piece), [&](int s, bool) {
          A terms[kColumns];
          if constexpr (kReload) get_shift(shift);
          tile.terms(s, shift, terms);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            A& sum = sums[s / kWidth][c];
            sum = s % kWidth == 0 ? terms[c] : add_of(sum, terms[c]);
          }
        });
        if (folded) {
          A of_thread[kColumns];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            A of_column[kLeaves];
#pragma unroll
            for (int leaf = 0; leaf < kLeaves; ++leaf) of_column[leaf] = sums[leaf][c];
            of_thread[c] = sum_of_leaves(of_column);
          }
          put_partials(y, of_thread);
          if (few) {
            combine_few(Sum{}, of_thread);
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
              if (y > 0) continue;
              set_state(memory.states[slot(c)], memory.maxima[slot(c)], row_sum(of_thread[c]));
            }
            if (along > 1) __syncthreads();
            break;
          }
        } else {
#pragma unroll
          for (int leaf = 0; leaf < kLeaves; ++leaf) put_partials(leaf * along + y, sums[leaf]);
        }
        __syncthreads();
        if (team > 1 && piece == begin) {
          mail.begin(item == blockIdx.x, chunks * width * static_cast<int>(sizeof(State)));
        }
        for_each_column(lanes_of_leaves, [&](int column, int lane, bool is_there) {
          A sum = 0;
          if (is_there) {
            if (piece > begin) sum = memory.lane_sums[column * limits::kWarp + lane];
            for (int leaf = lane; leaf < leaves; leaf += limits::kWarp) {
              sum = add_of(sum, memory.partials[leaf * memory.pitch + column]);
            }
          }
          if (piece + 1 < end) {
            if (is_there) memory.lane_sums[column * limits::kWarp + lane] = sum;
            return;
          }
          State state;
          state.sum = row_sum(warp_reduce<Sum>(sum, lanes_of_leaves));
          if (!is_there) return;
          if constexpr (kForward) state.max = memory.maxima[column];
          if (chunks == 1) {
            if (lane == 0) memory.states[column] = state;
            return;
          }
          State* const place = memory.chunks + int64_t{chunk} * width + column;
          if (team == 1) {
            if (lane == 0) *place = state;
          } else if (lane < team) {
            mail.send(place, state, lane);
          }
        });
        __syncthreads();
      }
    }

    if (chunks > 1) {
      if (team > 1) mail.wait(turn);
      turn ^= 1;
      for_each_column(limits::kWarp, [&](int column, int lane, bool is_there) {
        const State state = combine_chunks<State>(is_there ? chunks : 0, lane, [&](int chunk) {
          return memory.chunks[int64_t{chunk} * width + column];
        });
        if (is_there && lane == 0) memory.states[column] = state;
      });
      __syncthreads();
    }
    typename Tile::Formula formulas[kColumns];
    get_formulas(formulas);

    // From the end on: what is still in registers, then what is the likeliest to be in a cache.
#pragma unroll 1
    for (int chunk = chunks - team + rank; chunk >= 0; chunk -= team) {
      const int begin = chunk * of_chunk;
      const int end = min(begin + of_chunk, pieces);
#pragma unroll 1
      for (int piece = end - 1; piece >= begin; --piece) {
        load(piece);
        for_each_place(piece, [&](int s, int64_t place, bool is_there) {
          if constexpr (kReload) get_formulas(formulas);
          if (is_there) tile.store(s, formulas, place);
        });
      }
    }
  }
}

// Threads that the compiler is told of: half as many more where the registers that it leaves are
// enough, so that an SM has more blocks.
template <int columns, class In, class Out>
constexpr int column_threads =
    limits::kMostColumnThreads +
    (sizeof(In) == sizeof(Out) && sizeof(In) < 8 && columns == column_packet(sizeof(In))
         ? limits::kMostColumnThreads / 2
         : 0);

template <Op op, int columns, class In, class Out>
__global__ void __launch_bounds__(column_threads<columns, In, Out>, 1)
    columns_forward_kernel(const In* input, Out* output, Shape shape, void* scratch) {
  ForwardTile<op, columns, In, Out> tile;
  tile.input = input;
  tile.output = output;
  run_columns(tile, shape, scratch);
}

template <Op op, int columns, class In, class Out>
__global__ void __launch_bounds__(column_threads<columns, In, Out>, 1)
    columns_backward_kernel(const In* grad_output, const In* output, Out* grad_input, Shape shape,
                            void* scratch) {
  BackwardTile<op, columns, In, Out> tile;
  tile.grad_output = grad_output;
  tile.output = output;
  tile.grad_input = grad_input;
  run_columns(tile, shape, scratch);
}

}  // namespace softmax_ext::cuda
