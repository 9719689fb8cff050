// Softmax, log-softmax and logsumexp of scores (softmax_ext/scores.h), and their gradients. Rows, teams
// and meetings are those of row_kernels.cuh:
//
//   kernel  a row is had by                      limit on dim
//   short   8 to 32 lanes of a warp              kShortScores
//   rows    a warp; the warps of a block, a      none, by the grid (row_kernels.cuh)
//           cluster or a grid, a chunk or more
//           each
//
// A row is read once, and becomes scores in registers. A warp's further chunks stay in shared memory, or
// are read again where they do not fit. Rows of a multiple of kScoreWidth elements begin at multiples of
// these, and lanes have as many neighbours; others begin anywhere, and lanes have single elements. What
// takes no part is not read, but for such neighbours. A row's bits depend on its length, its scores and
// the types alone.
//
// A thread writes the elements that it has read, and after the row's warps have met for its sum: the
// memory written may be that of an input.
#pragma once

#include "row_kernels.cuh"
#include "softmax_ext/score_plan.h"

namespace softmax_ext::cuda {

// Teams have items: rows, or, for the gradient of a mask, a part each of the rows that share one of its rows.
struct ScoreTeams : Teams {
  OuterDims outer;
  int64_t sharing;    // rows that share one of the mask, one after another
  int64_t parts;      // of these
  int64_t each;       // rows of a part
  int64_t part_size;  // elements of the mask's gradient, of which each part has its own
  int chunks;         // of a row
  double of_softcap;  // 1 / softcap
  int width;          // neighbours that a lane has
};

// The lanes that share a row. Element number i of a lane is neighbour i % width of its vector i / width,
// of which the lanes have one after another.
struct Lanes {
  int lane;
  int lanes;
  int width;  // kScoreWidth or 1
};

// body(width) with the width of a lane's vectors as a constant.
template <class Body>
__device__ __forceinline__ void with_width(Lanes lanes, Body body) {
  if (lanes.width == 1) {
    body(std::integral_constant<int, 1>());
  } else {
    body(std::integral_constant<int, limits::kScoreWidth>());
  }
}

// Elements of a chunk, counted from the first of a lane.
struct Span {
  int begin, end;

  // It is asked anew where it is needed: the compiler would keep an answer for each element.
  __device__ __forceinline__ Span(Lanes lanes, int begin, int end)
      : begin(begin - lanes.lane * lanes.width), end(end - lanes.lane * lanes.width) {
    forget(this->begin);
    forget(this->end);
  }
  __device__ __forceinline__ bool has(int element) const {
    return element >= begin && element < end;
  }
};

// A row as a team has it. One that does not exist comes along, as another, of which nothing takes part.
struct ScorePlace {
  OuterIndex index;
  bool exists;
  bool is_first;  // of its item
  int64_t part;
};

// --- Elements ------------------------------------------------------------------------------------

// body(i) for the elements of a lane: those of the first `size` of a chunk, and a few more.
template <int items, class Body>
__device__ __forceinline__ void for_each_item(Lanes lanes, int size, Body body) {
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if (i > 0 && i % 4 == 0 && i * lanes.lanes >= size) break;
    body(i);
  }
}

// The first `count` elements behind the others.
template <int count, int items, class A>
__device__ __forceinline__ void rotate(A (&z)[items]) {
  A first[count];
#pragma unroll
  for (int i = 0; i < count; ++i) first[i] = z[i];
#pragma unroll
  for (int i = 0; i + count < items; ++i) z[i] = z[i + count];
#pragma unroll
  for (int i = 0; i < count; ++i) z[items - count + i] = first[i];
}

// body(z...) for the elements of the arrays, a vector of them at a time by the same code: what is long is
// compiled once, and leaves the others their registers.
template <int items, class Body, class A, class... Others>
__device__ __forceinline__ void for_each_in_turns(Body body, A (&z)[items],
                                                  Others (&... others)[items]) {
  constexpr int kAtATime = limits::kVectorBytes / static_cast<int>(sizeof(A));
#pragma unroll 1
  for (int turn = 0; turn < items / kAtATime; ++turn) {
#pragma unroll
    for (int v = 0; v < kAtATime; ++v) body(z[v], others[v]...);
    rotate<kAtATime>(z);
    (rotate<kAtATime>(others), ...);
  }
}

