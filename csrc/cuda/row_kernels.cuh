// The schedules for inner size 1 whose rows go from global memory to registers.
//
//   schedule  who shares a row                how they meet         limit on dim
//   warp      1 to 32 lanes of a warp         shuffles              a chunk
//   block     the warps of a block            shared memory         1024 chunks
//   cluster   those of 2 to 8 blocks          the blocks' shared    1024 chunks
//                                             memory; sm_90 and later
//   grid      those of all blocks, which      scratch memory        none
//             each row of a few has a part of
//
//   kernel     a warp has                      reads  writes
//   registers  one chunk, in registers         1      1
//   long       several, one after another:     1      1    the last in registers, those before it in
//                                                          shared memory;
//                                              2      1    or, where they do not fit, nowhere
//
// A chunk is what the registers of a warp hold: 4 KB of a row (1 KB in float64). Rows begin anywhere.
//
// A warp touches the elements of its own chunks only, and reads each before it writes it, so the
// memory written may be that of an input.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace softmax_ext::cuda {

struct Rows {
  int64_t rows;
  int64_t dim;
  Schedule schedule;
  int team;       // blocks that share a row
  void* scratch;  // of the grid schedule: the chunks' states
  bool keep;      // of the long kernel: in shared memory
};

// The rows' chunks as this warp sees them.
struct Sharing {
  int warps;   // that share a row
  int warp;    // this one's number among them
  int chunks;  // of a row
  int team;    // the number of this block's team
};

__device__ __forceinline__ Sharing sharing(const Rows& rows, int of_chunk) {
  const int warps = static_cast<int>(blockDim.x) / limits::kWarp;
  const int block = static_cast<int>(blockIdx.x) % rows.team;
  return {rows.team * warps, block * warps + static_cast<int>(threadIdx.x) / limits::kWarp,
          static_cast<int>((rows.dim + of_chunk - 1) / of_chunk),
          static_cast<int>(blockIdx.x) / rows.team};
}

// Calls body(row, exists) until every row has been had. A block, or a team of blocks, has blockDim.y
// rows at a time; those without one come along, for the meetings in body.
template <class Body>
__device__ __forceinline__ void for_each_row(const Rows& rows, const Sharing& share, Body body) {
  const int64_t at_a_time =
      static_cast<int64_t>(gridDim.x / static_cast<unsigned>(rows.team)) * blockDim.y;
#pragma unroll 1
  for (int64_t first = 0; first < rows.rows; first += at_a_time) {
    const int64_t row = first + int64_t{share.team} * blockDim.y + threadIdx.y;
    body(row, row < rows.rows);
  }
}

// Where the chunks' states of a row meet. `turn` tells one row from the next: a warp may be a row
// ahead of another that still reads.
template <class State>
class Meeting {
 public:
  __device__ __forceinline__ Meeting(const Rows& rows, const Sharing& share, State* shared)
      : schedule_(rows.schedule),
        share_(share),
        blocks_(rows.team),
        shared_(shared),
        scratch_(static_cast<State*>(rows.scratch)) {
    if (schedule_ == Schedule::kCluster) arrive_at_cluster();
  }

  // By all threads, before a row's states are put: all blocks of a cluster have begun.
  __device__ __forceinline__ void begin() {
    if (schedule_ == Schedule::kCluster && !begun_) wait_for_cluster();
    begun_ = true;
  }

  // By all lanes, which have the same state.
  __device__ __forceinline__ void put(int turn, int chunk, State state) const {
    if (chunk >= share_.chunks) return;
    const int lane = static_cast<int>(threadIdx.x) % limits::kWarp;
    if (schedule_ == Schedule::kCluster) {
      if (lane < blocks_) shared_of_block(shared_, lane)[turn * share_.chunks + chunk] = state;
    } else if (lane == 0) {
      State* const states =
          schedule_ == Schedule::kGrid ? in_scratch(turn) : shared_ + turn * share_.chunks;
      states[chunk] = state;
    }
  }

