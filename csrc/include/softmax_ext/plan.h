// Which CUDA kernel schedule runs, and with which launch: a function of the shape, the types, the
// pointers' alignment and the device alone. Host code without CUDA, so that the choice for any
// device can be tested on any machine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "softmax_ext/problem.h"

namespace softmax_ext {

struct DeviceProperties {
  int sm_count;
  int max_shared_memory_per_block;  // bytes a block can have when it asks for them (opt-in)
  int max_threads_per_sm;
  int compute_capability;  // 90 for 9.0
};

enum class Schedule : int {
  kRegisters = 0,  // a group of threads holds a row in registers: one read, one write
  kShared,         // a block holds a row in shared memory: one read, one write
  kStreaming,      // a group of threads goes over its row twice: any dim, any types
  kStrided,        // inner > 1: threads side by side take columns side by side; any types
};

constexpr const char* name(Schedule schedule) {
  switch (schedule) {
    case Schedule::kRegisters:
      return "registers";
    case Schedule::kShared:
      return "shared";
    case Schedule::kStreaming:
      return "streaming";
    case Schedule::kStrided:
      return "strided";
  }
  return "unknown";
}

// A block is group x items threads, in the strided schedule across x group x items.
struct Plan {
  Schedule schedule;
  // 16-byte accesses. Without them the threads of a group take elements side by side, one each.
  bool vectorized;
  int width;    // elements in a vector: the elements that a thread takes at a time
  int vectors;  // vectors that a thread holds at a time
  int group;    // threads that share a row
  int across;   // strided: threads side by side across the inner size; otherwise 1
  int items;    // rows, or groups of across * width columns, that a block has at a time
  int64_t blocks;
  size_t shared_bytes;  // dynamic shared memory

