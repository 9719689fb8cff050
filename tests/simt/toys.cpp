// Toy kernels, each with one planted defect, that show what the host executor finds. They are CUDA:
// nvcc compiles them too.
//
//   toys NAME correct|planted [order=LIST] [seed=LIST] [resident=LIST] [capability=N] [shared=N]
//
// runs NAME once for each order, seed and number of resident clusters, and says of each whether its
// result is right. Reports of the executor and of the sanitizers end the program.
//
//   toys convert float16|bfloat16 < doubles
//
// reads float64 values, and writes what the type's conversions make of them.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "softmax_ext/portability.h"

using softmax_ext::load_word;
using softmax_ext::store_word;

constexpr unsigned kThreads = 128;
constexpr unsigned kBlocks = 3;
constexpr unsigned kElements = kBlocks * kThreads;
constexpr unsigned kWarp = 32;
constexpr unsigned kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ unsigned element() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ unsigned lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ unsigned warp() { return threadIdx.x / kWarp; }

__device__ __forceinline__ int warp_sum(int x) {
  for (unsigned step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}
__device__ __forceinline__ int warp_max(int x) {
  for (unsigned step = kWarp / 2; step > 0; step /= 2) {
    const int other = __shfl_xor_sync(kAll, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// --- Barriers of a block -------------------------------------------------------------------------

// Each thread reads what a thread of another warp has written.
template <bool planted>
__global__ void exchange_kernel(const int* in, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, tile, kThreads);
  tile[threadIdx.x] = in[element()];  // planted: exchange, write
  if constexpr (!planted) __syncthreads();
  out[element()] = tile[kThreads - 1 - threadIdx.x];  // planted: exchange, read
}

// One thread writes, and all read: right where that thread happens to be the first.
template <bool planted>
__global__ void broadcast_kernel(const int* in, int* out) {
  SOFTMAX_EXT_DYNAMIC_SHARED(int, first);
  if (threadIdx.x == 0) *first = in[element()];  // planted: broadcast, write
  if constexpr (!planted) __syncthreads();
  out[element()] = *first + in[element()];  // planted: broadcast, read
}

// The shuffles between write and read keep the warps in step unless one runs ahead of the others.
template <bool planted>
__global__ void block_sum_kernel(const int* in, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, sums, kWarps);
  const int sum = warp_sum(in[element()]);
  if (lane() == 0) sums[warp()] = sum;  // planted: block_sum, write
  const int most = warp_max(in[element()]);
  if constexpr (!planted) __syncthreads();
  const int mine = lane() < kWarps ? sums[lane()] : 0;  // planted: block_sum, read
  out[element()] = warp_sum(mine) + most;
}

// The second round writes over what the first round reads.
template <bool planted>
__global__ void reuse_kernel(const int* in, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, tile, kThreads);
  int x = in[element()];
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = x;  // planted: reuse, write
    __syncthreads();
    x = tile[kThreads - 1 - threadIdx.x] + 1;  // planted: reuse, read
    if constexpr (!planted) __syncthreads();
  }
  out[element()] = x;
}

// --- Barriers of a warp --------------------------------------------------------------------------

// A shuffle makes the lanes meet, but does not order what they do to memory.
template <bool planted>
__global__ void warp_exchange_kernel(const int* in, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, tile, kThreads);
  tile[threadIdx.x] = in[element()];  // planted: warp_exchange, write
  if constexpr (planted) {
    __shfl_sync(kAll, 0, 0);
  } else {
    __syncwarp();
  }
  out[element()] = tile[threadIdx.x ^ (kWarp - 1)];  // planted: warp_exchange, read
}

// Eight lanes exchange, and the mask names them, or no more than four.
template <bool planted>
__global__ void group_exchange_kernel(const int* in, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, tile, kThreads);
  constexpr unsigned kGroup = planted ? 4 : 8;
  const unsigned mask = ((1u << kGroup) - 1) << (lane() & ~(kGroup - 1));
  tile[threadIdx.x] = in[element()];  // planted: group_exchange, write
  __syncwarp(mask);
  out[element()] = tile[threadIdx.x ^ 7];  // planted: group_exchange, read
}

// --- Bounds and alignment ------------------------------------------------------------------------

template <bool planted>
__global__ void global_store_kernel(unsigned count, int* out) {
  const unsigned i = element();
  if (planted ? i > count : i >= count) return;
  out[i] = static_cast<int>(i);  // planted: global_store
}

template <bool planted>
__global__ void global_load_kernel(const int* in, int* out) {
  out[element()] = in[element() + planted];  // planted: global_load
}

template <bool planted>
__global__ void dynamic_shared_store_kernel(const int* in, int* out) {
  SOFTMAX_EXT_DYNAMIC_SHARED(int, tile);
  tile[threadIdx.x + planted] = in[element()];  // planted: dynamic_shared_store
  out[element()] = tile[threadIdx.x + planted];
}

template <bool planted>
__global__ void static_shared_store_kernel(const int* in, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, tile, kThreads);
  tile[threadIdx.x + planted] = in[element()];  // planted: static_shared_store
  out[element()] = tile[threadIdx.x + planted];
}

// Four elements at a time, from the first or the second on.
template <bool planted>
__global__ void load_word_kernel(const int* in, int* out) {
  const uint4 word = load_word<uint4>(in + 4 * element() + planted);  // planted: load_word
  memcpy(out + 4 * element(), &word, sizeof(word));
}

template <bool planted>
__global__ void store_word_kernel(const int* in, int* out) {
  uint4 word;
  memcpy(&word, in + 4 * element(), sizeof(word));
  store_word<true>(out + 4 * element() + planted, word);  // planted: store_word
}

template <bool planted>
__global__ void float4_kernel(const float* in, float* out) {
  const float* from = in + 4 * element() + planted;
  const float4 word = *reinterpret_cast<const float4*>(from);  // planted: float4
  memcpy(out + 4 * element(), &word, sizeof(word));
}

