#include "executor.h"

#include <algorithm>
#include <cstring>

#include "state.h"

namespace simt {

Executor executor;

namespace {

// Passes over all threads in which they only look whether something has happened.
constexpr int kIdlePasses = 10000;
// CUDA programming guide, technical specifications per compute capability.
constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr unsigned kMaxBlockThreads = 1024;
constexpr unsigned kPortableClusterBlocks = 8;
constexpr unsigned kMaxClusterBlocks = 16;
// ThreadSanitizer has room for 8128 threads.
constexpr size_t kMaxFibers = 8000;

bool same(const Site& a, const Site& b) {
  // Most often they are the same literals.
  const auto equal = [](const char* x, const char* y) { return x == y || strcmp(x, y) == 0; };
  return a.line == b.line && equal(a.file, b.file) && equal(a.what, b.what);
}

// --- Meeting points ------------------------------------------------------------------------------

// Returns when the scheduler resumes the thread.
void leave_to_scheduler(Thread& thread) {
  switch_to(thread.context, executor.main);
  while (executor.reporter != nullptr) {
    executor.reported = source_lines();
    switch_to(thread.context, *executor.reporter);
  }
}

void suspend(Thread& thread, State state, const Site& site) {
  thread.state = state;
  thread.site = site;
  leave_to_scheduler(thread);
}

void wake(Thread& thread) {
  thread.state = State::kReady;
  executor.moved = true;
}

void complete(Block& block) {
  if (block.barrier.arrived == 0 || block.barrier.arrived < block.alive) return;
  block.barrier.arrived = 0;
  ++block.barrier.generation;
  for (Thread* thread : block.threads) {
    if (thread->state == State::kAtBlock) wake(*thread);
  }
}

void complete(Cluster& cluster) {
  if (cluster.barrier.arrived == 0 || cluster.barrier.arrived < cluster.alive) return;
  cluster.barrier.arrived = 0;
  ++cluster.barrier.generation;
  for (Block& block : cluster.blocks) {
    for (Thread* thread : block.threads) {
      if (thread->state == State::kAtCluster) wake(*thread);
    }
  }
}

// All blocks of a cooperative launch run at a time.
void complete_grid() {
  Barrier& barrier = executor.barrier;
  int alive = 0;
  for (const auto& cluster : executor.slots) alive += cluster->alive;
  if (barrier.arrived == 0 || barrier.arrived < alive) return;
  barrier.arrived = 0;
  ++barrier.generation;
  for (const auto& cluster : executor.slots) {
    for (Block& block : cluster->blocks) {
      for (Thread* thread : block.threads) {
        if (thread->state == State::kAtGrid) wake(*thread);
      }
    }
  }
}

void arrive(Barrier& barrier, const Site& site) {
  if (barrier.arrived > 0 && !same(barrier.site, site)) {
    fail("divergence: a thread came to %s while others wait in %s", where(site).c_str(),
         where(barrier.site).c_str());
  }
  barrier.site = site;
  ++barrier.arrived;
}

// Lets the lanes go that meet under this mask, if all of them are there.
void complete(Block& block, int warp_index, unsigned mask) {
  Warp& warp = block.warps[static_cast<size_t>(warp_index)];
  const unsigned wanted = mask & warp.alive;
  if (wanted == 0 || (warp.arrived & wanted) != wanted) return;
  Thread* const* threads = &block.threads[static_cast<size_t>(warp_index) * kWarp];
  unsigned votes = 0;
  uint64_t values[kWarp];
  for (int i = 0; i < kWarp; ++i) {
    if ((wanted >> i & 1) == 0) continue;
    if (threads[i]->mask != mask) return;
    values[i] = threads[i]->value;
    votes |= static_cast<unsigned>(values[i] & 1) << i;
  }
  for (int i = 0; i < kWarp; ++i) {
    if ((wanted >> i & 1) == 0) continue;
    Thread& thread = *threads[i];
    if (thread.source >= 0 && (wanted >> thread.source & 1) == 0) {
      executor.current = &thread;
      fail("%s: lane %d reads lane %d, which mask 0x%08x does not have or which has exited",
           where(thread.site).c_str(), i, thread.source, mask);
    }
    thread.value = thread.source >= 0 ? values[thread.source] : votes;
    wake(thread);
  }
  warp.arrived &= ~wanted;
  ++warp.meetings[__builtin_ctz(mask)];
}

uint64_t meet(unsigned mask, uint64_t value, int source, const Site& site) {
  Thread& thread = *executor.current;
  Block& block = *thread.block;
  Warp& warp = block.warps[static_cast<size_t>(thread.warp)];
  if ((mask >> thread.lane & 1) == 0) {
    fail("divergence: lane %d is not in mask 0x%08x of its own %s", thread.lane, mask,
         where(site).c_str());
  }
  const auto meets = [&](const Thread& other) {
    return other.mask == mask && same(other.site, site);
  };
  // The last that arrived has been compared with those before it.
  const bool compared =
      warp.last != nullptr && (warp.arrived >> warp.last->lane & 1) != 0 && meets(*warp.last);
  for (int i = 0; i < kWarp && !compared; ++i) {
    if ((mask & warp.arrived) >> i & 1) {
      const Thread& other = *block.threads[static_cast<size_t>(thread.warp * kWarp + i)];
      if (meets(other)) continue;
      fail("divergence: lane %d came to %s, mask 0x%08x, while lane %d waits in %s, mask 0x%08x",
           thread.lane, where(site).c_str(), mask, i, where(other.site).c_str(), other.mask);
    }
  }
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  thread.site = site;
  thread.state = State::kAtWarp;
  warp.arrived |= 1u << thread.lane;
  warp.last = &thread;
  complete(block, thread.warp, mask);
  if (thread.state == State::kAtWarp) leave_to_scheduler(thread);
  return thread.value;
}

// --- Scheduling ----------------------------------------------------------------------------------

char* poisoned(SharedArray& array) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(array.memory.get(), array.bytes);
#endif
  memset(array.memory.get(), 0xff, array.bytes);
  return array.memory.get();
}

// Nobody may look at the memory of a block that is gone.
void bury(SharedArray& array) {
  memset(array.memory.get(), 0xff, array.bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(array.memory.get(), array.bytes);
#endif
}

SharedArray shared_array(const void* key, size_t bytes) {
  SharedArray array{key, bytes, std::unique_ptr<char[]>(new char[bytes])};
  poisoned(array);
  return array;
}

void leave(Thread& thread) {
  Block& block = *thread.block;
  Cluster& cluster = *block.cluster;
  thread.state = State::kExited;
  executor.moved = true;
  --block.alive;
  --cluster.alive;
  // It no longer counts as there either.
  if (thread.arrived_at_cluster && thread.cluster_arrival == cluster.barrier.generation) {
    --cluster.barrier.arrived;
  }
  Warp& warp = block.warps[static_cast<size_t>(thread.warp)];
  warp.alive &= ~(1u << thread.lane);
  for (unsigned waiting = warp.arrived; waiting != 0; waiting &= waiting - 1) {
    const auto other = static_cast<size_t>(thread.warp * kWarp + __builtin_ctz(waiting));
    if (block.threads[other]->state == State::kAtWarp) {
      complete(block, thread.warp, block.threads[other]->mask);
    }
  }
  complete(block);
  complete(cluster);
  complete_grid();
  if (block.alive == 0 && cluster.alive > 0) {
    bury(block.dynamic);
    for (SharedArray& array : block.arrays) bury(array);
  }
}

// One lap for each block that the fiber's thread is in; the fiber itself lives on, since
// ThreadSanitizer would take a new one for another thread.
void fiber_main() {
  enter_fiber(executor.main);
  for (;;) {
    Thread& thread = *executor.current;
    acquire(executor.started);
    Cluster& cluster = *thread.block->cluster;
    acquire(cluster.turns[(cluster.turn + 1) % 2]);
    executor.body(executor.arguments);
    release(cluster.turns[cluster.turn % 2]);
    release(executor.finished);
    const Quiet quiet;
    leave(thread);
    switch_to(thread.context, executor.main);
  }
}

uint3 unravel(uint64_t index, const dim3& size) {
  return {static_cast<unsigned>(index % size.x), static_cast<unsigned>(index / size.x % size.y),
          static_cast<unsigned>(index / size.x / size.y)};
}

void start(Block& block, const Launch& launch, uint3 index) {
  block.index = index;
  block.alive = static_cast<int>(block.threads.size());
  block.barrier.arrived = 0;
  poisoned(block.dynamic);
  for (SharedArray& array : block.arrays) poisoned(array);
  for (Warp& warp : block.warps) warp.alive = warp.arrived = 0;
  for (size_t i = 0; i < block.threads.size(); ++i) {
    Thread& thread = *block.threads[i];
    thread.state = State::kReady;
    thread.arrived_at_cluster = false;
    thread.index = unravel(i, launch.block);
    block.warps[static_cast<size_t>(thread.warp)].alive |= 1u << thread.lane;
  }
}

void start(Cluster& cluster, const Launch& launch, uint64_t number) {
  const dim3& shape = launch.cluster;
  const uint3 first = unravel(
      number, dim3(launch.grid.x / shape.x, launch.grid.y / shape.y, launch.grid.z / shape.z));
  cluster.alive = 0;
  ++cluster.turn;
  cluster.barrier.arrived = 0;
  for (Block& block : cluster.blocks) {
    const uint3 within = unravel(block.rank, shape);
    start(
        block, launch,
        {first.x * shape.x + within.x, first.y * shape.y + within.y, first.z * shape.z + within.z});
    cluster.alive += block.alive;
  }
}

void resume(Thread& thread) {
  executor.running = executor.current = &thread;
  thread.state = State::kReady;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  executor.in_kernel = true;
  switch_to(executor.main, thread.context);
  executor.in_kernel = false;
}

// Runs each thread that can, once, or in greedy order each warp until it cannot. False where there
// is none.
bool pass(std::vector<Thread*>& threads, std::vector<size_t>& warps) {
  const auto can_run = [](const Thread* t) {
    return t->state == State::kReady || t->state == State::kYielded;
  };
  bool ran = false;
  if (settings.order != Order::kGreedy) {
    if (settings.order == Order::kRandom) {
      std::shuffle(threads.begin(), threads.end(), executor.random);
    }
    for (Thread* thread : threads) {
      if (!can_run(thread)) continue;
      ran = true;
      resume(*thread);
    }
    return ran;
  }
  std::shuffle(warps.begin(), warps.end(), executor.random);
  for (const size_t begin : warps) {
    size_t end = begin;
    while (end < threads.size() && threads[end]->block == threads[begin]->block &&
           threads[end]->warp == threads[begin]->warp) {
      ++end;
    }
    // A thread that spins gets one turn: it waits for another warp.
    for (size_t i = begin; i < end; ++i) {
      if (threads[i]->state == State::kYielded) threads[i]->state = State::kReady;
    }
    for (bool again = true; again;) {
      again = false;
      for (size_t i = begin; i < end; ++i) {
        if (threads[i]->state != State::kReady) continue;
        ran = again = true;
        resume(*threads[i]);
      }
    }
  }
  return ran;
}

void check(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block, &cluster = launch.cluster;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (threads == 0 || threads > kMaxBlockThreads || block.z > 64) {
    fail("a launch out of range: a block of (%u, %u, %u) threads; the most are 1024, and 64 in z",
         block.x, block.y, block.z);
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    fail("a launch out of range: a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
  }
  const auto allowed = executor.dynamic_shared_allowed.find(launch.kernel);
  const size_t most = allowed == executor.dynamic_shared_allowed.end()
                          ? kDefaultSharedBytes
                          : std::max(kDefaultSharedBytes, allowed->second);
  if (launch.shared_bytes > most) {
    fail("a launch out of range: %zu bytes of dynamic shared memory; the kernel was given %zu",
         launch.shared_bytes, most);
  }
  if (blocks == 0 || blocks > kMaxClusterBlocks || grid.x % cluster.x != 0 ||
      grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    fail("a launch out of range: clusters of (%u, %u, %u) blocks in a grid of (%u, %u, %u)",
         cluster.x, cluster.y, cluster.z, grid.x, grid.y, grid.z);
  }
  if (blocks > kPortableClusterBlocks &&
      executor.large_clusters_allowed.count(launch.kernel) == 0) {
    fail(
        "a launch out of range: clusters of %llu blocks; without "
        "cudaFuncAttributeNonPortableClusterSizeAllowed the most are %u",
        static_cast<unsigned long long>(blocks), kPortableClusterBlocks);
  }
  if (blocks > 1 && settings.compute_capability < 90) {
    fail("a launch out of range: clusters need compute capability 9.0, the device has %d.%d",
         settings.compute_capability / 10, settings.compute_capability % 10);
  }
}

// Room for `resident` clusters of the launch's shape, on fibers that are kept from launch to launch.
void make_slots(const Launch& launch, size_t resident) {
  const size_t threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  const size_t blocks = size_t{launch.cluster.x} * launch.cluster.y * launch.cluster.z;
  if (resident * blocks * threads > kMaxFibers) {
    fail("%zu threads would run at a time; the executor has room for %zu",
         resident * blocks * threads, kMaxFibers);
  }
  Executor& e = executor;
  size_t next = 0;
  for (size_t s = 0; s < resident; ++s) {
    if (e.slots.size() == s) e.slots.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *e.slots[s];
    cluster.turn = 0;
    cluster.blocks.clear();
    cluster.blocks.resize(blocks);
    for (size_t rank = 0; rank < blocks; ++rank) {
      Block& block = cluster.blocks[rank];
      block.cluster = &cluster;
      block.rank = static_cast<unsigned>(rank);
      block.warps.resize((threads + kWarp - 1) / kWarp);
      block.dynamic = shared_array(nullptr, launch.shared_bytes);
      for (size_t i = 0; i < threads; ++i) {
        if (e.fibers.size() == next) {
          e.fibers.push_back(std::make_unique<Thread>());
          make_fiber(e.fibers.back()->context, fiber_main, next);
        }
        Thread* thread = e.fibers[next++].get();
        thread->block = &block;
        thread->warp = static_cast<int>(i / kWarp);
        thread->lane = static_cast<int>(i % kWarp);
        block.threads.push_back(thread);
      }
    }
  }
}

}  // namespace

const char* name(Order order) {
  switch (order) {
    case Order::kForward:
      return "forward";
    case Order::kReverse:
      return "reverse";
    case Order::kRandom:
      return "random";
    case Order::kGreedy:
      return "greedy";
  }
  return "unknown";
}

void run(const Launch& launch, void (*body)(const void*), const void* arguments) {
  Executor& e = executor;
  release(e.started);
  {
    const Quiet quiet;
    e.launch = &launch;
    e.kernel = kernel_name(launch.kernel);
    e.body = body;
    e.arguments = arguments;
    e.current = nullptr;
    e.begun = 0;
    e.barrier.arrived = 0;
    check(launch);
    blockDim = launch.block;
    gridDim = launch.grid;
    e.random.seed(settings.seed);
#if defined(__SANITIZE_THREAD__)
    e.main.sanitizer = __tsan_get_current_fiber();
#endif

    const uint64_t clusters = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z /
                              (launch.cluster.x * launch.cluster.y * launch.cluster.z);
    e.clusters = clusters;
    const size_t resident =
        launch.cooperative ? clusters
                           : std::min<uint64_t>(clusters, static_cast<uint64_t>(settings.resident));
    make_slots(launch, resident);

    // Every thread once, in the order in which the forward and the reverse order take them.
    std::vector<Thread*> threads;
    std::vector<size_t> warps;
    for (size_t s = 0; s < resident; ++s) {
      for (Block& block : e.slots[s]->blocks) {
        for (size_t i = 0; i < block.threads.size(); ++i) {
          if (i % kWarp == 0) warps.push_back(threads.size());
          threads.push_back(block.threads[i]);
        }
      }
    }
    if (settings.order == Order::kReverse) std::reverse(threads.begin(), threads.end());

    std::vector<uint64_t> order;  // of the clusters, where it is not that of their numbers
    if (settings.order == Order::kRandom || settings.order == Order::kGreedy) {
      for (uint64_t i = 0; i < clusters; ++i) order.push_back(i);
      std::shuffle(order.begin(), order.end(), e.random);
    }
    uint64_t& begun = e.begun;
    for (int idle = 0;;) {
      for (size_t s = 0; s < resident && begun < clusters; ++s) {
        if (e.slots[s]->alive > 0) continue;
        start(*e.slots[s], launch,
              !order.empty()                      ? order[begun]
              : settings.order == Order::kReverse ? clusters - 1 - begun
                                                  : begun);
        ++begun;
      }
      e.moved = false;
      const bool ran = pass(threads, warps);
      const auto alive = std::find_if(threads.begin(), threads.end(),
                                      [](const Thread* t) { return t->state != State::kExited; });
      if (alive == threads.end() && begun == clusters) break;
      if (e.moved) {
        idle = 0;
        continue;
      }
      if (alive != threads.end()) e.current = *alive;
      if (!ran) fail("deadlock: no thread can run");
      if (++idle == kIdlePasses) fail("deadlock: threads only wait for a value that nobody writes");
    }
    // The next launch has to ask itself: on a GPU it may be the kernel's first.
    e.dynamic_shared_allowed.erase(launch.kernel);
    e.large_clusters_allowed.erase(launch.kernel);
    e.launch = nullptr;
    e.current = nullptr;
  }
  acquire(e.finished);
}

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > settings.max_shared_bytes) {
    fail("a launch out of range: kernel %s asks for %zu bytes of shared memory, the device has %zu",
         kernel_name(kernel).c_str(), bytes, settings.max_shared_bytes);
  }
  executor.dynamic_shared_allowed[kernel] = bytes;
}

