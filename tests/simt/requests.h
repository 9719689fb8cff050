// What the programs that run the project's kernels have of requests: a line of key=value, and tensors'
// bytes.
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
#include "softmax_ext/problem.h"

namespace {

using namespace softmax_ext;

const std::map<std::string, DType> kDTypes = {
    {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}, {"float32", DType::kFloat32},
    {"float64", DType::kFloat64}, {"bool", DType::kBool},         {"uint8", DType::kUInt8},
    {"int8", DType::kInt8},       {"int16", DType::kInt16},       {"int32", DType::kInt32},
    {"int64", DType::kInt64}};

[[noreturn]] void give_up(const std::string& why) {
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

bool read_request(Request& request) {
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

simt::Order order_of(const std::string& text) {
  for (const auto order :
       {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom, simt::Order::kGreedy}) {
    if (text == simt::name(order)) return order;
  }
  give_up("no such order: " + text);
}

template <class Value>
void print(const char* key, Value value) {
  if constexpr (std::is_enum_v<Value>) {
    printf("%s=%s ", key, name(value));
  } else {
    printf("%s=%lld ", key, static_cast<long long>(value));
  }
}

}  // namespace
