// Which thread takes which segment. A segment of no more than a chunk of rows has one owner, and threads
// share out such segments by their rows. A longer one goes in chunks that all threads share: each is
// reduced to a state for every column, one thread combines a segment's states in the order of its
// chunks, and the chunks are looked at again. So the number of threads changes no bit.
//
// Rows that an order scatters over the tensor get the bits of the same rows side by side.
#pragma once

#include <algorithm>
#include <vector>

#include "segments_tile.h"
#include "softmax_ext/segments.h"

namespace softmax_ext::cpu {
namespace {

// Rows of a chunk: what is kept of them, and they, are at home in the first-level cache.
inline int64_t chunk_rows(int64_t inner) {
  constexpr int64_t kChunk = 4096, kFewest = 16;  // elements, rows
  return std::max(kChunk / inner, kFewest);
}

// Rows of a slice by their places among all segments': `count` from `first` on, which `order` names, or
// which lie there if it is null.
struct RowsOf {
  int64_t first;
  const int64_t* order;
  int64_t count;
};

// copy(bytes), where bytes() is a constant for most sizes of a row.
template <class Copy>
void visit_bytes(int64_t bytes, Copy copy) {
  switch (bytes) {
    case 4:
      return copy(std::integral_constant<int64_t, 4>{});
    case 8:
      return copy(std::integral_constant<int64_t, 8>{});
    case 16:
      return copy(std::integral_constant<int64_t, 16>{});
    case 32:
      return copy(std::integral_constant<int64_t, 32>{});
    case 64:
      return copy(std::integral_constant<int64_t, 64>{});
    default:
      return copy([bytes] { return bytes; });
  }
}

// Rows of a tensor one after the other: where they are, or, of an order, in a buffer. They are gathered
// before the first, and scattered after the last is worked on, at most a chunk of them: a processor has many
// under way at once, and what it stored in parts has settled when it is loaded whole.
template <class T>
class Rows {
 public:
  using Element = std::remove_const_t<T>;

  Rows(T* tensor, const Shape& shape, bool scattered)
      : tensor_(tensor),
        shape_(shape),
        buffer_(scattered ? chunk_rows(shape.inner) * shape.inner : 1) {}

  // Of slice o.
  void open(int64_t o, const RowsOf& rows) {
    T* const slice = tensor_ + o * shape_.dim * shape_.inner;
    first_ = rows.first;
    data_ = rows.order == nullptr ? slice + first_ * shape_.inner : buffer_.data();
  }
  void gather(int64_t o, const RowsOf& rows) {
    open(o, rows);
    if (rows.order == nullptr) return;
    const T* const slice = tensor_ + o * shape_.dim * shape_.inner;
    visit_bytes(shape_.inner * sizeof(T), [&](auto bytes) {
      char* to = reinterpret_cast<char*>(buffer_.data());
      for (int64_t k = 0; k < rows.count; ++k) {
        std::memcpy(to + k * bytes(), slice + rows.order[k] * shape_.inner, bytes());
      }
    });
  }
  void scatter(int64_t o, const RowsOf& rows) const {
    if (rows.order == nullptr) return;
    T* const slice = tensor_ + o * shape_.dim * shape_.inner;
    visit_bytes(shape_.inner * sizeof(T), [&](auto bytes) {
      const char* from = reinterpret_cast<const char*>(buffer_.data());
      for (int64_t k = 0; k < rows.count; ++k) {
        std::memcpy(slice + rows.order[k] * shape_.inner, from + k * bytes(), bytes());
      }
    });
  }

  // The row of this place, which is open.
  T* at(int64_t place) const { return data_ + (place - first_) * shape_.inner; }

