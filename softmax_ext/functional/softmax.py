"""softmax, log_softmax and softmin with the signatures of torch.nn.functional, and in place.

What scores.py adds, scores and a dim that is a tuple, leaves each function by one test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary
from typing_extensions import Unpack

from softmax_ext._loader import load
from softmax_ext.functional.scores import (
    Scores,
    is_of_kernels,
    overriding,
    softmax_of_scores,
    softmax_of_scores_,
    with_scores,
)

_C = load()

__all__ = ["log_softmax", "log_softmax_", "softmax", "softmax_", "softmin", "softmin_"]

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def _implicit_dim(ndim: int) -> int:
    """The dim that torch.nn.functional takes where none is given."""
    return 0 if ndim in (0, 1, 3) else 1


def _implicit_dim_warned(name: str, ndim: int, stacklevel: int) -> int:
    warnings.warn(
        f"Implicit dimension choice for {name} has been deprecated. "
        "Change the call to include dim=X as an argument.",
        stacklevel=stacklevel,
    )
    return _implicit_dim(ndim)


def _traced(
    name: str,
    input: Tensor,
    dim: int | tuple[int, ...] | None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    scores: Scores | None = None,
) -> Tensor:
    """A call that Dynamo makes part of a graph: this package's operator of this name, or torch's.

    torch's where the graph is exported, to run without this package, and for what Dynamo traces in
    torch's functions alone: subclasses, and a dim that is a tensor or a number of NumPy's. A graph
    cannot warn of an implicit dim.
    """
    if dim is None:
        dim = _implicit_dim(input.dim())
    if scores or type(dim) is tuple:

        def plain(input: Tensor, dim: int) -> Tensor:
            return _traced(name, input, dim, dtype)

        return softmax_of_scores(name, plain, input, dim, dtype, out, scores or {})
    if type(dim) is int and out is None and is_of_kernels(input):
        return getattr(torch.ops.softmax_ext, name)(input, dim, dtype)  # type: ignore[no-any-return]
    return getattr(torch, name)(input, dim, dtype=dtype, out=out)  # type: ignore[no-any-return]


def _untraced(
    function: Callable[..., Tensor],
    input: Tensor,
    dim: int | tuple[int, ...],
    dtype: torch.dtype | None,
    out: Tensor | None,
    scores: Scores,
) -> Tensor:
    """A call of this function with scores, or a dim that is a tuple."""
    name = function.__name__
    overridden = overriding(input, scores)
    if overridden:
        return handle_torch_function(
            function, overridden, input, dim=dim, dtype=dtype, out=out, **scores
        )

    def plain(input: Tensor, dim: int) -> Tensor:
        return getattr(_C, name)(input, dim, dtype, None)  # type: ignore[no-any-return]

    return softmax_of_scores(name, plain, input, dim, dtype, out, scores)


def _untraced_(
    function: Callable[..., Tensor], input: Tensor, dim: int | tuple[int, ...], scores: Scores
) -> Tensor:
    """The same of a function in place."""
    name = function.__name__.rstrip("_")
    overridden = overriding(input, scores)
    if overridden:
        return handle_torch_function(function, overridden, input, dim=dim, **scores)

    def plain(input: Tensor, dim: int) -> Tensor:
        return getattr(_C, name)(input, dim, None, None)  # type: ignore[no-any-return]

    return softmax_of_scores_(name, plain, input, dim, scores)


def _as_scripted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of torch.nn.functional with the arguments that can be scripted of ours."""

    def scripted(
        input: Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        return function(input, dim, _stacklevel, dtype)

    return scripted


def _as_scripted_in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scripted(input: Tensor, dim: int | None = None, _stacklevel: int = 3) -> Tensor:
        return input.copy_(function(input, dim, _stacklevel))

    return scripted


def _scripted_by(scripted: Callable[..., Tensor]) -> Callable[[_Function], _Function]:
    """torch.jit.script compiles `scripted` for the function decorated.

    A binding cannot be scripted, nor can keyword-only arguments; and a program of torch's operators
    loads without this package.
    """

    def decorate(function: _Function) -> _Function:
        function.__prepare_scriptable__ = lambda: scripted  # type: ignore[attr-defined]
        return function

    return decorate


@with_scores
@_scripted_by(_as_scripted(torch.nn.functional.softmax))
def softmax(
    input: Tensor,
    dim: int | tuple[int, ...] | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    **scores: Unpack[Scores],
) -> Tensor:
    r"""exp(x) / sum(exp(x)) over `dim`: torch.nn.functional.softmax by a fused kernel.

    Every slice along `dim` is scaled to sum to 1. It is computed as exp(x - max(x)) / sum, in
    float32 (float64 for float64), and rounded once.

    Args:
        input: of any shape; float16, bfloat16, float32 or float64, or another dtype together with
            the argument `dtype`. On the CPU, or on a CUDA device where the build has kernels for
            it; a tensor that the kernels do not take goes to torch's own operator.
        dim: of which the slices sum to 1, from -input.ndim to input.ndim - 1; or a tuple of dims,
            over all of which together they do, () being all. Without it, torch's implicit choice,
            with its warning.
        dtype: of the result, floating. The input is rounded to it first, within the kernel.
        out: where to write the result, as in torch.softmax; resized if its shape is another.

    With x the input, what is below makes it softcap * tanh(x * scale / softcap) + mask first. Each
    tensor has a gradient, may be of another floating dtype than the input, and is broadcast to the
    input without being expanded in memory.

    Args:
        scale: a float, or a tensor of size 1 at `dim`: a number for each row, head or batch.
        temperature: 1 / scale, above 0; instead of it.
        softcap: above 0, as in Gemma 2: no score is beyond it.
        mask: bool, of which True takes part, or floating and added.
        is_causal: whether a query, a place in the dim before the last, takes only the keys, the
            places in the last dim, up to its own: those up to query + causal_offset.
        causal_offset: by default keys - queries, so that the last query takes all keys, as in
            FlashAttention. torch.nn.functional.scaled_dot_product_attention has 0.
        window: (left, right): how many keys before its own a query takes, and how many behind; -1
            is all. With `is_causal` none behind.
        sink: of each row, a score that takes its share and has no place in the result: a float, a
            tensor of size 1 at `dim`, or of shape (heads,) where the input is
            (..., heads, queries, keys).

    With a mask, is_causal or a window a row of which nothing takes part is 0, and what has a score
    of -inf takes no part: its result is 0, of log_softmax -inf, and its gradient is 0.

    Returns:
        A contiguous tensor of the input's shape, on its device; `out` if that is given.

    Raises:
        IndexError: `dim` is out of range.
        NotImplementedError: the result's dtype is not one of the four.
        TypeError: an argument is of the wrong type or dtype, or of a name that is unknown.
        RuntimeError: `out` has another dtype or device, overlaps the input in part, or a gradient
            is asked for; a dim is there twice; a mask, scale, temperature or sink is on another
            device or does not broadcast.
        ValueError: both scale and temperature; a temperature or a softcap that is not above 0;
            is_causal or a window where `dim` is not the last of two or more; a window of less
            than -1.

    Source: torch.nn.functional.softmax and torch.softmax; Milakov and Gimelshein, "Online
    normalizer calculation for softmax", arXiv 1805.02867. For the sink, "gpt-oss-120b & gpt-oss-20b
    Model Card", arXiv 2508.10925; for the softcap, "Gemma 2", arXiv 2408.00118.

    Example:
        >>> softmax(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([0.0900, 0.2447, 0.6652])
        >>> softmax(torch.tensor([1.0, 2.0, 3.0]), dim=0, temperature=2.0)
        tensor([0.1863, 0.3072, 0.5065])
        >>> softmax(torch.zeros(2, 3), dim=-1, is_causal=True)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])
    """
    if is_dynamo_compiling():
        return _traced("softmax", input, dim, dtype, out, scores)
    if has_torch_function_unary(input):
        return handle_torch_function(
            softmax,
            (input,),
            input,
            dim=dim,
            _stacklevel=_stacklevel,
            dtype=dtype,
            out=out,
            **scores,
        )
    if dim is None:
        dim = _implicit_dim_warned("softmax", input.dim(), _stacklevel)
    if scores or type(dim) is tuple:
        return _untraced(softmax, input, dim, dtype, out, scores)
    return _C.softmax(input, dim, dtype, out)  # type: ignore[no-any-return]


@with_scores
@_scripted_by(_as_scripted(torch.nn.functional.log_softmax))
def log_softmax(
    input: Tensor,
    dim: int | tuple[int, ...] | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    **scores: Unpack[Scores],
) -> Tensor:
    r"""x - log(sum(exp(x))) over `dim`: torch.nn.functional.log_softmax by a fused kernel.

    It is computed as (x - max(x)) - log(sum(exp(x - max(x)))), in float32 (float64 for float64),
    and rounded once. Arguments, result and errors are those of :func:`softmax`.

    Source: torch.nn.functional.log_softmax and torch.log_softmax.

    Example:
        >>> log_softmax(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([-2.4076, -1.4076, -0.4076])
    """
    if is_dynamo_compiling():
        return _traced("log_softmax", input, dim, dtype, out, scores)
    if has_torch_function_unary(input):
        return handle_torch_function(
            log_softmax,
            (input,),
            input,
            dim=dim,
            _stacklevel=_stacklevel,
            dtype=dtype,
            out=out,
            **scores,
        )
    if dim is None:
        dim = _implicit_dim_warned("log_softmax", input.dim(), _stacklevel)
    if scores or type(dim) is tuple:
        return _untraced(log_softmax, input, dim, dtype, out, scores)
    return _C.log_softmax(input, dim, dtype, out)  # type: ignore[no-any-return]


@_scripted_by(_as_scripted(torch.nn.functional.softmin))
def softmin(
    input: Tensor,
    dim: int | tuple[int, ...] | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    r"""exp(-x) / sum(exp(-x)) over `dim`: torch.nn.functional.softmin by a fused kernel.

    It is ``softmax(-input)``. Arguments, result and errors are those of :func:`softmax`.

    Source: torch.nn.functional.softmin.

    Example:
        >>> softmin(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([0.6652, 0.2447, 0.0900])
    """
    if is_dynamo_compiling():
        return _traced("softmax", -input, dim, dtype, out)
    if has_torch_function_unary(input):
        return handle_torch_function(
            softmin, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype, out=out
        )
    if dim is None:
        dim = _implicit_dim_warned("softmin", input.dim(), _stacklevel)
    if type(dim) is tuple:
        return _untraced(softmax, -input, dim, dtype, out, {})
    return _C.softmax(-input, dim, dtype, out)  # type: ignore[no-any-return]


@with_scores
@_scripted_by(_as_scripted_in_place(torch.nn.functional.softmax))
def softmax_(
    input: Tensor,
    dim: int | tuple[int, ...] | None = None,
    _stacklevel: int = 3,
    **scores: Unpack[Scores],
) -> Tensor:
    """:func:`softmax` in the input's own memory.

    The output is all that the gradient needs, so a forward and a backward pass take two tensors of
    the input's size beside it: the output's gradient and the input's. For the gradient with a
    softcap, or of a scale that is a tensor, the input is kept as well, which takes one more.

    Args:
        input: of any shape and layout; float16, bfloat16, float32 or float64. It is overwritten.
        dim: of which the slices sum to 1, as in :func:`softmax`.
        scores: scale, temperature, softcap, mask, is_causal, causal_offset, window and sink, as in
            :func:`softmax`.

    Returns:
        `input`.

    Raises:
        RuntimeError: `input` is a leaf that requires a gradient, or a view of one, or an expanded
            tensor: what torch forbids to any in-place operation.
        IndexError, NotImplementedError, TypeError: as :func:`softmax`.

    Source: torch's in-place operations, https://pytorch.org/docs/stable/notes/autograd.html.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> softmax_(x, dim=0) is x
        True
        >>> x
        tensor([0.0900, 0.2447, 0.6652])
    """
    if is_dynamo_compiling():
        return input.copy_(_traced("softmax", input, dim, scores=scores))
    if has_torch_function_unary(input):
        return handle_torch_function(
            softmax_, (input,), input, dim=dim, _stacklevel=_stacklevel, **scores
        )
    if dim is None:
        dim = _implicit_dim_warned("softmax_", input.dim(), _stacklevel)
    if scores or type(dim) is tuple:
        return _untraced_(softmax_, input, dim, scores)
    return _C.softmax_(input, dim)  # type: ignore[no-any-return]


@with_scores
@_scripted_by(_as_scripted_in_place(torch.nn.functional.log_softmax))
def log_softmax_(
    input: Tensor,
    dim: int | tuple[int, ...] | None = None,
    _stacklevel: int = 3,
    **scores: Unpack[Scores],
) -> Tensor:
    """:func:`log_softmax` in the input's own memory; for the rest as :func:`softmax_`.

    Source: torch's in-place operations, https://pytorch.org/docs/stable/notes/autograd.html.

    Example:
        >>> log_softmax_(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([-2.4076, -1.4076, -0.4076])
    """
    if is_dynamo_compiling():
        return input.copy_(_traced("log_softmax", input, dim, scores=scores))
    if has_torch_function_unary(input):
        return handle_torch_function(
            log_softmax_, (input,), input, dim=dim, _stacklevel=_stacklevel, **scores
        )
    if dim is None:
        dim = _implicit_dim_warned("log_softmax_", input.dim(), _stacklevel)
    if scores or type(dim) is tuple:
        return _untraced_(log_softmax_, input, dim, scores)
    return _C.log_softmax_(input, dim)  # type: ignore[no-any-return]


@_scripted_by(_as_scripted_in_place(torch.nn.functional.softmin))
def softmin_(
    input: Tensor,
    dim: int | tuple[int, ...] | None = None,
    _stacklevel: int = 3,
) -> Tensor:
    """:func:`softmin` in the input's own memory; for the rest as :func:`softmax_`.

    Source: torch's in-place operations, https://pytorch.org/docs/stable/notes/autograd.html.

    Example:
        >>> softmin_(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([0.6652, 0.2447, 0.0900])
    """
    if is_dynamo_compiling():
        return input.copy_(_traced("softmax", -input, dim))
    if has_torch_function_unary(input):
        return handle_torch_function(softmin_, (input,), input, dim=dim, _stacklevel=_stacklevel)
    if dim is None:
        dim = _implicit_dim_warned("softmin_", input.dim(), _stacklevel)
    if type(dim) is tuple:
        return input.copy_(softmin(input, dim))
    return _C.softmin_(input, dim)  # type: ignore[no-any-return]
