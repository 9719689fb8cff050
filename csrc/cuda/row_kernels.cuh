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
//   short      several rows, in registers      1      1    of whole aligned vectors, half a chunk at
//                                                          most
//   registers  one chunk, in registers         1      1
//   long       several, one after another:     1      1    the last in registers, those before it in
//                                                          shared memory;
//                                              2      1    or, where they do not fit, nowhere: forward
//                                                          in float64 they are read 3 times
//
// A chunk is what the registers of a warp hold: 4 KB of a row (2 KB in float64). Rows begin anywhere,
// those of each tensor as its outer strides say: vectors are those of the memory written, and are
// shifted between lanes for the row's sum alone, whose tree begins with the row.
//
// A warp writes the vectors of its own chunks only. It reads no others but one behind each chunk,
// which is before the row's warps meet for its sum, and so before any of them writes: the memory
// written may be that of an input.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "outer_strides.cuh"

namespace softmax_ext::cuda {

// The rows of a launch, of which a block, or a team of blocks, has one after another.
struct Teams {
  int64_t rows;
  int64_t dim;
  Schedule schedule;
  void* scratch;  // of the grid schedule: the chunks' states
  bool keep;      // of the long kernel: in shared memory
};

struct Rows : Teams {
  OuterStrides strides;
};

// Elements of a row from number `first` on, in each tensor. It is made anew where it is needed: that
// takes fewer registers than to keep it.
struct Place {
  const Rows& rows;
  int64_t row;
  int64_t first;

  __device__ __forceinline__ int64_t of(int tensor) const {
    return rows.strides.offset(tensor, row) + first;
  }
};

// The rows' chunks as this warp sees them. Blocks that share a row, a team, are blocks along y.
struct Sharing {
  int warps;   // that share a row
  int warp;    // this one's number among them
  int chunks;  // of a row
};

__device__ __forceinline__ Sharing sharing(const Teams& rows, int of_chunk) {
  const int warps = static_cast<int>(blockDim.x) / limits::kWarp;
  return {static_cast<int>(gridDim.y) * warps,
          static_cast<int>(blockIdx.y) * warps + static_cast<int>(threadIdx.x) / limits::kWarp,
          static_cast<int>((rows.dim + of_chunk - 1) / of_chunk)};
}

// Calls body(row, exists) until every row has been had. A block, or a team of blocks, has blockDim.y
// rows at a time; those without one come along, for the meetings in body.
template <class Body>
__device__ __forceinline__ void for_each_row(const Teams& rows, Body body) {
  const int64_t at_a_time = int64_t{gridDim.x} * blockDim.y;
#pragma unroll 1
  for (int64_t first = 0; first < rows.rows; first += at_a_time) {
    const int64_t row = first + int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    body(row, row < rows.rows);
  }
}

// Where the states of a row's chunks meet, or those of its warps: as many of one type. `turn` tells
// one meeting from the next: a warp may be one ahead of another that still reads.
class Meeting {
 public:
  // `barrier`: of the cluster's blocks, in shared memory.
  __device__ __forceinline__ Meeting(const Teams& rows, const Sharing& share, void* shared,
                                     uint64_t* barrier)
      : schedule_(rows.schedule),
        share_(share),
        shared_(shared),
        scratch_(rows.scratch),
        mail_(barrier) {
    if (schedule_ == Schedule::kCluster) mail_.open();
  }

  // By all threads, before the states are put.
  template <class State>
  __device__ __forceinline__ void begin(bool first, int count) const {
    if (schedule_ == Schedule::kCluster) {
      mail_.begin(first, count * static_cast<int>(sizeof(State)));
    }
  }