  // The row's state, by all threads, after they have put those of their chunks.
  __device__ __forceinline__ State get(int turn) const {
    const int lane = static_cast<int>(threadIdx.x) % limits::kWarp;
    if (schedule_ == Schedule::kGrid) {
      sync_grid();
      const State* const states = in_scratch(turn);
      return combine_chunks_of_grid<State>(share_.chunks,
                                           reinterpret_cast<decltype(State::sum)*>(shared_),
                                           [&](int chunk) { return load_fresh(states + chunk); });
    }
    if (schedule_ == Schedule::kCluster) {
      sync_cluster();
    } else {
      __syncthreads();
    }
    const State* const states = shared_ + turn * share_.chunks;
    return combine_chunks<State>(share_.chunks, lane, [&](int chunk) { return states[chunk]; });
  }

 private:
  __device__ __forceinline__ State* in_scratch(int turn) const {
    const int teams = static_cast<int>(gridDim.x) / blocks_;
    return scratch_ + (int64_t{turn} * teams + share_.team) * share_.chunks;
  }

  bool begun_ = false;
  Schedule schedule_;
  Sharing share_;
  int blocks_;
  State* shared_;
  State* scratch_;
};

// --- A chunk in registers ------------------------------------------------------------------------

// Whether the part's vectors end before number k. Asked for every other one, so that the compiler has
// two to interleave.
template <int width>
__device__ __forceinline__ bool no_more(int k, Part part) {
  return k > 0 && k % 2 == 0 && k * limits::kWarp * width >= part.size;
}

// Of a forward pass. Short parts keep exp(x - max), which the output is made of.
template <Op op, int vectors, class In, class Out>
struct ForwardChunk {
  using A = computed_t<In>;
  using F = forward_t<op, computed_t<In>, Out>;
  using P = typename PrecisionOf<op, Out>::type;
  static constexpr int kWidth = cuda::kWidth<In>;
  static constexpr bool kKeepExps =
      op == Op::kSoftmax && vectors * kWidth <= 32 && vectors < kChunkVectors<In>;
  static constexpr bool kForget = sizeof(In) == 2 && !kKeepExps;

  Vector x[vectors];
  A exps[kKeepExps ? vectors * kWidth : 1];

  __device__ __forceinline__ void load(const In* from, Part part) {
    load_part(from, part, -static_cast<A>(INFINITY), x);
  }

  template <class Body>
  __device__ __forceinline__ void for_each_vector(Body body) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) body(k, x[k]);
  }

  __device__ __forceinline__ OnlineState<A> state(int group, Part part) {
    Vector largest = x[0];
#pragma unroll
    for (int k = 1; k < vectors; ++k) largest = max_of_vectors<In>(largest, x[k]);
    A of_largest[kWidth];
    unpack<In>(largest, of_largest);
    const A max = warp_reduce<Max>(max_in(of_largest), group);
    const A shift = shift_by(max);
    A sum = 0;
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (no_more<kWidth>(k, part)) break;
      A values[kWidth];
      if constexpr (kForget) forget(x[k]);
      unpack<In>(x[k], values);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        values[v] = P::exp(values[v] - shift);
        if constexpr (kKeepExps) exps[k * kWidth + v] = values[v];
      }
      sum = add_of(sum, sum_of(values));
    }
    return {max, warp_reduce<Sum>(sum, group)};
  }

  __device__ __forceinline__ void store(OnlineState<A> state, Out* to, Part part) {
    const F formula(state.max, state.sum);
    PartWriter<Out, kWidth> writer(to, part);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (no_more<kWidth>(k, part)) break;
      A values[kWidth];
      if constexpr (kForget) forget(x[k]);
      unpack<In>(x[k], values);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        if constexpr (kKeepExps) {
          values[v] = formula.of_exp(exps[k * kWidth + v]);
        } else {
          values[v] = formula.of(values[v]);
        }
      }
      writer.put(k, values);
    }
    writer.finish();
  }
};

// Of a backward pass.
template <Op op, int vectors, class In, class Out>
struct BackwardChunk {
  using A = computed_t<In>;
  using B = backward_t<op, computed_t<In>, Out>;
  static constexpr int kWidth = cuda::kWidth<In>;

  Vector grad[vectors];
  Vector y[vectors];

  __device__ __forceinline__ void load(const In* grad_from, const In* y_from, Part part) {
    load_part(grad_from, part, A(0), grad);
    load_part(y_from, part, A(0), y);
  }

