// The gradients of scores on the CPU, compiled once for each instruction set as softmax_forward.cpp is. With
// dz the gradient of softmax or log-softmax:
//
//   dz = g exp(z - lse) of logsumexp
//   dx = dz scale (1 - t^2), with t the tanh of a softcap
//   of a scale: sum(dz x (1 - t^2)) of a row; of a sink: -exp(sink - lse) sum(what dz has summed)
//   of a mask: dz, summed over the rows, or the elements of one, that share an element
//
// The schedules are those of scores_forward.cpp, and
//
//   owned tiles  of the mask, where its gradient is wanted: a thread has some rows of the mask, and goes through
//                all rows of the call that share them, in their order. Few tiles are had in parts of
//                these, as many as the shape asks for.
#include "dispatch.h"
#include "scores.h"

namespace softmax_ext::cpu {
namespace {

// The formulas of the gradient, of elements that are read as `output`.
template <ScoreOp op, class V>
struct ScoreBackward : Backward<static_cast<Op>(op), V> {};

template <class V>
struct ScoreBackward<ScoreOp::kLogSumExp, V> {
  V grad;

  SOFTMAX_EXT_INLINE V of(V, V output) const { return grad * output; }
};

template <class T, class A = compute_t<T>>
struct GradientRow {
  const T* grad;
  const T* output;  // null for logsumexp
  const T* input;   // null where it is not needed
  T* grad_input;
  A* grad_mask;  // to which dz is added, in whole registers; or null
  A* grad_mask_of_row;
  A* grad_scale;
  A* grad_sink;
  A lse;
  RowScores<A> scores;
};

// What is summed in a chunk as its gradients are stored.
struct Stored {
  double of_scale = 0, of_mask = 0;

  SOFTMAX_EXT_INLINE void add(Stored other) {
    of_scale += other.of_scale;
    of_mask += other.of_mask;
  }
};

// Some rows of a call.
template <class T, class A = compute_t<T>>
class GradientRows {
 public:
  GradientRows(const ScoreBackwardArgs& args, const Place& place)
      : grads_(place.operator()<T>(args.grad_output, args.grad_output_strides)),
        outputs_(place.operator()<T>(args.output, args.output_strides)),
        inputs_(place.operator()<T>(args.input, args.input_strides)),
        grad_inputs_(place.operator()<T>(args.grad_input, args.grad_input_strides)),
        grad_masks_(place.operator()<A>(args.grad_mask_of_rows, args.row_strides)),
        grad_scales_(place.operator()<A>(args.grad_scale, args.row_strides)),
        grad_sinks_(place.operator()<A>(args.grad_sink, args.row_strides)),
        lse_(place.operator()<A>(args.lse, args.row_strides)),
        scores_(args.scores, place, args.shape.dim) {}

  // terms: what dz is added to, of the first row; or null.
  void add_to(A* terms, int64_t next) { terms_ = {terms, next}; }

  SOFTMAX_EXT_INLINE GradientRow<T> operator[](int64_t k) const {
    return {grads_[k],       outputs_[k],    inputs_[k],
            grad_inputs_[k], terms_[k],      grad_masks_[k],
            grad_scales_[k], grad_sinks_[k], lse_.first == nullptr ? A(0) : *lse_[k],
            scores_[k]};
  }