  // By all lanes, which have the same state.
  template <class State>
  __device__ __forceinline__ void put(int turn, int chunk, State state, int count) const {
    if (chunk >= count) return;
    const int lane = static_cast<int>(threadIdx.x) % limits::kWarp;
    if (schedule_ == Schedule::kCluster) {
      if (lane < static_cast<int>(gridDim.y)) mail_.send(shared<State>() + chunk, state, lane);
    } else if (lane == 0) {
      State* const states = schedule_ == Schedule::kGrid ? in_scratch<State>(turn)
                                                         : shared<State>() + turn * share_.chunks;
      states[chunk] = state;
    }
  }

  // The row's state, by all threads, after they have put theirs.
  template <class State>
  __device__ __forceinline__ State get(int turn, int count) const {
    const int lane = static_cast<int>(threadIdx.x) % limits::kWarp;
    if (schedule_ == Schedule::kGrid) {
      sync_grid();
      const State* const states = in_scratch<State>(turn);
      return combine_chunks_of_grid<State>(count, shared<number_t<State>>(),
                                           [&](int chunk) { return load_fresh(states + chunk); });
    }
    const State* states = shared<State>();
    if (schedule_ == Schedule::kCluster) {
      mail_.wait(turn);
    } else {
      __syncthreads();
      states += turn * share_.chunks;
    }
    return combine_chunks<State>(count, lane, [&](int chunk) { return states[chunk]; });
  }

 private:
  template <class T>
  __device__ __forceinline__ T* shared() const {
    return static_cast<T*>(shared_);
  }
  template <class State>
  __device__ __forceinline__ State* in_scratch(int turn) const {
    return static_cast<State*>(scratch_) + (int64_t{turn} * gridDim.x + blockIdx.x) * share_.chunks;
  }

  Schedule schedule_;
  Sharing share_;
  void* shared_;
  void* scratch_;
  Mail mail_;
};

// --- A chunk in registers ------------------------------------------------------------------------

// Whether `elements` end before vector number k. Asked for every other one, so that the compiler has
// two to interleave.
template <int width>
__device__ __forceinline__ bool no_more(int k, int elements) {
  return k > 0 && k % 2 == 0 && k * limits::kWarp * width >= elements;
}

// Of a forward pass.
template <Op op, int vectors, class In, class Out>
struct ForwardChunk {
  using A = computed_t<In>;
  using State = OnlineState<A>;
  using Element = In;
  using F = forward_t<op, A, Out>;
  using P = typename PrecisionOf<op, Out>::type;
  static constexpr bool kMaxFirst = false;
  static constexpr int kInputs = 1;
  static constexpr int kVectors = vectors;
  static constexpr int kWidth = cuda::kWidth<In>;
  const In* input;
  Out* output;
  Vector x[vectors];
  Vector behind;

  __device__ __forceinline__ int lead(Place place) const {
    return lead_of<kWidth>(input + place.of(0), output + place.of(1));
  }

  __device__ __forceinline__ void load(Place place, Part part, bool summed) {
    load_part(input + place.of(0), part, summed, -static_cast<A>(INFINITY), x, behind);
  }

