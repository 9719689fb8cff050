// A node of the autograd graph that is as cheap as torch's generated ones (torch::autograd::Function
// would cost a small call half as much again as torch's own operator) and does what they do: compiled
// autograd, saved-tensor hooks, names.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace softmax_ext {

// Formula, of a gradient:
//   kName                the node's
//   kSaved               names of the saved tensors, a std::array
//   kMembers             names of its members, in their order
//   members(formula)     references to them: what it keeps besides tensors
//   formula(grads, saved)  the gradients of the inputs. A gradient may be undefined.
template <class Formula>
class SavingNode : public torch::autograd::Node {
 public:
  static constexpr size_t kSavedTensors = std::tuple_size_v<decltype(Formula::kSaved)>;
  using Tensors = std::array<at::Tensor, kSavedTensors>;

  explicit SavingNode(Formula formula) : formula_(formula) {}

  std::string name() const override { return Formula::kName; }

  void save(size_t k, const at::Tensor& tensor, bool is_output, bool is_inplace_on_view = false) {
    saved_[k] = torch::autograd::SavedVariable(tensor, is_output, is_inplace_on_view);
  }

  const Formula& formula() const { return formula_; }

  at::Tensor unpack(size_t k) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return saved_[k].unpack(getptr());
  }

  torch::autograd::SavedVariable& saved(size_t k) { return saved_[k]; }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return formula_(grads, unpack_all());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved_) variable.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const auto& variable : saved_) args.collect(variable, /*is_output=*/true);
    std::apply([&](const auto&... member) { (args.collect(member), ...); }, members(formula_));
  }

  // In place of apply() while compiled autograd makes its graph: a call of the formula with stand-ins
  // for the tensors becomes a part of that.
  torch::autograd::variable_list apply_with_saved(
      const torch::autograd::variable_list& grads,
      torch::dynamo::autograd::SwapSavedVariables& saved) override {
    using namespace torch::dynamo::autograd;
    for (auto& variable : saved_) saved.before(variable);
    PackedArgs packed;
    for (const at::Tensor& tensor : unpack_all()) packed.pack(tensor);
    std::apply([&](const auto&... member) { (packed.pack(member), ...); }, members(formula_));
    std::vector<c10::IValue> args = std::move(packed).vec();
    const auto& compiler = getPyCompilerInterface();
    static const std::string function = [&] {
      const std::vector<at::TypePtr> schema = std::apply(
          [](const auto&... member) {
            std::vector<at::TypePtr> types(kSavedTensors + sizeof...(member),
                                           at::TensorType::get());
            size_t next = kSavedTensors;
            ((types[next++] = IValuePacker<std::decay_t<decltype(member)>>::packed_type()), ...);
            return types;
          },
          members(formula_));
      return compiler->bind_function(saved.get_py_compiler(), name(), call_packed, schema,
                                     /*is_custom_function=*/false, /*is_traceable=*/true);
    }();
    auto results = compiler->call_function(
        saved.get_py_compiler(), "apply_functional", function, grads, args,
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            get_input_metadata(next_edges())));
    for (auto& variable : saved_) saved.after(variable);
    return results;
  }

 private:
  Tensors unpack_all() {
    Tensors tensors;
    for (size_t k = 0; k < kSavedTensors; ++k) tensors[k] = saved_[k].unpack(getptr());
    return tensors;
  }

  // The formula's call from what apply_with_saved packed.
  static torch::autograd::variable_list call_packed(const torch::autograd::variable_list& grads,
                                                    const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    Tensors tensors;
    for (at::Tensor& tensor : tensors) tensor = packed.unpack<at::Tensor>();
    Formula formula;
    std::apply(
        [&](auto&... member) { ((member = packed.unpack<std::decay_t<decltype(member)>>()), ...); },
        members(formula));
    return formula(grads, tensors);
  }

  Formula formula_;
  std::array<torch::autograd::SavedVariable, kSavedTensors> saved_;
};

// A std::shared_ptr up to torch 2.12 or so, a c10::intrusive_ptr since.
using NodePointer = decltype(std::declval<torch::autograd::Node&>().getptr());

template <class Formula, class Pointer = NodePointer>
auto make_node(torch::autograd::edge_list&& edges, Formula formula) {
  using N = SavingNode<Formula>;
  const auto finish = [&](auto node) {
    node->set_next_edges(std::move(edges));
    return node;
  };
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // deleteNode spares the destruction of a long graph a deep recursion.
    return finish(std::shared_ptr<N>(new N(formula), [](auto* node) { deleteNode(node); }));
  } else {
    return finish(c10::make_intrusive<N>(formula));
  }
}

}  // namespace softmax_ext
