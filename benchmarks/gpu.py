"""softmax_ext against torch eager, torch.compile and other packages, on one GPU.

Each contender's result is verified first, against float64 on the device. Then all are timed in
rounds, in an order that rotates, beside a device-to-device copy: batches of calls between CUDA
events, over buffers that together are past the L2. Small calls are timed by the wall clock.
``results.json`` is written anew after each cell, so that it is whole whenever the run ends, and
names the cells that are missing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

import softmax_ext
from benchmarks import gpu_report
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
from benchmarks.gpu_timing import Budget, Times, calls_in_batch, summarise
from benchmarks.softmax_gpu_cells import GIB, LAUNCHES, LAYOUTS, TENSORS, Cell, all_cells

ROOT = Path(__file__).resolve().parent.parent
CALLS_IN_GRAPH = 20
COMPILE_MODES = {"compile": "default", "compile max-autotune": "max-autotune-no-cudagraphs"}
# module, function; both take rows only, and softmax only.
OTHERS = {
    "liger": ("liger_kernel.ops.softmax", "LigerSoftmaxFunction.apply"),
    "quack": ("quack.softmax", "softmax"),
}

Function = Callable[..., torch.Tensor]


class Device:
    """The clock and the memory. As it is, the CPU with the wall clock: for trying the whole run."""

    name = "cpu"
    l2_bytes = 1 << 12
    copy_bytes = 1 << 16  # of a tensor that is copied
    batch_seconds = 1e-4

    def seconds(self, queue: Callable[[], object]) -> float:
        return wall_seconds(queue, self.name)

    def capture(self, run: Run) -> Callable[[], object]:
        """CALLS_IN_GRAPH calls as one."""
        return lambda: [run() for _ in range(CALLS_IN_GRAPH)]

    def release(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Cuda(Device):
    name = "cuda"
    copy_bytes = GIB
    batch_seconds = 1e-3  # a thousand times the resolution of an event
    LONGEST_SLEEP = 0.05

    def __init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.sleep = 1e-4
        self.cycles_per_second = 1e9
        for _ in range(2):  # the first is a warm-up
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            torch.cuda._sleep(20_000_000)
            events[1].record()
            torch.cuda.synchronize()
            self.cycles_per_second = 2e7 / (events[0].elapsed_time(events[1]) / 1e3)

    def seconds(self, queue: Callable[[], object]) -> float:
        """Of the device alone: it sleeps until all of the batch is queued.

        Raises:
            RuntimeError: the host did not get ahead of the device.
        """
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(self.sleep * self.cycles_per_second))
            start.record()
            queue()
            end.record()
            ahead = not start.query()
            end.synchronize()
            if ahead:
                return start.elapsed_time(end) / 1e3
            if self.sleep > self.LONGEST_SLEEP:
                raise RuntimeError("a call waits for the device: its time is not the device's")
            self.sleep *= 2

    def capture(self, run: Run) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS_IN_GRAPH):
                run()
        return graph.replay

    def release(self) -> None:
        """What a cell held; the next has other sizes."""
        self.sleep = 1e-4
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Contender:
    """Calls, one for each set of buffers, that are made in turn."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.calls = calls
        self.turn = 0
        self.batch = 1

    def queue(self, count: int) -> None:
        # As many outputs as inputs live, so that those rotate too.
        kept: deque[object] = deque(maxlen=len(self.calls))
        for _ in range(count):
            kept.append(self.calls[self.turn]())
            self.turn = (self.turn + 1) % len(self.calls)


# --- Verification --------------------------------------------------------------------------------


def sampled_rows(shape: tuple[int, ...], dim: int, most: int) -> tuple[torch.Tensor, ...]:
    """Indices of the first row, the last and others, of a tensor with dim moved to the end."""
    others = [size for k, size in enumerate(shape) if k != dim % len(shape)]
    rows = math.prod(others)
    if rows <= most:
        flat = torch.arange(rows)
    else:
        flat = torch.cat([torch.tensor([0, rows - 1]), torch.randint(rows, (most,))])
    return torch.unravel_index(flat, others)


