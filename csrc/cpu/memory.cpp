#include "memory.h"

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#endif

#if defined(MADV_HUGEPAGE) && defined(MADV_FREE)
#include <algorithm>
#include <atomic>
#endif

namespace softmax_ext::cpu {
namespace {

// Of all that is kept, in bytes.
size_t limit() {
  static const size_t value = [] {
    const char* const text = std::getenv("SOFTMAX_EXT_KEEP_MB");
    if (text == nullptr || *text == '\0') return size_t{512} << 20;
    char* end = nullptr;
    errno = 0;
    const unsigned long long megabytes = std::strtoull(text, &end, 10);
    const bool is_number = *text >= '0' && *text <= '9' && *end == '\0';
    if (!is_number || errno != 0 || megabytes > SIZE_MAX >> 20) {
      throw std::runtime_error(std::string("SOFTMAX_EXT_KEEP_MB is \"") + text +
                               "\"; expected a whole number of MB, from 0 to " +
                               std::to_string(SIZE_MAX >> 20));
    }
    return static_cast<size_t>(megabytes) << 20;
  }();
  return value;
}

}  // namespace

#if defined(MADV_HUGEPAGE) && defined(MADV_FREE)
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

constexpr uintptr_t round_up(uintptr_t a, uintptr_t b) { return (a + b - 1) / b * b; }

bool address_space_is_limited() {
  for (const auto resource : {RLIMIT_AS, RLIMIT_DATA}) {
    struct rlimit limit;
    if (getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return true;
  }
  return false;
}

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

void unmap(void* data) { (void)munmap(static_cast<char*>(data) - kHead, kHead + size_of(data)); }

// A block that is kept, or none, in one word: both its address and its size are whole huge pages.
class Block {
 public:
  Block() = default;
  explicit Block(void* data)
      : word_(reinterpret_cast<uintptr_t>(data) / kHugePage << kSizeBits |
              size_of(data) / kHugePage) {}

  explicit operator bool() const { return word_ != 0; }
  void* data() const { return reinterpret_cast<void*>((word_ >> kSizeBits) * kHugePage); }
  size_t size() const { return (word_ & ((uint64_t{1} << kSizeBits) - 1)) * kHugePage; }

 private:
  static constexpr int kSizeBits = 28;  // 36 are left for addresses of 57

  uint64_t word_ = 0;
};

// The blocks that are kept, in a ring: the latest is before `next`, the oldest after it.
constexpr unsigned kSlots = 16;
std::atomic<Block> slots[kSlots];
std::atomic<unsigned> next{0};
static_assert(std::atomic<Block>::is_always_lock_free);

// Bytes of the blocks of results, now and at most.
std::atomic<size_t> used{0};
std::atomic<size_t> most_used{0};

size_t kept_bytes() {
  size_t bytes = 0;
  for (const std::atomic<Block>& slot : slots) bytes += slot.load().size();
  return bytes;
}

bool give_back(Block block) {
  if (!block) return false;
  unmap(block.data());
  return true;
}

bool give_back_the_oldest() {
  for (unsigned k = 0; k < kSlots; ++k) {
    if (give_back(slots[(next + k) % kSlots].exchange(Block{}))) return true;
  }
  return false;
}

void* to_use(void* data) {
  const size_t now = used += size_of(data);
  size_t most = most_used;
  while (most < now && !most_used.compare_exchange_weak(most, now)) {
  }
  return data;
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
    std::atomic<Block>& slot = slots[(end - k) % kSlots];
    Block block = slot;
    const bool fits = block.size() >= bytes && block.size() - bytes <= bytes / 4;
    if (!fits || !slot.compare_exchange_strong(block, Block{})) continue;
    unsigned expected = end;
    if (k == 1) next.compare_exchange_strong(expected, end - 1);
    return {to_use(block.data()), false};
  }
  const size_t in_use = used + bytes, most = std::max<size_t>(most_used, in_use);
  while (in_use + kept_bytes() > most + most / 4 && give_back_the_oldest()) {
  }
  void* data = map(bytes);
  if (data == nullptr) {
    empty_cache();
    data = map(bytes);
  }
  return {data == nullptr ? nullptr : to_use(data), true};
}

void free_memory(void* data) {
  const size_t size = size_of(data);
  used -= size;
  const bool limited = address_space_is_limited();
  if (limited) empty_cache();
  if (limited || size > limit() || madvise(data, size, MADV_FREE) != 0) return unmap(data);
  while (kept_bytes() + size > limit() && give_back_the_oldest()) {
  }
  give_back(slots[next++ % kSlots].exchange(Block(data)));
}

void empty_cache() {
  for (std::atomic<Block>& slot : slots) give_back(slot.exchange(Block{}));
  most_used = used.load();
}

MemoryStats memory_stats() {
  MemoryStats stats{0, 0, address_space_is_limited() ? 0 : limit()};
  for (const std::atomic<Block>& slot : slots) {
    const Block block = slot;
    stats.kept_bytes += block.size();
    stats.kept_blocks += static_cast<bool>(block);
  }
  return stats;
}

#else

void prefer_huge_pages(void*, size_t) {}
Memory take_memory(size_t) { return {nullptr, true}; }
void free_memory(void*) {}
void empty_cache() {}
MemoryStats memory_stats() { return {0, 0, limit()}; }

#endif

}  // namespace softmax_ext::cpu
