// Runs the CUDA kernels of scores. Of a request, `reads` and `writes` name the tensors by what the arguments
// of a call have them as; each has NAME.dtype, NAME.strides, of the outer dims and of dim, NAME.offset in
// bytes, and those that are written NAME.times: how often its extent follows itself.
#include "scores.h"

#include <deque>

#include "../../csrc/cuda/launch.h"
#include "softmax_ext/score_plan.h"

namespace {

using namespace requests;

struct Tensor {
  std::string name;
  Strides strides;
  Buffer buffer;
  std::vector<unsigned char> given{};

  static Tensor of(const Request& request, const std::string& name, const Shape& shape,
                   const Dims& dims, int64_t times, bool exists) {
    const Strides strides = strides_of(request, name + ".strides", 0, dims);
    const size_t elements = exists ? extent(shape, dims, strides) * static_cast<size_t>(times) : 0;
    return {name, strides,
            Buffer(elements * static_cast<size_t>(size_of(request.dtype(name + ".dtype"))),
                   request.number(name + ".offset", 0))};
  }
};

// Of either direction.
struct Call {
  ScoreForwardArgs forward{};
  ScoreBackwardArgs backward{};

  Scores& scores(bool is_forward) { return is_forward ? forward.scores : backward.scores; }
};

void set(Call& call, bool is_forward, const Request& request, Tensor& tensor, void* data) {
  Scores& scores = call.scores(is_forward);
  const std::string& name = tensor.name;
  ScoreForwardArgs& f = call.forward;
  ScoreBackwardArgs& b = call.backward;
  const auto is = [&](const char* other, auto& pointer, Strides& strides) {
    if (name != other) return false;
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(data);
    strides = tensor.strides;
    return true;
  };
  if (name == "mask") scores.mask_dtype = request.dtype("mask.dtype");
  const bool known =
      is("scale", scores.scale, scores.scale_strides) ||
      is("mask", scores.mask, scores.mask_strides) ||
      is("sink", scores.sink, scores.sink_strides) ||
      (is_forward ? is("input", f.input, f.input_strides) ||
                        is("output", f.output, f.output_strides) || is("lse", f.lse, f.lse_strides)
                  : is("grad_output", b.grad_output, b.grad_output_strides) ||
                        is("output", b.output, b.output_strides) ||
                        is("input", b.input, b.input_strides) || is("lse", b.lse, b.row_strides) ||
                        is("grad_input", b.grad_input, b.grad_input_strides) ||
                        is("grad_scale", b.grad_scale, b.row_strides) ||
                        is("grad_sink", b.grad_sink, b.row_strides) ||
                        is("grad_mask_of_rows", b.grad_mask_of_rows, b.row_strides) ||
                        is("grad_mask", b.grad_mask, b.grad_mask_strides));
  if (!known) give_up("no such tensor: " + name);
}

}  // namespace

void answer_scores(const Request& request) {
  const bool forward = request.text("direction") == "forward";
  const Shape shape{request.number("outer"), request.number("dim"), 1};
  const Dims dims = dims_of(request, shape);
  const DType dtype = request.dtype("dtype");
  const DeviceProperties device = device_of(request);
  std::vector<std::string> orders = words_of(request, "orders");

  Call call;
  const auto begin = [&](auto& args) {
    args.output_dtype = dtype;
    args.shape = shape;
    args.dims = dims;
    args.op = request.text("op") == "softmax" ? Op::kSoftmax : Op::kLogSoftmax;
    args.scores.factor = std::stod(request.text("factor"));
    args.scores.softcap = std::stod(request.text("softcap"));
    args.scores.sink_of_all = std::stod(request.text("sink_of_all"));
    args.scores.left = request.number("left");
    args.scores.right = request.number("right");
    args.scores.offset = request.number("offset");
    args.scores.query_strides = strides_of(request, "query.strides", 0, dims);
  };
  begin(call.forward);
  begin(call.backward);
  call.forward.input_dtype = call.backward.grad_input_dtype = dtype;
  call.backward.grad_mask_parts = request.number("parts");

  std::deque<Tensor> read, written;
  const bool runs = !orders.empty();
  for (const std::string& name : words_of(request, "reads")) {
    Tensor& tensor = read.emplace_back(Tensor::of(request, name, shape, dims, 1, runs));
    tensor.buffer.read();
    tensor.given = tensor.buffer.copy();
    set(call, forward, request, tensor, tensor.buffer.data());
  }
  const bool in_place = request.number("in_place") != 0;
  for (const std::string& name : words_of(request, "writes")) {
    const int64_t times = request.number(name + ".times");
    Tensor& tensor = written.emplace_back(Tensor::of(request, name, shape, dims, times, runs));
    const bool shares = in_place && &tensor == &written.front();
    set(call, forward, request, tensor, (shares ? read.front() : tensor).buffer.data());
  }

  const Workload work = forward ? workload(call.forward) : workload(call.backward);
  const std::string& wanted = request.text("schedule");
  Plan plan = wanted == "any" ? make_score_plan(work, device)
                              : make_score_plan(work, device, schedule_of(wanted));
  if (plan.blocks == 0) orders.clear();
  limit_blocks(plan, request);
  Buffer scratch(plan.scratch_bytes, 0);

  std::vector<unsigned char> result;
  std::string problem;
  for (const std::string& order : orders) {
    simt::settings.order = order_of(order);
    for (Tensor& tensor : read) tensor.buffer.assign(tensor.given);
    for (Tensor& tensor : written) tensor.buffer.fill(0xff);
    scratch.fill(0xff);
    const cudaError_t error =
        forward ? cuda::launch_score_forward(call.forward, plan, scratch.data(), nullptr)
                : cuda::launch_score_backward(call.backward, plan, scratch.data(), nullptr);
    if (error != cudaSuccess) problem = "the launch returned an error";
    std::vector<unsigned char> all;
    for (Tensor& tensor : written) {
      const bool shares = in_place && &tensor == &written.front();
      const std::vector<unsigned char> bytes = (shares ? read.front() : tensor).buffer.copy();
      all.insert(all.end(), bytes.begin(), bytes.end());
      if (!tensor.buffer.guards_intact()) problem = tensor.name + "'s surroundings were written";
    }
    for (Tensor& tensor : read) {
      if (!tensor.buffer.guards_intact()) problem = tensor.name + "'s surroundings were written";
      const bool shares = in_place && &tensor == &read.front();
      if (!shares && !tensor.buffer.holds(tensor.given)) problem = tensor.name + " was written";
    }
    if (!scratch.guards_intact()) problem = "the scratch memory's surroundings were written";
    if (result.empty()) {
      result = all;
    } else if (all != result) {
      problem = "another result in " + order + " order";
    }
  }
  print_answer(plan, 0, problem, result);
}
