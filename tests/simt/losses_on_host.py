"""The project's CUDA kernels of cross-entropy, run on the CPU by the host executor (losses.cpp)."""

from dataclasses import dataclass
from typing import Any

import torch
from host import Host, memory_of, word
from plans import DEVICES

# What the kernels of a call are asked for.
OPTIONS = {"smoothing": 0.0, "z_loss": 0.0, "factor": 1.0, "softcap": 0.0, "ignore_index": -100}


@dataclass(frozen=True)
class Losses:
    """Of a forward call: numbers of the rows, of the targets' shape, and those of all."""

    loss: torch.Tensor
    lse: torch.Tensor
    lse_rest: torch.Tensor
    log_p: torch.Tensor
    entropy: torch.Tensor  # NaN where it was not wanted
    total: torch.Tensor
    reduced: torch.Tensor
    plan: dict[str, int]  # threads along a row, its parts, blocks that sum losses


class LossesHost(Host):
    """Logits are (N, C) or (N, C, ...), with what follows C side by side; weights and the numbers
    of rows are of the type computed in."""

    PROGRAM = "losses"

    def forward(  # type: ignore[override]
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        **how: Any,
    ) -> Losses:
        """how: OPTIONS, wants_lse, wants_entropy, is_mean."""
        wide = torch.promote_types(input.dtype, torch.float32)
        rows = target.numel()
        of_rows = rows * wide.itemsize
        plan, body = self._call(
            "forward", input, None, 5 * of_rows + 16, {"target": target, "weight": weight}, how
        )
        numbers = [
            torch.frombuffer(bytearray(body[k * of_rows : (k + 1) * of_rows]), dtype=wide)
            for k in range(5)
        ]
        totals = torch.frombuffer(bytearray(body[5 * of_rows :]), dtype=torch.float64)
        return Losses(*(n.view(target.shape) for n in numbers), totals[0], totals[1], plan)

    def backward(  # type: ignore[override]
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        losses: Losses,
        grad_loss: torch.Tensor | None,
        grad_lse: torch.Tensor | None = None,
        grad_entropy: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **how: Any,
    ) -> torch.Tensor:
        """how: OPTIONS, in_place, divisor (a tensor). The gradient lies as `out`, or the input."""
        out = input if out is None else out
        memory = memory_of(out).clone()
        reads = {
            "target": target,
            "weight": weight,
            "grad_loss": grad_loss,
            "grad_lse": grad_lse,
            "lse": losses.lse,
            "lse_rest": losses.lse_rest,
            "log_p": losses.log_p,
            "grad_entropy": grad_entropy,
            "entropy": None if grad_entropy is None else losses.entropy,
            "divisor": how.pop("divisor", None),
        }
        _, body = self._call("backward", input, out, memory.nbytes, reads, how)
        written = torch.frombuffer(bytearray(body), dtype=input.dtype)
        return written.as_strided(out.shape, out.stride())

    def _call(
        self,
        direction: str,
        input: torch.Tensor,
        out: torch.Tensor | None,
        size: int,
        reads: dict[str, torch.Tensor | None],
        how: dict[str, Any],
    ) -> tuple[dict[str, int], bytes]:
        sizes, classes = input.shape, input.size(1)
        strides = [tensor.stride()[:2] for tensor in (input, input if out is None else out)]
        request: dict[str, Any] = {
            "direction": direction,
            "outer": sizes[0],
            "dim": classes,
            "inner": sizes[2:].numel(),
            "sizes": (sizes[0],),
            "strides": (*strides[0], *strides[1]),
            "dtype": str(input.dtype).removeprefix("torch."),
            **OPTIONS,
            **vars(DEVICES["4 SMs, 9.0"]),
            "seed": self.seed,
            "resident": 1,
            "orders": self.orders,
            "wants_lse": 0,
            "wants_entropy": 0,
            "is_mean": 0,
            "in_place": 0,
            "input": 1,
        }
        assert how.keys() <= request.keys(), how
        weight = reads["weight"]
        request |= how | {"weight_sum": classes if weight is None else float(weight.sum())}
        numbers = ("grad_loss", "grad_lse", "lse", "lse_rest", "log_p", "grad_entropy", "entropy")
        for name in ("weight", *numbers, "divisor"):
            tensor = reads.get(name)
            # A gradient of one number: 1, one of each row: 2.
            request[name] = 0 if tensor is None else 1
            if name == "grad_loss" and tensor is not None:
                request[name] = 1 if tensor.dim() == 0 else 2
        request["target"] = 1
        line = " ".join(f"{key}={word(value)}" for key, value in request.items())
        given = [memory_of(input), *(t.contiguous() for t in reads.values() if t is not None)]
        data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in given)
        members, body = self._answer(line, data, size)
        return {key: int(text) for key, text in members.items()}, body