 private:
  Few<A> terms_{nullptr, 0};
  Few<const T> grads_, outputs_, inputs_;
  Few<T> grad_inputs_;
  Few<A> grad_masks_, grad_scales_, grad_sinks_;
  Few<const A> lse_;
  ScoresOfRows<A> scores_;
};

// What a row's gradient needs summed, of the n elements from `first` on, lane by lane.
template <ScoreOp op, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Vec<A> sum_of_terms(const GradientRow<T>& row, int64_t first, int64_t n,
                                       bool is_safe) {
  using V = Vec<A>;
  const T* const grad = row.grad + first;
  const T* const y = row.output + first;
  V sums[kSums] = {V(A(0)), V(A(0)), V(A(0)), V(A(0))};
  const auto add = [&](int64_t i, int64_t k, auto lanes) SOFTMAX_EXT_LAMBDA {
    const V output = load(y + i, lanes, A(0));
    V term = ScoreBackward<op, V>::term(load(grad + i, lanes, A(0)), output);
    if (op == ScoreOp::kLogSoftmax && is_safe) term = zero_where_lowest(term, output);
    sums[k] = sums[k] + term;
  };
  for_each_register(Registers<A>(within(row.scores.range, first, n)),
                    [&](int64_t i, int64_t k) SOFTMAX_EXT_LAMBDA {
                      if (i + V::kSize <= n) {
                        add(i, k, All{});
                      } else {
                        add(i, k, First{n - i});
                      }
                    });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// value, or 0 where dz is that: of what takes no part, the input may be anything.
template <class V>
SOFTMAX_EXT_INLINE V unless_zero(V dz, V value) {
  return dz.raw == typename V::Raw{} ? dz.raw : value.raw;
}

// Stores the gradients of the n elements from `first` on, at most a chunk. sum: of the row's terms. kMore: as
// wants_more.
template <ScoreOp op, bool kMore, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE Stored store_gradients(bool streamed, const GradientRow<T>& row, int64_t first,
                                          int64_t n, A sum, bool is_safe) {
  using V = Vec<A>;
  constexpr bool kOfLse = op == ScoreOp::kLogSumExp;
  const Range range = within(row.scores.range, first, n);
  alignas(64) A scratch[kOfLse ? kChunk<A> + 2 * V::kSize : 1];
  if constexpr (kOfLse) place_scores(row.input, scratch, first, n, row.scores);
  const A* const z = scratch;
  const V lse = shift_of(V(row.lse));
  const ScoreBackward<op, V> formula{V(kOfLse ? static_cast<A>(to_float(*row.grad)) : sum)};
  const V scale(row.scores.scale), softcap(row.scores.softcap);
  const bool has_softcap = row.scores.softcap != 0, sums_mask = row.grad_mask_of_row != nullptr;
  const V inverse(has_softcap ? A(1) / row.scores.softcap : A(0));
  V sums[2] = {V(A(0)), V(A(0))};
  V* const of_scale = sums;
  V* const of_mask = sums + 1;
  const T* const grad = kOfLse ? nullptr : row.grad + first;
  const T* const y = kOfLse ? nullptr : row.output + first;
  const bool needs_input = has_softcap || row.grad_scale != nullptr;
  const T* const x = kMore && needs_input ? row.input + first : nullptr;
  A* const grad_mask = row.grad_mask == nullptr ? nullptr : row.grad_mask + first;
  store_chunk(streamed, row.grad_input + first, n, Registers<A>(range), A(0),
              [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
                V dz;
                if constexpr (kOfLse) {
                  dz = formula.of(V(), exp_of_nonpositive(load(z + i, All{}, A(0)) - lse));
                  dz = filled(dz, lanes, A(0));
                } else {
                  const V output = load(y + i, lanes, A(0));
                  dz = formula.of(load(grad + i, lanes, A(0)), output);
                  if (op == ScoreOp::kLogSoftmax && is_safe) dz = zero_where_lowest(dz, output);
                }
                if (grad_mask != nullptr) {
                  const V terms = load(grad_mask + i, All{}, A(0));
                  store(grad_mask + i, All{}, terms + filled(dz, lanes, A(0)));
                }
                if constexpr (kMore) {
                  if (sums_mask) *of_mask = *of_mask + filled(dz, lanes, A(0));
                  if (x != nullptr) {
                    const V input = load(x + i, lanes, A(0));
                    if (has_softcap) {
                      const V t = capped_of(input * scale, softcap, inverse) * inverse;
                      dz = unless_zero(dz, dz * (V(A(1)) - t * t));
                    }
                    *of_scale = *of_scale + unless_zero(dz, dz * input);
                  }
                }
                return dz * scale;
              });
  if constexpr (!kMore) return {};
  return {exact_sum_over_lanes(sums[0]), exact_sum_over_lanes(sums[1])};
}

// Whether more is wanted than dx and what is added to a mask's gradient, or it takes the input.
inline bool wants_more(const ScoreBackwardArgs& args) {
  return args.scores.softcap != 0 || args.grad_scale != nullptr || args.grad_sink != nullptr ||
         args.grad_mask_of_rows != nullptr;
}

// What a row has one of.
template <ScoreOp op, class T, class A>
SOFTMAX_EXT_INLINE void store_of_row(const GradientRow<T>& row, A sum, Stored stored) {
  if (row.grad_scale != nullptr) *row.grad_scale = static_cast<A>(stored.of_scale);
  if (row.grad_mask_of_row != nullptr) *row.grad_mask_of_row = static_cast<A>(stored.of_mask);
  if (row.grad_sink != nullptr) {
    const A share = row.scores.sink == kLowest<A> ? A(0) : std::exp(row.scores.sink - row.lse);
    const A of_share = op == ScoreOp::kLogSumExp ? static_cast<A>(to_float(*row.grad)) : -sum;
    *row.grad_sink = share * of_share;
  }
}

// `count` rows from `begin` on, of at most a chunk, or one.
template <ScoreOp op, bool kMore, class T>
void score_gradients_of_rows(const ScoreBackwardArgs& args, const GradientRows<T>& rows,
                             int64_t begin, int64_t count, bool streamed) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const int64_t dim = args.shape.dim;
  const bool is_safe = args.scores.is_safe();
  alignas(64) A sums[V::kSize] = {};
  if constexpr (op != ScoreOp::kLogSumExp) {
    if (dim <= kChunk<A>) {
      V lanes[V::kSize];
      for (int64_t r = 0; r < count; ++r) {
        lanes[r] = sum_of_terms<op>(rows[begin + r], 0, dim, is_safe);
      }
      rounded_sum_over_lanes(lanes, count, sums);
    } else {
      double sum = 0;
      for (int64_t i = 0; i < dim; i += kChunk<A>) {
        sum += exact_sum_over_lanes(
            sum_of_terms<op>(rows[begin], i, std::min(kChunk<A>, dim - i), is_safe));
      }
      sums[0] = static_cast<A>(sum);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const GradientRow<T> row = rows[begin + r];
    Stored stored;
    for (int64_t i = 0; i < dim; i += kChunk<A>) {
      stored.add(store_gradients<op, kMore>(streamed, row, i, std::min(kChunk<A>, dim - i), sums[r],
                                            is_safe));
    }
    if constexpr (kMore) store_of_row<op>(row, sums[r], stored);
  }
}

// Rows that are worked on together.
template <class A>
constexpr int64_t few_rows(int64_t dim) {
  return std::clamp<int64_t>(kChunk<A> / 4 / dim, 1, Vec<A>::kSize);
}

template <ScoreOp op, class T>
void score_gradients_of_long_rows(const ScoreBackwardArgs& args, const Threads& threads,
                                  bool streamed) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim, chunks = ceil_div(dim, kChunk<A>);
  const bool is_safe = args.scores.is_safe();
  const auto row_of = [&](int64_t row) {
    int64_t index[Dims::kMax];
    return GradientRows<T>(args, place_of(args.dims, row, index))[0];
  };
  const bool has_more = wants_more(args);
  const Buffer<Stored> stored(has_more ? args.shape.rows() * chunks : 1);
  const Buffer<A> sums(args.shape.rows());
  reduce_and_store<Sum, A>(
      args.shape.rows(), dim, Unplaced{}, threads,
      [&](int64_t row, int64_t i, int64_t n) {
        if constexpr (op == ScoreOp::kLogSumExp) {
          return Sum{0};
        } else {
          return Sum{exact_sum_over_lanes(sum_of_terms<op>(row_of(row), i, n, is_safe))};
        }
      },
      [&](int64_t row, int64_t i, int64_t n, Sum, Sum of_row) {
        const A sum = static_cast<A>(of_row.sum);
        const Stored of_chunk =
            store_gradients<op, true>(streamed, row_of(row), i, n, sum, is_safe);
        if (has_more) stored.data()[row * chunks + i / kChunk<A>] = of_chunk;
        if (i == 0) sums.data()[row] = sum;
      });
  for (int64_t row = 0; has_more && row < args.shape.rows(); ++row) {
    Stored of_row;
    for (int64_t k = 0; k < chunks; ++k) of_row.add(stored.data()[row * chunks + k]);
    store_of_row<op>(row_of(row), sums.data()[row], of_row);
  }
}

template <ScoreOp op, bool kMore, class T>
void score_gradients_with_mask(const ScoreBackwardArgs& args, const Threads& threads,
                               bool streamed) {
  using A = compute_t<T>;
  // So many terms of an element's sum are added to each other before they are to the rest.
  constexpr int64_t kTerms = 32;
  // Enough for most numbers of threads, of shapes that have so many.
  constexpr int64_t kItems = 32;
  // Of terms, bytes at home in the second-level cache: the longer a tile, the longer the stretches of the
  // other tensors.
  constexpr int64_t kTile = int64_t{1} << 16;
  const Dims& dims = args.dims;
  const int64_t dim = args.shape.dim;
  int owned[Dims::kMax], shared[Dims::kMax], owned_dims = 0, shared_dims = 0;
  int64_t rows = 1, sharing = 1;
  for (int k = 0; k < dims.outer; ++k) {
    if (args.grad_mask_strides.of[k] != 0) {
      owned[owned_dims++] = k;
      rows *= dims.sizes[k];
    } else {
      shared[shared_dims++] = k;
      sharing *= dims.sizes[k];
    }
  }
  const auto set_index = [&](int64_t* index, const int* which, int count, int64_t i) {
    for (int k = count; k-- > 0; i /= dims.sizes[which[k]]) {
      index[which[k]] = i % dims.sizes[which[k]];
    }
  };
  const int64_t few = few_rows<A>(dim), apart = round_up(dim, Vec<A>::kSize);
  const int64_t most_parts = std::min(kItems, ceil_div(sharing, 2 * kTerms));
  const int64_t fit = kTile / static_cast<int64_t>(sizeof(A)) / apart;
  const int64_t tile =
      std::clamp<int64_t>(ceil_div(rows * most_parts, kItems), 1, std::max<int64_t>(fit, 1));
  const int64_t tiles = ceil_div(rows, tile);
  const int64_t parts = std::clamp<int64_t>(kItems / tiles, 1, most_parts);
  const int64_t along = owned_dims == 0 ? 0 : owned[owned_dims - 1];
  const int64_t run = owned_dims == 0 ? 1 : dims.sizes[along];
  A* const result = static_cast<A*>(args.grad_mask);
  const Buffer<A> of_parts(std::max<int64_t>(1, (parts - 1) * rows * dim));
  parallel_for(threads, tiles * parts, /*grain=*/1, [&](int64_t begin, int64_t end) {
    // With room for what the last row's registers may be beyond it.
    const Buffer<A> terms(tile * apart + Vec<A>::kSize);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % parts, first = item / parts * tile;
      const int64_t last = std::min(first + tile, rows);
      A* const sums =
          (part == 0 ? result : of_parts.data() + (part - 1) * rows * dim) + first * dim;
      std::fill_n(sums, (last - first) * dim, A(0));
      std::fill_n(terms.data(), tile * apart + Vec<A>::kSize, A(0));
      const int64_t share_begin = sharing * part / parts;
      const int64_t share_end = sharing * (part + 1) / parts;
      for (int64_t b = share_begin; b < share_end; ++b) {
        int64_t index[Dims::kMax] = {};
        set_index(index, shared, shared_dims, b);
        for (int64_t row = first; row < last;) {
          set_index(index, owned, owned_dims, row);
          const int64_t left = std::min(last - row, run - row % run);
          const int64_t count = std::min(few, left);
          GradientRows<T> of_run(args, Place{&dims, index, static_cast<int>(along)});
          of_run.add_to(terms.data() + (row - first) * apart, apart);
          score_gradients_of_rows<op, kMore>(args, of_run, 0, count, streamed);
          row += count;
        }
        if ((b - share_begin + 1) % kTerms == 0 || b + 1 == share_end) {
          for (int64_t row = 0; row < last - first; ++row) {
            A* const to = sums + row * dim;
            const A* const from = terms.data() + row * apart;
            for_each_vector<Vec<A>::kSize>(dim, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
              store(to + i, lanes, load(to + i, lanes, A(0)) + load(from + i, All{}, A(0)));
            });
          }
          std::fill_n(terms.data(), tile * apart, A(0));
        }
      }
    }
  });
  if (parts == 1) return;
  parallel_for(threads, rows, grain<A>(parts * dim), [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part) {
      const A* const more = of_parts.data() + (part - 1) * rows * dim;
      for (int64_t i = begin * dim; i < end * dim; ++i) result[i] += more[i];
    }
  });
}

