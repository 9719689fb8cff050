// The tensors of a call as the schedules see them. Input of another type, or not side by side, is copied to
// the result's memory in parts and read there.
#pragma once

#include <algorithm>
#include <type_traits>

#include "slices.h"
#include "vec.h"

namespace softmax_ext::cpu {
namespace {

// n elements that are `apart`, rounded to T.
template <class T, class From>
SOFTMAX_EXT_INLINE void convert(const From* x, int64_t apart, T* y, int64_t n) {
  using A = compute_t<T>;
  constexpr int kSize = Vec<A>::kSize;
  for_each_vector<kSize>(n, [=](int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
    if constexpr (kIsFloating<From> && std::is_same_v<compute_t<From>, A>) {
      if (apart == 1) {
        store(y + i, lanes, plain_nan(load(x + i, lanes, A(0))));
        return;
      }
    }
    Vec<A> values(static_cast<A>(to_float(x[i * apart])));
    int64_t count = apart == 0 ? 0 : kSize;
    if constexpr (std::is_same_v<decltype(lanes), First>) count = std::min(count, lanes.count);
    for (int64_t k = 1; k < count; ++k) {
      values.raw[k] = static_cast<A>(to_float(x[(i + k) * apart]));
    }
    store(y + i, lanes, std::is_same_v<T, From> ? values : plain_nan(values));
  });
}

// Copies `slices` times `steps` stretches of n elements, of 4 bytes or more.
template <class T>
void copy_stretches(T* to, int64_t to_slice, int64_t to_step, const T* from, int64_t from_slice,
                    int64_t from_step, int64_t slices, int64_t steps, int64_t n) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  // By moves of so many bytes, the last of which may overlap the one before.
  const auto copy_all = [=](auto size) SOFTMAX_EXT_LAMBDA {
    constexpr int64_t kMove = size();
    const int64_t last = bytes - kMove;
    for (int64_t s = 0; s < slices; ++s) {
      for (int64_t d = 0; d < steps; ++d) {
        char* target = reinterpret_cast<char*>(to + s * to_slice + d * to_step);
        const char* source = reinterpret_cast<const char*>(from + s * from_slice + d * from_step);
        for (int64_t i = 0; i < last; i += kMove) std::memcpy(target + i, source + i, kMove);
        std::memcpy(target + last, source + last, kMove);
      }
    }
  };
  if (bytes >= 64) return copy_all(std::integral_constant<int, 64>{});
  if (bytes >= 32) return copy_all(std::integral_constant<int, 32>{});
  if (bytes >= 16) return copy_all(std::integral_constant<int, 16>{});
  if (bytes >= 8) return copy_all(std::integral_constant<int, 8>{});
  copy_all(std::integral_constant<int, 4>{});
}

// Where a line of memory has elements of neighbouring rows: `rows` times n elements, those of a row
// `apart` in x and side by side in y.
template <class T>
void transpose(const T* x, int64_t apart, T* y, int64_t y_next, int64_t rows, int64_t n) {
  using A = compute_t<T>;
  constexpr int64_t kSize = Vec<A>::kSize;
  for (int64_t i = 0; i < n; i += kSize) {
    const int64_t width = std::min(kSize, n - i);
    for_each_vector<kSize>(rows, [=](int64_t r, auto lanes) SOFTMAX_EXT_LAMBDA {
      Vec<A> square[kSize];
      for (int64_t k = 0; k < kSize; ++k) {
        square[k] = load(x + r + (i + std::min(k, width - 1)) * apart, lanes, A(0));
      }
      transpose(square);
      for (int64_t k = 0; k < std::min(kSize, rows - r); ++k) {
        T* to = y + (r + k) * y_next + i;
        if (width == kSize) {
          store(to, All{}, square[k]);
        } else {
          store(to, First{width}, square[k]);
        }
      }
    });
  }
}

// `rows` times n elements, rounded to T: of x, rows are x_next apart, and the elements of each `apart`.
template <class T, class From>
void convert(const From* x, int64_t x_next, int64_t apart, T* y, int64_t y_next, int64_t rows,
             int64_t n) {
  constexpr int64_t kSize = Vec<compute_t<T>>::kSize;
  if constexpr (std::is_same_v<T, From>) {
    if (apart == 1 && n * static_cast<int64_t>(sizeof(T)) >= 4) {
      return copy_stretches(y, 0, y_next, x, 0, x_next, 1, rows, n);
    }
    if (x_next == 1 && apart > 1 && rows > kSize / 4) {
      return transpose(x, apart, y, y_next, rows, n);
    }
  }
  if (x_next == n * apart && y_next == n) {
    n *= rows;
    rows = 1;
  }
  // Where a line of memory has elements of neighbouring rows, it is read once.
  const int64_t width = x_next < apart ? kSize : n;
  for (int64_t i = 0; i < n; i += width) {
    for (int64_t r = 0; r < rows; ++r) {
      convert(x + r * x_next + i * apart, apart, y + r * y_next + i, std::min(width, n - i));
    }
  }
}

// f(const From*) for elements of a type From.
template <class F>
void visit(DType dtype, const void* data, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(static_cast<const Float16*>(data));
    case DType::kBFloat16:
      return f(static_cast<const BFloat16*>(data));
    case DType::kFloat32:
      return f(static_cast<const float*>(data));
    case DType::kFloat64:
      return f(static_cast<const double*>(data));
    case DType::kBool:
      return f(static_cast<const Bool*>(data));
    case DType::kUInt8:
      return f(static_cast<const uint8_t*>(data));
    case DType::kInt8:
      return f(static_cast<const int8_t*>(data));
    case DType::kInt16:
      return f(static_cast<const int16_t*>(data));
    case DType::kInt32:
      return f(static_cast<const int32_t*>(data));
    case DType::kInt64:
      return f(static_cast<const int64_t*>(data));
  }
}