void allow_large_clusters(const void* kernel, bool allow) {
  if (allow) {
    executor.large_clusters_allowed.insert(kernel);
  } else {
    executor.large_clusters_allowed.erase(kernel);
  }
}

void sync_block(Site site) {
  Barrier& barrier = executor.current->block->barrier;
  const uint64_t generation = barrier.generation;
  release(barrier.order(generation));
  {
    const Quiet quiet;
    Thread& thread = *executor.current;
    arrive(barrier, site);
    thread.state = State::kAtBlock;
    thread.site = site;
    complete(*thread.block);
    if (barrier.generation == generation) suspend(thread, State::kAtBlock, site);
  }
  acquire(barrier.order(generation));
}

void arrive_cluster(Site site) {
  Cluster& cluster = *executor.current->block->cluster;
  const uint64_t generation = cluster.barrier.generation;
  release(cluster.barrier.order(generation));
  const Quiet quiet;
  Thread& thread = *executor.current;
  if (thread.arrived_at_cluster) {
    fail("%s: the thread has arrived before, and has not waited", where(site).c_str());
  }
  arrive(cluster.barrier, site);
  thread.arrived_at_cluster = true;
  thread.cluster_arrival = generation;
  complete(cluster);
}

void wait_cluster(Site site) {
  Thread& thread = *executor.current;
  Barrier& barrier = thread.block->cluster->barrier;
  {
    const Quiet quiet;
    if (!thread.arrived_at_cluster) {
      fail("%s: the thread has not arrived", where(site).c_str());
    }
    while (barrier.generation == thread.cluster_arrival) suspend(thread, State::kAtCluster, site);
    thread.arrived_at_cluster = false;
  }
  acquire(barrier.order(thread.cluster_arrival));
}