// The place of element number i of a lane, from its first.
template <int width>
__device__ __forceinline__ int place_of(Lanes lanes, int i) {
  return i / width * lanes.lanes * width + i % width;
}

// Neighbours that one access reads, as few as there are bytes for one.
template <int width, class T>
__device__ __forceinline__ void load_neighbours(const T* from, T (&x)[width]) {
  constexpr int kBytes = width * static_cast<int>(sizeof(T));
  if constexpr (width == 1) {
    x[0] = *from;
  } else if constexpr (kBytes == 4) {
    const auto word = load_word<uint32_t>(from);
    memcpy(x, &word, sizeof(word));
  } else {
    constexpr int kCount = kBytes <= limits::kVectorBytes ? 1 : kBytes / limits::kVectorBytes;
#pragma unroll
    for (int p = 0; p < kCount; ++p) {
      const auto words = load_words<kBytes / kCount / 4>(from + p * (width / kCount));
      memcpy(x + p * (width / kCount), &words, sizeof(words));
    }
  }
}

// x, but `value` outside of the elements [begin, end) of a chunk of `size`.
template <int items, class A>
__device__ __forceinline__ void fill_outside(Lanes lanes, int begin, int end, int size, A value,
                                             A (&x)[items]) {
  if (begin == 0 && end == size) return;
  with_width(lanes, [&](auto width) {
    const Span span(lanes, begin, end);
#pragma unroll
    for (int i = 0; i < items; ++i) {
      if (!span.has(place_of<decltype(width)::value>(lanes, i))) x[i] = value;
    }
  });
}

// Elements [begin, end) of a chunk, as `count` from number `first` on of a lane, and of its neighbours in a
// vector what there is. Without branches: all are on their way at the same time.
template <int width, int count, class T>
__device__ __forceinline__ void load_span(const T* chunk, Lanes lanes, Span span, int first,
                                          T (&x)[count]) {
  const T* const own = chunk + lanes.lane * width;
#pragma unroll
  for (int i = 0; i < count; i += width) {
    const int k = place_of<width>(lanes, first + i);
    T neighbours[width]{};
    if (k + width > span.begin && k < span.end) load_neighbours(own + k, neighbours);
#pragma unroll
    for (int v = 0; v < width; ++v) x[i + v] = neighbours[v];
  }
}

// Elements [begin, end) of a chunk; `fill` for the others.
template <int items, class A, class T>
__device__ __forceinline__ void load_items(const T* chunk, Lanes lanes, int begin, int end, A fill,
                                           A (&x)[items]) {
  with_width(lanes, [&](auto width) {
    T loaded[items];
    load_span<decltype(width)::value>(chunk, lanes, Span(lanes, begin, end), 0, loaded);
#pragma unroll
    for (int i = 0; i < items; ++i) x[i] = from_element<A>(loaded[i]);
  });
  fill_outside(lanes, begin, end, items * lanes.lanes, fill, x);
}

// The first `size` elements of a chunk.
template <int items, class A, class T>
__device__ __forceinline__ void store_items(T* chunk, Lanes lanes, int size, const A (&x)[items]) {
  with_width(lanes, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    T* const own = chunk + lanes.lane * kWidth;
    const Span span(lanes, 0, size);
#pragma unroll
    for (int i = 0; i < items; i += kWidth) {
      const int k = place_of<kWidth>(lanes, i);
      if (i > 0 && i % 4 == 0 && k >= size) break;
      if (!span.has(k)) continue;
      if constexpr (kWidth == 1) {
        own[k] = ToElement<T>::of(x[i]);
      } else {
        A neighbours[kWidth];
#pragma unroll
        for (int v = 0; v < kWidth; ++v) neighbours[v] = x[i + v];
        Pieces<T, kWidth>::of(neighbours).store(own + k);
      }
    }
  });
}

