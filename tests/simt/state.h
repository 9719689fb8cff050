// What the executor knows of the launch that runs: for the scheduler and the reports.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "executor.h"
#include "fiber.h"

namespace simt {

constexpr int kWarp = 32;

enum class State : uint8_t { kReady, kYielded, kAtWarp, kAtBlock, kAtCluster, kAtGrid, kExited };

struct Block;

struct Thread {
  Context context;
  State state = State::kExited;
  uint3 index{};
  int warp = 0;
  int lane = 0;
  Block* block = nullptr;
  Site site{};                      // where it waits
  unsigned mask = 0;                // whom it waits for, in a warp
  uint64_t value = 0;               // what it gives, then what it gets
  int source = 0;                   // whose value it gets; negative: the votes
  bool arrived_at_cluster = false;  // and has not waited
  uint64_t cluster_arrival = 0;     // the barrier's generation then
};

struct Warp {
  unsigned alive = 0;
  unsigned arrived = 0;
  const Thread* last = nullptr;  // that arrived
  // Of the lanes that meet, by the first of them: how often they have, and the orders of even and
  // odd times. Lanes of other masks meet in between.
  uint64_t meetings[kWarp]{};
  Token orders[kWarp][2];
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
  Site site{};
  Token orders[2];

  Token& order(uint64_t of_generation) { return orders[of_generation % 2]; }
};

struct SharedArray {
  const void* key;
  size_t bytes;
  std::unique_ptr<char[]> memory;
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  uint3 index{};
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  int alive = 0;
  Barrier barrier;
  Token fenced;
  SharedArray dynamic;
  std::vector<SharedArray> arrays;
};

// A slot that clusters run in, one after another.
struct Cluster {
  std::vector<Block> blocks;
  int alive = 0;
  Barrier barrier;
  // One cluster of this slot after another: they have the same fibers and memory.
  Token turns[2];
  uint64_t turn = 0;
};

struct Executor {
  Context main;
  const Launch* launch = nullptr;
  std::string kernel;  // its name
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  Thread* running = nullptr;
  Thread* current = nullptr;  // the same, or the one that a report is about
  bool in_kernel = false;
  bool moved = false;           // since the scheduler's last look
  Context* reporter = nullptr;  // who wants to know the calls that led a waiting thread there
  std::vector<std::string> reported;
  std::mt19937_64 random;
  Token started;
  Token finished;
  Token fenced;
  std::vector<std::unique_ptr<Thread>> fibers;
  std::vector<std::unique_ptr<Cluster>> slots;
  std::map<const void*, size_t> dynamic_shared_allowed;
  std::set<const void*> large_clusters_allowed;
  uint64_t clusters = 0;  // of the launch
  uint64_t begun = 0;     // of those
  Barrier barrier;        // of all its threads
};

extern Executor executor;

// --- Reports (report.cpp) ------------------------------------------------------------------------

std::string kernel_name(const void* kernel);
// `what at file:line`.
std::string where(const Site& site);
// `file:line: function` of each call from where the stack begins to the caller, the last first;
// only of the program's own.
std::vector<std::string> source_lines();

}  // namespace simt
