"""The arithmetic on what `make gpu-check` measures: nothing of a device."""

from __future__ import annotations

import math
import statistics


def calls_in_batch(seconds_of_call: float, target: float, most: int) -> int:
    """Enough for the clock: a batch takes `target` seconds or more, as far as `most` allows."""
    return max(1, min(most, math.ceil(target / max(seconds_of_call, 1e-9))))


Times = list[dict[str, float]]  # of each round: seconds a call of each contender


def summarise(times: Times, moved_bytes: int | None, copied_bytes: int) -> dict[str, object]:
    """Medians; ratios are taken within a round. moved_bytes: None where only the call counts."""
    contenders: dict[str, dict[str, float]] = {}
    for name in [name for name in times[0] if name != "copy"]:
        seconds = [round_[name] for round_ in times]
        figures = {"us": statistics.median(seconds) * 1e6}
        quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [0.0] * 3
        figures["spread"] = (quarters[2] - quarters[0]) / statistics.median(seconds)
        if moved_bytes is not None:
            figures["gbps"] = moved_bytes / statistics.median(seconds) / 1e9
            figures["fraction_of_copy"] = statistics.median(
                (moved_bytes / round_[name]) / (copied_bytes / round_["copy"]) for round_ in times
            )
        contenders[name] = figures
    summary: dict[str, object] = {
        "contenders": contenders,
        "speedup": {
            name: statistics.median(round_[name] / round_["softmax_ext"] for round_ in times)
            for name in contenders
            if name != "softmax_ext"
        },
    }
    if moved_bytes is not None:
        copies = statistics.median(round_["copy"] for round_ in times)
        summary["copy_gbps"] = copied_bytes / copies / 1e9
    return summary


class Budget:
    """Seconds to spend, and what a cell has cost so far, plain or with torch.compile."""

    FIRST_GUESS = 3.0
    COMPILE_FIRST_GUESS = 30.0
    COMPILE_SHARE = 0.45  # of all; so that the plain cells are not left without

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.spent = 0.0
        self.spent_compiling = 0.0
        self.plain: list[float] = []
        self.compiling: list[float] = []

    def fits(self, compiled: bool) -> bool:
        guess = max(self.plain[-5:], default=self.FIRST_GUESS)
        if compiled:
            costs = self.compiling or [self.COMPILE_FIRST_GUESS]
            more = statistics.median(costs)
            if self.spent_compiling + more > self.COMPILE_SHARE * self.seconds:
                return False
            guess = max(guess, more)
        return self.spent + guess <= self.seconds

    def record(self, seconds: float, compiled: bool) -> None:
        self.spent += seconds
        (self.compiling if compiled else self.plain).append(seconds)
        if compiled:
            self.spent_compiling += seconds
