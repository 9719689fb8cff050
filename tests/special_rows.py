"""Rows with infinities, NaN, and values far apart or equal: what softmax treats specially."""

from collections.abc import Callable

import torch
from tolerances import TORCH

INF, NAN = torch.inf, torch.nan


def with_values(**at: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Overwrites the first, middle and last elements of a row."""

    def fill(row: torch.Tensor) -> torch.Tensor:
        places = {"first": 0, "middle": row.numel() // 2, "last": row.numel() - 1}
        for place, value in at.items():
            row[places[place]] = value
        return row

    return fill


ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "-inf first": with_values(first=-INF),
    "-inf last": with_values(last=-INF),
    "-inf in three places": with_values(first=-INF, middle=-INF, last=-INF),
    "all -inf": lambda r: r.fill_(-INF),
    "all -inf but the first": lambda r: with_values(first=1.5)(r.fill_(-INF)),
    "all -inf but the last": lambda r: with_values(last=1.5)(r.fill_(-INF)),
    "all -inf but the middle": lambda r: with_values(middle=1.5)(r.fill_(-INF)),
    "every other -inf": lambda r: r.masked_fill_(torch.arange(r.numel()) % 2 == 0, -INF),
    "first half -inf": lambda r: r.masked_fill_(torch.arange(r.numel()) < r.numel() // 2, -INF),
    "last half -inf": lambda r: r.masked_fill_(torch.arange(r.numel()) >= r.numel() // 2, -INF),
    "+inf first": with_values(first=INF),
    "+inf last": with_values(last=INF),
    "+inf and -inf": with_values(first=INF, last=-INF),
    "all +inf": lambda r: r.fill_(INF),
    "NaN first": with_values(first=NAN),
    "NaN last": with_values(last=NAN),
    "NaN amid -inf": lambda r: with_values(middle=NAN)(r.fill_(-INF)),
    "NaN and +inf": with_values(first=NAN, last=INF),
    "all NaN": lambda r: r.fill_(NAN),
    "all equal": lambda r: r.fill_(3.25),
    "all 0": lambda r: r.fill_(0.0),
    "0 and -0": lambda r: with_values(first=-0.0)(r.zero_()),
    "one far above": lambda r: with_values(middle=60.0)(r),
    "one far below": lambda r: with_values(middle=-60.0)(r),
}


def is_nan_for_torch_too(op: str, input: torch.Tensor, dim: int, actual: torch.Tensor) -> bool:
    return torch.equal(actual.isnan(), TORCH[op](input, dim).isnan())
