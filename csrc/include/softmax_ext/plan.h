// Which CUDA kernel schedule runs, and with which launch: a function of the shape, the types, where the
// tensors lie (their alignment, and what follows what) and the device alone. Host code without CUDA, so
// that the choice for any device can be tested on any machine.
//
// No choice changes a result. A row is always summed in the same tree, which its length and the type
// that is read decide: neighbours that fill 16 bytes (a vector), then the vectors 32 apart, then the
// 32 lanes, which is a chunk; then the chunks 32 apart, and their 32 sums. device.cuh has it. What is
// summed forward is exp(x - max), of the max of the chunk, or in float64 of the row. So is a
// column (inner > 1), in a tree of its own: column_parts, column_tree.cuh.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "softmax_ext/problem.h"

namespace softmax_ext {

struct DeviceProperties {
  int sm_count;
  int max_shared_memory_per_block;  // bytes a block can have when it asks for them (opt-in)
  int compute_capability;           // 90 for 9.0
  int most_cluster_blocks = 16;     // fewer where a launch of so many was refused

  // That a cluster may have; 1 where there are no clusters.
  constexpr int cluster_blocks() const;
  constexpr bool has_clusters() const { return cluster_blocks() > 1; }
};

enum class Schedule : int {
  kPacked = 0,  // short or interleaved rows: through shared memory, whatever their alignment
  kWarp,        // a warp, or a part of one, has a row of one chunk
  kBlock,       // the warps of a block share a row
  kCluster,     // the warps of a cluster of blocks share a row
  kGrid,        // the warps of many blocks share a row; all blocks meet
  kColumns,     // inner > 1: threads side by side take columns side by side
};
constexpr int kSchedules = 6;

constexpr const char* name(Schedule schedule) {
  constexpr const char* kNames[kSchedules] = {"packed",  "warp", "block",
                                              "cluster", "grid", "columns"};
  return kNames[static_cast<int>(schedule)];
}

// Where a row stays between the pass that reduces it and the one that writes the result.
enum class Hold : int {
  kRegisters = 0,
  kShared,  // all but a thread's last vectors in shared memory
  kNone,    // it is read a second time
};
constexpr int kHolds = 3;

constexpr const char* name(Hold hold) {
  constexpr const char* kNames[kHolds] = {"registers", "shared", "none"};
  return kNames[static_cast<int>(hold)];
}

// A block is group x items threads, in the columns schedule across x group.
struct Plan {
  Schedule schedule;
  Hold hold;
  bool vectorized;  // rows: each vector is whole and aligned; columns: several in one access
  int width;        // elements in a vector
  int vectors;      // vectors that a thread holds of each input; columns: steps of a part, packed 0
  int columns;      // columns: neighbouring columns that a thread has; otherwise 1
  int group;        // threads of a block that share a row
  int across;       // columns: threads side by side across the inner size; otherwise 1
  int items;        // warp: rows of a block; packed: rows of a slab; otherwise 1
  int team;         // blocks that share a row
  int64_t blocks;
  size_t shared_bytes;   // dynamic shared memory
  size_t scratch_bytes;  // device memory that the caller provides

  constexpr int threads() const {
    return schedule == Schedule::kPacked ? across : group * across * items;
  }
  // Rows of whole vectors, at most as many as limits::short_vectors, which few lanes share.
  constexpr bool short_rows() const;
  // Of which an instance runs (launch_typed.cuh): KERNEL_forward_kernel, KERNEL_backward_kernel.
  constexpr const char* kernel() const;

