// The CUDA kernels of losses: launch a plan of make_loss_plan for the arguments, in a divergence's forward call of
// whole rows, on the stream of the current device. A gradient that a forward call may have over its input
// (LossForwardArgs::grad_input) is not theirs: it is a backward launch, after the forward one. They return the
// error of the launch; that of the run, which may be of the targets' values, shows later.
#pragma once

#include <cuda_runtime.h>

#include "softmax_ext/divergences.h"
#include "softmax_ext/loss_plan.h"
#include "softmax_ext/losses.h"
#include "softmax_ext/probabilities.h"

namespace softmax_ext::cuda {

// Where two numbers of a call go: the sum of the weights of the targets, and that of the rows' losses, which is
// divided by the former for a mean.
struct LossTotals {
  double* weight;
  double* loss;
};

// `scratch` is the plan's scratch memory, of which the contents do not matter.
cudaError_t launch_loss_forward(const LossForwardArgs& args, const LossPlan& plan, void* scratch,
                                const LossTotals& totals, bool is_mean, cudaStream_t stream);
cudaError_t launch_loss_backward(const LossBackwardArgs& args, const LossPlan& plan,
                                 cudaStream_t stream);

cudaError_t launch_probability_forward(const ProbabilityForwardArgs& args, const LossPlan& plan,
                                       void* scratch, cudaStream_t stream);
cudaError_t launch_probability_backward(const ProbabilityBackwardArgs& args, const LossPlan& plan,
                                        cudaStream_t stream);

cudaError_t launch_divergence_forward(const DivergenceForwardArgs& args, const LossPlan& plan,
                                      cudaStream_t stream);
cudaError_t launch_divergence_backward(const DivergenceBackwardArgs& args, const LossPlan& plan,
                                       cudaStream_t stream);

}  // namespace softmax_ext::cuda
