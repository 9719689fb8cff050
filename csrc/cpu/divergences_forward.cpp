// Divergences of the softmaxes of two tensors on the CPU, compiled once for each instruction set as
// softmax_forward.cpp is. Rows are had chunk by chunk, twice: for max and sum of both, which are read from
// memory, then for what is summed of both, which are in cache, as the exps of the first look are of rows that
// are not too long. The chunks of fewer rows than threads are shared out.
#include "dispatch.h"
#include "divergences.h"
#include "rows.h"

namespace softmax_ext::cpu {
namespace {

struct LogitState {
  double max, sum;  // of exp((x - max) factor)
};

SOFTMAX_EXT_INLINE LogitState combine(LogitState a, LogitState b, double factor) {
  const double max = softmax_ext::max_of(a.max, b.max), shift = shift_by(max);
  return {max, a.sum * softmax_ext::exp_of((a.max - shift) * factor) +
                   b.sum * softmax_ext::exp_of((b.max - shift) * factor)};
}

// The exps are left in `kept`, unless that is null.
template <class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE LogitState state_of(const T* x, int64_t n, double factor, A* kept) {
  using V = Vec<A>;
  const A max = max_over_lanes(lane_max(x, n));
  const V shift = shift_of(V(max)), scale(static_cast<A>(factor));
  const V sum = fold(
      n, V(A(0)),
      [=](V sum, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        const V e = exp_of_nonpositive((load(x + i, lanes, kLowest<A>) - shift) * scale);
        if (kept != nullptr) store(kept + i, lanes, e);
        return sum + e;
      },
      Add{});
  return {static_cast<double>(max), exact_sum_over_lanes(sum)};
}

struct PairState {
  LogitState teacher, student;
};

template <class A>
DivergenceRow<A> row_of(PairState state) {
  const auto share = [](LogitState of) { return static_cast<A>(1 / of.sum); };
  const auto max = [](LogitState of) { return static_cast<A>(shift_by(of.max)); };
  const auto& [teacher, student] = state;
  return {max(teacher),
          share(teacher),
          max(student),
          share(student),
          static_cast<A>(softmax_ext::log_of(teacher.sum) - softmax_ext::log_of(student.sum)),
          A(0),
          A(0)};
}

template <class V>
struct Terms {
  static constexpr int kSize = V::kSize;
  V teacher, student;

  friend SOFTMAX_EXT_INLINE Terms operator+(Terms a, Terms b) {
    return {a.teacher + b.teacher, a.student + b.student};
  }
};

struct TermSums {
  double teacher, student;
};

// A chunk of one of the two rows.
template <class T, class A = compute_t<T>>
struct LogitChunk {
  const T* logits;
  const A* exps;  // of the first look, or null
  double max;

