// Loops over vectors and threads, and memory for them.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#include "launch.h"
#include "vec.h"

namespace softmax_ext::cpu {
namespace {

// Bytes of a row that stays in the second-level cache, with its output.
constexpr int64_t kKeptRow = 1 << 19;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items of so many elements each that are worth waking a thread for: 1024 registers, each about 5 ns
// of work whatever they hold. A pool that is awake takes 1 us for it, one that sleeps 40 and more.
template <class A>
constexpr int64_t grain(int64_t elements) {
  return ceil_div(1024, ceil_div(elements, Vec<A>::kSize));
}

template <class F>
void parallel_for(const Threads& threads, int64_t size, int64_t grain, F body) {
  threads.parallel_for(
      size, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<F*>(context))(begin, end);
        stream_fence();
      },
      &body);
}

// step(i, lanes) for each vector of [0, n); the last may be partial.
template <int kSize, class Step>
SOFTMAX_EXT_INLINE void for_each_vector(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kSize <= n; i += kSize) step(i, All{});
  if (i < n) step(i, First{n - i});
}

// Fetches what will be read soon. Where a register has few bytes, its instructions take longer than they.
template <class T>
SOFTMAX_EXT_INLINE void fetch(const T* x) {
  if constexpr (Vec<compute_t<T>>::kSize * sizeof(T) >= 32) __builtin_prefetch(x);
}

// Folds [0, n) into one vector: step(accumulator, i, lanes) returns the accumulator's new value.
// Four accumulators hide the latency of a step.
template <class V, class Step, class Merge>
SOFTMAX_EXT_INLINE V fold(int64_t n, V identity, Step step, Merge merge) {
  constexpr int kSize = V::kSize;
  V a0 = identity, a1 = identity;
  int64_t i = 0;
  if (n < 4 * kSize) {  // what the rest would come to, without the merges of nothing
    for (; i + kSize <= n; i += kSize) a0 = step(a0, i, All{});
    return i < n ? merge(a0, step(a1, i, First{n - i})) : a0;
  }
  V a2 = identity, a3 = identity;
  for (; i + 4 * kSize <= n; i += 4 * kSize) {
    a0 = step(a0, i, All{});
    a1 = step(a1, i + kSize, All{});
    a2 = step(a2, i + 2 * kSize, All{});
    a3 = step(a3, i + 3 * kSize, All{});
  }
  for (; i + kSize <= n; i += kSize) a0 = step(a0, i, All{});
  if (i < n) a1 = step(a1, i, First{n - i});
  return merge(merge(a0, a1), merge(a2, a3));
}

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(std::malloc(sizeof(T) * size))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace softmax_ext::cpu
