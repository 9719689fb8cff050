// What the executor says when it has found a mistake, or a sanitizer has.
#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace simt {
namespace {

// Below the project's root, which the compiler has put before this file's name.
std::string short_path(const std::string& path) {
  static const std::string root = [] {
    const std::string file = __FILE__;
    const size_t folder = file.rfind("tests/simt/");
    return folder == std::string::npos ? file : file.substr(0, folder);
  }();
  return !root.empty() && path.rfind(root, 0) == 0 ? path.substr(root.size()) : path;
}

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

// Without the parameters: a template's arguments say as much, and are long enough.
std::string short_function(std::string name) {
  if (name.rfind("void ", 0) == 0) name.erase(0, strlen("void "));
  if (!name.empty() && name.back() == ')') {
    size_t open = name.size() - 1;
    for (int depth = 1; depth > 0 && open > 0;) {
      --open;
      depth += name[open] == ')' ? 1 : name[open] == '(' ? -1 : 0;
    }
    name.erase(open);
  }
  return name;
}

// Of the program, not of what runs it.
bool is_interesting(const std::string& path) {
  for (const char* hidden : {"tests/simt/executor.", "tests/simt/fiber.", "tests/simt/report.",
                             "tests/simt/cuda/", "/usr/", "?"}) {
    if (short_path(path).rfind(hidden, 0) == 0) return false;
  }
  return true;
}

}  // namespace

std::string where(const Site& site) {
  return std::string(site.what) + " at " + short_path(site.file) + ":" + std::to_string(site.line);
}

std::string kernel_name(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "(a kernel without a name)";
  int status = 0;
  const std::unique_ptr<char, decltype(&free)> demangled(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), free);
  return short_function(status == 0 ? demangled.get() : info.dli_sname);
}

std::vector<std::string> source_lines() {
  void* frames[64];
  const int count = backtrace(frames, 64);
  std::map<std::string, std::string> addresses;  // of each program
  for (int i = 0; i < count; ++i) {
    Dl_info info{};
    if (dladdr(frames[i], &info) == 0 || info.dli_fname == nullptr) continue;
    if (std::string(info.dli_fname).find(".so") != std::string::npos) continue;
    // The call, not what follows it.
    char address[32];
    snprintf(address, sizeof(address), " %p",
             reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(frames[i]) -
                                     reinterpret_cast<uintptr_t>(info.dli_fbase) - 1));
    addresses[info.dli_fname] += address;
  }
  std::vector<std::string> lines;
  for (const auto& [file, list] : addresses) {
    FILE* output = popen(("addr2line -Cfpi -e '" + file + "'" + list).c_str(), "r");
    char buffer[4096];
    while (output != nullptr && fgets(buffer, sizeof(buffer), output) != nullptr) {
      std::string line = buffer;
      line.erase(line.find_last_not_of('\n') + 1);
      const size_t note = line.find(" (discriminator");
      if (note != std::string::npos) line.erase(note);
      const std::string inlined = " (inlined by) ";
      if (line.rfind(inlined, 0) == 0) line.erase(0, inlined.size());
      const size_t at = line.rfind(" at ");
      if (at == std::string::npos || !is_interesting(line.substr(at + 4))) continue;
      lines.push_back(short_path(line.substr(at + 4)) + ": " + short_function(line.substr(0, at)));
    }
    if (output == nullptr || pclose(output) != 0) lines.emplace_back("(no addr2line)");
  }
  return lines;
}

