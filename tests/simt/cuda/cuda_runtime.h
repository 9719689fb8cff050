// CUDA's names as the host executor has them: what nvcc declares and <cuda_runtime.h> brings, as
// far as the kernels use it. Meanings and limits are those of the CUDA C++ programming guide.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../executor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Of the call that names it as a default argument.
#define SIMT_HERE(what) simt::Site site = {what, __builtin_FILE(), __builtin_LINE()}

// --- Host API ------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
using cudaStream_t = struct CUstream_st*;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                        int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    simt::allow_dynamic_shared(kernel, static_cast<size_t>(value));
  } else {
    simt::allow_large_clusters(kernel, value != 0);
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  memset(memory, byte, bytes);
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };

union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
  simt::Site site;
  cudaLaunchConfig_t(SIMT_HERE("a launch")) : site(site) {}
};

namespace simt {
// Instead of std::apply, whose frames a sanitizer would print.
template <class... Parameters, size_t... indices>
void call(void (*kernel)(Parameters...), const std::tuple<Parameters...>& parameters,
          std::index_sequence<indices...>) {
  kernel(std::get<indices>(parameters)...);
}
}  // namespace simt

// Returns when the kernel has run.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  simt::Launch launch{reinterpret_cast<const void*>(kernel),
                      config->gridDim,
                      config->blockDim,
                      config->dynamicSmemBytes,
                      dim3(),
                      false,
                      config->site};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) {
      launch.cooperative = attribute.val.cooperative != 0;
    } else {
      const auto& size = attribute.val.clusterDim;
      launch.cluster = dim3(size.x, size.y, size.z);
    }
  }
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {static_cast<Parameters>(arguments)...}};
  simt::run(
      launch,
      [](const void* pointer) {
        const Call& call = *static_cast<const Call*>(pointer);
        simt::call(call.kernel, call.parameters, std::index_sequence_for<Parameters...>());
      },
      &call);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// The host's and the device's memory are the same.
template <class T>
cudaError_t cudaMallocManaged(T** pointer, size_t bytes) {
  *pointer = static_cast<T*>(malloc(bytes));
  return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* pointer) {
  free(pointer);
  return cudaSuccess;
}

// --- Barriers and fences -------------------------------------------------------------------------

