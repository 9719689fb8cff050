#include "launch_losses.h"

#include "device.cuh"

namespace softmax_ext::cuda {

// Instantiated in the file of each type.
template <class T, class Args>
cudaError_t launch_loss(const Args& args, const LossPlan& plan, void* states, cudaStream_t stream);

namespace {

// The sum of of_row(0) to of_row(count - 1), by the threads of a block; it is the first one's.
template <class Term>
__device__ __forceinline__ double sum_of_block(int64_t count, Term of_row) {
  SOFTMAX_EXT_STATIC_SHARED(double, sums, limits::kLossThreads / limits::kWarp);
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0;
#pragma unroll 1
  for (int64_t k = thread; k < count; k += limits::kLossThreads) sum += of_row(k);
  sum = warp_reduce<Sum>(sum, limits::kWarp);
  __syncthreads();  // before sums are written again
  if (thread % limits::kWarp == 0) sums[thread / limits::kWarp] = sum;
  __syncthreads();
  if (thread > 0) return 0;
  for (int w = 1; w < limits::kLossThreads / limits::kWarp; ++w) sum += sums[w];
  return sum;
}

// Fails unless each target is ignored or one of `dim` classes; sums their weights, `each` of them in a block.
template <class A>
__global__ void __launch_bounds__(limits::kLossThreads)
    loss_target_kernel(Loss loss, int64_t dim, int64_t rows, int64_t each, double* sums) {
  const int64_t first = blockIdx.x * each;
  const double sum = sum_of_block(min(rows - first, each), [&](int64_t k) {
    const int64_t y = loss.target[first + k];
    if (y == loss.ignore_index) return 0.0;
    if (y < 0 || y >= dim) {
      SOFTMAX_EXT_FAIL("0 <= target && target < classes",
                       "softmax_ext: target %lld of cross_entropy is %lld of %lld classes\n",
                       static_cast<long long>(first + k), static_cast<long long>(y),
                       static_cast<long long>(dim));
      return 0.0;
    }
    return loss.weight == nullptr ? 1.0
                                  : static_cast<double>(static_cast<const A*>(loss.weight)[y]);
  });
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class A>
__global__ void __launch_bounds__(limits::kLossThreads)
    loss_sum_kernel(const A* losses, int64_t rows, int64_t each, double* sums) {
  const int64_t first = blockIdx.x * each;
  const double sum = sum_of_block(
      min(rows - first, each), [&](int64_t k) { return static_cast<double>(losses[first + k]); });
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// By one block: from `count` sums of weights, and as many of losses behind them.
__global__ void __launch_bounds__(limits::kLossThreads)
    loss_total_kernel(const double* sums, int64_t count, bool is_mean, LossTotals totals) {
  const double weight = sum_of_block(count, [&](int64_t k) { return sums[k]; });
  const double loss = sum_of_block(count, [&](int64_t k) { return sums[count + k]; });
  if (threadIdx.x > 0) return;
  *totals.weight = weight;
  *totals.loss = is_mean ? loss / weight : loss;
}

template <class Args>
cudaError_t launch(const Args& args, const LossPlan& plan, void* states, cudaStream_t stream) {
  if (!takes_scores(args.shape, args.dims)) return cudaErrorInvalidValue;
  return with_type(args.dtype, [&](auto element) {
    return launch_loss<decltype(element)>(args, plan, states, stream);
  });
}

template <class T, class A = computed_t<T>>
cudaError_t launch_with_totals(const LossForwardArgs& args, const LossPlan& plan, void* scratch,
                               const LossTotals& totals, bool is_mean, cudaStream_t stream) {
  double* const sums = static_cast<double*>(scratch);
  const dim3 grid(static_cast<unsigned>(plan.sums)), block(limits::kLossThreads);
  const int64_t rows = args.shape.rows();
  cudaError_t error = launch_kernel(loss_target_kernel<A>, grid, block, 0, {}, stream, args.loss,
                                    args.shape.dim, rows, plan.summands, sums);
  if (error == cudaSuccess) error = launch_loss<T>(args, plan, sums + 2 * plan.sums, stream);
  if (error == cudaSuccess) {
    error =
        launch_kernel(loss_sum_kernel<A>, grid, block, 0, {}, stream,
                      static_cast<const A*>(args.row_loss), rows, plan.summands, sums + plan.sums);
  }
  if (error == cudaSuccess) {
    error = launch_kernel(loss_total_kernel, dim3(1), block, 0, {}, stream, sums, plan.sums,
                          is_mean, totals);
  }
  return error;
}

}  // namespace

cudaError_t launch_loss_forward(const LossForwardArgs& args, const LossPlan& plan, void* scratch,
                                const LossTotals& totals, bool is_mean, cudaStream_t stream) {
  if (!takes_scores(args.shape, args.dims)) return cudaErrorInvalidValue;
  return with_type(args.dtype, [&](auto element) {
    return launch_with_totals<decltype(element)>(args, plan, scratch, totals, is_mean, stream);
  });
}

cudaError_t launch_loss_backward(const LossBackwardArgs& args, const LossPlan& plan,
                                 cudaStream_t stream) {
  return launch(args, plan, nullptr, stream);
}

cudaError_t launch_probability_forward(const ProbabilityForwardArgs& args, const LossPlan& plan,
                                       void* scratch, cudaStream_t stream) {
  return launch(args, plan, scratch, stream);
}

cudaError_t launch_probability_backward(const ProbabilityBackwardArgs& args, const LossPlan& plan,
                                        cudaStream_t stream) {
  return launch(args, plan, nullptr, stream);
}

cudaError_t launch_divergence_forward(const DivergenceForwardArgs& args, const LossPlan& plan,
                                      cudaStream_t stream) {
  return launch(args, plan, nullptr, stream);
}

cudaError_t launch_divergence_backward(const DivergenceBackwardArgs& args, const LossPlan& plan,
                                       cudaStream_t stream) {
  return launch(args, plan, nullptr, stream);
}

}  // namespace softmax_ext::cuda
