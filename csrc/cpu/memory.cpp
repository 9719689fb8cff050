#include "memory.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(MADV_HUGEPAGE) && defined(MADV_FREE)
#include <atomic>
#include <cstdlib>
#endif

namespace softmax_ext::cpu {

#if defined(MADV_HUGEPAGE) && defined(MADV_FREE)
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

constexpr uintptr_t round_up(uintptr_t a, uintptr_t b) { return (a + b - 1) / b * b; }

// Of all that is kept.
const size_t limit = [] {
  const char* megabytes = std::getenv("SOFTMAX_EXT_KEEP_MB");
  const bool is_set = megabytes != nullptr && *megabytes != '\0';
  return size_t{is_set ? std::strtoul(megabytes, nullptr, 10) : 512} << 20;
}();

// Before the data of a block is its size, in a page that the system has no leave to take. No machine
// has larger ones.
constexpr size_t kHead = size_t{64} << 10;
size_t& size_of(void* data) { return static_cast<size_t*>(data)[-1]; }

void* map(size_t bytes) {
  const size_t reserved = kHead + bytes + kHugePage;
  void* const mapping =
      mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapping);
  const size_t before = round_up(begin + kHead, kHugePage) - kHead - begin;
  char* const data = static_cast<char*>(mapping) + before + kHead;
  if (before > 0) (void)munmap(mapping, before);
  (void)munmap(data + bytes, kHugePage - before);
  prefer_huge_pages(data, bytes);
  size_of(data) = bytes;
  return data;
}

void unmap(void* data) {
  if (data != nullptr) (void)munmap(static_cast<char*>(data) - kHead, kHead + size_of(data));
}

// The blocks that are kept, in a ring: the latest is before `next`, the oldest after it. Without a
// lock, which a child made by fork could find locked for ever.
constexpr unsigned kSlots = 16;
std::atomic<void*> slots[kSlots];
std::atomic<unsigned> next{0};
std::atomic<size_t> kept{0};  // bytes in the slots and on the way there

// What a slot has, or nullptr; the caller's alone from now on.
void* take_from(std::atomic<void*>& slot) {
  void* const data = slot.exchange(nullptr);
  if (data != nullptr) kept -= size_of(data);
  return data;
}

// In place of the oldest block. kept has its size already.
void keep(void* data) {
  void* const oldest = slots[next++ % kSlots].exchange(data);
  if (oldest == nullptr) return;
  kept -= size_of(oldest);
  unmap(oldest);
}

}  // namespace

void prefer_huge_pages(void* data, size_t bytes) {
  constexpr size_t kWorthACall = 2 * kHugePage;
  if (bytes < kWorthACall) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = round_up(begin, kHugePage);
  const uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  // Where the kernel has none to give, the pages are small ones.
  if (first < end) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

Memory take_memory(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return {nullptr, true};
  bytes = round_up(bytes, kHugePage);
  const unsigned end = next;
  for (unsigned k = 1; k <= kSlots; ++k) {  // the latest first
    std::atomic<void*>& slot = slots[(end - k) % kSlots];
    void* const data = take_from(slot);
    if (data == nullptr) continue;
    const size_t size = size_of(data);
    if (size >= bytes && size - bytes <= bytes / 4) {
      unsigned expected = end;
      if (k == 1) next.compare_exchange_strong(expected, end - 1);
      return {data, false};
    }
    kept += size;
    void* empty = nullptr;
    if (!slot.compare_exchange_strong(empty, data)) keep(data);
  }
  void* data = map(bytes);
  if (data == nullptr) {
    for (std::atomic<void*>& slot : slots) unmap(take_from(slot));
    data = map(bytes);
  }
  return {data, true};
}

void free_memory(void* data) {
  const size_t size = size_of(data);
  if (size > limit || madvise(data, size, MADV_FREE) != 0) return unmap(data);
  kept += size;
  for (unsigned k = 0; k < kSlots && kept > limit; ++k) {  // the oldest first
    unmap(take_from(slots[(next + k) % kSlots]));
  }
  keep(data);
}

#else

void prefer_huge_pages(void*, size_t) {}
Memory take_memory(size_t) { return {nullptr, true}; }
void free_memory(void*) {}

#endif

}  // namespace softmax_ext::cpu