// An element of a bool mask: true is any byte but 0.
struct Bool {
  uint8_t byte;
};

// What an element of a mask makes of a score.
template <class A, class M>
__device__ __forceinline__ A masked(A z, M mask) {
  return add_of(z, from_element<A>(mask));
}
template <class A>
__device__ __forceinline__ A masked(A z, Bool mask) {
  return mask.byte != 0 ? z : -static_cast<A>(INFINITY);
}

// z, with elements [begin, end) of a chunk of the mask. A few are on their way at the same time, beside all of z.
template <int items, class A, class M>
__device__ __forceinline__ void mask_items(const M* chunk, Lanes lanes, int begin, int end,
                                           A (&z)[items]) {
  constexpr int kFew = items < 16 ? items : 16;
  with_width(lanes, [&](auto width) {
    const Span span(lanes, begin, end);
#pragma unroll
    for (int first = 0; first < items; first += kFew) {
      if (first > 0 && first * lanes.lanes >= end) break;
      M m[kFew];
      load_span<decltype(width)::value>(chunk, lanes, span, first, m);
#pragma unroll
      for (int i = 0; i < kFew; ++i) z[first + i] = masked(z[first + i], m[i]);
    }
  });
}

// --- A row ---------------------------------------------------------------------------------------

// What scores are made of in a row.
template <class A>
struct RowScores {
  A scale;
  A to_tanh;  // scale / softcap
  A softcap;  // 0 if there is none
  A sink;
  const void*
      mask;  // of the row's first element; null if there is none, or one element for the row
  DType mask_dtype;
  A mask_of_row;  // that element, or 0
  Range range;    // of the elements that take part

  __device__ __forceinline__ RowScores(const Scores& scores, const ScoreTeams& teams,
                                       const OuterIndex& index) {
    double of_row = scores.factor;
    if (scores.scale != nullptr) of_row *= scores.scale[index.offset(scores.scale_strides)];
    scale = static_cast<A>(of_row);
    softcap = static_cast<A>(scores.softcap);
    to_tanh = A(0);
    if (softcap != A(0)) to_tanh = static_cast<A>(of_row * teams.of_softcap);
    sink = static_cast<A>(scores.sink == nullptr ? scores.sink_of_all
                                                 : scores.sink[index.offset(scores.sink_strides)]);
    range = {0, teams.dim};
    if (scores.is_bounded()) range = scores.range(index.offset(scores.query_strides), teams.dim);
    mask = nullptr;
    mask_dtype = scores.mask_dtype;
    mask_of_row = A(0);
    if (scores.mask != nullptr) {
      const bool is_half = mask_dtype == DType::kFloat16 || mask_dtype == DType::kBFloat16;
      const int size = mask_dtype == DType::kBool ? 1 : is_half ? 2 : static_cast<int>(sizeof(A));
      mask = static_cast<const char*>(scores.mask) + index.offset(scores.mask_strides) * size;
      if (scores.mask_strides.dim == 0) {
        with_mask([&](const auto* element) { mask_of_row = masked(A(0), *element); });
        if (mask_dtype == DType::kBool && mask_of_row != A(0)) range.end = range.begin;
        mask = nullptr;
      }
    }
  }

  // Of the `room` elements from `first` on: those that take part.
  __device__ __forceinline__ void part_of_range(int64_t first, int room, int& begin,
                                                int& end) const {
    begin = static_cast<int>(min(max(range.begin - first, int64_t{0}), int64_t{room}));
    end = static_cast<int>(min(max(range.end - first, int64_t{0}), int64_t{room}));
  }

  // apply(elements), of the mask.
  template <class Apply>
  __device__ __forceinline__ void with_mask(Apply apply) const {
    if (mask_dtype == DType::kBool) return apply(static_cast<const Bool*>(mask));
    if constexpr (std::is_same_v<A, float>) {
      if (mask_dtype == DType::kFloat16) return apply(static_cast<const __half*>(mask));
      if (mask_dtype == DType::kBFloat16) return apply(static_cast<const __nv_bfloat16*>(mask));
    }
    apply(static_cast<const A*>(mask));
  }

