// From a plan to the kernel instance. Each .cu file but launch.cu instantiates one of the two
// functions at the end for one type, so that they compile side by side.
#pragma once

#include <type_traits>

#include "row_kernels.cuh"
#include "strided_kernels.cuh"

namespace softmax_ext::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Plan& plan, cudaStream_t stream,
                   Arguments... arguments) {
  const dim3 grid(static_cast<unsigned>(plan.blocks));
  const dim3 block =
      plan.schedule == Schedule::kStrided
          ? dim3(static_cast<unsigned>(plan.across), static_cast<unsigned>(plan.group),
                 static_cast<unsigned>(plan.items))
          : dim3(static_cast<unsigned>(plan.group), static_cast<unsigned>(plan.items));
  return launch_kernel(kernel, grid, block, plan.shared_bytes, 1, stream, arguments...);
}

template <Op op, class In, class Out>
cudaError_t launch_forward_op(In input, Out output, Shape shape, const Plan& plan,
                              cudaStream_t stream) {
  const int64_t rows = shape.rows();
  const bool vectorized = plan.vectorized;
  if (plan.schedule == Schedule::kStrided) {
    return launch(strided_forward_kernel<op, In, Out>, plan, stream, input, output, shape,
                  vectorized);
  }
  if constexpr (In::kVectors) {
    const auto registers = [&](auto kernel) {
      return launch(kernel, plan, stream, input, output, rows, static_cast<int>(shape.dim),
                    vectorized);
    };
    if (plan.schedule == Schedule::kRegisters) {
      if constexpr (registers_vectors<In, 1> >= 8) {
        if (plan.vectors == 8) return registers(registers_forward_kernel<op, 8, In, Out>);
      }
      if (plan.vectors == 4) return registers(registers_forward_kernel<op, 4, In, Out>);
      if (plan.vectors == 2) return registers(registers_forward_kernel<op, 2, In, Out>);
      return registers(registers_forward_kernel<op, 1, In, Out>);
    }
    if (plan.schedule == Schedule::kShared) {
      return launch(streaming_forward_kernel<op, true, In, Out>, plan, stream, input, output, rows,
                    shape.dim, vectorized);
    }
  }
  return launch(streaming_forward_kernel<op, false, In, Out>, plan, stream, input, output, rows,
                shape.dim, vectorized);
}

template <Op op, class In, class Out>
cudaError_t launch_backward_op(In grad_output, In output, Out grad_input, Shape shape,
                               const Plan& plan, cudaStream_t stream) {
  const int64_t rows = shape.rows();
  const bool vectorized = plan.vectorized;
  if (plan.schedule == Schedule::kStrided) {
    return launch(strided_backward_kernel<op, In, Out>, plan, stream, grad_output, output,
                  grad_input, shape, vectorized);
  }
  if constexpr (Out::kVectors) {
    const auto registers = [&](auto kernel) {
      return launch(kernel, plan, stream, grad_output, output, grad_input, rows,
                    static_cast<int>(shape.dim), vectorized);
    };
    if (plan.schedule == Schedule::kRegisters) {
      if constexpr (registers_vectors<In, 2> >= 4) {
        if (plan.vectors == 4) return registers(registers_backward_kernel<op, 4, In, Out>);
      }
      if (plan.vectors == 2) return registers(registers_backward_kernel<op, 2, In, Out>);
      return registers(registers_backward_kernel<op, 1, In, Out>);
    }
    if (plan.schedule == Schedule::kShared) {
      return launch(streaming_backward_kernel<op, true, In, Out>, plan, stream, grad_output, output,
                    grad_input, rows, shape.dim, vectorized);
    }
  }
  return launch(streaming_backward_kernel<op, false, In, Out>, plan, stream, grad_output, output,
                grad_input, rows, shape.dim, vectorized);
}

template <class T>
constexpr DType dtype_of = std::is_same_v<T, __half>          ? DType::kFloat16
                           : std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16
                           : std::is_same_v<T, float>         ? DType::kFloat32
                                                              : DType::kFloat64;

// T: the output's type.
template <class T>
cudaError_t launch_forward_typed(const ForwardArgs& args, const Plan& plan, cudaStream_t stream) {
  const auto from = [&](auto input) {
    using In = decltype(input);
    const auto launch_op = args.op == Op::kSoftmax
                               ? launch_forward_op<Op::kSoftmax, In, Output<T>>
                               : launch_forward_op<Op::kLogSoftmax, In, Output<T>>;
    return launch_op(input, Output<T>{static_cast<T*>(args.output)}, args.shape, plan, stream);
  };
  if (args.input_dtype == dtype_of<T>) return from(Input<T>{static_cast<const T*>(args.input)});
  if constexpr (std::is_same_v<T, float>) {
    if (args.input_dtype == DType::kFloat16) {
      return from(Input<__half>{static_cast<const __half*>(args.input)});
    }
    if (args.input_dtype == DType::kBFloat16) {
      return from(Input<__nv_bfloat16>{static_cast<const __nv_bfloat16*>(args.input)});
    }
  }
  return from(CastInput<T>{args.input, args.input_dtype, 0});
}

// T: the type of output and grad_output.
template <class T>
cudaError_t launch_backward_typed(const BackwardArgs& args, const Plan& plan, cudaStream_t stream) {
  const auto to = [&](auto grad_input) {
    using Out = decltype(grad_input);
    const auto launch_op = args.op == Op::kSoftmax
                               ? launch_backward_op<Op::kSoftmax, Input<T>, Out>
                               : launch_backward_op<Op::kLogSoftmax, Input<T>, Out>;
    return launch_op(Input<T>{static_cast<const T*>(args.grad_output)},
                     Input<T>{static_cast<const T*>(args.output)}, grad_input, args.shape, plan,
                     stream);
  };
  if (args.grad_input_dtype == dtype_of<T>) return to(Output<T>{static_cast<T*>(args.grad_input)});
  if constexpr (std::is_same_v<T, float>) {
    if (args.grad_input_dtype == DType::kFloat16) {
      return to(Output<__half>{static_cast<__half*>(args.grad_input)});
    }
    if (args.grad_input_dtype == DType::kBFloat16) {
      return to(Output<__nv_bfloat16>{static_cast<__nv_bfloat16*>(args.grad_input)});
    }
  }
  return to(CastOutput{args.grad_input, args.grad_input_dtype, 0});
}

}  // namespace softmax_ext::cuda