// Shared memory that is read before it was written.
template <bool planted>
__global__ void static_poison_kernel(const float* in, float* out) {
  SOFTMAX_EXT_STATIC_SHARED(float, tile, kThreads);
  const float before = planted ? tile[threadIdx.x] : 0.0f;
  tile[threadIdx.x] = in[element()] + before;
  out[element()] = tile[threadIdx.x];
}

template <bool planted>
__global__ void dynamic_poison_kernel(const double* in, double* out) {
  SOFTMAX_EXT_DYNAMIC_SHARED(double, tile);
  const double before = planted ? tile[threadIdx.x] : 0.0;
  tile[threadIdx.x] = in[element()] + before;
  out[element()] = tile[threadIdx.x];
}

// --- Divergence ----------------------------------------------------------------------------------

template <bool planted>
__global__ void shuffle_elsewhere_kernel(const int* in, int* out) {
  int x = in[element()];
  if (!planted || lane() < 16) {
    x += __shfl_xor_sync(kAll, x, 1);  // planted: shuffle_elsewhere, one
  } else {
    x += __shfl_xor_sync(kAll, x, 1);  // planted: shuffle_elsewhere, other
  }
  out[element()] = x;
}

template <bool planted>
__global__ void shuffle_masks_kernel(const int* in, int* out) {
  const unsigned mask = planted && lane() >= 16 ? 0xffff0001u : kAll;
  const int x = in[element()];
  out[element()] = x + __shfl_xor_sync(mask, x, 1);  // planted: shuffle_masks
}

template <bool planted>
__global__ void shuffle_caller_kernel(const int* in, int* out) {
  const unsigned mask = planted || lane() < 16 ? 0x0000ffffu : 0xffff0000u;
  const int x = in[element()];
  out[element()] = x + __shfl_xor_sync(mask, x, 1);  // planted: shuffle_caller
}

template <bool planted>
__global__ void shuffle_source_kernel(const int* in, int* out) {
  const unsigned mask = lane() < 16 ? 0x0000ffffu : 0xffff0000u;
  const int x = in[element()];
  out[element()] = x + __shfl_xor_sync(mask, x, planted ? 16 : 1);  // planted: shuffle_source
}

// Lanes that have exited are not waited for, but nothing can be read of them.
template <bool planted>
__global__ void shuffle_exited_kernel(const int* in, int* out) {
  const int x = in[element()];
  out[element()] = 2 * x + 1;
  if (lane() >= 20) return;
  const unsigned source = planted ? lane() + 1 : lane() ^ 1;
  out[element()] = x + __shfl_sync(kAll, x, source);  // planted: shuffle_exited
}

template <bool planted>
__global__ void barrier_elsewhere_kernel(const int* in, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, tile, kThreads);
  tile[threadIdx.x] = in[element()];
  if (!planted || warp() == 0) {
    __syncthreads();  // planted: barrier_elsewhere, one
  } else {
    __syncthreads();  // planted: barrier_elsewhere, other
  }
  out[element()] = tile[kThreads - 1 - threadIdx.x];
}

// Half of a warp waits in a shuffle for the other half, which waits in the barrier for it.
template <bool planted>
__global__ void barrier_or_shuffle_kernel(const int* in, int* out) {
  int x = in[element()];
  if (!planted || lane() < 16) {
    x += __shfl_xor_sync(kAll, x, 1);  // planted: barrier_or_shuffle, shuffle
  }
  __syncthreads();  // planted: barrier_or_shuffle, barrier
  out[element()] = x;
}

// A thread that has exited does not hold up a barrier.
__global__ void barrier_exited_kernel(const int* in, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, tile, kThreads);
  tile[threadIdx.x] = in[element()];
  out[element()] = 2 * in[element()];
  if (threadIdx.x >= 40 && threadIdx.x < 90) {
    out[element()] = 0;
    return;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    tile[0] = 0;
    for (unsigned i = 1; i < 40; ++i) tile[0] += tile[i];
    for (unsigned i = 90; i < kThreads; ++i) tile[0] += tile[i];
  }
  __syncthreads();
  out[element()] = tile[0];
}

// --- Launches ------------------------------------------------------------------------------------

__global__ void count_kernel(unsigned* threads) { atomicAdd(threads, 1u); }

// --- Clusters ------------------------------------------------------------------------------------

enum class Planted { kNothing, kNoFirstBarrier, kNoLastBarrier };

__device__ __forceinline__ cooperative_groups::cluster_group cluster() {
  return cooperative_groups::this_cluster();
}

// Each thread adds up its place in the shared memory of all blocks.
template <Planted planted>
__global__ void cluster_sum_kernel(const int* in, int* out) {
  SOFTMAX_EXT_DYNAMIC_SHARED(int, tile);
  tile[threadIdx.x] = in[element()];  // planted: cluster_sum, write
  if constexpr (planted != Planted::kNoFirstBarrier) cluster().sync();
  int sum = 0;
  for (unsigned rank = 0; rank < cluster().num_blocks(); ++rank) {
    const int* other = cluster().map_shared_rank(tile, rank);  // planted: cluster_sum, map
    sum += other[threadIdx.x];                                 // planted: cluster_sum, read
  }
  out[element()] = sum;
  if constexpr (planted != Planted::kNoLastBarrier) cluster().sync();
}

// Reads the next block's memory by a pointer that it got before the barrier.
template <Planted planted>
__global__ void cluster_ring_kernel(const int* in, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, tile, kThreads);
  const unsigned next = (cluster().block_rank() + 1) % cluster().num_blocks();
  const int* other = cluster().map_shared_rank(tile + threadIdx.x, next);
  tile[threadIdx.x] = in[element()];  // planted: cluster_ring, write
  if constexpr (planted != Planted::kNoFirstBarrier) {
    cluster().barrier_arrive();
    cluster().barrier_wait();
  }
  const int x = *other;  // planted: cluster_ring, read
  if constexpr (planted != Planted::kNoLastBarrier) cluster().barrier_arrive();
  out[element()] = x;
  if constexpr (planted != Planted::kNoLastBarrier) cluster().barrier_wait();
}