  template <class Body>
  __device__ __forceinline__ void for_each_vector(Body body) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      body(2 * k, grad[k]);
      body(2 * k + 1, y[k]);
    }
  }

  __device__ __forceinline__ SumState<A> state(int group, Part part) const {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (no_more<kWidth>(k, part)) break;
      A g[kWidth];
      A output[kWidth];
      unpack<In>(grad[k], g);
      unpack<In>(y[k], output);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) g[v] = B::term(g[v], output[v]);
      sum = add_of(sum, sum_of(g));
    }
    return {warp_reduce<Sum>(sum, group)};
  }

  __device__ __forceinline__ void store(SumState<A> state, Out* to, Part part) {
    const B formula{state.sum};
    PartWriter<Out, kWidth> writer(to, part);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (no_more<kWidth>(k, part)) break;
      A g[kWidth];
      A output[kWidth];
      if constexpr (sizeof(In) == 2) {
        forget(grad[k]);
        forget(y[k]);
      }
      unpack<In>(grad[k], g);
      unpack<In>(y[k], output);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) g[v] = formula.of(g[v], output[v]);
      writer.put(k, g);
    }
    writer.finish();
  }
};

// The part of a row that chunk number `chunk` is, of `of_chunk` elements if it is not the last.
__device__ __forceinline__ Part part_of_chunk(int64_t dim, bool exists, int64_t chunk,
                                              int of_chunk) {
  const int64_t left = dim - chunk * of_chunk;
  const int size = left < of_chunk ? static_cast<int>(left) : of_chunk;
  return {static_cast<int>(threadIdx.x) % limits::kWarp, exists && left > 0 ? size : 0};
}

// --- Kernels -------------------------------------------------------------------------------------

// Threads of a block of the registers kernel: with all of a chunk in the registers of a warp, those
// of a block that shares a row.
constexpr int kMostThreads = limits::kMostWarps * limits::kWarp;
template <int vectors, class In>
constexpr int register_threads =
    vectors == kChunkVectors<In> ? kMostThreads : limits::kShortRowThreads;

// Both directions: Chunk's load, state and store.
template <class Chunk, class State, int vectors, class In, class Load, class Store>
__device__ __forceinline__ void run_registers(const Rows& rows, Load load, Store store) {
  constexpr int kOfChunk = kChunk<In>;
  SOFTMAX_EXT_DYNAMIC_SHARED(State, states);
  const Sharing share = sharing(rows, kOfChunk);
  Meeting<State> meeting(rows, share, states);
  int turn = 0;
  for_each_row(rows, share, [&](int64_t row, bool exists) {
    const Part part = part_of_chunk(rows.dim, exists, share.warp, kOfChunk);
    const int64_t offset = row * rows.dim + int64_t{share.warp} * kOfChunk;
    Chunk chunk;
    load(chunk, offset, part);
    // Fewer than a warp's threads have a vector each.
    State state = chunk.state(
        vectors > 1 ? limits::kWarp : min(static_cast<int>(blockDim.x), limits::kWarp), part);
    if constexpr (vectors == kChunkVectors<In>) {
      if (rows.schedule != Schedule::kWarp) {
        meeting.begin();
        if (exists) meeting.put(turn, share.warp, state);
        state = meeting.get(turn);
        turn ^= 1;
      }
    }
    store(chunk, state, offset, part);
  });
}

template <Op op, int vectors, class In, class Out>
__global__ void __launch_bounds__(register_threads<vectors, In>, 1)
    registers_forward_kernel(const In* input, Out* output, Rows rows) {
  using Chunk = ForwardChunk<op, vectors, In, Out>;
  run_registers<Chunk, OnlineState<computed_t<In>>, vectors, In>(
      rows, [&](Chunk& chunk, int64_t offset, Part part) { chunk.load(input + offset, part); },
      [&](Chunk& chunk, OnlineState<computed_t<In>> state, int64_t offset, Part part) {
        chunk.store(state, output + offset, part);
      });
}

