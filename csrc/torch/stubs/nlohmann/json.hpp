// In place of a library whose header torch's headers of vmap include, and which torch does not install
// (pytorch#181565). They need the names; nothing here is ever called.
#pragma once

#include <string>

namespace nlohmann {

struct json {
  json() = default;
  template <class T>
  explicit json(const T&);
  static json parse(const std::string&);
  std::string dump() const;
  template <class T>
  T get() const;
};

}  // namespace nlohmann