namespace {

void print_lines(const char* margin, const std::vector<std::string>& lines) {
  for (const std::string& line : lines) fprintf(stderr, "%s%s\n", margin, line.c_str());
}

std::string describe(const Thread& thread) {
  char mask[32];
  switch (thread.state) {
    case State::kReady:
      return &thread == executor.running ? "running" : "ready";
    case State::kYielded:
      return "spinning in " + where(thread.site);
    case State::kAtWarp:
      snprintf(mask, sizeof(mask), ", mask 0x%08x", thread.mask);
      return "waiting in " + where(thread.site) + mask;
    case State::kAtBlock:
    case State::kAtCluster:
    case State::kAtGrid:
      return "waiting in " + where(thread.site);
    case State::kExited:
      return "exited";
  }
  return "";
}

bool waits(const Thread& thread) {
  return thread.state != State::kReady && thread.state != State::kExited;
}

// Has it look at its own stack.
std::vector<std::string> source_lines_of(Thread& thread) {
  Executor& e = executor;
  e.reporter = e.in_kernel ? &e.running->context : &e.main;
  switch_to(*e.reporter, thread.context);
  e.reporter = nullptr;
  return std::move(e.reported);
}

// What the threads of a block do: those that do the same, by their number, in one line; with the
// calls that led the first of them there.
void print_threads(const Block& block) {
  struct Group {
    std::string what;
    Thread* first;
    std::string numbers;
  };
  constexpr size_t kMostNumbers = 60;  // characters
  std::vector<Group> groups;
  for (size_t from = 0, to = 0; from < block.threads.size(); from = to) {
    const std::string what = describe(*block.threads[from]);
    while (to < block.threads.size() && describe(*block.threads[to]) == what) ++to;
    auto group =
        std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.what == what; });
    if (group == groups.end()) {
      groups.push_back({what, block.threads[from], ""});
      group = groups.end() - 1;
    }
    std::string& numbers = group->numbers;
    if (numbers.size() >= kMostNumbers) {
      if (numbers.back() != '.') numbers += ", ...";
      continue;
    }
    if (!numbers.empty()) numbers += ", ";
    numbers += std::to_string(from);
    if (to - from > 1) numbers += " to " + std::to_string(to - 1);
  }
  fprintf(stderr, "  threads of block %s:\n", text(block.index).c_str());
  for (const Group& group : groups) {
    fprintf(stderr, "    %s: %s\n", group.numbers.c_str(), group.what.c_str());
    if (!waits(*group.first) || group.first == executor.running) continue;
    const std::vector<std::string> lines = source_lines_of(*group.first);
    // The place itself has been named.
    if (lines.size() > 1) print_lines("        ", lines);
  }
}

// The kernel, the block, and what its threads do.
void print_state() {
  constexpr int kMostBlocks = 8;
  const Executor& e = executor;
  if (e.launch == nullptr) return;
  const Launch& launch = *e.launch;
  fprintf(stderr, "  kernel %s\n", e.kernel.c_str());
  if (e.in_kernel) {
    const Thread& thread = *e.current;
    fprintf(stderr, "  block %s, thread %s, lane %d of warp %d\n",
            text(thread.block->index).c_str(), text(thread.index).c_str(), thread.lane,
            thread.warp);
  }
  fprintf(stderr,
          "  grid (%u, %u, %u), block (%u, %u, %u), cluster (%u, %u, %u), %zu bytes of dynamic "
          "shared memory\n",
          launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x, launch.block.y,
          launch.block.z, launch.cluster.x, launch.cluster.y, launch.cluster.z,
          launch.shared_bytes);
  if (e.begun == 0) return;
  fprintf(stderr, "  order %s, seed %llu, resident %d; %llu of %llu %s begun\n",
          name(settings.order), static_cast<unsigned long long>(settings.seed), settings.resident,
          static_cast<unsigned long long>(e.begun), static_cast<unsigned long long>(e.clusters),
          launch.cluster.x * launch.cluster.y * launch.cluster.z > 1 ? "clusters" : "blocks");
  if (e.in_kernel) {
    for (const Block& block : e.current->block->cluster->blocks) print_threads(block);
    return;
  }
  int blocks = 0;
  for (const auto& slot : e.slots) {
    for (const Block& block : slot->blocks) {
      if (block.alive > 0 && blocks++ < kMostBlocks) print_threads(block);
    }
  }
  if (blocks > kMostBlocks) fprintf(stderr, "  and %d more blocks\n", blocks - kMostBlocks);
}

// --- Reports of sanitizers -----------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

// Bytes between one piece of memory and the next, at least.
#if defined(__SANITIZE_ADDRESS__)
constexpr uintptr_t kRedZone = 16;
#else
constexpr uintptr_t kRedZone = 0;
#endif

