// The schedules of segments: rows of different lengths, which only the device knows.
//
//   kernel    takes                                              reads  writes
//   list      the pointers, which it checks, and lists the
//             segments that are too long for a warp
//   warp      segments of up to kSegmentRows rows a lane, by     1      1
//             the lanes of a warp that have them
//   block     longer ones, by blocks that take one after         1      1
//             another from the list, with as many a thread;
//             of what is longer still parts, of whose chunks     1
//             it leaves the states
//   combine   those states, a block for each column
//   finish    the parts again                                    1      1
//
// The gradient of logsumexp takes no sums: its blocks finish parts at once. A warp and a block have a
// tile of columns, and of each column a number of rows; the tree is that of segments_plan.h.
#pragma once

#include <limits>

#include "column_tree.cuh"
#include "softmax_ext/segments_plan.h"

namespace softmax_ext::cuda {

// What the list kernel leaves. Only how many there are, and where in the list, is counted by atomics.
struct SegmentLists {
  unsigned* counts;    // of wholes, of parts
  int64_t* wholes;     // segments of no more than block_rows
  SegmentPart* parts;  // of the longer ones, those of one side by side
  // Pointers that are wrong may ask for more, before a thread that sees it has ended the kernel.
  unsigned most_wholes;
  unsigned most_parts;

  static SegmentLists in(void* scratch, const SegmentPlan& plan) {
    auto* const memory = static_cast<unsigned char*>(scratch);
    return {reinterpret_cast<unsigned*>(memory), reinterpret_cast<int64_t*>(memory + plan.wholes),
            reinterpret_cast<SegmentPart*>(memory + plan.parts),
            static_cast<unsigned>((plan.parts - plan.wholes) / sizeof(int64_t)),
            static_cast<unsigned>((plan.states - plan.parts) / sizeof(SegmentPart))};
  }
};

// The arguments of every kernel: contiguous tensors, and how they are shared out.
template <class T>
struct SegmentCall {
  const T* inputs[2];       // with a row for each of the segments' rows
  const T* of_segments[2];  // with one for each segment
  T* result;                // of either
  computed_t<T> scale;
  Shape shape;
  Segments segments;
  int across_bits;  // of a number of lanes: over the columns of a tile
  int along_bits;   // along a segment
  int tiles;
  int block_rows;
  SegmentLists lists;
  void* states;  // [outer][slot][column]
  int64_t state_slots;

  __device__ __forceinline__ int across() const { return 1 << across_bits; }
  __device__ __forceinline__ int along() const { return 1 << along_bits; }
  __device__ __forceinline__ int64_t begin(int64_t segment) const {
    return segments.pointers[segment];
  }
  __device__ __forceinline__ int64_t size(int64_t segment) const {
    return segments.pointers[segment + 1] - segments.pointers[segment];
  }
  // Where a segment has its own row.
  __device__ __forceinline__ int64_t place_of(int64_t outer, int64_t segment) const {
    return (outer * segments.count + segment) * shape.inner;
  }
  // Of the segment that begins at this row.
  template <class State>
  __device__ __forceinline__ State* states_of(int64_t outer, int64_t begin) const {
    return static_cast<State*>(states) +
           (outer * state_slots + begin / limits::kSegmentSlotRows) * shape.inner;
  }
};

// --- What is computed ----------------------------------------------------------------------------

// A pass says what is read of each row, what of it is summed, and what is written.
template <SegmentOp op, int columns, class T>
struct SegmentForward {
  static constexpr Op kOp = op == SegmentOp::kSoftmax ? Op::kSoftmax : Op::kLogSoftmax;
  static constexpr bool kOfSegments = op == SegmentOp::kLogSumExp;
  static constexpr bool kSums = true;
  static constexpr int kInputs = 1;
  static constexpr int kColumns = columns;
  using Element = T;
  using A = computed_t<T>;
  // exp(x - max) has room where x was, and is taken once, where no other chunk changes the max.
  static constexpr bool kKeepsExp = op == SegmentOp::kSoftmax && sizeof(T) == sizeof(A);
  using State = OnlineState<A>;
  using Formula = forward_t<kOp, A, T>;
  using P = typename PrecisionOf<kOp, T>::type;
  using Row = Packet<T, columns>[kInputs];
  static constexpr A kMost = std::numeric_limits<A>::max();