inline void __syncthreads(SIMT_HERE("__syncthreads")) { simt::sync_block(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE("__syncwarp")) {
  simt::sync_warp(mask, site);
}
inline void __threadfence(SIMT_HERE("__threadfence")) { simt::fence(true, site); }
inline void __threadfence_block(SIMT_HERE("__threadfence_block")) { simt::fence(false, site); }
inline void __nanosleep(unsigned, SIMT_HERE("__nanosleep")) { simt::yield(site); }

// --- Shuffles and votes --------------------------------------------------------------------------

namespace simt {
template <class T>
T shuffle_value(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
// The lane's own where `source` is not in the lane's segment of `width` lanes.
inline int within_segment(int source, int width) {
  return (source ^ lane()) & ~(width - 1) ? lane() : source;
}
// Here it may be in one before it too.
inline int up_to_segment(int source, int width) {
  return source > (lane() | (width - 1)) ? lane() : source;
}
}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE("__shfl_sync")) {
  const int segment = simt::lane() & ~(width - 1);
  return simt::shuffle_value(mask, value, segment | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_HERE("__shfl_xor_sync")) {
  return simt::shuffle_value(mask, value, simt::up_to_segment(simt::lane() ^ (bits & 31), width),
                             site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 SIMT_HERE("__shfl_up_sync")) {
  const int source = simt::lane() - static_cast<int>(delta);
  return simt::shuffle_value(mask, value, simt::within_segment(source, width), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   SIMT_HERE("__shfl_down_sync")) {
  const int source = simt::lane() + static_cast<int>(delta);
  return simt::shuffle_value(mask, value, simt::within_segment(source, width), site);
}

inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_HERE("__ballot_sync")) {
  return simt::ballot(mask, vote != 0, site);
}
inline int __any_sync(unsigned mask, int vote, SIMT_HERE("__any_sync")) {
  return simt::ballot(mask, vote != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int vote, SIMT_HERE("__all_sync")) {
  return simt::ballot(mask, vote == 0, site) == 0;
}

// --- Atomics -------------------------------------------------------------------------------------

namespace simt {
// Replaces *address by next(*address); what it was. Then others run, so that a loop around it ends.
template <class T, class Next>
T atomic(T* address, Next next, Site site) {
  check_aligned(address, sizeof(T), site);
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  T desired = next(old);
  while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
    desired = next(old);
  }
  if (memcmp(&old, &desired, sizeof(T)) != 0) progress();
  yield(site);
  return old;
}
template <class T>
using Same = std::common_type_t<T>;  // not deduced
}  // namespace simt

template <class T>
T atomicAdd(T* address, simt::Same<T> value, SIMT_HERE("atomicAdd")) {
  return simt::atomic(address, [=](T old) -> T { return old + value; }, site);
}
template <class T>
T atomicMax(T* address, simt::Same<T> value, SIMT_HERE("atomicMax")) {
  return simt::atomic(address, [=](T old) -> T { return std::max(old, value); }, site);
}
template <class T>
T atomicMin(T* address, simt::Same<T> value, SIMT_HERE("atomicMin")) {
  return simt::atomic(address, [=](T old) -> T { return std::min(old, value); }, site);
}
template <class T>
T atomicExch(T* address, simt::Same<T> value, SIMT_HERE("atomicExch")) {
  return simt::atomic(address, [=](T) -> T { return value; }, site);
}
template <class T>
T atomicCAS(T* address, simt::Same<T> expected, simt::Same<T> value, SIMT_HERE("atomicCAS")) {
  return simt::atomic(address, [=](T old) -> T { return old == expected ? value : old; }, site);
}
// Up to `last`, then 0 again.
inline unsigned atomicInc(unsigned* address, unsigned last, SIMT_HERE("atomicInc")) {
  return simt::atomic(address, [=](unsigned old) { return old >= last ? 0 : old + 1; }, site);
}

// --- Bytes sent to another block's memory (mbarrier, st.async) -----------------------------------

namespace simt {
// A barrier's word: the bytes that are still to come (less than 0: came early) below, then whether
// they have not been told, then the rounds that are over.
constexpr uint64_t kNoMail = uint64_t{1} << 32;

inline void count_mail(uint64_t* barrier, int bytes, bool told, Site site) {
  fence(true, site);
  atomic(
      barrier,
      [=](uint64_t old) {
        const auto left =
            static_cast<uint32_t>(static_cast<int>(static_cast<uint32_t>(old)) + bytes);
        const bool untold = (old & kNoMail) != 0;
        if (told && !untold) fail("%s: a second time in a round", site.what);
        if (left == 0 && (told || !untold)) return ((old >> 33) + 1) << 33 | kNoMail;
        return (old >> 33) << 33 | (told ? 0 : old & kNoMail) | left;
      },
      site);
}
inline void expect_mail(uint64_t* barrier, int bytes, SIMT_HERE("mbarrier.arrive.expect_tx")) {
  count_mail(barrier, bytes, true, site);
}
template <class T>
void send_mail(T* to, const T& value, uint64_t* barrier, unsigned rank, SIMT_HERE("st.async")) {
  check_aligned(to, sizeof(T), site);
  *static_cast<T*>(map_shared(to, rank, site)) = value;
  count_mail(static_cast<uint64_t*>(map_shared(barrier, rank, site)), -static_cast<int>(sizeof(T)),
             false, site);
}
// Until the round is over; rounds are counted from 0, modulo 2.
inline void wait_for_mail(uint64_t* barrier, int round, SIMT_HERE("mbarrier.try_wait")) {
  while ((atomic(
              barrier, [](uint64_t old) { return old; }, site) >>
              33 &
          1) == static_cast<uint64_t>(round)) {
  }
  fence(true, site);
}
}  // namespace simt

// --- Memory accesses -----------------------------------------------------------------------------

template <class T>
T __ldg(const T* from, SIMT_HERE("__ldg")) {
  simt::check_aligned(from, sizeof(T), site);
  return *from;
}
template <class T>
T __ldcg(const T* from, SIMT_HERE("__ldcg")) {
  simt::check_aligned(from, sizeof(T), site);
  return *from;
}
template <class T>
void __stwb(T* to, T value, SIMT_HERE("__stwb")) {
  simt::check_aligned(to, sizeof(T), site);
  *to = value;
}

// --- Integers ------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int min(int a, int b) { return std::min(a, b); }
inline int64_t max(int64_t a, int64_t b) { return std::max(a, b); }

// The lower word of high:low shifted right by the lowest five bits of `bits`.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (bits & 31));
}

// --- Conversions ---------------------------------------------------------------------------------

namespace simt {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Of the two floats around x the odd one: rounded once more, to less than 23 bits, it gives what x
// itself would.
inline float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const uint32_t bits = bit_cast<uint32_t>(nearest);
  if (!std::isfinite(nearest) || nearest == x || (bits & 1) != 0) return nearest;
  const bool below = std::abs(static_cast<double>(nearest)) < std::abs(x);
  return bit_cast<float>(below ? bits + 1 : bits - 1);
}
}  // namespace simt
