// softmax_ext._C: what Python has of this library.
#include "../cpu/launch.h"
#include "../cpu/memory.h"
#include "bindings.h"

namespace softmax_ext {
namespace {

py::dict build_info() {
  py::dict info;
  py::list isas;
  const cpu::KernelList& usable = cpu::usable_kernels();
  for (int k = 0; k < usable.size; ++k) isas.append(usable.items[k]->isa);
  info["cpu_isa"] = cpu::kernels().isa;
  info["cpu_isas"] = isas;
  return info;
}

py::tuple memory_stats() {
  const cpu::MemoryStats stats = cpu::memory_stats();
  return py::make_tuple(stats.kept_bytes, stats.kept_blocks, stats.limit_bytes);
}

PYBIND11_MODULE(_C, module) {
  // A variable of the environment that cannot be had is an error at import, not at the first call.
  cpu::kernels();
  cpu::memory_stats();
  module.def("build_info", build_info);
  module.def("memory_stats", memory_stats);
  module.def("empty_cache", cpu::empty_cache, py::call_guard<py::gil_scoped_release>());
  bind_softmax(module);
  bind_plan(module);
  bind_scores(module);
  bind_segments(module);
  bind_losses(module);
  bind_divergences(module);
  bind_probabilities(module);
}

}  // namespace
}  // namespace softmax_ext
