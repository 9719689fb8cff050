// Fibers: stacks that are switched to, of which the sanitizers know.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

// SIMT_UCONTEXT asks for the portable switch, which makes a system call.
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

// The executor's own accesses are not the program's.
struct Quiet {
#if defined(__SANITIZE_THREAD__)
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
};

// What happened before release(token) in one thread happened before what follows acquire(token) in
// another. For ThreadSanitizer, which sees no other order than that. One meeting has one token: the
// next one's, released while a slow thread has not yet acquired the first, would order too much.
struct Token {
  char address;
};
void release(Token& token);
void acquire(Token& token);

// A stack and where it was left. The scheduler has one too, for the stack of the process.
struct Context {
#if defined(SIMT_UCONTEXT)
  ucontext_t registers;
#else
  void* top = nullptr;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;  // ThreadSanitizer's fiber, or AddressSanitizer's fake stack
};

// Returns when somebody switches back.
void switch_to(Context& from, Context& to);
// A stack on which main() begins, which never returns. ThreadSanitizer knows it by its number.
void make_fiber(Context& context, void (*main)(), size_t number);
// What the first call on a new fiber has to be, given the context that switched to it.
void enter_fiber(Context& from);

}  // namespace simt