  // Of element i, which is x: its exp of the first look times `share`, as share_of has it.
  template <class V, class Lanes>
  SOFTMAX_EXT_INLINE V probability(int64_t i, Lanes lanes, V x, V factor, V share) const {
    if (exps != nullptr) return load(exps + i, lanes, A(0)) * share;
    return exp_of_nonpositive((x - shift_of(V(static_cast<A>(max)))) * factor) * share;
  }
  // 0 where all of the chunk is -inf.
  Vec<A> share_of(A max_of_row, A share_of_row, double factor) const {
    const double below = (max - static_cast<double>(max_of_row)) * factor;
    return Vec<A>(share_of_row * static_cast<A>(softmax_ext::exp_of(below)));
  }
};

template <Divergence kind, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE TermSums terms_of(const DivergenceOptions& of, const DivergenceRow<A>& row,
                                     const LogitChunk<T>& teacher, const LogitChunk<T>& student,
                                     int64_t n) {
  using V = Vec<A>;
  const DivergenceRow<V> lanes_of_row = in_lanes(row);
  const V factor(static_cast<A>(of.factor)), beta(static_cast<A>(of.beta));
  const V of_teacher = teacher.share_of(row.teacher_max, row.teacher_share, of.factor);
  const V of_student = student.share_of(row.student_max, row.student_share, of.factor);
  const Terms<V> terms = fold(
      n, Terms<V>{V(A(0)), V(A(0))},
      [=](Terms<V> sum, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        const V x = load(teacher.logits + i, lanes, kLowest<A>);
        const V y = load(student.logits + i, lanes, kLowest<A>);
        const auto elements =
            elements_of<kind>(lanes_of_row, beta, (x - lanes_of_row.teacher_max) * factor,
                              (y - lanes_of_row.student_max) * factor,
                              teacher.probability(i, lanes, x, factor, of_teacher),
                              student.probability(i, lanes, y, factor, of_student));
        add_terms<kind, A>(elements, beta, sum.teacher, sum.student);
        return sum;
      },
      Add{});
  return {exact_sum_over_lanes(terms.teacher), exact_sum_over_lanes(terms.student)};
}

template <Divergence kind, class T>
void divergence_of_rows(const DivergenceForwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  const DivergenceOptions& of = args.of;
  const int64_t rows = args.shape.rows(), dim = args.shape.dim, chunk = kChunk<A>;
  const int64_t chunks = ceil_div(dim, chunk);
  const Slices<const T> teacher(args.dims, args.teacher_strides,
                                static_cast<const T*>(args.teacher));
  const Slices<const T> student(args.dims, args.student_strides,
                                static_cast<const T*>(args.student));
  A* const losses = static_cast<A*>(args.row_loss);
  auto* const kept = static_cast<DivergenceRow<A>*>(args.kept);
  // exps: of both rows, one behind the other; or null.
  const auto first_look = [&](int64_t row, int64_t k, A* exps) {
    const int64_t i = k * chunk, n = std::min(chunk, dim - i);
    A* const of_teacher = exps == nullptr ? nullptr : exps + i;
    A* const of_student = exps == nullptr ? nullptr : exps + dim + i;
    return PairState{state_of(teacher[row] + i, n, of.factor, of_teacher),
                     state_of(student[row] + i, n, of.factor, of_student)};
  };
  const auto combine_states = [&](const PairState* states) {
    PairState state = states[0];
    for (int64_t k = 1; k < chunks; ++k) {
      state = {combine(state.teacher, states[k].teacher, of.factor),
               combine(state.student, states[k].student, of.factor)};
    }
    return row_of<A>(state);
  };
  const auto second_look = [&](int64_t row, int64_t k, const PairState& state, const A* exps) {
    const int64_t i = k * chunk, n = std::min(chunk, dim - i);
    const A* const of_teacher = exps == nullptr ? nullptr : exps + i;
    const A* const of_student = exps == nullptr ? nullptr : exps + dim + i;
    return terms_of<kind>(of, kept[row],
                          LogitChunk<T>{teacher[row] + i, of_teacher, state.teacher.max},
                          LogitChunk<T>{student[row] + i, of_student, state.student.max}, n);
  };
  const auto store_loss = [&](int64_t row, const TermSums* sums) {
    double p = 0, q = 0;
    for (int64_t k = 0; k < chunks; ++k) {
      p += sums[k].teacher;
      q += sums[k].student;
    }
    kept[row].teacher_kl = static_cast<A>(p);
    kept[row].student_kl = static_cast<A>(q);
    double loss = divergence_loss(of.beta, p, q);
    if (of.weight != nullptr) loss *= static_cast<double>(static_cast<const A*>(of.weight)[row]);
    losses[row] = static_cast<A>(loss);
  };
  const auto leave_out = [&](int64_t row) {
    losses[row] = 0;
    kept[row] = {};
  };
  if (rows >= threads.count) {
    const bool keeps = 2 * dim * static_cast<int64_t>(sizeof(A)) <= kKeptRow;
    parallel_for(threads, rows, grain<A>(2 * dim), [&](int64_t begin, int64_t end) {
      const Buffer<A> buffer(keeps ? 2 * dim : 1);
      A* const exps = keeps ? buffer.data() : nullptr;
      const Buffer<PairState> states(chunks);
      const Buffer<TermSums> sums(chunks);
      for (int64_t row = begin; row < end; ++row) {
        if (is_left_out<A>(of, row)) {
          leave_out(row);
          continue;
        }
        for (int64_t k = 0; k < chunks; ++k) states.data()[k] = first_look(row, k, exps);
        kept[row] = combine_states(states.data());
        for (int64_t k = 0; k < chunks; ++k) {
          sums.data()[k] = second_look(row, k, states.data()[k], exps);
        }
        store_loss(row, sums.data());
      }
    });
    return;
  }
  const Buffer<PairState> states(rows * chunks);
  const Buffer<TermSums> sums(rows * chunks);
  const auto for_each_chunk = [&](auto* results, auto look) {
    parallel_for(threads, rows * chunks, grain<A>(2 * chunk), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (!is_left_out<A>(of, t / chunks)) results[t] = look(t);
      }
    });
  };
  for_each_chunk(states.data(),
                 [&](int64_t t) { return first_look(t / chunks, t % chunks, nullptr); });
  for (int64_t row = 0; row < rows; ++row) {
    if (!is_left_out<A>(of, row)) kept[row] = combine_states(states.data() + row * chunks);
  }
  for_each_chunk(sums.data(), [&](int64_t t) {
    return second_look(t / chunks, t % chunks, states.data()[t], nullptr);
  });
  for (int64_t row = 0; row < rows; ++row) {
    is_left_out<A>(of, row) ? leave_out(row) : store_loss(row, sums.data() + row * chunks);
  }
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_divergence_forward)(const DivergenceForwardArgs& args,
                                                   const Threads& threads) {
  visit(args.dtype, [&](auto element) {
    visit(divergence_of(args.of.beta),
          [&](auto kind) { divergence_of_rows<kind(), decltype(element)>(args, threads); });
  });
}

}  // namespace softmax_ext::cpu
