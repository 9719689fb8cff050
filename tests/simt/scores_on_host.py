"""Scores by the CUDA kernels on the host executor: what csrc/torch/scores.cpp does around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from host import Host
from tolerances import SIXTEEN_BIT

from softmax_ext._C import LIMITS, Plan, mask_gradient_parts

WIDE = {torch.float64: torch.float64}  # that is computed in; float32 for the others
Lay = Callable[[torch.Tensor], torch.Tensor]


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return WIDE.get(dtype, torch.float32)


def chunk_of(dtype: torch.dtype) -> int:
    """Elements of a row that a warp has at a time."""
    size = wide_of(dtype).itemsize
    vectors = LIMITS["ChunkVectorsFloat64" if size == 8 else "ChunkVectors"]
    return vectors * LIMITS["Warp"] * LIMITS["VectorBytes"] // size


def chunks_of(dim: int, dtype: torch.dtype) -> int:
    """Of a row; one that a part of a warp has is one."""
    return 1 if dim <= LIMITS["ShortScores"] else -(-dim // chunk_of(dtype))


class ScoresOnHost:
    """A function as softmax_ext has them, of an operation; dim is the last.

    parts: of the rows that share one of a mask; 0 is what the plan has.
    lay: how the tensors lie that are read and written, of the input's sizes; how: as Host.scores
    has it. plans: of the forward, and of the backward.
    """

    def __init__(
        self, host: Host, op: str, lay: Lay | None = None, parts: int = 0, **how: Any
    ) -> None:
        self.host, self.op, self.parts, self.how = host, op, parts, how
        self.lay = lay or (lambda tensor: tensor.contiguous())
        self.plans: list[Plan] = []

    def __call__(
        self,
        input: torch.Tensor,
        dim: int,
        dtype: torch.dtype | None = None,
        *,
        scale: Any = None,
        temperature: Any = None,
        softcap: float | None = None,
        mask: torch.Tensor | None = None,
        is_causal: bool = False,
        causal_offset: int | None = None,
        window: tuple[int, int] | None = None,
        sink: Any = None,
    ) -> torch.Tensor:
        assert dim in (-1, input.dim() - 1)
        options: dict[str, Any] = {"softcap": softcap or 0.0}
        if temperature is not None:
            is_tensor = isinstance(temperature, torch.Tensor)
            scale = 1 / (temperature.double() if is_tensor else temperature)
        if scale is not None and not isinstance(scale, torch.Tensor):
            options["factor"], scale = float(scale), None
        if sink is not None and not isinstance(sink, torch.Tensor):
            options["sink_of_all"], sink = float(sink), None
        if sink is not None and sink.dim() == 1 and input.dim() >= 3:
            sink = sink[:, None, None]
        if is_causal or window is not None:
            queries, keys = input.shape[-2:]
            left, right = window or (-1, -1)
            offset = keys - queries if causal_offset is None else causal_offset
            options |= {"left": left, "right": 0 if is_causal else right, "offset": offset}
        wide = wide_of(dtype or input.dtype)
        if mask is not None:
            taken = (torch.bool, wide, *(SIXTEEN_BIT if wide == torch.float32 else ()))
            mask = mask if mask.dtype in taken else mask.to(wide)
        result = _Scores.apply(self, options, input.to(dtype or input.dtype), scale, mask, sink)
        return result.squeeze(-1) if self.op == "logsumexp" else result


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        on: ScoresOnHost,
        options: dict[str, Any],
        input: torch.Tensor,
        scale: torch.Tensor | None,
        mask: torch.Tensor | None,
        sink: torch.Tensor | None,
    ) -> torch.Tensor:
        x = on.lay(input.detach())
        of_row = torch.empty(*x.shape[:-1], 1, dtype=wide_of(x.dtype))
        given = {"scale": scale, "mask": mask, "sink": sink}
        reads = {"input": x}
        for name, tensor in given.items():
            if tensor is not None:
                made = tensor.detach()
                reads[name] = made if name == "mask" else made.double()
        writes = {} if on.op == "logsumexp" else {"output": (on.lay(torch.empty_like(input)), 1)}
        results, plan = on.host.scores(
            "forward", on.op, x.shape, reads, {**writes, "lse": (of_row, 1)}, x.dtype,
            **options, **on.how,
        )  # fmt: skip
        on.plans = [plan]
        lse = results["lse"]
        result = lse.to(x.dtype) if on.op == "logsumexp" else results["output"].contiguous()
        ctx.on, ctx.options = on, options
        ctx.save_for_backward(input, scale, mask, sink, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        on: ScoresOnHost = ctx.on
        input, scale, mask, sink, result, lse = ctx.saved_tensors
        *_, wants_scale, wants_mask, wants_sink = ctx.needs_input_grad
        wide, sizes = wide_of(input.dtype), input.shape
        of_row = torch.empty(*sizes[:-1], 1, dtype=wide)
        chunks = chunks_of(sizes[-1], input.dtype)
        of_lse = on.op == "logsumexp"
        reads = {"grad_output": grad if of_lse else on.lay(grad)}
        if not of_lse:
            reads["output"] = on.lay(result)
        if of_lse or ctx.options["softcap"] or wants_scale:
            reads["input"] = on.lay(input.detach())
        for name, tensor in {"scale": scale, "mask": mask, "sink": sink}.items():
            if tensor is not None:
                reads[name] = tensor if name == "mask" else tensor.detach().double()
        if of_lse or wants_sink:
            reads["lse"] = lse
        writes = {"grad_input": (on.lay(torch.empty_like(input)), 1)}
        if wants_scale:
            writes["grad_scale"] = (of_row, chunks)
        if wants_sink:
            writes["grad_sink"] = (of_row, 1)
        parts = 1
        of_rows = wants_mask and mask.shape[-1:].numel() == 1 and sizes[-1] > 1
        if of_rows:
            writes["grad_mask_of_rows"] = (of_row, chunks)
        elif wants_mask:
            parts = on.parts or mask_gradient_parts(
                mask.numel() // sizes[-1], input.numel() // mask.numel()
            )
            writes["grad_mask"] = (torch.empty(mask.shape, dtype=wide), parts)
        results, plan = on.host.scores(
            "backward", on.op, sizes, reads, writes, input.dtype,
            parts=parts, **ctx.options, **on.how,
        )  # fmt: skip
        on.plans.append(plan)

        def summed(name: str, like: torch.Tensor) -> torch.Tensor:
            found = results[name]
            if name == "grad_mask" and parts > 1:
                found = found.sum(0)
            if name in ("grad_scale", "grad_mask_of_rows"):  # the chunks of a row lie side by side
                found = found.reshape(*sizes[:-1], chunks).sum(-1, keepdim=True)
            if name != "grad_mask":
                found = found.sum_to_size(like.shape)
            return found.to(like.dtype)

        grad_scale = (
            summed("grad_scale", scale) * ctx.options.get("factor", 1.0) if wants_scale else None
        )
        grad_mask = None
        if wants_mask:
            grad_mask = summed("grad_mask_of_rows" if of_rows else "grad_mask", mask)
        grad_sink = summed("grad_sink", sink) if wants_sink else None
        return None, None, results["grad_input"].contiguous(), grad_scale, grad_mask, grad_sink
