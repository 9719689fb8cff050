// Scores as the dispatcher knows them, torch.ops.softmax_ext, and their place in autograd's graph.
#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <string>

#include "cuda.h"
#include "node.h"
#include "node_type.h"
#include "scores.h"
#include "tensors.h"
#include "transforms.h"

namespace softmax_ext {
namespace {

using Maybe = std::optional<at::Tensor>;
using MaybeType = std::optional<at::ScalarType>;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kForward = "softmax_ext::score_softmax";
constexpr const char* kBackward = "softmax_ext::score_softmax_backward";
constexpr const char* kByTorch = "softmax_ext::score_softmax_by_torch";
constexpr const char* kParameters =
    "(int op, Tensor input, ScalarType? dtype, Tensor? scale, float factor, "
    "float softcap, Tensor? mask, SymInt left, SymInt right, SymInt offset, Tensor? sink, "
    "float sink_value) -> (Tensor, Tensor)";
constexpr const char* kBackwardSchema =
    "softmax_ext::score_softmax_backward(int op, Tensor grad, Tensor result, Tensor? lse, "
    "Tensor? input, Tensor? scale, float factor, float softcap, Tensor? mask, SymInt left, "
    "SymInt right, SymInt offset, Tensor? sink, float sink_value, ScalarType input_dtype, "
    "bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)";

Maybe if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? Maybe(tensor) : std::nullopt;
}

at::Tensor or_undefined(const Maybe& tensor) { return tensor.value_or(at::Tensor()); }

// Calls f(tensors, options) with what a schema names one by one.
template <class F>
auto with_scores(int64_t op, at::Tensor input, const Maybe& scale, double factor, double softcap,
                 const Maybe& mask, const c10::SymInt& left, const c10::SymInt& right,
                 const c10::SymInt& offset, const Maybe& sink, double sink_value, F f) {
  TORCH_CHECK_VALUE(op >= 0 && op <= 2, "score_softmax(): expected argument 'op' in [0, 2], got ",
                    op);
  const ScoreTensors tensors{std::move(input), or_undefined(scale), or_undefined(mask),
                             or_undefined(sink)};
  const ScoreOptions options{
      static_cast<ScoreOp>(op), factor, softcap, left, right, offset, sink_value};
  return f(tensors, options);
}

bool kernels_take(const ScoreTensors& tensors) {
  const auto taken = [](const at::Tensor& tensor) {
    return !tensor.defined() || softmax_ext::kernels_take(tensor);
  };
  return taken(tensors.input) && taken(tensors.scale) && taken(tensors.mask) && taken(tensors.sink);
}

Pair dispatch(const ScoreTensors& tensors, const ScoreOptions& options, MaybeType dtype) {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow(kForward, "")
          .typed<Pair(int64_t, const at::Tensor&, MaybeType, const Maybe&, double, double,
                      const Maybe&, c10::SymInt, c10::SymInt, c10::SymInt, const Maybe&, double)>();
  return handle.call(static_cast<int64_t>(options.op), tensors.input, dtype,
                     if_defined(tensors.scale), options.factor, options.softcap,
                     if_defined(tensors.mask), options.left, options.right, options.offset,
                     if_defined(tensors.sink), options.sink);
}

ScoreTensors dispatch_backward(const at::Tensor& g, const at::Tensor& y, const at::Tensor& lse,
                               const ScoreTensors& tensors, const ScoreOptions& options,
                               at::ScalarType input_dtype, const ScoreWanted& wanted) {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow(kBackward, "")
          .typed<Four(int64_t, const at::Tensor&, const at::Tensor&, const Maybe&, const Maybe&,
                      const Maybe&, double, double, const Maybe&, c10::SymInt, c10::SymInt,
                      c10::SymInt, const Maybe&, double, at::ScalarType, std::array<bool, 4>)>();
  auto [input, scale, mask, sink] = handle.call(
      static_cast<int64_t>(options.op), g, y, if_defined(lse), if_defined(tensors.input),
      if_defined(tensors.scale), options.factor, options.softcap, if_defined(tensors.mask),
      options.left, options.right, options.offset, if_defined(tensors.sink), options.sink,
      input_dtype, {wanted.input, wanted.scale, wanted.mask, wanted.sink});
  const auto if_wanted = [](bool wanted, at::Tensor& tensor) {
    return wanted ? std::move(tensor) : at::Tensor();
  };
  return {if_wanted(wanted.input, input), if_wanted(wanted.scale, scale),
          if_wanted(wanted.mask, mask), if_wanted(wanted.sink, sink)};
}

struct ScoreGradient {
  static constexpr const char* kName = "SoftmaxExtScoresBackward";
  static constexpr std::array kSaved = {"result", "lse", "input", "scale", "mask", "sink"};
  static constexpr std::array kMembers = {
      "op",         "factor",      "softcap",      "left",         "right",       "offset",
      "sink_value", "input_dtype", "input_wanted", "scale_wanted", "mask_wanted", "sink_wanted"};