  template <class Body>
  __device__ __forceinline__ void for_each_vector(Body body) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) body(k, x[k]);
  }

  __device__ __forceinline__ State state(Part part) {
    // The first leaves have none of the elements in front of the part, the last those behind it.
    Vector largest = leaf_of<In>(x, behind, 0, part);
#pragma unroll
    for (int k = 1; k < vectors; ++k) largest = max_of_vectors<In>(largest, x[k]);
    if (vectors > 1 && part.lead != 0) {
      largest = max_of_vectors<In>(largest, leaf_of<In>(x, behind, vectors - 1, part));
    }
    A of_largest[kWidth];
    unpack<In>(largest, of_largest);
    const A max = warp_reduce<Max>(max_in(of_largest), limits::kWarp);
    const A shift = shift_by(max);
    A sum = 0;
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (no_more<kWidth>(k, part.size)) break;
      A values[kWidth];
      if constexpr (sizeof(In) == 2) forget(x[k]);
      unpack<In>(leaf_of<In>(x, behind, k, part), values);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) values[v] = P::exp(values[v] - shift);
      sum = add_of(sum, sum_of(values));
    }
    return {max, warp_reduce<Sum>(sum, limits::kWarp)};
  }

  __device__ __forceinline__ void store(State state, Place place, Part part) {
    const F formula(state.max, state.sum);
    store(formula, place, part, [&](A value) { return formula.of(value); });
  }

 protected:
  // result_of() what is in the vectors.
  template <class ResultOf>
  __device__ __forceinline__ void store(const F& formula, Place place, Part part,
                                        ResultOf result_of) {
    Out* const to = output + place.of(1);
    PartWriter<Out, kWidth, vectors> writer(to, part);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (no_more<kWidth>(k, part.end())) break;
      A values[kWidth];
      if constexpr (sizeof(In) == 2) forget(x[k]);
      unpack<In>(x[k], values);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) values[v] = result_of(values[v]);
      writer.put(k, values);
    }
    writer.finish();
    constexpr int kRoom = vectors * limits::kWarp * kWidth;
    if (part.lane < part.rest(kRoom)) {
      const int element = kRoom - part.lead + part.lane;
      const In* const from = input + place.of(0);
      to[element] = ToElement<Out>::of(formula.of(from_element<A>(from[element])));
    }
  }
};

template <class A>
__device__ __forceinline__ MaxState<A> of_warp(MaxState<A> of_lane) {
  return {warp_reduce<Max>(of_lane.max, limits::kWarp)};
}

// Of a forward pass in float64, where exp is dear: the row's max is found first, so that
// exp(x - max) is taken once of each element in registers, and softmax keeps it in the place of x.
// Also of what the vectors have of the chunks beside this one, which is of the same row.
template <Op op, int vectors, class In, class Out>
struct MaxFirstChunk : ForwardChunk<op, vectors, In, Out> {
  using Base = ForwardChunk<op, vectors, In, Out>;
  using typename Base::A;
  using typename Base::F;
  using typename Base::P;
  using State = SumState<A>;
  static constexpr bool kMaxFirst = true;
  static constexpr bool kKeepsExp = op == Op::kSoftmax;
  static constexpr int kWidth = Base::kWidth;
  static constexpr int kRoom = vectors * limits::kWarp * kWidth;
  using Base::behind;
  using Base::input;
  using Base::output;
  using Base::x;
  A max;  // of the row

  // Of a lane. Of all that its vectors have: no element is of another row.
  __device__ __forceinline__ MaxState<A> lane_max() const {
    Vector largest = behind;
#pragma unroll
    for (int k = 0; k < vectors; ++k) largest = max_of_vectors<In>(largest, x[k]);
    A of_largest[kWidth];
    unpack<In>(largest, of_largest);
    return {max_in(of_largest)};
  }

  // Again what leaves have of the vector behind.
  __device__ __forceinline__ void load_behind(Place place, Part part) {
    const In* const from = input + place.of(0);
    A values[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      const int element = kRoom - part.lead + v;
      const bool has = part.lane == 0 && v < part.lead && element < part.left;
      values[v] = has ? from_element<A>(from[element]) : -static_cast<A>(INFINITY);
    }
    behind = pack(values);
  }

  // Once the max is known. `summed`: the part is to be summed, not only stored.
  __device__ __forceinline__ void take_exps(Part part, bool summed) {
    if constexpr (kKeepsExp) {
      const A shift = shift_by(max);
      if (summed && part.lead != 0) take_exps(behind, shift, kWidth - 1);
#pragma unroll
      for (int k = 0; k < vectors; ++k) {
        if (no_more<kWidth>(k - k % 2, part.end())) {
          x[k] = filled<In>(A(0));
        } else {
          take_exps(x[k], shift, kWidth);
        }
      }
    }
  }

