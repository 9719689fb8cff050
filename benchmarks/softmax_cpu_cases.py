"""What `python -m benchmarks cpu` measures of softmax: shapes, layouts and modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common import DTYPES

# (shape, dim); each stands for a kind of row.
SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((8, 64), -1),  # the cost of a call
    ((4096, 7), -1),  # short rows: classifiers, routers
    ((4096, 16), -1),
    ((4096, 128), -1),
    ((256, 1024), -1),  # in cache
    ((1000, 1000), -1),
    ((4096, 4096), -1),  # beyond all caches
    ((64, 50257), -1),  # vocabularies
    ((256, 128256), -1),
    ((1, 4194304), -1),  # one long row
    ((32, 1000, 196), 1),  # another dim, between others
    ((8, 19, 256, 256), 1),  # segmentation
    ((4096, 512), 0),  # the first dim
    ((64, 12, 128, 128), -1),  # attention
]
# Few columns side by side: 2^16 elements or one slice, and two shapes of models.
COLUMN_DIMS = (2, 7, 17, 64, 1000, 100000)
COLUMN_INNERS = (2, 3, 5, 8, 16, 17, 33, 64)
COLUMNS: list[tuple[tuple[int, ...], int]] = [
    *(
        ((max(1, 2**16 // (dim * inner)), dim, inner), 1)
        for dim in COLUMN_DIMS
        for inner in COLUMN_INNERS
    ),
    ((4, 100000, 3), 1),
    ((6, 21, 200, 200), 1),
]
# How the elements of a shape lie in memory: of the input, and in a backward of the gradient.
LAYOUTS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "contiguous": torch.randn,
    "sliced batch": lambda s: torch.randn(s[0], s[1] + 1, *s[2:])[:, :-1],
    "sliced last dim": lambda s: torch.randn(*s[:-1], s[-1] + 100)[..., : s[-1]],
    "permuted outer dims": lambda s: torch.randn(s[0], s[2], s[1], *s[3:]).transpose(1, 2),
    "expanded": lambda s: torch.randn(1, *s[1:]).expand(s),
    "transposed": lambda s: torch.randn(s[::-1]).t(),
    "channels last": lambda s: torch.randn(s).to(memory_format=torch.channels_last),
}
STRIDED: list[tuple[tuple[int, ...], int, str]] = [
    ((8, 128, 1000), -1, "sliced batch"),
    ((64, 16, 64), -1, "sliced batch"),
    ((1024, 900), -1, "sliced last dim"),
    ((32, 100, 200), 1, "sliced last dim"),
    ((16, 12, 128, 64), -1, "permuted outer dims"),
    ((8, 12, 128, 128), -1, "expanded"),
    ((1000, 1000), -1, "transposed"),
    ((8, 256, 28, 28), 1, "channels last"),
]
SETS = {
    "shapes": [(shape, dim, "contiguous") for shape, dim in SHAPES],
    "columns": [(shape, dim, "contiguous") for shape, dim in COLUMNS],
    "strided": STRIDED,
}
# forward: into a new output; out: into one that exists; backward: the input's gradient, new.
# recorded, both: as in benchmarks/common.py.
MODES = ("forward", "out", "backward", "recorded", "both")


@dataclass(frozen=True)
class Case:
    op: str
    mode: str
    shape: tuple[int, ...]
    dim: int
    layout: str
    dtype: str
    threads: int

    @property
    def bytes(self) -> int:
        """Read and written, if each tensor is moved once."""
        tensors = 3 if self.mode == "backward" else 2
        return tensors * math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def takes_exp(self) -> bool:
        return self.mode != "backward" or self.op == "log_softmax"

    @property
    def tolerances(self) -> int:
        """By how many torch's result may be off."""
        return 1