  int64_t op;
  double factor, softcap;
  c10::SymInt left, right, offset;
  double sink_value;
  at::ScalarType input_dtype;
  bool input_wanted, scale_wanted, mask_wanted, sink_wanted;

  bool needs_input() const {
    return op == static_cast<int64_t>(ScoreOp::kLogSumExp) || softcap != 0 || scale_wanted;
  }

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& grads,
                                            const std::array<at::Tensor, 6>& saved) const {
    if (!grads[0].defined()) return {{}, {}, {}, {}};
    const auto& [y, lse, input, scale, mask, sink] = saved;
    const ScoreTensors tensors{input, scale, mask, sink};
    const ScoreOptions options{
        static_cast<ScoreOp>(op), factor, softcap, left, right, offset, sink_value};
    const ScoreWanted wanted{input_wanted, scale_wanted, mask_wanted, sink_wanted};
    const auto taken = [](const at::Tensor& tensor) {
      return !tensor.defined() || softmax_ext::kernels_take(tensor);
    };
    const bool plain = taken(grads[0]) && std::all_of(saved.begin(), saved.end(), taken);
    ScoreTensors gradients;
    if (at::GradMode::is_enabled()) {
      gradients = composed_score_gradients(grads[0], y, tensors, options, input_dtype, wanted);
    } else if (plain) {
      gradients = score_backward(grads[0], y, lse, tensors, options, input_dtype, wanted);
    } else {
      gradients = dispatch_backward(grads[0], y, lse, tensors, options, input_dtype, wanted);
    }
    return {gradients.input, gradients.scale, gradients.mask, gradients.sink};
  }
};

auto members(ScoreGradient& f) {
  return std::tie(f.op, f.factor, f.softcap, f.left, f.right, f.offset, f.sink_value, f.input_dtype,
                  f.input_wanted, f.scale_wanted, f.mask_wanted, f.sink_wanted);
}
auto members(const ScoreGradient& f) {
  return std::tie(f.op, f.factor, f.softcap, f.left, f.right, f.offset, f.sink_value, f.input_dtype,
                  f.input_wanted, f.scale_wanted, f.mask_wanted, f.sink_wanted);
}

using Node = SavingNode<ScoreGradient>;

bool requires_grad(const ScoreTensors& tensors) {
  return torch::autograd::compute_requires_grad(tensors.input, tensors.scale, tensors.mask,
                                                tensors.sink);
}

ScoreGradient gradient_of(const ScoreTensors& tensors, const ScoreOptions& options) {
  const auto wanted = [](const at::Tensor& tensor) {
    return tensor.defined() && tensor.requires_grad();
  };
  return {static_cast<int64_t>(options.op),
          options.factor,
          options.softcap,
          options.left,
          options.right,
          options.offset,
          options.sink,
          tensors.input.scalar_type(),
          wanted(tensors.input),
          wanted(tensors.scale),
          wanted(tensors.mask),
          wanted(tensors.sink)};
}

void save(Node& node, const at::Tensor& result, const at::Tensor& lse, const ScoreTensors& tensors,
          bool is_inplace_on_view = false) {
  node.save(0, result, /*is_output=*/true, is_inplace_on_view);
  if (lse.defined()) node.save(1, lse.detach(), /*is_output=*/false);
  if (node.formula().needs_input()) node.save(2, tensors.input, /*is_output=*/false);
  node.save(3, tensors.scale, /*is_output=*/false);
  node.save(4, tensors.mask, /*is_output=*/false);
  node.save(5, tensors.sink, /*is_output=*/false);
}

