// Memory of large outputs.
//
// The first write to a page costs more than the results in it, and malloc gives a large block back to
// the system as soon as it is freed. So the memory of a large output asks for huge pages; and when
// the output is freed, it is kept for the next one, with leave to the system to take its pages
// whenever it wants some (MADV_FREE). On other systems than Linux there is none.
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

}  // namespace softmax_ext::cpu