// A tensor to be read as elements of T: itself where it is direct and has them; otherwise it is placed,
// in parts, in the memory of the result, and read there.
template <class T>
class Input {
 public:
  Input(const void* data, DType dtype, const Strides& strides, bool is_placed, const Shape& shape,
        const Dims& dims, const Slices<T>& result)
      : slices(dims, is_placed ? *result.strides : strides,
               is_placed ? result.data : static_cast<const T*>(data)),
        data_(data),
        dtype_(dtype),
        dims_(dims),
        strides_(strides),
        is_placed_(is_placed),
        result_(result),
        together_(is_placed && shape.inner == 1 && strides.of[dims.outer - 1] < strides.dim
                      ? 64 / size_of(dtype)
                      : int64_t{1}) {}

  Slices<const T> slices;

  bool is_placed() const { return is_placed_; }

  // Rows to be placed together: those that a line of memory has a part of.
  int64_t together() const { return together_; }

  // n elements of `count` rows, from element i on. inner is 1.
  SOFTMAX_EXT_INLINE void place_rows(int64_t row, int64_t count, int64_t i, int64_t n) const {
    if (!is_placed_) return;
    const int last = dims_.outer - 1;
    for (const int64_t end = row + count; row < end;) {
      const int64_t some = std::min(end - row, dims_.sizes[last] - row % dims_.sizes[last]);
      place(outer_offset(dims_, strides_, dims_.outer, row) + i * strides_.dim, strides_.of[last],
            strides_.dim, result_[row] + i, result_.strides->of[last], some, n);
      row += some;
    }
  }

  void place_group(const Group& group, int along, const Shape& shape) const {
    if (!is_placed_) return;
    const int64_t offset = outer_offset(dims_, strides_, group.index), next = strides_.of[along];
    const Few<T> to = result_(group, along);
    // Where the elements of each lie evenly, so do those of all.
    const int64_t apart = shape.inner == 1 ? strides_.dim : strides_.of[dims_.outer];
    if (dims_.inner <= 1 && strides_.dim == shape.inner * apart && result_.step == shape.inner) {
      place(offset, next, apart, to.first, to.next, group.size, shape.dim * shape.inner);
      return;
    }
    for (int64_t s = 0; s < group.size; ++s) {
      place_columns(offset + s * next, to[s], 0, shape.inner, 0, shape.dim);
    }
  }

