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

// The tensors of a call seen as (outer, dim, inner). Of a contiguous one, element (o, d, i) is at
// (o * dim + d) * inner + i. A row is the dim elements of one (o, i); a slice all rows of one o.
struct Shape {
  int64_t outer;
  int64_t dim;
  int64_t inner;

  constexpr int64_t rows() const { return outer * inner; }
  constexpr int64_t numel() const { return outer * dim * inner; }
};

// The dims that `outer` and `inner` are the products of: neighbours are one dim where they are that in
// every tensor of the call. The last of either varies fastest.
struct Dims {
  static constexpr int kMax = 8;

  int outer;            // at least one
  int inner;            // none where inner is 1
  int64_t sizes[kMax];  // of the outer dims, then of the inner ones
};

// How far the elements of one tensor lie apart, in elements, along dim and each of the Dims. 0 where
// one element is read for all.
struct Strides {
  int64_t dim;
  int64_t of[Dims::kMax];
};

constexpr Dims contiguous_dims(const Shape& shape) {
  return {1, shape.inner == 1 ? 0 : 1, {shape.outer, shape.inner}};
}

constexpr Strides contiguous_strides(const Shape& shape) {
  return {shape.inner, {shape.dim * shape.inner, 1}};
}

// The element that index `i` of the first `count` outer dims begins with.
constexpr int64_t outer_offset(const Dims& dims, const Strides& strides, int count, int64_t i) {
  int64_t offset = 0;
  for (int k = count - 1; k > 0; --k) {
    offset += i % dims.sizes[k] * strides.of[k];
    i /= dims.sizes[k];
  }
  return offset + i * strides.of[0];
}

// The same of an index of each.
constexpr int64_t outer_offset(const Dims& dims, const Strides& strides, const int64_t* index) {
  int64_t offset = 0;
  for (int k = 0; k < dims.outer; ++k) offset += index[k] * strides.of[k];
  return offset;
}

// The same of an index of the inner dims, of which there are some.
constexpr int64_t inner_offset(const Dims& dims, const Strides& strides, int64_t i) {
  int64_t offset = 0;
  for (int k = dims.outer + dims.inner - 1; k > dims.outer; --k) {
    offset += i % dims.sizes[k] * strides.of[k];
    i /= dims.sizes[k];
  }
  return offset + i * strides.of[dims.outer];
}

// output = op(cast of input to output_dtype), over dim. Each element of input may be the memory of the
// same one of output, if these are of one size; otherwise they share none.
struct ForwardArgs {
  const void* input;
  void* output;
  DType input_dtype;   // any
  DType output_dtype;  // floating
  Shape shape;
  Op op;
  bool output_is_new = true;  // its memory may not have been written yet
  Dims dims = contiguous_dims(shape);
  Strides input_strides = contiguous_strides(shape);
  Strides output_strides = contiguous_strides(shape);
};

// grad_input = the gradient of op, given its output and the gradient of that. Each element of it may be
// the memory of the same one of either, if the types are the same; otherwise they share none.
struct BackwardArgs {
  const void* grad_output;
  const void* output;
  void* grad_input;
  DType output_dtype;      // floating; of grad_output and output
  DType grad_input_dtype;  // the output's, or of 16 bits where that is float32
  Shape shape;
  Op op;
  bool grad_input_is_new = true;  // its memory may not have been written yet
  Dims dims = contiguous_dims(shape);
  Strides grad_output_strides = contiguous_strides(shape);
  Strides output_strides = contiguous_strides(shape);
  Strides grad_input_strides = contiguous_strides(shape);
};

}  // namespace softmax_ext