// A sanitizer's own text, of which most is about the executor.
const int sanitizer_text = [] {
  const int file = memfd_create("sanitizer", 0);
  if (file >= 0) __sanitizer_set_report_fd(reinterpret_cast<void*>(static_cast<intptr_t>(file)));
  return file;
}();

std::vector<std::string> read_sanitizer_text() {
  std::vector<std::string> lines;
  std::string text;
  char buffer[4096];
  lseek(sanitizer_text, 0, SEEK_SET);
  for (ssize_t bytes; (bytes = read(sanitizer_text, buffer, sizeof(buffer))) > 0;) {
    text.append(buffer, static_cast<size_t>(bytes));
  }
  size_t begin = 0;
  for (size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    lines.push_back(text.substr(begin, end - begin));
  }
  return lines;
}

// Which byte of whose shared memory an address is, up to `beside` bytes before or behind it too.
std::string shared_memory_at(uintptr_t address, uintptr_t beside) {
  const auto find = [&](const Block& block, const SharedArray& array, const char* kind) {
    const auto begin = reinterpret_cast<uintptr_t>(array.memory.get());
    if (address + beside < begin || address >= begin + array.bytes + beside) return std::string();
    return "byte " + std::to_string(static_cast<ptrdiff_t>(address - begin)) + " of the " +
           std::to_string(array.bytes) + " bytes of " + kind + " shared memory of block " +
           text(block.index) + (block.alive > 0 ? "" : ", which has exited");
  };
  for (const auto& slot : executor.slots) {
    for (const Block& block : slot->blocks) {
      std::string found = find(block, block.dynamic, "dynamic");
      for (const SharedArray& array : block.arrays) {
        if (found.empty()) found = find(block, array, "static");
      }
      if (!found.empty()) return found;
    }
  }
  return "";
}

// The thread of the fiber that ThreadSanitizer calls by this name.
std::string thread_of_fiber(const std::string& name) {
  const size_t number = std::strtoul(name.c_str(), nullptr, 10);
  if (number >= executor.fibers.size()) return "fiber " + name;
  const Thread& thread = *executor.fibers[number];
  // What a fiber did in an earlier block is no longer known.
  const bool first = &thread == executor.running || thread.block->cluster->turn == 1;
  return "thread " + text(thread.index) + " of block " + text(thread.block->index) +
         (first ? "" : " or one before it in its place");
}

bool starts_with(const std::string& line, const char* what) { return line.rfind(what, 0) == 0; }

std::string before(const std::string& line, const char* what) {
  return line.substr(0, line.find(what));
}

// `file:line: function` of a line like "    #0 function file:line (program+0x12)", where there may be
// an address before the function; nothing of a frame that is not the program's.
std::string source_line(const std::string& line) {
  const size_t path = line.rfind(" /");
  if (path == std::string::npos) return "";
  const std::string file = before(line.substr(path + 1), " (");
  if (!is_interesting(file)) return "";
  size_t function = line.find(' ', line.find('#')) + 1;
  if (line.compare(function, 2, "0x") == 0) function = line.find(" in ", function) + 4;
  return short_path(file) + ": " + short_function(line.substr(function, path - function));
}