  // The scores of a chunk of the row, -inf of what takes no part.
  template <int items, class T>
  __device__ __forceinline__ void load(const T* row, int64_t first, Lanes lanes,
                                       A (&z)[items]) const {
    const int room = items * lanes.lanes;
    int begin = 0, end = 0;
    part_of_range(first, room, begin, end);
    const auto for_each = [&](auto body) { for_each_item<items>(lanes, end, body); };
    load_items(row + first, lanes, begin, end, A(0), z);
    if (softcap == A(0)) {
      for_each([&](int i) { z[i] = mul_of(z[i], scale); });
    } else {
      for_each_in_turns([&](A& s) { s = mul_of(tanh_of(mul_of(s, to_tanh)), softcap); }, z);
    }
    if (mask != nullptr) {
      with_mask([&](const auto* elements) { mask_items(elements + first, lanes, begin, end, z); });
    } else if (mask_of_row != A(0)) {
      for_each([&](int i) { z[i] = add_of(z[i], mask_of_row); });
    }
    fill_outside(lanes, begin, end, room, -static_cast<A>(INFINITY), z);
  }
};

// An array of a lane as vectors.
template <int items, class A, class Body>
__device__ __forceinline__ void for_each_vector(A (&x)[items], int first, Body body) {
  constexpr int kOfVector = limits::kVectorBytes / static_cast<int>(sizeof(A));
#pragma unroll
  for (int k = 0; k < items / kOfVector; ++k) {
    Vector vector;
    memcpy(&vector, x + k * kOfVector, sizeof(vector));
    body(first + k, vector);
    memcpy(x + k * kOfVector, &vector, sizeof(vector));
  }
}

template <ScoreOp op, class T>
using score_precision_t =
    typename PrecisionOf<op == ScoreOp::kSoftmax ? Op::kSoftmax : Op::kLogSoftmax, T>::type;

// The sums of a row's numbers, by the lanes that share it: every lane has that of its own.
template <int items, class A, class Term>
__device__ __forceinline__ A sum_of_items(Lanes lanes, int size, Term term) {
  A sum = 0, four = 0;
  for_each_item<items>(lanes, size, [&](int i) {
    four = i % 4 == 0 ? term(i) : add_of(four, term(i));
    if (i % 4 == 3) sum = add_of(sum, four);
  });
  return warp_reduce<Sum>(sum, lanes.lanes);
}

// Elements of the row in a chunk of `room`.
__device__ __forceinline__ int size_of_chunk(int64_t dim, int64_t first, int room) {
  return static_cast<int>(min(dim - first, int64_t{room}));
}

// --- Forward -------------------------------------------------------------------------------------

template <ScoreOp op, int items, class T>
struct ScoreForward {
  using A = computed_t<T>;
  using State = OnlineState<A>;
  using P = score_precision_t<op, T>;
  static constexpr int kArrays = 1;
  static constexpr bool kHasState = true;

  const ScoreForwardArgs& args;
  Lanes lanes;
  bool exists;
  const T* input;
  T* output;
  A* lse;
  RowScores<A> scores;
  A z[items];

  __device__ __forceinline__ ScoreForward(const ScoreForwardArgs& args, Lanes lanes,
                                          const ScoreTeams& teams, const ScorePlace& place)
      : args(args),
        lanes(lanes),
        exists(place.exists),
        input(static_cast<const T*>(args.input) + place.index.offset(args.input_strides)),
        output(static_cast<T*>(args.output) + place.index.offset(args.output_strides)),
        lse(nullptr),
        scores(args.scores, teams, place.index) {
    if (args.lse != nullptr) lse = static_cast<A*>(args.lse) + place.index.offset(args.lse_strides);
    if (!exists) scores.range = {0, 0};
  }

  __device__ __forceinline__ void load(int64_t first) { scores.load(input, first, lanes, z); }

