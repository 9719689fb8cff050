// Plans for Python. They are of any device, in every build.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace softmax_ext {

// Adds plan(), Plan, and what names and bounds its members: SCHEDULES, HOLDS, LIMITS.
void bind_plan(py::module_& module);

}  // namespace softmax_ext
