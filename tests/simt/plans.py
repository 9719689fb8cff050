"""What plan.h takes and gives: GPUs, and the plan of a launch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What the plan knows of a GPU."""

    sm_count: int
    shared_bytes: int  # that a block can ask for
    compute_capability: int


# CUDA programming guide, technical specifications per compute capability.
DEVICES = {
    "A100": Device(108, 163 * 1024, 80),
    "H100": Device(132, 227 * 1024, 90),
    "B200": Device(148, 227 * 1024, 100),
    "RTX 5090": Device(170, 99 * 1024, 120),
    "AGX Orin": Device(16, 163 * 1024, 87),  # the fewest SMs
    # Of which all blocks of a launch fit the host executor; with clusters and without.
    "4 SMs, 9.0": Device(4, 227 * 1024, 90),
    "4 SMs, 8.0": Device(4, 99 * 1024, 80),
}


@dataclass(frozen=True)
class Plan:
    """Of plan.h, with the names of its schedule and of where it holds a row."""

    schedule: str
    hold: str
    vectorized: bool
    width: int
    vectors: int
    columns: int
    group: int
    across: int
    items: int
    team: int
    blocks: int
    shared_bytes: int
    scratch_bytes: int

    @property
    def threads(self) -> int:
        return self.across if self.schedule == "packed" else self.group * self.across * self.items

    @property
    def kernel(self) -> str:
        if self.schedule == "packed":
            if self.vectors == 0:
                return "packed_columns"
            return "packed_short" if self.hold == "registers" else "packed"
        if self.schedule == "columns":
            return "columns"
        chunk = 32 * (4 if self.width == 2 else 8)  # vectors; a short row has half as many at most
        if self.schedule == "warp" and self.vectorized and self.group * self.vectors <= chunk // 2:
            return "short"
        return "registers" if self.hold == "registers" else "long"