// A thread that arrives and exits has arrived once, and is not waited for.
__global__ void cluster_exited_kernel(const int* in, int* out) {
  SOFTMAX_EXT_DYNAMIC_SHARED(int, tile);
  tile[threadIdx.x] = in[element()];
  out[element()] = in[element()];
  cluster().barrier_arrive();
  if (threadIdx.x >= kThreads / 2) return;
  cluster().barrier_wait();
  int sum = 0;
  for (unsigned rank = 0; rank < cluster().num_blocks(); ++rank) {
    sum += cluster().map_shared_rank(tile, rank)[threadIdx.x];
  }
  out[element()] = sum;
  cluster().sync();
}

template <bool planted>
__global__ void cluster_rank_kernel(const int* in, int* out) {
  SOFTMAX_EXT_DYNAMIC_SHARED(int, tile);
  tile[threadIdx.x] = in[element()];
  cluster().sync();
  const unsigned next = cluster().block_rank() + 1;
  const unsigned rank = planted ? next : next % cluster().num_blocks();
  out[element()] = cluster().map_shared_rank(tile, rank)[threadIdx.x];  // planted: cluster_rank
  cluster().sync();
}

template <bool planted>
__global__ void cluster_pointer_kernel(const int* in, int* out) {
  SOFTMAX_EXT_DYNAMIC_SHARED(int, tile);
  tile[threadIdx.x] = in[element()];
  cluster().sync();
  const unsigned next = (cluster().block_rank() + 1) % cluster().num_blocks();
  const int* own = planted ? in : tile;
  out[element()] = cluster().map_shared_rank(own, next)[threadIdx.x];  // planted: cluster_pointer
  cluster().sync();
}

template <bool planted>
__global__ void cluster_arrive_kernel(const int* in, int* out) {
  cluster().barrier_arrive();
  if constexpr (planted) cluster().barrier_arrive();  // planted: cluster_arrive
  cluster().barrier_wait();
  out[element()] = in[element()];
}

template <bool planted>
__global__ void cluster_wait_kernel(const int* in, int* out) {
  if constexpr (!planted) cluster().barrier_arrive();
  cluster().barrier_wait();  // planted: cluster_wait
  out[element()] = in[element()];
}

// As much dynamic shared memory as a block can have, in each of several; the planted one has a
// static array besides.
template <bool planted>
__global__ void cluster_large_kernel(unsigned words, int* out) {
  SOFTMAX_EXT_DYNAMIC_SHARED(int, tile);
  if constexpr (planted) {
    SOFTMAX_EXT_STATIC_SHARED(int, more, 1);  // planted: cluster_large
    *more = 0;
  }
  const unsigned rank = cluster().block_rank();
  for (unsigned i = threadIdx.x; i < words; i += blockDim.x) {
    tile[i] = static_cast<int>(rank * words + i);
  }
  cluster().sync();
  const unsigned next = (rank + 1) % cluster().num_blocks();
  const int* other = cluster().map_shared_rank(tile, next);
  for (unsigned i = threadIdx.x; i < words; i += blockDim.x) {
    out[blockIdx.x * words + i] = other[words - 1 - i];
  }
  cluster().sync();
}

// --- Several blocks, one result ------------------------------------------------------------------

enum class Fence { kDevice, kBlock, kNone };

template <Fence which>
__device__ __forceinline__ void fence() {
  if constexpr (which == Fence::kDevice) __threadfence();
  if constexpr (which == Fence::kBlock) __threadfence_block();
}

// blockIdx.y is the row, which gridDim.x blocks share; the last one to be done adds up.
template <Fence store_fence, Fence load_fence>
__global__ void row_sum_kernel(const int* in, int* partial, unsigned* done, int* out) {
  SOFTMAX_EXT_STATIC_SHARED(int, sums, kWarps);
  SOFTMAX_EXT_STATIC_SHARED(int, last, 1);
  const unsigned row = blockIdx.y;
  const unsigned block = row * gridDim.x + blockIdx.x;
  const int sum = warp_sum(in[block * kThreads + threadIdx.x]);
  if (lane() == 0) sums[warp()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (unsigned i = 0; i < kWarps; ++i) total += sums[i];
    partial[block] = total;  // planted: row_sum, write
    fence<store_fence>();
    *last = atomicInc(&done[row], gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (*last == 0 || threadIdx.x != 0) return;
  fence<load_fence>();
  int total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    total += partial[row * gridDim.x + i];  // planted: row_sum, read
  }
  out[row] = total;
}

// All blocks meet, so all have to run at a time.
__global__ void grid_barrier_kernel(unsigned* arrived, int* tile, int* out) {
  tile[element()] = static_cast<int>(element());
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < gridDim.x) {  // planted: grid_barrier
    }
    __threadfence();
  }
  __syncthreads();
  out[element()] = tile[kElements - 1 - element()];
}

// The same by the grid's own barrier.
template <bool planted>
__global__ void grid_sync_kernel(int* tile, int* out) {
  tile[element()] = static_cast<int>(element());
  if constexpr (!planted) cooperative_groups::this_grid().sync();  // planted: grid_sync_launch
  out[element()] = tile[kElements - 1 - element()];
}

// What is only slow is no deadlock.
__global__ void slow_flag_kernel(unsigned* flag, int* out) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 1000; ++i) __nanosleep(100);
    atomicExch(flag, 1u);
  } else {
    while (atomicAdd(flag, 0u) == 0) __nanosleep(100);
  }
  out[threadIdx.x] = 1;
}

// --- Atomics -------------------------------------------------------------------------------------

struct Counters {
  int sum;
  float float_sum;
  int most;
  int least;
  unsigned cycle;  // counts to 9, then from 0
  int replaced;    // by each thread, which adds what was there to `taken`
  int taken;
  unsigned multiple;  // of 3, by compare and swap
};

