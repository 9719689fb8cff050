// Runs the project's CUDA kernels of losses on the host executor, for requests on stdin until it ends.
//
// A request is a line of key=value and the bytes of the tensors that are read; the answer a line and the bytes
// of those that are written (tests/simt/losses_on_host.py has the other end).
#include "loss_call.h"

namespace {

using namespace requests;

Loss loss_of(const LossCall& call, const int64_t* target, const void* weight) {
  const double smoothing = call.option("smoothing"), z_loss = call.option("z_loss");
  return {target,
          call.request.number("ignore_index"),
          weight,
          call.option("weight_sum"),
          smoothing,
          z_loss,
          call.option("factor"),
          call.option("softcap")};
}

// In place, the gradient is written over the input, after a forward call.
void cross_entropy(LossCall& call, bool forward) {
  const Strides strides = call.strides(0), grad_strides = call.strides(1);
  const auto rows = static_cast<size_t>(call.shape.rows());
  const void* const input = call.read("input", call.elements(strides));
  const auto* const target =
      static_cast<const int64_t*>(call.read("target", rows * sizeof(int64_t)));
  const void* const weight =
      call.read("weight", static_cast<size_t>(call.shape.dim * size_of(call.wide)));
  const void* const grad_loss = call.read("grad_loss", call.gradient("grad_loss"));
  const void* const grad_lse = call.read("grad_lse", call.numbers());
  const void* const lse = call.read("lse", call.numbers());
  const void* const lse_rest = call.read("lse_rest", call.numbers());
  const void* const log_p = call.read("log_p", call.numbers());
  const void* const grad_entropy = call.read("grad_entropy", call.numbers());
  const void* const entropy = call.read("entropy", call.numbers());
  const auto* const divisor = static_cast<const double*>(call.read("divisor", sizeof(double)));
  const Loss loss = loss_of(call, target, weight);
  const LossPlan plan = make_loss_plan(call.shape, call.dtype);
  if (forward) {
    LossForwardArgs args{input,
                         call.dtype,
                         call.shape,
                         call.dims,
                         strides,
                         loss,
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr,
                         call.has("wants_lse"),
                         nullptr,
                         {}};
    for (void** data : {&args.row_loss, &args.lse, &args.lse_rest, &args.log_p}) {
      *data = call.write(call.numbers());
    }
    void* const of_rows = call.write(call.numbers());
    if (call.has("wants_entropy")) args.entropy = of_rows;
    cuda::LossTotals totals{};
    for (double** data : {&totals.weight, &totals.loss}) {
      *data = static_cast<double*>(call.write(sizeof(double)));
    }
    return call.run(plan, [&](void* scratch) {
      return cuda::launch_loss_forward(args, plan, scratch, totals, call.has("is_mean"), nullptr);
    });
  }
  const LossGrads grads{grad_loss, call.gradient_step("grad_loss"), divisor, grad_lse,
                        grad_entropy};
  void* const output =
      call.has("in_place") ? call.inputs.front().data() : call.write(call.elements(grad_strides));
  const LossBackwardArgs args{input,    output,       call.dtype, call.shape, call.dims,
                              strides,  grad_strides, true,       loss,       lse,
                              lse_rest, log_p,        grads,      entropy};
  call.run(plan, [&](void*) { return cuda::launch_loss_backward(args, plan, nullptr); });
}

void probabilities(LossCall& call, bool forward) {
  const Strides strides = call.strides(0), target_strides = call.strides(1);
  const void* const input = call.read("input", call.elements(strides));
  const void* const target = call.read("target", call.elements(target_strides));
  const void* const weight =
      call.read("weight", static_cast<size_t>(call.shape.dim * size_of(call.wide)));
  const size_t kept_bytes = call.numbers(ProbabilityRow<float>::kCount);
  const void* const grad_loss = call.read("grad_loss", call.gradient("grad_loss"));
  const void* const grad_lse = call.read("grad_lse", call.numbers());
  const void* const lse = call.read("lse", call.numbers());
  const void* const kept = call.read("kept", kept_bytes);
  const Loss loss = loss_of(call, nullptr, weight);
  const LossPlan plan = make_loss_plan(call.shape, call.dtype);
  if (forward) {
    void* const row_loss = call.write(call.numbers());
    void* const of_lse = call.write(call.numbers());
    const ProbabilityForwardArgs args{input,
                                      target,
                                      call.dtype,
                                      call.shape,
                                      call.dims,
                                      strides,
                                      target_strides,
                                      loss,
                                      row_loss,
                                      of_lse,
                                      call.write(kept_bytes)};
    return call.run(plan, [&](void* scratch) {
      return cuda::launch_probability_forward(args, plan, scratch, nullptr);
    });
  }
  const size_t bytes = static_cast<size_t>(call.shape.numel() * size_of(call.dtype));
  void* const grad_input = call.has("of_first") ? call.write(bytes) : nullptr;
  void* const grad_target = call.has("of_second") ? call.write(bytes) : nullptr;
  const ProbabilityBackwardArgs args{input,
                                     target,
                                     grad_input,
                                     grad_target,
                                     call.dtype,
                                     call.shape,
                                     call.dims,
                                     strides,
                                     target_strides,
                                     true,
                                     loss,
                                     lse,
                                     kept,
                                     grad_loss,
                                     call.gradient_step("grad_loss"),
                                     call.option("grad_factor"),
                                     grad_lse};
  call.run(plan, [&](void*) { return cuda::launch_probability_backward(args, plan, nullptr); });
}

void divergence(LossCall& call, bool forward) {
  const Strides strides = call.strides(0), teacher_strides = call.strides(1);
  const void* const student = call.read("input", call.elements(strides));
  const void* const teacher = call.read("target", call.elements(teacher_strides));
  const void* const weight = call.read("weight", call.numbers());
  const size_t kept_bytes = call.numbers(DivergenceRow<float>::kCount);
  const void* const grad_loss = call.read("grad_loss", call.gradient("grad_loss"));
  const void* const kept = call.read("kept", kept_bytes);
  const DivergenceOptions of{call.option("beta"), call.option("factor"), weight};
  const LossPlan plan = make_loss_plan(call.shape, call.dtype, /*are_whole=*/forward);
  if (forward) {
    void* const row_loss = call.write(call.numbers());
    const DivergenceForwardArgs args{
        student, teacher,         call.dtype, call.shape, call.dims,
        strides, teacher_strides, of,         row_loss,   call.write(kept_bytes)};
    return call.run(plan,
                    [&](void*) { return cuda::launch_divergence_forward(args, plan, nullptr); });
  }
  const size_t bytes = static_cast<size_t>(call.shape.numel() * size_of(call.dtype));
  void* const grad_student = call.has("of_first") ? call.write(bytes) : nullptr;
  void* const grad_teacher = call.has("of_second") ? call.write(bytes) : nullptr;
  const DivergenceBackwardArgs args{student,
                                    teacher,
                                    grad_student,
                                    grad_teacher,
                                    call.dtype,
                                    call.shape,
                                    call.dims,
                                    strides,
                                    teacher_strides,
                                    true,
                                    of,
                                    kept,
                                    grad_loss,
                                    call.gradient_step("grad_loss"),
                                    call.option("grad_factor")};
  call.run(plan, [&](void*) { return cuda::launch_divergence_backward(args, plan, nullptr); });
}

void answer(const Request& request) {
  LossCall call(request);
  const bool forward = request.text("direction") == "forward";
  const std::string& loss = request.text("loss");
  if (loss == "cross_entropy") return cross_entropy(call, forward);
  if (loss == "probabilities") return probabilities(call, forward);
  if (loss == "divergence") return divergence(call, forward);
  give_up("no such loss: " + loss);
}

}  // namespace

int main() {
  for (Request request; read_request(request);) answer(request);
}