auto edges_of(const ScoreTensors& tensors) {
  return torch::autograd::collect_next_edges(tensors.input, tensors.scale, tensors.mask,
                                             tensors.sink);
}

void record(const at::Tensor& result, const at::Tensor& lse, const ScoreTensors& tensors,
            const ScoreOptions& options) {
  auto node = make_node(edges_of(tensors), gradient_of(tensors, options));
  Node* const saving = &*node;
  torch::autograd::set_history(result, std::move(node));
  save(*saving, result, lse, tensors);
}

bool has_tangent(const ScoreTensors& tensors) {
  const auto tangent = [](const at::Tensor& tensor) {
    return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
  };
  return tangent(tensors.input) || tangent(tensors.scale) || tangent(tensors.mask) ||
         tangent(tensors.sink);
}

// ---- what the dispatcher has --------------------------------------------------------------------

#define SOFTMAX_EXT_SCORE_PARAMETERS                                                              \
  int64_t op, const at::Tensor &input, MaybeType dtype, const Maybe &scale, double factor,        \
      double softcap, const Maybe &mask, c10::SymInt left, c10::SymInt right, c10::SymInt offset, \
      const Maybe &sink, double sink_value

// The results of an operator share no memory.
template <class F>
Pair forward_by(SOFTMAX_EXT_SCORE_PARAMETERS, F f) {
  return with_scores(op, input, scale, factor, softcap, mask, left, right, offset, sink, sink_value,
                     [&](const ScoreTensors& tensors, const ScoreOptions& options) {
                       auto [result, lse] = f(tensors, options, dtype);
                       return Pair(result, lse.is_same(result) ? lse.clone() : lse);
                     });
}

#define SOFTMAX_EXT_SCORE_ARGUMENTS \
  op, input, dtype, scale, factor, softcap, mask, left, right, offset, sink, sink_value

Pair forward_kernel(SOFTMAX_EXT_SCORE_PARAMETERS) {
  return forward_by(SOFTMAX_EXT_SCORE_ARGUMENTS,
                    [](const auto& tensors, const auto& options, MaybeType dtype) {
                      return score_forward(tensors, options, dtype, /*wants_lse=*/true);
                    });
}

Pair forward_composed(SOFTMAX_EXT_SCORE_PARAMETERS) {
  return forward_by(SOFTMAX_EXT_SCORE_ARGUMENTS,
                    [](const auto& tensors, const auto& options, MaybeType dtype) {
                      return composed_scores(tensors, options, dtype);
                    });
}

// Of a program that is exported, to run without this package.
Pair forward_by_torch(SOFTMAX_EXT_SCORE_PARAMETERS) {
  return forward_by(SOFTMAX_EXT_SCORE_ARGUMENTS,
                    [](const auto& tensors, const auto& options, MaybeType dtype) {
                      return composed_scores(tensors, options, dtype, /*by_torch=*/true);
                    });
}

Pair forward_meta(SOFTMAX_EXT_SCORE_PARAMETERS) {
  return forward_by(SOFTMAX_EXT_SCORE_ARGUMENTS, [](const ScoreTensors& tensors,
                                                    const ScoreOptions& options, MaybeType dtype) {
    const at::ScalarType result = check_scores(tensors, options, dtype);
    c10::SymDimVector sizes(tensors.input.sym_sizes().begin(), tensors.input.sym_sizes().end());
    sizes.back() = 1;
    const auto empty = [&](c10::SymIntArrayRef sizes, at::ScalarType type) {
      return at::empty_symint(sizes, tensors.input.options().dtype(type));
    };
    return Pair(options.op == ScoreOp::kLogSumExp ? empty(sizes, result)
                                                  : empty(tensors.input.sym_sizes(), result),
                empty(sizes, at::toOpMathType(result)));
  });
}