template <bool planted>
__global__ void atomics_kernel(Counters* counters) {
  const int i = static_cast<int>(element());
  if constexpr (planted) {
    counters->sum += i;  // planted: atomics
  } else {
    atomicAdd(&counters->sum, i);
  }
  atomicAdd(&counters->float_sum, 0.5f);
  atomicMax(&counters->most, i);
  atomicMin(&counters->least, -i);
  atomicInc(&counters->cycle, 9u);
  atomicAdd(&counters->taken, atomicExch(&counters->replaced, i));
  unsigned expected = 0;
  for (unsigned found = kAll; found != expected;) {
    found = expected;
    expected = atomicCAS(&counters->multiple, found, found + 3);
  }
}

// --- Shuffles and votes --------------------------------------------------------------------------

constexpr unsigned kKinds = 4;  // of shuffles: idx, up, down, xor
constexpr unsigned kWidths = 6;

// out[kind][log2 of the width][argument][lane], by one warp. The planted one leaves the width out.
template <class T, bool planted>
__global__ void shuffles_kernel(const T* in, T* out) {
  const T x = in[lane()];
  for (unsigned w = 0; w < kWidths; ++w) {
    const int width = planted ? 32 : 1 << w;
    for (unsigned argument = 0; argument < kWarp; ++argument) {
      T* to = out + (w * kWarp + argument) * kWarp + lane();
      constexpr unsigned kStride = kWidths * kWarp * kWarp;
      to[0] = __shfl_sync(kAll, x, argument, width);
      to[kStride] = __shfl_up_sync(kAll, x, argument, width);
      to[2 * kStride] = __shfl_down_sync(kAll, x, argument, width);
      to[3 * kStride] = __shfl_xor_sync(kAll, x, argument, width);
    }
  }
}

// out[vote][lane], of the lanes that the mask names.
__global__ void votes_kernel(unsigned mask, unsigned votes, unsigned* out) {
  if ((mask >> lane() & 1) == 0) return;
  const int vote = votes >> lane() & 1;
  out[lane()] = __ballot_sync(mask, vote);
  out[kWarp + lane()] = __any_sync(mask, vote) != 0;
  out[2 * kWarp + lane()] = __all_sync(mask, vote) != 0;
}

// --- Instructions and half types -----------------------------------------------------------------

__global__ void exp2_kernel(const float* in, float* out) {
  const float x = in[element()];
  float y;
  SOFTMAX_EXT_PTX(y = exp2f(x), asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)));
  out[element()] = y;
}

// One thread for each of the 2^16 patterns.
template <class Half>
__global__ void widen_kernel(float* out) {
  const auto bits = static_cast<uint16_t>(element());
  Half x;
  memcpy(&x, &bits, sizeof(x));
  if constexpr (std::is_same_v<Half, __half>) {
    out[element()] = __half2float(x);
  } else {
    out[element()] = __bfloat162float(x);
  }
}

// Of each value, in float and in double.
template <class Half>
__global__ void narrow_kernel(const double* in, unsigned count, Half* from_float,
                              Half* from_double) {
  if (element() >= count) return;
  const double x = in[element()];
  if constexpr (std::is_same_v<Half, __half>) {
    from_float[element()] = __float2half_rn(static_cast<float>(x));
    from_double[element()] = __double2half(x);
  } else {
    from_float[element()] = __float2bfloat16_rn(static_cast<float>(x));
    from_double[element()] = __double2bfloat16(x);
  }
}

// --- Host ----------------------------------------------------------------------------------------

namespace {

[[noreturn]] void give_up(const std::string& why) {
  fprintf(stderr, "toys: %s\n", why.c_str());
  exit(2);
}

void require(cudaError_t error) {
  if (error != cudaSuccess) give_up("CUDA error " + std::to_string(static_cast<int>(error)));
}

// Memory of both host and device, and no byte more: the next one is AddressSanitizer's.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    require(cudaMallocManaged(&data_, count * sizeof(T)));
    memset(data_, 0, count * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  size_t count_;
  T* data_ = nullptr;
};

// 1, 2, 3 and so on.
template <class T>
struct Numbers : Buffer<T> {
  explicit Numbers(size_t count) : Buffer<T>(count) {
    for (size_t i = 0; i < count; ++i) (*this)[i] = static_cast<T>(i + 1);
  }
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            unsigned cluster, Arguments... arguments) {
  require(softmax_ext::launch_kernel(kernel, grid, block, shared_bytes, {cluster, false}, nullptr,
                                     arguments...));
  require(cudaDeviceSynchronize());
}

// Whether out[i] is expected(i), to within `tolerance` of its size; and what is not.
template <class T, class Expected>
bool check(Buffer<T>& out, Expected expected, double tolerance = 0) {
  size_t wrong = 0, nan = 0, first = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const auto is = static_cast<double>(out[i]), must = static_cast<double>(expected(i));
    if (std::abs(is - must) <= tolerance * std::abs(must)) continue;
    if (wrong == 0) first = i;
    ++wrong;
    nan += std::isnan(is);
  }
  if (wrong > 0) {
    printf("wrong: %zu of %zu values, %zu of them NaN; the first is [%zu], %.17g, not %.17g\n",
           wrong, out.size(), nan, first, static_cast<double>(out[first]),
           static_cast<double>(expected(first)));
  }
  return wrong == 0;
}

// A kernel that takes `in` to `out`, by kBlocks blocks of kThreads.
template <class T, class Expected>
bool map(void (*kernel)(const T*, T*), size_t shared_bytes, Expected expected) {
  Numbers<T> in(kElements);
  Buffer<T> out(kElements);
  launch(kernel, kBlocks, kThreads, shared_bytes, 1, in.data(), out.data());
  return check(out, [&](size_t i) { return expected(in, i); });
}
constexpr auto kSame = [](auto& in, size_t i) { return in[i]; };
constexpr auto kSumWithNeighbour = [](auto& in, size_t i) { return in[i] + in[i ^ 1]; };
constexpr auto kOpposite = [](auto& in, size_t i) {
  return in[i / kThreads * kThreads + kThreads - 1 - i % kThreads];
};

