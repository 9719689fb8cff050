"""What softmax may be asked to do to its input first, and rows that lie along several dims.

A row of scores x becomes softmax(softcap * tanh(x * scale / softcap) + mask), beside a sink that
takes a share of the row and has no place in the result. All of it is one call of the kernels.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function
from typing_extensions import Unpack

from softmax_ext._in_graph import in_graph
from softmax_ext._loader import load

_C = load()

__all__ = ["Scores", "logsumexp"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Scores(TypedDict, total=False):
    """The keyword-only arguments of what takes scores, as :func:`softmax_ext.softmax` explains."""

    scale: float | Tensor | None
    temperature: float | Tensor | None
    softcap: float | None
    mask: Tensor | None
    is_causal: bool
    causal_offset: int | None
    window: tuple[int, int] | None
    sink: float | Tensor | None


_DEFAULTS = {**dict.fromkeys(Scores.__annotations__), "is_causal": False}
OPS = {"softmax": 0, "log_softmax": 1, "logsumexp": 2}  # as the kernels number them


def with_scores(function: _Function) -> _Function:
    """Shows the names of `Scores` in the signature, where the function has ``**scores``.

    One dict costs a call without any of them less than eight defaults do.
    """
    signature = inspect.signature(function, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    names = [
        inspect.Parameter(name, keyword, default=_DEFAULTS[name], annotation=hint)
        for name, hint in get_type_hints(Scores).items()
    ]
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*parameters, *names])  # type: ignore[attr-defined]
    return function


# What the kernels take beside the input, in their order: scale, factor, softcap, mask, left, right,
# offset, sink, sink_value.
_Arguments = tuple[Tensor | None, float, float, Tensor | None, int, int, int, Tensor | None, float]


class _Rows(NamedTuple):
    """Where the rows lie in a tensor of this shape: along these dims, in ascending order."""

    shape: Sequence[int]
    dims: tuple[int, ...]
    are_last: bool  # along the last dim

    @property
    def are_neighbours(self) -> bool:
        return self.dims == tuple(range(self.dims[0], self.dims[-1] + 1))

    @property
    def order(self) -> list[int]:
        return [d for d in range(len(self.shape)) if d not in self.dims] + list(self.dims)

    def to_last(self, tensor: Tensor) -> Tensor:
        """One that broadcasts to this shape, with the rows along its last dim: a view if it can be.

        It is expanded over the dims of a row only, and over these only where it has more than one
        element of a row.
        """
        if self.are_last:
            return tensor
        if not self.shape:
            return tensor.reshape(1)
        tensor = tensor[(None,) * (len(self.shape) - tensor.dim())]
        if any(tensor.size(d) != 1 for d in self.dims):
            along = {d: self.shape[d] for d in self.dims}
            tensor = tensor.expand([along.get(d, size) for d, size in enumerate(tensor.shape)])
        return tensor.permute(self.order).flatten(-len(self.dims))

    def from_last(self, tensor: Tensor) -> Tensor:
        """The inverse, of a tensor of this shape."""
        if self.are_last:
            return tensor
        if not self.shape:
            return tensor.view(())
        order = self.order
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return tensor.reshape([self.shape[d] for d in order]).permute(inverse).contiguous()

    def reduced(self, tensor: Tensor, keepdim: bool) -> Tensor:
        """A number a row, of size 1 at the last dim, as a reduction over the dims returns it."""
        sizes = [1 if d in self.dims else size for d, size in enumerate(self.shape)]
        return tensor.reshape(
            sizes if keepdim else [s for d, s in enumerate(sizes) if d not in self.dims]
        )


def _type_error(name: str, argument: str, expected: str, value: object) -> TypeError:
    return TypeError(
        f"{name}(): argument '{argument}' must be {expected}, not {type(value).__name__}"
    )


def _is_int(value: object) -> bool:
    """Or a number of NumPy's or a tensor that Python takes for an index, as torch does."""
    return type(value) is int or (hasattr(value, "__index__") and not isinstance(value, bool))


def _index(value: Any) -> int:
    """Not of what is an int already, which may be a symbol of a graph."""
    return value if type(value) is int else operator.index(value)


def _rows(name: str, input: Tensor, dim: Any) -> _Rows:
    shape = input.shape
    rank = len(shape) or 1
    dims: list[int] = []
    for each in dim if isinstance(dim, tuple) else (dim,):
        if not _is_int(each):
            raise _type_error(name, "dim", "int or tuple of ints", each)
        each = _index(each)
        if not -rank <= each < rank:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], "
                f"but got {each})"
            )
        index = each % rank
        if index in dims:
            raise RuntimeError(f"dim {index} appears multiple times in the list of dims")
        dims.append(index)
    dims = sorted(dims or range(rank))
    return _Rows(shape, tuple(dims), dims == [len(shape) - 1])


