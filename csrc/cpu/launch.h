// The CPU kernels' interface: launchers for the instruction set in use, and the threads they run on.
#pragma once

#include <cstdint>

#include "softmax_ext/divergences.h"
#include "softmax_ext/losses.h"
#include "softmax_ext/probabilities.h"
#include "softmax_ext/problem.h"
#include "softmax_ext/scores.h"
#include "softmax_ext/segments.h"

namespace softmax_ext::cpu {

// The caller's thread pool. parallel_for calls body(context, begin, end) for ranges that together
// are [0, size), each of at least `grain` items where there are so many, and returns when all are
// done.
struct Threads {
  using Body = void (*)(void* context, int64_t begin, int64_t end);

  int count;
  void (*parallel_for)(int64_t size, int64_t grain, Body body, void* context);
};

// Along dim, in the columns schedule: a block of a tile stays in cache between two looks. Memory is
// always walked along inner: a walk along dim can meet loads that share their address modulo 4096
// with a store still under way, and wait for it.
constexpr int64_t kBlock = 16;

// A step along dim of at most kNarrow bytes, as computed, does not fill registers, or fills few. Of a
// longer dim than kShortDim, in a backward than kGatheredDim, several steps may then share a register:
// memory between steps has no place there. What of a backward would be gathered, and scattered again,
// is sooner packed from there on.
constexpr int64_t kNarrow = 512;
constexpr int64_t kShortDim = 64;
constexpr int64_t kGatheredDim = 32;

constexpr bool is_narrow(const Shape& shape, DType dtype) {
  return shape.inner > 1 && shape.inner * (dtype == DType::kFloat64 ? 8 : 4) <= kNarrow;
}

// Whether the kernels read and write a tensor where it lies: what they compute with must, and what they
// write; other input of the result's type or size is copied there first, a few rows at a time. short_dim:
// kShortDim, or of a backward kGatheredDim.
constexpr bool is_direct(const Shape& shape, const Dims& dims, const Strides& strides, DType dtype,
                         int64_t short_dim) {
  int64_t stretch = 1;
  for (int k = dims.outer + dims.inner - 1; k >= dims.outer; --k) {
    if (strides.of[k] != stretch) return false;
    stretch *= dims.sizes[k];
  }
  if (strides.dim == stretch) return true;
  return shape.inner > 1 && (shape.dim <= short_dim || !is_narrow(shape, dtype));
}

// The kernels as compiled for one instruction set. Outputs (of a forward: that; of a backward: both) are
// direct, and grad_output too if its type is not grad_input's.
struct Kernels {
  const char* isa;  // "baseline", "avx2" or "avx512"
  void (*launch_forward)(const ForwardArgs& args, const Threads& threads);
  void (*launch_backward)(const BackwardArgs& args, const Threads& threads);
  // Their tensors lie side by side along dim.
  void (*launch_score_forward)(const ScoreForwardArgs& args, const Threads& threads);
  void (*launch_score_backward)(const ScoreBackwardArgs& args, const Threads& threads);
  void (*launch_segments_forward)(const SegmentsForwardArgs& args, const Threads& threads);
  void (*launch_segments_backward)(const SegmentsBackwardArgs& args, const Threads& threads);
  // Their tensors lie side by side along dim, or along inner where that is above 1.
  void (*launch_loss_forward)(const LossForwardArgs& args, const Threads& threads);
  void (*launch_loss_backward)(const LossBackwardArgs& args, const Threads& threads);
  // The first of `rows` targets that is neither ignore_index nor in [0, classes), or -1; and how many are
  // not ignore_index.
  int64_t (*find_bad_target)(const int64_t* targets, int64_t rows, int64_t classes,
                             int64_t ignore_index, int64_t* counted);
  void (*launch_divergence_forward)(const DivergenceForwardArgs& args, const Threads& threads);
  void (*launch_divergence_backward)(const DivergenceBackwardArgs& args, const Threads& threads);
  void (*launch_probability_forward)(const ProbabilityForwardArgs& args, const Threads& threads);
  void (*launch_probability_backward)(const ProbabilityBackwardArgs& args, const Threads& threads);
};

// Those that this build has and this processor can run, fastest first.
struct KernelList {
  const Kernels* items[3];
  int size;
};
const KernelList& usable_kernels();

// The ones in use: the fastest, or the ones that the environment variable SOFTMAX_EXT_ISA names.
// Throws std::runtime_error if that names none that can be used.
const Kernels& kernels();

}  // namespace softmax_ext::cpu

// A function's name for the instruction set that a file is compiled for, which SOFTMAX_EXT_ISA names.
#define SOFTMAX_EXT_CONCAT_(a, b) a##_##b
#define SOFTMAX_EXT_CONCAT(a, b) SOFTMAX_EXT_CONCAT_(a, b)
#define SOFTMAX_EXT_OF_ISA(function) SOFTMAX_EXT_CONCAT(function, SOFTMAX_EXT_ISA)