  static __device__ __forceinline__ void values(const Row& row, A scale, A (&x)[columns]) {
    row[0].unpack(x);
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] = mul_of(x[c], scale);
  }
  // What a sum is of, with this maximum. logsumexp is infinite where an element is, and not NaN.
  static __device__ __forceinline__ A bounded(A max) {
    return kOfSegments && max > kMost ? kMost : max;
  }
  static __device__ __forceinline__ void terms(const Row& row, A scale, const A (&max)[columns],
                                               A (&x)[columns]) {
    values(row, scale, x);
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const A shift = shift_by(max[c]);
      const A e = P::exp(x[c] - shift);
      x[c] = kOfSegments && x[c] > shift ? static_cast<A>(INFINITY) : e;
    }
  }
  static __device__ __forceinline__ void results(const Row& row, A scale,
                                                 const Formula (&formulas)[columns],
                                                 A (&x)[columns]) {
    values(row, scale, x);
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] = formulas[c].of(x[c]);
  }
  static __device__ __forceinline__ void results_of_exps(const Row& row,
                                                         const Formula (&formulas)[columns],
                                                         A (&x)[columns]) {
    row[0].unpack(x);
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] = formulas[c].of_exp(x[c]);
  }
  static __device__ __forceinline__ Formula formula(State state) {
    return Formula(state.max, row_sum(state.sum));
  }
};

// Of softmax and log-softmax: the gradient, the output.
template <SegmentOp op, int columns, class T>
struct SegmentBackward {
  static constexpr Op kOp = op == SegmentOp::kSoftmax ? Op::kSoftmax : Op::kLogSoftmax;
  static constexpr bool kOfSegments = false;
  static constexpr bool kKeepsExp = false;
  static constexpr bool kSums = true;
  static constexpr int kInputs = 2;
  static constexpr int kColumns = columns;
  using Element = T;
  using A = computed_t<T>;
  using State = SumState<A>;
  using Formula = backward_t<kOp, A, T>;
  using Row = Packet<T, columns>[kInputs];

  static __device__ __forceinline__ void terms(const Row& row, A, const A (&)[columns],
                                               A (&x)[columns]) {
    A outputs[columns];
    row[0].unpack(x);
    row[1].unpack(outputs);
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] = Formula::term(x[c], outputs[c]);
  }
  static __device__ __forceinline__ void results(const Row& row, A scale,
                                                 const Formula (&formulas)[columns],
                                                 A (&x)[columns]) {
    A outputs[columns];
    row[0].unpack(x);
    row[1].unpack(outputs);
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] = mul_of(formulas[c].of(x[c], outputs[c]), scale);
  }
  static __device__ __forceinline__ Formula formula(State state) {
    return Formula{row_sum(state.sum)};
  }
};

// Of logsumexp: the input; and of each segment the gradient, the output.
template <int columns, class T>
struct SegmentBackward<SegmentOp::kLogSumExp, columns, T> {
  static constexpr bool kOfSegments = false;
  static constexpr bool kKeepsExp = false;
  static constexpr bool kSums = false;
  static constexpr int kInputs = 1;
  static constexpr int kColumns = columns;
  using Element = T;
  using A = computed_t<T>;
  using State = SumState<A>;
  using Formula = LogSumExpBackward<A, gradient_precision_t<Op::kLogSoftmax, T>>;
  using Row = Packet<T, columns>[kInputs];