def _is_number(value: object) -> bool:
    return type(value) in (float, int) or (isinstance(value, Real) and not isinstance(value, bool))


def _check_shape(
    name: str,
    argument: str,
    tensor: Tensor,
    rows: _Rows,
    *,
    along_row: bool = False,
    shown: Sequence[int] | None = None,
) -> None:
    """That it broadcasts to the input; unless `along_row`, with one number a row.

    The kernels check it too: here it is for what is moved, or has another form there.
    """
    allowed = [1 if not along_row and d in rows.dims else s for d, s in enumerate(rows.shape)]
    skipped = len(allowed) - tensor.dim()
    if skipped < 0 or any(
        size not in (1, allow) for size, allow in zip(tensor.shape, allowed[skipped:], strict=True)
    ):
        raise RuntimeError(
            f"{name}(): argument '{argument}' of shape {list(shown or tensor.shape)} cannot be "
            f"broadcast to 'input' of shape {list(rows.shape)}"
            + (" with one number for each row" if not along_row else "")
        )


def _scale(name: str, scores: Scores, rows: _Rows) -> tuple[Tensor | None, float]:
    scale, temperature = scores.get("scale"), scores.get("temperature")
    if temperature is not None:
        if scale is not None:
            raise ValueError(f"{name}(): expected scale or temperature, but got both")
        return _inverse(name, temperature, rows)
    if isinstance(scale, Tensor):
        if not rows.are_last:
            _check_shape(name, "scale", scale, rows)
        return rows.to_last(scale), 1.0
    if scale is None or not _is_number(scale):
        raise _type_error(name, "scale", "float or Tensor", scale)
    return None, float(scale)


def _inverse(name: str, temperature: Any, rows: _Rows) -> tuple[Tensor | None, float]:
    message = f"{name}(): expected a temperature above 0"
    if not isinstance(temperature, Tensor):
        if not _is_number(temperature):
            raise _type_error(name, "temperature", "float or Tensor", temperature)
        if not temperature > 0:
            raise ValueError(f"{message}, but got {temperature}")
        return None, 1.0 / temperature
    _check_shape(name, "temperature", temperature, rows)
    if not temperature.is_floating_point():
        raise TypeError(
            f"{name}(): expected argument 'temperature' of a floating dtype, "
            f"but got {temperature.dtype}"
        )
    checked: Tensor = _above_0(temperature, message)
    return rows.to_last(checked.double().reciprocal()), 1.0


@in_graph
def _above_0(tensor: Tensor, message: str) -> Tensor:
    """The tensor itself. Values that cannot be read at no cost, those of a graph or of another
    device, are asserted where they are computed."""
    values = tensor.detach()
    while torch._C._functorch.is_functorch_wrapped_tensor(values):
        values = torch._C._functorch.get_unwrapped(values)
    are_above = (values > 0).all()
    traced = type(are_above) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
    if traced or values.device.type != "cpu":
        torch._assert_async(are_above, message)
    elif not are_above:
        raise ValueError(f"{message}, but got {values}")
    return tensor


def _softcap(name: str, softcap: Any) -> float:
    if not _is_number(softcap):
        raise _type_error(name, "softcap", "float", softcap)
    if not 0 < softcap < math.inf:
        raise ValueError(f"{name}(): expected a finite softcap above 0, but got {softcap}")
    return float(softcap)


def _mask(name: str, mask: Any, rows: _Rows) -> Tensor:
    if not isinstance(mask, Tensor):
        raise _type_error(name, "mask", "Tensor", mask)
    if not rows.are_last:
        _check_shape(name, "mask", mask, rows, along_row=True)
    return rows.to_last(mask)


def _band(name: str, scores: Scores, rows: _Rows) -> tuple[int, int, int]:
    """How many keys to the left and to the right of a query's own take part, and which is its own:
    of query q the key q + offset."""
    is_causal, offset = scores.get("is_causal", False), scores.get("causal_offset")
    window: Any = scores.get("window")
    if type(is_causal) is not bool:
        raise _type_error(name, "is_causal", "bool", is_causal)
    if offset is not None and not _is_int(offset):
        raise _type_error(name, "causal_offset", "int", offset)
    left, right = -1, -1
    if window is not None:
        if not isinstance(window, (tuple, list)) or not all(map(_is_int, window)):
            raise _type_error(name, "window", "tuple of two ints", window)
        if len(window) != 2 or min(window) < -1:
            raise ValueError(
                f"{name}(): expected a window of two ints, each -1 or more, but got {window}"
            )
        left, right = map(_index, window)
    if is_causal:
        right = 0
    elif window is None:
        if offset is not None:
            raise ValueError(f"{name}(): causal_offset needs is_causal=True or a window")
        return left, right, 0
    if len(rows.shape) < 2 or not rows.are_last:
        raise ValueError(
            f"{name}(): is_causal and window need an input of two dims or more, with dim the last "
            f"of them, but got an input of {len(rows.shape)} dims with dim {rows.dims}"
        )
    queries, keys = rows.shape[-2:]
    return left, right, keys - queries if offset is None else _index(offset)


