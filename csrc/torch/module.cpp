// softmax_ext._C: the Python bindings.
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_numbers.h>
#include <torch/csrc/utils/tensor_numpy.h>

#include "../cpu/launch.h"
#include "../cpu/memory.h"
#include "autograd.h"
#include "cuda.h"
#include "operators.h"
#include "override.h"
#include "plan_bindings.h"

namespace softmax_ext {
namespace {

[[noreturn]] void raise_type_error(Op op, const char* argument, const char* expected,
                                   py::handle value) {
  PyErr_Format(PyExc_TypeError, "%s(): argument '%s' must be %s, not %s", name(op), argument,
               expected, Py_TYPE(value.ptr())->tp_name);
  throw py::error_already_set();
}

const at::Tensor& to_tensor(Op op, const char* argument, py::handle value) {
  if (!THPVariable_Check(value.ptr())) raise_type_error(op, argument, "Tensor", value);
  return THPVariable_Unpack(value.ptr());
}

// An int, or a numpy or torch integer of no dimensions, as torch takes them; not a bool.
int64_t to_dim(Op op, py::handle value) {
  if (PyLong_CheckExact(value.ptr())) return THPUtils_unpackLong(value.ptr());
  const bool integral =
      !PyBool_Check(value.ptr()) &&
      (PyLong_Check(value.ptr()) || torch::utils::is_numpy_int(value.ptr()) ||
       (THPVariable_Check(value.ptr()) && THPVariable_Unpack(value.ptr()).dim() == 0 &&
        at::isIntegralType(THPVariable_Unpack(value.ptr()).scalar_type(), /*includeBool=*/false)));
  if (!integral) raise_type_error(op, "dim", "int", value);
  return py::cast<int64_t>(py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr())));
}

// A torch.dtype, or the Python type that torch takes for one.
std::optional<at::ScalarType> to_scalar_type(Op op, py::handle value) {
  if (value.is_none()) return std::nullopt;
  if (THPDtype_Check(value.ptr())) return reinterpret_cast<THPDtype*>(value.ptr())->scalar_type;
  if (value.ptr() == reinterpret_cast<PyObject*>(&PyFloat_Type)) return at::kDouble;
  if (value.ptr() == reinterpret_cast<PyObject*>(&PyLong_Type)) return at::kLong;
  if (value.ptr() == reinterpret_cast<PyObject*>(&PyBool_Type)) return at::kBool;
  raise_type_error(op, "dtype", "torch.dtype", value);
}

// softmax(input, dim, dtype, out): the arguments are taken as they are, since an overload's
// conversion would cost as much as a small call.
template <Op op>
py::object bind(py::handle input, py::handle dim, py::handle dtype, py::handle out) {
  HANDLE_TH_ERRORS
  const at::Tensor& tensor = to_tensor(op, "input", input);
  const int64_t index = to_dim(op, dim);
  const std::optional<at::ScalarType> result_dtype = to_scalar_type(op, dtype);
  if (out.is_none()) {
    at::Tensor result;
    {
      const py::gil_scoped_release no_gil;
      result = softmax(tensor, index, result_dtype, op);
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(result)));
  }
  at::Tensor result = to_tensor(op, "out", out);
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
  at::Tensor tensor = to_tensor(op, "input", input);
  const int64_t index = to_dim(op, dim);
  {
    const py::gil_scoped_release no_gil;
    negated ? softmin_in_place(tensor, index) : softmax_in_place(tensor, index, op);
  }
  return py::reinterpret_borrow<py::object>(input);
  END_HANDLE_TH_ERRORS_PYBIND
}

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
  add_node_types();
  cpu::memory_stats();
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
  module.def("build_info", build_info);
  module.def("memory_stats", memory_stats);
  module.def("empty_cache", cpu::empty_cache, py::call_guard<py::gil_scoped_release>());
  bind_plan(module);
}

}  // namespace
}  // namespace softmax_ext
