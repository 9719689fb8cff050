#include "segments_order.h"

#include <algorithm>
#include <type_traits>

namespace softmax_ext::cpu {

template <class Index>
IndexRange range_of(const Index* index, int64_t size) {
  if (size == 0) return {0, -1, true};
  // Of a sorted index the ends say all. The sign is that of a number or a step below 0.
  using Bits = std::make_unsigned_t<Index>;
  Bits signs = index[0];
  for (int64_t k = 1; k < size; ++k) {
    const Bits bits = index[k], before = index[k - 1];
    signs |= bits | (bits - before);
  }
  if (static_cast<Index>(signs) >= 0) return {index[0], index[size - 1], true};
  const auto [first, last] = std::minmax_element(index, index + size);
  return {*first, *last, false};
}

template <class Index>
void find_pointers(const Index* index, int64_t size, int64_t* pointers, int64_t count) {
  std::fill_n(pointers, count + 1, int64_t{0});
  // The last of equal numbers stays.
  for (int64_t k = 0; k < size; ++k) pointers[index[k] + 1] = k + 1;
  for (int64_t s = 0; s < count; ++s) pointers[s + 1] = std::max(pointers[s + 1], pointers[s]);
}

template <class Index>
void sort_by_segment(const Index* index, int64_t size, int64_t* pointers, int64_t count,
                     int64_t* order) {
  // pointers[s + 1] goes from the number of elements of segment s to the place of its first, and from
  // there, an element at a time, to that of the next segment's.
  std::fill_n(pointers, count + 1, int64_t{0});
  for (int64_t k = 0; k < size; ++k) ++pointers[index[k] + 1];
  int64_t place = 0;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t elements = pointers[s + 1];
    pointers[s + 1] = place;
    place += elements;
  }
  for (int64_t k = 0; k < size; ++k) order[pointers[index[k] + 1]++] = k;
}

int64_t find_bad_pointer(const int64_t* pointers, int64_t count, int64_t size) {
  if (pointers[0] != 0) return 0;
  for (int64_t s = 0; s < count; ++s) {
    if (pointers[s] > pointers[s + 1]) return s + 1;
  }
  return pointers[count] == size ? -1 : count;
}

template IndexRange range_of(const int32_t*, int64_t);
template IndexRange range_of(const int64_t*, int64_t);
template void find_pointers(const int32_t*, int64_t, int64_t*, int64_t);
template void find_pointers(const int64_t*, int64_t, int64_t*, int64_t);
template void sort_by_segment(const int32_t*, int64_t, int64_t*, int64_t, int64_t*);
template void sort_by_segment(const int64_t*, int64_t, int64_t*, int64_t, int64_t*);

}  // namespace softmax_ext::cpu
