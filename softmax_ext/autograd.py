"""softmax and log-softmax as torch.autograd.Function, over :mod:`softmax_ext.kernels`.

For Functions of your own, which may call these or be made like them. softmax_ext.softmax does the
same with a node in C++, which costs less.

With x the input, y the output, g the gradient of y, v that of dx, and sums over `dim`:

    softmax      y = exp(x) / sum(exp(x))      dx = y (g - sum(g y))
    log-softmax  y = x - log(sum(exp(x)))      dx = g - exp(y) sum(g)

All four are kernels, and each is a Function. The derivatives of y are dx, the next Function; those
of dx are made of it and of torch's operators, and so have derivatives in turn. As dx needs y and
not x, y is all that is saved.

Where a gradient is asked for, torch.compile breaks the graph at any Function that has a `jvp`.
softmax_ext.softmax is an operator there, as the kernels are in a Function without one; or apply
torch.compiler.allow_in_graph to these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual

from softmax_ext import kernels

__all__ = [
    "LogSoftmaxBackwardFunction",
    "LogSoftmaxFunction",
    "SoftmaxBackwardFunction",
    "SoftmaxFunction",
]


def _sum(x: Tensor, dim: int) -> Tensor:
    return x.sum(dim, keepdim=True)


def _of_any_order(jvp: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A `jvp` that gets the saved tensors, less their tangents, and runs with forward mode on.

    torch runs it with forward mode off, which loses the tangents of a jvp around this one:
    https://github.com/pytorch/pytorch/issues/197867.
    """

    @wraps(jvp)
    def with_forward_mode(ctx: Any, *tangents: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):
            saved = [unpack_dual(x).primal for x in ctx.saved_tensors]  # type: ignore[no-untyped-call]
            return jvp(ctx, saved, *tangents)

    return with_forward_mode


