"""softmax_ext against torch and others on the CPU: ``python -m benchmarks cpu --help``.

Each case is verified first, then timed in turns: one run of each contender, in an order that
rotates, in the same process, in rounds over all cases. The figures are medians of the runs of all
rounds; a speed-up is the median of the turns' ratios, which a slow moment of the machine leaves
alone.

The floor of a case is the longer of two times measured beside it: of a copy that moves as many
bytes between memory that exists; and, where it takes exp, of torch's exp of as many elements in
cache.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import math
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import softmax_ext
from benchmarks import losses_cpu_cases, scores_cpu_cases, segments_cpu_cases
from benchmarks.common import (
    DTYPES,
    OPS,
    TOLERANCE,
    Run,
    as_json,
    make_run,
    smallest_step,
    wall_seconds,
)
from benchmarks.scores_cpu_cases import FRESH, ScoresCase
from benchmarks.softmax_cpu_cases import LAYOUTS, MODES, SETS, Case

OPTIONAL = ("compile", "onnxruntime")
PEERS = ("torch", "contiguous", *OPTIONAL, *segments_cpu_cases.PEERS, "plain")


@dataclass(frozen=True)
class Result(Case):
    us: dict[str, float]  # by contender
    speedup: dict[str, float]  # over each peer
    copy_us: float
    exp_us: float
    gbps: float
    of_copy: float
    of_floor: float


def onnx_run(case: Case, x: torch.Tensor) -> Run:
    """The operator of the same name, on the same memory; its output is new."""
    import numpy
    import onnx
    import onnxruntime

    types = {"float32": 1, "float64": 11, "float16": 10}
    value = [
        onnx.helper.make_tensor_value_info(name, types[case.dtype], case.shape) for name in "xy"
    ]
    operator = "Softmax" if case.op == "softmax" else "LogSoftmax"
    node = onnx.helper.make_node(operator, ["x"], ["y"], axis=case.dim)
    graph = onnx.helper.make_graph([node], case.op, value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", 13)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    array: numpy.ndarray[Any, Any] = x.numpy()
    return lambda: torch.from_numpy(session.run(None, {"x": array})[0])


def in_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """With the strides of x."""
    result = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=dtype)
    result.copy_(torch.empty(0).set_(x.untyped_storage()))
    return result.as_strided(x.shape, x.stride(), x.storage_offset())


def contenders(case: Case, peers: Iterable[str]) -> dict[str, Run]:
    """The same work by softmax_ext and by those of the peers that can do it.

    "contiguous": by softmax_ext, of a contiguous copy where what is read is not.
    """
    if isinstance(case, ScoresCase):
        return case.runs()
    if isinstance(case, segments_cpu_cases.SegmentCase):
        return segments_cpu_cases.contenders(case)
    if isinstance(case, losses_cpu_cases.LossCase):
        return losses_cpu_cases.contenders(case)
    shape, dim, mode, dtype = case.shape, case.dim, case.mode, DTYPES[case.dtype]
    torch.manual_seed(0)
    strided, grad = (in_dtype(LAYOUTS[case.layout](shape), dtype) for _ in range(2))
    x = strided.contiguous() if mode == "backward" else strided  # whose output is
    theirs, ours = OPS[case.op]

    def run(function: Callable[..., torch.Tensor], x: torch.Tensor, grad: torch.Tensor) -> Run:
        if mode == "out":
            out = torch.empty(shape, dtype=dtype)
            return lambda: function(x, dim, out=out)
        return make_run(function, mode, x, dim, grad)

    runs = {"softmax_ext": run(ours, x, grad), "torch": run(theirs, x, grad)}
    if case.layout != "contiguous":
        runs["contiguous"] = run(ours, x.contiguous(), grad.contiguous())
    if "compile" in peers and mode != "out":
        runs["compile"] = run(torch.compile(theirs, dynamic=False), x, grad)
    if "onnxruntime" in peers and mode == "forward" and case.dtype != "bfloat16":
        runs["onnxruntime"] = onnx_run(case, x)
    return runs


def verify(case: Case, runs: dict[str, Run]) -> None:
    dtype = DTYPES[case.dtype]
    reference = next(name for name in runs if name not in ("softmax_ext", "plain"))
    expected = runs[reference]().detach().double()
    limit = case.tolerances * TOLERANCE[dtype] * expected.abs().max().item() + smallest_step(dtype)
    for name, run in runs.items():
        if name == "plain":  # of other work
            continue
        error = (run().detach().double() - expected).abs().max().item()
        if not error <= limit:
            raise AssertionError(f"{name} and {reference} differ by up to {error:.3g}: {case}")


def seconds(run: Run, repeats: int) -> float:
    def repeated() -> None:
        for _ in range(repeats):
            run()

    return wall_seconds(repeated, "cpu") / repeats


def turns(runs: dict[str, Run], budget: float) -> list[dict[str, float]]:
    """Seconds of runs in turns."""
    once = max(seconds(run, 2) for run in runs.values())
    # A timed run is long enough for the clock, and there are enough turns for a median.
    repeats = max(1, round(0.001 / once))
    count = max(5, min(101, round(budget / (len(runs) * repeats * once))))
    turns: list[dict[str, float]] = [{} for _ in range(count)]
    # What empties memory first has turns of its own, behind those that find it warm.
    for fresh in (False, True):
        names = [name for name in runs if name.endswith(FRESH) == fresh]
        for name in names:
            runs[name]()
        for k, turn in enumerate(turns):
            for name in names[k % len(names) :] + names[: k % len(names)] if names else []:
                turn[name] = seconds(runs[name], repeats)
    return turns


EXP_ELEMENTS = 65536  # of a thread


def floor_runs(case: Case) -> dict[str, Run]:
    half = torch.ones(case.bytes // 2, dtype=torch.uint8)
    into = torch.empty_like(half)
    x = torch.zeros(EXP_ELEMENTS * case.threads)
    out = torch.empty_like(x)
    return {"copy": lambda: into.copy_(half), "exp": lambda: torch.exp(x, out=out)}


def measure(case: Case, times: list[dict[str, float]], floors: list[dict[str, float]]) -> Result:
    def median(entries: list[dict[str, float]], name: str) -> float:
        return statistics.median(entry[name] for entry in entries) * 1e6

    us = {name: median(times, name) for name in times[0]}
    elements = math.prod(case.shape)
    copy_us = median(floors, "copy")
    exp_us = median(floors, "exp") * elements / (EXP_ELEMENTS * case.threads)
    floor = max(copy_us, exp_us if case.takes_exp else 0.0)
    return Result(
        **{field.name: getattr(case, field.name) for field in fields(Case)},
        us=us,
        speedup={
            name: statistics.median(entry[name] / entry[ours] for entry in times)
            for name in us
            for ours in ["softmax_ext" + FRESH * name.endswith(FRESH)]
            if name != ours
        },
        copy_us=copy_us,
        exp_us=exp_us if case.takes_exp else 0.0,
        gbps=case.bytes / us["softmax_ext"] / 1e3,
        of_copy=copy_us / us["softmax_ext"],
        of_floor=floor / us["softmax_ext"],
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu", description=__doc__)
    threads = sorted({1, torch.get_num_threads()})
    parser.add_argument("--threads", type=int, nargs="+", default=threads)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default: all; of scores and losses two"
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument(
        "--set",
        choices=[*SETS, "scores", "segments", "losses"],
        default="shapes",
        help="columns: inner 2 to 64; scores: with arguments, in the modes forward and both; "
        "segments: segment_softmax, without `out`; losses: cross_entropy, as scores",
    )
    parser.add_argument("--shapes", nargs="+", help="only these, as 4096x16", default=[])
    parser.add_argument("--peers", nargs="+", choices=OPTIONAL, default=[], help="beside torch")
    parser.add_argument("--budget", type=float, default=0.1, help="seconds a case in each round")
    parser.add_argument("--rounds", type=int, default=3, help="over all cases, with new tensors")
    parser.add_argument("--json", type=Path, help="where to write the results, and a plot beside")
    parser.add_argument(
        "--at-least", type=float, help="fail if a speed-up over torch (segments: any) is below this"
    )
    options = parser.parse_args()
    of_scores = options.set in ("scores", "losses")
    options.dtypes = options.dtypes or (["float32", "bfloat16"] if of_scores else list(DTYPES))
    options.modes = options.modes or (
        ["forward", "both"] if of_scores else ["forward", "out", "backward"]
    )
    if of_scores and not set(options.modes) <= {"forward", "both"}:
        parser.error(f"--set {options.set} has the modes forward and both")
    return options


def machine() -> dict[str, object]:
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "device": name,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else "",
        "build": asdict(softmax_ext.build_info()),
    }


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def summary(results: list[Result]) -> Iterator[str]:
    """Of new outputs, which is what a call makes, and of existing ones."""
    for peer in PEERS:
        for modes, title in ((("forward", "backward"), "new outputs"), (("out",), "out=")):
            cases = [r for r in results if r.mode in modes and peer in r.speedup]
            for dtypes in (tuple(DTYPES), ("float32",)):
                of = [r for r in cases if r.dtype in dtypes]
                if not of:
                    continue
                worst = min(of, key=lambda result: result.speedup[peer])
                mean = geometric_mean(result.speedup[peer] for result in of)
                yield (
                    f"over {peer}, {title}, {'float32' if len(dtypes) == 1 else 'all dtypes'}: "
                    f"{len(of)} cases, geometric mean {mean:.2f}, "
                    f"least {worst.speedup[peer]:.2f} ({worst.op} {worst.mode} "
                    f"{'x'.join(map(str, worst.shape))} {worst.dtype}, threads: {worst.threads})"
                )


def table(results: list[Result]) -> Iterator[str]:
    peers = [name for name in PEERS if any(name in result.us for result in results)]
    header = [
        "op",
        "mode",
        "shape",
        "dim",
        "layout",
        "dtype",
        "threads",
        "us",
        "GB/s",
        "of a copy",
        "of the floor",
    ]
    yield "| " + " | ".join([*header, *(f"over {name}" for name in peers)]) + " |"
    yield "|---" * (len(header) + len(peers)) + "|"
    for r in results:
        cells = [r.op, r.mode, "x".join(map(str, r.shape)), r.dim, r.layout, r.dtype, r.threads]
        cells += [
            f"{r.us['softmax_ext']:.2f}",
            f"{r.gbps:.1f}",
            f"{r.of_copy:.2f}",
            f"{r.of_floor:.2f}",
        ]
        cells += [f"{r.speedup[name]:.2f}" if name in r.speedup else "" for name in peers]
        yield "| " + " | ".join(map(str, cells)) + " |"


def plot(results: list[Result], path: Path) -> None:
    """Speed-up over torch by shape; a dot a case."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys("x".join(map(str, r.shape)) + f", {r.dim}" for r in results))
    modes = [mode for mode in MODES if any(r.mode == mode for r in results)]
    figure = Figure(figsize=(5 * len(modes), 6), layout="constrained")
    axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axis, mode in zip(axes, modes, strict=True):
        for dtype, color in zip(
            DTYPES, ("tab:green", "tab:red", "tab:orange", "tab:blue"), strict=True
        ):
            of = [r for r in results if r.mode == mode and r.dtype == dtype]
            at = [labels.index("x".join(map(str, r.shape)) + f", {r.dim}") for r in of]
            axis.scatter(
                [r.speedup["torch"] for r in of], at, s=12, color=color, label=dtype, alpha=0.7
            )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=mode, xscale="log", xlabel="speed-up over torch")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def progress(cases: list[Case], title: str) -> Iterable[Case]:
    if importlib.util.find_spec("tqdm") is None:
        print(title, file=sys.stderr)
        return cases
    from tqdm import tqdm

    bar: Iterable[Case] = tqdm(cases, desc=title, leave=False)
    return bar


