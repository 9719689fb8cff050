// What is to be computed, without a framework: element types, the shape, and the arguments of a
// forward and a backward call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace softmax_ext {

enum class Op : int { kSoftmax = 0, kLogSoftmax = 1 };

constexpr const char* name(Op op) { return op == Op::kSoftmax ? "softmax" : "log_softmax"; }

// The floating types come first: they are what an output can be.
enum class DType : int {
  kFloat16 = 0,
  kBFloat16,
  kFloat32,
  kFloat64,
  kBool,
  kUInt8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
};

constexpr bool is_floating(DType dtype) { return dtype <= DType::kFloat64; }

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kBool:
    case DType::kUInt8:
    case DType::kInt8:
      return 1;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
  }
  return 0;
}

// A contiguous tensor seen as (outer, dim, inner): element (o, d, i) is at (o * dim + d) * inner + i.
// A row is the dim elements of one (o, i).
struct Shape {
  int64_t outer;
  int64_t dim;
  int64_t inner;

  constexpr int64_t rows() const { return outer * inner; }
  constexpr int64_t numel() const { return outer * dim * inner; }
};

// output = op(cast of input to output_dtype), over dim. input and output may be the same memory
// if their types are the same.
struct ForwardArgs {
  const void* input;
  void* output;
  DType input_dtype;   // any
  DType output_dtype;  // floating
  Shape shape;
  Op op;
  bool output_is_new = true;  // its memory may not have been written yet
};

// grad_input = the gradient of op, given its output and the gradient of that. grad_input may be
// the same memory as either if the types are the same.
struct BackwardArgs {
  const void* grad_output;
  const void* output;
  void* grad_input;
  DType output_dtype;      // floating; of grad_output and output
  DType grad_input_dtype;  // floating
  Shape shape;
  Op op;
  bool grad_input_is_new = true;  // its memory may not have been written yet
};

}  // namespace softmax_ext
