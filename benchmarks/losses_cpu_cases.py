"""What `python -m benchmarks cpu --set losses` measures: cross-entropy against torch's own, and
divergences against what models write with torch.

Memory is as a process has it: torch's large buffers are new pages at each call, unless
THP_MEM_ALLOC_ENABLE=1 gives it huge ones. Both are worth a run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
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
    "in place": {"inplace_backward": True},
}
VARIED = ((65536, 10), (512, 128256))
IN_PLACE_FORWARD = ("in place", "forward")  # writes nothing
VARIED_OF = {"plain": SHAPES, "probabilities": VARIED[1:], "in place": SHAPES[-2:]}
# Rows, features and classes.
LINEAR_SHAPE = (4096, 512, 50257)
SELECTIVE = ("one class", "one class and entropy")
# Of divergences, whose rows are along the last dim.
PAIR_SHAPE = (512, 32000)
LINEAR = "linear_cross_entropy"
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
        if self.layout == "in place":
            tensors = 2
        if self.op == "kl_div_with_logits" or self.layout == "probabilities":
            tensors = 2 if self.mode == "forward" else 5
        rows, *_, classes = self.shape  # of linear_cross_entropy: of the logits
        elements = rows * classes if self.op == LINEAR else math.prod(self.shape)
        return tensors * elements * DTYPES[self.dtype].itemsize

    @property
    def takes_exp(self) -> bool:
        return False  # the floor is a copy

    @property
    def tolerances(self) -> int:
        # Of 16 bits torch rounds each step of a divergence, and then takes their difference.
        return 8 if self.op == "kl_div_with_logits" and DTYPES[self.dtype].itemsize == 2 else 1


def cases(threads: Iterable[int], dtypes: Iterable[str], modes: Iterable[str]) -> list[Case]:
    found: list[Case] = []
    for count, dtype, mode in itertools.product(threads, dtypes, modes):

        def add(op: str, shape: tuple[int, ...], variant: str) -> None:
            found.append(LossCase(op, mode, shape, 1, variant, dtype, count))  # noqa: B023

        for shape, variant in itertools.product(SHAPES, VARIANTS):
            if shape in VARIED_OF.get(variant, VARIED) and (variant, mode) != IN_PLACE_FORWARD:
                add("cross_entropy", shape, variant)
        for variant in DIVERGENCES:
            add("kl_div_with_logits", PAIR_SHAPE, variant)
        for variant in SELECTIVE:
            add("selective_log_softmax", SHAPES[-1], variant)
        add(LINEAR, LINEAR_SHAPE, "plain")
    return found


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


class _Produced(torch.autograd.Function):
    """Logits as a layer gives them, in the memory of x: they may be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def selected_by_torch(x: Tensor, index: Tensor, with_entropy: bool) -> Tensor:
    """What models write."""
    log_p = F.log_softmax(x, -1)
    chosen = log_p.gather(1, index.unsqueeze(1)).squeeze(1)
    if not with_entropy:
        return chosen
    return chosen + (x.logsumexp(-1) - (x.softmax(-1) * x).sum(-1))


def selected(x: Tensor, index: Tensor, with_entropy: bool) -> Tensor:
    if not with_entropy:
        return softmax_ext.selective_log_softmax(x, index)
    log_p, entropy = softmax_ext.selective_log_softmax(x, index, return_entropy=True)
    return log_p + entropy.to(x.dtype)


def linear_runs(case: LossCase, rows_at_once: int = 320) -> dict[str, Run]:
    """ "plain": the three products alone, or the one of forward, in chunks."""
    rows, features, classes = case.shape
    dtype, is_forward = DTYPES[case.dtype], case.mode == "forward"
    x = torch.randn(rows, features).to(dtype)
    weight = (torch.randn(classes, features) * features**-0.5).to(dtype)
    target = torch.randint(classes, (rows,))
    leaves = [t.detach().requires_grad_(not is_forward) for t in (x, weight)]

    def run(function: Callable[..., Any]) -> Run:
        if is_forward:
            return lambda: function(*leaves, target)
        return lambda: torch.autograd.grad(function(*leaves, target), leaves)[0]

    def products() -> Tensor:
        grad_weight = torch.zeros_like(weight)
        for part in torch.split(x, rows_at_once):
            z = part @ weight.t()
            if not is_forward:
                z @ weight
                grad_weight.addmm_(z.t(), part)
        return grad_weight

    return {
        "softmax_ext": run(softmax_ext.linear_cross_entropy),
        "torch": run(lambda x, w, y: F.cross_entropy(F.linear(x, w), y)),
        "plain": products,
    }


def contenders(case: LossCase, device: str = "cpu") -> dict[str, Run]:
    torch.manual_seed(0)
    if case.op == LINEAR:
        assert device == "cpu"
        return linear_runs(case)
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.shape).to(device, dtype)
    if case.op == "selective_log_softmax":
        index = torch.randint(case.shape[1], case.shape[:1]).to(device)
        with_entropy = case.layout != SELECTIVE[0]
        grad = torch.ones(case.shape[0], dtype=dtype, device=device)
        functions = {"softmax_ext": selected, "torch": selected_by_torch}
        return {
            name: make_run(lambda x, _, f=f: f(x, index, with_entropy), case.mode, x, 1, grad)
            for name, f in functions.items()
        }
    if case.op == "kl_div_with_logits":
        teacher, kwargs = torch.randn(case.shape).to(device, dtype), DIVERGENCES[case.layout]
        pairs = {
            "softmax_ext": lambda x, _: softmax_ext.kl_div_with_logits(x, teacher, **kwargs),
            "torch": lambda x, _: divergence_by_torch(x, teacher, **kwargs),
        }
        grad = torch.ones((), dtype=dtype, device=device)
        return {name: make_run(f, case.mode, x, case.dim, grad) for name, f in pairs.items()}
    target = torch.randint(case.shape[1], case.shape[:1] + case.shape[2:]).to(device)
    indices = target
    if case.layout == "probabilities":
        target = torch.randn(case.shape).softmax(1).to(device, dtype)
    has_weight = case.layout == "weight"
    weight = (torch.rand(case.shape[1]) + 0.5).to(device, dtype) if has_weight else None
    options = VARIANTS[case.layout]
    for_torch = {"z_loss": 0.0, "softcap": 0.0, **options}
    in_place = for_torch.pop("inplace_backward", False)

    def ours(x: Tensor, _: int) -> Tensor:
        # Logits that are a gradient from the second time on: of the same cost.
        return softmax_ext.cross_entropy(
            _Produced.apply(x) if in_place else x, target, weight, **options
        )

    functions = {
        "softmax_ext": ours,
        "torch": lambda x, _: by_torch(x, target, weight, **for_torch),
    }
    if case.layout != "plain":
        functions["plain"] = lambda x, _: softmax_ext.cross_entropy(x, indices)
    grad = torch.ones((), dtype=dtype, device=device)
    return {
        name: make_run(f, case.mode, x.clone() if in_place and f is ours else x, case.dim, grad)
        for name, f in functions.items()
    }