void sync_grid(Site site) {
  if (!executor.launch->cooperative) {
    fail("%s: the launch is not cooperative", where(site).c_str());
  }
  Barrier& barrier = executor.barrier;
  const uint64_t generation = barrier.generation;
  release(barrier.order(generation));
  {
    const Quiet quiet;
    Thread& thread = *executor.current;
    arrive(barrier, site);
    thread.state = State::kAtGrid;
    thread.site = site;
    complete_grid();
    if (barrier.generation == generation) suspend(thread, State::kAtGrid, site);
  }
  acquire(barrier.order(generation));
}

uint64_t shuffle(unsigned mask, uint64_t value, int source, Site site) {
  const Quiet quiet;
  return meet(mask, value, source, site);
}

unsigned ballot(unsigned mask, bool vote, Site site) {
  const Quiet quiet;
  return static_cast<unsigned>(meet(mask, vote, -1, site));
}

void sync_warp(unsigned mask, Site site) {
  const Thread& thread = *executor.current;
  Warp& warp = thread.block->warps[static_cast<size_t>(thread.warp)];
  const int first = mask == 0 ? 0 : __builtin_ctz(mask);
  Token& order = warp.orders[first][warp.meetings[first] % 2];
  release(order);
  {
    const Quiet quiet;
    meet(mask, 0, -1, site);
  }
  acquire(order);
}

