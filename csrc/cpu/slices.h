// Where the rows and slices of a call lie, and in which order they are had.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>

#include "loops.h"

namespace softmax_ext::cpu {
namespace {

// A few slices of a tensor, each `next` from the one before.
template <class T>
struct Few {
  T* first;
  int64_t next;

  SOFTMAX_EXT_INLINE T* operator[](int64_t k) const { return first + k * next; }
  SOFTMAX_EXT_INLINE void skip(int64_t count) { first += count * next; }
};

// `size` slices along one outer dim. `index` is of the first.
struct Group {
  int64_t size;
  int64_t index[Dims::kMax];
};

// The slices of a tensor whose columns lie side by side: a step from another is `step` elements apart.
template <class T>
struct Slices {
  const Dims* dims;
  const Strides* strides;
  T* data;
  int64_t step;

  Slices(const Dims& dims, const Strides& strides, T* data)
      : dims(&dims), strides(&strides), data(data), step(strides.dim) {}

  SOFTMAX_EXT_INLINE T* operator[](int64_t slice) const {
    return data + outer_offset(*dims, *strides, dims->outer, slice);
  }
  SOFTMAX_EXT_INLINE Few<T> operator()(const Group& group, int along) const {
    return {data + outer_offset(*dims, *strides, group.index), strides->of[along]};
  }
};

// All slices of a call, in groups along one outer dim: in each tensor these are even, so that the next one
// is an addition away.
class Groups {
 public:
  // Of at most `most` slices each, which are worked on `few` at a time. along_last: no other dim will do.
  Groups(const Dims& dims, int64_t few, int64_t most, std::initializer_list<const Strides*> tensors,
         bool along_last)
      : most_(most), loops_(dims.outer), along_(dims.outer - 1) {
    // Along the dim of which the fewest are left over; of equals, the last.
    const auto times = [&](int k) { return ceil_div(dims.sizes[k], few); };
    for (int k = along_; k-- > 0 && !along_last;) {
      if (dims.sizes[k] * times(along_) > dims.sizes[along_] * times(k)) along_ = k;
    }
    size_ = dims.sizes[along_];
    // Its loop is outside those of dims with shorter strides in half of the tensors, which are so walked
    // in tiles: small ones, to stay in the first-level cache. For one of three the others would wait.
    int place = 0;
    const auto is_within = [&](const Strides* strides) {
      return strides->of[place] != 0 && strides->of[place] < strides->of[along_];
    };
    const auto half = static_cast<std::ptrdiff_t>(tensors.size() + 1) / 2;
    while (place < along_ && std::count_if(tensors.begin(), tensors.end(), is_within) < half)
      ++place;
    if (place < along_ && !along_last) most_ = std::clamp<int64_t>(32, few, most);
    for (int j = 0; j < loops_; ++j) {
      order_[j] = j < place || j > along_ ? j : j == place ? along_ : j - 1;
      sizes_[j] = j == place ? ceil_div(size_, most_) : dims.sizes[order_[j]];
      count_ *= sizes_[j];
    }
  }

  int64_t count() const { return count_; }
  int along() const { return along_; }

  SOFTMAX_EXT_INLINE Group operator[](int64_t i) const {
    Group group;
    for (int j = loops_ - 1; j > 0; --j) {
      group.index[order_[j]] = i % sizes_[j];
      i /= sizes_[j];
    }
    group.index[order_[0]] = i;
    int64_t& first = group.index[along_];
    first *= most_;
    group.size = std::min(most_, size_ - first);
    return group;
  }

 private:
  int64_t most_, size_, count_ = 1;
  int loops_, along_;
  int order_[Dims::kMax];  // of the outer dims
  int64_t sizes_[Dims::kMax];
};

}  // namespace
}  // namespace softmax_ext::cpu