  // Of what take_exps has left.
  __device__ __forceinline__ State state(Part part) {
    const A shift = shift_by(max);
    A sum = 0;
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (no_more<kWidth>(k, part.size)) break;
      A values[kWidth];
      unpack<In>(leaf_of<In>(x, behind, k, part), values);
      if constexpr (!kKeepsExp) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v) values[v] = P::exp(values[v] - shift);
      }
      sum = add_of(sum, sum_of(values));
    }
    return {warp_reduce<Sum>(sum, limits::kWarp)};
  }

  __device__ __forceinline__ void store(State state, Place place, Part part) {
    const F formula(max, state.sum);
    Base::store(formula, place, part, [&](A value) {
      if constexpr (kKeepsExp) {
        return formula.of_exp(value);
      } else {
        return formula.of(value);
      }
    });
  }

 private:
  static __device__ __forceinline__ Vector pack(const A (&values)[kWidth]) {
    return Pieces<In, kWidth>::of(values).piece[0];
  }
  // Of the first `count` elements.
  static __device__ __forceinline__ void take_exps(Vector& vector, A shift, int count) {
    A values[kWidth];
    unpack<In>(vector, values);
#pragma unroll
    for (int v = 0; v < count; ++v) values[v] = P::exp(values[v] - shift);
    vector = pack(values);
  }
};

template <Op op, int vectors, class In, class Out>
using forward_chunk_t = std::conditional_t<kDearExp<In>, MaxFirstChunk<op, vectors, In, Out>,
                                           ForwardChunk<op, vectors, In, Out>>;

// Of a backward pass.
template <Op op, int vectors, class In, class Out>
struct BackwardChunk {
  using A = computed_t<In>;
  using State = SumState<A>;
  using Element = In;
  using B = backward_t<op, A, Out>;
  static constexpr bool kMaxFirst = false;
  static constexpr int kInputs = 2;
  static constexpr int kVectors = vectors;
  static constexpr int kWidth = cuda::kWidth<In>;

  const In* grad_output;
  const In* output;
  Out* grad_input;
  Vector grad[vectors];
  Vector y[vectors];
  Vector grad_behind;
  Vector y_behind;

  __device__ __forceinline__ int lead(Place place) const {
    return lead_of<kWidth>(grad_output + place.of(0), grad_input + place.of(2));
  }

  __device__ __forceinline__ void load(Place place, Part part, bool summed) {
    load_part(grad_output + place.of(0), part, summed, A(0), grad, grad_behind);
    load_part(output + place.of(1), part, summed, A(0), y, y_behind);
  }

  template <class Body>
  __device__ __forceinline__ void for_each_vector(Body body) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      body(2 * k, grad[k]);
      body(2 * k + 1, y[k]);
    }
  }

  __device__ __forceinline__ State state(Part part) const {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (no_more<kWidth>(k, part.size)) break;
      A g[kWidth];
      A outputs[kWidth]{};
      unpack<In>(leaf_of<In>(grad, grad_behind, k, part), g);
      if constexpr (op == Op::kSoftmax) unpack<In>(leaf_of<In>(y, y_behind, k, part), outputs);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) g[v] = B::term(g[v], outputs[v]);
      sum = add_of(sum, sum_of(g));
    }
    return {row_sum(warp_reduce<Sum>(sum, limits::kWarp))};
  }

  __device__ __forceinline__ void store(State state, Place place, Part part) {
    const B formula{state.sum};
    Out* const to = grad_input + place.of(2);
    PartWriter<Out, kWidth, vectors> writer(to, part);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (no_more<kWidth>(k, part.end())) break;
      A g[kWidth];
      A outputs[kWidth];
      if constexpr (sizeof(In) == 2) {
        forget(grad[k]);
        forget(y[k]);
      }
      unpack<In>(grad[k], g);
      unpack<In>(y[k], outputs);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) g[v] = formula.of(g[v], outputs[v]);
      writer.put(k, g);
    }
    writer.finish();
    constexpr int kRoom = vectors * limits::kWarp * kWidth;
    if (part.lane < part.rest(kRoom)) {
      const int element = kRoom - part.lead + part.lane;
      const In* const from_grad = grad_output + place.of(0);
      const In* const from_output = output + place.of(1);
      to[element] = ToElement<Out>::of(
          formula.of(from_element<A>(from_grad[element]), from_element<A>(from_output[element])));
    }
  }
};

