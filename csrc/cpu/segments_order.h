// Pointers of segments, and the order that brings the elements of each together.
#pragma once

#include <cstdint>

namespace softmax_ext::cpu {

// What the numbers of segments, one for each element, are: an empty index has a first of 0 and a last of
// -1.
struct IndexRange {
  int64_t first, last;  // least and greatest
  bool sorted;          // and none is below 0
};

template <class Index>
IndexRange range_of(const Index* index, int64_t size);

// pointers[0 .. count] of a sorted index, of numbers from 0 to count - 1.
template <class Index>
void find_pointers(const Index* index, int64_t size, int64_t* pointers, int64_t count);

// The same of any index, and order[0 .. size - 1]: the elements of segment s, as they follow each other,
// from order[pointers[s]] on.
template <class Index>
void sort_by_segment(const Index* index, int64_t size, int64_t* pointers, int64_t count,
                     int64_t* order);

// Whether pointers[0 .. count] begin with 0, never fall, and end with `size`: the first that does not, or
// -1.
int64_t find_bad_pointer(const int64_t* pointers, int64_t count, int64_t size);

}  // namespace softmax_ext::cpu
