"""What the benchmarks share: the functions that are compared, one call of them, the wall clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

import softmax_ext

Run = Callable[[], torch.Tensor]

# forward: a new output. recorded: the same with a graph for the gradient. backward: the input's
# gradient from a recorded graph. both: recorded and backward, as in a training step.
MODES = ("forward", "recorded", "backward", "both")
CALL = (8, 64)  # too small for anything but the cost of a call to show
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
OPS = {
    "softmax": (torch.softmax, softmax_ext.softmax),
    "log_softmax": (torch.log_softmax, softmax_ext.log_softmax),
}
TOLERANCE = {
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
    torch.float32: 2e-5,
    torch.float64: 1e-12,
}


def make_run(
    function: Callable[..., torch.Tensor],
    mode: str,
    x: torch.Tensor,
    dim: int,
    grad: torch.Tensor | None,
) -> Run:
    """One call of `function` on x; `grad` is the output's gradient, in the modes that take one."""
    if mode == "forward":
        return lambda: function(x, dim)
    leaf = x.detach().requires_grad_()
    if mode == "recorded":
        return lambda: function(leaf, dim)
    if mode == "both":
        return lambda: torch.autograd.grad(function(leaf, dim), leaf, grad)[0]
    output = function(leaf, dim)
    return lambda: torch.autograd.grad(output, leaf, grad, retain_graph=True)[0]


def smallest_step(dtype: torch.dtype) -> float:
    """Between neighbouring subnormal numbers: results of a long row may be such."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def wall_seconds(queue: Callable[[], object], device: str) -> float:
    """Of what `queue` does, from an idle device to an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    queue()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def as_json(head: dict[str, Any], name: str, entries: Iterable[dict[str, Any]]) -> str:
    """The head with the entries, a line each and in five digits, behind it under this name."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        return float(f"{value:.5g}") if isinstance(value, float) else value

    lines = ",\n".join(json.dumps(rounded(entry)) for entry in entries)
    return f'{json.dumps(head, indent=1)[:-2]},\n "{name}": [\n{lines}\n ]\n}}\n'