template <Op op, int vectors, class In, class Out>
__global__ void __launch_bounds__(register_threads<vectors, In>, 1)
    registers_backward_kernel(const In* grad_output, const In* output, Out* grad_input, Rows rows) {
  using Chunk = BackwardChunk<op, vectors, In, Out>;
  run_registers<Chunk, SumState<computed_t<In>>, vectors, In>(
      rows,
      [&](Chunk& chunk, int64_t offset, Part part) {
        chunk.load(grad_output + offset, output + offset, part);
      },
      [&](Chunk& chunk, SumState<computed_t<In>> state, int64_t offset, Part part) {
        chunk.store(state, grad_input + offset, part);
      });
}

// Rows of more chunks than warps. A warp has chunks warp, warp + warps, ...; on the way back the last
// is still in registers, and those before it are in shared memory, where each thread finds its own
// vectors, or are read again, the likeliest to be in a cache first.
template <class Chunk, class State, int inputs, class In, class Load, class Store>
__device__ __forceinline__ void run_long(const Rows& rows, Load load, Store store) {
  constexpr int kVectors = kChunkVectors<In> * inputs;
  constexpr int kOfChunk = kChunk<In>;
  const Sharing share = sharing(rows, kOfChunk);
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  State* const states = reinterpret_cast<State*>(memory);
  const int state_bytes = rows.schedule == Schedule::kGrid
                              ? limits::kGridTerms * static_cast<int>(sizeof(computed_t<In>))
                              : static_cast<int>((2 * share.chunks * sizeof(State) + 15) / 16 * 16);
  // A thread's vectors of one chunk after another, side by side with those of the other threads.
  Vector* const kept = reinterpret_cast<Vector*>(memory + state_bytes) + threadIdx.x;
  Meeting<State> meeting(rows, share, states);
  int turn = 0;
  for_each_row(rows, share, [&](int64_t row, bool exists) {
    Chunk chunk;
    const auto load_chunk = [&](int64_t number) {
      const Part part = part_of_chunk(rows.dim, exists, number, kOfChunk);
      load(chunk, row * rows.dim + number * kOfChunk, part);
      return part;
    };
    int own = 0;
    meeting.begin();
#pragma unroll 1
    for (int number = share.warp; number < share.chunks; number += share.warps, ++own) {
      if (own > 0 && rows.keep) {
        chunk.for_each_vector([&](int k, Vector& x) {
          store_words<false>(kept + ((own - 1) * kVectors + k) * blockDim.x, x);
        });
      }
      const Part part = load_chunk(number);
      const State state = chunk.state(limits::kWarp, part);
      if (exists) meeting.put(turn, number, state);
    }
    const State of_row = meeting.get(turn);
#pragma unroll 1
    while (own-- > 0) {
      const int64_t number = share.warp + int64_t{own} * share.warps;
      const Part part = part_of_chunk(rows.dim, exists, number, kOfChunk);
      store(chunk, of_row, row * rows.dim + number * kOfChunk, part);
      if (own == 0) break;
      if (rows.keep) {
        chunk.for_each_vector([&](int k, Vector& x) {
          x = load_words<4>(kept + ((own - 1) * kVectors + k) * blockDim.x);
        });
      } else {
        load_chunk(number - share.warps);
      }
    }
    turn ^= 1;
  });
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kLongWarps* limits::kWarp, 1)
    long_forward_kernel(const In* input, Out* output, Rows rows) {
  using Chunk = ForwardChunk<op, kChunkVectors<In>, In, Out>;
  run_long<Chunk, OnlineState<computed_t<In>>, 1, In>(
      rows, [&](Chunk& chunk, int64_t offset, Part part) { chunk.load(input + offset, part); },
      [&](Chunk& chunk, OnlineState<computed_t<In>> state, int64_t offset, Part part) {
        chunk.store(state, output + offset, part);
      });
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kLongWarps* limits::kWarp, 1)
    long_backward_kernel(const In* grad_output, const In* output, Out* grad_input, Rows rows) {
  using Chunk = BackwardChunk<op, kChunkVectors<In>, In, Out>;
  run_long<Chunk, SumState<computed_t<In>>, 2, In>(
      rows,
      [&](Chunk& chunk, int64_t offset, Part part) {
        chunk.load(grad_output + offset, output + offset, part);
      },
      [&](Chunk& chunk, SumState<computed_t<In>> state, int64_t offset, Part part) {
        chunk.store(state, grad_input + offset, part);
      });
}

}  // namespace softmax_ext::cuda
