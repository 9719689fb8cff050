// Launches on a CUDA device, on torch's current stream; only to be called if kBuiltWithCuda.
#pragma once

#include <c10/core/Device.h>

#include "softmax_ext/divergences.h"
#include "softmax_ext/losses.h"
#include "softmax_ext/probabilities.h"
#include "softmax_ext/problem.h"
#include "softmax_ext/scores.h"
#include "softmax_ext/segments.h"

namespace softmax_ext {

#if defined(SOFTMAX_EXT_CUDA)
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;
#endif

void launch_on_cuda(const ForwardArgs& args, c10::Device device);
void launch_on_cuda(const BackwardArgs& args, c10::Device device);
void launch_on_cuda(const ScoreForwardArgs& args, c10::Device device);
void launch_on_cuda(const ScoreBackwardArgs& args, c10::Device device);
void launch_on_cuda(const SegmentsForwardArgs& args, c10::Device device);
void launch_on_cuda(const SegmentsBackwardArgs& args, c10::Device device);

// With the sum of the weights of the targets, and that of the rows' losses, divided by the former for a mean.
void launch_on_cuda(const LossForwardArgs& args, double* weight, double* loss, bool is_mean,
                    c10::Device device);
void launch_on_cuda(const LossBackwardArgs& args, c10::Device device);
void launch_on_cuda(const ProbabilityForwardArgs& args, c10::Device device);
void launch_on_cuda(const ProbabilityBackwardArgs& args, c10::Device device);
void launch_on_cuda(const DivergenceForwardArgs& args, c10::Device device);
void launch_on_cuda(const DivergenceBackwardArgs& args, c10::Device device);

}  // namespace softmax_ext
