// The gradients of divergences on the CPU, compiled once for each instruction set as softmax_forward.cpp is.
// Each element is read from memory once, and each gradient written once. Chunks are had one by one, whatever
// rows they are of.
#include "dispatch.h"
#include "divergences.h"
#include "rows.h"

namespace softmax_ext::cpu {
namespace {

template <Divergence kind, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE void store_divergence_gradient(bool streamed, const DivergenceBackwardArgs& args,
                                                  int64_t row, const T* x, const T* y, T* grad,
                                                  bool of_teacher, int64_t n) {
  using V = Vec<A>;
  if (is_left_out<A>(args.of, row)) {
    return store_each<T>(streamed, grad, n,
                         [](int64_t, auto) SOFTMAX_EXT_LAMBDA { return V(A(0)); });
  }
  double g = static_cast<double>(static_cast<const A*>(args.grad)[row * args.grad_step]);
  g *= args.grad_factor * args.of.factor;
  if (args.of.weight != nullptr) {
    g *= static_cast<double>(static_cast<const A*>(args.of.weight)[row]);
  }
  const DivergenceRow<V> of_row = in_lanes(static_cast<const DivergenceRow<A>*>(args.kept)[row]);
  const V factor(static_cast<A>(args.of.factor)), beta(static_cast<A>(args.of.beta));
  const V share(static_cast<A>(g));
  const auto store_gradient = [=](auto gradient) SOFTMAX_EXT_LAMBDA {
    store_each<T>(streamed, grad, n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      const V a = (load(x + i, lanes, A(0)) - of_row.teacher_max) * factor;
      const V b = (load(y + i, lanes, A(0)) - of_row.student_max) * factor;
      const V p = exp_of_nonpositive(a) * of_row.teacher_share;
      const V q = exp_of_nonpositive(b) * of_row.student_share;
      return share * gradient(elements_of<kind>(of_row, beta, a, b, p, q));
    });
  };
  if (of_teacher) {
    store_gradient([=](const DivergenceElements<V>& of)
                       SOFTMAX_EXT_LAMBDA { return gradient_of_teacher<kind>(of_row, beta, of); });
  } else {
    store_gradient([=](const DivergenceElements<V>& of)
                       SOFTMAX_EXT_LAMBDA { return gradient_of_student<kind>(of_row, beta, of); });
  }
}

template <Divergence kind, class T>
void divergence_gradients_of_rows(const DivergenceBackwardArgs& args, const Threads& threads,
                                  bool streamed) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim, chunks = ceil_div(dim, kChunk<A>);
  const Slices<const T> teacher(args.dims, args.teacher_strides,
                                static_cast<const T*>(args.teacher));
  const Slices<const T> student(args.dims, args.student_strides,
                                static_cast<const T*>(args.student));
  parallel_for(threads, args.shape.rows() * chunks, grain<A>(2 * std::min(dim, kChunk<A>)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   const int64_t row = t / chunks, first = t % chunks * kChunk<A>;
                   const T *const x = teacher[row] + first, *const y = student[row] + first;
                   for (const bool of_teacher : {false, true}) {
                     void* const grad = of_teacher ? args.grad_teacher : args.grad_student;
                     if (grad == nullptr) continue;
                     store_divergence_gradient<kind>(streamed, args, row, x, y,
                                                     static_cast<T*>(grad) + row * dim + first,
                                                     of_teacher, std::min(kChunk<A>, dim - first));
                   }
                 }
               });
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_divergence_backward)(const DivergenceBackwardArgs& args,
                                                    const Threads& threads) {
  bool streamed = true;
  for (void* const grad : {args.grad_student, args.grad_teacher}) {
    streamed &= grad == nullptr ||
                is_streamed(args.shape, contiguous_dims(args.shape), contiguous_strides(args.shape),
                            grad, args.dtype, args.grads_are_new);
  }
  visit(args.dtype, [&](auto element) {
    visit(divergence_of(args.of.beta), [&](auto kind) {
      divergence_gradients_of_rows<kind(), decltype(element)>(args, threads, streamed);
    });
  });
}

}  // namespace softmax_ext::cpu
