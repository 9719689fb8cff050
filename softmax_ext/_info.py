"""What was built, and what of it is in use."""

from __future__ import annotations

from typing import Any

import torch

from softmax_ext._loader import build_record, load

# Not that of the installation: another one can be imported than pip has installed.
__version__: str = build_record()["version"]


def build_info() -> dict[str, Any]:
    """What was built, and what of it is in use on this machine.

    Returns:
        version: of this package; torch: the version built for; cuda: the CUDA version built with,
        or None; architectures: of the GPUs built for, or None; cpu_isas: the CPU instruction sets
        that this build and processor share, fastest first; cpu_isa: the one in use (the first, or
        the one that the environment variable SOFTMAX_EXT_ISA names); devices: the device types
        whose tensors run on this package's kernels here.

    Example:
        >>> "cpu" in build_info()["devices"]
        True
    """
    record = build_record()
    compiled = load().build_info()
    with_cuda = record["cuda"] is not None and torch.cuda.is_available()
    return {
        "version": __version__,
        "torch": record["torch"],
        "cuda": record["cuda"],
        "architectures": record["architectures"],
        "cpu_isa": compiled["cpu_isa"],
        "cpu_isas": compiled["cpu_isas"],
        "devices": ["cpu", "cuda"] if with_cuda else ["cpu"],
    }