Pair forward_autograd(SOFTMAX_EXT_SCORE_PARAMETERS) {
  return forward_by(SOFTMAX_EXT_SCORE_ARGUMENTS,
                    [](const ScoreTensors& tensors, const ScoreOptions& options, MaybeType dtype) {
                      if (has_tangent(tensors)) return composed_scores(tensors, options, dtype);
                      Pair results;
                      {
                        const at::AutoDispatchBelowADInplaceOrView below_autograd;
                        results = dispatch(tensors, options, dtype);
                      }
                      const auto& [result, lse] = results;
                      if (requires_grad(tensors)) record(result, lse, tensors, options);
                      return results;
                    });
}

// As torch's softmax: in float32, unless a type is asked for.
Pair forward_autocast(SOFTMAX_EXT_SCORE_PARAMETERS) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  const bool eligible = at::autocast::firstarg_is_eligible(at::kCUDA, input);
  dtype = eligible ? at::autocast::set_opt_dtype(at::kFloat, dtype) : dtype;
  return forward_by(SOFTMAX_EXT_SCORE_ARGUMENTS, dispatch);
}

#define SOFTMAX_EXT_SCORE_BACKWARD_PARAMETERS                                                 \
  int64_t op, const at::Tensor &g, const at::Tensor &y, const Maybe &lse, const Maybe &input, \
      const Maybe &scale, double factor, double softcap, const Maybe &mask, c10::SymInt left, \
      c10::SymInt right, c10::SymInt offset, const Maybe &sink, double sink_value,            \
      at::ScalarType input_dtype, std::array<bool, 4> wanted

// f(tensors, options, wanted), of which the gradients that are not wanted are made empty.
template <class F>
Four backward_by(int64_t op, const at::Tensor& g, const Maybe& input, const Maybe& scale,
                 double factor, double softcap, const Maybe& mask, const c10::SymInt& left,
                 const c10::SymInt& right, const c10::SymInt& offset, const Maybe& sink,
                 double sink_value, std::array<bool, 4> wanted, F f) {
  return with_scores(
      op, or_undefined(input), scale, factor, softcap, mask, left, right, offset, sink, sink_value,
      [&](const ScoreTensors& tensors, const ScoreOptions& options) {
        const ScoreTensors gradients =
            f(tensors, options, ScoreWanted{wanted[0], wanted[1], wanted[2], wanted[3]});
        const auto or_empty = [&](const at::Tensor& tensor) {
          return tensor.defined() ? tensor : at::empty({0}, g.options());
        };
        return Four(or_empty(gradients.input), or_empty(gradients.scale), or_empty(gradients.mask),
                    or_empty(gradients.sink));
      });
}

#define SOFTMAX_EXT_SCORE_BACKWARD_ARGUMENTS \
  op, g, input, scale, factor, softcap, mask, left, right, offset, sink, sink_value, wanted

Four backward_kernel(SOFTMAX_EXT_SCORE_BACKWARD_PARAMETERS) {
  return backward_by(
      SOFTMAX_EXT_SCORE_BACKWARD_ARGUMENTS,
      [&](const ScoreTensors& tensors, const ScoreOptions& options, const ScoreWanted& wanted) {
        return score_backward(g, y, or_undefined(lse), tensors, options, input_dtype, wanted);
      });
}

Four backward_composed(SOFTMAX_EXT_SCORE_BACKWARD_PARAMETERS) {
  (void)lse;
  return backward_by(
      SOFTMAX_EXT_SCORE_BACKWARD_ARGUMENTS,
      [&](const ScoreTensors& tensors, const ScoreOptions& options, const ScoreWanted& wanted) {
        return composed_score_gradients(g, y, tensors, options, input_dtype, wanted);
      });
}

Four backward_meta(SOFTMAX_EXT_SCORE_BACKWARD_PARAMETERS) {
  return backward_by(
      SOFTMAX_EXT_SCORE_BACKWARD_ARGUMENTS,
      [&](const ScoreTensors& tensors, const ScoreOptions& options, const ScoreWanted& wanted) {
        check_score_gradient(g, y, or_undefined(lse), tensors, options, input_dtype, wanted);
        ScoreTensors gradients;
        const auto like = [](const at::Tensor& tensor) {
          return at::empty_symint(tensor.sym_sizes(), tensor.options());
        };
        if (wanted.input) {
          const at::Tensor& shape = options.op == ScoreOp::kLogSumExp ? tensors.input : y;
          gradients.input = at::empty_symint(shape.sym_sizes(), y.options().dtype(input_dtype));
        }
        if (wanted.scale) gradients.scale = like(tensors.scale);
        if (wanted.mask) gradients.mask = like(tensors.mask);
        if (wanted.sink) gradients.sink = like(tensors.sink);
        return gradients;
      });
}

}  // namespace

