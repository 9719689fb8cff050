// Runs the project's CUDA kernels of segments on the host executor, for requests on stdin until it ends.
//
// A request is a line of key=value and the bytes of the pointers, the order if there is one, and the
// tensors that are read; the answer a line and the bytes of the result (tests/simt/segments_host.py has
// the other end).
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch_segments.h"
#include "executor.h"
#include "requests.h"

namespace {

using namespace requests;

SegmentOp op_of(const std::string& text) {
  for (const auto op : {SegmentOp::kSoftmax, SegmentOp::kLogSoftmax, SegmentOp::kLogSumExp}) {
    if ("segment_" + text == name(op)) return op;
  }
  give_up("no such operation: " + text);
}

void answer(const Request& request) {
  const bool forward = request.text("direction") == "forward";
  const Shape shape{request.number("outer"), request.number("dim"), request.number("inner")};
  const SegmentOp op = op_of(request.text("op"));
  const DType dtype = request.dtype("dtype");
  const int64_t count = request.number("count");
  const double scale = std::stod(request.text("scale"));
  const auto offset = static_cast<size_t>(request.number("offset"));
  const bool of_segments = op == SegmentOp::kLogSumExp;
  const Shape each{shape.outer, count, shape.inner};  // a row for each segment
  const DeviceProperties device = device_of(request);

  std::vector<Buffer> inputs;
  std::vector<std::vector<unsigned char>> given;
  const auto read = [&](size_t elements, int64_t bytes, size_t behind) {
    inputs.emplace_back(elements * static_cast<size_t>(bytes), behind);
    inputs.back().read();
    given.push_back(inputs.back().copy());
  };
  const auto read_tensor = [&](const Shape& of) {
    read(static_cast<size_t>(of.numel()), size_of(dtype), offset);
  };
  read(static_cast<size_t>(count) + 1, sizeof(int64_t), 0);
  read(request.number("ordered") != 0 ? static_cast<size_t>(shape.dim) : 0, sizeof(int64_t), 0);
  if (!forward) {
    read_tensor(of_segments ? each : shape);
    read_tensor(of_segments ? each : shape);
  }
  if (forward || of_segments) read_tensor(shape);
  const Shape& result_shape = forward && of_segments ? each : shape;
  Buffer output(static_cast<size_t>(result_shape.numel() * size_of(dtype)), offset);

  const Segments segments{count, reinterpret_cast<const int64_t*>(inputs[0].data()),
                          request.number("ordered") != 0
                              ? reinterpret_cast<const int64_t*>(inputs[1].data())
                              : nullptr};
  const bool aligned = offset % 16 == 0 && shape.inner * size_of(dtype) % 16 == 0;
  const SegmentPlan plan = make_segment_plan(shape, count, dtype, aligned, forward ? 2 : 1, device);
  Buffer scratch(plan.scratch_bytes, 0);

  std::vector<unsigned char> result;
  std::string problem;
  for (const std::string& order : words_of(request, "orders")) {
    simt::settings.order = order_of(order);
    output.fill(0xff);
    scratch.fill(0xff);
    const cudaError_t error =
        forward ? cuda::launch_segments_forward(
                      {inputs[2].data(), output.data(), dtype, shape, segments, op, scale}, plan,
                      scratch.data(), nullptr)
                : cuda::launch_segments_backward(
                      {inputs[2].data(), inputs[3].data(), of_segments ? inputs[4].data() : nullptr,
                       output.data(), dtype, shape, segments, op, scale},
                      plan, scratch.data(), nullptr);
    if (error != cudaSuccess) problem = "the launch returned an error";
    if (result.empty()) {
      result = output.copy();
    } else if (!output.holds(result)) {
      problem = "another result in " + order + " order";
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].guards_intact()) problem = "an input's surroundings were written";
      if (!inputs[i].holds(given[i])) problem = "an input was written";
    }
    if (!output.guards_intact()) problem = "the output's surroundings were written";
    if (!scratch.guards_intact()) problem = "the scratch memory's surroundings were written";
  }
  std::replace(problem.begin(), problem.end(), ' ', '_');
  print("columns", plan.columns);
  print("across", plan.across);
  print("along", plan.along);
  print("most", plan.most);
  print("block_rows", plan.block_rows);
  printf("problem=%s\n", problem.c_str());
  fwrite(result.data(), 1, result.size(), stdout);
  fflush(stdout);
}

}  // namespace

int main() {
  for (Request request; read_request(request);) answer(request);
}
