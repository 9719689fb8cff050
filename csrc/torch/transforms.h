// What torch does around an operator, written once for all of this package's: gradients, tangents,
// vmap, profiles.
//
// An operator is a struct of static members that states
//   kName, kSchema     its own: "softmax_ext::softmax" and the whole of it
//   kDim               which of its arguments, counted from 0, is a dim of its tensors
//   kernel(args...)    its result; the tensors are plain memory on a device that kernels_run_on, and
//                      are all checked here
//   torchs(args...)    the same by torch's operators, on a device without kernels
//   meta(args...)      a result without values; sizes may be symbolic
//   gradient(args...)  the formula of its gradient, for node.h
//   saved(result, args...)  what that formula needs, a std::tie of tensors
//   tangent(tangents, result, args...)  the result's tangent, of the result's dtype, by differentiable
//                      calls. tangents[k] is that of the k-th tensor, and may be undefined.
// Its arguments are those of the schema, its tensors of one shape, its result a tensor of that shape.
#pragma once

#include <ATen/SequenceNumber.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda.h"
#include "node.h"
#include "tensors.h"

namespace softmax_ext {

// Whether the registered operators take a call on this tensor, here and now, that the kernels do not:
// what must see it is a transform of torch.func, a tangent or autocast, for which they have rules; and
// within all such wrappers is what kernels_take.
bool operators_take(const at::Tensor& tensor);

// What a profiler or an execution trace is told of a call that no dispatcher sees.
#define SOFTMAX_EXT_RECORD(name, ...)                                                            \
  RECORD_FUNCTION((name), (std::vector<c10::IValue>{__VA_ARGS__}),                               \
                  at::GradMode::is_enabled() ? static_cast<int64_t>(at::sequence_number::peek()) \
                                             : int64_t{-1})

// A call of one sample's tensors under vmap, as a call on those of all samples.
struct Batch {
  int64_t rank;                                       // of one sample's tensors
  int64_t first, count;                               // where in all samples' the batch dims are
  std::function<at::Tensor(const at::Tensor&)> wrap;  // the result of all samples, as vmap has it

  // From a tensor with the batch dims in front: one of the same rank as the others, with a dim to
  // reduce over if that is 0, and the batch dims where they are in the others.
  at::Tensor align(at::Tensor tensor) const;

  // Where a dim of one sample's tensors is.
  int64_t physical(int64_t dim) const;
};

// Replaces the tensors by those of all samples. The first that has a batch dim stays as it lies in
// memory, one that is the same for all samples is expanded. Nothing where none has a batch dim.
std::optional<Batch> unwrap(const std::vector<at::Tensor*>& tensors);         // torch.vmap
std::optional<Batch> unwrap_legacy(const std::vector<at::Tensor*>& tensors);  // is_grads_batched

// What is within the wrapper of the older vmap; otherwise null.
const at::Tensor* legacy_value(const at::Tensor& tensor);

namespace detail {

template <class T>
constexpr bool is_tensor = std::is_same_v<std::decay_t<T>, at::Tensor>;

template <class T>
auto if_tensor(T& argument) {
  if constexpr (is_tensor<T>) {
    return std::tie(argument);
  } else {
    return std::tuple<>();
  }
}

// References to the tensors among some arguments.
template <class... Args>
auto tensors_of(Args&... args) {
  return std::tuple_cat(if_tensor(args)...);
}

template <class T>
T primal(const T& argument) {
  if constexpr (is_tensor<T>) {
    return argument._fw_primal(/*level=*/0);
  } else {
    return argument;
  }
}

}  // namespace detail

template <class Operator, class Signature = decltype(Operator::kernel)>
struct Rules;

template <class Operator, class... Args>
struct Rules<Operator, at::Tensor(Args...)> {
  // A call by whatever the tensors and this thread ask for.
  static at::Tensor call(Args... args) {
    const bool plain =
        std::apply([](const auto&... tensor) { return (kernels_take(tensor) && ...); },
                   detail::tensors_of(args...));
    return plain ? run(args...) : dispatch(args...);
  }

  // A call that the kernels take, without the dispatcher.
  static at::Tensor run(Args... args) {
    SOFTMAX_EXT_RECORD(Operator::kName, args...);
    at::Tensor result = Operator::kernel(args...);
    if (Node* const node = add_node(result, args...)) save(*node, result, args...);
    return result;
  }