  static __device__ __forceinline__ void results(const Row& row, A scale,
                                                 const Formula (&formulas)[columns],
                                                 A (&x)[columns]) {
    row[0].unpack(x);
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] = formulas[c].of(mul_of(x[c], scale));
  }
};

// --- The rows of a thread ------------------------------------------------------------------------

// Every `step`-th row of a segment's, the columns of one access.
template <class Pass>
class SegmentRows {
 public:
  using T = typename Pass::Element;
  using A = typename Pass::A;
  using Formula = typename Pass::Formula;
  static constexpr int kColumns = Pass::kColumns;
  static constexpr int kRows = limits::kSegmentRows;

  // Of the `size` rows from `begin` on: numbers first, first + step, ... of them.
  __device__ __forceinline__ SegmentRows(const SegmentCall<T>& call, int64_t outer, int64_t begin,
                                         int size, int first, int step, int64_t column) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first + r * step;
      place_[r] = row < size && column < call.shape.inner ? begin + row : -1;
    }
    // All of them before the first is used.
    if (call.segments.order != nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (place_[r] >= 0) place_[r] = call.segments.order[place_[r]];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (place_[r] < 0) continue;
      place_[r] = (outer * call.shape.dim + place_[r]) * call.shape.inner + column;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (place_[r] < 0) continue;
#pragma unroll
      for (int i = 0; i < Pass::kInputs; ++i) rows_[r][i].load(call.inputs[i] + place_[r]);
    }
  }

  __device__ __forceinline__ void find_max(A scale, A (&max)[kColumns]) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) max[c] = -static_cast<A>(INFINITY);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (place_[r] < 0) continue;
      A x[kColumns];
      Pass::values(rows_[r], scale, x);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) max[c] = max_of(max[c], x[c]);
    }
  }

  // Those farthest apart first. `keeps`: the terms stay where the rows were.
  template <bool keeps>
  __device__ __forceinline__ void sum(A scale, const A (&max)[kColumns], A (&sums)[kColumns]) {
    A terms[kRows][kColumns]{};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (place_[r] < 0) continue;
      Pass::terms(rows_[r], scale, max, terms[r]);
      if constexpr (keeps) rows_[r][0] = Packet<T, kColumns>::of(terms[r]);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      A leaves[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) leaves[r] = terms[r][c];
      sums[c] = sum_of_leaves(leaves);
    }
  }

  template <bool kept>
  __device__ __forceinline__ void store(const SegmentCall<T>& call,
                                        const Formula (&formulas)[kColumns]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (place_[r] < 0) continue;
      A x[kColumns];
      if constexpr (kept) {
        Pass::results_of_exps(rows_[r], formulas, x);
      } else {
        Pass::results(rows_[r], call.scale, formulas, x);
      }
      Packet<T, kColumns>::of(x).store(call.result + place_[r]);
    }
  }

 private:
  typename Pass::Row rows_[kRows];
  int64_t place_[kRows];  // of the elements; -1 where there are none
};

// The formulas of a segment's columns where those are of no sum.
template <class Pass>
__device__ __forceinline__ void load_formulas(const SegmentCall<typename Pass::Element>& call,
                                              int64_t outer, int64_t segment, int64_t column,
                                              typename Pass::Formula (&formulas)[Pass::kColumns]) {
  using A = typename Pass::A;
  using Columns = Packet<typename Pass::Element, Pass::kColumns>;
  if (column >= call.shape.inner) return;
  const int64_t place = call.place_of(outer, segment) + column;
  Columns packet;
  A grads[Pass::kColumns];
  A outputs[Pass::kColumns];
  packet.load(call.of_segments[0] + place);
  packet.unpack(grads);
  packet.load(call.of_segments[1] + place);
  packet.unpack(outputs);
#pragma unroll
  for (int c = 0; c < Pass::kColumns; ++c) {
    formulas[c] = {mul_of(grads[c], call.scale), outputs[c]};
  }
}

