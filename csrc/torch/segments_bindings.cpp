#include "arguments.h"
#include "bindings.h"
#include "node_type.h"
#include "segments_formulas.h"

namespace softmax_ext {
namespace {

std::optional<at::Tensor> to_optional_tensor(const char* function, const char* argument,
                                             py::handle value) {
  if (value.is_none()) return std::nullopt;
  return to_tensor(function, argument, value);
}

double to_scale(const char* function, py::handle value) {
  if (value.is_none()) return 1.0;
  if (!THPUtils_checkDouble(value.ptr())) raise_type_error(function, "scale", "float", value);
  return THPUtils_unpackDouble(value.ptr());
}

std::optional<c10::SymInt> to_size(const char* function, const char* argument, py::handle value) {
  if (value.is_none()) return std::nullopt;
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) {
    raise_type_error(function, argument, "int", value);
  }
  return py::cast<int64_t>(py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr())));
}

// A call by the kernels, else by the registered operators, else by torch's own.
template <SegmentOp op>
at::Tensor call(const at::Tensor& input, const std::optional<at::Tensor>& ptr,
                const std::optional<at::Tensor>& index, int64_t dim, double scale,
                std::optional<at::ScalarType> dtype, std::optional<c10::SymInt> num_segments) {
  using Operator = SegmentForward<op>;
  check_segment_dtype(op, input, dtype);
  const SegmentTensors segments{ptr, index, std::nullopt};
  const auto cast = [&] { return dtype ? input.to(*dtype) : input; };
  const auto all = [&](bool (*take)(const at::Tensor&)) {
    return take(input) && (!ptr || take(*ptr)) && (!index || take(*index));
  };
  if (all(kernels_take)) {
    // Sorted once, for the gradient as well.
    dim = check_segments(name(op), input, segments, dim, num_segments);
    const SortedSegments sorted = sort_segments(name(op), input, segments, dim, num_segments);
    return Rules<Operator>::run(cast(), sorted.ptr, std::nullopt, sorted.order, dim, scale,
                                std::nullopt);
  }
  if (input.is_meta() || all(operators_take)) {
    return Rules<Operator>::dispatch(cast(), ptr, index, std::nullopt, dim, scale, num_segments);
  }
  return Operator::composed(cast(), ptr, index, std::nullopt, dim, scale, num_segments);
}

template <SegmentOp op>
py::object bind(py::handle input, py::handle ptr, py::handle index, py::handle dim,
                py::handle scale, py::handle dtype, py::handle num_segments) {
  HANDLE_TH_ERRORS
  const char* const function = name(op);
  const at::Tensor& tensor = to_tensor(function, "input", input);
  const std::optional<at::Tensor> pointers = to_optional_tensor(function, "ptr", ptr);
  const std::optional<at::Tensor> numbers = to_optional_tensor(function, "index", index);
  const int64_t along = to_dim(function, dim);
  const double factor = to_scale(function, scale);
  const std::optional<at::ScalarType> result_dtype = to_scalar_type(function, dtype);
  const std::optional<c10::SymInt> count = to_size(function, "num_segments", num_segments);
  at::Tensor result;
  {
    const py::gil_scoped_release no_gil;
    result = call<op>(tensor, pointers, numbers, along, factor, result_dtype, count);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(result)));
  END_HANDLE_TH_ERRORS_PYBIND
}

template <SegmentOp op>
void bind_op(py::module_& module) {
  NodeType<SegmentInputGradient<op>>::add();
  NodeType<SegmentGradientOfGradient<op>>::add();
  module.def(name(op), bind<op>, py::arg("input"), py::arg("ptr"), py::arg("index"), py::arg("dim"),
             py::arg("scale"), py::arg("dtype"), py::arg("num_segments"));
}

}  // namespace

void bind_segments(py::module_& module) {
  bind_op<SegmentOp::kSoftmax>(module);
  bind_op<SegmentOp::kLogSoftmax>(module);
  bind_op<SegmentOp::kLogSumExp>(module);
}

}  // namespace softmax_ext