void yield(Site site) {
  const Quiet quiet;
  suspend(*executor.current, State::kYielded, site);
}

void progress() {
  const Quiet quiet;
  executor.moved = true;
}

void fence(bool device, Site site) {
  Token& block = executor.current->block->fenced;
  release(block);
  acquire(block);
  if (!device) return;
  release(executor.fenced);
  acquire(executor.fenced);
  yield(site);
}

int lane() { return executor.current->lane; }
unsigned block_rank_in_cluster() { return executor.current->block->rank; }
unsigned blocks_in_cluster() {
  return static_cast<unsigned>(executor.current->block->cluster->blocks.size());
}

void* dynamic_shared() { return executor.current->block->dynamic.memory.get(); }

namespace {
void* static_shared_of(Block& block, const void* key, size_t bytes) {
  size_t used = bytes + executor.launch->shared_bytes;
  for (const SharedArray& array : block.arrays) {
    if (array.key == key) return array.memory.get();
    used += array.bytes;
  }
  if (used > settings.max_shared_bytes) {
    fail("the block's shared memory is %zu bytes, the device has %zu", used,
         settings.max_shared_bytes);
  }
  if (used > kDefaultSharedBytes &&
      executor.dynamic_shared_allowed.count(executor.launch->kernel) == 0) {
    fail(
        "the block's shared memory is %zu bytes, %zu of them dynamic; without cudaFuncSetAttribute "
        "all of it is at most %zu",
        used, executor.launch->shared_bytes, kDefaultSharedBytes);
  }
  block.arrays.push_back(shared_array(key, bytes));
  return block.arrays.back().memory.get();
}
}  // namespace

