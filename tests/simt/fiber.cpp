#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <string>

#include "executor.h"

#if !defined(SIMT_UCONTEXT)
// Saves what a function has to preserve (System V ABI) on the stack that is left, and its top in
// *save; takes the same from the stack whose top is `load`.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {
namespace {
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPageBytes = 4096;
}  // namespace

void release([[maybe_unused]] Token& token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&token.address);
#endif
}
void acquire([[maybe_unused]] Token& token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&token.address);
#endif
}

void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMT_UCONTEXT)
  swapcontext(&from.registers, &to.registers);
#else
  simt_switch(&from.top, to.top);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

// Not inlined: getcontext returns twice.
[[gnu::noinline]] void make_fiber(Context& context, void (*main)(),
                                  [[maybe_unused]] size_t number) {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stack of a fiber");
  mprotect(memory, kPageBytes, PROT_NONE);
  context.stack = memory;
  context.stack_bytes = kStackBytes;
#if defined(__SANITIZE_THREAD__)
  context.sanitizer = __tsan_create_fiber(0);
  __tsan_set_fiber_name(context.sanitizer, ("fiber " + std::to_string(number)).c_str());
#endif
#if defined(SIMT_UCONTEXT)
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = memory;
  context.registers.uc_stack.ss_size = kStackBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, main, 0);
#else
  // What simt_switch takes from it: the control words, six registers, the return address; then the
  // return address of main, 0, at which a debugger ends its walk, 8 modulo 16.
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(memory) + kStackBytes) - 1;
  *top = 0;
  *--top = reinterpret_cast<uint64_t>(main);
  for (int i = 0; i < 7; ++i) *--top = 0;
  asm volatile("stmxcsr %0" : "=m"(*reinterpret_cast<uint32_t*>(top)));
  asm volatile("fnstcw %0" : "=m"(*(reinterpret_cast<uint16_t*>(top) + 2)));
  context.top = top;
#endif
}

void enter_fiber([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
}

}  // namespace simt
