// The gradient of cross-entropy on the CPU, compiled once for each instruction set as softmax_forward.cpp is.
// Each element is read once and written once. The schedules are those of losses_forward.cpp; chunks of long
// rows are had one by one, whatever rows they are of.
#include "columns.h"
#include "dispatch.h"
#include "losses.h"

namespace softmax_ext::cpu {
namespace {

// The gradients of up to a register of rows, each in its lane, or of one in all lanes.
template <class V>
struct LossRows {
  LossGradient<V> gradient;
  V lse, rest;
  V of_target;  // what the target's gradient is, before ScoreOf::gradient
  V score;      // of the target

  template <class F>
  static SOFTMAX_EXT_INLINE LossRows map(const LossRows& rows, F f) {
    const LossGradient<V>& g = rows.gradient;
    return {{f(g.share), f(g.each), f(g.target), f(g.more)},
            f(rows.lse),
            f(rows.rest),
            f(rows.of_target),
            f(rows.score)};
  }

  // The gradient of a score of another class than the target.
  SOFTMAX_EXT_INLINE V of(V z, V weight) const {
    return gradient.of_other(exp_of_nonpositive((z - lse) - rest), weight);
  }
};

// Of `count` rows from `row` on, `next` apart, with their targets.
template <class A>
SOFTMAX_EXT_INLINE LossRows<Vec<A>> loss_rows(const LossBackwardArgs& args, int64_t row,
                                              int64_t next, int64_t count,
                                              const Targets<A>& targets) {
  using V = Vec<A>;
  const auto value = [](double x) SOFTMAX_EXT_LAMBDA { return V(static_cast<A>(x)); };
  const auto of_rows = [=](const void* data)
                           SOFTMAX_EXT_LAMBDA { return load_rows<A>(data, row, next, count); };
  const Loss& of = args.loss;
  const V g = targets.if_counts(
      (args.grad_step == 0 ? V(*static_cast<const A*>(args.grad)) : of_rows(args.grad)) *
      value(args.grad_factor));
  LossRows<V> rows;
  rows.lse = of_rows(args.lse);
  rows.rest = of_rows(args.lse_rest);
  const V log_p = of_rows(args.log_p);
  rows.score = log_p + rows.lse;
  rows.gradient = LossGradient<V>::of(
      g, args.grad_lse == nullptr ? V(A(0)) : of_rows(args.grad_lse), targets.weight, rows.lse,
      value(of.smoothing), value(of.smoothing / static_cast<double>(args.shape.dim)),
      value(of.weight_sum), value(of.z_loss));
  rows.of_target = rows.gradient.of_target(expm1_of_nonpositive(log_p), targets.weight);
  return rows;
}

// Whether the gradient of a row is 0 whatever its elements are.
inline bool is_ignored(const LossBackwardArgs& args, int64_t target) {
  return target == args.loss.ignore_index && args.grad_lse == nullptr;
}

// The gradients of the n elements from `first` on of a row, which is one in all lanes. A target that is ignored
// is no class, also where ignore_index is one.
template <bool kGeneral, Write write, class T, class A = compute_t<T>>
SOFTMAX_EXT_INLINE void store_loss_gradient(const LossBackwardArgs& args, const T* x, T* y,
                                            int64_t first, int64_t n, int64_t target,
                                            const LossRows<Vec<A>>& row) {
  using V = Vec<A>;
  const ScoreOf<kGeneral, V> score_of(args.loss);
  const A of_target = score_of.gradient(row.of_target, row.score).raw[0];
  const bool is_smooth = kGeneral && args.loss.smoothing != 0;
  if (target == args.loss.ignore_index) target = -1;
  x += first;
  store_each<write, T>(y + first, n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
    const V z = score_of(load(x + i, lanes, A(0)));
    V result = row.of(z, is_smooth ? weights_of<A>(args.loss, first + i, lanes) : V(A(0)));
    result = score_of.gradient(result, z);
    const auto lane = static_cast<uint64_t>(target - first - i);
    if (lane < V::kSize) result.raw[lane] = of_target;
    return result;
  });
}

template <Write write, class T>
SOFTMAX_EXT_INLINE void store_zeros(T* y, int64_t n) {
  using V = Vec<compute_t<T>>;
  store_each<write, T>(y, n, [](int64_t, auto) SOFTMAX_EXT_LAMBDA { return V(0); });
}

template <bool kGeneral, Write write, class T>
void gradient_of_rows(const LossBackwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  const int64_t dim = args.shape.dim;
  const Strides of_rows = row_strides(args.dims, 1);
  const Slices<const T> input(args.dims, args.input_strides, static_cast<const T*>(args.input));
  const Slices<T> output(args.dims, args.grad_input_strides, static_cast<T*>(args.grad_input));
  const auto rows_of = [&](const int64_t* target, int64_t next, int64_t count) {
    return loss_rows<A>(args, target - args.loss.target, next, count,
                        Targets<A>(args.loss, target, next, count));
  };
  if (dim <= kChunk<A>) {
    const Slices<const int64_t> target(args.dims, of_rows, args.loss.target);
    for_each_few_rows<A>(
        args.shape, args.dims, InPlace{}, kChunk<A> / 2, threads,
        [&](int64_t count, const Few<const T>& x, const Few<const int64_t>& targets,
            const Few<T>& y) {
          const auto rows = rows_of(targets.first, targets.next, count);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t target = targets.first[r * targets.next];
            if (is_ignored(args, target)) {
              store_zeros<write>(y[r], dim);
            } else {
              store_loss_gradient<kGeneral, write>(args, x[r], y[r], 0, dim, target,
                                                   of_lane(rows, r));
            }
          }
        },
        input, target, output);
    return;
  }
  const int64_t chunks = ceil_div(dim, kChunk<A>);
  parallel_for(threads, args.shape.rows() * chunks, grain<A>(kChunk<A>),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin / chunks; row * chunks < end; ++row) {
                   const int64_t first = std::max<int64_t>(begin - row * chunks, 0) * kChunk<A>;
                   const int64_t n = std::min(dim, (end - row * chunks) * kChunk<A>) - first;
                   const int64_t* const target = args.loss.target + row;
                   T* const y = output[row];
                   if (is_ignored(args, *target)) {
                     store_zeros<write>(y + first, n);
                     continue;
                   }
                   store_loss_gradient<kGeneral, write>(args, input[row], y, first, n, *target,
                                                        of_lane(rows_of(target, 1, 1), 0));
                 }
               });
}

