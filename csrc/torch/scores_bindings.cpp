#include "arguments.h"
#include "bindings.h"
#include "scores.h"

namespace softmax_ext {
namespace {

at::Tensor optional_tensor(const char* function, const char* argument, py::handle value) {
  return value.is_none() ? at::Tensor() : to_tensor(function, argument, value);
}

ScoreOptions options_of(ScoreOp op, double factor, double softcap, int64_t left, int64_t right,
                        int64_t offset, double sink_value) {
  return {op, factor, softcap, left, right, offset, sink_value};
}

ScoreTensors tensors_of(const char* function, py::handle input, py::handle scale, py::handle mask,
                        py::handle sink) {
  return {to_tensor(function, "input", input), optional_tensor(function, "scale", scale),
          optional_tensor(function, "mask", mask), optional_tensor(function, "sink", sink)};
}

py::object bind(int64_t op, py::handle input, py::handle dtype, py::handle scale, double factor,
                double softcap, py::handle mask, int64_t left, int64_t right, int64_t offset,
                py::handle sink, double sink_value) {
  HANDLE_TH_ERRORS
  const ScoreOptions options =
      options_of(static_cast<ScoreOp>(op), factor, softcap, left, right, offset, sink_value);
  const char* const function = name(options.op);
  const ScoreTensors tensors = tensors_of(function, input, scale, mask, sink);
  const std::optional<at::ScalarType> result_dtype = to_scalar_type(function, dtype);
  at::Tensor result;
  {
    const py::gil_scoped_release no_gil;
    result = score_softmax(tensors, options, result_dtype);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(result)));
  END_HANDLE_TH_ERRORS_PYBIND
}

py::object bind_in_place(int64_t op, py::handle input, py::handle scale, double factor,
                         double softcap, py::handle mask, int64_t left, int64_t right,
                         int64_t offset, py::handle sink, double sink_value) {
  HANDLE_TH_ERRORS
  const ScoreOptions options =
      options_of(static_cast<ScoreOp>(op), factor, softcap, left, right, offset, sink_value);
  ScoreTensors tensors = tensors_of(name(options.op), input, scale, mask, sink);
  {
    const py::gil_scoped_release no_gil;
    score_softmax_in_place(tensors, options);
  }
  return py::reinterpret_borrow<py::object>(input);
  END_HANDLE_TH_ERRORS_PYBIND
}

}  // namespace

void bind_scores(py::module_& module) {
  add_score_node_types();
  module.def("score_softmax", bind, py::arg("op"), py::arg("input"), py::arg("dtype"),
             py::arg("scale"), py::arg("factor"), py::arg("softcap"), py::arg("mask"),
             py::arg("left"), py::arg("right"), py::arg("offset"), py::arg("sink"),
             py::arg("sink_value"));
  module.def("score_softmax_", bind_in_place, py::arg("op"), py::arg("input"), py::arg("scale"),
             py::arg("factor"), py::arg("softcap"), py::arg("mask"), py::arg("left"),
             py::arg("right"), py::arg("offset"), py::arg("sink"), py::arg("sink_value"));
}

}  // namespace softmax_ext