def _sink(name: str, sink: Any, rows: _Rows) -> tuple[Tensor | None, float]:
    if not isinstance(sink, Tensor):
        if not _is_number(sink):
            raise _type_error(name, "sink", "float or Tensor", sink)
        return None, float(sink)
    shown = sink.shape
    if sink.dim() == 1 and rows.are_last and len(rows.shape) >= 3:
        sink = sink.view(-1, 1, 1)  # one of each head
    _check_shape(name, "sink", sink, rows, shown=shown)
    return rows.to_last(sink), -math.inf


def _arguments(name: str, rows: _Rows, scores: Scores) -> _Arguments:
    """For the input as `rows.to_last` has it."""
    scale, factor, softcap, mask = None, 1.0, 0.0, None
    left, right, offset = -1, -1, 0
    sink, sink_value = None, -math.inf
    if "scale" in scores or "temperature" in scores:
        scale, factor = _scale(name, scores, rows)
    if "softcap" in scores:
        softcap = _softcap(name, scores["softcap"])
    if "mask" in scores:
        mask = _mask(name, scores["mask"], rows)
    if "is_causal" in scores or "window" in scores or "causal_offset" in scores:
        left, right, offset = _band(name, scores, rows)
    if "sink" in scores:
        sink, sink_value = _sink(name, scores["sink"], rows)
    return (scale, factor, softcap, mask, left, right, offset, sink, sink_value)


def given(name: str, scores: Scores) -> Scores:
    """Without those that are as if they were not there."""
    if not scores.keys() <= _DEFAULTS.keys():
        unknown = next(each for each in scores if each not in _DEFAULTS)
        raise TypeError(
            f"{name}() got an unexpected keyword argument '{unknown}'; of scores it takes "
            + ", ".join(_DEFAULTS)
        )
    return {k: v for k, v in scores.items() if v is not _DEFAULTS[k]}  # type: ignore[return-value]


def _check_input(name: str, input: Any) -> None:
    if not isinstance(input, Tensor):
        raise _type_error(name, "input", "Tensor", input)


def _check_out(
    name: str, input: Tensor, dtype: torch.dtype | None, out: Any, scores: Scores
) -> None:
    """`dtype`: the one that it must have. None: any floating one."""
    if not isinstance(out, Tensor):
        raise _type_error(name, "out", "Tensor", out)
    if dtype is None and not out.is_floating_point():
        raise RuntimeError(
            f"{name}(): Expected floating point type for result tensor, but got: {out.dtype}"
        )
    if dtype is not None and out.dtype != dtype:
        raise RuntimeError(
            f"{name}(): expected argument 'out' to have dtype {dtype}, but got {out.dtype}"
        )
    if out.device != input.device:
        raise RuntimeError(
            f"{name}(): expected argument 'out' on {input.device} like 'input', "
            f"but got {out.device}"
        )
    tensors = [each for each in (input, out, *scores.values()) if isinstance(each, Tensor)]
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        raise RuntimeError(
            f"{name}(): functions with out=... arguments don't support automatic differentiation, "
            "but one of the arguments requires grad."
        )


def _copied(result: Tensor, out: Tensor) -> Tensor:
    """Into `out`, which torch resizes with its warning and checks for overlap."""
    return torch.mul(result, 1, out=out)


def overriding(input: Any, scores: Scores) -> tuple[Any, ...]:
    """The tensors among these, if one is of a class that overrides torch's functions."""
    tensors = (input, *(each for each in scores.values() if isinstance(each, Tensor)))
    return tensors if has_torch_function(tensors) else ()


def is_of_kernels(input: Tensor) -> bool:
    """Whether Dynamo's graph is to have this package's operator for a call with this input.

    It has torch's where the graph is exported, to run without this package, and for subclasses.
    """
    return (
        type(input) in (Tensor, torch.nn.Parameter)
        and input.device.type in ("cpu", "cuda")
        # is_exporting() returns this, but is always True to the Dynamo of torch 2.11.
        and not torch.compiler._is_exporting_flag
    )


@in_graph
def _by_torch(*arguments: Any) -> Tensor:
    """Such that a program that is exported has the operators of torch that it is composed of."""
    composed = torch.ops.softmax_ext.score_softmax_by_torch.default
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    with torch._C.DisableTorchFunction():  # a mode of torch.export would record one operator
        return composed._op_dk(key, *arguments)[0]  # type: ignore[no-any-return]