// The result of a segment itself.
template <class Pass>
__device__ __forceinline__ void store_segment(
    const SegmentCall<typename Pass::Element>& call, int64_t outer, int64_t segment, int64_t column,
    const typename Pass::Formula (&formulas)[Pass::kColumns]) {
  typename Pass::A x[Pass::kColumns];
#pragma unroll
  for (int c = 0; c < Pass::kColumns; ++c) x[c] = formulas[c].logsumexp();
  if (column >= call.shape.inner) return;
  Packet<typename Pass::Element, Pass::kColumns>::of(x).store(
      call.result + call.place_of(outer, segment) + column);
}

// Of neighbours that a lane has, over the lanes of a warp that are `most`, `most` / 2, ... and `least`
// apart.
template <class Reduction, class A, int count>
__device__ __forceinline__ void reduce_lanes(A (&x)[count], int most, int least) {
#pragma unroll 1
  for (int offset = most; offset >= least; offset /= 2) {
#pragma unroll
    for (int c = 0; c < count; ++c) {
      x[c] = Reduction::of(x[c], __shfl_xor_sync(0xffffffffu, x[c], offset));
    }
  }
}

// Where a thread is in a tile.
template <class T, int columns>
struct SegmentTile {
  int64_t outer;
  int across;      // of the lanes over the columns
  int64_t column;  // the first of the thread's

  __device__ __forceinline__ SegmentTile(const SegmentCall<T>& call)
      : outer(blockIdx.x / static_cast<unsigned>(call.tiles)),
        across(static_cast<int>(threadIdx.x) & (call.across() - 1)),
        column((blockIdx.x % static_cast<unsigned>(call.tiles) * int64_t{call.across()} + across) *
               columns) {}
};

// --- Segments that lanes of a warp have ----------------------------------------------------------

template <class Pass>
__device__ __forceinline__ void run_segment_warps(const SegmentCall<typename Pass::Element>& call) {
  using A = typename Pass::A;
  using State = typename Pass::State;
  constexpr int kColumns = Pass::kColumns;
  const SegmentTile<typename Pass::Element, kColumns> tile(call);
  const int thread = static_cast<int>(threadIdx.x);
  const int group_bits = call.across_bits + call.along_bits;  // of the lanes that share a segment
  const int farthest = 1 << group_bits >> 1;
  const int lane = thread >> call.across_bits & (call.along() - 1);
  const int64_t groups = limits::kSegmentThreads >> group_bits;
#pragma unroll 1
  for (int64_t first = blockIdx.y * groups; first < call.segments.count;
       first += gridDim.y * groups) {
    const int64_t segment = first + (thread >> group_bits);
    // The lanes of no segment, and those of a long one, come along.
    const bool exists = segment < call.segments.count;
    const int64_t begin = exists ? call.begin(segment) : 0;
    const int64_t all = exists ? call.size(segment) : 0;
    const bool is_short = exists && all <= call.along() * limits::kSegmentRows;
    SegmentRows<Pass> rows(call, tile.outer, begin, is_short ? static_cast<int>(all) : 0, lane,
                           call.along(), tile.column);
    typename Pass::Formula formulas[kColumns];
    if constexpr (Pass::kSums) {
      A max[kColumns]{};
      A sums[kColumns];
      if constexpr (kHasMax<State>) {
        rows.find_max(call.scale, max);
        reduce_lanes<Max>(max, farthest, call.across());
#pragma unroll
        for (int c = 0; c < kColumns; ++c) max[c] = Pass::bounded(max[c]);
      }
      rows.template sum<Pass::kKeepsExp>(call.scale, max, sums);
      reduce_lanes<Sum>(sums, farthest, call.across());
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        State state;
        set_state(state, max[c], sums[c]);
        formulas[c] = Pass::formula(state);
      }
    } else if (is_short) {
      load_formulas<Pass>(call, tile.outer, segment, tile.column, formulas);
    }
    if constexpr (Pass::kOfSegments) {
      if (is_short && lane == 0) {
        store_segment<Pass>(call, tile.outer, segment, tile.column, formulas);
      }
    } else {
      rows.template store<Pass::kKeepsExp>(call, formulas);
    }
  }
}

