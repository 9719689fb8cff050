// Divergences of the softmaxes of two tensors on the CPU, compiled once for each instruction set as
// softmax_forward.cpp is. Rows are had chunk by chunk, twice: for max and sum of both, which are read from
// memory, then for what is summed of both, which are in cache. The chunks of fewer rows than threads are
// shared out.
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

template <class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE LogitState state_of(const T* x, int64_t n, double factor) {
  using V = Vec<A>;
  const A max = max_over_lanes(lane_max(x, n));
  const V shift = shift_of(V(max)), scale(static_cast<A>(factor));
  const V sum = fold(
      n, V(A(0)),
      [=](V sum, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        return sum + exp_of_nonpositive((load(x + i, lanes, kLowest<A>) - shift) * scale);
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

template <Divergence kind, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE TermSums terms_of(const DivergenceOptions& of, const DivergenceRow<A>& row,
                                     const T* x, const T* y, int64_t n) {
  using V = Vec<A>;
  const DivergenceRow<V> lanes_of_row = in_lanes(row);
  const V factor(static_cast<A>(of.factor)), beta(static_cast<A>(of.beta)), one(A(1));
  const Terms<V> terms = fold(
      n, Terms<V>{V(A(0)), V(A(0))},
      [=](Terms<V> sum, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        const auto [p, q, log_p, log_q] =
            elements_of<kind>(lanes_of_row, factor, beta, load(x + i, lanes, kLowest<A>),
                              load(y + i, lanes, kLowest<A>));
        if constexpr (kind == Divergence::kForward) {
          sum.teacher = sum.teacher + divergence_term<A>(p, q, log_p);
        } else if constexpr (kind == Divergence::kReverse) {
          sum.student = sum.student + divergence_term<A>(q, p, log_q);
        } else {
          const V m = fma_of(beta, p, (one - beta) * q);
          sum.teacher = sum.teacher + divergence_term<A>(p, m, log_p);
          sum.student = sum.student + divergence_term<A>(q, m, log_q);
        }
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
  const auto first_look = [&](int64_t row, int64_t k) {
    const int64_t n = std::min(chunk, dim - k * chunk);
    return PairState{state_of(teacher[row] + k * chunk, n, of.factor),
                     state_of(student[row] + k * chunk, n, of.factor)};
  };
  const auto combine_states = [&](const PairState* states) {
    PairState state = states[0];
    for (int64_t k = 1; k < chunks; ++k) {
      state = {combine(state.teacher, states[k].teacher, of.factor),
               combine(state.student, states[k].student, of.factor)};
    }
    return row_of<A>(state);
  };
  const auto second_look = [&](int64_t row, int64_t k) {
    const int64_t n = std::min(chunk, dim - k * chunk);
    return terms_of<kind>(of, kept[row], teacher[row] + k * chunk, student[row] + k * chunk, n);
  };
  const auto store_loss = [&](int64_t row, const TermSums* sums) {
    double p = 0, q = 0;
    for (int64_t k = 0; k < chunks; ++k) {
      p += sums[k].teacher;
      q += sums[k].student;
    }
    kept[row].teacher_kl = static_cast<A>(p);
    kept[row].student_kl = static_cast<A>(q);
    double loss = kind == Divergence::kBetween ? of.beta * p + (1 - of.beta) * q : p + q;
    if (of.weight != nullptr) loss *= static_cast<double>(static_cast<const A*>(of.weight)[row]);
    losses[row] = static_cast<A>(loss);
  };
  const auto leave_out = [&](int64_t row) {
    losses[row] = 0;
    kept[row] = {};
  };
  if (rows >= threads.count) {
    parallel_for(threads, rows, grain<A>(2 * dim), [&](int64_t begin, int64_t end) {
      const Buffer<PairState> states(chunks);
      const Buffer<TermSums> sums(chunks);
      for (int64_t row = begin; row < end; ++row) {
        if (is_left_out<A>(of, row)) {
          leave_out(row);
          continue;
        }
        for (int64_t k = 0; k < chunks; ++k) states.data()[k] = first_look(row, k);
        kept[row] = combine_states(states.data());
        for (int64_t k = 0; k < chunks; ++k) sums.data()[k] = second_look(row, k);
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
        if (!is_left_out<A>(of, t / chunks)) results[t] = look(t / chunks, t % chunks);
      }
    });
  };
  for_each_chunk(states.data(), first_look);
  for (int64_t row = 0; row < rows; ++row) {
    if (!is_left_out<A>(of, row)) kept[row] = combine_states(states.data() + row * chunks);
  }
  for_each_chunk(sums.data(), second_look);
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