def _computed(name: str, input: Tensor, dtype: torch.dtype | None, arguments: _Arguments) -> Tensor:
    call = (OPS[name], input, dtype, *arguments)
    if torch.compiler._is_exporting_flag:
        return _by_torch(*call)
    if is_dynamo_compiling():
        operators = torch.ops.softmax_ext
        of_kernels = is_of_kernels(input)
        entry = operators.score_softmax if of_kernels else operators.score_softmax_by_torch
        return entry(*call)[0]  # type: ignore[no-any-return]
    return _C.score_softmax(*call)  # type: ignore[no-any-return]


def softmax_of_scores(
    name: str,
    plain: Callable[[Tensor, int], Tensor],
    input: Tensor,
    dim: int | tuple[int, ...],
    dtype: torch.dtype | None,
    out: Tensor | None,
    scores: Scores,
) -> Tensor:
    """softmax or log_softmax, by this name; `plain`: of nothing but an input and a dim."""
    _check_input(name, input)
    scores = given(name, scores)
    rows = _rows(name, input, dim)
    arguments = _arguments(name, rows, scores)
    if out is not None:
        _check_out(name, input, dtype or input.dtype, out, scores)
    if scores:
        result = rows.from_last(_computed(name, rows.to_last(input), dtype, arguments))
    elif rows.are_neighbours:
        first, last = rows.dims[0], rows.dims[-1]
        result = plain(input.flatten(first, last), first).view(rows.shape)
    else:
        result = rows.from_last(plain(rows.to_last(input), -1))
    return result if out is None else _copied(result, out)


def softmax_of_scores_(
    name: str,
    plain: Callable[[Tensor, int], Tensor],
    input: Tensor,
    dim: int | tuple[int, ...],
    scores: Scores,
) -> Tensor:
    """The same in the input's memory. `name` is that without the underscore."""
    _check_input(name + "_", input)
    scores = given(name + "_", scores)
    rows = _rows(name + "_", input, dim)
    traced = is_dynamo_compiling() or torch.compiler._is_exporting_flag
    if scores and rows.are_last and not traced:
        _C.score_softmax_(OPS[name], input, *_arguments(name + "_", rows, scores))
        return input
    return input.copy_(softmax_of_scores(name, plain, input, dim, None, None, scores))


@with_scores
def logsumexp(
    input: Tensor,
    dim: int | tuple[int, ...],
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    **scores: Unpack[Scores],
) -> Tensor:
    r"""log(sum(exp(x))) over `dim`: torch.logsumexp by a fused kernel.

    It is computed as max(x) + log(sum(exp(x - max(x)))), in float32 (float64 for float64), and
    rounded once.

    Args:
        input: of any shape; float16, bfloat16, float32 or float64, or an integer dtype, which
            becomes torch's default dtype, as in torch.logsumexp.
        dim: over which to sum, or a tuple of them; () is all.
        keepdim: whether the result has these dims, of size 1.
        dtype: of the result, floating. The input is rounded to it first, within the kernel.
        out: where to write the result; resized if its shape is another.
        scores: scale, temperature, softcap, mask, is_causal, causal_offset, window and sink, as
            in :func:`softmax_ext.softmax`. A sink adds its exp to the sum.

    Returns:
        A contiguous tensor of the input's shape without the dims; `out` if that is given.

    Raises:
        IndexError, RuntimeError, TypeError, ValueError: as :func:`softmax_ext.softmax`.
        NotImplementedError: the input is complex.

    Source: torch.logsumexp.

    Example:
        >>> logsumexp(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), dim=1)
        tensor([3.4076, 1.0986])
        >>> logsumexp(torch.zeros(2, 3), dim=1, mask=torch.tensor([True, True, False]))
        tensor([0.6931, 0.6931])
    """
    name = "logsumexp"
    overridden = () if is_dynamo_compiling() else overriding(input, scores)
    if overridden:
        return handle_torch_function(
            logsumexp, overridden, input, dim, keepdim, dtype=dtype, out=out, **scores
        )
    _check_input(name, input)
    if type(keepdim) is not bool:
        raise _type_error(name, "keepdim", "bool", keepdim)
    scores = given(name, scores)
    rows = _rows(name, input, tuple(dim) if isinstance(dim, list) else dim)
    arguments = _arguments(name, rows, scores)
    if dtype is None and not (input.is_floating_point() or input.is_complex()):
        dtype = torch.get_default_dtype()
    if out is not None:
        _check_out(name, input, None, out, scores)
    result = rows.reduced(_computed(name, rows.to_last(input), dtype, arguments), keepdim)
    return result if out is None else _copied(result, out)