  // A call by the dispatcher.
  static at::Tensor dispatch(Args... args) {
    static const auto handle = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow(Operator::kName, "")
                                   .template typed<at::Tensor(Args...)>();
    return handle.call(args...);
  }

  // What the dispatcher runs for autograd: what is below it, recorded, and the tangent.
  static at::Tensor autograd(Args... args) {
    at::Tensor result;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      result = dispatch(args...);
    }
    Node* const node = add_node(result, args...);
    const auto tangents = std::apply(
        [](const auto&... tensor) { return std::array{tensor._fw_grad(/*level=*/0)...}; },
        detail::tensors_of(args...));
    const auto defined = [](const at::Tensor& tangent) { return tangent.defined(); };
    if (std::any_of(tangents.begin(), tangents.end(), defined)) {
      result._set_fw_grad(Operator::tangent(tangents, result, detail::primal(args)...),
                          /*level=*/0, /*is_inplace_op=*/false);
    }
    // With its tangent, which the gradient's own needs.
    if (node != nullptr) save(*node, result, args...);
    return result;
  }

  // What it runs for vmap: the same call on all samples at once.
  static at::Tensor batched(Args... args) {
    const c10::impl::ExcludeDispatchKeyGuard this_level(c10::DispatchKey::FuncTorchBatched);
    return batched_by(unwrap, args...);
  }

  static at::Tensor legacy_batched(Args... args) { return batched_by(unwrap_legacy, args...); }

  static void define(torch::Library& library) {
    library.def(torch::schema(Operator::kSchema, c10::AliasAnalysisKind::FROM_SCHEMA),
                {at::Tag::pt2_compliant_tag});
    const auto implement = [&](c10::DispatchKey key, auto* function) {
      library.impl(Operator::kName, torch::dispatch(key, function));
    };
    implement(c10::DispatchKey::CPU, Operator::kernel);
    implement(c10::DispatchKey::CUDA, kBuiltWithCuda ? Operator::kernel : Operator::torchs);
    implement(c10::DispatchKey::Meta, Operator::meta);
    implement(c10::DispatchKey::Autograd, autograd);
    implement(c10::DispatchKey::FuncTorchBatched, batched);
    implement(c10::DispatchKey::Batched, legacy_batched);
  }

 private:
  using Node = SavingNode<decltype(Operator::gradient(std::declval<Args>()...))>;

  // Gives the result its place in the graph, if a gradient is wanted; the graph owns the node.
  static Node* add_node(const at::Tensor& result, const std::decay_t<Args>&... args) {
    const auto tensors = detail::tensors_of(args...);
    const auto wanted = [](const auto&... tensor) {
      return torch::autograd::compute_requires_grad(tensor...);
    };
    if (!std::apply(wanted, tensors)) return nullptr;
    const auto edges = [](const auto&... tensor) {
      return torch::autograd::collect_next_edges(tensor...);
    };
    auto node = make_node(std::apply(edges, tensors), Operator::gradient(args...));
    Node* const saving = &*node;
    torch::autograd::set_history(result, std::move(node));
    return saving;
  }

  static void save(Node& node, const at::Tensor& result, const std::decay_t<Args>&... args) {
    const auto save_each = [&](const auto&... tensor) {
      size_t k = 0;
      (node.save(k++, tensor, /*is_output=*/tensor.is_same(result)), ...);
    };
    std::apply(save_each, Operator::saved(result, args...));
  }

  template <class Unwrap>
  static at::Tensor batched_by(Unwrap unwrap, const std::decay_t<Args>&... args) {
    std::tuple<std::decay_t<Args>...> physical(args...);
    const auto tensors =
        std::apply([](auto&... tensor) { return std::vector{&tensor...}; },
                   std::apply([](auto&... arg) { return detail::tensors_of(arg...); }, physical));
    const std::optional<Batch> batch = unwrap(tensors);
    if (!batch) return std::apply(dispatch, physical);
    int64_t& dim = std::get<Operator::kDim>(physical);
    dim = batch->physical(dim);
    const at::Tensor result = std::apply(dispatch, physical);
    return batch->wrap(batch->rank == 0 ? result.squeeze(-1) : result);
  }
};

}  // namespace softmax_ext
