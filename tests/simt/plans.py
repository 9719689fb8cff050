"""The GPUs that plans are made for."""

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
