// From the arguments of a launch to those of a template.
#pragma once

#include <cstdint>

#include "formulas.h"
#include "softmax_ext/problem.h"

namespace softmax_ext::cpu {
namespace {

// f(T{}) for the element type T of a floating dtype.
template <class F>
void visit(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Float16{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat32:
      return f(float{});
    default:
      return f(double{});
  }
}

// Past the caches goes what is too large to be found there later: rows of whole lines, or of so many
// that the two at their ends do not count; columns whose steps are whole lines. Memory that is new has
// just been cleared by the system, in the caches; that of an input is there too.
inline bool is_streamed(const Shape& shape, const Dims& dims, const Strides& strides,
                        const void* output, DType dtype, bool is_new) {
  constexpr int64_t kBeyondCaches = int64_t{1} << 25, kLine = 64;
  const int64_t size = size_of(dtype);
  if (!kStreams || is_new || shape.numel() * size < kBeyondCaches) return false;
  const int64_t stretch = (shape.inner == 1 ? shape.dim : shape.inner) * size;
  const uintptr_t address = reinterpret_cast<uintptr_t>(output);
  bool whole_lines = stretch % kLine == 0 && (shape.inner == 1 || strides.dim * size % kLine == 0);
  for (int k = 0; k < dims.outer; ++k) whole_lines &= strides.of[k] * size % kLine == 0;
  if (shape.inner > 1 && !(whole_lines && address % kLine == 0)) return false;
  // Memory from elsewhere may begin between two elements.
  return address % size == 0 && stretch >= (whole_lines ? 8 : 16) * kLine;
}

}  // namespace
}  // namespace softmax_ext::cpu