// --- Those that a block has ----------------------------------------------------------------------

// What the warps of a block have of a column each, in shared memory.
template <class Pass>
class SegmentMeeting {
 public:
  using A = typename Pass::A;
  using State = typename Pass::State;
  static constexpr int kWarps = limits::kSegmentThreads / limits::kWarp;
  static constexpr int kColumns = Pass::kColumns;

  // `across` warps share a chunk.
  __device__ __forceinline__ SegmentMeeting(A* maxima, A* sums, State* totals, int across)
      : maxima_(maxima), sums_(sums), totals_(totals), across_(across) {}

  __device__ __forceinline__ void put_max(int column, const A (&max)[kColumns]) const {
    put(maxima_, column, max);
  }
  __device__ __forceinline__ void put_sum(int column, const A (&sum)[kColumns]) const {
    put(sums_, column, sum);
  }
  // Of the warp's chunk.
  __device__ __forceinline__ void get_max(int column, A (&max)[kColumns]) const {
    const int first = warp() & ~(across_ - 1);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) max[c] = -static_cast<A>(INFINITY);
#pragma unroll 1
    for (int w = first; w < first + across_; ++w) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        max[c] = max_of(max[c], maxima_[w * limits::kSegmentColumns + column + c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) max[c] = bounded(max[c]);
  }

  // By one thread for each column: the states of its chunks, in the first of each chunk's warps.
  __device__ __forceinline__ void get_chunks(int column, State (&chunks)[kWarps]) const {
    A maxima[kWarps]{};
    A sums[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if constexpr (kHasMax<State>) maxima[w] = maxima_[w * limits::kSegmentColumns + column];
      sums[w] = sums_[w * limits::kSegmentColumns + column];
    }
#pragma unroll
    for (int half = kWarps / 2; half > 0; half /= 2) {
      if (half >= across_) continue;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if ((w & half) != 0) continue;
        maxima[w] = max_of(maxima[w], maxima[w | half]);
        sums[w] = add_of(sums[w], sums[w | half]);
      }
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) set_state(chunks[w], bounded(maxima[w]), sums[w]);
  }

  // The state of all of them, as combine_chunks has it.
  __device__ __forceinline__ State total(const State (&chunks)[kWarps]) const {
    A max = -static_cast<A>(INFINITY);
    A terms[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if ((w & (across_ - 1)) == 0) raise_max(max, chunks[w]);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) terms[w] = term_of(chunks[w], max);
#pragma unroll
    for (int half = kWarps / 2; half > 0; half /= 2) {
      if (half < across_) continue;
#pragma unroll
      for (int w = 0; w < half; ++w) terms[w] = add_of(terms[w], terms[w + half]);
    }
    State state;
    set_state(state, max, terms[0]);
    return state;
  }

  __device__ __forceinline__ void put_total(int column, State state) const {
    totals_[column] = state;
  }
  __device__ __forceinline__ State get_total(int column) const { return totals_[column]; }

 private:
  static __device__ __forceinline__ int warp() {
    return static_cast<int>(threadIdx.x) / limits::kWarp;
  }
  static __device__ __forceinline__ A bounded(A max) {
    if constexpr (kHasMax<State>) max = Pass::bounded(max);
    return max;
  }
  static __device__ __forceinline__ void put(A* memory, int column, const A (&x)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      memory[warp() * limits::kSegmentColumns + column + c] = x[c];
    }
  }

  A* maxima_;  // [warp][column of the tile]
  A* sums_;
  State* totals_;
  int across_;
};