template <bool kGeneral, Write write, class T>
void gradient_of_columns(const LossBackwardArgs& args, const Threads& threads) {
  using A = compute_t<T>;
  using V = Vec<A>;
  using RawInt = typename V::RawInt;
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr int kSize = V::kSize;
  constexpr int64_t kVectors = kTile<A> / kSize;
  const int64_t dim = args.shape.dim, inner = args.shape.inner;
  const int64_t step = args.input_strides.dim, y_step = args.grad_input_strides.dim;
  const Slices<const T> input(args.dims, args.input_strides, static_cast<const T*>(args.input));
  const Slices<T> output(args.dims, args.grad_input_strides, static_cast<T*>(args.grad_input));
  const ScoreOf<kGeneral, V> score_of(args.loss);
  const bool is_smooth = kGeneral && args.loss.smoothing != 0;
  for_each_tile<A>(args.shape, threads, [&](int64_t slice, int64_t column, int64_t width) {
    const T* const tile = input[slice] + column;
    T* const y_tile = output[slice] + column;
    const int64_t* const target = args.loss.target + slice * inner + column;
    LossRows<V> rows[kVectors];
    RawInt targets[kVectors];
    const bool all_count =
        args.grad_lse != nullptr ||
        std::find(target, target + width, args.loss.ignore_index) == target + width;
    for (int64_t v = 0; v < ceil_div(width, kSize); ++v) {
      const int64_t c = v * kSize, count = std::min<int64_t>(kSize, width - c);
      const Targets<A> of_vector(args.loss, target + c, 1, count);
      rows[v] = loss_rows<A>(args, slice * inner + column + c, 1, count, of_vector);
      rows[v].of_target = score_of.gradient(rows[v].of_target, rows[v].score);
      targets[v] = of_vector.target;
    }
    for_each_steps(0, dim, true, [&](int64_t d, auto steps) SOFTMAX_EXT_LAMBDA {
      const T* const x = tile + d * step;
      T* const y = y_tile + d * y_step;
      for_each_vector<kSize>(width, [=, &rows, &targets](int64_t c, auto lanes) SOFTMAX_EXT_LAMBDA {
        const LossRows<V> row = rows[c / kSize];
        const RawInt of_columns = targets[c / kSize];
        for (int k = 0; k < steps(); ++k) {
          const V w(is_smooth ? weight_of<A>(args.loss, d + k) : A(0));
          const V z = score_of(load(x + k * step + c, lanes, A(0)));
          const V other = score_of.gradient(row.of(z, w), z);
          const auto is_target = of_columns == static_cast<Lane>(d + k);
          V result = is_target ? row.of_target.raw : other.raw;
          if (!all_count) result = of_columns >= 0 ? result.raw : typename V::Raw{};
          write_vector<write, T>(y + k * y_step + c, lanes, result);
        }
      });
    });
  });
}

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_loss_backward)(const LossBackwardArgs& args,
                                              const Threads& threads) {
  const bool streamed = is_streamed(args.shape, args.dims, args.grad_input_strides, args.grad_input,
                                    args.dtype, args.grad_input_is_new);
  visit(args.dtype, [&](auto element) {
    visit(streamed, [&](auto write) {
      using T = decltype(element);
      const bool is_general = args.loss.is_general();
      if (args.shape.inner > 1) {
        return is_general ? gradient_of_columns<true, write(), T>(args, threads)
                          : gradient_of_columns<false, write(), T>(args, threads);
      }
      is_general ? gradient_of_rows<true, write(), T>(args, threads)
                 : gradient_of_rows<false, write(), T>(args, threads);
    });
  });
}

}  // namespace softmax_ext::cpu
