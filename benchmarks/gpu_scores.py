"""softmax_ext of scores, of segments and cross-entropy against what models write, on one GPU.

The cases of ``python -m benchmarks cpu --set scores``, ``--set segments`` and, of class indices,
``--set losses``. Each result is verified first; then all are timed in rounds, as ``benchmarks.gpu``
has it, beside our softmax of the same shape and a copy. ``scores.json`` is written anew after each
case.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    cpu,
    gpu,
    gpu_report,
    losses_cpu_cases,
    scores_cpu_cases,
    segments_cpu_cases,
)
from benchmarks.gpu_timing import Budget, calls_in_batch, summarise
from benchmarks.softmax_cpu_cases import Case
from benchmarks.softmax_gpu_cells import L2_PASSES, LAUNCHES

DTYPES = ("bfloat16", "float32")
MODES = ("forward", "both")


def all_cases() -> list[Case]:
    cases = scores_cpu_cases.cases([1], DTYPES, MODES)
    losses = [
        case
        for case in losses_cpu_cases.cases([1], DTYPES, MODES)
        if case.op in ("cross_entropy", "kl_div_with_logits")
    ]
    return cases + segments_cpu_cases.cases([1], DTYPES[1:], ["softmax"], MODES) + losses


def label(case: Case) -> str:
    shape = "x".join(map(str, case.shape))
    return f"{case.op} {case.mode} {shape} {case.dtype} {case.layout}"


def measure(
    case: Case, device: gpu.Device, rounds: int, copied: list[torch.Tensor]
) -> dict[str, Any]:
    """The case's entry in the results. `copied`: source and destination of the copy."""
    sets = max(1, math.ceil(L2_PASSES * device.l2_bytes / case.bytes))
    runs = []
    for _ in range(sets):
        if isinstance(case, scores_cpu_cases.ScoresCase):
            made = case.runs(device.name)
        elif isinstance(case, losses_cpu_cases.LossCase):
            made = losses_cpu_cases.contenders(case, device.name)
        else:
            assert isinstance(case, segments_cpu_cases.SegmentCase)
            made = segments_cpu_cases.contenders(case, device.name)
        runs.append({name: run for name, run in made.items() if not name.endswith(cpu.FRESH)})
    cpu.verify(case, runs[0])
    contenders: dict[str, gpu.Contender] = {}
    for name in runs[0]:
        calls: list[Callable[[], object]] = [each[name] for each in runs]
        contender = contenders[name] = gpu.Contender(calls)
        contender.queue(min(sets, LAUNCHES))  # warm-up
        once = device.seconds(partial(contender.queue, 2)) / 2
        contender.batch = calls_in_batch(once, device.batch_seconds, LAUNCHES)
    source, destination = copied
    contenders["copy"] = gpu.Contender([lambda: destination.copy_(source)])
    times = gpu.interleave(contenders, device.seconds, rounds)
    summary = summarise(times, case.bytes, 2 * source.numel() * source.element_size())
    return {**asdict(case), "buffer_sets": sets, **summary}


def run_cases(
    cases: list[Case],
    device: gpu.Device,
    budget: Budget,
    rounds: int,
    document: dict[str, Any],
    path: Path,
) -> None:
    """Measures what the budget allows; the document names what is missing or failed, and why."""
    document.update(cells=[], failed=[], missing=[])
    copied = [torch.randn(device.copy_bytes // 4, device=device.name) for _ in range(2)]
    for case in cases:
        if not budget.fits(compiled=False):
            document["missing"].append({"cell": label(case), "why": "out of budget"})
            continue
        start = time.monotonic()
        try:
            entry = measure(case, device, rounds, copied)
        except Exception as error:
            document["failed"].append({"cell": label(case), "why": gpu.first_line(error)})
            print(f"{label(case)}: FAILED: {gpu.first_line(error)}", flush=True)
            device.synchronize()  # raises if the device is of no use any more
        else:
            document["cells"].append(entry)
            speedups = {name: round(x, 2) for name, x in entry["speedup"].items()}
            ours = entry["contenders"]["softmax_ext"]
            print(
                f"{label(case)}: {ours['us']:.1f} us, {ours['fraction_of_copy']:.2f} of a copy, "
                f"over {speedups}",
                flush=True,
            )
        device.release()
        budget.record(time.monotonic() - start, compiled=False)
        gpu.write_json(document, path)
    gpu.write_json(document, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_scores", description=__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="to spend on all cases")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, help="folder; benchmarks/results/<device>")
    parser.add_argument("--commit", help="that was measured, where git cannot tell")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_scores: torch finds no GPU")
    folder = options.output or gpu_report.default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    document = {"machine": gpu.machine(), "commit": options.commit or gpu.commit()}
    budget = Budget(options.seconds)
    run_cases(all_cases(), gpu.Cuda(), budget, options.rounds, document, folder / "scores.json")
    return 1 if document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
