// The parts of softmax_ext._C.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace softmax_ext {

// Adds softmax, log_softmax, their forms in place, and override_torch, the switch.
void bind_softmax(py::module_& module);

// Adds score_softmax and its form in place.
void bind_scores(py::module_& module);

// Adds plan(), Plan, and what names and bounds its members: SCHEDULES, HOLDS, LIMITS. Plans are of any
// device, in every build.
void bind_plan(py::module_& module);

// Adds segment_softmax, segment_log_softmax and segment_logsumexp.
void bind_segments(py::module_& module);

// Adds cross_entropy.
void bind_losses(py::module_& module);

// Adds kl_div_with_logits.
void bind_divergences(py::module_& module);

// Adds cross_entropy_of_probabilities.
void bind_probabilities(py::module_& module);

}  // namespace softmax_ext