// `finishing`: the results of parts, whose segments' states have been combined.
template <class Pass>
__device__ __forceinline__ void run_segment_blocks(const SegmentCall<typename Pass::Element>& call,
                                                   bool finishing) {
  using A = typename Pass::A;
  using State = typename Pass::State;
  using Meeting = SegmentMeeting<Pass>;
  constexpr int kColumns = Pass::kColumns;
  constexpr int kNumbers = Meeting::kWarps * limits::kSegmentColumns;
  SOFTMAX_EXT_STATIC_SHARED(A, maxima, kNumbers);
  SOFTMAX_EXT_STATIC_SHARED(A, sums, kNumbers);
  SOFTMAX_EXT_STATIC_SHARED(State, totals, limits::kSegmentColumns);
  const int across = call.across();
  const Meeting meeting(maxima, sums, totals, across);
  const SegmentTile<typename Pass::Element, kColumns> tile(call);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / limits::kWarp;
  const int lane = thread % limits::kWarp >> call.across_bits;  // along the segment
  const int chunk = warp >> call.across_bits;                   // of the block's
  // Rows side by side go to the warps of a chunk in turn: the lanes, which meet first, have those
  // that are farther apart.
  const int row = chunk * limits::kSegmentChunk + lane * across + (warp & (across - 1));
  const int column = tile.across * kColumns;  // in the tile
  const unsigned wholes = finishing ? 0 : call.lists.counts[0];
  const unsigned all = wholes + call.lists.counts[1];
#pragma unroll 1
  for (unsigned item = blockIdx.y; item < all; item += gridDim.y) {
    const bool is_whole = item < wholes;
    const SegmentPart part =
        is_whole ? SegmentPart{call.lists.wholes[item], 0} : call.lists.parts[item - wholes];
    const int64_t begin = call.begin(part.segment);
    const int64_t offset = part.number * call.block_rows;
    const int size =
        static_cast<int>(min(call.size(part.segment) - offset, int64_t{call.block_rows}));
    SegmentRows<Pass> rows(call, tile.outer, begin + offset, size, row, limits::kWarp, tile.column);
    typename Pass::Formula formulas[kColumns];
    if constexpr (Pass::kSums) {
      State* const states = call.template states_of<State>(tile.outer, begin);
      if (finishing) {
        if (tile.column < call.shape.inner) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) formulas[c] = Pass::formula(states[tile.column + c]);
        }
      } else {
        A max[kColumns]{};
        A sum[kColumns];
        if constexpr (kHasMax<State>) {
          rows.find_max(call.scale, max);
          reduce_lanes<Max>(max, limits::kWarp / 2, across);
          if (lane == 0) meeting.put_max(column, max);
          __syncthreads();
          meeting.get_max(column, max);
        }
        rows.template sum<false>(call.scale, max, sum);
        reduce_lanes<Sum>(sum, limits::kWarp / 2, across);
        if (lane == 0) meeting.put_sum(column, sum);
        __syncthreads();
        const int64_t own =
            tile.column - column + thread;  // a column for each of the first threads
        if (thread < across * kColumns && own < call.shape.inner) {
          State chunks[Meeting::kWarps];
          meeting.get_chunks(thread, chunks);
          if (is_whole) {
            meeting.put_total(thread, meeting.total(chunks));
          } else {
#pragma unroll
            for (int w = 0; w < Meeting::kWarps; ++w) {
              const int number = w >> call.across_bits;
              if ((w & (across - 1)) != 0 || number * limits::kSegmentChunk >= size) continue;
              states[(offset / limits::kSegmentChunk + number) * call.shape.inner + own] =
                  chunks[w];
            }
          }
        }
        __syncthreads();
        if (!is_whole) continue;
        if (tile.column < call.shape.inner) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            formulas[c] = Pass::formula(meeting.get_total(column + c));
          }
        }
      }
    } else {
      load_formulas<Pass>(call, tile.outer, part.segment, tile.column, formulas);
    }
    if constexpr (Pass::kOfSegments) {
      if (offset == 0 && row == 0) {
        store_segment<Pass>(call, tile.outer, part.segment, tile.column, formulas);
      }
    } else {
      rows.template store<false>(call, formulas);
    }
  }
}