at::Tensor score_softmax(const ScoreTensors& tensors, const ScoreOptions& options,
                         MaybeType dtype) {
  if (!kernels_take(tensors)) return std::get<0>(dispatch(tensors, options, dtype));
  SOFTMAX_EXT_RECORD(kForward, tensors.input);
  const bool recorded = requires_grad(tensors);
  auto [result, lse] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return score_forward(tensors, options, dtype,
                         recorded && tensors.sink.defined() && tensors.sink.requires_grad());
  }();
  if (recorded) record(result, lse, tensors, options);
  return result;
}

void score_softmax_in_place(ScoreTensors& tensors, const ScoreOptions& options) {
  at::Tensor& input = tensors.input;
  const bool recorded = requires_grad(tensors);
  // What the gradient needs of the input is kept beside it.
  if (!kernels_take(tensors) || (recorded && gradient_of(tensors, options).needs_input())) {
    ScoreTensors copied = tensors;
    if (recorded) copied.input = input.clone();
    input.copy_(score_softmax(copied, options, std::nullopt));
    return;
  }
  (void)check_scores(tensors, options, std::nullopt);
  torch::autograd::check_inplace(input, recorded);
  at::assert_no_internal_overlap(input);
  TORCH_CHECK(!input.is_inference() || c10::InferenceMode::is_enabled(), name(options.op),
              "_(): Inplace update to inference tensor outside InferenceMode is not allowed; clone "
              "it first");
  SOFTMAX_EXT_RECORD("softmax_ext::score_softmax_", input);
  auto edges = recorded ? edges_of(tensors) : torch::autograd::edge_list();
  torch::autograd::increment_version(input);
  at::Tensor lse;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    lse = score_forward_in_place(
        tensors, options, recorded && tensors.sink.defined() && tensors.sink.requires_grad());
  }
  if (!recorded) return;
  const auto node = make_node(std::move(edges), gradient_of(tensors, options));
  torch::autograd::rebase_history(input, node);
  save(*node, input, lse, tensors, /*is_inplace_on_view=*/input.is_view());
}

void add_score_node_types() { NodeType<ScoreGradient>::add(); }

TORCH_LIBRARY_FRAGMENT(softmax_ext, library) {
  const auto define = [&](const char* name, const char* schema, auto* kernel, auto* composed,
                          auto* meta) {
    library.def(torch::schema(schema, c10::AliasAnalysisKind::FROM_SCHEMA),
                {at::Tag::pt2_compliant_tag});
    const auto implement = [&](c10::DispatchKey key, auto* function) {
      library.impl(name, torch::dispatch(key, function));
    };
    implement(c10::DispatchKey::CPU, kernel);
    implement(c10::DispatchKey::CUDA, kBuiltWithCuda ? kernel : composed);
    implement(c10::DispatchKey::Meta, meta);
    implement(c10::DispatchKey::FuncTorchBatched, composed);
    implement(c10::DispatchKey::Batched, composed);
  };
  define(kForward, (kForward + std::string(kParameters)).c_str(), forward_kernel, forward_composed,
         forward_meta);
  define(kBackward, kBackwardSchema, backward_kernel, backward_composed, backward_meta);
  library.def(torch::schema((kByTorch + std::string(kParameters)).c_str(),
                            c10::AliasAnalysisKind::FROM_SCHEMA),
              {at::Tag::pt2_compliant_tag});
  library.impl(kByTorch,
               torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, forward_by_torch));
  library.impl(kForward, torch::dispatch(c10::DispatchKey::Autograd, forward_autograd));
  library.impl(kForward, torch::dispatch(c10::DispatchKey::AutocastCUDA, forward_autocast));
}

}  // namespace softmax_ext
