"""softmax_ext against torch, on one device: ``python -m benchmarks --help``.

Each case is verified first, then timed in pairs: one run of torch, one of softmax_ext, in an order
that alternates, in the same process, in rounds over all cases. The figures are medians of the pairs
of all rounds; the speed-up is the median of the pairs' ratios, which a slow moment of the machine
leaves alone.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import softmax_ext
from benchmarks.common import (
    CALL,
    DTYPES,
    MODES,
    OPS,
    TOLERANCE,
    Run,
    make_run,
    smallest_step,
    wall_seconds,
)

# (shape, dim); each stands for a kind of row.
SHAPES: list[tuple[tuple[int, ...], int]] = [
    (CALL, -1),
    ((4096, 16), -1),  # short rows: routers, classifiers
    ((4096, 128), -1),
    ((1024, 1024), -1),  # in cache
    ((64, 50257), -1),  # a vocabulary
    ((1, 4194304), -1),  # one long row
    ((32, 1000, 196), 1),  # another dim, between others
    ((4096, 512), 0),  # the first dim
]


@dataclass(frozen=True)
class Case:
    op: str
    mode: str
    shape: tuple[int, ...]
    dim: int
    dtype: str
    threads: int


@dataclass(frozen=True)
class Result(Case):
    torch_us: float
    softmax_ext_us: float
    speedup: float

    @staticmethod
    def of(case: Case, times: list[tuple[float, float]]) -> Result:
        return Result(
            **asdict(case),
            torch_us=statistics.median(t for t, _ in times) * 1e6,
            softmax_ext_us=statistics.median(o for _, o in times) * 1e6,
            speedup=statistics.median(t / o for t, o in times),
        )


def runs(case: Case, device: str) -> tuple[Run, Run]:
    """The same work by torch and by softmax_ext."""
    shape, dim, mode, dtype = case.shape, case.dim, case.mode, DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    grad = torch.randn(shape, generator=generator, device=device).to(dtype)

    theirs, ours = OPS[case.op]
    return make_run(theirs, mode, x, dim, grad), make_run(ours, mode, x, dim, grad)


def verify(theirs: Run, ours: Run, dtype: torch.dtype) -> None:
    expected, actual = theirs().detach().double(), ours().detach().double()
    error = (actual - expected).abs().max().item()
    if not error <= TOLERANCE[dtype] * expected.abs().max().item() + smallest_step(dtype):
        raise AssertionError(f"results differ by up to {error:.3g}")


def seconds(run: Run, repeats: int, device: str) -> float:
    def repeated() -> None:
        for _ in range(repeats):
            run()

    return wall_seconds(repeated, device) / repeats


def pairs(theirs: Run, ours: Run, device: str, budget: float) -> list[tuple[float, float]]:
    """Seconds of paired runs."""
    once = max(seconds(theirs, 3, device), seconds(ours, 3, device))
    # A timed run is long enough for the clock, and there are enough pairs for a median.
    repeats = max(1, round(0.002 / once))
    count = max(11, min(301, round(budget / (2 * repeats * once))))
    times: list[tuple[float, float]] = []
    for k in range(count):
        if k % 2 == 0:
            first = seconds(theirs, repeats, device)
            times.append((first, seconds(ours, repeats, device)))
        else:
            first = seconds(ours, repeats, device)
            times.append((seconds(theirs, repeats, device), first))
    return times


def default_modes(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("forward", "recorded", "both") if shape == CALL else ("forward", "backward")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--shapes", nargs="+", help="only these, as 4096x16", default=[])
    parser.add_argument("--budget", type=float, default=0.3, help="seconds a case in each round")
    parser.add_argument("--rounds", type=int, default=5, help="over all cases, with new tensors")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--at-least", type=float, help="fail if a speed-up is below this")
    return parser.parse_args()


def machine(device: str) -> dict[str, object]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if device == "cpu" else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": softmax_ext.build_info(),
    }


def main() -> int:
    options = arguments()
    cases = [
        Case(op, mode, shape, dim, dtype, threads)
        for threads in options.threads
        for shape, dim in SHAPES
        if not options.shapes or "x".join(map(str, shape)) in options.shapes
        for dtype in options.dtypes
        for op in options.ops
        for mode in options.modes or default_modes(shape)
    ]
    if not cases:
        print("no such case", file=sys.stderr)
        return 2
    times: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for case, of_case in times.items():
            torch.set_num_threads(case.threads)
            theirs, ours = runs(case, options.device)
            verify(theirs, ours, DTYPES[case.dtype])
            of_case += pairs(theirs, ours, options.device, options.budget)
    results = [Result.of(case, of_case) for case, of_case in times.items()]

    print("| op | mode | shape | dim | dtype | threads | torch, us | softmax_ext, us | speed-up |")
    print("|---|---|---|---|---|---|---|---|---|")
    for result in results:
        label = "x".join(map(str, result.shape))
        print(
            f"| {result.op} | {result.mode} | {label} | {result.dim} | {result.dtype} "
            f"| {result.threads} | {result.torch_us:.2f} | {result.softmax_ext_us:.2f} "
            f"| {result.speedup:.2f} |"
        )
    worst = min(results, key=lambda result: result.speedup)
    mean = math.exp(statistics.fmean(math.log(result.speedup) for result in results))
    print(
        f"\n{len(results)} cases; geometric mean of the speed-ups {mean:.2f}, least "
        f"{worst.speedup:.2f} ({worst.op} {worst.mode} {worst.shape} {worst.dtype})"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": machine(options.device),
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.at_least is not None and worst.speedup < options.at_least:
        print(f"a speed-up is below {options.at_least}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
