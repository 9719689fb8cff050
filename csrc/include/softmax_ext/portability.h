// What the headers need of a compiler: one spelling for g++, clang++ and nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SOFTMAX_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once per instruction set, and an out-of-line copy
// shared by the linker could run AVX-512 code on a processor without it.
#define SOFTMAX_EXT_HOST_DEVICE inline __attribute__((always_inline))
#endif