  template <class Body>
  __device__ __forceinline__ void for_each_vector(Body body) {
    cuda::for_each_vector(z, 0, body);
  }

  // An infinite element of logsumexp is the largest finite one with an infinite term: no difference of
  // infinities hides it, or a NaN beside it.
  static __device__ __forceinline__ A finite(A max) {
    constexpr A kLargest = sizeof(A) == 4 ? A(0x1.fffffep127) : A(0x1.fffffffffffffp1023);
    return op == ScoreOp::kLogSumExp && max == static_cast<A>(INFINITY) ? kLargest : max;
  }
  static __device__ __forceinline__ A term(A z, A shift) {
    if (op == ScoreOp::kLogSumExp && z == static_cast<A>(INFINITY)) return z;
    return P::exp(z - shift);
  }

  __device__ __forceinline__ State state(int64_t first) {
    const int size = exists ? size_of_chunk(args.shape.dim, first, items * lanes.lanes) : 0;
    A max = z[0];
    for_each_item<items>(lanes, size, [&](int i) { max = max_of(max, z[i]); });
    max = finite(warp_reduce<Max>(max, lanes.lanes));
    const A shift = shift_by(max);
    return {max, sum_of_items<items, A>(lanes, size, [&](int i) { return term(z[i], shift); })};
  }

  __device__ __forceinline__ State of_row(State state, bool leader) const {
    if (args.scores.has_sink()) {
      const A max = finite(scores.sink);
      state = combine(state, State{max, term(scores.sink, shift_by(max))});
    }
    if (leader && lse != nullptr) *lse = add_of(state.max, log_of(P::unscaled(state.sum)));
    return state;
  }

  __device__ __forceinline__ void store(State state, int64_t first, int) {
    if constexpr (op != ScoreOp::kLogSumExp) {
      constexpr Op kOp = static_cast<Op>(op);
      if (!exists) return;
      const Forward<kOp, A, P> formula(state.max, state.sum);
      const int size = size_of_chunk(args.shape.dim, first, items * lanes.lanes);
      const bool is_safe = args.scores.is_safe();
      constexpr A kLowest = -static_cast<A>(INFINITY);
      for_each_item<items>(lanes, size, [&](int i) {
        const bool is_dead = is_safe && z[i] == kLowest;
        z[i] = is_dead ? (op == ScoreOp::kSoftmax ? A(0) : kLowest) : formula.of(z[i]);
      });
      store_items(output + first, lanes, size, z);
    }
  }
};

// --- Backward ------------------------------------------------------------------------------------

// The formula of elements that are read as `output`; of logsumexp that is exp(z - lse).
template <ScoreOp op, class A, class T>
struct ScoreGradient : backward_t<static_cast<Op>(op), A, T> {};
template <class A, class T>
struct ScoreGradient<ScoreOp::kLogSumExp, A, T> {
  A grad;

  __device__ __forceinline__ A of(A, A output) const { return mul_of(grad, output); }
};

template <ScoreOp op, int items, class T>
struct ScoreBackward {
  using A = computed_t<T>;
  using State = SumState<A>;
  using Formula = ScoreGradient<op, A, T>;
  static constexpr bool kHasState = op != ScoreOp::kLogSumExp;
  static constexpr int kArrays = kHasState ? 2 : 1;
  static constexpr A kLowest = -static_cast<A>(INFINITY);

  const ScoreBackwardArgs& args;
  const ScoreTeams& teams;
  Lanes lanes;
  ScorePlace place;
  RowScores<A> scores;
  A grad[items];
  A y[items];  // of logsumexp, scores

  __device__ __forceinline__ ScoreBackward(const ScoreBackwardArgs& args, Lanes lanes,
                                           const ScoreTeams& teams, const ScorePlace& place)
      : args(args),
        teams(teams),
        lanes(lanes),
        place(place),
        scores(args.scores, teams, place.index) {
    if (!place.exists) scores.range = {0, 0};
  }