bool exchange(bool planted) {
  return map(planted ? exchange_kernel<true> : exchange_kernel<false>, 0, kOpposite);
}
bool broadcast(bool planted) {
  return map(planted ? broadcast_kernel<true> : broadcast_kernel<false>, sizeof(int),
             [](auto& in, size_t i) { return in[i / kThreads * kThreads] + in[i]; });
}
bool block_sum(bool planted) {
  return map(planted ? block_sum_kernel<true> : block_sum_kernel<false>, 0, [](auto& in, size_t i) {
    int sum = in[i | (kWarp - 1)];
    for (size_t j = 0; j < kThreads; ++j) sum += in[i / kThreads * kThreads + j];
    return sum;
  });
}
bool reuse(bool planted) {
  return map(planted ? reuse_kernel<true> : reuse_kernel<false>, 0,
             [](auto& in, size_t i) { return in[i] + 2; });
}
bool warp_exchange(bool planted) {
  return map(planted ? warp_exchange_kernel<true> : warp_exchange_kernel<false>, 0,
             [](auto& in, size_t i) { return in[i ^ (kWarp - 1)]; });
}
bool group_exchange(bool planted) {
  return map(planted ? group_exchange_kernel<true> : group_exchange_kernel<false>, 0,
             [](auto& in, size_t i) { return in[i ^ 7]; });
}

bool global_store(bool planted) {
  Buffer<int> out(kElements - 10);
  launch(planted ? global_store_kernel<true> : global_store_kernel<false>, kBlocks, kThreads, 0, 1,
         kElements - 10, out.data());
  return check(out, [](size_t i) { return i; });
}
bool global_load(bool planted) {
  return map(planted ? global_load_kernel<true> : global_load_kernel<false>, 0, kSame);
}
bool dynamic_shared_store(bool planted) {
  return map(planted ? dynamic_shared_store_kernel<true> : dynamic_shared_store_kernel<false>,
             kThreads * sizeof(int), kSame);
}
bool static_shared_store(bool planted) {
  return map(planted ? static_shared_store_kernel<true> : static_shared_store_kernel<false>, 0,
             kSame);
}

template <class T>
bool map_words(void (*kernel)(const T*, T*)) {
  // Room for the planted defect, which is not to go out of bounds as well.
  Numbers<T> in(4 * kThreads + 4);
  Buffer<T> out(4 * kThreads + 4);
  launch(kernel, 1, kThreads, 0, 1, in.data(), out.data());
  return check(out, [&](size_t i) { return i < 4 * kThreads ? in[i] : 0; });
}
bool load_word_toy(bool planted) {
  return map_words(planted ? load_word_kernel<true> : load_word_kernel<false>);
}
bool store_word_toy(bool planted) {
  return map_words(planted ? store_word_kernel<true> : store_word_kernel<false>);
}
bool float4_toy(bool planted) {
  return map_words(planted ? float4_kernel<true> : float4_kernel<false>);
}

bool static_poison(bool planted) {
  return map(planted ? static_poison_kernel<true> : static_poison_kernel<false>, 0, kSame);
}
bool dynamic_poison(bool planted) {
  return map(planted ? dynamic_poison_kernel<true> : dynamic_poison_kernel<false>,
             kThreads * sizeof(double), kSame);
}

bool shuffle_elsewhere(bool planted) {
  return map(planted ? shuffle_elsewhere_kernel<true> : shuffle_elsewhere_kernel<false>, 0,
             kSumWithNeighbour);
}
bool shuffle_masks(bool planted) {
  return map(planted ? shuffle_masks_kernel<true> : shuffle_masks_kernel<false>, 0,
             kSumWithNeighbour);
}
bool shuffle_caller(bool planted) {
  return map(planted ? shuffle_caller_kernel<true> : shuffle_caller_kernel<false>, 0,
             kSumWithNeighbour);
}
bool shuffle_source(bool planted) {
  return map(planted ? shuffle_source_kernel<true> : shuffle_source_kernel<false>, 0,
             kSumWithNeighbour);
}
bool shuffle_exited(bool planted) {
  return map(planted ? shuffle_exited_kernel<true> : shuffle_exited_kernel<false>, 0,
             [](auto& in, size_t i) { return i % kWarp < 20 ? in[i] + in[i ^ 1] : 2 * in[i] + 1; });
}
bool barrier_elsewhere(bool planted) {
  return map(planted ? barrier_elsewhere_kernel<true> : barrier_elsewhere_kernel<false>, 0,
             kOpposite);
}
bool barrier_or_shuffle(bool planted) {
  return map(planted ? barrier_or_shuffle_kernel<true> : barrier_or_shuffle_kernel<false>, 0,
             kSumWithNeighbour);
}
bool barrier_exited(bool) {
  return map(barrier_exited_kernel, 0, [](auto& in, size_t i) {
    const auto exits = [](size_t thread) { return thread >= 40 && thread < 90; };
    int sum = 0;
    for (size_t j = 1; j < kThreads; ++j) {
      if (!exits(j)) sum += in[i / kThreads * kThreads + j];
    }
    return exits(i % kThreads) ? 0 : sum;
  });
}

