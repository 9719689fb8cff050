"""softmax, log-softmax and logsumexp over segments: rows of different lengths in one tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext._loader import load

_C = load()

__all__ = ["segment_log_softmax", "segment_logsumexp", "segment_softmax"]


def _traced(
    name: str,
    input: Tensor,
    ptr: Tensor | None,
    index: Tensor | None,
    dim: int,
    scale: float | None,
    dtype: torch.dtype | None,
    num_segments: int | None,
) -> Tensor:
    """A call that Dynamo makes part of a graph: the operator, with what the binding does before."""
    input = input if dtype is None else input.to(dtype)
    scale = 1.0 if scale is None else float(scale)
    operator = getattr(torch.ops.softmax_ext, name)
    return operator(input, ptr, index, None, dim, scale, num_segments)  # type: ignore[no-any-return]


def _called(
    function: Callable[..., Tensor],
    input: Tensor,
    ptr: Tensor | None,
    index: Tensor | None,
    dim: int,
    scale: float | None,
    dtype: torch.dtype | None,
    num_segments: int | None,
) -> Tensor:
    """A call of this function: in a graph, by a class that overrides it, or by the kernels."""
    name = function.__name__
    if is_dynamo_compiling():
        return _traced(name, input, ptr, index, dim, scale, dtype, num_segments)
    if has_torch_function((input, ptr, index)):
        return handle_torch_function(
            function,
            (input, ptr, index),
            input,
            ptr,
            index,
            dim,
            scale=scale,
            dtype=dtype,
            num_segments=num_segments,
        )
    return getattr(_C, name)(input, ptr, index, dim, scale, dtype, num_segments)  # type: ignore[no-any-return]


def segment_softmax(
    input: Tensor,
    ptr: Tensor | None = None,
    index: Tensor | None = None,
    dim: int = 0,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    num_segments: int | None = None,
) -> Tensor:
    r"""exp(x) / sum(exp(x)) over each segment of `dim`: a softmax of rows of different lengths.

    The segments are given by `ptr`, by which they lie side by side, or by `index`, which names the
    segment of each element in any order: exactly one of the two. It is computed as
    exp(x - max(x)) / sum, in float32 (float64 for float64), and rounded once.

    Kernels read and write each element once, those of a long segment a second time. A result has
    the same bits for any number of threads, and on a CUDA device whatever other segments there
    are. An `index` that is not sorted is first sorted, stably; on a CUDA device one that is sorted
    too, which takes longer than all else: give `ptr` where it is known. There `index` without
    `num_segments` waits for the device, and nothing else does.

    Args:
        input: of any shape with at least one dim; float16, bfloat16, float32 or float64, or another
            dtype together with the argument `dtype`. Often (edges, heads).
        ptr: int32 or int64, of the shape (segments + 1,). Segment s has the elements ptr[s] to
            ptr[s + 1] - 1 along `dim`; ptr[0] is 0, and ptr[-1] is input.size(dim).
        index: int32 or int64, of the shape (input.size(dim),): the segment of each element.
        dim: of which the segments are, from -input.ndim to input.ndim - 1. All others are batched.
        scale: a factor of the input.
        dtype: of the result, floating. The input is rounded to it first.
        num_segments: how many there are, by default one more than the greatest in `index`.

    Returns:
        A contiguous tensor of the input's shape, on its device. Segments may be empty.

    Raises:
        ValueError: both of `ptr` and `index` are given, or neither; `num_segments` is negative, or
            not what `ptr` has.
        IndexError: `dim` is out of range, or a value of `index`.
        NotImplementedError: the result's dtype is not one of the four.
        TypeError: an argument is of the wrong type.
        RuntimeError: `ptr` or `index` has another dtype, shape or device; `ptr` falls, or does not
            go from 0 to input.size(dim). On a CUDA device values that are wrong fail later, as a
            device-side assertion.

    Source: torch_geometric.utils.softmax, torch.segment_reduce; Veličković et al., "Graph attention
    networks", arXiv 1710.10903.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0])
        >>> segment_softmax(x, ptr=torch.tensor([0, 3, 3, 5]))
        tensor([0.0900, 0.2447, 0.6652, 0.5000, 0.5000])
        >>> segment_softmax(x, index=torch.tensor([0, 1, 0, 1, 1]))
        tensor([0.1192, 0.0243, 0.8808, 0.4879, 0.4879])
    """
    return _called(segment_softmax, input, ptr, index, dim, scale, dtype, num_segments)


def segment_log_softmax(
    input: Tensor,
    ptr: Tensor | None = None,
    index: Tensor | None = None,
    dim: int = 0,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    num_segments: int | None = None,
) -> Tensor:
    r"""x - log(sum(exp(x))) over each segment of `dim`.

    Arguments, result and errors are those of :func:`segment_softmax`.

    Source: as :func:`segment_softmax`.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0])
        >>> segment_log_softmax(x, ptr=torch.tensor([0, 3, 3, 5]))
        tensor([-2.4076, -1.4076, -0.4076, -0.6931, -0.6931])
    """
    return _called(segment_log_softmax, input, ptr, index, dim, scale, dtype, num_segments)


def segment_logsumexp(
    input: Tensor,
    ptr: Tensor | None = None,
    index: Tensor | None = None,
    dim: int = 0,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    num_segments: int | None = None,
) -> Tensor:
    r"""log(sum(exp(x))) over each segment of `dim`.

    Arguments and errors are those of :func:`segment_softmax`. With `index`, torch.compile needs
    `num_segments`, the size of the result (otherwise a ValueError).

    Returns:
        A contiguous tensor of the input's shape, but of as many elements along `dim` as there are
        segments; -inf of one that is empty.

    Source: torch.logsumexp; for the rest as :func:`segment_softmax`.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0])
        >>> segment_logsumexp(x, ptr=torch.tensor([0, 3, 3, 5]))
        tensor([3.4076,   -inf, 5.6931])
    """
    return _called(segment_logsumexp, input, ptr, index, dim, scale, dtype, num_segments)
