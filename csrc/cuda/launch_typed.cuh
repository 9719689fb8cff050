// From a plan to the kernel instance. Each .cu file but launch.cu instantiates one of the two
// functions at the end for one type, so that they compile side by side.
#pragma once

#include <type_traits>

#include "column_kernels.cuh"
#include "packed_kernels.cuh"
#include "row_kernels.cuh"

namespace softmax_ext::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Plan& plan, cudaStream_t stream,
                   Arguments... arguments) {
  const auto team = static_cast<unsigned>(plan.team);
  const dim3 grid(static_cast<unsigned>(plan.blocks) / team, team);
  dim3 block(static_cast<unsigned>(plan.group), static_cast<unsigned>(plan.items));
  Together together;
  if (plan.schedule == Schedule::kPacked) block = dim3(static_cast<unsigned>(plan.across));
  if (plan.schedule == Schedule::kColumns) {
    block = dim3(static_cast<unsigned>(plan.across), static_cast<unsigned>(plan.group));
  }
  if (plan.schedule == Schedule::kGrid) {
    together.cooperative = true;
  } else {
    together.cluster = dim3(1, team);
  }
  return launch_kernel(kernel, grid, block, plan.shared_bytes, together, stream, arguments...);
}

inline Rows rows_of(const Shape& shape, const Plan& plan, void* scratch) {
  return {shape.rows(), shape.dim, plan.schedule, scratch, plan.hold == Hold::kShared};
}

inline Packing packing_of(const Shape& shape, const Plan& plan, int64_t element_bytes) {
  const int64_t outer = plan.items / shape.inner;
  return {static_cast<int>(outer),
          static_cast<int>(slab_bytes(outer * shape.dim * shape.inner, element_bytes)), plan.group};
}

inline ColumnSplit split_of(const Shape& shape, const Plan& plan) {
  return {column_parts(shape.dim), column_steps(shape.dim), plan.hold == Hold::kShared};
}

// Calls launch(number) with the number as a constant, the one of `numbers` that is wanted.
template <int... numbers, class Launch>
cudaError_t with_constant([[maybe_unused]] int wanted, std::integer_sequence<int, numbers...>,
                          [[maybe_unused]] Launch launch) {
  cudaError_t error = cudaErrorInvalidValue;
  ((wanted == numbers ? void(error = launch(std::integral_constant<int, numbers>())) : void()),
   ...);
  return error;
}

// Columns that a thread has.
template <class T>
using column_counts =
    std::conditional_t<sizeof(T) == 2, std::integer_sequence<int, 1, kWidth<T> / 2, kWidth<T>>,
                       std::integer_sequence<int, 1, kWidth<T>>>;

// Vectors of a packed row that a thread has, if it has one alone.
template <class T>
using packed_counts = std::conditional_t<sizeof(T) == 8, std::integer_sequence<int>,
                                         std::integer_sequence<int, 1, 2, 4>>;

// Vectors that a thread has of a row.
template <class T>
using vector_counts = std::conditional_t<sizeof(T) == 8, std::integer_sequence<int, 2, 4>,
                                         std::integer_sequence<int, 2, 4, 8>>;

// Of a short row, whose threads have as many of the two inputs together.
template <class T>
using short_backward_counts = std::conditional_t<sizeof(T) == 8, std::integer_sequence<int, 2>,
                                                 std::integer_sequence<int, 2, 4>>;

template <Op op, class In, class Out>
cudaError_t launch_forward_op(const ForwardArgs& args, const Plan& plan, void* scratch,
                              cudaStream_t stream) {
  const auto* const input = static_cast<const In*>(args.input);
  auto* const output = static_cast<Out*>(args.output);
  if (plan.schedule == Schedule::kColumns) {
    return with_constant(plan.columns, column_counts<In>(), [&](auto columns) {
      return launch(columns_forward_kernel<op, columns(), In, Out>, plan, stream, input, output,
                    args.shape, split_of(args.shape, plan));
    });
  }
  if (plan.schedule == Schedule::kPacked) {
    const Packing packing = packing_of(args.shape, plan, sizeof(In));
    if (args.shape.inner > 1) {
      return launch(packed_columns_forward_kernel<op, In, Out>, plan, stream, input, output,
                    args.shape, packing, split_of(args.shape, plan));
    }
    if (plan.hold == Hold::kRegisters) {
      return with_constant(plan.vectors, packed_counts<In>(), [&](auto vectors) {
        return launch(packed_short_forward_kernel<op, vectors(), In, Out>, plan, stream, input,
                      output, args.shape, packing);
      });
    }
    return launch(plan.vectors == 1 ? packed_forward_kernel<op, true, In, Out>
                                    : packed_forward_kernel<op, false, In, Out>,
                  plan, stream, input, output, args.shape, packing);
  }
  const Rows rows = rows_of(args.shape, plan, scratch);
  if (plan.short_rows()) {
    return with_constant(plan.vectors, vector_counts<In>(), [&](auto vectors) {
      return launch(short_forward_kernel<op, vectors(), In, Out>, plan, stream, input, output,
                    rows);
    });
  }
  if (plan.hold != Hold::kRegisters) {
    return launch(long_forward_kernel<op, In, Out>, plan, stream, input, output, rows);
  }
  return with_constant(plan.vectors, vector_counts<In>(), [&](auto vectors) {
    return launch(registers_forward_kernel<op, vectors(), In, Out>, plan, stream, input, output,
                  rows);
  });
}

