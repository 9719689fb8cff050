// Runs the project's CUDA kernels of cross-entropy on the host executor, for requests on stdin until it ends.
//
// A request is a line of key=value and the bytes of the tensors that are read; the answer a line and the bytes
// of those that are written (tests/simt/losses_on_host.py has the other end). With `gradient` the gradient is
// written over the input, after a forward call.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch_losses.h"
#include "executor.h"
#include "requests.h"

namespace {

using namespace requests;

void answer(const Request& request) {
  const bool forward = request.text("direction") == "forward";
  const Shape shape{request.number("outer"), request.number("dim"), request.number("inner")};
  const Dims dims = dims_of(request, shape);
  const DType dtype = request.dtype("dtype");
  const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const Strides strides = strides_of(request, "strides", 0, dims);
  const Strides grad_strides = strides_of(request, "strides", 1, dims);
  device_of(request);
  const auto rows = static_cast<size_t>(shape.rows());
  const auto of_wide = static_cast<size_t>(size_of(wide));

  std::deque<Buffer> inputs;
  std::vector<std::vector<unsigned char>> given;
  const auto read = [&](const char* name, size_t bytes) -> const void* {
    if (request.number(name) == 0) return nullptr;
    inputs.emplace_back(bytes, 0).read();
    given.push_back(inputs.back().copy());
    return inputs.back().data();
  };
  const auto elements = [&](const Strides& of) {
    return extent(shape, dims, of) * static_cast<size_t>(size_of(dtype));
  };
  const void* const input = read("input", elements(strides));
  const auto* const target = static_cast<const int64_t*>(read("target", rows * sizeof(int64_t)));
  const void* const weight = read("weight", static_cast<size_t>(shape.dim) * of_wide);
  const void* const grad_loss =
      read("grad_loss", request.number("grad_loss") == 1 ? of_wide : rows * of_wide);
  const void* const grad_lse = read("grad_lse", rows * of_wide);
  const void* const lse = read("lse", rows * of_wide);
  const void* const lse_rest = read("lse_rest", rows * of_wide);
  const void* const log_p = read("log_p", rows * of_wide);
  const void* const grad_entropy = read("grad_entropy", rows * of_wide);
  const void* const entropy = read("entropy", rows * of_wide);
  const auto* const divisor = static_cast<const double*>(read("divisor", sizeof(double)));

  const auto option = [&](const char* name) { return std::stod(request.text(name)); };
  const Loss loss{target,
                  request.number("ignore_index"),
                  weight,
                  option("weight_sum"),
                  option("smoothing"),
                  option("z_loss"),
                  option("factor"),
                  option("softcap")};
  const LossGrads grads{grad_loss, request.number("grad_loss") == 1 ? 0 : 1, divisor, grad_lse,
                        grad_entropy};

  std::deque<Buffer> outputs;
  const auto write = [&](size_t bytes) -> void* { return outputs.emplace_back(bytes, 0).data(); };
  LossForwardArgs forward_args{input,
                               dtype,
                               shape,
                               dims,
                               strides,
                               loss,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               request.number("wants_lse") != 0,
                               nullptr,
                               {}};
  LossBackwardArgs backward_args{input, nullptr, dtype, shape,    dims,  strides, grad_strides,
                                 true,  loss,    lse,   lse_rest, log_p, grads,   entropy};
  cuda::LossTotals totals{};
  if (forward) {
    for (void** data :
         {&forward_args.row_loss, &forward_args.lse, &forward_args.lse_rest, &forward_args.log_p}) {
      *data = write(rows * of_wide);
    }
    void* const of_rows = write(rows * of_wide);
    if (request.number("wants_entropy") != 0) forward_args.entropy = of_rows;
    for (double** data : {&totals.weight, &totals.loss}) {
      *data = static_cast<double*>(write(sizeof(double)));
    }
  } else {
    const bool in_place = request.number("in_place") != 0;
    backward_args.grad_input = in_place ? inputs.front().data() : write(elements(grad_strides));
  }

  const LossPlan plan = make_loss_plan(shape, dtype);
  Buffer scratch(plan.scratch_bytes, 0);
  std::vector<unsigned char> result;
  std::string problem;
  for (const std::string& order : words_of(request, "orders")) {
    simt::settings.order = order_of(order);
    for (size_t i = 0; i < inputs.size(); ++i) inputs[i].assign(given[i]);
    for (Buffer& output : outputs) output.fill(0xff);
    scratch.fill(0xff);
    const cudaError_t error =
        forward ? cuda::launch_loss_forward(forward_args, plan, scratch.data(), totals,
                                            request.number("is_mean") != 0, nullptr)
                : cuda::launch_loss_backward(backward_args, plan, nullptr);
    if (error != cudaSuccess) problem = "the launch returned an error";
    std::vector<unsigned char> all;
    const auto add = [&](Buffer& buffer) {
      const std::vector<unsigned char> bytes = buffer.copy();
      all.insert(all.end(), bytes.begin(), bytes.end());
    };
    if (outputs.empty()) add(inputs.front());
    for (Buffer& output : outputs) {
      add(output);
      if (!output.guards_intact()) problem = "the output's surroundings were written";
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].guards_intact()) problem = "an input's surroundings were written";
      if ((i > 0 || !outputs.empty()) && !inputs[i].holds(given[i]))
        problem = "an input was written";
    }
    if (!scratch.guards_intact()) problem = "the scratch memory's surroundings were written";
    if (result.empty()) {
      result = all;
    } else if (all != result) {
      problem = "another result in " + order + " order";
    }
  }
  std::replace(problem.begin(), problem.end(), ' ', '_');
  print("along", plan.along);
  print("parts", plan.parts);
  print("sums", plan.sums);
  printf("problem=%s\n", problem.c_str());
  fwrite(result.data(), 1, result.size(), stdout);
  fflush(stdout);
}

}  // namespace

int main() {
  for (Request request; read_request(request);) answer(request);
}
