// The switch: torch's own cross-entropy on these kernels.
#pragma once

#include <torch/library.h>

namespace softmax_ext {

// aten::cross_entropy_loss on the CPU and on CUDA, which torch composes of log_softmax and nll_loss: on these kernels
// while override_is_on(). What they do not take, and what something above them must see (transforms,
// tracing, modes, forward-mode tangents, autocast), is composed as before.
std::vector<torch::Library> override_losses();

}  // namespace softmax_ext
