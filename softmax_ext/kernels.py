"""The kernels by themselves: functions of tensors that record no graph.

What a torch.autograd.Function is made of; :mod:`softmax_ext.autograd` is an example of one. They
are the operators torch.ops.softmax_ext, with every check of theirs, and go where those go: into
torch.compile(fullgraph=True), under vmap, forward-mode AD, and torch.autocast on CUDA.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from softmax_ext._loader import load

load()

__all__ = ["log_softmax_backward", "log_softmax_forward", "softmax_backward", "softmax_forward"]


def _check_tensor(function: str, argument: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{function}(): argument '{argument}' must be Tensor, not {type(tensor).__name__}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}(): argument '{argument}' requires grad, but the kernels record no graph: "
            "call it in the forward of a torch.autograd.Function or under torch.no_grad(), or call "
            "what records, the functions of softmax_ext or the Functions of softmax_ext.autograd"
        )


def _check_dtype(function: str, argument: str, dtype: object) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"{function}(): argument '{argument}' must be torch.dtype, not {type(dtype).__name__}"
        )


def _to_dim(function: str, dim: object) -> int:
    """An int, or what torch takes for one: not a bool."""
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise TypeError(f"{function}(): argument 'dim' must be int, not {type(dim).__name__}")
    return operator.index(dim)


def _forward(name: str, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    function = f"{name}_forward"
    _check_tensor(function, "input", input)
    if dtype is not None:
        _check_dtype(function, "dtype", dtype)
    call = getattr(torch.ops.softmax_ext, name).default
    return call(input, _to_dim(function, dim), dtype)  # type: ignore[no-any-return]


def _backward(
    name: str, grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    function = f"{name}_backward"
    _check_tensor(function, "grad_output", grad_output)
    _check_tensor(function, "output", output)
    _check_dtype(function, "input_dtype", input_dtype)
    call = getattr(torch.ops.softmax_ext, function).default
    return call(  # type: ignore[no-any-return]
        grad_output, output, _to_dim(function, dim), input_dtype
    )


def softmax_forward(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x) / sum(exp(x)) over `dim`, without autograd.

    Args:
        input: of any shape and layout; float16, bfloat16, float32 or float64, or another dtype
            together with the argument `dtype`. On the CPU or CUDA; or meta, or fake.
        dim: of which the slices sum to 1, from -input.ndim to input.ndim - 1.
        dtype: of the result, floating; by default the input's. The input is rounded to it first.

    Returns:
        A new contiguous tensor of the input's shape, on its device, that requires no grad. Where
        the input has a forward-mode tangent, it has one.

    Raises:
        RuntimeError: `input` requires grad and grad mode is on: a gradient would be lost. In the
            forward of a torch.autograd.Function grad mode is off. Or the input's storage has been
            resized to less than its elements.
        IndexError: `dim` is out of range.
        NotImplementedError: the result's dtype is not one of the four, or the layout not strided.
        TypeError: an argument is of the wrong type.

    Source: as :func:`softmax_ext.softmax`; torch's aten::_softmax.

    Example:
        >>> softmax_forward(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([0.0900, 0.2447, 0.6652])
    """
    return _forward("softmax", input, dim, dtype)


def softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    """The gradient of the input of :func:`softmax_forward`: y (g - sum(g y)) over `dim`.

    Args:
        grad_output: g, the gradient of the output, of the output's shape, dtype and device; of any
            layout, expanded for one.
        output: y, what the forward pass returned; float16, bfloat16, float32 or float64.
        dim: that of the forward pass.
        input_dtype: of the result: that of the forward pass's input, one of the same four.

    Returns:
        A new contiguous tensor of the output's shape, rounded once, that requires no grad. Where
        an argument has a forward-mode tangent, it has one.

    Raises:
        RuntimeError: an argument requires grad and grad mode is on, as in a backward pass with
            create_graph=True; or the two differ in shape, dtype or device; or a storage has been
            resized to less than its elements.
        IndexError: `dim` is out of range.
        NotImplementedError: a dtype is not one of the four, or a layout not strided.
        TypeError: an argument is of the wrong type.

    Source: torch's aten::_softmax_backward_data.

    Example:
        >>> y = softmax_forward(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        >>> softmax_backward(torch.tensor([1.0, 0.0, 0.0]), y, 0, torch.float32)
        tensor([ 0.0819, -0.0220, -0.0599])
    """
    return _backward("softmax", grad_output, output, dim, input_dtype)


def log_softmax_forward(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """x - log(sum(exp(x))) over `dim`, without autograd; for the rest as :func:`softmax_forward`.

    Source: as :func:`softmax_ext.log_softmax`; torch's aten::_log_softmax.

    Example:
        >>> log_softmax_forward(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([-2.4076, -1.4076, -0.4076])
    """
    return _forward("log_softmax", input, dim, dtype)


def log_softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    """The gradient of the input of :func:`log_softmax_forward`: g - exp(y) sum(g) over `dim`.

    Arguments, result and errors are those of :func:`softmax_backward`.

    Source: torch's aten::_log_softmax_backward_data.

    Example:
        >>> y = log_softmax_forward(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        >>> log_softmax_backward(torch.tensor([1.0, 0.0, 0.0]), y, 0, torch.float32)
        tensor([ 0.9100, -0.2447, -0.6652])
    """
    return _backward("log_softmax", grad_output, output, dim, input_dtype)
