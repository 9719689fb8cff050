"""The operations on segments as a loop over them in float64, and how exact they have to be."""

from collections.abc import Iterator

import torch
from tolerances import TOLERANCES, assert_within

import softmax_ext

OPS = {
    "softmax": softmax_ext.segment_softmax,
    "log_softmax": softmax_ext.segment_log_softmax,
    "logsumexp": softmax_ext.segment_logsumexp,
}

Elements = torch.Tensor | slice


def pointers(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def index_of(ptr: torch.Tensor) -> torch.Tensor:
    return torch.repeat_interleave(ptr.diff())


def shuffled(index: torch.Tensor) -> torch.Tensor:
    return index[torch.randperm(len(index))]


def elements(
    ptr: torch.Tensor | None, index: torch.Tensor | None, count: int | None
) -> Iterator[torch.Tensor]:
    """The numbers of the elements of each segment."""
    if ptr is not None:
        for begin, end in zip(ptr.tolist(), ptr.tolist()[1:], strict=False):
            yield torch.arange(begin, end)
        return
    assert index is not None
    if count is None:
        count = int(index.max()) + 1 if len(index) else 0
    for segment in range(count):
        yield (index == segment).nonzero().flatten()


def by_loop(
    op: str,
    x: torch.Tensor,
    dim: int,
    scale: float,
    ptr: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    num_segments: int | None = None,
) -> torch.Tensor:
    """Differentiable."""
    x = x * scale
    of_each = list(elements(ptr, index, num_segments))
    if op == "logsumexp":
        results = [x.index_select(dim, k).logsumexp(dim, keepdim=True) for k in of_each]
        empty = x.narrow(dim, 0, 0)
        return torch.cat([empty, *results], dim)
    result = torch.zeros_like(x)
    for k in of_each:
        if len(k) == 0:
            continue
        row = x.index_select(dim, k)
        shifted = row - row.detach().amax(dim, keepdim=True)
        e = shifted.exp()
        total = e.sum(dim, keepdim=True)  # in a tree, which torch.softmax does not sum by
        result = result.index_copy(dim, k, e / total if op == "softmax" else shifted - total.log())
    return result


def assert_close(
    actual: torch.Tensor,
    op: str,
    x: torch.Tensor,
    dim: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    **segments: torch.Tensor | int | None,
) -> None:
    """`actual` is op(x) within the table of tolerances."""
    assert actual.dtype == (dtype or x.dtype)
    assert actual.is_contiguous()
    tolerance = TOLERANCES[actual.dtype]
    wide = x.detach().cpu().to(actual.dtype).double()
    named = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in segments.items()}
    expected = by_loop(op, wide, dim, scale, **named)  # type: ignore[arg-type]
    # What the roundings of x * scale, and of its distance from the maximum, come to in the result.
    size = (wide * scale).abs().nan_to_num(0, posinf=0).amax() if wide.numel() else 0.0
    slack = 3 * tolerance.arithmetic * size
    if op == "softmax":
        allowed = tolerance.atol["softmax"] + (tolerance.rtol + slack) * expected.abs()
    else:
        allowed = tolerance.atol["log_softmax"] + tolerance.rtol * expected.abs() + slack
    assert_within(actual, expected, allowed)


def assert_gradient_close(
    actual: torch.Tensor,
    op: str,
    grad_output: torch.Tensor,
    x: torch.Tensor,
    dim: int = 0,
    scale: float = 1.0,
    **segments: torch.Tensor | int | None,
) -> None:
    """Of the gradient by autograd through the loop, from what the forward rounds its output to."""
    tolerance = TOLERANCES[x.dtype]
    leaf = x.detach().cpu().double().requires_grad_()
    named = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in segments.items()}
    y = by_loop(op, leaf, dim, scale, **named)  # type: ignore[arg-type]
    grad = grad_output.detach().cpu().double()
    (expected,) = torch.autograd.grad(y, leaf, grad)
    # The output is rounded once, and each sum is of terms no larger than these.
    rounding = 2 * torch.finfo(x.dtype).eps
    terms = grad.abs().amax().item() * abs(scale) if grad.numel() else 0.0
    longest = max((len(k) for k in elements(**{"count": None, **_named(named)})), default=0)
    size = (leaf.detach() * scale).abs().amax().item() if leaf.numel() else 0.0
    depth = {"softmax": 2.0, "log_softmax": 1.0 + longest**0.5, "logsumexp": 1.0 + size}[op]
    exponent = 4 * tolerance.arithmetic * size
    assert_within(
        actual, expected, (rounding + exponent) * terms * depth + rounding * expected.abs()
    )


def _named(segments: dict[str, torch.Tensor | int | None]) -> dict[str, torch.Tensor | int | None]:
    return {
        "ptr": segments.get("ptr"),
        "index": segments.get("index"),
        "count": segments.get("num_segments"),
    }