  // The steps [begin, end) of `width` columns of a slice. inner is more than 1.
  SOFTMAX_EXT_INLINE void place_columns(int64_t slice, int64_t column, int64_t width, int64_t begin,
                                        int64_t end) const {
    if (!is_placed_) return;
    place_columns(outer_offset(dims_, strides_, dims_.outer, slice), result_[slice], column, width,
                  begin, end);
  }

 private:
  // The slice begins at `offset`, and goes to y.
  void place_columns(int64_t offset, T* y, int64_t column, int64_t width, int64_t begin,
                     int64_t end) const {
    const int last = dims_.outer + dims_.inner - 1;
    offset += begin * strides_.dim;
    y += begin * result_.step;
    for (const int64_t end_column = column + width; column < end_column;) {
      const int64_t some =
          std::min(end_column - column, dims_.sizes[last] - column % dims_.sizes[last]);
      place(offset + inner_offset(dims_, strides_, column), strides_.dim, strides_.of[last],
            y + column, result_.step, end - begin, some);
      column += some;
    }
  }
  void place(int64_t offset, int64_t next, int64_t apart, T* y, int64_t y_next, int64_t rows,
             int64_t n) const {
    visit(dtype_, data_, [=](auto x) { convert(x + offset, next, apart, y, y_next, rows, n); });
  }

  const void* data_;
  DType dtype_;
  const Dims& dims_;
  const Strides& strides_;
  bool is_placed_;
  Slices<T> result_;
  int64_t together_;
};

inline bool is_placed(const ForwardArgs& args) {
  return args.input_dtype != args.output_dtype ||
         !is_direct(args.shape, args.dims, args.input_strides, args.input_dtype, kShortDim);
}

inline bool is_placed(const BackwardArgs& args) {
  return args.grad_input_dtype == args.output_dtype &&
         !is_direct(args.shape, args.dims, args.grad_output_strides, args.output_dtype,
                    kGatheredDim);
}

template <class T>
Slices<T> output_of(const ForwardArgs& args) {
  return {args.dims, args.output_strides, static_cast<T*>(args.output)};
}

template <class T>
Input<T> input_of(const ForwardArgs& args) {
  return {args.input, args.input_dtype, args.input_strides, is_placed(args),
          args.shape, args.dims,        output_of<T>(args)};
}

// Of a backward.
template <class T, class G>
struct Gradients {
  Slices<const T> outputs;
  Slices<G> grad_inputs;
  Input<T> grads;

  explicit Gradients(const BackwardArgs& args)
      : outputs(args.dims, args.output_strides, static_cast<const T*>(args.output)),
        grad_inputs(args.dims, args.grad_input_strides, static_cast<G*>(args.grad_input)),
        grads(args.grad_output, args.output_dtype, args.grad_output_strides, is_placed(args),
              args.shape, args.dims,
              {args.dims, args.grad_input_strides, static_cast<T*>(args.grad_input)}) {}
};

// work(size, slices of each tensor) for all slices, when they can be read: in groups of at most `most`, for
// work on `few` at a time.
template <class A, class Input, class Work, class... T>
void for_each_group(const Shape& shape, const Dims& dims, const Input& input, int64_t few,
                    int64_t most, const Threads& threads, Work work, const Slices<T>&... tensors) {
  const Groups groups(dims, few, most, {tensors.strides...}, input.is_placed());
  parallel_for(threads, groups.count(), ceil_div(grain<A>(shape.dim * shape.inner), most),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const Group group = groups[i];
                   input.place_group(group, groups.along(), shape);
                   work(group.size, tensors(group, groups.along())...);
                 }
               });
}

}  // namespace
}  // namespace softmax_ext::cpu