def keep_freed_memory(with_large: bool) -> None:
    """What is freed stays mapped, so that no result of either side has pages that are new.

    Those of more than 32 MB, which C libraries map anew each time, only `with_large`.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of the GNU C library
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)
        if with_large:
            mallopt(mmap_max, 0)


def main() -> int:
    options = arguments()
    if options.set not in ("shapes", "losses"):
        keep_freed_memory(with_large=options.set in ("scores", "segments"))
    for peer in options.peers:
        if peer == "onnxruntime" and not all(
            map(importlib.util.find_spec, ("onnxruntime", "onnx"))
        ):
            print("onnxruntime is missing: pip install softmax_ext[bench]", file=sys.stderr)
            return 2
    if options.set == "scores":
        cases = scores_cpu_cases.cases(options.threads, options.dtypes, options.modes)
    elif options.set == "losses":
        cases = losses_cpu_cases.cases(options.threads, options.dtypes, options.modes)
    elif options.set == "segments":
        cases = segments_cpu_cases.cases(
            options.threads, options.dtypes, options.ops, options.modes
        )
    else:
        cases = [
            Case(op, mode, shape, dim, layout, dtype, threads)
            for threads, (shape, dim, layout), dtype, op, mode in itertools.product(
                options.threads, SETS[options.set], options.dtypes, options.ops, options.modes
            )
        ]
    if options.shapes:
        cases = [case for case in cases if "x".join(map(str, case.shape)) in options.shapes]
    if not cases:
        print("no such case", file=sys.stderr)
        return 2
    times: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    floors: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    warnings.filterwarnings("ignore", module="torch._inductor")
    for number in range(options.rounds):
        for case in progress(cases, f"round {number + 1} of {options.rounds}"):
            torch.set_num_threads(case.threads)
            runs = contenders(case, options.peers)
            verify(case, runs)
            times[case] += turns(runs, options.budget)
            floors[case] += turns(floor_runs(case), options.budget / 4)
    results = [measure(case, times[case], floors[case]) for case in cases]
    lines = scores_cpu_cases.table if options.set == "scores" else table
    print("\n".join(lines(results)), end="\n\n")
    print("\n".join(summary(results)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        head = {"machine": machine(), "summary": list(summary(results))}
        options.json.write_text(as_json(head, "results", map(asdict, results)))
        if importlib.util.find_spec("matplotlib") and options.set not in ("segments", "losses"):
            plot(results, options.json.with_suffix(".png"))
    least = min(
        result.speedup[peer]
        for result in results
        for peer in ("torch", *segments_cpu_cases.PEERS)
        if peer in result.speedup
    )
    if options.at_least is not None and least < options.at_least:
        print(f"a speed-up is below {options.at_least}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
