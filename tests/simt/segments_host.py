"""The project's CUDA kernels of segments, run on the CPU by the host executor (segments.cpp)."""

from dataclasses import dataclass

import torch
from host import Host
from plans import DEVICES


@dataclass(frozen=True)
class Result:
    tensor: torch.Tensor
    columns: int  # of a lane
    across: int  # lanes over the columns of a tile
    along: int  # lanes of a warp along a segment
    most: int  # rows of a segment that a warp takes
    block_rows: int  # that a block takes


class SegmentsHost(Host):
    """Tensors are (outer, dim, inner)."""

    PROGRAM = "segments"

    def forward(  # type: ignore[override]
        self, op: str, input: torch.Tensor, ptr: torch.Tensor, **how: object
    ) -> Result:
        return self._call("forward", op, [input], input, ptr, how)

    def backward(  # type: ignore[override]
        self,
        op: str,
        grad_output: torch.Tensor,
        output: torch.Tensor,
        input: torch.Tensor,
        ptr: torch.Tensor,
        **how: object,
    ) -> Result:
        """`input` is read for logsumexp alone."""
        given = [grad_output, output] + ([input] if op == "logsumexp" else [])
        return self._call("backward", op, given, input, ptr, how)

    def _call(
        self,
        direction: str,
        op: str,
        given: list[torch.Tensor],
        input: torch.Tensor,
        ptr: torch.Tensor,
        how: dict[str, object],
    ) -> Result:
        """how: order, scale, device, orders, resident, and offset (bytes behind 16)."""
        order = how.pop("order", None)
        device = DEVICES[str(how.pop("device", "4 SMs, 9.0"))]
        outer, dim, inner = input.shape
        count = len(ptr) - 1
        request = {
            "direction": direction,
            "op": op,
            "outer": outer,
            "dim": dim,
            "inner": inner,
            "count": count,
            "dtype": str(input.dtype).removeprefix("torch."),
            "ordered": int(order is not None),
            "scale": 1.0,
            **vars(device),
            "seed": self.seed,
            "resident": 1,
            "orders": self.orders,
            "offset": 0,
        }
        assert how.keys() <= request.keys(), how
        words = {
            key: ",".join(value) if isinstance(value, tuple) else value
            for key, value in (request | how).items()
        }
        line = " ".join(f"{key}={value}" for key, value in words.items())
        tensors = [ptr, *([order] if isinstance(order, torch.Tensor) else []), *given]
        data = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
        of_segments = direction == "forward" and op == "logsumexp"
        shape = (outer, count if of_segments else dim, inner)
        size = outer * shape[1] * inner * input.dtype.itemsize
        members, body = self._answer(line, data, size)
        result = torch.frombuffer(bytearray(body), dtype=input.dtype).view(shape)
        return Result(result, **{key: int(text) for key, text in members.items()})