// At the limit, and one beyond.
bool count(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster) {
  Buffer<unsigned> threads(1);
  launch(count_kernel, grid, block, shared_bytes, cluster, threads.data());
  return check(threads,
               [&](size_t) { return grid.x * grid.y * grid.z * block.x * block.y * block.z; });
}
bool launch_threads(bool planted) {
  return count(2, 1024 + planted, 0, 1);  // planted: launch_threads
}
bool launch_threads_z(bool planted) {
  return count(2, dim3(1, 1, 64 + planted), 0, 1);  // planted: launch_threads_z
}
bool launch_grid_y(bool planted) {
  return count(dim3(1, 65535 + planted, 1), 1, 0, 1);  // planted: launch_grid_y
}
bool launch_grid_z(bool planted) {
  return count(dim3(1, 1, 65535 + planted), 1, 0, 1);  // planted: launch_grid_z
}
bool launch_shared(bool planted) {
  return count(2, 32, 227 * 1024 + planted, 1);  // planted: launch_shared
}
bool launch_shared_unasked(bool planted) {
  Buffer<unsigned> threads(1);
  cudaLaunchConfig_t config{};
  config.gridDim = 2;
  config.blockDim = 32;
  config.dynamicSmemBytes = 48 * 1024 + planted;
  require(cudaLaunchKernelEx(&config, count_kernel, threads.data()));  // planted: launch_unasked
  require(cudaDeviceSynchronize());
  return check(threads, [](size_t) { return 64; });
}
bool launch_cluster(bool planted) {
  return count(6, 32, 0, planted ? 4 : 3);  // planted: launch_cluster
}
bool launch_cluster_blocks(bool planted) {
  return count(17 * 16, 32, 0, planted ? 17 : 16);  // planted: launch_cluster_blocks
}
bool launch_cluster_unasked(bool planted) {
  Buffer<unsigned> threads(1);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {planted ? 9u : 8u, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = 72;
  config.blockDim = 32;
  config.attrs = &attribute;
  config.numAttrs = 1;
  require(cudaLaunchKernelEx(&config, count_kernel, threads.data()));  // planted: cluster_unasked
  require(cudaDeviceSynchronize());
  return check(threads, [](size_t) { return 72 * 32; });
}

constexpr unsigned kClusterBlocks = 3;

// Two clusters of kClusterBlocks blocks of kThreads; expected(in, first, rank, thread), where the
// cluster's elements begin with `first`.
template <class Expected>
bool map_clusters(void (*kernel)(const int*, int*), Expected expected) {
  constexpr unsigned kCount = 2 * kClusterBlocks * kThreads;
  Numbers<int> in(kCount);
  Buffer<int> out(kCount);
  launch(kernel, 2 * kClusterBlocks, kThreads, kThreads * sizeof(int), kClusterBlocks, in.data(),
         out.data());
  return check(out, [&](size_t i) {
    const size_t block = i / kThreads, rank = block % kClusterBlocks;
    return expected(in, (block - rank) * kThreads, rank, i % kThreads);
  });
}
constexpr auto kSumOfBlocks = [](auto& in, size_t first, size_t, size_t thread) {
  int sum = 0;
  for (size_t rank = 0; rank < kClusterBlocks; ++rank) sum += in[first + rank * kThreads + thread];
  return sum;
};
constexpr auto kNextBlock = [](auto& in, size_t first, size_t rank, size_t thread) {
  return in[first + (rank + 1) % kClusterBlocks * kThreads + thread];
};
constexpr auto kSameBlock = [](auto& in, size_t first, size_t rank, size_t thread) {
  return in[first + rank * kThreads + thread];
};

bool cluster_sum_first(bool planted) {
  return map_clusters(planted ? cluster_sum_kernel<Planted::kNoFirstBarrier>
                              : cluster_sum_kernel<Planted::kNothing>,
                      kSumOfBlocks);
}
bool cluster_sum_last(bool planted) {
  return map_clusters(
      planted ? cluster_sum_kernel<Planted::kNoLastBarrier> : cluster_sum_kernel<Planted::kNothing>,
      kSumOfBlocks);
}
bool cluster_ring_first(bool planted) {
  return map_clusters(planted ? cluster_ring_kernel<Planted::kNoFirstBarrier>
                              : cluster_ring_kernel<Planted::kNothing>,
                      kNextBlock);
}
bool cluster_ring_last(bool planted) {
  return map_clusters(planted ? cluster_ring_kernel<Planted::kNoLastBarrier>
                              : cluster_ring_kernel<Planted::kNothing>,
                      kNextBlock);
}
bool cluster_exited(bool) {
  return map_clusters(cluster_exited_kernel,
                      [](auto& in, size_t first, size_t rank, size_t thread) {
                        return thread < kThreads / 2 ? kSumOfBlocks(in, first, rank, thread)
                                                     : kSameBlock(in, first, rank, thread);
                      });
}
bool cluster_rank(bool planted) {
  return map_clusters(planted ? cluster_rank_kernel<true> : cluster_rank_kernel<false>, kNextBlock);
}
bool cluster_pointer(bool planted) {
  return map_clusters(planted ? cluster_pointer_kernel<true> : cluster_pointer_kernel<false>,
                      kNextBlock);
}
bool cluster_arrive(bool planted) {
  return map_clusters(planted ? cluster_arrive_kernel<true> : cluster_arrive_kernel<false>,
                      kSameBlock);
}
bool cluster_wait(bool planted) {
  return map_clusters(planted ? cluster_wait_kernel<true> : cluster_wait_kernel<false>, kSameBlock);
}
bool cluster_large(bool planted) {
  constexpr unsigned kBytes = 227 * 1024, kWords = kBytes / sizeof(int);
  Buffer<int> out(4 * kWords);
  launch(planted ? cluster_large_kernel<true> : cluster_large_kernel<false>, 4, kThreads, kBytes, 2,
         kWords, out.data());
  return check(out, [](size_t i) {
    const size_t next = (i / kWords + 1) % 2;
    return next * kWords + kWords - 1 - i % kWords;
  });
}

bool row_sum(void (*kernel)(const int*, int*, unsigned*, int*)) {
  constexpr unsigned kRows = 3, kShares = 4, kLength = kShares * kThreads;
  Numbers<int> in(kRows * kLength);
  Buffer<int> partial(kRows * kShares), out(kRows);
  Buffer<unsigned> done(kRows);
  launch(kernel, dim3(kShares, kRows), kThreads, 0, 1, in.data(), partial.data(), done.data(),
         out.data());
  return check(done, [](size_t) { return 0; }) && check(out, [&](size_t row) {
           int sum = 0;
           for (size_t i = 0; i < kLength; ++i) sum += in[row * kLength + i];
           return sum;
         });
}
constexpr auto row_sum_correct = row_sum_kernel<Fence::kDevice, Fence::kDevice>;
bool row_sum_store(bool planted) {
  return row_sum(planted ? row_sum_kernel<Fence::kNone, Fence::kDevice> : row_sum_correct);
}
bool row_sum_load(bool planted) {
  return row_sum(planted ? row_sum_kernel<Fence::kDevice, Fence::kNone> : row_sum_correct);
}
bool row_sum_scope(bool planted) {
  return row_sum(planted ? row_sum_kernel<Fence::kBlock, Fence::kDevice> : row_sum_correct);
}

// The planted one is not launched as a cooperative one.
bool grid_barrier(bool planted) {
  Buffer<unsigned> arrived(1);
  Buffer<int> tile(kElements), out(kElements);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = kBlocks;
  config.blockDim = kThreads;
  config.attrs = &attribute;
  config.numAttrs = planted ? 0 : 1;
  require(
      cudaLaunchKernelEx(&config, grid_barrier_kernel, arrived.data(), tile.data(), out.data()));
  require(cudaDeviceSynchronize());
  return check(out, [](size_t i) { return kElements - 1 - i; });
}

bool grid_sync(bool planted) {
  Buffer<int> tile(kElements), out(kElements);
  require(softmax_ext::launch_kernel(planted ? grid_sync_kernel<true> : grid_sync_kernel<false>,
                                     kBlocks, kThreads, 0, {1, true}, nullptr, tile.data(),
                                     out.data()));
  return check(out, [](size_t i) { return kElements - 1 - i; });
}

// The planted one is not launched as a cooperative one.
bool grid_sync_launch(bool planted) {
  Buffer<int> tile(kElements), out(kElements);
  require(softmax_ext::launch_kernel(grid_sync_kernel<false>, kBlocks, kThreads, 0, {1, !planted},
                                     nullptr, tile.data(), out.data()));
  return check(out, [](size_t i) { return kElements - 1 - i; });
}

bool slow_flag(bool) {
  Buffer<unsigned> flag(1);
  Buffer<int> out(kWarp);
  launch(slow_flag_kernel, 1, kWarp, 0, 1, flag.data(), out.data());
  return check(out, [](size_t) { return 1; });
}

bool atomics(bool planted) {
  Buffer<Counters> counters(1);
  launch(planted ? atomics_kernel<true> : atomics_kernel<false>, kBlocks, kThreads, 0, 1,
         counters.data());
  constexpr int kLast = kElements - 1, kSum = kLast * (kLast + 1) / 2;
  const Counters& c = counters[0];
  return c.sum == kSum && c.float_sum == kElements / 2.0f && c.most == kLast && c.least == -kLast &&
         c.cycle == kElements % 10 && c.taken + c.replaced == kSum && c.multiple == 3 * kElements;
}

// As the PTX manual defines shfl: the lane itself where the source is beyond the segment's bounds,
// of which xor has only the upper.
int shuffle_source_of(unsigned kind, int width, int argument, int lane) {
  const int first = lane & ~(width - 1), last = lane | (width - 1);
  switch (kind) {
    case 0:
      return first | (argument & (width - 1));
    case 1:
      return lane - argument >= first ? lane - argument : lane;
    case 2:
      return lane + argument <= last ? lane + argument : lane;
    default:
      return (lane ^ argument) <= last ? lane ^ argument : lane;
  }
}
template <class T>
bool shuffles_of(bool planted) {
  Buffer<T> in(kWarp), out(kKinds * kWidths * kWarp * kWarp);
  // Both halves of 8 bytes matter.
  for (unsigned i = 0; i < kWarp; ++i) in[i] = static_cast<T>(T(i + 1) * T(1.0000001e9) + T(i));
  launch(planted ? shuffles_kernel<T, true> : shuffles_kernel<T, false>, 1, kWarp, 0, 1, in.data(),
         out.data());
  return check(out, [&](size_t i) {
    const auto at = static_cast<unsigned>(i);
    const unsigned kind = at / (kWidths * kWarp * kWarp), w = at / (kWarp * kWarp) % kWidths;
    return in[static_cast<size_t>(shuffle_source_of(
        kind, 1 << w, static_cast<int>(at / kWarp % kWarp), static_cast<int>(at % kWarp)))];
  });
}
bool shuffles(bool planted) {
  return shuffles_of<int>(planted) && shuffles_of<unsigned>(planted) &&
         shuffles_of<float>(planted) && shuffles_of<long long>(planted) &&
         shuffles_of<double>(planted);
}

bool votes(bool) {
  bool right = true;
  for (const unsigned mask : {kAll, 0x0000ffffu, 0xff00ff00u, 0x80000001u, 0x00000400u}) {
    for (const unsigned votes : {0u, kAll, mask, ~mask, 0x12345678u, 0x00000400u}) {
      Buffer<unsigned> out(3 * kWarp);
      launch(votes_kernel, 1, kWarp, 0, 1, mask, votes, out.data());
      right = right && check(out, [&](size_t i) -> unsigned {
                if ((mask >> i % kWarp & 1) == 0) return 0;
                const unsigned given = votes & mask;
                return i < kWarp ? given : i < 2 * kWarp ? given != 0 : given == mask;
              });
    }
  }
  return right;
}

bool exp2_toy(bool) {
  Buffer<float> in(kElements), out(kElements);
  for (unsigned i = 0; i < kElements; ++i) in[i] = static_cast<float>(i) / 4.0f - 48.0f;
  launch(exp2_kernel, kBlocks, kThreads, 0, 1, in.data(), out.data());
  // The instruction is right to two units in the last place.
  return check(out, [&](size_t i) { return std::exp2(static_cast<double>(in[i])); }, 0x1p-22);
}

template <class T>
void write(Buffer<T>& buffer) {
  fwrite(buffer.data(), sizeof(T), buffer.size(), stdout);
}

// All 2^16 patterns as float32; then the values, rounded from float32, and from float64.
template <class Half>
void convert(Buffer<double>& values) {
  Buffer<float> wide(1 << 16);
  launch(widen_kernel<Half>, 64, 1024, 0, 1, wide.data());
  write(wide);
  Buffer<Half> from_float(values.size()), from_double(values.size());
  const auto count = static_cast<unsigned>(values.size());
  launch(narrow_kernel<Half>, (count + 255) / 256, 256, 0, 1, values.data(), count,
         from_float.data(), from_double.data());
  write(from_float);
  write(from_double);
}
void convert_stdin(const std::string& type) {
  std::vector<double> given;
  for (double value; fread(&value, sizeof(value), 1, stdin) == 1;) given.push_back(value);
  Buffer<double> values(given.size());
  std::copy(given.begin(), given.end(), values.data());
  if (type == "float16") return convert<__half>(values);
  if (type == "bfloat16") return convert<__nv_bfloat16>(values);
  give_up("no such type: " + type);
}

struct Toy {
  const char* name;
  bool (*run)(bool planted);  // whether the result is right
  bool has_planted = true;
};

const Toy kToys[] = {
    {"exchange", exchange},
    {"broadcast", broadcast},
    {"block_sum", block_sum},
    {"reuse", reuse},
    {"warp_exchange", warp_exchange},
    {"group_exchange", group_exchange},
    {"global_store", global_store},
    {"global_load", global_load},
    {"dynamic_shared_store", dynamic_shared_store},
    {"static_shared_store", static_shared_store},
    {"load_word", load_word_toy},
    {"store_word", store_word_toy},
    {"float4", float4_toy},
    {"static_poison", static_poison},
    {"dynamic_poison", dynamic_poison},
    {"shuffle_elsewhere", shuffle_elsewhere},
    {"shuffle_masks", shuffle_masks},
    {"shuffle_caller", shuffle_caller},
    {"shuffle_source", shuffle_source},
    {"shuffle_exited", shuffle_exited},
    {"barrier_elsewhere", barrier_elsewhere},
    {"barrier_or_shuffle", barrier_or_shuffle},
    {"barrier_exited", barrier_exited, false},
    {"launch_threads", launch_threads},
    {"launch_threads_z", launch_threads_z},
    {"launch_grid_y", launch_grid_y},
    {"launch_grid_z", launch_grid_z},
    {"launch_shared", launch_shared},
    {"launch_shared_unasked", launch_shared_unasked},
    {"launch_cluster", launch_cluster},
    {"launch_cluster_blocks", launch_cluster_blocks},
    {"launch_cluster_unasked", launch_cluster_unasked},
    {"cluster_sum_first", cluster_sum_first},
    {"cluster_sum_last", cluster_sum_last},
    {"cluster_ring_first", cluster_ring_first},
    {"cluster_ring_last", cluster_ring_last},
    {"cluster_exited", cluster_exited, false},
    {"cluster_rank", cluster_rank},
    {"cluster_pointer", cluster_pointer},
    {"cluster_arrive", cluster_arrive},
    {"cluster_wait", cluster_wait},
    {"cluster_large", cluster_large},
    {"row_sum_store", row_sum_store},
    {"row_sum_load", row_sum_load},
    {"row_sum_scope", row_sum_scope},
    {"grid_barrier", grid_barrier},
    {"grid_sync", grid_sync},
    {"grid_sync_launch", grid_sync_launch},
    {"slow_flag", slow_flag, false},
    {"atomics", atomics},
    {"shuffles", shuffles},
    {"votes", votes, false},
    {"exp2", exp2_toy, false},
};

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> words(1);
  for (const char c : list) {
    if (c == ',') {
      words.emplace_back();
    } else {
      words.back() += c;
    }
  }
  return words;
}

