// Which launch of the CUDA kernels of segments (segment_kernels.cuh) runs. The lengths of segments are
// values, which the device has: what is chosen here goes by how long they are on average, and the
// device sorts those apart that are longer.
//
// No choice changes a result. A column of a segment is always summed in the same tree, which its length
// alone decides: chunks of kSegmentChunk rows; of a chunk the rows farthest apart first, 64, 32, ... and
// 1; and the chunks as those of a row.
#pragma once

#include <algorithm>

#include "softmax_ext/plan.h"
#include "softmax_ext/segments.h"

namespace softmax_ext {

namespace limits {
constexpr int kSegmentThreads = 256;
// Rows that a thread has at once.
constexpr int kSegmentRows = 4;
// A warp's, where each lane has rows of its own.
constexpr int kSegmentChunk = kWarp * kSegmentRows;
// The state of the first chunk of a longer segment has the slot of the row that it begins at, of which
// there is one for so many: those of its chunks end before the next such segment's begin.
constexpr int kSegmentSlotRows = kSegmentChunk / 2;
// Bytes side by side in a tile of columns: two sectors of a row. A lane has 16 of them, or where rows
// are not of whole vectors an element.
constexpr int kSegmentTileBytes = 64;
constexpr int kMostSegmentAcross = 8;
// Columns of a tile.
constexpr int kSegmentColumns = 32;
// Lanes along a short segment, at least.
constexpr int kFewestSegmentAlong = 2;
// A warp takes segments of up to so many times the average length.
constexpr int kShortSegments = 3;
// Blocks for an SM that take the longer segments from a list, whose size only the device knows.
constexpr int kSegmentBlocks = 8;
constexpr int64_t kMaxGridY = 65535;
}  // namespace limits

// A part of a segment that is too long for a block.
struct SegmentPart {
  int64_t segment;
  int64_t number;
};

struct SegmentPlan {
  int columns;         // neighbours that a lane has: in one access
  int across;          // lanes side by side over the columns of a tile; a power of two
  int along;           // lanes of a warp along a segment; a power of two
  int64_t most;        // rows of a segment that such lanes take
  int64_t block_rows;  // that a block takes: of a segment that is longer, a part
  int64_t slices;      // tiles of all outer indices
  int64_t warp_blocks, list_blocks, part_blocks, combine_blocks;  // for each of these
  // Places in the scratch memory: of the lists, at their longest, and of the states of chunks.
  size_t wholes, parts, states, scratch_bytes;
  int64_t state_slots;

  // Segments that take more than `most` rows, and ones that a block does not.
  constexpr bool has_long(const Shape& shape) const { return shape.dim > most; }
  constexpr bool has_parts(const Shape& shape) const { return shape.dim > block_rows; }
};

// `aligned`: every row of every tensor begins at a multiple of a vector's bytes.
constexpr SegmentPlan make_segment_plan(const Shape& shape, int64_t count, DType dtype,
                                        bool aligned, int sums, const DeviceProperties& device) {
  using namespace limits;
  using detail::ceil_div;
  const int element = static_cast<int>(size_of(dtype));
  SegmentPlan plan{};
  plan.columns = aligned ? kVectorBytes / element : 1;
  const int64_t accesses = shape.inner / plan.columns;
  const int most_across =
      std::min(kMostSegmentAcross, kSegmentTileBytes / (plan.columns * element));
  plan.across = 1;
  while (plan.across < most_across && plan.across < accesses) plan.across *= 2;
  plan.along = std::min(kFewestSegmentAlong, kWarp / plan.across);
  // Against overflow, and where there are none, the average by a division.
  const int64_t average = count > 0 ? ceil_div(shape.dim, count) : 0;
  while (plan.along < kWarp / plan.across &&
         plan.along * kSegmentRows < kShortSegments * std::min(average, int64_t{kSegmentChunk})) {
    plan.along *= 2;
  }
  plan.most = int64_t{plan.along} * kSegmentRows;
  plan.block_rows = int64_t{kSegmentThreads} / plan.across * kSegmentRows;
  const int64_t tiles = ceil_div(accesses, plan.across);
  plan.slices = shape.outer * tiles;

  const int64_t wholes = shape.dim / (plan.most + 1), parts = 2 * shape.dim / plan.block_rows;
  plan.state_slots = plan.has_parts(shape) ? shape.dim / kSegmentSlotRows : 0;
  const int64_t state_bytes = int64_t{sums} * (dtype == DType::kFloat64 ? 8 : 4);
  plan.wholes = kVectorBytes;
  plan.parts = plan.wholes + static_cast<size_t>(wholes) * sizeof(int64_t);
  plan.states = plan.parts + (plan.has_parts(shape) ? parts : 0) * sizeof(SegmentPart);
  plan.scratch_bytes =
      plan.states + static_cast<size_t>(shape.outer * plan.state_slots * shape.inner * state_bytes);

  const int64_t filling = int64_t{device.sm_count} * kSegmentBlocks;
  const auto persistent = [&](int64_t items, int64_t slices) {
    return std::max<int64_t>(std::min({items, ceil_div(filling, slices), kMaxGridY}), 1);
  };
  const int64_t groups = kSegmentThreads / (plan.across * plan.along);
  plan.warp_blocks = std::min(ceil_div(count, groups), kMaxGridY);
  plan.list_blocks = std::min(ceil_div(std::max(count, shape.dim), kSegmentThreads), filling);
  plan.part_blocks = persistent(wholes + parts, plan.slices);
  plan.combine_blocks = persistent(parts, shape.outer * shape.inner);
  return plan;
}

}  // namespace softmax_ext
