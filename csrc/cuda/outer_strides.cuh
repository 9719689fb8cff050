// Where the rows of a call's tensors begin: all that the kernels know of strides but that along dim.
#pragma once

#include "softmax_ext/plan.h"
#include "softmax_ext/portability.h"

namespace softmax_ext::cuda {

// n / size for n below 2^31, by a product (Granlund and Montgomery, "Division by invariant integers
// using multiplication", 1994).
struct Divisor {
  uint32_t size;
  uint32_t factor;
  uint32_t shift;  // of the upper half of the product

  static constexpr Divisor of(int64_t size) {
    Divisor divisor{static_cast<uint32_t>(size), 0, 0};
    if (size < 2) return divisor;
    while ((int64_t{2} << divisor.shift) < size) ++divisor.shift;
    const auto power = uint64_t{1} << (32 + divisor.shift);
    divisor.factor = static_cast<uint32_t>(power / static_cast<uint64_t>(size) + 1);
    return divisor;
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return size == 1 ? n : static_cast<uint32_t>((uint64_t{n} * factor) >> 32) >> shift;
  }
};

// How far the outer indices of each tensor lie apart, in the order of the kernel's arguments: an
// argument of the kernel, so that what is made of it is made once for a row, for all threads alike.
struct OuterStrides {
  static constexpr int kTensors = 3;

  int dims;
  Divisor sizes[limits::kOuterDims];  // the first is not divided by
  int64_t of[kTensors][limits::kOuterDims];

  // The element of tensor number `tensor` that an outer index begins with.
  __device__ __forceinline__ int64_t offset(int tensor, int64_t index) const {
    if (dims == 1) return index * of[tensor][0];
    auto rest = static_cast<uint32_t>(index);
    int64_t offset = 0;
#pragma unroll 1
    for (int k = limits::kOuterDims - 1; k > 0; --k) {
      if (k >= dims) continue;
      const uint32_t quotient = sizes[k].quotient(rest);
      offset += (rest - quotient * sizes[k].size) * of[tensor][k];
      rest = quotient;
    }
    return offset + rest * of[tensor][0];
  }
};

// The same where a row is in many tensors: its index along each outer dim, once for all of them.
struct OuterIndex {
  int dims;
  int64_t first;
  uint32_t others[limits::kOuterDims - 1];

  __device__ __forceinline__ int64_t offset(const Strides& strides) const {
    int64_t offset = first * strides.of[0];
#pragma unroll
    for (int k = 1; k < limits::kOuterDims; ++k) {
      if (k >= dims) break;
      offset += others[k - 1] * strides.of[k];
    }
    return offset;
  }
};

struct OuterDims {
  int dims;
  Divisor sizes[limits::kOuterDims];  // the first is not divided by

  explicit OuterDims(const Dims& outer) : dims(outer.outer), sizes{} {
    for (int k = 1; k < dims; ++k) sizes[k] = Divisor::of(outer.sizes[k]);
  }
  __device__ __forceinline__ OuterIndex index(int64_t row) const {
    OuterIndex result{dims, row, {}};
    if (dims == 1) return result;
    auto rest = static_cast<uint32_t>(row);
#pragma unroll
    for (int k = limits::kOuterDims - 1; k > 0; --k) {
      if (k >= dims) continue;
      const uint32_t quotient = sizes[k].quotient(rest);
      result.others[k - 1] = rest - quotient * sizes[k].size;
      rest = quotient;
    }
    result.first = rest;
    return result;
  }
};

template <class... Tensors>
OuterStrides outer_strides(const Dims& dims, const Tensors&... tensors) {
  static_assert(sizeof...(Tensors) <= OuterStrides::kTensors);
  OuterStrides result{};
  result.dims = dims.outer;
  for (int k = 0; k < dims.outer; ++k) {
    if (k > 0) result.sizes[k] = Divisor::of(dims.sizes[k]);
    int tensor = 0;
    ((result.of[tensor++][k] = tensors.of[k]), ...);
  }
  return result;
}

}  // namespace softmax_ext::cuda
