// Divergences of two softmaxes (softmax_ext/divergences.h), and their gradients: by the threads that
// loss_kernels.cuh gives a row. Forward, they read both of its rows twice: for max and sum of both, then for
// what is summed of both. Backward, both are read once and each gradient is written once, of a long row by
// several blocks.
#pragma once

#include "loss_kernels.cuh"
#include "softmax_ext/divergences.h"

namespace softmax_ext::cuda {

// Of some elements of a row of logits.
template <class A>
struct LogitState {
  A max, sum;  // of exp((x - max) factor)

  __device__ __forceinline__ void raise(A larger, A factor) {
    if (larger == max) return;
    sum = mul_of(sum, exp_of(mul_of(max - shift_by(larger), factor)));
    max = larger;
  }
  // Of logits, -infinity where there is none.
  template <int items>
  __device__ __forceinline__ void add(A (&x)[items], A factor) {
    A larger = max;
#pragma unroll
    for (const A of : x) larger = max_of(larger, of);
    raise(larger, factor);
    const A shift = shift_by(max);
    for_each_in_turns([&](A of) { sum = add_of(sum, exp_of(mul_of(of - shift, factor))); }, x);
  }
  __device__ __forceinline__ void reduce(int lanes, A factor) {
    raise(warp_reduce<Max>(max, lanes), factor);
    sum = warp_reduce<Sum>(sum, lanes);
  }
};

// Of both rows.
template <class A>
struct LogitStates {
  A factor;
  LogitState<A> teacher, student;

  __device__ __forceinline__ LogitStates empty() const {
    constexpr A kLowest = -static_cast<A>(INFINITY);
    return {factor, {kLowest, A(0)}, {kLowest, A(0)}};
  }
  __device__ __forceinline__ void reduce(int lanes) {
    teacher.reduce(lanes, factor);
    student.reduce(lanes, factor);
  }
  __device__ __forceinline__ DivergenceRow<A> row() const {
    return {shift_by(teacher.max),
            A(1) / teacher.sum,
            shift_by(student.max),
            A(1) / student.sum,
            log_of(teacher.sum) - log_of(student.sum),
            A(0),
            A(0)};
  }
};

// KL(p || m) and KL(q || m).
template <class A>
struct TermSums {
  A teacher, student;

  static __device__ __forceinline__ TermSums empty() { return {A(0), A(0)}; }
  __device__ __forceinline__ void reduce(int lanes) {
    teacher = warp_reduce<Sum>(teacher, lanes);
    student = warp_reduce<Sum>(student, lanes);
  }
};

// What a thread has of a call: body(first, size, width, x, y), with the teacher's and the student's logits of a
// batch.
template <class T, class Args>
struct PairOfRows {
  using A = computed_t<T>;
  const Args& args;
  const LossSharing& sharing;
  LossPlace place;
  const T *teacher, *student;
  A factor, beta;
  A weight;  // 0: the row is not read

  __device__ __forceinline__ PairOfRows(const Args& args, const LossSharing& sharing)
      : args(args),
        sharing(sharing),
        place(sharing),
        teacher(place.in(static_cast<const T*>(args.teacher), args.teacher_strides)),
        student(place.in(static_cast<const T*>(args.student), args.student_strides)),
        factor(static_cast<A>(args.of.factor)),
        beta(static_cast<A>(args.of.beta)),
        weight(args.of.weight == nullptr ? A(1)
                                         : static_cast<const A*>(args.of.weight)[place.row]) {}

