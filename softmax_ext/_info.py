"""What was built, and what of it is in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from softmax_ext._loader import build_record, load

# Not that of the installation: another one can be imported than pip has installed.
__version__: str = build_record()["version"]


@dataclass(frozen=True)
class BuildInfo:
    """What was built, and what of it is in use on this machine.

    Attributes:
        version: of this package.
        torch: the version built for.
        cuda: the CUDA version built with, or None.
        architectures: of the GPUs built for, as TORCH_CUDA_ARCH_LIST has them, or None.
        cpu_isa: the CPU instruction set in use: the first of `cpu_isas`, or the one that the
            environment variable SOFTMAX_EXT_ISA names.
        cpu_isas: those that this build and this processor share, fastest first.
        devices: the types of the devices whose tensors run on this package's kernels here.

    Source: as :func:`build_info`.

    Example:
        >>> build_info().devices[0]
        'cpu'
    """

    version: str
    torch: str
    cuda: str | None
    architectures: str | None
    cpu_isa: str
    cpu_isas: tuple[str, ...]
    devices: tuple[str, ...]


def build_info() -> BuildInfo:
    """What was built, and what of it is in use on this machine: a :class:`BuildInfo`.

    Source: the record that the build left, and what the compiled part found at import.

    Example:
        >>> "cpu" in build_info().devices
        True
    """
    record = build_record()
    compiled = load().build_info()
    with_cuda = record["cuda"] is not None and torch.cuda.is_available()
    return BuildInfo(
        version=__version__,
        torch=record["torch"],
        cuda=record["cuda"],
        architectures=record["architectures"],
        cpu_isa=compiled["cpu_isa"],
        cpu_isas=tuple(compiled["cpu_isas"]),
        devices=("cpu", "cuda") if with_cuda else ("cpu",),
    )
