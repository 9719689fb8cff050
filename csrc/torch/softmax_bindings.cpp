#include "arguments.h"
#include "bindings.h"
#include "softmax_autograd.h"
#include "softmax_override.h"

namespace softmax_ext {
namespace {

// softmax(input, dim, dtype, out): the arguments are taken as they are, since an overload's
// conversion would cost as much as a small call.
template <Op op>
py::object bind(py::handle input, py::handle dim, py::handle dtype, py::handle out) {
  HANDLE_TH_ERRORS
  const at::Tensor& tensor = to_tensor(name(op), "input", input);
  const int64_t index = to_dim(name(op), dim);
  const std::optional<at::ScalarType> result_dtype = to_scalar_type(name(op), dtype);
  if (out.is_none()) {
    at::Tensor result;
    {
      const py::gil_scoped_release no_gil;
      result = softmax(tensor, index, result_dtype, op);
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(result)));
  }
  at::Tensor result = to_tensor(name(op), "out", out);
  {
    const py::gil_scoped_release no_gil;
    softmax_out(tensor, index, result_dtype, op, result);
  }
  return py::reinterpret_borrow<py::object>(out);
  END_HANDLE_TH_ERRORS_PYBIND
}

// softmax_(input, dim), or softmin_ of the same op.
template <Op op, bool negated = false>
py::object bind_in_place(py::handle input, py::handle dim) {
  HANDLE_TH_ERRORS
  at::Tensor tensor = to_tensor(name(op), "input", input);
  const int64_t index = to_dim(name(op), dim);
  {
    const py::gil_scoped_release no_gil;
    negated ? softmin_in_place(tensor, index) : softmax_in_place(tensor, index, op);
  }
  return py::reinterpret_borrow<py::object>(input);
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace

void bind_softmax(py::module_& module) {
  add_node_types();
  module.def("softmax", bind<Op::kSoftmax>, py::arg("input"), py::arg("dim"), py::arg("dtype"),
             py::arg("out"));
  module.def("log_softmax", bind<Op::kLogSoftmax>, py::arg("input"), py::arg("dim"),
             py::arg("dtype"), py::arg("out"));
  module.def("softmax_", bind_in_place<Op::kSoftmax>, py::arg("input"), py::arg("dim"));
  module.def("log_softmax_", bind_in_place<Op::kLogSoftmax>, py::arg("input"), py::arg("dim"));
  module.def("softmin_", bind_in_place<Op::kSoftmax, /*negated=*/true>, py::arg("input"),
             py::arg("dim"));
  module.def("override_torch", override_torch, py::arg("on"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace softmax_ext
