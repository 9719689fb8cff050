// Memory of large outputs.
//
// The first write to a page costs more than the results in it, and malloc gives a large block back to
// the system as soon as it is freed. So the memory of a large output asks for huge pages; and when
// the output is freed, it is kept for the next one, with leave to the system to take its pages
// whenever it wants some (MADV_FREE). On other systems than Linux there is none.
//
// Results in use and blocks kept are together at most a quarter more than the results that were ever
// in use at once, whatever their sizes: before more is mapped, the oldest kept goes. Where the address
// space has a limit (RLIMIT_AS, RLIMIT_DATA), a block that is kept would be one that others cannot
// have, and nothing is.
//
// Any thread may call any of these at any time. There is no lock, which a child made by fork could
// find locked for ever: what another thread had in its hands is lost to the child, and no more.
#pragma once

#include <cstddef>

namespace softmax_ext::cpu {

// Asks for huge pages where memory has none yet. It is advice about these bytes alone; memory that is
// in use already keeps its pages.
void prefer_huge_pages(void* data, size_t bytes);

// What malloc gives back. Smaller sizes it keeps, once one has been freed: mallopt(3), M_MMAP_THRESHOLD.
constexpr size_t kLargeOutput = size_t{32} << 20;

struct Memory {
  void* data;   // nullptr: there is none
  bool is_new;  // pages may have to be made at the first write
};

// Memory for `bytes`, in huge pages of its own; free_memory gets it back.
Memory take_memory(size_t bytes);
void free_memory(void* data);

// Gives what is kept back to the system.
void empty_cache();

struct MemoryStats {
  size_t kept_bytes;
  size_t kept_blocks;
  size_t limit_bytes;  // of kept_bytes
};
// Throws std::runtime_error if the environment variable SOFTMAX_EXT_KEEP_MB is not a whole number of
// MB that a size_t holds in bytes.
MemoryStats memory_stats();

}  // namespace softmax_ext::cpu