  template <class Body>
  __device__ __forceinline__ void for_each_batch(Body body) const {
    constexpr A kLowest = -static_cast<A>(INFINITY);
    cuda::for_each_batch<kLossPairItems<A>>(
        sharing, place, args.shape.dim, [&](int64_t first, int size, auto width) {
          constexpr int kWidth = decltype(width)::value;
          A x[kLossPairItems<A>], y[kLossPairItems<A>];
          load_batch<kWidth>(teacher, 1, first, place.lanes, size, kLowest, x);
          load_batch<kWidth>(student, 1, first, place.lanes, size, kLowest, y);
          body(first, size, width, x, y);
        });
  }
  template <Divergence kind>
  __device__ __forceinline__ DivergenceElements<A> elements(const DivergenceRow<A>& row, A x,
                                                            A y) const {
    const A a = (x - row.teacher_max) * factor, b = (y - row.student_max) * factor;
    return elements_of<kind>(row, beta, a, b, exp_of(a) * row.teacher_share,
                             exp_of(b) * row.student_share);
  }
};

// body(kind) with it as a constant.
template <class Body>
__device__ __forceinline__ void with_kind(double beta, Body body) {
  switch (divergence_of(beta)) {
    case Divergence::kForward:
      return body(std::integral_constant<Divergence, Divergence::kForward>());
    case Divergence::kReverse:
      return body(std::integral_constant<Divergence, Divergence::kReverse>());
    case Divergence::kBetween:
      return body(std::integral_constant<Divergence, Divergence::kBetween>());
  }
}

// One block fewer of an SM than elsewhere: more have too few registers for the logarithms of m.
template <class T>
__global__ void __launch_bounds__(limits::kLossThreads, kLossBlocks<T> - 1)
    divergence_forward_kernel(DivergenceForwardArgs args, LossSharing sharing) {
  using A = computed_t<T>;
  const PairOfRows<T, DivergenceForwardArgs> rows(args, sharing);
  const LossPlace& place = rows.place;
  const Lanes lanes = place.lanes;
  const bool is_read = place.exists && rows.weight != A(0);
  LogitStates<A> states = LogitStates<A>{rows.factor, {}, {}}.empty();
  if (is_read) {
    rows.for_each_batch([&](int64_t, int, auto, auto& x, auto& y) {
      states.teacher.add(x, rows.factor);
      states.student.add(y, rows.factor);
    });
  }
  reduce_row(lanes, states);
  DivergenceRow<A> row = states.row();
  TermSums<A> sums = TermSums<A>::empty();
  if (is_read) {
    with_kind(args.of.beta, [&](auto kind) {
      constexpr Divergence kKind = decltype(kind)::value;
      rows.for_each_batch([&](int64_t, int, auto, auto& x, auto& y) {
        const auto add = [&](A of_teacher, A of_student) {
          const auto elements = rows.template elements<kKind>(row, of_teacher, of_student);
          add_terms<kKind, A>(elements, rows.beta, sums.teacher, sums.student);
        };
        for_each_in_turns(add, x, y);
      });
    });
  }
  reduce_row(lanes, sums);
  if (lanes.lane != 0 || !place.exists) return;
  row.teacher_kl = sums.teacher;
  row.student_kl = sums.student;
  const A loss = divergence_loss(args.of.beta, sums.teacher, sums.student);
  static_cast<A*>(args.row_loss)[place.row] = is_read ? mul_of(loss, rows.weight) : A(0);
  static_cast<DivergenceRow<A>*>(args.kept)[place.row] = is_read ? row : DivergenceRow<A>{};
}

template <class T>
__global__ void __launch_bounds__(limits::kLossThreads, kLossBlocks<T>)
    divergence_backward_kernel(DivergenceBackwardArgs args, LossSharing sharing) {
  using A = computed_t<T>;
  const PairOfRows<T, DivergenceBackwardArgs> rows(args, sharing);
  const LossPlace& place = rows.place;
  if (!place.exists) return;
  const int64_t begin = place.row * args.shape.dim;
  const auto gradient = [&](void* of) {
    return of == nullptr ? nullptr : static_cast<T*>(of) + begin;
  };
  T *const grad_teacher = gradient(args.grad_teacher), *const grad_student =
                                                           gradient(args.grad_student);
  const auto store = [&](T* grad, int64_t first, int size, auto width, const auto& dx) {
    if (grad != nullptr) {
      store_batch<decltype(width)::value>(grad, 1, first, place.lanes, size, dx);
    }
  };
  if (rows.weight == A(0)) {
    const A zeros[kLossPairItems<A>]{};
    for_each_batch<kLossPairItems<A>>(sharing, place, args.shape.dim,
                                      [&](int64_t first, int size, auto width) {
                                        store(grad_teacher, first, size, width, zeros);
                                        store(grad_student, first, size, width, zeros);
                                      });
    return;
  }
  const DivergenceRow<A> row = static_cast<const DivergenceRow<A>*>(args.kept)[place.row];
  const A g = static_cast<const A*>(args.grad)[place.row * args.grad_step] *
              static_cast<A>(args.grad_factor * args.of.factor) * rows.weight;
  with_kind(args.of.beta, [&](auto kind) {
    constexpr Divergence kKind = decltype(kind)::value;
    rows.for_each_batch([&](int64_t first, int size, auto width, auto& x, auto& y) {
      const auto replace = [&](A& of_teacher, A& of_student) {
        const auto elements = rows.template elements<kKind>(row, of_teacher, of_student);
        of_teacher = g * gradient_of_teacher<kKind>(row, rows.beta, elements);
        of_student = g * gradient_of_student<kKind>(row, rows.beta, elements);
      };
      for_each_in_turns(replace, x, y);
      store(grad_teacher, first, size, width, x);
      store(grad_student, first, size, width, y);
    });
  });
}

}  // namespace softmax_ext::cuda