void* static_shared(const void* key, size_t bytes) {
  const Quiet quiet;
  return static_shared_of(*executor.current->block, key, bytes);
}

void* map_shared(const void* pointer, unsigned rank, Site site) {
  const Quiet quiet;
  Block& own = *executor.current->block;
  Cluster& cluster = *own.cluster;
  if (rank >= cluster.blocks.size()) {
    fail("%s: rank %u of a cluster of %zu blocks", where(site).c_str(), rank,
         cluster.blocks.size());
  }
  Block& other = cluster.blocks[rank];
  if (other.alive == 0) {
    fail("%s: block %u of the cluster has exited, and its shared memory with it",
         where(site).c_str(), rank);
  }
  const auto offset = [&](const SharedArray& array) {
    return static_cast<const char*>(pointer) - array.memory.get();
  };
  const auto holds = [&](const SharedArray& array) {
    return offset(array) >= 0 && offset(array) < static_cast<ptrdiff_t>(array.bytes);
  };
  if (holds(own.dynamic)) return other.dynamic.memory.get() + offset(own.dynamic);
  for (const SharedArray& array : own.arrays) {
    if (!holds(array)) continue;
    return static_cast<char*>(static_shared_of(other, array.key, array.bytes)) + offset(array);
  }
  fail("%s: not an address in the block's shared memory", where(site).c_str());
}

}  // namespace simt