  constexpr int threads() const { return across * group * items; }
  constexpr bool operator==(const Plan& other) const {
    return schedule == other.schedule && vectorized == other.vectorized && width == other.width &&
           vectors == other.vectors && group == other.group && across == other.across &&
           items == other.items && blocks == other.blocks && shared_bytes == other.shared_bytes;
  }
};

// Every limit and threshold that the plan and the kernels use.
namespace limits {
// The widest access of one thread.
constexpr int kVectorBytes = 16;
constexpr int kWarp = 32;
// Threads of one row: 65536 registers of an SM leave each 128, so that none spills.
constexpr int kMaxThreads = 512;
// Two such blocks leave each thread 128: a column of the strided schedule has a state of its own.
constexpr int kStridedThreads = 256;
// Registers for the data of a row: the rest is for addresses, exp and loads in flight.
constexpr int kRegistersWords = 32;
// Of the shared and the streaming schedule, which keep a running state beside the data.
constexpr int kStreamingWords = 16;
// Of the strided one, which keeps a state for each column of the vector.
constexpr int kStridedWords = 16;
// A smaller block takes several rows: an SM has room for 16 blocks or more, which then fill it.
constexpr int kShortRowThreads = 128;
// The hardware's limit on blockDim.z.
constexpr int kMaxStridedItems = 64;
// Four 16-byte loads a thread are enough in flight; beyond, more threads do better than more loads.
constexpr int kMostVectors = 4;
// Left free of the row: the reductions' own shared memory.
constexpr int kReservedShared = 1024;
// Fewer bytes side by side than a sector of device memory are paid for as a whole one.
constexpr int kSectorBytes = 32;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
}  // namespace limits

// 32-bit registers that a value takes where it is computed with: a float one, a double two and two
// more for what its exp holds meanwhile.
constexpr int words_of(DType computed) { return computed == DType::kFloat64 ? 4 : 1; }

// The most vectors of `width` elements of `inputs` tensors that fit `words` 32-bit registers.
constexpr int vectors_within(int words, int width, int element_words, int inputs) {
  return std::max(1, words / (width * element_words * inputs));
}

// Of the schedules that go over their data in steps.
constexpr int vectors_at_a_time(int words, int width, int element_words, int inputs) {
  return std::min(limits::kMostVectors, vectors_within(words, width, element_words, inputs));
}

// What the plan depends on.
struct Workload {
  Shape shape;
  DType computed_as;  // the output's type, which decides the type that is computed in
  DType load_type;    // of what is read
  DType store_type;   // of what is written
  int inputs;         // tensors that are read: 1 forward, 2 backward
  bool aligned;       // every pointer is a multiple of 16 bytes
};

constexpr bool is_half(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

// Pairs of types that have kernels of their own: no cast, or the cast between a 16-bit type and
// float32 that mixed precision makes. The others are cast element by element.
constexpr bool is_native(const Workload& work) {
  const DType narrow = work.inputs == 1 ? work.load_type : work.store_type;
  const DType wide = work.inputs == 1 ? work.store_type : work.load_type;
  return is_floating(narrow) && (narrow == wide || (is_half(narrow) && wide == DType::kFloat32));
}

// Elements that a thread takes at a time: those of a vector, or one where each has to be cast from
// a type that only the call knows.
constexpr int width_of(const Workload& work) {
  const bool known = work.inputs == 2 || is_native(work);
  return known ? limits::kVectorBytes / static_cast<int>(size_of(work.load_type)) : 1;
}

namespace detail {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t power_of_two_from(int64_t a) {
  int64_t power = 1;
  while (power < a) power *= 2;
  return power;
}

// Threads for `count` items of work: within a warp a power of two, beyond it whole warps.
constexpr int group_for(int64_t count) {
  if (count >= limits::kMaxThreads) return limits::kMaxThreads;
  if (count > limits::kWarp) return static_cast<int>(round_up(count, limits::kWarp));
  return static_cast<int>(power_of_two_from(count));
}

// Items in a block, and blocks, for `total` items of plan.across * plan.group threads each.
constexpr void distribute(Plan& plan, int64_t total, int most, const DeviceProperties& device) {
  const int threads = plan.across * plan.group;
  plan.items = std::clamp(limits::kShortRowThreads / threads, 1, most);
  while (plan.items > 1 && plan.items * threads > limits::kWarp &&
         ceil_div(total, plan.items) < device.sm_count) {
    plan.items /= 2;
  }
  plan.blocks = std::min(ceil_div(total, plan.items), limits::kMaxBlocks);
}

// Rows that have more than one warp have a block each: its barriers are theirs.
constexpr void distribute_rows(Plan& plan, int64_t rows, const DeviceProperties& device) {
  distribute(plan, rows, plan.group > limits::kWarp ? 1 : limits::kMaxThreads, device);
}

constexpr Plan plan_rows(const Workload& work, const DeviceProperties& device) {
  const Shape& shape = work.shape;
  const bool native = is_native(work);
  const int64_t size = size_of(work.load_type);
  const int words = words_of(work.computed_as);

  Plan plan{};
  plan.width = width_of(work);
  plan.across = 1;
  plan.vectorized = native && work.aligned && shape.dim % plan.width == 0;
  const int64_t vectors = ceil_div(shape.dim, plan.width);

  // Registers: a warp takes more vectors before a row takes more warps, since a warp reduces
  // without a barrier.
  const int most = vectors_within(limits::kRegistersWords, plan.width, words, work.inputs);
  if (native && vectors <= int64_t{limits::kMaxThreads} * most) {
    plan.schedule = Schedule::kRegisters;
    plan.vectors = 1;
    while (plan.vectors < most && vectors > int64_t{limits::kWarp} * plan.vectors) {
      plan.vectors *= 2;
    }
    plan.group = group_for(ceil_div(vectors, plan.vectors));
    distribute_rows(plan, shape.rows(), device);
    return plan;
  }

  plan.vectors = vectors_at_a_time(limits::kStreamingWords, plan.width, words, work.inputs);
  const int64_t available = device.max_shared_memory_per_block - limits::kReservedShared;
  if (native && shape.dim <= available / size) {
    const int64_t bytes = work.inputs * round_up(shape.dim * size, limits::kVectorBytes);
    if (bytes <= available) {
      plan.schedule = Schedule::kShared;
      plan.shared_bytes = static_cast<size_t>(bytes);
      // Where two rows fit an SM, two blocks: one loads while the other stores.
      plan.group = 2 * bytes <= available ? limits::kMaxThreads / 2 : limits::kMaxThreads;
      distribute_rows(plan, shape.rows(), device);
      return plan;
    }
  }

  plan.schedule = Schedule::kStreaming;
  plan.group = group_for(ceil_div(vectors, plan.vectors));
  distribute_rows(plan, shape.rows(), device);
  return plan;
}

constexpr Plan plan_strided(const Workload& work, const DeviceProperties& device) {
  const Shape& shape = work.shape;
  const int words = words_of(work.computed_as);

  Plan plan{};
  plan.schedule = Schedule::kStrided;
  plan.width = width_of(work);
  plan.vectorized = is_native(work) && work.aligned && shape.inner % plan.width == 0;
  plan.vectors = vectors_at_a_time(limits::kStridedWords, plan.width, words, work.inputs);

  // Across the inner size: the power of two that leaves the fewest threads without a column, and
  // fewer threads, down to one sector, while there are too few blocks for the device.
  const int64_t columns = ceil_div(shape.inner, plan.width);
  const int access =
      plan.vectorized ? limits::kVectorBytes : static_cast<int>(size_of(work.load_type));
  int across = group_for(std::min<int64_t>(columns, limits::kWarp));
  const int narrowest = std::min(across, std::max(1, limits::kSectorBytes / access));
  for (int fewer = across / 2; fewer >= narrowest; fewer /= 2) {
    const bool fuller = round_up(columns, fewer) < round_up(columns, across);
    const bool needed = shape.outer * ceil_div(columns, across) < 2 * device.sm_count;
    if (fuller || needed) across = fewer;
  }
  plan.across = across;
  // Across dim: as many as let each thread hold all that it reads, so that it reads it once.
  plan.group = static_cast<int>(std::min<int64_t>(
      power_of_two_from(ceil_div(shape.dim, plan.vectors)), limits::kStridedThreads / across));
  distribute(plan, shape.outer * ceil_div(columns, across), limits::kMaxStridedItems, device);
  const int bytes = work.computed_as == DType::kFloat64 ? 8 : 4;
  plan.shared_bytes = static_cast<size_t>(bytes) * plan.width * plan.threads();
  return plan;
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % limits::kVectorBytes == 0;
}

}  // namespace detail

// The plan for the workload; nothing is to be launched (blocks is 0) where it has no elements.
constexpr Plan make_plan(const Workload& work, const DeviceProperties& device) {
  if (work.shape.outer == 0 || work.shape.dim == 0 || work.shape.inner == 0) return Plan{};
  return work.shape.inner > 1 ? detail::plan_strided(work, device)
                              : detail::plan_rows(work, device);
}

inline Plan plan_forward(const ForwardArgs& args, const DeviceProperties& device) {
  return make_plan({args.shape, args.output_dtype, args.input_dtype, args.output_dtype, 1,
                    detail::is_aligned(args.input) && detail::is_aligned(args.output)},
                   device);
}

inline Plan plan_backward(const BackwardArgs& args, const DeviceProperties& device) {
  return make_plan({args.shape, args.output_dtype, args.output_dtype, args.grad_input_dtype, 2,
                    detail::is_aligned(args.grad_output) && detail::is_aligned(args.output) &&
                        detail::is_aligned(args.grad_input)},
                   device);
}

}  // namespace softmax_ext
