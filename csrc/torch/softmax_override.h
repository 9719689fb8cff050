// The switch: torch's own softmax operators on these kernels.
#pragma once

namespace softmax_ext {

// While on, aten::_softmax, _log_softmax, their backward and their out= forms run on these kernels on
// the CPU and on CUDA, with what torch has above them: autograd, vmap, autocast. What the kernels do
// not take, and everything while off, runs on torch's. The first call registers that, for good: a
// dispatch table must not change under calls of other threads.
void override_torch(bool on);
bool override_is_on();

}  // namespace softmax_ext
