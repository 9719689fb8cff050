// What the headers and the kernels need of a compiler: one spelling for g++, clang++, nvcc, and the
// host executor of the CUDA kernels (tests/simt), which compiles them with SOFTMAX_EXT_SIMT.
#pragma once

#include <cstddef>
#include <cstdint>

// SOFTMAX_EXT_FUNCTION   of what kernels are made of, on either side
// SOFTMAX_EXT_DEVICE     defined where CUDA kernels are compiled
#if defined(__CUDACC__)
#define SOFTMAX_EXT_FUNCTION __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once per instruction set, and an out-of-line copy
// shared by the linker could run AVX-512 code on a processor without it.
#define SOFTMAX_EXT_FUNCTION inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__) || defined(SOFTMAX_EXT_SIMT)
#define SOFTMAX_EXT_DEVICE

#include <cooperative_groups.h>

#include <cuda_runtime.h>

// SOFTMAX_EXT_DYNAMIC_SHARED(type, name)         `type* name`, the block's dynamic shared memory,
//                                                a multiple of 16
// SOFTMAX_EXT_STATIC_SHARED(type, name, count)   `type name[count]` in the block's shared memory
// SOFTMAX_EXT_PTX(fallback, asm statement)       the statement, or C++ that means the same
#if defined(__CUDACC__)
#define SOFTMAX_EXT_DYNAMIC_SHARED(type, name)                    \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
#define SOFTMAX_EXT_STATIC_SHARED(type, name, count) __shared__ type name[count]
#define SOFTMAX_EXT_PTX(fallback, ...) __VA_ARGS__
#else
#define SOFTMAX_EXT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(simt::dynamic_shared())
#define SOFTMAX_EXT_STATIC_SHARED(type, name, count) \
  type* const name = simt::static_shared<type>(count, [] {})
#define SOFTMAX_EXT_PTX(fallback, ...) fallback
#endif

namespace softmax_ext {

// Blocks that meet: those of a cluster, or, cooperative, all of the launch.
struct Together {
  dim3 cluster;
  bool cooperative = false;
};

// The kernel on the stream of the current device. The error of the launch, if any, is not left for
// the next call to find.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          Together together, cudaStream_t stream, Arguments... arguments) {
  // What a block gets without being asked is 48 KB, with the kernel's static arrays: at most 1 KB.
  constexpr size_t kDefaultSharedBytes = 47 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    const unsigned blocks = together.cluster.x * together.cluster.y * together.cluster.z;
    cudaLaunchAttribute attribute;
    if (together.cooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {together.cluster.x, together.cluster.y, together.cluster.z};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = together.cooperative || blocks > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
  return error == cudaSuccess ? cudaSuccess : cudaGetLastError();
}

// One access of sizeof(Word) bytes at a multiple of that.
template <class Word>
__device__ __forceinline__ Word load_word(const void* from) {
#if defined(SOFTMAX_EXT_SIMT)
  simt::check_aligned(from, sizeof(Word));
#endif
  return *static_cast<const Word*>(from);
}
// By the intrinsic of a plain (write-back) store where the memory is global: the compiler splits the
// copy of a struct, and in some loops that of a word, where it sees fit.
template <bool global, class Word>
__device__ __forceinline__ void store_word(void* to, Word word) {
#if defined(SOFTMAX_EXT_SIMT)
  simt::check_aligned(to, sizeof(Word));
#endif
  if constexpr (global) {
    __stwb(static_cast<Word*>(to), word);
  } else {
    *static_cast<Word*>(to) = word;
  }
}

// All threads of the cluster, or of the cooperative launch, meet; what each wrote before, all may
// read afterwards. A thread may do something else between its arrival and its wait.
__device__ __forceinline__ void arrive_at_cluster() {
#if defined(SOFTMAX_EXT_SIMT) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if defined(SOFTMAX_EXT_SIMT) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#endif
}
__device__ __forceinline__ void sync_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}
__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }

// The same place in the shared memory of block `rank` of the cluster, which must have begun.
template <class T>
__device__ __forceinline__ T* shared_of_block(T* pointer, int rank) {
#if defined(SOFTMAX_EXT_SIMT) || __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(pointer, static_cast<unsigned>(rank));
#else
  return pointer;
#endif
}

}  // namespace softmax_ext

#endif