  template <class E>
  __device__ __forceinline__ E* at(void* data, const Strides& strides) const {
    return static_cast<E*>(data) + place.index.offset(strides);
  }
  template <class E>
  __device__ __forceinline__ const E* at(const void* data, const Strides& strides) const {
    return static_cast<const E*>(data) + place.index.offset(strides);
  }

  __device__ __forceinline__ void load(int64_t first) {
    if constexpr (op == ScoreOp::kLogSumExp) {
      scores.load(at<T>(args.input, args.input_strides), first, lanes, y);
    } else {
      const int room = items * lanes.lanes;
      int begin = 0, end = 0;
      scores.part_of_range(first, room, begin, end);
      with_width(lanes, [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        const Span span(lanes, begin, end);
        T of_grad[items], of_output[items];  // on their way at the same time
        load_span<kWidth>(at<T>(args.grad_output, args.grad_output_strides) + first, lanes, span, 0,
                          of_grad);
        load_span<kWidth>(at<T>(args.output, args.output_strides) + first, lanes, span, 0,
                          of_output);
#pragma unroll
        for (int i = 0; i < items; ++i) {
          grad[i] = from_element<A>(of_grad[i]);
          y[i] = from_element<A>(of_output[i]);
        }
      });
      fill_outside(lanes, begin, end, room, A(0), grad);
      fill_outside(lanes, begin, end, room, op == ScoreOp::kSoftmax ? A(0) : kLowest, y);
      if (op == ScoreOp::kLogSoftmax && args.scores.is_safe()) {
        for_each_item<items>(lanes, end, [&](int i) {
          if (y[i] == kLowest) grad[i] = A(0);
        });
      }
    }
  }

  template <class Body>
  __device__ __forceinline__ void for_each_vector(Body body) {
    cuda::for_each_vector(y, 0, body);
    constexpr int kVectors = items * static_cast<int>(sizeof(A)) / limits::kVectorBytes;
    if constexpr (kHasState) cuda::for_each_vector(grad, kVectors, body);
  }

  __device__ __forceinline__ State state(int64_t first) const {
    const int size = place.exists ? size_of_chunk(args.shape.dim, first, items * lanes.lanes) : 0;
    return {
        sum_of_items<items, A>(lanes, size, [&](int i) { return Formula::term(grad[i], y[i]); })};
  }

  __device__ __forceinline__ A grad_of_row() const {
    return from_element<A>(*at<T>(args.grad_output, args.grad_output_strides));
  }
  __device__ __forceinline__ A lse() const { return *at<A>(args.lse, args.row_strides); }

  __device__ __forceinline__ State of_row(State state, bool leader) const {
    if (leader && place.exists && args.grad_sink != nullptr) {
      const A share = scores.sink == kLowest ? A(0) : exp_of(scores.sink - lse());
      A of_share = -state.sum;
      if constexpr (op == ScoreOp::kLogSumExp) of_share = grad_of_row();
      *at<A>(args.grad_sink, args.row_strides) = mul_of(share, of_share);
    }
    return state;
  }

