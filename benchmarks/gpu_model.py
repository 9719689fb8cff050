"""Writes the tables of docs/performance_model.md: what softmax_ext.explain expects of the cells of
the GPU benchmark. No GPU is needed.

    python -m benchmarks.gpu_model
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from functools import cache
from itertools import groupby
from pathlib import Path

from benchmarks.common import DTYPES
from benchmarks.softmax_gpu_cells import Cell, all_cells
from softmax_ext import Explanation, explain

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance_model.md"
BEGIN, END = "<!-- begin: python -m benchmarks.gpu_model -->", "<!-- end -->"
DEVICES = ("H100", "H200")
# Measured results, by device.
MEASURED = {"H100": "nvidia-h100-80gb-hbm3"}
RESULTS = Path(__file__).resolve().parent / "results"
GROUPS = ("rows", "few_rows", "strided", "cast")
MODEL_DTYPES = ("bfloat16", "float32", "float64")
SINGLE_ROW = (1, 4 << 20)


def model_cells() -> list[Cell]:
    cells = [cell for cell in all_cells() if cell.op == "softmax" and cell.group in GROUPS]
    cells = [cell for cell in cells if cell.dtype in MODEL_DTYPES]
    return sorted(cells, key=table_of)


def table_of(cell: Cell) -> tuple[int, int, int]:
    """Cells of the same are in one table; backward comes last."""
    return GROUPS.index(cell.group), MODEL_DTYPES.index(cell.dtype), -ord(cell.mode[0])


def explain_cell(cell: Cell, device: str) -> Explanation:
    return explain(
        cell.shape,
        DTYPES[cell.dtype],
        cell.dim,
        out_dtype=DTYPES[cell.out_dtype] if cell.out_dtype else None,
        backward=cell.mode == "backward",
        device=device,
    )


@cache
def measured(device: str) -> dict[Cell, float]:
    """Fractions of a copy."""
    document = json.loads((RESULTS / MEASURED[device] / "results.json").read_text())
    fractions = {}
    for entry in document["cells"]:
        given = {f.name: entry[f.name] for f in fields(Cell) if f.name in entry}
        cell = Cell(**given | {"shape": (*entry["shape"],)})
        ours = entry["contenders"]["softmax_ext"]
        if "fraction_of_copy" in ours:
            fractions[cell] = ours["fraction_of_copy"]
    return fractions


def target(cell: Cell) -> float | None:
    """The fraction of a copy that is aimed at."""
    if cell.shape == SINGLE_ROW:
        return 0.60
    if cell.group == "few_rows":
        return None
    if cell.group == "strided":
        return 0.85
    size = cell.shape[cell.dim]
    return 0.90 if size >= 1024 else 0.80 if size >= 256 else None


def coarse(number: float) -> str:
    """Two significant digits: more would say more than the model knows."""
    return f"{round(number, 1 - math.floor(math.log10(number))):g}" if number else "0"


def percent(fraction: float) -> str:
    """To 5 %."""
    return f"{5 * round(20 * fraction)} %"


def misses(cell: Cell, fraction: float) -> bool:
    aim = target(cell)
    return aim is not None and 5 * round(20 * fraction) < 100 * aim


def emphasised(cell: Cell, fraction: float) -> str:
    mark = " **" if misses(cell, fraction) else " "
    return f"{mark}{percent(fraction)}{mark[::-1]}"


def name(cell: Cell) -> str:
    shape = " x ".join(map(str, cell.shape))
    return shape if cell.dim == -1 else f"{shape}, dim {cell.dim}"


def tables() -> str:
    head = "| shape | schedule (hold) | blocks x threads | bytes an element |"
    for device in DEVICES:
        head += f" {device} us | of copy | limited by |"
        head += " **measured** |" if device in MEASURED else ""
    rule = "|---|---|---|---|" + "---|---|---|" * len(DEVICES) + "---|" * len(MEASURED)
    lines: list[str] = []
    for _, found_cells in groupby(model_cells(), table_of):
        cells = list(found_cells)
        first = cells[0]
        types = f"{first.dtype} to {first.out_dtype}" if first.out_dtype else first.dtype
        lines += [f"### {first.group}: {types}, {first.mode}", "", head, rule]
        for cell in cells:
            found = [explain_cell(cell, device) for device in DEVICES]
            plan = found[0]
            size = plan.bytes_moved / math.prod(cell.shape)
            line = f"| {name(cell)} | {plan.schedule} ({plan.hold}) "
            line += f"| {plan.blocks} x {plan.threads} | {size:.0f} |"
            for device, each in zip(DEVICES, found, strict=True):
                fraction = emphasised(cell, each.copy_fraction)
                line += f" {coarse(each.microseconds)} |{fraction}| {each.limiter} |"
                if device in MEASURED:
                    fractions = measured(device)
                    line += f"{emphasised(cell, fractions[cell]) if cell in fractions else ' - '}|"
            lines.append(line)
        lines.append("")
    return "\n".join(lines)


def render(text: str) -> str:
    """The document with its tables renewed."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text()))