template <Op op, class In, class Out>
cudaError_t launch_backward_op(const BackwardArgs& args, const Plan& plan, void* scratch,
                               cudaStream_t stream) {
  const auto* const grad_output = static_cast<const In*>(args.grad_output);
  const auto* const output = static_cast<const In*>(args.output);
  auto* const grad_input = static_cast<Out*>(args.grad_input);
  if (plan.schedule == Schedule::kColumns) {
    return with_constant(plan.columns, column_counts<In>(), [&](auto columns) {
      return launch(columns_backward_kernel<op, columns(), In, Out>, plan, stream, grad_output,
                    output, grad_input, args.shape, split_of(args.shape, plan));
    });
  }
  if (plan.schedule == Schedule::kPacked) {
    const Packing packing = packing_of(args.shape, plan, sizeof(In));
    if (args.shape.inner > 1) {
      return launch(packed_columns_backward_kernel<op, In, Out>, plan, stream, grad_output, output,
                    grad_input, args.shape, packing, split_of(args.shape, plan));
    }
    if (plan.hold == Hold::kRegisters) {
      return with_constant(plan.vectors, packed_counts<In>(), [&](auto vectors) {
        return launch(packed_short_backward_kernel<op, vectors(), In, Out>, plan, stream,
                      grad_output, output, grad_input, args.shape, packing);
      });
    }
    return launch(plan.vectors == 1 ? packed_backward_kernel<op, true, In, Out>
                                    : packed_backward_kernel<op, false, In, Out>,
                  plan, stream, grad_output, output, grad_input, args.shape, packing);
  }
  const Rows rows = rows_of(args.shape, plan, scratch);
  if (plan.short_rows()) {
    return with_constant(plan.vectors, short_backward_counts<In>(), [&](auto vectors) {
      return launch(short_backward_kernel<op, vectors(), In, Out>, plan, stream, grad_output,
                    output, grad_input, rows);
    });
  }
  if (plan.hold != Hold::kRegisters) {
    return launch(long_backward_kernel<op, In, Out>, plan, stream, grad_output, output, grad_input,
                  rows);
  }
  return with_constant(plan.vectors, vector_counts<In>(), [&](auto vectors) {
    return launch(registers_backward_kernel<op, vectors(), In, Out>, plan, stream, grad_output,
                  output, grad_input, rows);
  });
}

template <class T>
constexpr DType dtype_of = std::is_same_v<T, __half>          ? DType::kFloat16
                           : std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16
                           : std::is_same_v<T, float>         ? DType::kFloat32
                                                              : DType::kFloat64;

// T: the output's type.
template <class T>
cudaError_t launch_forward_typed(const ForwardArgs& args, const Plan& plan, void* scratch,
                                 cudaStream_t stream) {
  const auto from = [&](auto type) {
    using In = decltype(type);
    return args.op == Op::kSoftmax
               ? launch_forward_op<Op::kSoftmax, In, T>(args, plan, scratch, stream)
               : launch_forward_op<Op::kLogSoftmax, In, T>(args, plan, scratch, stream);
  };
  if (args.input_dtype == dtype_of<T>) return from(T{});
  if constexpr (std::is_same_v<T, float>) {
    if (args.input_dtype == DType::kFloat16) return from(__half{});
    if (args.input_dtype == DType::kBFloat16) return from(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// T: the type of output and grad_output.
template <class T>
cudaError_t launch_backward_typed(const BackwardArgs& args, const Plan& plan, void* scratch,
                                  cudaStream_t stream) {
  const auto to = [&](auto type) {
    using Out = decltype(type);
    return args.op == Op::kSoftmax
               ? launch_backward_op<Op::kSoftmax, T, Out>(args, plan, scratch, stream)
               : launch_backward_op<Op::kLogSoftmax, T, Out>(args, plan, scratch, stream);
  };
  if (args.grad_input_dtype == dtype_of<T>) return to(T{});
  if constexpr (std::is_same_v<T, float>) {
    if (args.grad_input_dtype == DType::kFloat16) return to(__half{});
    if (args.grad_input_dtype == DType::kBFloat16) return to(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace softmax_ext::cuda
