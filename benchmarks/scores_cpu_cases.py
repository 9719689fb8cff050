"""What `python -m benchmarks cpu --set scores` measures: what models do before a softmax.

Each cell is one call of softmax_ext with arguments, against the operators of torch that models
write, and against our softmax of the same shape without arguments. Memory is warm: what is freed is
kept. Under "fresh" each call begins with no memory kept: its result's pages are new.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import softmax_ext
from benchmarks.common import DTYPES, Run
from benchmarks.softmax_cpu_cases import Case

Tensors = dict[str, torch.Tensor]
FRESH = ", fresh"


@dataclass(frozen=True)
class Cell:
    """`eager` and `ours` of the input and of the tensors; those in `learned` have a gradient."""

    name: str
    shape: tuple[int, ...]
    eager: Callable[..., torch.Tensor]
    ours: Callable[..., torch.Tensor]
    tensors: Callable[[], Tensors] = dict
    learned: tuple[str, ...] = ()

    @property
    def reduces(self) -> bool:
        return self.name == "logsumexp"


def _padding(*shape: int) -> Tensors:
    """0 and the lowest number of every 16-bit type, as models make masks."""
    return {"mask": torch.where(torch.rand(shape) < 0.1, -3e4, 0.0)}


def _hidden(x: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
    return ones.triu_(x.size(-1) - x.size(-2) + 1)


def _beside(x: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    column = sink.view(-1, 1, 1).expand(*x.shape[:-1], 1)
    return torch.softmax(torch.cat([x, column], -1), -1)[..., :-1]


ATTENTION = (4, 16, 1024, 1024)
CELLS = [
    *(
        Cell(
            "scale, mask",
            shape,
            lambda x, mask: torch.softmax(x * 0.125 + mask, -1),
            lambda x, mask: softmax_ext.softmax(x, -1, scale=0.125, mask=mask),
            lambda shape=shape: _padding(shape[0], 1, *shape[2:]),
        )
        for shape in (ATTENTION, (64, 12, 128, 128))
    ),
    Cell(
        "causal",
        ATTENTION,
        lambda x: torch.softmax((x * 0.125).masked_fill(_hidden(x), -torch.inf), -1),
        lambda x: softmax_ext.softmax(x, -1, scale=0.125, is_causal=True),
    ),
    Cell(
        "softcap, mask",
        ATTENTION,
        lambda x, mask: torch.softmax(torch.tanh(x * 0.125 / 50.0) * 50.0 + mask, -1),
        lambda x, mask: softmax_ext.softmax(x, -1, scale=0.125, softcap=50.0, mask=mask),
        lambda: _padding(4, 1, 1024, 1024),
    ),
    Cell(
        "sink, mask",
        ATTENTION,
        lambda x, mask, sink: _beside(x * 0.125 + mask, sink),
        lambda x, mask, sink: softmax_ext.softmax(x, -1, scale=0.125, mask=mask, sink=sink),
        lambda: {**_padding(4, 1, 1024, 1024), "sink": torch.randn(16)},
        learned=("sink",),
    ),
    *(
        Cell(
            "bias",
            shape,
            lambda x, mask: torch.softmax(x * 0.125 + mask, -1),
            lambda x, mask: softmax_ext.softmax(x, -1, scale=0.125, mask=mask),
            lambda shape=shape: {"mask": torch.randn(shape[-3:])},
            learned=("mask",),
        )
        for shape in ((2048, 3, 49, 49), (1, 128, 4, 256, 256))
    ),
    Cell(
        "logsumexp",
        (4096, 1000),
        lambda x: torch.logsumexp(x, -1),
        lambda x: softmax_ext.logsumexp(x, -1),
    ),
]


@dataclass(frozen=True)
class ScoresCase(Case):
    """`op` is the name of a cell."""

    @property
    def cell(self) -> Cell:
        return next(c for c in CELLS if (c.name, c.shape) == (self.op, self.shape))

    @property
    def bytes(self) -> int:
        """Read and written, if each tensor as large as the input is moved once."""
        small = self.cell.reduces
        tensors = (1 if small else 2) + (self.mode == "both") * (2 if small else 3)
        return tensors * math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def takes_exp(self) -> bool:
        return True

    def runs(self, device: str = "cpu") -> dict[str, Run]:
        """By softmax_ext, by torch, and our softmax alone; on the CPU with fresh memory too."""
        torch.manual_seed(0)
        cell, dtype = self.cell, DTYPES[self.dtype]

        def randn(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, device=device).to(dtype)

        x = randn(self.shape)
        tensors = {name: tensor.to(device, dtype) for name, tensor in cell.tensors().items()}
        grad = randn(self.shape[:-1] if cell.reduces else self.shape)
        plain = randn(self.shape) if cell.reduces else grad

        def run(function: Callable[..., torch.Tensor], tensors: Tensors, grad: Any) -> Run:
            if self.mode == "forward":
                return lambda: function(x, **tensors)
            leaf = x.detach().requires_grad_()
            given = {
                name: tensor.detach().requires_grad_(name in cell.learned)
                for name, tensor in tensors.items()
            }
            leaves = [leaf, *(given[name] for name in cell.learned if name in given)]
            return lambda: torch.autograd.grad(function(leaf, **given), leaves, grad)[0]

        runs = {
            "softmax_ext": run(cell.ours, tensors, grad),
            "torch": run(cell.eager, tensors, grad),
        }
        if device == "cpu":
            runs |= {name + FRESH: _fresh(each) for name, each in runs.items()}
        runs["plain"] = run(lambda x: softmax_ext.softmax(x, -1), {}, plain)
        return runs


def _fresh(run: Run) -> Run:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)

    def fresh() -> torch.Tensor:
        softmax_ext.empty_cache()
        trim(0)
        return run()

    return fresh


def cases(threads: Iterable[int], dtypes: Iterable[str], modes: Iterable[str]) -> list[Case]:
    return [
        ScoresCase(cell.name, mode, cell.shape, -1, "contiguous", dtype, number)
        for number, cell, dtype, mode in itertools.product(threads, CELLS, dtypes, modes)
    ]


def table(results: Iterable[Any]) -> Iterator[str]:
    """Of results of benchmarks.cpu: milliseconds, and how many times as long the others take."""
    header = ["cell", "shape", "mode", "dtype", "threads", "ms", "of a copy", "over eager"]
    header += ["over our softmax", "ms, fresh", "over eager, fresh"]
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for r in results:
        cells = [r.op, "x".join(map(str, r.shape)), r.mode, r.dtype, r.threads]
        cells += [
            f"{r.us['softmax_ext'] / 1e3:.3f}",
            f"{r.of_copy:.2f}",
            f"{r.speedup['torch']:.2f}",
            f"{r.speedup['plain']:.2f}",
            f"{r.us['softmax_ext' + FRESH] / 1e3:.3f}",
            f"{r.speedup['torch' + FRESH]:.2f}",
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"