def expected_rows(
    op: str, mode: str, x: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result for float64 rows, and the size of the terms it is a sum of."""
    shifted = x - x.amax(-1, keepdim=True)
    log_sum = shifted.exp().sum(-1, keepdim=True).log()
    y = (shifted - log_sum).exp()
    if mode in ("forward", "recorded"):
        return (y, y) if op == "softmax" else (shifted - log_sum, shifted.abs() + log_sum)
    summands, factor = (grad * y, y) if op == "softmax" else (grad, torch.ones_like(y))
    expected = factor * grad - y * summands.sum(-1, keepdim=True)
    return expected, factor * grad.abs() + y * summands.abs().sum(-1, keepdim=True)


def check(cell: Cell, x: torch.Tensor, grad: torch.Tensor, run: Run) -> None:
    """Raises AssertionError if an element was not written, or a sampled row is wrong."""
    forward = cell.mode in ("forward", "recorded")
    dtype = DTYPES[(cell.out_dtype or cell.dtype) if forward else cell.dtype]
    # The memory that the allocator will most likely give the result: NaN where nothing is written.
    poison = torch.full(cell.shape, math.nan, dtype=dtype, device=x.device)
    del poison
    result = run().detach()
    assert result.shape == x.shape and result.dtype == dtype, "another shape or dtype"
    assert not result.sum(dtype=torch.float32).isnan().item(), "the result has NaN"
    dim = cell.dim
    places = sampled_rows(cell.shape, dim, max(2, (1 << 22) // cell.shape[dim]))
    places = tuple(index.to(x.device) for index in places)
    rows, x_rows, grad_rows = (
        tensor.movedim(dim, -1)[places].double() for tensor in (result, x, grad)
    )
    expected, terms = expected_rows(cell.op, cell.mode, x_rows, grad_rows)
    # Of the output's type too: the backward pass starts from the rounded output.
    tolerance = max(TOLERANCE[dtype], 0 if forward else TOLERANCE[grad.dtype])
    step = smallest_step(dtype) * (1 + (0 if forward else grad_rows.abs()))
    error = (rows - expected).abs()
    if not bool((error <= tolerance * terms + step).all()):
        raise AssertionError(f"the result is wrong by up to {error.max().item():.3g}")


# --- One cell ------------------------------------------------------------------------------------


def functions(cell: Cell, compiled: bool) -> tuple[dict[str, Function], dict[str, str]]:
    """The contenders, softmax_ext first; and why others are not measured."""
    theirs, ours = OPS[cell.op]
    dtype = DTYPES[cell.out_dtype] if cell.out_dtype else None
    found: dict[str, Function] = {
        "softmax_ext": partial(ours, dtype=dtype),
        "eager": partial(theirs, dtype=dtype),
    }
    missing: dict[str, str] = {}
    if compiled:
        torch._dynamo.reset()  # its cache holds only a few shapes of a function
        # Otherwise a compiled graph can go backward once only.
        torch._functorch.config.donated_buffer = False
    for name, mode in COMPILE_MODES.items():
        if compiled:
            # fullgraph: an error, and not a silent fall-back, where it cannot be compiled.
            found[name] = torch.compile(
                lambda x, dim: theirs(x, dim, dtype=dtype),
                dynamic=False,
                fullgraph=True,
                mode=mode,
            )
        else:
            missing[name] = "out of budget" if cell.compiled else "not in the subset"
    for name, (module, path) in OTHERS.items():
        if cell.dim != -1 or len(cell.shape) != 2 or cell.op != "softmax" or cell.out_dtype:
            missing[name] = "it has no such function"
            continue
        if not cell.compiled:  # they compile for each size too
            missing[name] = "not in the subset"
            continue
        try:
            function: Any = importlib.import_module(module)
            for part in path.split("."):
                function = getattr(function, part)
        except ImportError:
            missing[name] = "not installed"
        except Exception as error:
            missing[name] = first_line(error)
        else:
            found[name] = lambda x, dim, function=function: function(x)
    return found, missing


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def interleave(
    contenders: dict[str, Contender],
    clock: Callable[[Callable[[], object]], float],
    rounds: int,
) -> Times:
    names = list(contenders)
    times: Times = []
    for number in range(rounds):
        turn = number % len(names)
        measured = {}
        for name in names[turn:] + names[:turn]:
            contender = contenders[name]
            measured[name] = clock(partial(contender.queue, contender.batch)) / contender.batch
        times.append(measured)
    return times


def measure(
    cell: Cell, device: Device, rounds: int, compiled: bool, copied: list[torch.Tensor]
) -> dict[str, Any]:
    """The cell's entry in the results. `copied`: source and destination of the copy.

    Raises:
        Exception: whatever softmax_ext did not do right; others are then not measured.
    """
    sets = cell.buffer_sets(device.l2_bytes)
    backward = cell.mode in ("backward", "both")

    def tensors(dtype: str, layout: str) -> list[torch.Tensor]:
        make = partial(torch.randn, dtype=DTYPES[dtype], device=device.name)
        return [LAYOUTS[layout](make, cell.shape) for _ in range(sets)]

    xs = tensors(cell.dtype, "contiguous" if backward else cell.layout)
    # The forward pass has no use for gradients: the check's stand-in takes no memory.
    grads = xs
    if backward:
        grads = tensors(cell.out_dtype or cell.dtype, cell.layout)
    clock, target, most = device.seconds, device.batch_seconds, LAUNCHES
    if cell.is_call:  # enough for the wait at the end not to count
        clock, target, most = partial(wall_seconds, device=device.name), 5 * target, 1000
    found, missing = functions(cell, compiled)
    contenders: dict[str, Contender] = {}
    for name, function in found.items():
        try:
            runs: list[Run] = []
            for x, grad in zip(xs, grads, strict=True):
                runs.append(make_run(function, cell.mode, x, cell.dim, grad))
                if len(runs) == 1:
                    check(cell, x, grad, runs[0])
            calls: list[Callable[[], object]] = list(runs)
            if cell.group == "graph":
                calls = [device.capture(run) for run in runs]
            contender = Contender(calls)
            contender.queue(min(sets, LAUNCHES))  # warm-up
            once = clock(partial(contender.queue, 4)) / 4
            contender.batch = calls_in_batch(once, target, most)
            clock(partial(contender.queue, contender.batch))
            contenders[name] = contender
        except Exception as error:
            device.synchronize()  # raises if the device is of no use any more
            if name == "softmax_ext":
                raise
            missing[name] = first_line(error)
    if not cell.is_call:
        source, destination = copied
        contenders["copy"] = Contender([lambda: destination.copy_(source)])
    times = interleave(contenders, clock, rounds)
    if cell.group == "graph":
        times = [{name: t / CALLS_IN_GRAPH for name, t in round_.items()} for round_ in times]
    summary = summarise(
        times,
        None if cell.is_call else cell.moved_bytes,
        2 * copied[0].numel() * copied[0].element_size(),
    )
    return {**asdict(cell), "buffer_sets": sets, **summary, "not_measured": missing}


# --- The run -------------------------------------------------------------------------------------


def write_json(document: dict[str, Any], path: Path) -> None:
    """At once: a run that is killed leaves the old file or the new one."""
    scratch = path.with_suffix(".tmp")
    head = {key: value for key, value in document.items() if key != "cells"}
    scratch.write_text(as_json(head, "cells", document["cells"]))
    os.replace(scratch, path)


def run_cells(
    cells: list[Cell],
    device: Device,
    budget: Budget,
    rounds: int,
    document: dict[str, Any],
    path: Path,
) -> None:
    """Measures what the budget allows; the document names what is missing or failed, and why."""
    document.update(complete=False, cells=[], failed=[])
    missing = {cell: "not reached" for cell in cells}

    def save() -> None:
        document["missing"] = [{"cell": c.label, "why": why} for c, why in missing.items()]
        write_json(document, path)

    copied = [torch.randn(device.copy_bytes // 4, device=device.name) for _ in range(2)]
    save()
    for number, cell in enumerate(cells):
        compiled = cell.compiled and budget.fits(compiled=True)
        if not budget.fits(compiled=False):
            missing[cell] = "out of budget"
            continue
        start = time.monotonic()
        try:
            entry = measure(cell, device, rounds, compiled, copied)
        except Exception as error:
            missing[cell] = "failed"
            document["failed"].append({"cell": cell.label, "why": first_line(error)})
            print(f"{cell.label}: FAILED: {first_line(error)}", flush=True)
            try:
                device.synchronize()
            except Exception:
                document["aborted"] = f"the device is of no use after {cell.label}"
                save()
                return
        else:
            del missing[cell]
            document["cells"].append(entry)
            print(f"[{number + 1}/{len(cells)}] {gpu_report.line(entry)}", flush=True)
        if compiled:
            gc.collect()  # what the compiler left in cycles holds gigabytes
        device.release()
        budget.record(time.monotonic() - start, compiled)
        save()
    document["complete"] = not missing
    save()


def query_gpu(fields: str) -> dict[str, str] | None:
    uuid = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields.split(","), text.stdout.strip().split(", "), strict=False))


def commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": (query_gpu("driver_version") or {}).get("driver_version"),
        "clocks_before": query_gpu(CLOCKS),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "build": asdict(softmax_ext.build_info()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="to spend on all cells")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cells whose name has this, as 'x4096 dim'")
    parser.add_argument("--output", type=Path, help="folder; benchmarks/results/<device>")
    parser.add_argument("--commit", help="that was measured, where git cannot tell")
    parser.add_argument("--check", action="append", default=[], help="to note, as tests=passed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch finds no GPU; `python -m benchmarks` measures the CPU")
    if "cuda" not in softmax_ext.build_info().devices:
        sys.exit("benchmarks.gpu: softmax_ext was built without CUDA; build with FORCE_CUDA=1")
    start = time.monotonic()
    folder = options.output or gpu_report.default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = Cuda()
    tensor_bytes = min(GIB, torch.cuda.mem_get_info()[0] // TENSORS)
    device.copy_bytes = tensor_bytes
    cells = [cell for cell in all_cells(tensor_bytes) if options.only in cell.label]
    if not cells:
        sys.exit(f"benchmarks.gpu: no cell has {options.only!r} in its name")
    document: dict[str, Any] = {
        "machine": machine(),
        "commit": options.commit or commit(),
        "checks": dict(check.split("=", 1) for check in options.check),
        "seconds": options.seconds,
        "rounds": options.rounds,
    }
    budget = Budget(options.seconds)
    budget.spent = time.monotonic() - start
    run_cells(cells, device, budget, options.rounds, document, folder / "results.json")
    document["machine"]["clocks_after"] = query_gpu(CLOCKS)
    write_json(document, folder / "results.json")
    print(gpu_report.write(folder))
    return 1 if document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
