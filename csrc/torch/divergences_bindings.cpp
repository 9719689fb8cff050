#include "arguments.h"
#include "bindings.h"
#include "divergences.h"
#include "tensors.h"

namespace softmax_ext {
namespace {

// The loss, or None where the call is not one for the kernels.
py::object bind(py::handle student, py::handle teacher, py::handle weight, int64_t reduction,
                double beta, double factor) {
  HANDLE_TH_ERRORS
  const char* const name = "kl_div_with_logits";
  const at::Tensor& x = to_tensor(name, "student", student);
  const at::Tensor& y = to_tensor(name, "teacher", teacher);
  std::optional<at::Tensor> w;
  if (!weight.is_none()) w = to_tensor(name, "weight", weight);
  if (!kernels_take(x) || !kernels_take(y) || (w && !kernels_take(*w))) {
    return py::none();
  }
  at::Tensor loss;
  {
    const py::gil_scoped_release no_gil;
    loss = kl_div_with_logits({x, y, w}, {reduction, beta, factor});
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(loss)));
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace

void bind_divergences(py::module_& module) {
  add_divergence_node_type();
  module.def("kl_div_with_logits", bind, py::arg("student"), py::arg("teacher"), py::arg("weight"),
             py::arg("reduction"), py::arg("beta"), py::arg("factor"));
}

}  // namespace softmax_ext