 private:
  T* tensor_;
  Shape shape_;
  Buffer<Element> buffer_;
  T* data_ = nullptr;
  int64_t first_ = 0;
};

// Runs a kernel on all segments. Kernel, which each thread makes for itself by make(), has
//   empty(o, s)                        segment s of slice o, which has no rows
//   open(o, rows), close(o, rows)      before and after the work on rows of slice o
//   whole(o, s, first, count)          all of segment s: so many open rows from a place on
//   reduce(first, count, state)        a chunk of one, to Kernel::State state[inner]
//   combine(o, s, states, n)           n of those, one after the other, into the first
//   finish(o, s, first, count, state)  a chunk, by what those of its segment are combined to
template <class Kernel, class Make>
void for_each_segment(const Shape& shape, const Segments& segments, const Threads& threads,
                      Make make) {
  using A = typename Kernel::Compute;
  const int64_t chunk = chunk_rows(shape.inner), *pointers = segments.pointers;
  const auto rows_of = [&](int64_t begin, int64_t end) {
    return RowsOf{begin, segments.order == nullptr ? nullptr : segments.order + begin, end - begin};
  };

  struct Long {
    int64_t segment, first_chunk;
  };
  struct Chunk {
    int64_t segment, first_chunk, begin, end;
  };
  std::vector<Long> longs;
  std::vector<Chunk> chunks;
  std::vector<std::pair<int64_t, int64_t>> gaps;  // rows between long segments
  int64_t gap = 0, rows = 0;
  {
    const Kernel kernel = make();
    for (int64_t s = 0; s < segments.count; ++s) {
      const int64_t begin = pointers[s], end = pointers[s + 1];
      // 0 < end - begin <= chunk of almost all.
      if (static_cast<uint64_t>(end - begin - 1) < static_cast<uint64_t>(chunk)) continue;
      if (begin == end) {
        for (int64_t o = 0; o < shape.outer; ++o) kernel.empty(o, s);
        continue;
      }
      longs.push_back({s, static_cast<int64_t>(chunks.size())});
      for (int64_t k = begin; k < end; k += chunk) {
        chunks.push_back({s, longs.back().first_chunk, k, std::min(k + chunk, end)});
      }
      gaps.emplace_back(gap, begin);
      rows += begin - gap;
      gap = end;
    }
  }
  gaps.emplace_back(gap, shape.dim);
  rows += shape.dim - gap;

  // The segments that begin at the places of [place, end), in groups of no more than a chunk.
  const auto take = [&](Kernel& kernel, int64_t o, int64_t place, int64_t end) {
    int64_t s = std::lower_bound(pointers, pointers + segments.count, place) - pointers;
    while (s < segments.count && pointers[s] < end) {
      int64_t next = s + 1;
      while (next < segments.count && pointers[next] < end &&
             pointers[next + 1] - pointers[s] <= chunk) {
        ++next;
      }
      const RowsOf group = rows_of(pointers[s], pointers[next]);
      kernel.open(o, group);
      for (; s < next; ++s) {
        const int64_t count = pointers[s + 1] - pointers[s];
        if (count > 0) kernel.whole(o, s, pointers[s], count);
      }
      kernel.close(o, group);
    }
  };
  const auto take_share = [&](int64_t begin, int64_t end) {
    Kernel kernel = make();
    for (int64_t o = begin / rows; o * rows < end; ++o) {
      // From `first` to `last` of the rows in all gaps.
      int64_t first = std::max<int64_t>(begin - o * rows, 0);
      int64_t last = std::min(end - o * rows, rows);
      for (const auto& [gap_begin, gap_end] : gaps) {
        const int64_t size = gap_end - gap_begin;
        if (first < size && last > 0) {
          take(kernel, o, gap_begin + std::max<int64_t>(first, 0),
               gap_begin + std::min(last, size));
        }
        first -= size;
        last -= size;
      }
    }
  };
  if (rows > 0) parallel_for(threads, shape.outer * rows, grain<A>(shape.inner), take_share);

  if (chunks.empty()) return;
  const int64_t count = static_cast<int64_t>(chunks.size());
  const Buffer<typename Kernel::State> states(shape.outer * count * shape.inner);
  const auto state_of = [&](int64_t o, int64_t k) {
    return states.data() + (o * count + k) * shape.inner;
  };
  const auto for_each_chunk = [&](auto f) {
    parallel_for(threads, shape.outer * count, grain<A>(chunk * shape.inner),
                 [&](int64_t begin, int64_t end) {
                   Kernel kernel = make();
                   for (int64_t k = begin; k < end; ++k) f(kernel, k / count, k % count);
                 });
  };
  for_each_chunk([&](Kernel& kernel, int64_t o, int64_t k) {
    const Chunk& each = chunks[k];
    kernel.open(o, rows_of(each.begin, each.end));
    kernel.reduce(each.begin, each.end - each.begin, state_of(o, k));
  });
  const int64_t long_count = static_cast<int64_t>(longs.size());
  parallel_for(threads, shape.outer * long_count, grain<A>(shape.inner),
               [&](int64_t begin, int64_t end) {
                 const Kernel kernel = make();
                 for (int64_t k = begin; k < end; ++k) {
                   const int64_t o = k / long_count, j = k % long_count;
                   const int64_t first = longs[j].first_chunk;
                   const int64_t last = j + 1 < long_count ? longs[j + 1].first_chunk : count;
                   kernel.combine(o, longs[j].segment, state_of(o, first), last - first);
                 }
               });
  for_each_chunk([&](Kernel& kernel, int64_t o, int64_t k) {
    const Chunk& each = chunks[k];
    const RowsOf open = rows_of(each.begin, each.end);
    kernel.open(o, open);
    kernel.finish(o, each.segment, each.begin, open.count, state_of(o, each.first_chunk));
    kernel.close(o, open);
  });
}

}  // namespace
}  // namespace softmax_ext::cpu
