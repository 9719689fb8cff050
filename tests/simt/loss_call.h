// A call of the kernels of losses, as a request asks for it: its memory, and its launches in all orders.
#pragma once

#include <algorithm>
#include <cstdio>
#include <deque>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch_losses.h"
#include "executor.h"
#include "requests.h"

struct LossCall {
  const requests::Request& request;
  softmax_ext::Shape shape;
  softmax_ext::Dims dims;
  softmax_ext::DType dtype, wide;  // wide: the type that is computed in
  std::deque<requests::Buffer> inputs, outputs;
  std::vector<std::vector<unsigned char>> given;

  explicit LossCall(const requests::Request& request)
      : request(request),
        shape{request.number("outer"), request.number("dim"), request.number("inner")},
        dims(requests::dims_of(request, shape)),
        dtype(request.dtype("dtype")),
        wide(dtype == softmax_ext::DType::kFloat64 ? dtype : softmax_ext::DType::kFloat32) {
    requests::device_of(request);
  }

  bool has(const char* name) const { return request.number(name) != 0; }
  double option(const char* name) const { return std::stod(request.text(name)); }
  softmax_ext::Strides strides(size_t tensor) const {
    return requests::strides_of(request, "strides", tensor, dims);
  }
  size_t elements(const softmax_ext::Strides& of) const {
    return requests::extent(shape, dims, of) * static_cast<size_t>(size_of(dtype));
  }
  // Of `count` of them for each row.
  size_t numbers(size_t count = 1) const {
    return count * static_cast<size_t>(shape.rows()) * static_cast<size_t>(size_of(wide));
  }
  // One for all rows, or one for each.
  size_t gradient(const char* name) const {
    return request.number(name) == 1 ? static_cast<size_t>(size_of(wide)) : numbers();
  }
  int64_t gradient_step(const char* name) const { return request.number(name) == 1 ? 0 : 1; }

  // Null where the request has none.
  const void* read(const char* name, size_t bytes) {
    if (!has(name)) return nullptr;
    inputs.emplace_back(bytes, 0).read();
    given.push_back(inputs.back().copy());
    return inputs.back().data();
  }
  void* write(size_t bytes) { return outputs.emplace_back(bytes, 0).data(); }

  // launch(scratch) in each order, and the answer. Without outputs the first input is written.
  template <class Launch>
  void run(const softmax_ext::LossPlan& plan, Launch launch) {
    using requests::Buffer;
    Buffer scratch(plan.scratch_bytes, 0);
    std::vector<unsigned char> result;
    std::string problem;
    for (const std::string& order : requests::words_of(request, "orders")) {
      simt::settings.order = requests::order_of(order);
      for (size_t i = 0; i < inputs.size(); ++i) inputs[i].assign(given[i]);
      for (Buffer& output : outputs) output.fill(0xff);
      scratch.fill(0xff);
      if (launch(scratch.data()) != cudaSuccess) problem = "the launch returned an error";
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
    requests::print("along", plan.along);
    requests::print("parts", plan.parts);
    requests::print("sums", plan.sums);
    printf("problem=%s\n", problem.c_str());
    fwrite(result.data(), 1, result.size(), stdout);
    fflush(stdout);
  }
};