template <ScoreOp op, bool kMore, class T>
void score_gradients(const ScoreBackwardArgs& args, const Threads& threads, bool streamed) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim;
  if (args.grad_mask != nullptr) {
    return score_gradients_with_mask<op, kMore, T>(args, threads, streamed);
  }
  const int64_t few = few_rows<A>(dim);
  for_each_place<A>(args.shape, args.dims, few,
                    {&args.grad_output_strides, &args.output_strides, &args.grad_input_strides},
                    threads, [&](const Place& place, int64_t size) {
                      const GradientRows<T> rows(args, place);
                      for (int64_t r = 0; r < size; r += few) {
                        score_gradients_of_rows<op, kMore>(args, rows, r, std::min(few, size - r),
                                                           streamed);
                      }
                    });
}

template <ScoreOp op>
void launch_score_backward(const ScoreBackwardArgs& args, const Threads& threads) {
  const bool streamed = is_streamed(args.shape, args.dims, args.grad_input_strides, args.grad_input,
                                    args.grad_input_dtype, args.grad_input_is_new);
  visit(args.output_dtype, [&](auto element) {
    using T = decltype(element);
    if (args.grad_mask == nullptr && args.shape.dim > kChunk<compute_t<T>>) {
      return score_gradients_of_long_rows<op, T>(args, threads, streamed);
    }
    // Of logsumexp, the scores are made again: beside that, the sums cost little.
    if constexpr (op != ScoreOp::kLogSumExp) {
      if (!wants_more(args)) return score_gradients<op, false, T>(args, threads, streamed);
    }
    score_gradients<op, true, T>(args, threads, streamed);
  });
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_score_backward)(const ScoreBackwardArgs& args,
                                               const Threads& threads) {
  if (args.output == nullptr) return launch_score_backward<ScoreOp::kLogSumExp>(args, threads);
  args.op == Op::kSoftmax ? launch_score_backward<ScoreOp::kSoftmax>(args, threads)
                          : launch_score_backward<ScoreOp::kLogSoftmax>(args, threads);
}

}  // namespace softmax_ext::cpu