// The words behind `key` in the program's arguments.
std::vector<std::string> option(const std::vector<std::string>& arguments, const std::string& key,
                                const std::string& otherwise) {
  for (const std::string& argument : arguments) {
    if (argument.rfind(key + "=", 0) == 0) return split(argument.substr(key.size() + 1));
  }
  return {otherwise};
}

void set([[maybe_unused]] const std::string& order, [[maybe_unused]] const std::string& seed,
         [[maybe_unused]] const std::string& resident) {
#if defined(SOFTMAX_EXT_SIMT)
  simt::settings.seed = std::stoull(seed);
  simt::settings.resident = std::stoi(resident);
  for (const auto known :
       {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom, simt::Order::kGreedy}) {
    if (order != simt::name(known)) continue;
    simt::settings.order = known;
    return;
  }
  give_up("no such order: " + order);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() == 2 && arguments[0] == "convert") {
    convert_stdin(arguments[1]);
    return 0;
  }
  const std::string variant = arguments.size() > 1 ? arguments[1] : "";
  const bool planted = variant == "planted";
  const auto toy = std::find_if(std::begin(kToys), std::end(kToys), [&](const Toy& t) {
    return arguments.size() > 1 && arguments[0] == t.name;
  });
  if (toy == std::end(kToys) || (planted ? !toy->has_planted : variant != "correct")) {
    for (const Toy& t : kToys) printf("%s%s\n", t.name, t.has_planted ? " planted" : "");
    give_up("one of these, then correct or planted");
  }
#if defined(SOFTMAX_EXT_SIMT)
  simt::settings.compute_capability = std::stoi(option(arguments, "capability", "90")[0]);
  simt::settings.max_shared_bytes = std::stoul(option(arguments, "shared", "232448")[0]);
#endif
  for (const std::string& order : option(arguments, "order", "greedy")) {
    for (const std::string& seed : option(arguments, "seed", "0")) {
      for (const std::string& resident : option(arguments, "resident", "1")) {
        set(order, seed, resident);
        printf("order=%s seed=%s resident=%s: ", order.c_str(), seed.c_str(), resident.c_str());
        fflush(stdout);
        const bool right = toy->run(planted);
        printf("result %s\n", right ? "right" : "wrong");
        fflush(stdout);
      }
    }
  }
}
