#include "bindings.h"

#include <optional>
#include <string>

#include "softmax_ext/plan.h"
#include "softmax_ext/score_plan.h"
#include "tensors.h"

namespace pybind11::detail {

// In Python the enumerators are their names.
template <class Enum, int count>
struct NameCaster {
  PYBIND11_TYPE_CASTER(Enum, const_name("str"));

  bool load(handle source, bool /*convert*/) {
    for (int k = 0; k < count; ++k) {
      value = static_cast<Enum>(k);
      if (str(softmax_ext::name(value)).equal(source)) return true;
    }
    return false;
  }

  static handle cast(Enum value, return_value_policy /*policy*/, handle /*parent*/) {
    return str(softmax_ext::name(value)).release();
  }
};

template <>
struct type_caster<softmax_ext::Schedule>
    : NameCaster<softmax_ext::Schedule, softmax_ext::kSchedules> {};

template <>
struct type_caster<softmax_ext::Hold> : NameCaster<softmax_ext::Hold, softmax_ext::kHolds> {};

}  // namespace pybind11::detail

namespace softmax_ext {
namespace {

template <class Enum, int count>
py::tuple names() {
  py::tuple result(count);
  for (int k = 0; k < count; ++k) result[k] = name(static_cast<Enum>(k));
  return result;
}

#define SOFTMAX_EXT_LIMIT(name) result[#name] = limits::k##name

// Those that the tests and the model of benchmarks/ are about.
py::dict limits_by_name() {
  py::dict result;
  SOFTMAX_EXT_LIMIT(VectorBytes);
  SOFTMAX_EXT_LIMIT(Warp);
  SOFTMAX_EXT_LIMIT(ChunkVectors);
  SOFTMAX_EXT_LIMIT(ChunkVectorsFloat64);
  SOFTMAX_EXT_LIMIT(AloneSteps);
  SOFTMAX_EXT_LIMIT(PartSteps);
  SOFTMAX_EXT_LIMIT(MostParts);
  SOFTMAX_EXT_LIMIT(MostWarps);
  SOFTMAX_EXT_LIMIT(LongWarps);
  SOFTMAX_EXT_LIMIT(RowWarps);
  SOFTMAX_EXT_LIMIT(ClusterWarps);
  SOFTMAX_EXT_LIMIT(ResidentWarps);
  SOFTMAX_EXT_LIMIT(ShortRowThreads);
  SOFTMAX_EXT_LIMIT(FillingThreads);
  SOFTMAX_EXT_LIMIT(ClusterBlocks);
  SOFTMAX_EXT_LIMIT(LargeClusterBlocks);
  SOFTMAX_EXT_LIMIT(SlabBytes);
  SOFTMAX_EXT_LIMIT(PackedThreads);
  SOFTMAX_EXT_LIMIT(LargeSlabBytes);
  SOFTMAX_EXT_LIMIT(LargePackedThreads);
  SOFTMAX_EXT_LIMIT(PackedParts);
  SOFTMAX_EXT_LIMIT(SectorBytes);
  SOFTMAX_EXT_LIMIT(MostColumnThreads);
  SOFTMAX_EXT_LIMIT(BlockChunks);
  SOFTMAX_EXT_LIMIT(GridTerms);
  SOFTMAX_EXT_LIMIT(FewChunks);
  SOFTMAX_EXT_LIMIT(ReservedShared);
  SOFTMAX_EXT_LIMIT(MaxBlocks);
  SOFTMAX_EXT_LIMIT(ShortScores);
  SOFTMAX_EXT_LIMIT(ScoreWidth);
  SOFTMAX_EXT_LIMIT(ScoreWarpsFloat64);
  return result;
}

#undef SOFTMAX_EXT_LIMIT

py::dict members(const Plan& plan) {
  py::dict result;
  Plan::each_member([&](const char* name, auto member) { result[name] = plan.*member; });
  return result;
}

// Of all members, by their names.
Plan plan_from(const py::kwargs& values) {
  Plan plan{};
  Plan::each_member([&](const char* name, auto member) {
    if (!values.contains(name))
      throw py::type_error(std::string("Plan(): no '") + name + "' given");
    plan.*member = values[name].cast<std::decay_t<decltype(plan.*member)>>();
  });
  if (values.size() != members(plan).size()) throw py::type_error("Plan(): unknown members given");
  return plan;
}

// Of the GPU's kernels, wherever the tensor is: in memory that begins at a multiple of 16 bytes.
bool is_direct(const Layout& layout, const at::Tensor& tensor, const void*& data) {
  data = reinterpret_cast<const void*>(tensor.storage_offset() *
                                       static_cast<int64_t>(tensor.itemsize()));
  return cuda::is_direct(layout.shape, layout.dims, layout.strides, data,
                         to_dtype(tensor.scalar_type()));
}

bool is_direct_on_cuda(const at::Tensor& tensor, int64_t dim) {
  const std::optional<Layout> layout = layout_of(tensor, dim);
  const void* data = nullptr;
  return layout && is_direct(*layout, tensor, data);
}

// The plan of contiguous tensors on a device, none of which need exist; of one that lies as `like`, if
// that is direct; of `schedule`, if it is not to be chosen. None where there is nothing to launch.
std::optional<Plan> plan(int64_t outer, int64_t dim, int64_t inner, at::ScalarType load_dtype,
                         at::ScalarType store_dtype, int inputs, bool aligned, int sm_count,
                         int shared_bytes, int compute_capability, std::optional<Schedule> schedule,
                         const std::optional<at::Tensor>& like, int64_t like_dim) {
  Workload work =
      workload({outer, dim, inner}, to_dtype(load_dtype), to_dtype(store_dtype), inputs);
  if (!aligned) work.aligned = 1;
  if (like) {
    const std::optional<Layout> layout = layout_of(*like, like_dim);
    const void* data = nullptr;
    if (layout && is_direct(*layout, *like, data)) {
      work = with_tensor(work, data, to_dtype(like->scalar_type()), layout->dims, layout->strides);
    }
  }
  const DeviceProperties device{sm_count, shared_bytes, compute_capability};
  const Plan made = schedule ? make_plan(work, device, *schedule) : make_plan(work, device);
  return made.blocks == 0 ? std::nullopt : std::optional(made);
}

// The same of rows of scores.
std::optional<Plan> score_plan(int64_t rows, int64_t dim, at::ScalarType dtype, int inputs,
                               int sm_count, int shared_bytes, int compute_capability) {
  const Workload work =
      detail::score_workload(rows, dim, to_dtype(dtype), inputs, /*online=*/inputs == 1);
  const Plan made = make_score_plan(work, {sm_count, shared_bytes, compute_capability});
  return made.blocks == 0 ? std::nullopt : std::optional(made);
}

}  // namespace

void bind_plan(py::module_& module) {
  py::class_<Plan> type(module, "Plan");
  type.def(py::init(&plan_from));
  Plan::each_member([&](const char* name, auto member) { type.def_readonly(name, member); });
  type.def_property_readonly("threads", &Plan::threads);
  type.def_property_readonly("kernel", &Plan::kernel);
  type.def("members", &members);
  type.def(
      "__eq__",
      [](const Plan& self, const Plan& other) { return members(self).equal(members(other)); },
      py::is_operator());
  type.def("__repr__", [](const Plan& self) {
    std::string text;
    for (const auto& [name, value] : members(self)) {
      text += text.empty() ? "Plan(" : ", ";
      text += std::string(py::str(name)) + "=" + std::string(py::repr(value));
    }
    return text + ")";
  });
  module.attr("SCHEDULES") = names<Schedule, kSchedules>();
  module.attr("HOLDS") = names<Hold, kHolds>();
  module.attr("LIMITS") = limits_by_name();
  module.def("plan", plan, py::arg("outer"), py::arg("dim"), py::arg("inner"),
             py::arg("load_dtype"), py::arg("store_dtype"), py::arg("inputs"), py::arg("aligned"),
             py::arg("sm_count"), py::arg("shared_bytes"), py::arg("compute_capability"),
             py::arg("schedule") = py::none(), py::arg("like") = py::none(),
             py::arg("like_dim") = 0);
  module.def("mask_gradient_parts", mask_gradient_parts, py::arg("rows"), py::arg("sharing"));
  module.def("score_plan", score_plan, py::arg("rows"), py::arg("dim"), py::arg("dtype"),
             py::arg("inputs"), py::arg("sm_count"), py::arg("shared_bytes"),
             py::arg("compute_capability"));
  module.def("is_direct_on_cuda", is_direct_on_cuda, py::arg("tensor"), py::arg("dim"));
}

}  // namespace softmax_ext
