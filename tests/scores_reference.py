"""Scores by their definition, in float64 and with autograd, and how exact a result has to be.

Written with nothing but elementary operations, and a mask for what a band means, so that it shares
nothing with the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tolerances import TOLERANCES, assert_within

import softmax_ext

Tensors = dict[str, torch.Tensor]
OURS: dict[str, Callable[..., torch.Tensor]] = {
    "softmax": softmax_ext.softmax,
    "log_softmax": softmax_ext.log_softmax,
    "logsumexp": softmax_ext.logsumexp,
}


def band(
    queries: int,
    keys: int,
    is_causal: bool = False,
    causal_offset: int | None = None,
    window: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Which key takes part for which query: True does."""
    offset = keys - queries if causal_offset is None else causal_offset
    left, right = (-1, -1) if window is None else window
    right = 0 if is_causal else right
    live = torch.ones(queries, keys, dtype=torch.bool)
    for query in range(queries):
        for key in range(keys):
            live[query, key] = (left < 0 or key >= query + offset - left) and (
                right < 0 or key <= query + offset + right
            )
    return live


class Reference:
    """Of one call: the result, and the sizes of what is added up on the way to it."""

    def __init__(
        self,
        op: str,
        input: torch.Tensor,
        dim: int | tuple[int, ...],
        *,
        scale: Any = None,
        temperature: Any = None,
        softcap: float | None = None,
        mask: torch.Tensor | None = None,
        sink: Any = None,
        **of_band: Any,
    ) -> None:
        def wide(value: Any) -> torch.Tensor:
            return torch.as_tensor(value, device="cpu", dtype=torch.float64)

        self.op, self.dims = op, dim if isinstance(dim, tuple) else (dim,)
        x = wide(input)
        factor = wide(1.0 if scale is None else scale)
        if temperature is not None:
            factor = 1 / wide(temperature)
        if isinstance(sink, torch.Tensor) and sink.dim() == 1 and x.dim() >= 3:
            sink = sink[:, None, None]
        self.is_safe = mask is not None or bool(of_band)
        live = torch.ones(x.shape, dtype=torch.bool)
        if of_band:
            live = live & band(x.shape[-2], x.shape[-1], **of_band)
        added = wide(0.0)
        if mask is not None and mask.dtype == torch.bool:
            live = live & mask.cpu()
        elif mask is not None:
            added = wide(mask)

        def scores(x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
            z = x * factor
            return (softcap * torch.tanh(z / softcap) if softcap else z) + added

        if self.is_safe:
            live = live & (scores(x, added) != -math.inf)
            x = torch.where(live, x, 0.0)  # so that what takes no part has no gradient
            added = torch.where(live, added, 0.0)
        self.z = z = scores(x, added)
        self.live, self.x, self.factor = live, x.detach(), factor.detach()
        self.share_of_sink = torch.zeros(())
        top = self.row_max(torch.where(live, z.detach(), -math.inf), -math.inf)
        if sink is not None:
            top = torch.maximum(top, wide(sink).detach())
        if self.is_safe:
            top = torch.where(top == -math.inf, 0.0, top)
        e = torch.where(live, torch.exp(z - top), 0.0)
        total = e.sum(self.dims, keepdim=True)
        if sink is not None:
            of_sink = torch.exp(wide(sink) - top)
            total = total + of_sink
            self.share_of_sink = (of_sink / total).detach().nan_to_num()
        empty = (total == 0) & self.is_safe
        total = torch.where(empty, 1.0, total)
        log_total = torch.where(empty, -math.inf, top + torch.log(total))
        self.p = (e / total).detach()
        if op == "softmax":
            self.result = e / total
        elif op == "log_softmax":
            self.result = torch.where(live, z - top - torch.log(total), -math.inf)
            if not self.is_safe:
                self.result = z - top - torch.log(total)
        else:
            self.result = log_total.reshape(log_total.sum(self.dims).shape)
        # What one rounding of a score, or of its distance from the row's largest, is relative to.
        sizes = (self.x * self.factor).abs() + torch.as_tensor(added).abs() + top.abs() + 1
        self.size = self.row_max(torch.where(live, sizes, 1.0), 1.0).detach()

    def row_max(self, tensor: torch.Tensor, of_none: float) -> torch.Tensor:
        if any(tensor.size(d) == 0 for d in self.dims):
            return tensor.sum(self.dims, keepdim=True) + of_none
        return tensor.amax(self.dims, keepdim=True)

    def allowed(self, dtype: torch.dtype) -> torch.Tensor:
        """The error that a result of this dtype may have."""
        tolerance = TOLERANCES[dtype]
        expected, size = self.result.detach(), self.size
        if self.op == "logsumexp":
            size = size.reshape(expected.shape)
        arithmetic = 4 * tolerance.arithmetic * size
        if self.op == "softmax":
            return tolerance.atol["softmax"] + (tolerance.rtol + arithmetic) * expected.abs()
        return tolerance.atol["log_softmax"] + arithmetic + tolerance.rtol * expected.abs()

    def terms(self, grad: torch.Tensor) -> Tensors:
        """The sizes of what the gradients are sums of, by argument, over the whole input.

        The gradient of a score is a difference, of which the arithmetic's error is relative to the
        terms.
        """
        # A probability below the smallest normal number is rounded as if it were that.
        g, p = grad.cpu().double().abs(), self.p.clamp_min(torch.finfo(grad.dtype).tiny)
        if self.op == "logsumexp":
            g = g.reshape(self.size.shape)
            of_scores, of_row = p * g, g
        elif self.op == "softmax":
            of_row = (g * p).sum(self.dims, keepdim=True)
            of_scores = p * (g + of_row)
        else:
            g = torch.where(self.live | (not self.is_safe), g, 0.0)
            of_row = g.sum(self.dims, keepdim=True)
            of_scores = g + p * of_row
        of_scale = of_scores * self.x.abs()
        return {
            "input": of_scores * self.factor.abs(),
            "mask": of_scores,
            "scale": of_scale,
            "temperature": of_scale * self.factor.square(),
            "sink": self.share_of_sink * of_row,
        }


def assert_like_reference(
    op: str,
    input: torch.Tensor,
    dim: int | tuple[int, ...],
    dtype: torch.dtype | None = None,
    function: Callable[..., torch.Tensor] | None = None,
    **scores: Any,
) -> torch.Tensor:
    """The value and, of each tensor that requires one, the gradient; the result is returned."""
    tensors = {"input": input, **{k: v for k, v in scores.items() if isinstance(v, torch.Tensor)}}
    leaves = {name: each for name, each in tensors.items() if each.requires_grad}

    def exact(name: str, leaf: torch.Tensor) -> torch.Tensor:
        """In float64, so that a gradient of it is; the input as rounded to the result's dtype."""
        leaf = leaf.detach().to(dtype or leaf.dtype) if name == "input" else leaf.detach()
        return leaf.cpu().double().requires_grad_()

    references = {name: exact(name, leaf) for name, leaf in leaves.items()}
    result = (function or OURS[op])(input, dim, dtype=dtype, **scores)
    exact_input = references.get("input", input.detach().to(dtype or input.dtype))
    expected = Reference(
        op, exact_input, dim, **{**scores, **{k: v for k, v in references.items() if k != "input"}}
    )
    assert result.dtype == (dtype or input.dtype)
    assert result.device == input.device
    assert result.is_contiguous()
    assert_within(result, expected.result.detach(), expected.allowed(result.dtype))
    if not leaves:
        return result
    grad = torch.randn(result.shape, dtype=torch.float64)
    if op == "log_softmax":  # of a result that is -inf there is nothing to learn
        grad = grad.masked_fill(result.detach().cpu() == -math.inf, 0.0)
    grad = grad.to(result.dtype)
    found = torch.autograd.grad(result, list(leaves.values()), grad.to(result.device))
    right = torch.autograd.grad(expected.result, list(references.values()), grad.double())
    sizes, tolerance = expected.terms(grad), TOLERANCES[result.dtype]
    # A gradient may be computed from the result as rounded.
    unit = torch.finfo(result.dtype).eps / 2
    for (name, leaf), actual, reference in zip(leaves.items(), found, right, strict=True):
        assert actual.dtype == leaf.dtype
        assert actual.shape == leaf.shape
        summed = sizes[name] * (8 * unit + 4 * tolerance.arithmetic * expected.size)
        of_heads = name == "sink" and leaf.dim() == 1 and input.dim() >= 3
        shape = (leaf.numel(), 1, 1) if of_heads else leaf.shape
        summed = summed.sum_to_size(shape).reshape(leaf.shape)
        rounding = TOLERANCES[leaf.dtype].rtol * reference.abs()
        allowed = summed + rounding + 2 * TOLERANCES[leaf.dtype].atol["softmax"]
        assert_within(actual, reference, allowed)
    return result