  // The gradients of a chunk: of its scores, of the mask, of what the scores are made of.
  __device__ __forceinline__ void store(State state, int64_t first, int number) {
    const int room = items * lanes.lanes;
    const int size = place.exists ? size_of_chunk(args.shape.dim, first, room) : 0;
    const auto for_each = [&](auto body) { for_each_item<items>(lanes, size, body); };
    Formula formula;
    if constexpr (op == ScoreOp::kLogSumExp) {
      formula.grad = place.exists ? grad_of_row() : A(0);
    } else {
      formula.sum = state.sum;
    }
    // What has no probability where something may take no part has no gradient.
    const bool is_safe = args.scores.is_safe();
    const A shift = op == ScoreOp::kLogSumExp && place.exists ? shift_by(lse()) : A(0);
    const auto differentiate = [&](A& dz, A output) {
      if constexpr (op == ScoreOp::kLogSumExp) {
        dz = formula.of(A(0), exp_of(output - shift));
      } else {
        const bool is_dead = is_safe && output == (op == ScoreOp::kSoftmax ? A(0) : kLowest);
        dz = is_dead ? A(0) : formula.of(dz, output);
      }
    };
    if constexpr (kDearExp<A> && op != ScoreOp::kSoftmax) {
      for_each_in_turns(differentiate, grad, y);
    } else {
      for_each([&](int i) { differentiate(grad[i], y[i]); });
    }
    int begin = 0, end = 0;
    scores.part_of_range(first, room, begin, end);
    fill_outside(lanes, begin, end, size, A(0), grad);
    if (args.grad_mask != nullptr) {
      A* const to =
          at<A>(args.grad_mask, args.grad_mask_strides) + place.part * teams.part_size + first;
      load_items(to, lanes, 0, place.is_first ? 0 : size, A(0), y);
      for_each([&](int i) { y[i] = add_of(y[i], grad[i]); });
      store_items(to, lanes, size, y);
    }
    const auto write_sum = [&](void* numbers, auto term) {
      const A sum = sum_of_items<items, A>(lanes, size, term);
      const int64_t row = place.index.offset(args.row_strides);
      if (lanes.lane == 0 && place.exists) {
        static_cast<A*>(numbers)[row * teams.chunks + number] = sum;
      }
    };
    if (args.grad_mask_of_rows != nullptr) {
      write_sum(args.grad_mask_of_rows, [&](int i) { return grad[i]; });
    }
    // Of what takes no part, the input may be anything.
    if (scores.softcap != A(0) || args.grad_scale != nullptr) {
      load_items(at<T>(args.input, args.input_strides) + first, lanes, begin, end, A(0), y);
      for_each([&](int i) {
        if (grad[i] == A(0)) y[i] = A(0);
      });
      if (scores.softcap != A(0)) {
        for_each_in_turns(
            [&](A& dz, A x) {
              const A t = tanh_of(mul_of(x, scores.to_tanh));
              dz = mul_of(dz, fma_of(-t, t, A(1)));
            },
            grad, y);
      }
      if (args.grad_scale != nullptr) {
        write_sum(args.grad_scale, [&](int i) { return mul_of(grad[i], y[i]); });
      }
    }
    for_each([&](int i) { grad[i] = mul_of(grad[i], scores.scale); });
    store_items(at<T>(args.grad_input, args.grad_input_strides) + first, lanes, size, grad);
  }
};

// --- Kernels -------------------------------------------------------------------------------------

// body(place) for the rows of a team, or of the lanes that share a short one.
template <class Body>
__device__ __forceinline__ void for_each_score_row(const ScoreTeams& teams, Body body) {
  for_each_row(teams, [&](int64_t item, bool exists) {
    int64_t row = item, rows = 1, part = 0;
    if (teams.sharing > 1) {
      part = item % teams.parts;
      row = item / teams.parts * teams.sharing + part * teams.each;
      rows = min(teams.each, teams.sharing - part * teams.each);
    }
#pragma unroll 1
    for (int64_t k = 0; k < teams.each; ++k) {
      const bool is_row = exists && k < rows;
      body(ScorePlace{teams.outer.index(is_row ? row + k : 0), is_row, k == 0, part});
    }
  });
}

// Row: ScoreForward or ScoreBackward.
template <class Row, class Args>
__device__ __forceinline__ void run_short_scores(const Args& args, const ScoreTeams& teams) {
  for_each_score_row(teams, [&](const ScorePlace& place) {
    const Lanes lanes{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), teams.width};
    Row row(args, lanes, teams, place);
    row.load(0);
    typename Row::State state{};
    if constexpr (Row::kHasState) state = row.state(0);
    state = row.of_row(state, lanes.lane == 0 && place.exists);
    row.store(state, 0, 0);
  });
}

