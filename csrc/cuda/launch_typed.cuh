// From a plan to the kernel instance. Each .cu file but launch.cu instantiates the function at the
// end for one direction and type, so that they compile side by side.
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

inline Teams teams_of(int64_t rows, int64_t dim, const Plan& plan, void* scratch) {
  return {rows, dim, plan.schedule, scratch, plan.hold == Hold::kShared};
}

inline Rows rows_of(const Shape& shape, const Plan& plan, void* scratch,
                    const OuterStrides& strides) {
  return {teams_of(shape.rows(), shape.dim, plan, scratch), strides};
}

inline Packing packing_of(const Workload& work, const Plan& plan, const OuterStrides& strides) {
  const Shape& shape = work.shape;
  const int64_t outer = plan.items / shape.inner;
  const int64_t bytes = slab_bytes(outer * shape.dim * shape.inner, size_of(work.load_type));
  const int64_t of_run = slabs_of_run(work.run, outer);
  // Of one run nothing is divided, and it may have more slabs than a Divisor takes.
  const Divisor divisor = Divisor::of(work.run < shape.outer ? of_run : 1);
  const int64_t slabs = shape.outer / work.run * of_run;
  return {static_cast<int>(outer),
          static_cast<int>(bytes),
          plan.group,
          work.run,
          divisor,
          slabs,
          strides};
}

// In the order of the kernels' arguments.
template <class... Tensors>
ColumnStrides strides_of(const Dims& dims, const Tensors&... tensors) {
  return {outer_strides(dims, tensors...), {tensors.dim...}};
}

inline ColumnSplit split_of(const Shape& shape) {
  return {column_parts(shape.dim), column_steps(shape.dim)};
}

