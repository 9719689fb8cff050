// The CPU kernels' interface: launchers for the instruction set in use, and the threads they run on.
#pragma once

#include <cstdint>

#include "softmax_ext/problem.h"

namespace softmax_ext::cpu {

// The caller's thread pool. parallel_for calls body(context, begin, end) for ranges that together
// are [0, size), each of at least `grain` items where there are so many, and returns when all are
// done.
struct Threads {
  using Body = void (*)(void* context, int64_t begin, int64_t end);

  int count;
  void (*parallel_for)(int64_t size, int64_t grain, Body body, void* context);
};

// The kernels as compiled for one instruction set.
struct Kernels {
  const char* isa;  // "baseline", "avx2" or "avx512"
  void (*launch_forward)(const ForwardArgs& args, const Threads& threads);
  void (*launch_backward)(const BackwardArgs& args, const Threads& threads);
};

// Those that this processor can run, fastest first; the last is the portable one.
struct KernelList {
  const Kernels* items[3];
  int size;
};
const KernelList& usable_kernels();

// The ones in use: the fastest, or the ones that the environment variable SOFTMAX_EXT_ISA names.
// Throws std::runtime_error if that names none that can be used.
const Kernels& kernels();

}  // namespace softmax_ext::cpu
