"""What `python -m benchmarks cpu --set losses` measures: cross-entropy against torch's own.

Memory is as a process has it: torch's large buffers are new pages at each call, unless
THP_MEM_ALLOC_ENABLE=1 gives it huge ones. Both are worth a run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import softmax_ext
from benchmarks.common import DTYPES, Run, make_run
from benchmarks.softmax_cpu_cases import Case

# Logits, of which dim 1 has the classes.
SHAPES = [
    (64, 10),  # the cost of a call
    (65536, 10),  # classifiers
    (8, 19, 256, 256),  # segmentation
    (4096, 32000),  # vocabularies
    (512, 128256),
]
MODES = ("forward", "both")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-4},
    "softcap": {"softcap": 30.0},
}
VARIED = ((65536, 10), (512, 128256))


@dataclass(frozen=True)
class LossCase(Case):
    """`layout` is the variant."""

    @property
    def bytes(self) -> int:
        tensors = 1 if self.mode == "forward" else 3
        return tensors * math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def takes_exp(self) -> bool:
        return False  # the floor is a copy


def cases(threads: Iterable[int], dtypes: Iterable[str], modes: Iterable[str]) -> list[Case]:
    return [
        LossCase("cross_entropy", mode, shape, 1, variant, dtype, count)
        for count, shape, variant, dtype, mode in itertools.product(
            threads, SHAPES, VARIANTS, dtypes, modes
        )
        if variant == "plain" or shape in VARIED
    ]


def by_torch(
    x: Tensor, target: Tensor, weight: Tensor | None, z_loss: float, softcap: float, **rest: Any
) -> Tensor:
    """What models write."""
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(x, target, weight, **rest)
    return loss + z_loss * x.logsumexp(1).square().mean() if z_loss else loss


def contenders(case: LossCase) -> dict[str, Run]:
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.shape).to(dtype)
    target = torch.randint(case.shape[1], case.shape[:1] + case.shape[2:])
    weight = (torch.rand(case.shape[1]) + 0.5).to(dtype) if case.layout == "weight" else None
    options = VARIANTS[case.layout]
    for_torch = {"z_loss": 0.0, "softcap": 0.0, **options}
    functions = {
        "softmax_ext": lambda x, _: softmax_ext.cross_entropy(x, target, weight, **options),
        "torch": lambda x, _: by_torch(x, target, weight, **for_torch),
    }
    if case.layout != "plain":
        functions["plain"] = lambda x, _: softmax_ext.cross_entropy(x, target)
    grad = torch.ones((), dtype=dtype)
    return {name: make_run(f, case.mode, x, case.dim, grad) for name, f in functions.items()}