// What a sanitizer has found and where, in the words above and with the threads of CUDA: without
// frames of the executor, the places where its fibers were made, and the bytes around an address.
// False where there is nothing.
bool print_sanitizer_report() {
  const std::vector<std::string> lines = read_sanitizer_text();
  const auto first = std::find_if(lines.begin(), lines.end(), [](const std::string& line) {
    return line.find("Sanitizer:") != std::string::npos;
  });
  const auto last = std::find_if(first, lines.end(), [](const std::string& line) {
    return line.find("SUMMARY:") != std::string::npos;
  });
  if (first == lines.end()) {
    print_lines("", lines);
    return false;
  }

  std::map<std::string, std::string> fibers;  // by ThreadSanitizer's names of them as threads
  uintptr_t address = 0;
  for (auto line = first; line != last; ++line) {
    const size_t quote = line->find(" 'fiber ");
    if (starts_with(*line, "  Thread T") && quote != std::string::npos) {
      fibers["thread" + line->substr(8, quote - 8)] = line->substr(quote + 8);
    }
    const size_t number = line->find("0x");
    if (address == 0 && number != std::string::npos) {
      address = std::strtoul(line->c_str() + number, nullptr, 16);
    }
  }
  const auto readable = [&](std::string text) {
    const size_t at = text.find("thread T");
    if (at == std::string::npos) return text;
    const size_t end = std::min(text.find_first_not_of("0123456789", at + 8), text.size());
    const auto fiber = fibers.find(text.substr(at, end - at));
    if (fiber != fibers.end()) text.replace(at, end - at, thread_of_fiber(fiber->second));
    return text;
  };
  std::string shared = shared_memory_at(address, 0);
  if (shared.empty() && kRedZone > 0) shared = shared_memory_at(address, kRedZone);
  const bool is_static = shared.find("static") != std::string::npos;
  if (is_static) shared += ", declared in";

  const std::string what = first->substr(first->rfind(' ', first->find("Sanitizer:")) + 1);
  fprintf(stderr, "simt: %s\n", before(before(what, " at pc "), " (pid").c_str());
  bool skips = false;
  for (auto line = first + 1; line != last; ++line) {
    if (starts_with(*line, "    #")) {
      const std::string source = skips ? "" : source_line(*line);
      if (!source.empty()) fprintf(stderr, "    %s\n", source.c_str());
      continue;
    }
    const size_t begin = line->find_first_not_of(' ');
    if (begin == std::string::npos) continue;
    const std::string head = before(line->substr(begin), " thread T0");
    const bool of_memory =
        starts_with(head, "Location is") || head.find(" is located ") != std::string::npos;
    const bool of_allocation = head.find("allocated by") != std::string::npos;
    skips = head.find("created by") != std::string::npos ||
            ((of_memory || of_allocation) && !shared.empty() && !is_static);
    if (of_memory && !shared.empty()) {
      fprintf(stderr, "  %s\n", shared.c_str());
    } else if (!skips && !(of_allocation && is_static) && !starts_with(head, "HINT")) {
      fprintf(stderr, "  %s\n", readable(head).c_str());
    }
  }
  return true;
}

// What has not ended the process.
struct Rest {
  ~Rest() { print_lines("", read_sanitizer_text()); }
} const rest;

#else

bool print_sanitizer_report() { return false; }

#endif

// Also where a sanitizer or an assertion has ended the process.
void on_signal(int number) {
  const Quiet quiet;
  signal(number, SIG_DFL);
  if (!print_sanitizer_report()) {
    fprintf(stderr, "simt: ended by %s\n", strsignal(number));
    print_lines("    ", source_lines());
  }
  print_state();
  fflush(stderr);
  raise(number);
}

const bool handlers_installed = [] {
  static char stack[256 << 10];
  stack_t alternative{};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof(stack);
  sigaltstack(&alternative, nullptr);
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGABRT, &action, nullptr);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(number, &action, nullptr);
#endif
  return true;
}();

}  // namespace

void fail(const char* format, ...) {
  const Quiet quiet;
  signal(SIGABRT, SIG_DFL);
  fprintf(stderr, "simt: ");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, "\n");
  const Executor& e = executor;
  if (e.in_kernel && e.current != e.running) {
    print_lines("    ", source_lines_of(*e.current));
  } else if (e.in_kernel || e.current == nullptr) {
    print_lines("    ", source_lines());
  }
  print_state();
  fflush(stderr);
  abort();
}

void check_aligned(const void* pointer, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return;
  fail("misaligned: %s, %zu bytes at address %p", where(site).c_str(), bytes, pointer);
}

}  // namespace simt

// A report ends the process, and with SIGABRT the executor adds what ran.
extern "C" {
const char* __asan_default_options() { return "abort_on_error=1:detect_leaks=0"; }
const char* __ubsan_default_options() { return "abort_on_error=1"; }
// The report that follows uses the heap in a signal handler.
const char* __tsan_default_options() {
  return "abort_on_error=1:halt_on_error=1:report_signal_unsafe=0:atexit_sleep_ms=0";
}
}