// Of the chunk that begins at `place`.
template <class Chunk>
__device__ __forceinline__ Part part_of_chunk(const Chunk& chunk, bool exists, Place place) {
  constexpr int kOfChunk = kChunk<typename Chunk::Element>;
  const int lane = static_cast<int>(threadIdx.x) % limits::kWarp;
  const int64_t left = place.rows.dim - place.first;
  if (!exists || left <= 0) return {lane, 0, 0, true, 0};
  return {lane, static_cast<int>(min(left, int64_t{kOfChunk})),
          static_cast<int>(min(left, int64_t{kOfChunk} + Chunk::kWidth)), place.first == 0,
          chunk.lead(place)};
}

// --- Kernels -------------------------------------------------------------------------------------

// The row's sum by the lanes that share it: each has the sums of leaves lane, lane + lanes, ... Of up
// to 64, the lanes of a warp would add those 32 apart, and then those farthest apart first.
template <class A, int vectors>
__device__ __forceinline__ A sum_of_part(A (&leaves)[vectors], WholePart part) {
  A sum = leaves[0];
  if (vectors <= 2 || part.lanes < limits::kWarp) {
    sum = sum_of_leaves(leaves);
  } else {
#pragma unroll
    for (int k = 1; k < vectors; ++k) sum = add_of(sum, leaves[k]);
  }
  return row_sum(warp_reduce<Sum>(sum, part.lanes));
}

// body(place, part) for the rows of this thread.
template <class Body>
__device__ __forceinline__ void for_each_short_row(const Rows& rows, Body body) {
  const int lanes = static_cast<int>(blockDim.x);
  for_each_row(rows, [&](int64_t row, bool exists) {
    body(Place{rows, row, 0},
         WholePart{static_cast<int>(threadIdx.x), lanes, exists ? static_cast<int>(rows.dim) : 0});
  });
}

template <Op op, int vectors, class In, class Out>
__global__ void __launch_bounds__(limits::kShortRowThreads)
    short_forward_kernel(const In* input, Out* output, Rows rows) {
  using A = computed_t<In>;
  using P = typename PrecisionOf<op, Out>::type;
  constexpr int kWidth = cuda::kWidth<In>;
  // exp(x - max) is kept if there is room.
  constexpr bool kKeepExps = op == Op::kSoftmax && vectors * kWidth <= 32;
  for_each_short_row(rows, [&](Place place, WholePart part) {
    Vector x[vectors];
    load_part(input + place.of(0), part, -static_cast<A>(INFINITY), x);
    Vector largest = x[0];
#pragma unroll
    for (int k = 1; k < vectors; ++k) largest = max_of_vectors<In>(largest, x[k]);
    A of_largest[kWidth];
    unpack<In>(largest, of_largest);
    const A max = warp_reduce<Max>(max_in(of_largest), part.lanes);
    const A shift = shift_by(max);
    A kept[kKeepExps ? vectors : 1][kWidth];
    A sums[vectors];
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      A values[kWidth];
      if constexpr (sizeof(In) == 2 && !kKeepExps) forget(x[k]);
      unpack<In>(x[k], values);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        values[v] = P::exp(values[v] - shift);
        if constexpr (kKeepExps) kept[k][v] = values[v];
      }
      sums[k] = sum_of(values);
    }
    const forward_t<op, A, Out> formula(max, sum_of_part(sums, part));
    forget(place.row);
    Out* const to = output + place.of(1);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int first = (k * part.lanes + part.lane) * kWidth;
      A values[kWidth];
      if constexpr (sizeof(In) == 2 && !kKeepExps) forget(x[k]);
      unpack<In>(x[k], values);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        if constexpr (kKeepExps) {
          values[v] = formula.of_exp(kept[k][v]);
        } else {
          values[v] = formula.of(values[v]);
        }
      }
      const auto pieces = Pieces<Out, kWidth>::of(values);
      if (first < part.size) pieces.store(to + first);
    }
  });
}