inline ColumnMemory column_memory_of(const Shape& shape, const Plan& plan, int64_t element_bytes,
                                     int inputs) {
  return column_memory(shape.dim, plan.team, int64_t{plan.across} * plan.columns, element_bytes,
                       inputs);
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

// --- The kernels of a direction ------------------------------------------------------------------

template <Op op, class In, class Out>
struct ForwardKernels {
  using Element = In;
  using ShortCounts = vector_counts<In>;

  template <int columns>
  static auto columns_of() {
    return columns_forward_kernel<op, columns, In, Out>;
  }
  static auto packed_columns() { return packed_columns_forward_kernel<op, In, Out>; }
  template <int vectors>
  static auto packed_short() {
    return packed_short_forward_kernel<op, vectors, In, Out>;
  }
  static auto packed() { return packed_forward_kernel<op, In, Out>; }
  template <int vectors>
  static auto short_rows() {
    return short_forward_kernel<op, vectors, In, Out>;
  }
  template <int vectors>
  static auto registers() {
    return registers_forward_kernel<op, vectors, In, Out>;
  }
  static auto long_rows() { return long_forward_kernel<op, In, Out>; }
};

template <Op op, class In, class Out>
struct BackwardKernels {
  using Element = In;
  using ShortCounts = short_backward_counts<In>;

  template <int columns>
  static auto columns_of() {
    return columns_backward_kernel<op, columns, In, Out>;
  }
  static auto packed_columns() { return packed_columns_backward_kernel<op, In, Out>; }
  template <int vectors>
  static auto packed_short() {
    return packed_short_backward_kernel<op, vectors, In, Out>;
  }
  static auto packed() { return packed_backward_kernel<op, In, Out>; }
  template <int vectors>
  static auto short_rows() {
    return short_backward_kernel<op, vectors, In, Out>;
  }
  template <int vectors>
  static auto registers() {
    return registers_backward_kernel<op, vectors, In, Out>;
  }
  static auto long_rows() { return long_backward_kernel<op, In, Out>; }
};

// --- Dispatch ------------------------------------------------------------------------------------

// The plan's kernel, of the tensors: those read, that written.
template <class Kernels, class... Tensors>
cudaError_t launch_plan(const Workload& work, const ColumnStrides& strides, const Plan& plan,
                        void* scratch, cudaStream_t stream, Tensors... tensors) {
  using In = typename Kernels::Element;
  const Shape& shape = work.shape;
  const auto run = [&](auto kernel, auto... how) {
    return launch(kernel, plan, stream, tensors..., how...);
  };
  if (plan.schedule == Schedule::kColumns) {
    return with_constant(plan.columns, column_counts<In>(), [&](auto columns) {
      return run(Kernels::template columns_of<columns()>(), shape, strides, split_of(shape),
                 column_memory_of(shape, plan, sizeof(In), sizeof...(Tensors) - 1),
                 plan.hold == Hold::kShared);
    });
  }
  if (plan.schedule == Schedule::kPacked) {
    const Packing packing = packing_of(work, plan, strides.outer);
    if (shape.inner > 1) {
      return run(Kernels::packed_columns(), shape, packing, split_of(shape));
    }
    if (plan.hold == Hold::kRegisters) {
      return with_constant(plan.vectors, packed_counts<In>(), [&](auto vectors) {
        return run(Kernels::template packed_short<vectors()>(), shape, packing);
      });
    }
    return run(Kernels::packed(), shape, packing);
  }
  const Rows rows = rows_of(shape, plan, scratch, strides.outer);
  if (plan.short_rows()) {
    return with_constant(plan.vectors, typename Kernels::ShortCounts(), [&](auto vectors) {
      return run(Kernels::template short_rows<vectors()>(), rows);
    });
  }
  if (plan.hold != Hold::kRegisters) return run(Kernels::long_rows(), rows);
  return with_constant(plan.vectors, vector_counts<In>(), [&](auto vectors) {
    return run(Kernels::template registers<vectors()>(), rows);
  });
}

// T is the type of the output, Other that of the input, and backward of grad_input.
template <Op op, class T, class Other>
cudaError_t launch_op(const ForwardArgs& args, const Plan& plan, void* scratch,
                      cudaStream_t stream) {
  return launch_plan<ForwardKernels<op, Other, T>>(
      workload(args), strides_of(args.dims, args.input_strides, args.output_strides), plan, scratch,
      stream, static_cast<const Other*>(args.input), static_cast<T*>(args.output));
}

template <Op op, class T, class Other>
cudaError_t launch_op(const BackwardArgs& args, const Plan& plan, void* scratch,
                      cudaStream_t stream) {
  return launch_plan<BackwardKernels<op, T, Other>>(
      workload(args),
      strides_of(args.dims, args.grad_output_strides, args.output_strides, args.grad_input_strides),
      plan, scratch, stream, static_cast<const T*>(args.grad_output),
      static_cast<const T*>(args.output), static_cast<Other*>(args.grad_input));
}

inline DType other_dtype(const ForwardArgs& args) { return args.input_dtype; }
inline DType other_dtype(const BackwardArgs& args) { return args.grad_input_dtype; }

template <class T>
constexpr DType dtype_of = std::is_same_v<T, __half>          ? DType::kFloat16
                           : std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16
                           : std::is_same_v<T, float>         ? DType::kFloat32
                                                              : DType::kFloat64;

// T: the type of the output.
template <class T, class Args>
cudaError_t launch_typed(const Args& args, const Plan& plan, void* scratch, cudaStream_t stream) {
  const auto with = [&](auto other) {
    using Other = decltype(other);
    if constexpr (kAllValues) {
      if (args.op == Op::kLogSoftmax) {
        return launch_op<Op::kLogSoftmax, T, Other>(args, plan, scratch, stream);
      }
    }
    return args.op == Op::kSoftmax ? launch_op<Op::kSoftmax, T, Other>(args, plan, scratch, stream)
                                   : cudaErrorInvalidValue;
  };
  if (other_dtype(args) == dtype_of<T>) return with(T{});
  if constexpr (std::is_same_v<T, float>) {
    if (other_dtype(args) == DType::kFloat16) return with(__half{});
    if constexpr (kAllValues) {
      if (other_dtype(args) == DType::kBFloat16) return with(__nv_bfloat16{});
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace softmax_ext::cuda
