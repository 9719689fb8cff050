"""What `python -m benchmarks cpu --set segments` measures: against the compositions in use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import softmax_ext
from benchmarks.common import DTYPES, Run, make_run
from benchmarks.softmax_cpu_cases import Case

# (elements, heads), and how many segments: graphs of some sizes, and long rows.
SHAPES = [
    ((100_000, 1), 10_000),
    ((100_000, 8), 10_000),
    ((1_000_000, 1), 100_000),
    ((1_000_000, 8), 100_000),
    ((300_000, 32), 10_000),
    ((1_000_000, 8), 1_000),
]
WAYS = ("ptr", "index", "unsorted index")
OPS = {
    "softmax": softmax_ext.segment_softmax,
    "log_softmax": softmax_ext.segment_log_softmax,
}
MODES = ("forward", "recorded", "backward", "both")
PEERS = ("scatter", "segment_reduce")


@dataclass(frozen=True)
class SegmentCase(Case):
    segments: int

    @property
    def bytes(self) -> int:
        """Without those of what names the segments."""
        tensors = {"backward": 3, "both": 5}.get(self.mode, 2)
        return tensors * math.prod(self.shape) * DTYPES[self.dtype].itemsize


def cases(
    threads: Iterable[int], dtypes: Iterable[str], ops: Iterable[str], modes: Iterable[str]
) -> list[Case]:
    return [
        SegmentCase(op, mode, shape, 0, way, dtype, count, segments)
        for count, (shape, segments), way, dtype, op, mode in itertools.product(
            threads, SHAPES, WAYS, dtypes, ops, modes
        )
        if mode in MODES
    ]


def from_sums(
    op: str, x: Tensor, spread: Callable[[Tensor], Tensor], max: Tensor, sum: Callable[..., Tensor]
) -> Tensor:
    shifted = x - spread(max)
    e = shifted.exp()
    return e / spread(sum(e)) if op == "softmax" else shifted - spread(sum(e).log())


def by_scatter(op: str, index: Tensor, segments: int, x: Tensor) -> Tensor:
    """The composition of torch_geometric.utils.softmax for an index."""
    index = index[:, None].expand_as(x)
    empty = x.new_zeros(segments, x.size(1))
    max = (empty - math.inf).scatter_reduce(0, index, x.detach(), "amax")
    return from_sums(
        op, x, lambda s: s.gather(0, index), max, lambda e: empty.scatter_add(0, index, e)
    )


def by_segment_reduce(op: str, ptr: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """The same of pointers, with torch's reduction over those."""
    reduce = partial(torch.segment_reduce, offsets=ptr, axis=0)
    return from_sums(
        op, x, lambda s: s[index], reduce(x.detach(), "max"), lambda e: reduce(e, "sum")
    )


def contenders(case: SegmentCase, device: str = "cpu") -> dict[str, Run]:
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    x, grad = (torch.randn(case.shape, device=device).to(dtype) for _ in range(2))
    index = torch.randint(case.segments, case.shape[:1], device=device)
    if case.layout != "unsorted index":
        index = index.sort().values
    ptr = torch.zeros(case.segments + 1, dtype=torch.int64, device=device)
    ptr[1:] = torch.bincount(index, minlength=case.segments).cumsum(0)
    named = {"ptr": ptr} if case.layout == "ptr" else {"index": index}
    functions = {
        "softmax_ext": lambda x, dim: OPS[case.op](x, **named, dim=dim, num_segments=case.segments),
        "scatter": lambda x, dim: by_scatter(case.op, index, case.segments, x),
    }
    if case.layout != "unsorted index":
        functions["segment_reduce"] = lambda x, dim: by_segment_reduce(case.op, ptr, index, x)
    return {name: make_run(f, case.mode, x, case.dim, grad) for name, f in functions.items()}