template <Op op, int vectors, class In, class Out>
__global__ void __launch_bounds__(limits::kShortRowThreads)
    short_backward_kernel(const In* grad_output, const In* output, Out* grad_input, Rows rows) {
  using A = computed_t<In>;
  using B = backward_t<op, A, Out>;
  constexpr int kWidth = cuda::kWidth<In>;
  for_each_short_row(rows, [&](Place place, WholePart part) {
    Vector grad[vectors];
    Vector y[vectors];
    load_part(grad_output + place.of(0), part, A(0), grad);
    load_part(output + place.of(1), part, A(0), y);
    A sums[vectors];
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      A g[kWidth];
      A outputs[kWidth];
      unpack<In>(grad[k], g);
      unpack<In>(y[k], outputs);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) g[v] = B::term(g[v], outputs[v]);
      sums[k] = sum_of(g);
    }
    const B formula{sum_of_part(sums, part)};
    forget(place.row);
    Out* const to = grad_input + place.of(2);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int first = (k * part.lanes + part.lane) * kWidth;
      A g[kWidth];
      A outputs[kWidth];
      unpack<In>(grad[k], g);
      unpack<In>(y[k], outputs);
#pragma unroll
      for (int v = 0; v < kWidth; ++v) g[v] = formula.of(g[v], outputs[v]);
      const auto pieces = Pieces<Out, kWidth>::of(g);
      if (first < part.size) pieces.store(to + first);
    }
  });
}

// Threads of a block of the registers kernel: with all of a chunk in the registers of a warp, those
// of a block that shares a row.
constexpr int kMostThreads = limits::kMostWarps * limits::kWarp;
template <int vectors, class In>
constexpr int register_threads =
    vectors == kChunkVectors<In> ? kMostThreads : limits::kShortRowThreads;
// Forward, the compiler is told of half as many more where the registers that it leaves are enough:
// three blocks of 256 fit an SM then.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class In, class Out>
constexpr bool kFewRegisters = sizeof(In) == 2 && sizeof(Out) == 2;
#else
template <class In, class Out>
constexpr bool kFewRegisters = sizeof(In) < 8 && sizeof(Out) == sizeof(In);
#endif
template <int vectors, class In, class Out>
constexpr int forward_threads =
    register_threads<vectors, In> +
    (vectors == kChunkVectors<In> && kFewRegisters<In, Out> ? kMostThreads / 2 : 0);