class _Function(torch.autograd.Function):
    """Of tensors of one shape, a dim and a dtype."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *args: Any) -> Tensor: ...

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """The same Function, over tensors with the batch as their first dim."""
        *tensors, dim, dtype = args
        tensors = [
            x.expand(info.batch_size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
            for x, in_dim in zip(tensors, in_dims, strict=False)
        ]
        scalars = tensors[0].dim() == 1
        if scalars:
            tensors = [x.unsqueeze(1) for x in tensors]
        rank = tensors[0].dim() - 1
        dim = kernels._to_dim(cls.__name__, dim)
        if not -rank <= dim < rank:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but "
                f"got {dim})"
            )
        result = cls.apply(*tensors, dim % rank + 1, dtype)
        return result.squeeze(1) if scalars else result, 0


class _ForwardFunction(_Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.dim, _ = inputs
        ctx.input_dtype = input.dtype
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)


class _BackwardFunction(_Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, saved_output, ctx.dim, ctx.input_dtype = inputs
        ctx.save_for_backward(grad_output, saved_output)
        ctx.save_for_forward(grad_output, saved_output)


class SoftmaxFunction(_ForwardFunction):
    """``SoftmaxFunction.apply(input, dim, dtype)``: :func:`softmax_ext.softmax`.

    Arguments, result and errors are those of :func:`softmax_ext.kernels.softmax_forward`, but that
    the result is recorded. It has derivatives of every order, reverse and forward mode, batched
    ones, and a rule for vmap.

    Source: https://pytorch.org/docs/stable/notes/extending.func.html.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> y = SoftmaxFunction.apply(x, 0, None)
        >>> y
        tensor([0.0900, 0.2447, 0.6652], grad_fn=<SoftmaxFunctionBackward>)
        >>> torch.autograd.grad(y[0], x)
        (tensor([ 0.0819, -0.0220, -0.0599]),)
    """

    @staticmethod
    def forward(input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return kernels.softmax_forward(input, dim, dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return SoftmaxBackwardFunction.apply(grad_output, y, ctx.dim, ctx.input_dtype), None, None

    @staticmethod
    @_of_any_order
    def jvp(ctx: Any, saved: list[Tensor], tangent: Tensor, *_: None) -> Tensor:
        """The Jacobian is symmetric: this is the gradient."""
        (y,) = saved
        return SoftmaxBackwardFunction.apply(tangent.to(y.dtype), y, ctx.dim, y.dtype)


class SoftmaxBackwardFunction(_BackwardFunction):
    """``SoftmaxBackwardFunction.apply(grad_output, output, dim, input_dtype)``, the gradient.

    Arguments, result and errors are those of :func:`softmax_ext.kernels.softmax_backward`, but that
    the result is recorded: for a `backward` that is to be differentiable.

    Source: as :class:`SoftmaxFunction`.

    Example:
        >>> y = torch.tensor([0.25, 0.75], requires_grad=True)
        >>> SoftmaxBackwardFunction.apply(torch.tensor([1.0, 0.0]), y, 0, torch.float32)
        tensor([ 0.1875, -0.1875], grad_fn=<SoftmaxBackwardFunctionBackward>)
    """

    @staticmethod
    def forward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        return kernels.softmax_backward(grad_output, output, dim, input_dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (g, y), dim = ctx.saved_tensors, ctx.dim
        v = v.to(y.dtype)
        grad_g = SoftmaxBackwardFunction.apply(v, y, dim, y.dtype)
        grad_y = v * (g - _sum(g * y, dim)) - g * _sum(v * y, dim)
        return grad_g, grad_y, None, None

    @staticmethod
    @_of_any_order
    def jvp(
        ctx: Any, saved: list[Tensor], tangent_g: Tensor, tangent_y: Tensor, *_: None
    ) -> Tensor:
        (g, y), dim = saved, ctx.dim
        by_g = SoftmaxBackwardFunction.apply(tangent_g, y, dim, y.dtype)
        by_y = tangent_y * (g - _sum(g * y, dim))
        by_y = by_y - y * _sum(g * tangent_y, dim)
        return (by_g + by_y).to(ctx.input_dtype)


class LogSoftmaxFunction(_ForwardFunction):
    """``LogSoftmaxFunction.apply(input, dim, dtype)``: :func:`softmax_ext.log_softmax`.

    For the rest as :class:`SoftmaxFunction`.

    Source: as :class:`SoftmaxFunction`.

    Example:
        >>> LogSoftmaxFunction.apply(torch.tensor([1.0, 2.0, 3.0]), 0, None)
        tensor([-2.4076, -1.4076, -0.4076])
    """

    @staticmethod
    def forward(input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return kernels.log_softmax_forward(input, dim, dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        grad = LogSoftmaxBackwardFunction.apply(grad_output, y, ctx.dim, ctx.input_dtype)
        return grad, None, None

    @staticmethod
    @_of_any_order
    def jvp(ctx: Any, saved: list[Tensor], tangent: Tensor, *_: None) -> Tensor:
        (y,) = saved
        tangent = tangent.to(y.dtype)
        return tangent - _sum(tangent * y.exp(), ctx.dim)


class LogSoftmaxBackwardFunction(_BackwardFunction):
    """``LogSoftmaxBackwardFunction.apply(grad_output, output, dim, input_dtype)``, the gradient.

    For the rest as :class:`SoftmaxBackwardFunction`.

    Source: as :class:`SoftmaxFunction`.

    Example:
        >>> y = torch.tensor([0.25, 0.75]).log().requires_grad_()
        >>> LogSoftmaxBackwardFunction.apply(torch.tensor([1.0, 0.0]), y, 0, torch.float32)
        tensor([ 0.7500, -0.7500], grad_fn=<LogSoftmaxBackwardFunctionBackward>)
    """

    @staticmethod
    def forward(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        return kernels.log_softmax_backward(grad_output, output, dim, input_dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (g, y), dim = ctx.saved_tensors, ctx.dim
        v = v.to(y.dtype)
        weighted = v * y.exp()
        return v - _sum(weighted, dim), -weighted * _sum(g, dim), None, None

    @staticmethod
    @_of_any_order
    def jvp(
        ctx: Any, saved: list[Tensor], tangent_g: Tensor, tangent_y: Tensor, *_: None
    ) -> Tensor:
        (g, y), dim = saved, ctx.dim
        by_g = LogSoftmaxBackwardFunction.apply(tangent_g, y, dim, y.dtype)
        by_y = tangent_y * y.exp() * _sum(g, dim)
        return (by_g - by_y).to(ctx.input_dtype)
