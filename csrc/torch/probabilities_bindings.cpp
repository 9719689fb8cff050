#include "arguments.h"
#include "bindings.h"
#include "probabilities.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

// Loss and lse, or None where the call is not one for the kernels.
py::object bind(py::handle input, py::handle target, py::handle weight, int64_t reduction,
                double label_smoothing, double z_loss, double factor, double softcap,
                bool wants_lse) {
  HANDLE_TH_ERRORS
  const at::Tensor& x = to_tensor("cross_entropy", "input", input);
  const at::Tensor& y = to_tensor("cross_entropy", "target", target);
  std::optional<at::Tensor> w;
  if (!weight.is_none()) w = to_tensor("cross_entropy", "weight", weight);
  if (!kernels_take(x) || !kernels_take(y) || (w && !kernels_take(*w))) {
    return py::none();
  }
  ProbabilityResults results;
  {
    const py::gil_scoped_release no_gil;
    results = cross_entropy_of_probabilities(
        {x, y, w}, {reduction, /*ignore_index=*/-100, label_smoothing, z_loss, factor, softcap},
        wants_lse);
  }
  auto loss = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(results.loss)));
  if (!wants_lse) return py::make_tuple(std::move(loss), py::none());
  auto lse = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(results.lse)));
  return py::make_tuple(std::move(loss), std::move(lse));
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace

void bind_probabilities(py::module_& module) {
  add_probabilities_node_type();
  module.def("cross_entropy_of_probabilities", bind, py::arg("input"), py::arg("target"),
             py::arg("weight"), py::arg("reduction"), py::arg("label_smoothing"), py::arg("z_loss"),
             py::arg("factor"), py::arg("softcap"), py::arg("wants_lse"));
}

}  // namespace softmax_ext