// Both directions.
template <class Chunk>
__device__ __forceinline__ void run_registers(Chunk& chunk, const Rows& rows) {
  using State = typename Chunk::State;
  using In = typename Chunk::Element;
  constexpr int kOfChunk = kChunk<In>;
  SOFTMAX_EXT_DYNAMIC_SHARED(State, states);
  SOFTMAX_EXT_STATIC_SHARED(uint64_t, barrier, 1);
  const Sharing share = sharing(rows, kOfChunk);
  const Meeting meeting(rows, share, states, barrier);
  int turn = 0;
  const auto meet = [&](bool first, auto& state) {
    using Met = std::remove_reference_t<decltype(state)>;
    if constexpr (Chunk::kVectors == kChunkVectors<In>) {
      if (rows.schedule != Schedule::kWarp) {
        meeting.template begin<Met>(first, share.chunks);
        meeting.put(turn, share.warp, state, share.chunks);
        state = meeting.template get<Met>(turn, share.chunks);
        turn ^= 1;
      }
    }
  };
  const auto run = [&](int64_t& row, bool exists) {
    const auto place = [&] { return Place{rows, row, int64_t{share.warp} * kOfChunk}; };
    const Part part = part_of_chunk(chunk, exists, place());
    const auto is_first = [&] { return row < int64_t{gridDim.x} * blockDim.y; };
    chunk.load(place(), part, true);
    if constexpr (Chunk::kMaxFirst) {
      auto max = of_warp(chunk.lane_max());
      meet(is_first(), max);
      chunk.max = max.max;
      chunk.take_exps(part, true);
    }
    State state = chunk.state(part);
    meet(!Chunk::kMaxFirst && is_first(), state);
    forget(row);  // place is cheaper to compute again than to keep
    chunk.store(state, place(), part);
  };
  if constexpr (sizeof(In) == 8) {
    for_each_row(rows, [&](int64_t row, bool exists) { run(row, exists); });
  } else {
    // The same with one variable, for two registers less.
    const int64_t first = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
#pragma unroll 1
    for (int64_t row = first; row - first < rows.rows; row += int64_t{gridDim.x} * blockDim.y) {
      run(row, row < rows.rows);
    }
  }
}

template <Op op, int vectors, class In, class Out>
__global__ void __launch_bounds__(forward_threads<vectors, In, Out>, 1)
    registers_forward_kernel(const In* input, Out* output, Rows rows) {
  forward_chunk_t<op, vectors, In, Out> chunk;
  chunk.input = input;
  chunk.output = output;
  run_registers(chunk, rows);
}

template <Op op, int vectors, class In, class Out>
__global__ void __launch_bounds__(register_threads<vectors, In>, 1)
    registers_backward_kernel(const In* grad_output, const In* output, Out* grad_input, Rows rows) {
  BackwardChunk<op, vectors, In, Out> chunk;
  chunk.grad_output = grad_output;
  chunk.output = output;
  chunk.grad_input = grad_input;
  run_registers(chunk, rows);
}

