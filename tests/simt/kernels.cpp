// Runs the project's CUDA kernels on the host executor, for requests on stdin until it ends.
//
// A request is a line of key=value and the bytes of its tensors; the answer a line and the bytes of
// the result (tests/simt/host.py has the other end). Without thread orders only the plan is made, and
// neither has bytes. A request that was kept in a file can be run again, under a debugger too.
#include <atomic>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "requests.h"
#include "scores.h"

// The kernels' calls of exp in float64, which the linker sends here (--wrap).
static std::atomic<long long> exps{0};
extern "C" double __real_exp(double x);
extern "C" double __wrap_exp(double x) {
  exps.fetch_add(1, std::memory_order_relaxed);  // which orders nothing: races stay races
  return __real_exp(x);
}

namespace {

using namespace requests;

void answer(const Request& request) {
  const bool forward = request.text("direction") == "forward";
  const Shape shape{request.number("outer"), request.number("dim"), request.number("inner")};
  const Dims dims = dims_of(request, shape);
  const Op op = request.text("op") == name(Op::kSoftmax) ? Op::kSoftmax : Op::kLogSoftmax;
  const DType load = request.dtype("load");
  const DType store = request.dtype("store");
  const int in_place = static_cast<int>(request.number("in_place"));  // -1, or the input's number
  const DeviceProperties device = device_of(request);
  std::vector<std::string> orders = words_of(request, "orders");

  const auto bytes = [&](const Strides& strides, DType dtype) {
    return orders.empty() ? 0 : extent(shape, dims, strides) * static_cast<size_t>(size_of(dtype));
  };
  std::vector<Strides> strides;
  std::vector<Buffer> inputs;
  std::vector<std::vector<unsigned char>> given;
  for (size_t i = 0; i < (forward ? 1 : 2); ++i) {
    strides.push_back(strides_of(request, "load_strides", i, dims));
    inputs.emplace_back(bytes(strides.back(), load), request.number("load_offset", i));
    inputs.back().read();
    given.push_back(inputs.back().copy());
  }
  strides.push_back(strides_of(request, "store_strides", 0, dims));
  Buffer fresh(bytes(strides.back(), store), request.number("store_offset", 0));
  Buffer& output = in_place < 0 ? fresh : inputs.at(static_cast<size_t>(in_place));

  const ForwardArgs forward_args{
      inputs.front().data(), output.data(), load, store, shape, op, true, dims,
      strides.front(),       strides.back()};
  const BackwardArgs backward_args{inputs.front().data(),
                                   inputs.back().data(),
                                   output.data(),
                                   load,
                                   store,
                                   shape,
                                   op,
                                   true,
                                   dims,
                                   strides.front(),
                                   strides[1],
                                   strides.back()};
  const Workload work = forward ? workload(forward_args) : workload(backward_args);
  const std::string& wanted = request.text("schedule");
  Plan plan =
      wanted == "any" ? make_plan(work, device) : make_plan(work, device, schedule_of(wanted));
  if (plan.blocks == 0) orders.clear();
  limit_blocks(plan, request);
  Buffer scratch(plan.scratch_bytes, 0);

  std::vector<unsigned char> result;
  std::string problem;
  exps = 0;
  for (const std::string& order : orders) {
    simt::settings.order = order_of(order);
    for (size_t i = 0; i < inputs.size(); ++i) inputs[i].assign(given[i]);
    if (in_place < 0) output.fill(0xff);
    scratch.fill(0xff);
    const cudaError_t error =
        forward ? cuda::launch_forward(forward_args, plan, scratch.data(), nullptr)
                : cuda::launch_backward(backward_args, plan, scratch.data(), nullptr);
    if (error != cudaSuccess) problem = "the launch returned an error";
    if (result.empty()) {
      result = output.copy();
    } else if (!output.holds(result)) {
      problem = "another result in " + order + " order";
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].guards_intact()) problem = "an input's surroundings were written";
      if (static_cast<int>(i) != in_place && !inputs[i].holds(given[i])) {
        problem = "an input was written";
      }
    }
    if (!fresh.guards_intact()) problem = "the output's surroundings were written";
    if (!scratch.guards_intact()) problem = "the scratch memory's surroundings were written";
  }
  print_answer(plan, exps.load(), problem, result);
}

}  // namespace

int main() {
  for (Request request; read_request(request);) {
    if (request.words.count("reads") > 0) {
      answer_scores(request);
    } else {
      answer(request);
    }
  }
}
