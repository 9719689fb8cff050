// A request to the program that runs the CUDA kernels: a line of key=value, and the bytes of its tensors.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "executor.h"
#include "softmax_ext/plan.h"

namespace requests {

using namespace softmax_ext;

inline const std::map<std::string, DType> kDTypes = {
    {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}, {"float32", DType::kFloat32},
    {"float64", DType::kFloat64}, {"bool", DType::kBool},         {"uint8", DType::kUInt8},
    {"int8", DType::kInt8},       {"int16", DType::kInt16},       {"int32", DType::kInt32},
    {"int64", DType::kInt64}};

[[noreturn]] inline void give_up(const std::string& why) {
  fprintf(stderr, "kernels: %s\n", why.c_str());
  exit(2);
}

struct Request {
  std::map<std::string, std::string> words;

  const std::string& text(const std::string& key) const {
    const auto found = words.find(key);
    if (found == words.end()) give_up("no " + key + " in the request");
    return found->second;
  }
  int64_t number(const std::string& key) const { return std::stoll(text(key)); }
  DType dtype(const std::string& key) const { return kDTypes.at(text(key)); }
  std::vector<int64_t> numbers(const std::string& key) const {
    std::vector<int64_t> result;
    std::istringstream numbers(text(key));
    for (std::string number; std::getline(numbers, number, ',');)
      result.push_back(std::stoll(number));
    return result;
  }
  // One of those with a comma between them; the last stands for all that follow.
  size_t number(const std::string& key, size_t index) const {
    std::istringstream numbers(text(key));
    std::string number;
    for (size_t i = 0; i <= index && std::getline(numbers, number, ',');) ++i;
    return std::stoull(number);
  }
};

inline bool read_request(Request& request) {
  std::string line;
  if (!std::getline(std::cin, line)) return false;
  request.words.clear();
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos) give_up("not key=value: " + word);
    request.words[word.substr(0, equals)] = word.substr(equals + 1);
  }
  return true;
}

// A tensor's bytes, `offset` bytes behind a multiple of 16. Its end is that of the allocation, for
// AddressSanitizer; without it, guards around it show what was written outside.
class Buffer {
 public:
  Buffer(size_t bytes, size_t offset)
      : bytes_(bytes), offset_(kGuard + offset), memory_(offset_ + bytes + kGuard, 0xff) {}

  unsigned char* data() { return memory_.data() + offset_; }
  void read() {
    std::cin.read(reinterpret_cast<char*>(data()), static_cast<std::streamsize>(bytes_));
    if (!std::cin) give_up("the request ends early");
  }
  std::vector<unsigned char> copy() { return {data(), data() + bytes_}; }
  bool holds(const std::vector<unsigned char>& bytes) {
    return std::equal(bytes.begin(), bytes.end(), data());
  }
  void assign(const std::vector<unsigned char>& bytes) {
    std::copy(bytes.begin(), bytes.end(), data());
  }
  void fill(unsigned char byte) { std::fill_n(data(), bytes_, byte); }
  bool guards_intact() {
    const auto intact = [](unsigned char byte) { return byte == 0xff; };
    return std::all_of(memory_.data(), data(), intact) &&
           std::all_of(data() + bytes_, memory_.data() + memory_.size(), intact);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 64;
#endif
  size_t bytes_;
  size_t offset_;
  std::vector<unsigned char> memory_;
};

inline simt::Order order_of(const std::string& text) {
  for (const auto order :
       {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom, simt::Order::kGreedy}) {
    if (text == simt::name(order)) return order;
  }
  give_up("no such order: " + text);
}

inline Schedule schedule_of(const std::string& text) {
  for (int k = 0; k < kSchedules; ++k) {
    if (text == name(static_cast<Schedule>(k))) return static_cast<Schedule>(k);
  }
  give_up("no such schedule: " + text);
}

template <class Value>
void print(const char* key, Value value) {
  if constexpr (std::is_enum_v<Value>) {
    printf("%s=%s ", key, name(value));
  } else {
    printf("%s=%lld ", key, static_cast<long long>(value));
  }
}

// Of the outer dims.
inline Dims dims_of(const Request& request, const Shape& shape) {
  const std::vector<int64_t> sizes = request.numbers("sizes");
  Dims dims{static_cast<int>(sizes.size()), shape.inner == 1 ? 0 : 1, {}};
  *std::copy(sizes.begin(), sizes.end(), dims.sizes) = shape.inner;
  return dims;
}

// Those of the outer dims and of dim, for one tensor after another; side by side along inner.
inline Strides strides_of(const Request& request, const std::string& key, size_t tensor,
                          const Dims& dims) {
  const std::vector<int64_t> all = request.numbers(key);
  const auto outer = static_cast<size_t>(dims.outer);
  const size_t first = tensor * (outer + 1);
  if (all.size() <= first + outer) give_up("too few strides in " + key);
  Strides strides{all[first + outer], {}};
  std::copy_n(all.data() + first, outer, strides.of);
  strides.of[outer] = 1;
  return strides;
}

// Elements from a tensor's first to its last.
inline size_t extent(const Shape& shape, const Dims& dims, const Strides& strides) {
  if (shape.numel() == 0) return 0;
  int64_t last = (shape.dim - 1) * strides.dim + shape.inner - 1;
  for (int k = 0; k < dims.outer; ++k) last += (dims.sizes[k] - 1) * strides.of[k];
  return static_cast<size_t>(last + 1);
}

// The device of a request, as the executor is to be it.
inline DeviceProperties device_of(const Request& request) {
  const DeviceProperties device{static_cast<int>(request.number("sm_count")),
                                static_cast<int>(request.number("shared_bytes")),
                                static_cast<int>(request.number("compute_capability"))};
  simt::settings.max_shared_bytes = static_cast<size_t>(device.max_shared_memory_per_block);
  simt::settings.compute_capability = device.compute_capability;
  simt::settings.resident = static_cast<int>(request.number("resident"));
  simt::settings.seed = static_cast<uint64_t>(request.number("seed"));
  return device;
}

inline std::vector<std::string> words_of(const Request& request, const std::string& key) {
  std::vector<std::string> words;
  std::istringstream names(request.text(key));
  for (std::string word; std::getline(names, word, ',');) words.push_back(word);
  return words;
}

// Fewer blocks than there are rows: each then takes several, as where the grid is at its limit.
inline void limit_blocks(Plan& plan, const Request& request) {
  const int64_t most = std::max<int64_t>(request.number("most_blocks"), plan.team);
  if (plan.blocks > most) plan.blocks = most / plan.team * plan.team;
}

// `exps`: float64 ones that all orders together have taken.
inline void print_answer(const Plan& plan, long long exps, std::string problem,
                         const std::vector<unsigned char>& result) {
  std::replace(problem.begin(), problem.end(), ' ', '_');
  Plan::each_member([&](const char* key, auto member) { print(key, plan.*member); });
  print("exps", exps);
  printf("problem=%s\n", problem.c_str());
  if (!result.empty()) fwrite(result.data(), 1, result.size(), stdout);
  fflush(stdout);
}

}  // namespace requests
