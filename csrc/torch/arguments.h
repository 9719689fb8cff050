// Arguments of bound functions, as torch takes them, with torch's errors.
#pragma once

#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_numbers.h>
#include <torch/csrc/utils/tensor_numpy.h>

#include <optional>

namespace softmax_ext {

[[noreturn]] inline void raise_type_error(const char* function, const char* argument,
                                          const char* expected, py::handle value) {
  PyErr_Format(PyExc_TypeError, "%s(): argument '%s' must be %s, not %s", function, argument,
               expected, Py_TYPE(value.ptr())->tp_name);
  throw py::error_already_set();
}

inline const at::Tensor& to_tensor(const char* function, const char* argument, py::handle value) {
  if (!THPVariable_Check(value.ptr())) raise_type_error(function, argument, "Tensor", value);
  return THPVariable_Unpack(value.ptr());
}

// An int, or a numpy or torch integer of no dimensions, as torch takes them; not a bool.
inline int64_t to_dim(const char* function, py::handle value) {
  if (PyLong_CheckExact(value.ptr())) return THPUtils_unpackLong(value.ptr());
  const bool integral =
      !PyBool_Check(value.ptr()) &&
      (PyLong_Check(value.ptr()) || torch::utils::is_numpy_int(value.ptr()) ||
       (THPVariable_Check(value.ptr()) && THPVariable_Unpack(value.ptr()).dim() == 0 &&
        at::isIntegralType(THPVariable_Unpack(value.ptr()).scalar_type(), /*includeBool=*/false)));
  if (!integral) raise_type_error(function, "dim", "int", value);
  return py::cast<int64_t>(py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr())));
}

// A torch.dtype, or the Python type that torch takes for one.
inline std::optional<at::ScalarType> to_scalar_type(const char* function, py::handle value) {
  if (value.is_none()) return std::nullopt;
  if (THPDtype_Check(value.ptr())) return reinterpret_cast<THPDtype*>(value.ptr())->scalar_type;
  if (value.ptr() == reinterpret_cast<PyObject*>(&PyFloat_Type)) return at::kDouble;
  if (value.ptr() == reinterpret_cast<PyObject*>(&PyLong_Type)) return at::kLong;
  if (value.ptr() == reinterpret_cast<PyObject*>(&PyBool_Type)) return at::kBool;
  raise_type_error(function, "dtype", "torch.dtype", value);
}

}  // namespace softmax_ext
