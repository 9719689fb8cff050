#include "arguments.h"
#include "bindings.h"
#include "losses.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

// Loss, and what else is wanted, or None where the call is not one for the kernels.
py::object bind(py::handle input, py::handle target, py::handle weight, int64_t reduction,
                int64_t ignore_index, double label_smoothing, double z_loss, double factor,
                double softcap, bool wants_lse, bool wants_entropy, bool in_place) {
  HANDLE_TH_ERRORS
  const at::Tensor& x = to_tensor("cross_entropy", "input", input);
  const at::Tensor& y = to_tensor("cross_entropy", "target", target);
  std::optional<at::Tensor> w;
  if (!weight.is_none()) w = to_tensor("cross_entropy", "weight", weight);
  const LossTensors tensors{x, y, w};
  if (!kernels_take(x) || !kernels_take(y) || (w && !kernels_take(*w))) {
    return py::none();
  }
  LossResults results;
  {
    const py::gil_scoped_release no_gil;
    results =
        cross_entropy(tensors, {reduction, ignore_index, label_smoothing, z_loss, factor, softcap},
                      {wants_lse, wants_entropy}, in_place);
  }
  const auto wrapped = [](at::Tensor& tensor) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor)));
  };
  if (!wants_lse && !wants_entropy) return wrapped(results.loss);
  return py::make_tuple(wrapped(results.loss), wants_lse ? wrapped(results.lse) : py::none(),
                        wants_entropy ? wrapped(results.entropy) : py::none());
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace

void bind_losses(py::module_& module) {
  add_loss_node_types();
  module.def("cross_entropy", bind, py::arg("input"), py::arg("target"), py::arg("weight"),
             py::arg("reduction"), py::arg("ignore_index"), py::arg("label_smoothing"),
             py::arg("z_loss"), py::arg("factor"), py::arg("softcap"), py::arg("wants_lse"),
             py::arg("wants_entropy"), py::arg("in_place"));
}

}  // namespace softmax_ext
