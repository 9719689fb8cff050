// Which thread takes which segment. A segment of no more than a chunk of rows has one owner, and threads
// share out such segments by their rows. A longer one goes in chunks that all threads share: each is
// reduced to a state for every column, one thread combines a segment's states in the order of its
// chunks, and the chunks are looked at again. So the number of threads changes no bit.
//
// Rows that an order scatters over the tensor are gathered first, a chunk at a time: they get the bits of
// the same rows side by side.
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

// Rows by their numbers: `count` from `first` on, or those that `order` names.
struct RowsOf {
  int64_t first;
  const int64_t* order;
  int64_t count;
};

// copy(to, from, bytes), which most sizes of a row have as a constant.
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

// The rows of a tensor as a kernel reads them, one after the other.
template <class T>
class GatheredRows {
 public:
  GatheredRows(const void* tensor, const Shape& shape, bool scattered)
      : tensor_(static_cast<const T*>(tensor)),
        inner_(shape.inner),
        buffer_(scattered ? chunk_rows(shape.inner) * shape.inner : 1) {}

  const T* of(int64_t outer_row, const RowsOf& rows) const {
    const T* from = tensor_ + outer_row * inner_;
    if (rows.order == nullptr) return from + rows.first * inner_;
    visit_bytes(inner_ * sizeof(T), [&](auto bytes) {
      char* to = reinterpret_cast<char*>(buffer_.data());
      for (int64_t k = 0; k < rows.count; ++k) {
        std::memcpy(to + k * bytes(), from + rows.order[k] * inner_, bytes());
      }
    });
    return buffer_.data();
  }

 private:
  const T* tensor_;
  int64_t inner_;
  Buffer<T> buffer_;
};

// The same as a kernel writes them: to the place of rows, after which done() puts them where they belong.
template <class T>
class ScatteredRows {
 public:
  ScatteredRows(void* tensor, const Shape& shape, bool scattered)
      : tensor_(static_cast<T*>(tensor)),
        inner_(shape.inner),
        buffer_(scattered ? chunk_rows(shape.inner) * shape.inner : 1) {}

  T* of(int64_t outer_row, const RowsOf& rows) const {
    if (rows.order != nullptr) return buffer_.data();
    return tensor_ + (outer_row + rows.first) * inner_;
  }

  void done(int64_t outer_row, const RowsOf& rows) const {
    if (rows.order == nullptr) return;
    T* to = tensor_ + outer_row * inner_;
    visit_bytes(inner_ * sizeof(T), [&](auto bytes) {
      const char* from = reinterpret_cast<const char*>(buffer_.data());
      for (int64_t k = 0; k < rows.count; ++k) {
        std::memcpy(to + rows.order[k] * inner_, from + k * bytes(), bytes());
      }
    });
  }

 private:
  T* tensor_;
  int64_t inner_;
  Buffer<T> buffer_;
};

// Runs a kernel on all segments. Kernel, which each thread makes for itself by make(), has
//   empty(o, s)                 segment s of slice o, which has no rows
//   whole(o, s, rows)           of at most a chunk of rows
//   reduce(o, rows, state)      a chunk, to Kernel::State state[inner]
//   combine(o, s, states, n)    n of those, one after the other, into the first
//   finish(o, s, rows, state)   a chunk, by what its segment's are combined to
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

  if (rows > 0) parallel_for(
      threads, shape.outer * rows, grain<A>(shape.inner), [&](int64_t begin, int64_t end) {
        const Kernel kernel = make();
        for (int64_t o = begin / rows; o * rows < end; ++o) {
          // Of the rows of all gaps, those from `first` to `last` are to be taken.
          int64_t first = std::max<int64_t>(begin - o * rows, 0);
          int64_t last = std::min(end - o * rows, rows);
          for (const auto& [gap_begin, gap_end] : gaps) {
            const int64_t size = gap_end - gap_begin;
            if (last <= 0) break;
            if (first < size) {
              // A segment is of the thread that has its first row.
              const int64_t row = gap_begin + std::max<int64_t>(first, 0);
              const int64_t end_row = gap_begin + std::min(last, size);
              int64_t s = std::lower_bound(pointers, pointers + segments.count, row) - pointers;
              for (; s < segments.count && pointers[s] < end_row; ++s) {
                if (pointers[s] == pointers[s + 1]) continue;
                kernel.whole(o, s, rows_of(pointers[s], pointers[s + 1]));
              }
            }
            first -= size;
            last -= size;
          }
        }
      });

  if (chunks.empty()) return;
  const int64_t count = static_cast<int64_t>(chunks.size());
  const Buffer<typename Kernel::State> states(shape.outer * count * shape.inner);
  const auto state_of = [&](int64_t o, int64_t k) {
    return states.data() + (o * count + k) * shape.inner;
  };
  const auto for_each_chunk = [&](auto f) {
    parallel_for(threads, shape.outer * count, grain<A>(chunk * shape.inner),
                 [&](int64_t begin, int64_t end) {
                   const Kernel kernel = make();
                   for (int64_t k = begin; k < end; ++k) f(kernel, k / count, k % count);
                 });
  };
  for_each_chunk([&](const Kernel& kernel, int64_t o, int64_t k) {
    kernel.reduce(o, rows_of(chunks[k].begin, chunks[k].end), state_of(o, k));
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
  for_each_chunk([&](const Kernel& kernel, int64_t o, int64_t k) {
    const Chunk& each = chunks[k];
    kernel.finish(o, each.segment, rows_of(each.begin, each.end), state_of(o, each.first_chunk));
  });
}

}  // namespace
}  // namespace softmax_ext::cpu
