"""The project's CUDA kernels of losses, run on the CPU by the host executor (losses.cpp)."""

from dataclasses import dataclass
from typing import Any

import torch
from host import Host, memory_of, word
from plans import DEVICES

# What the kernels of a call are asked for.
OPTIONS = {"smoothing": 0.0, "z_loss": 0.0, "factor": 1.0, "softcap": 0.0, "ignore_index": -100}
# Beside the input, what a call may be given.
READS = (
    "target",
    "weight",
    "grad_loss",
    "grad_lse",
    "lse",
    "lse_rest",
    "log_p",
    "kept",
    "grad_entropy",
    "entropy",
    "divisor",
)


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


@dataclass(frozen=True)
class Pairs:
    """Of a forward call of two tensors of logits, or of logits and probabilities."""

    loss: torch.Tensor
    lse: torch.Tensor | None  # of probabilities
    kept: torch.Tensor
    plan: dict[str, int]


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
        reads = {"target": target, "weight": weight}
        plan, body = self._call(
            "cross_entropy", "forward", input, input, 5 * of_rows + 16, reads, how
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
        _, body = self._call("cross_entropy", "backward", input, out, memory.nbytes, reads, how)
        written = torch.frombuffer(bytearray(body), dtype=input.dtype)
        return written.as_strided(out.shape, out.stride())

    def pair_forward(
        self,
        loss: str,
        first: torch.Tensor,
        second: torch.Tensor,
        weight: torch.Tensor | None = None,
        **how: Any,
    ) -> Pairs:
        """loss: "probabilities", of logits and probabilities and weights of classes, or
        "divergence", of student and teacher and weights of rows. how: OPTIONS, beta."""
        wide = torch.promote_types(first.dtype, torch.float32)
        numbers = {"probabilities": (1, 1, 4), "divergence": (1, 7)}[loss]
        sizes = [count * first.size(0) for count in numbers]
        reads = {"target": second, "weight": weight}
        nbytes = sum(sizes) * wide.itemsize
        plan, body = self._call(loss, "forward", first, second, nbytes, reads, how)
        of_rows, *more = torch.frombuffer(bytearray(body), dtype=wide).split(sizes)
        return Pairs(of_rows, more[0] if len(more) == 2 else None, more[-1], plan)

    def pair_backward(
        self,
        loss: str,
        first: torch.Tensor,
        second: torch.Tensor,
        weight: torch.Tensor | None,
        found: Pairs,
        grad_loss: torch.Tensor,
        grad_lse: torch.Tensor | None = None,
        **how: Any,
    ) -> list[torch.Tensor]:
        """The gradients that are wanted: how: OPTIONS, beta, grad_factor, of_first, of_second."""
        reads = {
            "target": second,
            "weight": weight,
            "grad_loss": grad_loss,
            "grad_lse": grad_lse,
            "lse": found.lse,
            "kept": found.kept,
        }
        wanted = how.get("of_first", 1) + how.get("of_second", 1)
        nbytes = wanted * first.numel() * first.itemsize
        _, body = self._call(loss, "backward", first, second, nbytes, reads, how)
        written = torch.frombuffer(bytearray(body), dtype=first.dtype)
        return list(written.view(wanted, *first.shape))

    def _call(
        self,
        loss: str,
        direction: str,
        input: torch.Tensor,
        second: torch.Tensor,
        size: int,
        reads: dict[str, torch.Tensor | None],
        how: dict[str, Any],
    ) -> tuple[dict[str, int], bytes]:
        """reads, in the order of losses.cpp; second: the tensor whose strides go with the
        input's."""
        sizes, classes = input.shape, input.size(1)
        request: dict[str, Any] = {
            "loss": loss,
            "direction": direction,
            "outer": sizes[0],
            "dim": classes,
            "inner": sizes[2:].numel(),
            "sizes": (sizes[0],),
            "strides": (*input.stride()[:2], *second.stride()[:2]),
            "dtype": str(input.dtype).removeprefix("torch."),
            **OPTIONS,
            "beta": 0.0,
            "grad_factor": 1.0,
            **vars(DEVICES["4 SMs, 9.0"]),
            "seed": self.seed,
            "resident": 1,
            "orders": self.orders,
            "wants_lse": 0,
            "wants_entropy": 0,
            "is_mean": 0,
            "in_place": 0,
            "of_first": 1,
            "of_second": 1,
            "input": 1,
        }
        assert how.keys() <= request.keys(), how
        weight = reads["weight"]
        request |= how | {"weight_sum": classes if weight is None else float(weight.sum())}
        for name in READS:
            tensor = reads.get(name)
            request[name] = 0 if tensor is None else 1
            # A gradient of one number: 1, one of each row: 2.
            if name == "grad_loss" and tensor is not None:
                request[name] = 1 if tensor.dim() == 0 else 2
        line = " ".join(f"{key}={word(value)}" for key, value in request.items())
        given = [memory_of(input)]
        for name, tensor in reads.items():
            if tensor is not None:
                as_it_lies = name == "target" and loss != "cross_entropy"
                given.append(memory_of(tensor) if as_it_lies else tensor.contiguous())
        data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in given)
        members, body = self._answer(line, data, size)
        return {key: int(text) for key, text in members.items()}, body