// Rows of more chunks than warps. A warp has chunks warp, warp + warps, ...; on the way back the last
// is still in registers, and those before it are in shared memory, where each thread finds its own
// vectors, or are read again, the likeliest to be in a cache first.
//
// With the max first, exp is taken on the way back, on which the last chunk takes the place in shared
// memory of the one before it, and so on; and a third pass writes the results.
template <class Chunk>
__device__ __forceinline__ void run_long(Chunk& chunk, const Rows& rows) {
  using State = typename Chunk::State;
  constexpr int kVectors = Chunk::kVectors * Chunk::kInputs;
  constexpr int kOfChunk = kChunk<typename Chunk::Element>;
  const Sharing share = sharing(rows, kOfChunk);
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  State* const states = reinterpret_cast<State*>(memory);
  const int state_bytes = rows.schedule == Schedule::kGrid
                              ? limits::kGridTerms * static_cast<int>(sizeof(typename Chunk::A))
                              : static_cast<int>((2 * share.chunks * sizeof(State) + 15) / 16 * 16);
  // A thread's vectors of one chunk after another, side by side with those of the other threads.
  Vector* const kept = reinterpret_cast<Vector*>(memory + state_bytes) + threadIdx.x;
  SOFTMAX_EXT_STATIC_SHARED(uint64_t, barrier, 1);
  const Meeting meeting(rows, share, states, barrier);
  int turn = 0;
  for_each_row(rows, [&](int64_t row, bool exists) {
    const auto place = [&](int64_t number) { return Place{rows, row, number * kOfChunk}; };
    int own = 0;
    // A chunk after another; body(number, part) once it is in registers.
    const auto load_all = [&](auto body) {
#pragma unroll 1
      for (int number = share.warp; number < share.chunks; number += share.warps, ++own) {
        if (own > 0 && rows.keep) {
          chunk.for_each_vector([&](int k, Vector& x) {
            store_words<false>(kept + ((own - 1) * kVectors + k) * blockDim.x, x);
          });
        }
        const Part part = part_of_chunk(chunk, exists, place(number));
        chunk.load(place(number), part, true);
        body(number, part);
      }
    };
    if constexpr (Chunk::kMaxFirst) {
      using Max = decltype(chunk.lane_max());
      Max max{-static_cast<typename Chunk::A>(INFINITY)};
      load_all([&](int, Part) { raise_max(max.max, chunk.lane_max()); });
      const int warps = min(share.warps, share.chunks);
      meeting.template begin<Max>(row == blockIdx.x, warps);
      meeting.put(turn, share.warp, of_warp(max), warps);
      chunk.max = meeting.template get<Max>(turn, warps).max;
      turn ^= 1;
      meeting.template begin<State>(false, share.chunks);
#pragma unroll 1
      for (int kth = own - 1; kth >= 0; --kth) {
        const int number = share.warp + kth * share.warps;
        const Part part = part_of_chunk(chunk, exists, place(number));
        if (kth < own - 1 && rows.keep) {
          chunk.load_behind(place(number), part);
          chunk.for_each_vector([&](int k, Vector& x) {
            Vector* const at = kept + (kth * kVectors + k) * blockDim.x;
            const Vector next = load_words<4>(at);
            store_words<false>(at, x);
            x = next;
          });
        } else if (kth < own - 1) {
          chunk.load(place(number), part, true);
        }
        chunk.take_exps(part, true);
        meeting.put(turn, number, chunk.state(part), share.chunks);
      }
      const State of_row = meeting.template get<State>(turn, share.chunks);
      turn ^= 1;
#pragma unroll 1
      for (int kth = 0; kth < own; ++kth) {
        const int64_t number = share.warp + int64_t{kth} * share.warps;
        const Part part = part_of_chunk(chunk, exists, place(number));
        if (kth > 0 && rows.keep) {
          chunk.for_each_vector([&](int k, Vector& x) {
            x = load_words<4>(kept + ((kth - 1) * kVectors + k) * blockDim.x);
          });
        } else if (kth > 0) {
          chunk.load(place(number), part, false);
          chunk.take_exps(part, false);
        }
        chunk.store(of_row, place(number), part);
      }
    } else {
      meeting.template begin<State>(row == blockIdx.x, share.chunks);
      load_all([&](int number, Part part) {
        const State state = chunk.state(part);
        meeting.put(turn, number, state, share.chunks);
      });
      const State of_row = meeting.template get<State>(turn, share.chunks);
      bool in_registers = true;
#pragma unroll 1
      while (own-- > 0) {
        const int64_t number = share.warp + int64_t{own} * share.warps;
        const Part part = part_of_chunk(chunk, exists, place(number));
        if (!in_registers && rows.keep) {
          chunk.for_each_vector([&](int k, Vector& x) {
            x = load_words<4>(kept + (own * kVectors + k) * blockDim.x);
          });
        } else if (!in_registers) {
          chunk.load(place(number), part, false);
        }
        in_registers = false;
        chunk.store(of_row, place(number), part);
      }
      turn ^= 1;
    }
  });
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kLongWarps* limits::kWarp, 1)
    long_forward_kernel(const In* input, Out* output, Rows rows) {
  forward_chunk_t<op, kChunkVectors<In>, In, Out> chunk;
  chunk.input = input;
  chunk.output = output;
  run_long(chunk, rows);
}

template <Op op, class In, class Out>
__global__ void __launch_bounds__(limits::kLongWarps* limits::kWarp, 1)
    long_backward_kernel(const In* grad_output, const In* output, Out* grad_input, Rows rows) {
  BackwardChunk<op, kChunkVectors<In>, In, Out> chunk;
  chunk.grad_output = grad_output;
  chunk.output = output;
  chunk.grad_input = grad_input;
  run_long(chunk, rows);
}

}  // namespace softmax_ext::cuda