template <class Row, class Args>
__device__ __forceinline__ void run_scores(const Args& args, const ScoreTeams& teams) {
  using A = typename Row::A;
  using State = typename Row::State;
  constexpr int kVectors = Row::kArrays * kChunkVectors<A>;
  const Sharing share = sharing(teams, kChunk<A>);
  SOFTMAX_EXT_DYNAMIC_SHARED(unsigned char, memory);
  const int state_bytes = teams.schedule == Schedule::kGrid
                              ? limits::kGridTerms * static_cast<int>(sizeof(A))
                              : static_cast<int>((2 * share.chunks * sizeof(State) + 15) / 16 * 16);
  // A thread's vectors of one chunk after another, side by side with those of the other threads.
  Vector* const kept = reinterpret_cast<Vector*>(memory + state_bytes) + threadIdx.x;
  SOFTMAX_EXT_STATIC_SHARED(uint64_t, barrier, 1);
  const Meeting meeting(teams, share, memory, barrier);
  const bool meets = Row::kHasState && teams.schedule != Schedule::kWarp;
  int turn = 0;
  bool is_first = true;
  for_each_score_row(teams, [&](const ScorePlace& place) {
    const Lanes lanes{static_cast<int>(threadIdx.x) % limits::kWarp, limits::kWarp, teams.width};
    Row row(args, lanes, teams, place);
    State state{};
    if (meets) meeting.template begin<State>(is_first, share.chunks);
    is_first = false;
    const int own = (share.chunks - share.warp + share.warps - 1) / share.warps;
    // There for the row's state, and back, which begins with the chunk that is still in registers.
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      const bool back = pass == 1;
#pragma unroll 1
      for (int k = 0; k < own; ++k) {
        const int kth = back ? own - 1 - k : k;
        const int number = share.warp + kth * share.warps;
        const int64_t first = int64_t{number} * kChunk<A>;
        Vector* const at = kept + kth * kVectors * blockDim.x;
        const bool keeps = teams.keep && kth < own - 1;
        if (!back || (k > 0 && !teams.keep)) row.load(first);
        if (keeps && back) {
          row.for_each_vector([&](int v, Vector& x) { x = load_words<4>(at + v * blockDim.x); });
        }
        if (back) {
          row.store(state, first, number);
        } else if constexpr (Row::kHasState) {
          state = row.state(first);
          if (meets) meeting.put(turn, number, state, share.chunks);
        }
        if (keeps && !back) {
          row.for_each_vector(
              [&](int v, Vector& x) { store_words<false>(at + v * blockDim.x, x); });
        }
      }
      if (back) break;
      if (meets) {
        state = meeting.template get<State>(turn, share.chunks);
        turn ^= 1;
      }
      state = row.of_row(state, share.warp == 0 && lanes.lane == 0 && place.exists);
    }
  });
}

template <class T>
constexpr int kScoreThreads =
    score_warps(sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32) * limits::kWarp;
template <class T>
constexpr int kScoreItems = kChunk<computed_t<T>> / limits::kWarp;

template <ScoreOp op, class T>
__global__ void __launch_bounds__(limits::kShortRowThreads, 1)
    short_scores_forward_kernel(ScoreForwardArgs args, ScoreTeams teams) {
  run_short_scores<ScoreForward<op, limits::kShortScoreItems, T>>(args, teams);
}

template <ScoreOp op, class T>
__global__ void __launch_bounds__(limits::kShortRowThreads, 1)
    short_scores_backward_kernel(ScoreBackwardArgs args, ScoreTeams teams) {
  run_short_scores<ScoreBackward<op, limits::kShortScoreItems, T>>(args, teams);
}

template <ScoreOp op, class T>
__global__ void __launch_bounds__(kScoreThreads<T>, 1)
    scores_forward_kernel(ScoreForwardArgs args, ScoreTeams teams) {
  run_scores<ScoreForward<op, kScoreItems<T>, T>>(args, teams);
}

template <ScoreOp op, class T>
__global__ void __launch_bounds__(kScoreThreads<T>, 1)
    scores_backward_kernel(ScoreBackwardArgs args, ScoreTeams teams) {
  run_scores<ScoreBackward<op, kScoreItems<T>, T>>(args, teams);
}

}  // namespace softmax_ext::cuda
