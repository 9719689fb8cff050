// What the headers and the kernels need of a compiler: one spelling for g++, clang++, nvcc, and the
// host executor of the CUDA kernels (tests/simt), which compiles them with SOFTMAX_EXT_SIMT.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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
// SOFTMAX_EXT_PTX_90(fallback, asm statement)    likewise, for sm_90 and later; before, nothing
// SOFTMAX_EXT_FAIL(expected, format, ...)        prints, and fails as a device-side assertion of what was
//                                                expected
#if defined(__CUDACC__)
#include <cassert>
#include <cstdio>

#define SOFTMAX_EXT_DYNAMIC_SHARED(type, name)                    \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
#define SOFTMAX_EXT_STATIC_SHARED(type, name, count) __shared__ type name[count]
#define SOFTMAX_EXT_PTX(fallback, ...) __VA_ARGS__
// Not by assert(), which builds leave out.
#define SOFTMAX_EXT_FAIL(expected, ...) \
  (printf(__VA_ARGS__), __assert_fail(expected, __FILE__, __LINE__, __func__))
#if __CUDA_ARCH__ >= 900
#define SOFTMAX_EXT_PTX_90(fallback, ...) __VA_ARGS__
#else
#define SOFTMAX_EXT_PTX_90(fallback, ...) ((void)0)
#endif
#else
#define SOFTMAX_EXT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(simt::dynamic_shared())
#define SOFTMAX_EXT_STATIC_SHARED(type, name, count) \
  type* const name = simt::static_shared<type>(count, [] {})
#define SOFTMAX_EXT_PTX(fallback, ...) fallback
#define SOFTMAX_EXT_PTX_90(fallback, ...) fallback
#define SOFTMAX_EXT_FAIL(expected, ...) simt::fail(__VA_ARGS__)
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
  // Blocks of a cluster that a kernel gets without being asked for (CUDA programming guide).
  constexpr unsigned kPortableClusterBlocks = 8;
  const unsigned blocks = together.cluster.x * together.cluster.y * together.cluster.z;
  cudaError_t error = cudaSuccess;
  if (blocks > kPortableClusterBlocks) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess && shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
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
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
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

// From global to shared memory, where the thread that copied finds it after wait_for_copies(). The L2
// is to read 256 bytes at once: threads and blocks side by side want the others.
template <class Word>
__device__ __forceinline__ void copy_word(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Word) == 16) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(global)
                 : "memory");
    return;
  } else if constexpr (sizeof(Word) >= 4) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global),
                 "n"(sizeof(Word))
                 : "memory");
    return;
  }
#endif
  store_word<false>(shared, load_word<Word>(global));
}
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// All threads of the cluster, or of the cooperative launch, meet; what each wrote before, all may
// read afterwards.
__device__ __forceinline__ void sync_cluster() {
#if defined(SOFTMAX_EXT_SIMT) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}
__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }

// What the blocks of a cluster send each other, round after round: every block gets as many bytes. In
// a round a thread waits for those that come to its own block, by an mbarrier of that block, and not
// for the threads of others. A cluster barrier that orders memory would wait for all that a thread
// has under way to global memory, and empty the L1.
class Mail {
 public:
  // `barrier` is of the block's shared memory, in the same place of each block.
  __device__ __forceinline__ explicit Mail(uint64_t* barrier) : barrier_(barrier) {}

  // By all threads, once.
  __device__ __forceinline__ void open() const {
    if (is_first_thread()) {
      SOFTMAX_EXT_PTX_90(*barrier_ = simt::kNoMail,
                         asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n"
                                      "fence.mbarrier_init.release.cluster;" ::"r"(own(barrier_))
                                      : "memory"));
    }
    SOFTMAX_EXT_PTX_90(cooperative_groups::this_cluster().barrier_arrive(),
                       asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::
                                        : "memory"));
  }

  // By all threads, before anything is sent in a round, in which `bytes` bytes come: all blocks are
  // there, and all threads have read what came in the round before, if there was one.
  __device__ __forceinline__ void begin(bool first, int bytes) const {
    if (first) {
      SOFTMAX_EXT_PTX_90(cooperative_groups::this_cluster().barrier_wait(),
                         asm volatile("barrier.cluster.wait.aligned;" ::
                                          : "memory"));
    } else {
      sync_cluster();
    }
    if (!is_first_thread()) return;
    SOFTMAX_EXT_PTX_90(
        simt::expect_mail(barrier_, bytes),
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(own(barrier_)),
                     "r"(bytes)
                     : "memory"));
  }

  // To the same place in the shared memory of block `rank`.
  template <class T>
  __device__ __forceinline__ void send(T* to, const T& value, int rank) const {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    uint32_t word[4]{};
    memcpy(word, &value, sizeof(value));
    SOFTMAX_EXT_PTX_90(simt::send_mail(to, value, barrier_, static_cast<unsigned>(rank)), {
      const uint32_t place = of_block(to, rank);
      const uint32_t barrier = of_block(barrier_, rank);
      if constexpr (sizeof(T) == 4) {
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %2, [%1];" ::"r"(
                place),
            "r"(barrier), "r"(word[0])
            : "memory");
      } else if constexpr (sizeof(T) == 8) {
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%2, %3}, [%1];" ::
                "r"(place),
            "r"(barrier), "r"(word[0]), "r"(word[1])
            : "memory");
      } else {
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, "
            "[%1];" ::"r"(place),
            "r"(barrier), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
            : "memory");
      }
    });
  }

  // Until all that comes in this round is there, and may be read; `round` counts from 0, modulo 2.
  __device__ __forceinline__ void wait(int round) const {
    SOFTMAX_EXT_PTX_90(simt::wait_for_mail(barrier_, round), {
      uint32_t there = 0;
      while (there == 0) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(there)
            : "r"(own(barrier_)), "r"(round)
            : "memory");
      }
    });
  }

 private:
  static __device__ __forceinline__ bool is_first_thread() {
    return threadIdx.x == 0 && threadIdx.y == 0;
  }
#if defined(__CUDACC__)
  // Addresses in the shared memory of this block, and of another.
  static __device__ __forceinline__ uint32_t own(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
  static __device__ __forceinline__ uint32_t of_block(const void* shared, int rank) {
    uint32_t address = 0;
    SOFTMAX_EXT_PTX_90(, asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                                      : "=r"(address)
                                      : "r"(own(shared)), "r"(rank)));
    return address;
  }
#endif

  uint64_t* barrier_;
};

}  // namespace softmax_ext

#endif