  // visit(name, pointer to the member), of each.
  template <class Visit>
  static constexpr void each_member(Visit visit) {
    visit("schedule", &Plan::schedule);
    visit("hold", &Plan::hold);
    visit("vectorized", &Plan::vectorized);
    visit("width", &Plan::width);
    visit("vectors", &Plan::vectors);
    visit("columns", &Plan::columns);
    visit("group", &Plan::group);
    visit("across", &Plan::across);
    visit("items", &Plan::items);
    visit("team", &Plan::team);
    visit("blocks", &Plan::blocks);
    visit("shared_bytes", &Plan::shared_bytes);
    visit("scratch_bytes", &Plan::scratch_bytes);
  }
};

// Every limit and threshold that the plan and the kernels use.
namespace limits {
// The widest access of one thread.
constexpr int kVectorBytes = 16;
constexpr int kWarp = 32;
// Vectors of a row in the registers of a thread: half of those that 512 threads leave each other, with
// two inputs; the rest is for exp, addresses and what is stored. In float64, exp takes more.
constexpr int kChunkVectors = 8;
constexpr int kChunkVectorsFloat64 = 4;
// Steps along dim of a column that one thread sums alone; those of a part of a longer one, until there
// are so many parts.
constexpr int kAloneSteps = 32;
constexpr int kPartSteps = 8;
constexpr int kMostParts = 512;
// Threads of a block that shares a row. 512 fill the registers of an SM; with 256, two blocks fit,
// and one loads while the other stores.
constexpr int kMostWarps = 16;
constexpr int kLongWarps = 12;  // of one whose warps have several chunks each, in more registers
constexpr int kRowWarps = 8;
// Of a block of a cluster: where so few are enough, more and smaller blocks keep an SM busier.
constexpr int kClusterWarps = 4;
// That an SM has room for, of those that share a row and have a chunk in registers each.
constexpr int kResidentWarps = 24;
constexpr int kResidentWarpsBackward = 16;
// Threads of a block whose rows take a warp or less: small, so that an SM is filled evenly.
constexpr int kShortRowThreads = 128;
// Threads of an SM that keep its memory busy, where each has several vectors.
constexpr int kFillingThreads = 512;
// What every device with clusters has room for (CUDA programming guide).
constexpr int kClusterBlocks = 8;
// What those of data centers (9.0, 10.x) have room for, which a kernel has to ask for.
constexpr int kLargeClusterBlocks = 16;
// Of a packed block: a few such slabs, with their output, fill the threads and the shared memory of
// an SM alike.
constexpr int kSlabBytes = 8192;
constexpr int kPackedThreads = 128;
// Vectors of a packed row that one thread has in registers; float64 has too few of them.
constexpr int kPackedVectors = 4;
// A slab of more than that has as many threads as a block may have.
constexpr int kLargeSlabBytes = 32768;
constexpr int kLargePackedThreads = 512;
// Parts of a packed column that a lane has.
constexpr int kPackedParts = 4;
// Columns: bytes side by side in a tile, by accesses of at least so many; the most blocks of a cluster
// that shares it, and how many of such blocks an SM is to have room for, of which some load or
// store while others compute. The first that holds a tile is taken, with the smallest cluster
// that does: wide tiles are read as fast as in a copy, 64 bytes almost, and a sector, which is half
// of what memory gives at a time, at half the speed.
struct ColumnTile {
  int bytes;
  int least_access;
  int most_team;
  int blocks;
};
constexpr int kSectorBytes = 32;
constexpr int kColumnBlocks = 3;
constexpr ColumnTile kColumnTiles[] = {{128, kVectorBytes, 8, kColumnBlocks},
                                       {64, 1, 16, kColumnBlocks},
                                       {64, 1, 16, 2},
                                       {64, 1, 16, 1},
                                       {kSectorBytes, 1, 16, 2},
                                       {kSectorBytes, 1, 16, 1}};
constexpr int kMostColumnThreads = 256;
// A cluster's block has as many, and a tile with fewer of them is made wider.
constexpr int kFewColumnThreads = 128;
// Chunks of a row whose states a block keeps in shared memory; with more of them the grid shares it.
constexpr int kBlockChunks = 1024;
// Of a row that a grid shares, numbers that a block has in shared memory while it sums the chunks.
constexpr int kGridTerms = 4096;
// Fewer chunks than that are a block's even where there are few rows.
constexpr int kFewChunks = 4;
// Left free of rows: the states, and what a kernel has of its own.
constexpr int kReservedShared = 1024;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
// Outer dims whose strides a kernel has, and their indices, where there are several: those divisions
// are of 31 bits.
constexpr int kOuterDims = 4;
constexpr int64_t kMaxOuter = (int64_t{1} << 31) - 1;
}  // namespace limits

constexpr int DeviceProperties::cluster_blocks() const {
  const int most = compute_capability < 90    ? 1
                   : compute_capability < 110 ? limits::kLargeClusterBlocks
                                              : limits::kClusterBlocks;
  return std::min(most, most_cluster_blocks);
}

// Vectors of a lane in a chunk, which is 4 KB of a row (2 KB in float64).
constexpr int chunk_vectors(int64_t element_bytes) {
  return element_bytes == 8 ? limits::kChunkVectorsFloat64 : limits::kChunkVectors;
}

// Vectors of a short row: half a chunk.
constexpr int64_t short_vectors(int64_t element_bytes) {
  return limits::kWarp * chunk_vectors(element_bytes) / 2;
}

constexpr bool Plan::short_rows() const {
  return schedule == Schedule::kWarp && vectorized &&
         group * vectors <= short_vectors(limits::kVectorBytes / width);
}

constexpr const char* Plan::kernel() const {
  if (schedule == Schedule::kColumns) return "columns";
  if (schedule == Schedule::kPacked) {
    if (vectors == 0) return "packed_columns";
    return hold == Hold::kRegisters ? "packed_short" : "packed";
  }
  if (short_rows()) return "short";
  return hold == Hold::kRegisters ? "registers" : "long";
}

// Parts of a column, a power of two, and the steps along dim of each but the last that have any: of
// dim alone, so that all ways to share a column give the same bits.
constexpr int column_parts(int64_t dim) {
  if (dim <= limits::kAloneSteps) return 1;
  int parts = 2;
  while (parts < limits::kMostParts && int64_t{parts} * limits::kPartSteps < dim) parts *= 2;
  return parts;
}
constexpr int column_steps(int64_t dim) {
  return static_cast<int>((dim + column_parts(dim) - 1) / column_parts(dim));
}

// The shared memory of a block of the columns schedule, in bytes from its beginning, where the maxima
// of its parts are if exp has room to be kept.
struct ColumnMemory {
  int64_t states;  // of its parts, and of the team's blocks
  int64_t elements;
  int64_t end;
};
// Of a tile of so many columns.
constexpr ColumnMemory column_memory(int64_t dim, int team, int64_t tile, int64_t element_bytes,
                                     int inputs) {
  const auto aligned = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  const int64_t number = element_bytes == 8 ? 8 : 4;
  const int64_t parts = column_parts(dim) / team;
  const bool has_maxima = inputs == 1 && element_bytes == number;
  const int64_t states = has_maxima ? aligned(parts * tile * number) : 0;
  const int64_t elements = states + aligned((parts + team) * tile * number * (3 - inputs));
  return {states, elements, elements + parts * column_steps(dim) * tile * element_bytes * inputs};
}

// Slabs of as many outer indices as `outer`, the last of fewer, that go through a run.
constexpr int64_t slabs_of_run(int64_t run, int64_t outer) { return (run + outer - 1) / outer; }

// What the plan depends on.
struct Workload {
  Shape shape;
  DType load_type;   // of what is read
  DType store_type;  // of what is written
  int inputs;        // tensors that are read: 1 forward, 2 backward
  // Neighbours that make one aligned access at the beginning of each row, or step, of every tensor: a
  // power of two, at most those in 16 bytes of what is read.
  int aligned;
  // Outer indices that follow each other in every tensor as in a contiguous one, before the next lies
  // elsewhere; 0 where the steps of one do not.
  int64_t run;
  bool online;     // a chunk's state has its max and its sum, which one meeting combines
  int most_warps;  // of a block that shares a row
};

// Of contiguous tensors that begin at multiples of 16 bytes.
constexpr Workload workload(const Shape& shape, DType load_type, DType store_type, int inputs) {
  const auto width = static_cast<int>(limits::kVectorBytes / size_of(load_type));
  const bool online = inputs == 1 && size_of(load_type) < 8;
  return {shape, load_type, store_type, inputs, width, shape.outer, online, limits::kMostWarps};
}

constexpr bool is_half(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

// Pairs of types that have kernels: no cast, or the cast between a 16-bit type and float32 that mixed
// precision makes.
constexpr bool is_native(DType load_type, DType store_type, int inputs) {
  const DType narrow = inputs == 1 ? load_type : store_type;
  const DType wide = inputs == 1 ? store_type : load_type;
  return is_floating(narrow) && (narrow == wide || (is_half(narrow) && wide == DType::kFloat32));
}

// The shared memory of a slab of `elements` that begins anywhere in 16 bytes: a word, or one element
// where that is larger, is left free behind every 32 words, which spreads a stride over the banks.
constexpr int64_t slab_bytes(int64_t elements, int64_t element_bytes) {
  const int64_t words = (elements * element_bytes + 2 * limits::kVectorBytes) / 4;
  const int64_t pad = std::max<int64_t>(1, element_bytes / 4);
  return ((words + (words / 32 + 1) * pad) * 4 + 15) / 16 * 16;
}

namespace detail {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

constexpr int64_t power_of_two_from(int64_t a) {
  int64_t power = 1;
  while (power < a) power *= 2;
  return power;
}

struct Sizes {
  int64_t load;  // bytes of an element
  int64_t store;
  int width;
  int64_t vectors;      // of a row
  int64_t chunks;       // of a row
  int64_t chunk_bytes;  // of one input
  int64_t state_bytes;  // of a chunk: a max and a sum if both are met at once, or one number
  bool whole;           // vectors, all of them

  constexpr explicit Sizes(const Workload& work)
      : load(size_of(work.load_type)),
        store(size_of(work.store_type)),
        width(static_cast<int>(limits::kVectorBytes / load)),
        vectors(ceil_div(work.shape.dim, width)),
        chunks(ceil_div(vectors, int64_t{limits::kWarp} * chunk_vectors(load))),
        chunk_bytes(int64_t{limits::kWarp} * chunk_vectors(load) * limits::kVectorBytes),
        state_bytes((load == 8 ? 8 : 4) * (work.online ? 2 : 1)),
        whole(work.aligned == width && work.shape.dim % width == 0) {}

  // In shared memory, of the chunks' states. There are two buffers, since a block may write the next
  // row's states while another reads this one's.
  constexpr int64_t states() const { return (2 * chunks * state_bytes + 15) / 16 * 16; }
  // Of what is summed where a grid shares a row.
  constexpr int64_t grid_terms() const { return limits::kGridTerms * (load == 8 ? 8 : 4); }
};

constexpr Plan start(Schedule schedule, const Sizes& sizes) {
  Plan plan{};
  plan.schedule = schedule;
  plan.vectorized = sizes.whole;
  plan.width = sizes.width;
  plan.columns = plan.across = plan.items = plan.team = 1;
  return plan;
}

// --- Each schedule's plan; blocks is 0 where it cannot take the work -----------------------------

constexpr Plan plan_packed(const Workload& work, const DeviceProperties& device) {
  const Sizes sizes(work);
  const Shape& shape = work.shape;
  Plan plan = start(Schedule::kPacked, sizes);
  plan.vectorized = false;
  const int parts = column_parts(shape.dim);
  const bool columns = shape.inner > 1;
  if (work.run == 0) return plan;
  if (columns ? parts > limits::kPackedParts * limits::kWarp : sizes.vectors > limits::kWarp) {
    return plan;
  }
  const int64_t needed = columns ? parts : power_of_two_from(sizes.vectors);
  const bool one_thread = !columns && sizes.load < 8 && needed <= limits::kPackedVectors;
  plan.hold = one_thread ? Hold::kRegisters : Hold::kShared;
  plan.vectors = columns ? 0 : one_thread ? static_cast<int>(needed) : 1;
  plan.group = one_thread ? 1 : static_cast<int>(std::min<int64_t>(limits::kWarp, needed));
  // Outer indices in a slab: as many for each thread; fewer where the device would not be filled.
  const int64_t one = shape.dim * shape.inner;
  int64_t outer = std::max<int64_t>(1, limits::kSlabBytes / (one * sizes.load));
  if (one_thread) outer -= outer % limits::kPackedThreads;
  outer = std::min(outer, work.run);
  while (outer > 1 && ceil_div(shape.outer, outer) < device.sm_count) outer = ceil_div(outer, 2);
  const int64_t slabs = shape.outer / work.run * slabs_of_run(work.run, outer);
  const int64_t bytes =
      work.inputs * slab_bytes(outer * one, sizes.load) + slab_bytes(outer * one, sizes.store);
  if (bytes > device.max_shared_memory_per_block - limits::kReservedShared) return plan;
  plan.shared_bytes = static_cast<size_t>(bytes);
  plan.items = static_cast<int>(outer * shape.inner);
  plan.across = outer * one * sizes.load > limits::kLargeSlabBytes ? limits::kLargePackedThreads
                                                                   : limits::kPackedThreads;
  plan.blocks = std::min(slabs, limits::kMaxBlocks);
  return plan;
}

constexpr Plan plan_warp(const Workload& work, const DeviceProperties& device) {
  const Sizes sizes(work);
  Plan plan = start(Schedule::kWarp, sizes);
  if (work.shape.inner > 1 || sizes.chunks > 1) return plan;
  const int64_t rows = work.shape.rows();
  const auto sharing = [&](int64_t vectors) {  // threads, with as many vectors each
    return std::max<int64_t>(1, power_of_two_from(sizes.vectors) / vectors);
  };
  int64_t vectors = 2;
  if (sizes.whole && sizes.vectors <= short_vectors(sizes.load)) {
    // Each step of a reduction costs all lanes an instruction, and there are fewer steps where few
    // lanes have many vectors each. But four lanes at least, side by side in two sectors, and enough
    // to fill the device; and the tree of more than 64 vectors is not one that few lanes can follow.
    const auto allowed = [&](int64_t vectors) {
      return vectors * work.inputs <= chunk_vectors(sizes.load) && sharing(vectors) >= 4 &&
             (sharing(1) <= 2 * limits::kWarp || sharing(vectors) == limits::kWarp) &&
             rows * sharing(vectors) >= device.sm_count * int64_t{limits::kFillingThreads};
    };
    while (allowed(2 * vectors) || sharing(vectors) > limits::kWarp) vectors *= 2;
    plan.group = static_cast<int>(sharing(vectors));
  } else {
    // Vectors are shifted between the lanes of a warp.
    plan.group = limits::kWarp;
    vectors = std::max(vectors, power_of_two_from(ceil_div(sizes.vectors, limits::kWarp)));
  }
  plan.vectors = static_cast<int>(vectors);
  plan.items = limits::kShortRowThreads / plan.group;
  while (plan.items * plan.group > limits::kWarp && ceil_div(rows, plan.items) < device.sm_count) {
    plan.items /= 2;
  }
  plan.blocks = std::min(ceil_div(rows, plan.items), limits::kMaxBlocks);
  return plan;
}

// A row by `team` blocks of `warps` warps, with as little of it read twice as can be.
constexpr Plan plan_shared_row(Schedule schedule, const Workload& work,
                               const DeviceProperties& device, int64_t team, int64_t warps,
                               int64_t teams) {
  const Sizes sizes(work);
  Plan plan = start(schedule, sizes);
  plan.vectors = chunk_vectors(sizes.load);
  plan.team = static_cast<int>(team);
  const bool grid = schedule == Schedule::kGrid;
  const int64_t states = grid ? sizes.grid_terms() : sizes.states();
  // A chunk of each warp stays in its registers; more go to shared memory if all of them can.
  if (sizes.chunks > team * warps) warps = std::min<int64_t>(warps, limits::kLongWarps);
  const int64_t each = ceil_div(sizes.chunks, team * warps);
  const int64_t kept = (each - 1) * warps * sizes.chunk_bytes * work.inputs;
  const bool fits = kept + states <= device.max_shared_memory_per_block - limits::kReservedShared;
  plan.hold = each == 1 ? Hold::kRegisters : fits ? Hold::kShared : Hold::kNone;
  plan.group = static_cast<int>(warps) * limits::kWarp;
  plan.shared_bytes = static_cast<size_t>(states + (plan.hold == Hold::kShared ? kept : 0));
  plan.scratch_bytes = grid ? static_cast<size_t>(2 * teams * sizes.chunks * sizes.state_bytes) : 0;
  plan.blocks = teams * team;
  return plan;
}

constexpr Plan plan_block(const Workload& work, const DeviceProperties& device) {
  const Sizes sizes(work);
  if (work.shape.inner > 1 || sizes.chunks > limits::kBlockChunks) {
    return start(Schedule::kBlock, sizes);
  }
  const int64_t warps = std::min<int64_t>(sizes.chunks, work.most_warps);
  return plan_shared_row(Schedule::kBlock, work, device, 1, warps,
                         std::min(work.shape.rows(), limits::kMaxBlocks));
}

constexpr Plan plan_cluster(const Workload& work, const DeviceProperties& device) {
  const Sizes sizes(work);
  if (work.shape.inner > 1 || sizes.chunks < 2 || sizes.chunks > limits::kBlockChunks ||
      !device.has_clusters()) {
    return start(Schedule::kCluster, sizes);
  }
  const int64_t rows = work.shape.rows();
  const auto plan_of = [&](int64_t team, int64_t warps) {
    return plan_shared_row(Schedule::kCluster, work, device, team, warps,
                           std::min(rows, limits::kMaxBlocks / team));
  };
  // Chunks that an SM has, in warps of its blocks, of a row that is spread over `team` of them.
  const int64_t resident =
      work.inputs == 1 ? limits::kResidentWarps : limits::kResidentWarpsBackward;
  const auto had_by_sm = [&](int64_t team) {
    const int64_t warps = ceil_div(sizes.chunks, team);
    return warps > resident ? 0 : resident / warps * warps * sizes.chunks / (team * warps);
  };
  const int64_t most = std::min<int64_t>(limits::kClusterBlocks, sizes.chunks);
  int64_t team = std::clamp<int64_t>(ceil_div(sizes.chunks, limits::kClusterWarps), 2, most);
  if (rows * most <= device.sm_count) {
    team = most;
  } else if (sizes.chunks > most * limits::kClusterWarps) {
    for (int64_t fewer = most - 1; fewer > most / 2; --fewer) {
      if (had_by_sm(fewer) > had_by_sm(team)) team = fewer;
    }
  }
  // Forward, two blocks of many warps do not fit an SM: a few warps then have several chunks each.
  const int64_t warps = ceil_div(sizes.chunks, team);
  const int64_t most_warps = work.inputs == 1 && rows * most > device.sm_count
                                 ? limits::kResidentWarps / 2
                                 : work.most_warps;
  if (warps <= most_warps) return plan_of(team, warps);
  for (const int64_t each : {work.inputs == 1 ? 4 : 2, 4}) {
    const int64_t few = ceil_div(sizes.chunks, most * each);
    if (few <= limits::kLongWarps && plan_of(most, few).hold == Hold::kShared) {
      return plan_of(most, few);
    }
  }
  return plan_of(most, work.most_warps);
}

constexpr Plan plan_grid(const Workload& work, const DeviceProperties& device) {
  const Sizes sizes(work);
  if (work.shape.inner > 1) return start(Schedule::kGrid, sizes);
  // One block an SM, since all are to run at the same time. Each of many rows has as many as hold it.
  const int64_t of_warps = limits::kLongWarps * sizes.chunk_bytes * work.inputs;
  const int64_t kept =
      (device.max_shared_memory_per_block - limits::kReservedShared - sizes.grid_terms()) /
      of_warps;
  const int64_t enough = ceil_div(sizes.chunks, (1 + kept) * limits::kLongWarps);
  const int64_t rows = work.shape.rows();
  const int64_t teams =
      std::clamp<int64_t>(device.sm_count / std::min<int64_t>(enough, device.sm_count), 1, rows);
  const int64_t team = std::min<int64_t>(device.sm_count / teams, sizes.chunks);
  const int64_t warps = std::min<int64_t>(ceil_div(sizes.chunks, team), work.most_warps);
  return plan_shared_row(Schedule::kGrid, work, device, team, warps, teams);
}

// Columns by `team` blocks, each with `across` threads side by side.
constexpr Plan plan_column_tile(const Workload& work, const DeviceProperties& device, int columns,
                                int64_t across, int64_t team) {
  const Sizes sizes(work);
  const Shape& shape = work.shape;
  Plan plan = start(Schedule::kColumns, sizes);
  const int64_t parts = column_parts(shape.dim) / team;  // of a block
  const int64_t group = std::min(parts, limits::kMostColumnThreads / across);
  across = std::max(across, limits::kWarp / group);  // a warp, though some have no column
  plan.vectorized = columns > 1;
  plan.vectors = column_steps(shape.dim);
  plan.columns = columns;
  plan.group = static_cast<int>(group);
  plan.across = static_cast<int>(across);
  plan.team = static_cast<int>(team);
  const int64_t tile = across * columns;
  const ColumnMemory memory = column_memory(shape.dim, plan.team, tile, sizes.load, work.inputs);
  const bool fits = memory.end <= device.max_shared_memory_per_block - limits::kReservedShared;
  plan.hold = fits ? Hold::kShared : Hold::kNone;
  plan.shared_bytes = static_cast<size_t>(fits ? memory.end : memory.elements);
  plan.blocks =
      std::min(shape.outer * ceil_div(shape.inner, tile), limits::kMaxBlocks / team) * team;
  return plan;
}

constexpr Plan plan_columns(const Workload& work, const DeviceProperties& device) {
  const Sizes sizes(work);
  const Shape& shape = work.shape;
  if (shape.inner == 1) return start(Schedule::kColumns, sizes);
  const auto divides = [&](int columns) {
    return columns <= work.aligned && shape.inner % columns == 0;
  };
  const int half = sizes.width / 2;
  const int columns = divides(sizes.width)               ? sizes.width
                      : sizes.load == 2 && divides(half) ? half
                                                         : 1;
  const int64_t access = columns * sizes.load;
  const int64_t needed = power_of_two_from(ceil_div(shape.inner, columns));
  const int most_team = std::clamp(column_parts(shape.dim) / 2, 1, device.cluster_blocks());
  const auto with = [&](int64_t across, int64_t team) {
    return plan_column_tile(work, device, columns, across, team);
  };
  const auto across_of = [&](int64_t bytes) {
    return std::min(needed, std::max<int64_t>(1, bytes / access));
  };
  // So many blocks an SM, which has 1 KB more than one of them can have, and takes 1 KB for each.
  const auto fits = [&](const Plan& plan, int64_t blocks) {
    const auto bytes = static_cast<int64_t>(plan.shared_bytes) + limits::kReservedShared;
    return blocks * bytes <= device.max_shared_memory_per_block;
  };
  const auto fills = [&](const Plan& plan) {
    return plan.blocks >= int64_t{limits::kColumnBlocks} * device.sm_count;
  };
  // The first that fills the device; if none does, the one of most blocks.
  Plan plan{};
  for (const limits::ColumnTile& tile : limits::kColumnTiles) {
    if (tile.least_access > access) continue;
    const int most = std::min(most_team, tile.most_team);
    for (int team = 1; team <= most && !fills(plan); team *= 2) {
      const Plan next = with(across_of(tile.bytes), team);
      if (team > 1 && next.threads() < limits::kFewColumnThreads) break;
      const bool one_each = next.group * team == column_parts(shape.dim);  // part a thread
      if (!one_each && 2 * team <= most) continue;
      const bool holds = next.hold == Hold::kShared && fits(next, tile.blocks);
      if (holds && next.blocks > plan.blocks) plan = next;
    }
  }
  if (plan.blocks == 0) {  // read again, by tiles as wide as the states of their parts allow
    int64_t across = across_of(limits::kColumnTiles[0].bytes);
    do {
      plan = with(across, most_team);
      across /= 2;
    } while (!fits(plan, 1));
  }
  while (plan.threads() < limits::kFewColumnThreads && 2 * plan.across <= needed) {
    const Plan wider = with(2 * plan.across, plan.team);
    const bool holds = wider.hold == Hold::kShared && fits(wider, limits::kColumnBlocks);
    if (!holds || !fills(wider) || wider.group < plan.group) break;
    plan = wider;
  }
  return plan;
}

// Rows that a warp's accesses would be too narrow for, one by one.
constexpr bool is_narrow(const Workload& work) {
  const Sizes sizes(work);
  return work.shape.inner > 1 ? work.shape.inner * sizes.load < limits::kSectorBytes
                              : !sizes.whole && sizes.vectors <= limits::kWarp;
}

// Whether slabs have about as much as they can, wherever the tensors lie.
constexpr bool has_slabs(const Workload& work) {
  const int64_t bytes = work.run * work.shape.dim * work.shape.inner * size_of(work.load_type);
  return work.run == work.shape.outer || 2 * bytes >= limits::kSlabBytes;
}

}  // namespace detail

// The plan of that schedule for the workload; blocks is 0 where it cannot take it, or where there is
// nothing to do.
constexpr Plan make_plan(const Workload& work, const DeviceProperties& device, Schedule schedule) {
  if (work.shape.numel() == 0) return Plan{};
  switch (schedule) {
    case Schedule::kPacked:
      return detail::plan_packed(work, device);
    case Schedule::kWarp:
      return detail::plan_warp(work, device);
    case Schedule::kBlock:
      return detail::plan_block(work, device);
    case Schedule::kCluster:
      return detail::plan_cluster(work, device);
    case Schedule::kGrid:
      return detail::plan_grid(work, device);
    case Schedule::kColumns:
      return detail::plan_columns(work, device);
  }
  return Plan{};
}

// The schedule that is expected to be the fastest of those that can take the workload.
constexpr Schedule choose(const Workload& work, const DeviceProperties& device) {
  const detail::Sizes sizes(work);
  const Shape& shape = work.shape;
  if (shape.inner > 1) {
    // Less than a sector side by side, or no more than a small slab in all.
    const bool small = shape.dim * shape.inner * sizes.load <= limits::kSlabBytes;
    const bool fits = detail::has_slabs(work) && detail::plan_packed(work, device).blocks > 0;
    return fits && (detail::is_narrow(work) || small) ? Schedule::kPacked : Schedule::kColumns;
  }
  if (detail::is_narrow(work) && detail::has_slabs(work)) return Schedule::kPacked;
  if (sizes.chunks == 1) return Schedule::kWarp;
  const int64_t rows = shape.rows();
  const bool clusters = device.has_clusters();
  if (clusters && sizes.chunks <= limits::kRowWarps &&
      (rows >= device.sm_count || sizes.chunks < limits::kFewChunks)) {
    return Schedule::kBlock;
  }
  // A cluster that holds its row, or a block where there are no clusters; the whole device for a few
  // long rows, and for rows that would be read twice otherwise.
  const Schedule shared = clusters ? Schedule::kCluster : Schedule::kBlock;
  const Plan plan = make_plan(work, device, shared);
  const bool few =
      sizes.chunks > limits::kRowWarps && 2 * rows * std::max(1, plan.team) <= device.sm_count;
  if (plan.blocks > 0 && plan.hold == Hold::kRegisters && (clusters || !few)) return shared;
  const Plan grid = make_plan(work, device, Schedule::kGrid);
  const bool once = plan.blocks > 0 && plan.hold != Hold::kNone;
  return few || plan.blocks == 0 || (!once && grid.hold != Hold::kNone) ? Schedule::kGrid : shared;
}

constexpr Plan make_plan(const Workload& work, const DeviceProperties& device) {
  if (work.shape.numel() == 0) return Plan{};
  return make_plan(work, device, choose(work, device));
}

// What is left of a workload where one of its tensors lies so.
inline Workload with_tensor(Workload work, const void* data, DType dtype, const Dims& dims,
                            const Strides& strides) {
  const Shape& shape = work.shape;
  const int64_t size = size_of(dtype);
  // The lowest bit of all is what they are a multiple of.
  auto places = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(data)) | limits::kVectorBytes;
  const auto at_multiples_of = [&](int64_t stride) {
    places |= static_cast<uint64_t>(stride * size);
  };
  for (int k = 0; k < dims.outer; ++k) {
    if (dims.sizes[k] > 1) at_multiples_of(strides.of[k]);
  }
  if (shape.inner > 1 && shape.dim > 1) at_multiples_of(strides.dim);
  const auto bytes = static_cast<int64_t>(places & (~places + 1));
  if (bytes < limits::kVectorBytes) {
    const auto neighbours = std::max<int64_t>(1, bytes / size);
    work.aligned = static_cast<int>(std::min<int64_t>(work.aligned, neighbours));
  }

  const int last = dims.outer - 1;
  const int64_t one = shape.dim * shape.inner;
  const bool is_dense = shape.dim == 1 || strides.dim == shape.inner;
  const bool goes_on = dims.sizes[last] == 1 || strides.of[last] == one;
  work.run = std::min(work.run, !is_dense ? 0 : goes_on ? dims.sizes[last] : 1);
  return work;
}

inline Workload workload(const ForwardArgs& args) {
  Workload work = workload(args.shape, args.input_dtype, args.output_dtype, 1);
  work = with_tensor(work, args.input, args.input_dtype, args.dims, args.input_strides);
  return with_tensor(work, args.output, args.output_dtype, args.dims, args.output_strides);
}

inline Workload workload(const BackwardArgs& args) {
  Workload work = workload(args.shape, args.output_dtype, args.grad_input_dtype, 2);
  work =
      with_tensor(work, args.grad_output, args.output_dtype, args.dims, args.grad_output_strides);
  work = with_tensor(work, args.output, args.output_dtype, args.dims, args.output_strides);
  return with_tensor(work, args.grad_input, args.grad_input_dtype, args.dims,
                     args.grad_input_strides);
}

namespace cuda {

// Whether a tensor is read, or written, where it lies; others are copied first, or afterwards. What has
// no form here: columns that are not side by side, a row's elements that do not follow each other, more
// outer dims than kOuterDims. And rows, or columns, so narrow that they go through slabs and a copy is
// cheaper than they are one by one: where too few of them follow each other.
inline bool is_direct(const Shape& shape, const Dims& dims, const Strides& strides,
                      const void* data, DType dtype) {
  if (dims.outer > limits::kOuterDims || dims.inner > 1) return false;
  if (dims.outer > 1 && shape.outer > limits::kMaxOuter) return false;
  if (shape.inner > 1 ? strides.of[dims.outer] != 1 : shape.dim > 1 && strides.dim != 1)
    return false;
  const Workload work = with_tensor(workload(shape, dtype, dtype, 1), data, dtype, dims, strides);
  return !detail::is_narrow(work) || detail::has_slabs(work);
}

}  // namespace cuda

}  // namespace softmax_ext