// --- Kernels -------------------------------------------------------------------------------------

// Blocks of an SM, as the compiler is told: wide accesses of 16 bits, and float64, take more registers,
// and so does a meeting.
template <class Pass>
constexpr int segment_warp_blocks = sizeof(typename Pass::Element) == 8 ? 2
                                    : Pass::kColumns < 8                ? 4
                                    : Pass::kInputs == 1                ? 3
                                                                        : 2;
template <class Pass>
constexpr int segment_block_blocks =
    sizeof(typename Pass::Element) < 8 ? (Pass::kColumns == 1 ? 4 : 2)
                                       : (Pass::kColumns == 1 ? 2 : 1);
constexpr int kSegmentCombineBlocks = 2;

template <SegmentOp op, int columns, class T>
__global__ void __launch_bounds__(limits::kSegmentThreads,
                                  segment_warp_blocks<SegmentForward<op, columns, T>>)
    segment_warp_forward_kernel(SegmentCall<T> call) {
  run_segment_warps<SegmentForward<op, columns, T>>(call);
}

template <SegmentOp op, int columns, class T>
__global__ void __launch_bounds__(limits::kSegmentThreads,
                                  segment_warp_blocks<SegmentBackward<op, columns, T>>)
    segment_warp_backward_kernel(SegmentCall<T> call) {
  run_segment_warps<SegmentBackward<op, columns, T>>(call);
}

template <SegmentOp op, int columns, class T>
__global__ void __launch_bounds__(limits::kSegmentThreads,
                                  segment_block_blocks<SegmentForward<op, columns, T>>)
    segment_block_forward_kernel(SegmentCall<T> call, bool finishing) {
  run_segment_blocks<SegmentForward<op, columns, T>>(call, finishing);
}

template <SegmentOp op, int columns, class T>
__global__ void __launch_bounds__(limits::kSegmentThreads,
                                  segment_block_blocks<SegmentBackward<op, columns, T>>)
    segment_block_backward_kernel(SegmentCall<T> call, bool finishing) {
  run_segment_blocks<SegmentBackward<op, columns, T>>(call, finishing);
}

// The first state of each segment that has parts becomes that of the segment.
template <class State, class T>
__device__ __forceinline__ void run_segment_combine(const SegmentCall<T>& call) {
  SOFTMAX_EXT_DYNAMIC_SHARED(number_t<State>, memory);
  const int64_t outer = blockIdx.x / call.shape.inner, column = blockIdx.x % call.shape.inner;
#pragma unroll 1
  for (unsigned item = blockIdx.y; item < call.lists.counts[1]; item += gridDim.y) {
    const SegmentPart part = call.lists.parts[item];
    if (part.number != 0) continue;
    const int64_t size = call.size(part.segment);
    const int chunks = static_cast<int>((size + limits::kSegmentChunk - 1) / limits::kSegmentChunk);
    State* const states = call.template states_of<State>(outer, call.begin(part.segment)) + column;
    const State all = combine_chunks_of_grid<State>(
        chunks, memory, [&](int chunk) { return states[chunk * call.shape.inner]; });
    if (threadIdx.x == 0) *states = all;
  }
}

template <class T>
__global__ void __launch_bounds__(limits::kSegmentThreads, kSegmentCombineBlocks)
    segment_combine_forward_kernel(SegmentCall<T> call) {
  run_segment_combine<OnlineState<computed_t<T>>>(call);
}

template <class T>
__global__ void __launch_bounds__(limits::kSegmentThreads, kSegmentCombineBlocks)
    segment_combine_backward_kernel(SegmentCall<T> call) {
  run_segment_combine<SumState<computed_t<T>>>(call);
}

}  // namespace softmax_ext::cuda
