// The Python type of a node's grad_fn: named as the node, with what it saved under the names that
// torch gives such attributes: _saved_NAME, and _raw_saved_NAME to register saved-tensor hooks on.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <typeinfo>
#include <vector>

#include "node.h"

namespace softmax_ext {

template <class Formula>
class NodeType {
 public:
  static void add() {
    using namespace torch::autograd;  // of the macro's names
    static PyTypeObject type;
    static std::vector<PyGetSetDef> attributes = {THP_FUNCTION_DEFAULT_PROPERTIES};
    const auto attribute = [](const char* prefix, const char* name, getter get, size_t k) {
      static std::vector<std::unique_ptr<std::string>> names;
      names.push_back(std::make_unique<std::string>(std::string(prefix) + name));
      attributes.push_back({names.back()->c_str(), get, nullptr, nullptr,
                            reinterpret_cast<void*>(static_cast<uintptr_t>(k))});
    };
    for (size_t k = 0; k < Formula::kSaved.size(); ++k) {
      attribute("_saved_", Formula::kSaved[k], get_saved, k);
      attribute("_raw_saved_", Formula::kSaved[k], get_raw, k);
    }
    for (size_t k = 0; k < Formula::kMembers.size(); ++k) {
      attribute("_saved_", Formula::kMembers[k], get_member, k);
    }
    attributes.push_back({});
    _initFunctionPyTypeObject(type, Formula::kName, attributes.data(), nullptr);
    registerCppFunction(typeid(SavingNode<Formula>), &type);
  }

 private:
  static SavingNode<Formula>& node_of(PyObject* self) {
    const auto* function = reinterpret_cast<torch::autograd::THPCppFunction*>(self);
    return static_cast<SavingNode<Formula>&>(*function->cdata);
  }

  static size_t index_of(void* closure) {
    return static_cast<size_t>(reinterpret_cast<uintptr_t>(closure));
  }

  static PyObject* get_saved(PyObject* self, void* closure) {
    HANDLE_TH_ERRORS
    return THPVariable_Wrap(node_of(self).unpack(index_of(closure)));
    END_HANDLE_TH_ERRORS
  }

  static PyObject* get_raw(PyObject* self, void* closure) {
    HANDLE_TH_ERRORS
    return py::cast(node_of(self).saved(index_of(closure)),
                    py::return_value_policy::reference_internal, py::handle(self))
        .release()
        .ptr();
    END_HANDLE_TH_ERRORS
  }

  static PyObject* get_member(PyObject* self, void* closure) {
    HANDLE_TH_ERRORS
    std::vector<py::object> values;
    std::apply([&](const auto&... member) { (values.push_back(py::cast(member)), ...); },
               members(node_of(self).formula()));
    return values[index_of(closure)].release().ptr();
    END_HANDLE_TH_ERRORS
  }
};

}  // namespace softmax_ext
