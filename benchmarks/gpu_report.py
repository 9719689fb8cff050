"""The table and the plots of a results.json: ``python -m benchmarks.gpu_report FOLDER``."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.softmax_gpu_cells import ROW_SIZES

CONTENDERS = ("eager", "compile", "compile max-autotune", "liger", "quack")
DTYPE_COLORS = {
    "bfloat16": "tab:blue",
    "float16": "tab:orange",
    "float32": "tab:green",
    "float64": "tab:red",
}

Entry = dict[str, Any]


def default_folder() -> Path:
    """That of the results of the GPU at hand."""
    import torch

    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return Path(__file__).resolve().parent / "results" / name


def shape_of(entry: Entry) -> str:
    layout = entry.get("layout", "contiguous")
    of_layout = "" if layout == "contiguous" else f", {layout}"
    return "x".join(map(str, entry["shape"])) + f", {entry['dim']}{of_layout}"


def dtype_of(entry: Entry) -> str:
    cast = f" to {entry['out_dtype']}" if entry["out_dtype"] else ""
    return f"{entry['dtype']}{cast}"


def columns(entry: Entry) -> list[str]:
    ours = entry["contenders"]["softmax_ext"]

    def figure(key: str, form: str) -> str:
        return format(ours[key], form) if key in ours else ""

    speedups = [entry["speedup"].get(name) for name in CONTENDERS]
    return [
        entry["op"],
        entry["mode"] + (" (CUDA graph)" if entry["group"] == "graph" else ""),
        shape_of(entry),
        dtype_of(entry),
        figure("us", ".2f"),
        figure("gbps", ".0f"),
        figure("fraction_of_copy", ".3f"),
        *("" if speedup is None else f"{speedup:.2f}" for speedup in speedups),
    ]


HEADER = ["op", "mode", "shape, dim", "dtype", "µs", "GB/s", "of a copy"]
HEADER += [f"over {name}" for name in CONTENDERS]


def line(entry: Entry) -> str:
    return " | ".join(text or "-" for text in columns(entry))


def summary(document: dict[str, Any]) -> str:
    """Lines of Markdown: what was measured on what, means and extremes, and what is missing."""
    machine, cells = document["machine"], document["cells"]
    lines = [f"# {machine['device']}", ""]
    lines += [
        f"torch {machine['torch']}, CUDA {machine['cuda']}, driver {machine['driver']}, "
        f"{machine['sm_count']} SMs, commit {document['commit']}",
        "",
    ]
    if document["checks"]:
        checks = (f"{name}: {result}" for name, result in document["checks"].items())
        lines += [f"Checks: {'; '.join(checks)}", ""]
    copies = [entry["copy_gbps"] for entry in cells if "copy_gbps" in entry]
    if copies:
        lines += [
            f"A device-to-device copy, once in each round of each cell: median "
            f"{statistics.median(copies):.0f} GB/s, {min(copies):.0f} to {max(copies):.0f}.",
            "",
        ]
    for name in CONTENDERS:
        of_cells = [(entry["speedup"][name], entry) for entry in cells if name in entry["speedup"]]
        if not of_cells:
            lines.append(f"- Over {name}: not measured")
            continue
        mean = math.exp(statistics.fmean(math.log(speedup) for speedup, _ in of_cells))
        least, entry = min(of_cells, key=lambda pair: pair[0])
        lines.append(
            f"- Over {name}: {len(of_cells)} cells, geometric mean {mean:.2f}, least {least:.2f} "
            f"({entry['op']} {entry['mode']} {shape_of(entry)} {dtype_of(entry)})"
        )
    for key, title in (("failed", "FAILED, so without figures"), ("missing", "Missing")):
        if document[key]:
            lines += ["", f"{title}: {len(document[key])}", ""]
            lines += [f"- {entry['cell']}: {entry['why']}" for entry in document[key]]
    if "aborted" in document:
        lines += ["", f"Aborted: {document['aborted']}"]
    return "\n".join(lines) + "\n"


def table(document: dict[str, Any]) -> str:
    rows = [HEADER, ["---"] * len(HEADER), *map(columns, document["cells"])]
    note = "An empty field was not measured: results.json says why. A call has no GB/s.\n\n"
    return note + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def fractions_by_size(
    cells: list[Entry], op: str, mode: str, dtype: str, name: str
) -> dict[int, float]:
    """Of a copy, of every size of rows: NaN, at which a line breaks, where it was not measured."""
    found = {
        entry["shape"][-1]: entry["contenders"][name]["fraction_of_copy"]
        for entry in cells
        if (entry["op"], entry["mode"], entry["dtype"]) == (op, mode, dtype)
        and entry["group"] == "rows"
        and name in entry["contenders"]
    }
    return {size: found.get(size, math.nan) for size in sorted({*ROW_SIZES, *found})}


def plot_fractions(cells: list[Entry], path: Path) -> None:
    """Of the rows alone in their tensor's last dim, by their size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, op in enumerate(("softmax", "log_softmax")):
        for column, mode in enumerate(("forward", "backward")):
            plot = axes[row][column]
            for dtype, color in DTYPE_COLORS.items():
                for name, style in (("softmax_ext", "o-"), ("eager", "x--")):
                    fractions = fractions_by_size(cells, op, mode, dtype, name)
                    if not all(map(math.isnan, fractions.values())):
                        plot.plot(
                            list(fractions),
                            list(fractions.values()),
                            style,
                            color=color,
                            label=f"{dtype} {name}",
                            markersize=4,
                        )
            plot.axhline(1, color="black", linewidth=0.8)
            plot.set(title=f"{op} {mode}", xscale="log", xlabel="N, elements in a row")
            plot.set(ylabel="fraction of a device-to-device copy", ylim=(0, None))
            plot.grid(alpha=0.3)
            if plot.lines[1:]:
                plot.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)


