"""What `python -m benchmarks cpu --set losses` measures: cross-entropy against torch's own, and
divergences against what models write with torch.

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
    "probabilities": {},  # as targets
}
VARIED = ((65536, 10), (512, 128256))
# Of divergences, whose rows are along the last dim.
PAIR_SHAPE = (512, 32000)
DIVERGENCES: dict[str, dict[str, float]] = {
    "KL": {},
    "KL, temperature 2": {"temperature": 2.0},
    "reverse KL": {"beta": 1.0},
    "JSD": {"beta": 0.5},
}


@dataclass(frozen=True)
class LossCase(Case):
    """`layout` is the variant."""

    @property
    def bytes(self) -> int:
        tensors = 1 if self.mode == "forward" else 3
        if self.op == "kl_div_with_logits" or self.layout == "probabilities":
            tensors = 2 if self.mode == "forward" else 5
        return tensors * math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def takes_exp(self) -> bool:
        return False  # the floor is a copy


def cases(threads: Iterable[int], dtypes: Iterable[str], modes: Iterable[str]) -> list[Case]:
    of_cross_entropy: list[Case] = [
        LossCase("cross_entropy", mode, shape, 1, variant, dtype, count)
        for count, shape, variant, dtype, mode in itertools.product(
            threads, SHAPES, VARIANTS, dtypes, modes
        )
        if variant == "plain" or shape in (VARIED[1:] if variant == "probabilities" else VARIED)
    ]
    return of_cross_entropy + [
        LossCase("kl_div_with_logits", mode, PAIR_SHAPE, 1, variant, dtype, count)
        for count, variant, dtype, mode in itertools.product(threads, DIVERGENCES, dtypes, modes)
    ]


def by_torch(
    x: Tensor, target: Tensor, weight: Tensor | None, z_loss: float, softcap: float, **rest: Any
) -> Tensor:
    """What models write."""
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(x, target, weight, **rest)
    return loss + z_loss * x.logsumexp(1).square().mean() if z_loss else loss


def divergence_by_torch(
    student: Tensor, teacher: Tensor, beta: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """What models write."""
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)

    if beta in (0.0, 1.0):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_m = torch.stack([log_p + math.log(beta), log_q + math.log1p(-beta)]).logsumexp(0)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def contenders(case: LossCase) -> dict[str, Run]:
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.shape).to(dtype)
    if case.op == "kl_div_with_logits":
        teacher, kwargs = torch.randn(case.shape).to(dtype), DIVERGENCES[case.layout]
        pairs = {
            "softmax_ext": lambda x, _: softmax_ext.kl_div_with_logits(x, teacher, **kwargs),
            "torch": lambda x, _: divergence_by_torch(x, teacher, **kwargs),
        }
        grad = torch.ones((), dtype=dtype)
        return {name: make_run(f, case.mode, x, case.dim, grad) for name, f in pairs.items()}
    target = torch.randint(case.shape[1], case.shape[:1] + case.shape[2:])
    indices = target
    if case.layout == "probabilities":
        target = torch.randn(case.shape).softmax(1).to(dtype)
    weight = (torch.rand(case.shape[1]) + 0.5).to(dtype) if case.layout == "weight" else None
    options = VARIANTS[case.layout]
    for_torch = {"z_loss": 0.0, "softcap": 0.0, **options}
    functions = {
        "softmax_ext": lambda x, _: softmax_ext.cross_entropy(x, target, weight, **options),
        "torch": lambda x, _: by_torch(x, target, weight, **for_torch),
    }
    if case.layout != "plain":
        functions["plain"] = lambda x, _: softmax_ext.cross_entropy(x, indices)
    grad = torch.ones((), dtype=dtype)
    return {name: make_run(f, case.mode, x, case.dim, grad) for name, f in functions.items()}
