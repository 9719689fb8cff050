// Cross-entropy with probabilities as targets (softmax_ext/probabilities.h), and its gradients: by the threads
// that loss_kernels.cuh gives a row or a part of one. Forward, both tensors are read once; backward, they are
// read once and each gradient is written once.
#pragma once

#include "loss_kernels.cuh"
#include "softmax_ext/probabilities.h"

namespace softmax_ext::cuda {

// u of softmax_ext/probabilities.h.
template <class A>
struct TargetWeight {
  const Loss& loss;
  A of_target, of_each;

  __device__ __forceinline__ TargetWeight(const Loss& loss, int64_t dim)
      : loss(loss),
        of_target(static_cast<A>(1 - loss.smoothing)),
        of_each(static_cast<A>(loss.smoothing / static_cast<double>(dim))) {}
  __device__ __forceinline__ A of(int64_t c, A target) const {
    return mul_of(weight_of<A>(loss, c), fma_of(target, of_target, of_each));
  }
};

template <class A>
__device__ __forceinline__ void store_loss(const ProbabilityForwardArgs& args, int64_t row,
                                           const LossState<A>& state) {
  constexpr A kLowest = -static_cast<A>(INFINITY);
  const A shift = shift_by(state.max), sum = add_of(state.ones, state.others);
  const A log_sum =
      sum == A(0) ? kLowest : log_of(state.ones) + log1p_of(state.others / state.ones);
  const A lse = add_of(shift, log_sum);
  A loss = mul_of(state.weight, log_sum) - state.score;
  if (args.loss.z_loss != 0) loss = add_of(loss, static_cast<A>(args.loss.z_loss) * lse * lse);
  static_cast<A*>(args.row_loss)[row] = loss;
  static_cast<A*>(args.lse)[row] = lse;
  static_cast<ProbabilityRow<A>*>(args.kept)[row] = {shift, A(1) / sum, log_sum, state.weight};
}

// states: as those of loss_forward_kernel.
template <class T>
__global__ void __launch_bounds__(limits::kLossThreads, kLossBlocks<T>)
    probability_forward_kernel(ProbabilityForwardArgs args, LossSharing sharing,
                               LossState<computed_t<T>>* states) {
  using A = computed_t<T>;
  const int64_t dim = args.shape.dim;
  const LossPlace place(sharing);
  const Lanes lanes = place.lanes;
  const LossScore<A> score(args.loss);
  const TargetWeight<A> weight(args.loss, dim);
  const T* const input = place.in(static_cast<const T*>(args.input), args.input_strides);
  const T* const target = place.in(static_cast<const T*>(args.target), args.target_strides);
  LossState<A> state = LossState<A>::empty();
  if (sharing.combines) {
    const int parts = sharing.parts_of(dim);
    state.add_parts(lanes, states + place.row * parts, parts);
  } else if (place.exists) {
    for_each_batch<kLossPairItems<A>>(
        sharing, place, dim, [&](int64_t first, int size, auto width) {
          constexpr int kWidth = decltype(width)::value;
          A z[kLossPairItems<A>], t[kLossPairItems<A>];
          load_batch<kWidth>(target, 1, first, lanes, size, A(0), t);
          load_scores<kWidth>(score, input, 1, first, lanes, size, z);
          state.add_exps(lanes, size, z, /*wants_entropy=*/false);
#pragma unroll
          for (int i = 0; i < kLossPairItems<A>; ++i) {
            const int k = lanes.lane * kWidth + place_of<kWidth>(lanes, i);
            if (k < size) state.add_weighted(weight.of(first + k, t[i]), z[i]);
          }
        });
  }
  reduce_row(lanes, state);
  if (lanes.lane != 0 || !place.exists) return;
  if (sharing.parts > 1) {
    states[place.row * sharing.parts + place.part] = state;
  } else {
    store_loss(args, place.row, state);
  }
}

template <class T>
__global__ void __launch_bounds__(limits::kLossThreads, kLossBlocks<T>)
    probability_backward_kernel(ProbabilityBackwardArgs args, LossSharing sharing) {
  using A = computed_t<T>;
  const Loss& loss = args.loss;
  const int64_t dim = args.shape.dim;
  const LossPlace place(sharing);
  if (!place.exists) return;
  const Lanes lanes = place.lanes;
  const LossScore<A> score(loss);
  const TargetWeight<A> weight(loss, dim);
  const auto value = [](double x) { return static_cast<A>(x); };
  const ProbabilityRow<A> row = static_cast<const ProbabilityRow<A>*>(args.kept)[place.row];
  const A g =
      static_cast<const A*>(args.grad)[place.row * args.grad_step] * value(args.grad_factor);
  A share = g * row.total;
  if (loss.z_loss != 0) {
    share = share + g * value(2 * loss.z_loss) * static_cast<const A*>(args.lse)[place.row];
  }
  if (args.grad_lse != nullptr) share = share + static_cast<const A*>(args.grad_lse)[place.row];
  share = share * row.share;
  const T* const input = place.in(static_cast<const T*>(args.input), args.input_strides);
  const T* const target = place.in(static_cast<const T*>(args.target), args.target_strides);
  T* const grad_input = static_cast<T*>(args.grad_input);
  T* const grad_target = static_cast<T*>(args.grad_target);
  for_each_batch<kLossPairItems<A>>(sharing, place, dim, [&](int64_t first, int size, auto width) {
    constexpr int kWidth = decltype(width)::value;
    A z[kLossPairItems<A>], t[kLossPairItems<A>];
    if (grad_input != nullptr) load_batch<kWidth>(target, 1, first, lanes, size, A(0), t);
    load_scores<kWidth>(score, input, 1, first, lanes, size, z);
    if (grad_target != nullptr) {
      A grad[kLossPairItems<A>];
#pragma unroll
      for (int i = 0; i < kLossPairItems<A>; ++i) {
        const int k = lanes.lane * kWidth + place_of<kWidth>(lanes, i);
        const A w = k < size ? weight_of<A>(loss, first + k) : A(0);
        grad[i] = g * weight.of_target * w * (row.log_sum - (z[i] - row.max));
      }
      store_batch<kWidth>(grad_target + place.row * dim, 1, first, lanes, size, grad);
    }
    if (grad_input == nullptr) return;
    for_each_item<kLossPairItems<A>>(lanes, size, [&](int i) {
      const int k = lanes.lane * kWidth + place_of<kWidth>(lanes, i);
      const A u = k < size ? weight.of(first + k, t[i]) : A(0);
      z[i] = score.gradient(share * exp_of(z[i] - row.max) - g * u, z[i]);
    });
    store_batch<kWidth>(grad_input + place.row * dim, 1, first, lanes, size, z);
  });
}

}  // namespace softmax_ext::cuda