def plot_speedups(cells: list[Entry], path: Path) -> None:
    """Over torch eager, a line for each shape."""
    from matplotlib.figure import Figure

    cells = [entry for entry in cells if "eager" in entry["speedup"]]

    # The same shape for all dtypes: those with free rows differ in their number.
    def name(entry: Entry) -> str:
        if entry["group"] in ("rows", "cast"):
            cast = "cast, " if entry["group"] == "cast" else ""
            return f"{cast}rows of {entry['shape'][-1]}"
        return shape_of(entry) + (" (CUDA graph)" if entry["group"] == "graph" else "")

    names = list(dict.fromkeys(map(name, cells)))
    figure = Figure(figsize=(14, 2.5 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (("forward", "recorded"), ("backward", "both"))
    for plot, modes in zip(axes, panels, strict=True):
        for dtype, color in DTYPE_COLORS.items():
            for op, marker in (("softmax", "o"), ("log_softmax", "x")):
                points = [
                    (entry["speedup"]["eager"], names.index(name(entry)))
                    for entry in cells
                    if (entry["op"], entry["dtype"]) == (op, dtype) and entry["mode"] in modes
                ]
                if points:
                    label = f"{dtype} {op}"
                    plot.plot(*zip(*points, strict=True), marker, color=color, label=label)
        plot.axvline(1, color="black", linewidth=0.8)
        plot.set(title=" and ".join(modes), xscale="log", xlabel="speed-up over torch eager")
        ticks = [0.2, 0.5, 1, 2, 5, 10]
        plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        plot.minorticks_off()
        plot.grid(alpha=0.3)
        if plot.lines[1:]:
            plot.legend(fontsize="small")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def write(folder: Path) -> str:
    """Writes table.md and, with matplotlib, the plots; returns the summary."""
    document = json.loads((folder / "results.json").read_text())
    text = summary(document)
    (folder / "table.md").write_text(text + "\n" + table(document))
    try:
        plot_fractions(document["cells"], folder / "fraction.png")
        plot_speedups(document["cells"], folder / "speedup.png")
    except ImportError as error:
        text += f"\nNo plots: {error}; python -m benchmarks.gpu_report {folder} draws them later\n"
    return text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write(Path(sys.argv[1])))
