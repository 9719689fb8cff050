"""What `make gpu-check` measures of softmax, in its order: nothing of a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.common import CALL, DTYPES

GIB = 1 << 30
# Short, powers of two, odd, and vocabularies.
ROW_SIZES: tuple[int, ...] = (
    7,
    10,
    64,
    128,
    256,
    512,
    1000,
    1024,
    2048,
    4096,
    5000,
    8192,
    16384,
    32768,
)
ROW_SIZES += (50257, 65536, 128256, 152064, 262144, 1048576)
# The last is a decoding step of a batch of one.
FEW_ROWS = ((1, 4 << 20), (8, 256 << 10), (32, 128 << 10), (1, 152064))
STRIDED = (((32, 1000, 196), 1), ((8, 19, 512, 512), 1), ((8192, 8192), 0))
# How what is read lies, in memory that `make` makes; and shapes of it, each with the one that is
# contiguous beside it.
LAYOUTS: dict[str, Callable[[Callable[..., Tensor], tuple[int, ...]], Tensor]] = {
    "contiguous": lambda make, s: make(*s),
    "sliced batch": lambda make, s: make(s[0], s[1] + 1, *s[2:])[:, :-1],
    "sliced last dim": lambda make, s: make(*s[:-1], s[-1] + 1)[..., :-1],
    "permuted batch": lambda make, s: make(s[0], s[2], s[1], *s[3:]).transpose(1, 2),
    "expanded": lambda make, s: make(1, *s[1:]).expand(s),
}
VIEWS: tuple[tuple[tuple[int, ...], int, str], ...] = (
    ((32, 1023, 4096), -1, "sliced batch"),
    ((8, 511, 50257), -1, "sliced batch"),
    ((16384, 8191), -1, "sliced last dim"),
    ((64, 16, 2048, 64), -1, "permuted batch"),
    ((32, 16, 128, 2048), -1, "permuted batch"),
    ((64, 999, 1024), 1, "sliced batch"),
    ((32, 1024, 4096), -1, "expanded"),
)
# torch.compile takes seconds for each, twice: bfloat16 softmax only, and of ROW_SIZES only these.
COMPILED_ROW_SIZES = (1024, 4096, 32768, 50257, 128256)
COMPILED_OTHERS = ((1, 152064), (32, 1000, 196))
FLOAT64_ROW_SIZES = (1024, 50257)
CAST_ROW_SIZES = (4096, 50257)
# The most tensors of a cell at a time: the input, the gradients, an output of each contender with
# its own graph, what is freed only after the next call, and the two of the copy.
TENSORS = 16
LAUNCHES = 64  # most calls in a batch: the device's queue takes 1024 kernels
L2_PASSES = 3  # buffers rotate over this many times the L2


@dataclass(frozen=True)
class Cell:
    # rows, few_rows, strided, views, cast, call; graph: a call replayed from a CUDA graph
    group: str
    op: str
    mode: str
    shape: tuple[int, ...]
    dim: int
    dtype: str
    out_dtype: str | None = None  # another than the input's: the cast is part of the call
    layout: str = "contiguous"  # of the input, backward of the output's gradient

    @property
    def label(self) -> str:
        dtype = self.dtype + (f" to {self.out_dtype}" if self.out_dtype else "")
        shape = "x".join(map(str, self.shape))
        graph = " in a CUDA graph" if self.group == "graph" else ""
        layout = "" if self.layout == "contiguous" else f" {self.layout}"
        return f"{self.op} {self.mode} {shape} dim {self.dim} {dtype}{layout}{graph}"

    @property
    def is_call(self) -> bool:
        """Its figure is the time of a call, by the wall clock, and not of the device."""
        return self.group in ("call", "graph")

    @property
    def compiled(self) -> bool:
        sizes = self.shape[-1] in COMPILED_ROW_SIZES if self.group == "rows" else False
        wanted = (self.op, self.dtype, self.out_dtype) == ("softmax", "bfloat16", None)
        return wanted and (sizes or (not self.is_call and self.shape in COMPILED_OTHERS))

    @property
    def moved_bytes(self) -> int:
        """The fewest: each tensor read or written once."""
        narrow = DTYPES[self.dtype].itemsize
        wide = DTYPES[self.out_dtype or self.dtype].itemsize
        # Forward the input and the output; backward both of the output's and the input's gradient.
        each = narrow + wide if self.mode == "forward" else 2 * wide + narrow
        elements = math.prod(self.shape)
        if self.layout == "expanded":  # one batch is read
            laid = narrow if self.mode == "forward" else wide
            return (each - laid) * elements + laid * elements // self.shape[0]
        return each * elements

    def buffer_sets(self, l2_bytes: int) -> int:
        """Sets of tensors to rotate over, so that none is in the L2 when its turn comes again."""
        return 1 if self.is_call else max(1, math.ceil(L2_PASSES * l2_bytes / self.moved_bytes))


def row_cells(op: str, dtype: str, sizes: tuple[int, ...], tensor_bytes: int) -> list[Cell]:
    itemsize = DTYPES[dtype].itemsize
    shapes = [(max(1, tensor_bytes // (size * itemsize)), size) for size in sizes]
    return [
        Cell("rows", op, mode, shape, -1, dtype)
        for mode in ("forward", "backward")
        for shape in shapes
    ]


def all_cells(tensor_bytes: int = GIB) -> list[Cell]:
    """The most telling first; tensor_bytes: of an input whose number of rows is free."""
    both = ("forward", "backward")
    cells: list[Cell] = []

    def add(op: str, dtype: str) -> None:
        cells.extend(row_cells(op, dtype, ROW_SIZES, tensor_bytes))
        for mode in both:
            cells.extend(Cell("few_rows", op, mode, shape, -1, dtype) for shape in FEW_ROWS)
            cells.extend(Cell("strided", op, mode, shape, dim, dtype) for shape, dim in STRIDED)

    def add_views(dtype: str) -> None:
        for mode in both:
            for shape, dim, layout in VIEWS:
                cells.extend(
                    Cell("views", "softmax", mode, shape, dim, dtype, layout=each)
                    for each in ("contiguous", layout)
                )

    add("softmax", "bfloat16")
    for op in ("softmax", "log_softmax"):
        for dtype in ("float32", "bfloat16"):
            calls = [Cell("call", op, m, CALL, -1, dtype) for m in ("forward", "recorded", "both")]
            graphs = [Cell("graph", op, m, CALL, -1, dtype) for m in ("forward", "both")]
            cells += calls + graphs
    add_views("bfloat16")
    add("softmax", "float32")
    add_views("float32")
    add("log_softmax", "bfloat16")
    for op in ("softmax", "log_softmax"):
        for size in CAST_ROW_SIZES:
            shape = (max(1, tensor_bytes // (size * 4)), size)
            cells += [Cell("cast", op, m, shape, -1, "bfloat16", "float32") for m in both]
    add("log_softmax", "float32")
    add("softmax", "float16")
    add("log_softmax", "float16")
    for op in ("softmax", "log_softmax"):
        cells += row_cells(op, "float64", FLOAT64_ROW_SIZES, tensor_bytes)
        cells += [Cell("strided", op, mode, (8192, 8192), 0, "float64") for mode in both]
    return cells
