// A host executor of CUDA kernels: their own source, compiled by g++ against the headers in cuda/,
// runs on the CPU. Each CUDA thread is a fiber (a stack that is switched to), and all of them share
// one thread of the operating system.
//
//   block      its fibers meet at barriers; its shared memory is filled with NaN before it starts
//   warp       lanes meet in shuffles and votes; those that a mask names and that never come, or
//              that come elsewhere, are reported
//   cluster    its blocks run together and reach each other's shared memory
//   launch     clusters run one after another, or `resident` at a time; all of a cooperative launch
//
// A mistake ends the process with a report: the kernel, the block, the threads and where each of
// them waits, and the source lines that led there. Memory errors and races are found by building
// with the sanitizers, which know of the fibers; their reports are followed by the same one.
//
// Not modelled: speed, rounding of device functions (exp is the host's), weak memory order other
// than a missing fence or barrier, TMA.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs. A debugger prints them, and takes them in a breakpoint's condition.
inline uint3 threadIdx{};
inline uint3 blockIdx{};
inline dim3 blockDim{};
inline dim3 gridDim{};

namespace simt {

// Which thread runs next, of those that can.
enum class Order {
  kForward,  // the lowest block and thread
  kReverse,  // the highest
  kRandom,   // any
  kGreedy,   // those of one warp, chosen at random, for as long as any of them can
};

const char* name(Order order);

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 0;  // of the random choices
  int resident = 1;   // clusters (blocks, where there are none) that run side by side
  // The device that launches are checked against.
  size_t max_shared_bytes = 227 * 1024;  // of a block, with cudaFuncSetAttribute
  int compute_capability = 90;
};

inline Settings settings;

// A place in the source where a thread meets others, or does what can be wrong.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// --- What runs a kernel --------------------------------------------------------------------------

struct Launch {
  const void* kernel;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  dim3 cluster;
  bool cooperative;
  Site site;
};

// Calls body(arguments) on a fiber for each thread of the launch. Returns when all are done.
void run(const Launch& launch, void (*body)(const void*), const void* arguments);

// As cudaFuncSetAttribute: the kernel may then have that much dynamic shared memory.
void allow_dynamic_shared(const void* kernel, size_t bytes);
// Likewise: clusters of more than 8 blocks, which not every device of 9.0 and above has.
void allow_large_clusters(const void* kernel, bool allow);

// Reports and ends the process.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// --- What a kernel's thread calls ----------------------------------------------------------------

void sync_block(Site site);
void arrive_cluster(Site site);
void wait_cluster(Site site);
void sync_grid(Site site);

// Deposits a value and meets the lanes of the mask; then the value of lane `source`.
uint64_t shuffle(unsigned mask, uint64_t value, int source, Site site);
// Meets the lanes of the mask; then one bit for each that votes for it.
unsigned ballot(unsigned mask, bool vote, Site site);
// Meets them, and orders their memory accesses.
void sync_warp(unsigned mask, Site site);

// Lets others run. Every loop that waits for another thread has to call it: atomics do.
void yield(Site site);
// Something happened that a thread may be waiting for.
void progress();
// Orders this thread's accesses and those of others that fence: of its block, or of the device.
// Of the device, others run then: what they do in between is not ordered.
void fence(bool device, Site site);

int lane();
unsigned block_rank_in_cluster();
unsigned blocks_in_cluster();
void* dynamic_shared();
// The block's array of `bytes` bytes that `key` stands for.
void* static_shared(const void* key, size_t bytes);
// The one of the declaration that the lambda's type belongs to.
template <class T, class Lambda>
T* static_shared(size_t count, Lambda) {
  static const char key = 0;
  return static_cast<T*>(static_shared(&key, count * sizeof(T)));
}
// The same place in the shared memory of another block of the cluster.
void* map_shared(const void* pointer, unsigned rank, Site site);

void check_aligned(const void* pointer, size_t bytes,
                   Site site = {"an access", __builtin_FILE(), __builtin_LINE()});

}  // namespace simt
