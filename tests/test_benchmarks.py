"""benchmarks.gpu without a GPU: its cells, its arithmetic, its whole run on the CPU's clock."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last, so that `make debug` tests its own build and not ROOT's

from benchmarks import (  # noqa: E402
    cpu,
    gpu,
    gpu_check,
    gpu_report,
    gpu_scores,
    gpu_timing,
    losses_cpu_cases,
    scores_cpu_cases,
    segments_cpu_cases,
    softmax_gpu_cells,
)
from benchmarks.gpu_timing import Budget  # noqa: E402
from benchmarks.softmax_gpu_cells import GIB, Cell, all_cells  # noqa: E402
from softmax_ext import _C  # noqa: E402

MIB = 1 << 20
ROW_SIZES = [7, 10, 64, 128, 256, 512, 1000, 1024, 2048, 4096, 5000, 8192, 16384, 32768, 50257]
ROW_SIZES += [65536, 128256, 152064, 262144, 1048576]
FIXED = [((1, 4 * MIB), -1), ((8, 256 * 1024), -1), ((32, 128 * 1024), -1), ((1, 152064), -1)]
FIXED += [((32, 1000, 196), 1), ((8, 19, 512, 512), 1), ((8192, 8192), 0)]


# --- Cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_every_required_shape_is_a_cell(op: str, dtype: str, mode: str) -> None:
    cells = [
        c for c in all_cells() if (c.op, c.dtype, c.mode, c.out_dtype) == (op, dtype, mode, None)
    ]
    rows = [cell for cell in cells if cell.group == "rows"]
    assert [cell.shape[-1] for cell in rows] == ROW_SIZES
    for cell in rows:
        filled = math.prod(cell.shape) * softmax_gpu_cells.DTYPES[dtype].itemsize
        assert GIB * 0.99 < filled <= GIB
    assert [(c.shape, c.dim) for c in cells if c.group in ("few_rows", "strided")] == FIXED


def test_small_calls_with_and_without_cuda_graphs() -> None:
    calls = {(cell.group, cell.mode) for cell in all_cells() if cell.shape == (8, 64)}
    assert calls == {
        *(("call", mode) for mode in ("forward", "recorded", "both")),
        *(("graph", mode) for mode in ("forward", "both")),
    }


def test_cells_differ_also_in_name() -> None:
    cells = all_cells()
    assert len({cell.label for cell in cells}) == len(set(cells)) == len(cells)
    assert any(cell.dtype == "float64" for cell in cells)


def test_the_compiled_are_a_small_part() -> None:
    compiled = [cell for cell in all_cells() if cell.compiled]
    assert {(cell.op, cell.dtype) for cell in compiled} == {("softmax", "bfloat16")}
    assert len(compiled) == 14


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "mode", "each"),
    [
        ("bfloat16", None, "forward", 4),
        ("bfloat16", None, "backward", 6),
        ("float32", None, "forward", 8),
        ("float64", None, "backward", 24),
        ("bfloat16", "float32", "forward", 6),
        ("bfloat16", "float32", "backward", 10),
    ],
)
def test_bytes_moved(dtype: str, out_dtype: str | None, mode: str, each: int) -> None:
    cell = Cell("rows", "softmax", mode, (3, 5, 7), 1, dtype, out_dtype)
    assert cell.moved_bytes == 3 * 5 * 7 * each


@pytest.mark.parametrize("l2", [6 * MIB, 60 * MIB, 126 * MIB])  # of three generations
def test_buffers_rotate_past_the_l2(l2: int) -> None:
    for cell in all_cells():
        sets = cell.buffer_sets(l2)
        if cell.is_call:
            assert sets == 1
            continue
        assert sets * cell.moved_bytes >= 3 * l2, cell
        assert sets == 1 or (sets - 1) * cell.moved_bytes < 3 * l2, cell  # and no more memory


# --- Arithmetic ----------------------------------------------------------------------------------


def test_summary_of_made_up_timings() -> None:
    """1 GB in 1 ms is 1000 GB/s; ratios are of the same round, where a slow moment cancels."""
    times = [
        {"softmax_ext": 1e-3, "eager": 2e-3, "copy": 1e-3},
        {"softmax_ext": 1e-3, "eager": 3e-3, "copy": 1e-3},
        {"softmax_ext": 4e-3, "eager": 8e-3, "copy": 4e-3},
    ]
    summary: Any = gpu_timing.summarise(times, 1_000_000_000, 2_000_000_000)
    ours, eager = summary["contenders"]["softmax_ext"], summary["contenders"]["eager"]
    assert ours["us"] == pytest.approx(1000)
    assert ours["gbps"] == pytest.approx(1000)
    assert ours["fraction_of_copy"] == pytest.approx(0.5)
    assert eager["gbps"] == pytest.approx(1000 / 3)
    assert eager["fraction_of_copy"] == pytest.approx(0.25)
    assert summary["speedup"] == {"eager": pytest.approx(2)}
    assert summary["copy_gbps"] == pytest.approx(2000)


def test_a_call_has_no_bandwidth() -> None:
    summary: Any = gpu_timing.summarise([{"softmax_ext": 1e-6, "eager": 2e-6}], None, 0)
    assert summary["contenders"]["softmax_ext"] == {"us": pytest.approx(1), "spread": 0}
    assert "copy_gbps" not in summary


@pytest.mark.parametrize(("seconds", "calls"), [(1e-5, 64), (1e-4, 10), (5e-3, 1), (0.0, 64)])
def test_calls_in_a_batch(seconds: float, calls: int) -> None:
    assert gpu_timing.calls_in_batch(seconds, 1e-3, 64) == calls


def test_rounds_rotate_the_order() -> None:
    order: list[str] = []

    def contender(name: str) -> gpu.Contender:
        return gpu.Contender([lambda: order.append(name)])

    def clock(queue: Callable[[], object]) -> float:
        queue()
        return 1.0

    gpu.interleave({name: contender(name) for name in "abc"}, clock, 3)
    assert "".join(order) == "abcbcacab"


def test_budget_keeps_seconds_for_the_plain_cells() -> None:
    budget = Budget(100)
    assert budget.fits(compiled=True)
    budget.record(30, compiled=True)
    assert not budget.fits(compiled=True)  # another such would take more than the share
    assert budget.fits(compiled=False)
    budget.record(68, compiled=False)
    assert not budget.fits(compiled=False)


# --- Verification --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("place", [0, -1])  # the first row and the last are always looked at
def test_a_wrong_result_is_found(op: str, mode: str, place: int) -> None:
    cell = Cell("strided", op, mode, (4, 7, 6), 1, "float32")
    x, grad = torch.randn(2, *cell.shape)
    right = gpu.make_run(gpu.OPS[op][0], mode, x, 1, grad)
    gpu.check(cell, x, grad, right)
    for value in (0.01, math.nan):
        result = right().clone()
        result[place, 3, place] += value
        with pytest.raises(AssertionError):
            gpu.check(cell, x, grad, lambda result=result: result)


def test_an_expanded_tensor_moves_one_batch() -> None:
    cell = Cell("views", "softmax", "backward", (3, 5, 7), -1, "float32", layout="expanded")
    assert cell.moved_bytes == 4 * (2 * 3 + 1) * 5 * 7


@pytest.mark.parametrize("layout", sorted(softmax_gpu_cells.LAYOUTS))
def test_views_are_read_where_they_lie(layout: str) -> None:
    """All that the benchmark has; beside each is a contiguous one."""
    cells = [c for c in all_cells() if c.group == "views" and c.layout == layout]
    assert cells
    for cell in cells:
        dtype = softmax_gpu_cells.DTYPES[cell.dtype]
        make = partial(torch.empty, dtype=dtype, device="meta")
        tensor = softmax_gpu_cells.LAYOUTS[layout](make, cell.shape)
        assert tensor.shape == cell.shape
        assert tensor.is_contiguous() == (layout == "contiguous")
        assert _C.is_direct_on_cuda(tensor, cell.dim)
        assert replace(cell, layout="contiguous") in all_cells()


def test_rows_of_a_large_tensor_are_sampled() -> None:
    first, last = gpu.sampled_rows((1000, 5, 1000), 1, 10)
    assert len(first) == 12
    assert (first[0], last[0], first[1], last[1]) == (0, 0, 999, 999)


# --- The whole run -------------------------------------------------------------------------------

TINY = [
    Cell("rows", "softmax", "forward", (9, 64), -1, "bfloat16"),
    Cell("rows", "softmax", "backward", (9, 64), -1, "bfloat16"),
    Cell("rows", "log_softmax", "backward", (3, 1000), -1, "float32"),
    Cell("strided", "log_softmax", "forward", (2, 7, 5), 1, "float16"),
    Cell("strided", "softmax", "backward", (8, 8), 0, "float64"),
    Cell("cast", "log_softmax", "backward", (5, 33), -1, "bfloat16", "float32"),
    Cell("call", "softmax", "both", (8, 64), -1, "float32"),
    Cell("graph", "softmax", "forward", (8, 64), -1, "float32"),
    Cell("views", "softmax", "forward", (3, 4, 33), -1, "float32", layout="sliced batch"),
    Cell("views", "softmax", "forward", (3, 33), -1, "float32", layout="sliced last dim"),
    Cell("views", "softmax", "backward", (2, 3, 4, 16), -1, "bfloat16", layout="permuted batch"),
    Cell("views", "softmax", "backward", (3, 4, 33), -1, "float32", layout="expanded"),
]
MACHINE = dict.fromkeys(("torch", "cuda", "driver", "sm_count"), "made up")


def run_tiny(path: Path, cells: list[Cell], seconds: float = 1000) -> dict[str, Any]:
    document: dict[str, Any] = {
        "machine": {"device": "a clock on the wall", **MACHINE},
        "commit": None,
        "checks": {"tests": "passed"},
    }
    gpu.run_cells(cells, gpu.Device(), Budget(seconds), 3, document, path / "results.json")
    read: dict[str, Any] = json.loads((path / "results.json").read_text())
    return read


def test_from_the_cells_to_table_and_plots(tmp_path: Path) -> None:
    document = run_tiny(tmp_path, TINY)
    assert document["complete"]
    assert document["missing"] == document["failed"] == []
    assert [entry["shape"] for entry in document["cells"]] == [list(c.shape) for c in TINY]
    for entry in document["cells"]:
        assert {"softmax_ext", "eager"} <= set(entry["contenders"])
        assert entry["speedup"]["eager"] > 0
        assert "compile" in entry["not_measured"]
        assert ("copy_gbps" in entry) == (entry["group"] not in ("call", "graph"))
    pytest.importorskip("matplotlib")
    text = gpu_report.write(tmp_path)
    assert "Over eager: 12 cells" in text
    assert "Over quack: not measured" in text
    table = (tmp_path / "table.md").read_text()
    assert "| log_softmax | backward | 5x33, -1 | bfloat16 to float32 |" in table
    assert "| softmax | backward | 2x3x4x16, -1, permuted batch | bfloat16 |" in table
    for name in ("fraction.png", "speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_line_breaks_where_a_size_was_not_measured() -> None:
    def entry(size: int, *names: str) -> dict[str, Any]:
        contenders = {name: {"fraction_of_copy": 0.5} for name in names}
        cell = {"group": "rows", "op": "softmax", "mode": "forward", "dtype": "float64"}
        return cell | {"shape": [3, size], "contenders": contenders}

    cells = [entry(1024, "softmax_ext"), entry(64, "softmax_ext", "eager"), entry(65, "eager")]
    of = ("softmax", "forward", "float64")
    ours = gpu_report.fractions_by_size(cells, *of, "softmax_ext")
    assert list(ours) == ROW_SIZES
    assert [size for size in ours if not math.isnan(ours[size])] == [64, 1024]
    theirs = gpu_report.fractions_by_size(cells, *of, "eager")
    assert list(theirs) == sorted([*ROW_SIZES, 65])
    assert [size for size in theirs if not math.isnan(theirs[size])] == [64, 65]


def test_what_does_not_fit_the_budget_is_named(tmp_path: Path) -> None:
    document = run_tiny(tmp_path, TINY, seconds=0)
    assert not document["complete"]
    assert document["cells"] == []
    assert [entry["cell"] for entry in document["missing"]] == [cell.label for cell in TINY]
    assert TINY[3].label in gpu_report.summary(document)


def test_a_killed_run_keeps_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = gpu.measure

    def killed_at_the_third(cell: Cell, *rest: Any) -> dict[str, Any]:
        if cell is TINY[2]:
            raise KeyboardInterrupt
        return measure(cell, *rest)

    monkeypatch.setattr(gpu, "measure", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, TINY)
    document = json.loads((tmp_path / "results.json").read_text())
    assert len(document["cells"]) == 2
    assert [entry["why"] for entry in document["missing"]] == ["not reached"] * (len(TINY) - 2)


def test_a_wrong_cell_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, _ = gpu.OPS["softmax"]

    def wrong(x: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
        return theirs(x, dim, dtype=dtype) * 1.1

    monkeypatch.setitem(gpu.OPS, "softmax", (theirs, wrong))
    document = run_tiny(tmp_path, TINY[:3])
    assert [entry["op"] for entry in document["cells"]] == ["log_softmax"]
    assert [entry["cell"] for entry in document["failed"]] == [cell.label for cell in TINY[:2]]
    assert "wrong by up to" in document["failed"][0]["why"]


# --- Scores and segments -------------------------------------------------------------------------


def test_scores_segments_and_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the clock on the wall, in shapes that take no time; a wrong case has no figures."""
    tiny = {"causal": (2, 3, 8, 16), "logsumexp": (8, 40)}
    cells = {cell.name: cell for cell in scores_cpu_cases.CELLS if cell.name in tiny}
    monkeypatch.setattr(
        scores_cpu_cases, "CELLS", [replace(cells[name], shape=tiny[name]) for name in tiny]
    )
    monkeypatch.setattr(segments_cpu_cases, "SHAPES", [((60, 4), 7)])
    for shapes in ("SHAPES", "VARIED"):
        monkeypatch.setattr(losses_cpu_cases, shapes, [(6, 5)])
    monkeypatch.setattr(losses_cpu_cases, "VARIED_OF", {})
    monkeypatch.setattr(losses_cpu_cases, "PAIR_SHAPE", (6, 5))
    cases = gpu_scores.all_cases()
    divergences = 2 * 2 * len(losses_cpu_cases.DIVERGENCES)
    assert len(cases) == 2 * 2 * 2 + 3 * 2 + 2 * (2 * 7 - 1) + divergences
    document: dict[str, Any] = {"machine": MACHINE}
    path = tmp_path / "scores.json"
    gpu_scores.run_cases(cases, gpu.Device(), Budget(1000), 3, document, path)
    read = json.loads(path.read_text())
    assert read["failed"] == read["missing"] == []
    assert [entry["op"] for entry in read["cells"]] == [case.op for case in cases]
    for entry in read["cells"]:
        is_varied = entry["op"] == "cross_entropy" and entry["layout"] != "plain"
        beside = {"plain", "torch"} if is_varied else {"torch"}
        assert beside <= set(entry["speedup"]) or "scatter" in entry["speedup"]

    wrong = replace(scores_cpu_cases.CELLS[0], ours=lambda x: x)
    monkeypatch.setattr(scores_cpu_cases, "CELLS", [wrong, scores_cpu_cases.CELLS[1]])
    gpu_scores.run_cases(cases[:1], gpu.Device(), Budget(1000), 3, document, path)
    read = json.loads(path.read_text())
    assert read["cells"] == []
    assert "differ by up to" in read["failed"][0]["why"]


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("benchmarks.gpu", "benchmarks.gpu: torch finds no GPU"),
        ("benchmarks.gpu_check", "gpu-check needs an NVIDIA GPU and a CUDA build of torch: torch "),
    ],
)
def test_without_a_gpu_it_says_so(module: str, message: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("failing", "exit_status", "steps"),
    [
        (None, 0, ["setup.py", "pytest", "memcheck", "racecheck", "benchmarks.gpu"]),
        ("setup.py", 1, ["setup.py"]),  # nothing to test
        ("pytest", 1, ["setup.py", "pytest", "memcheck", "racecheck", "benchmarks.gpu"]),
    ],
)
def test_steps_of_the_check(
    failing: str | None,
    exit_status: int,
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int, str]:
        commands.append(command)
        assert environment["FORCE_CUDA"] == "1"
        assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
        return int(failing in command), f"{gpu_check.DONE}\nERROR SUMMARY: 0 errors"

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpu_check, "gpu_or_why_not", lambda: ("9.0", ""))
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path)])
    assert gpu_check.main() == exit_status
    assert len(commands) == len(steps)
    assert all(step in command for step, command in zip(steps, commands, strict=True))
    if failing == "pytest":  # the results say so
        assert any(argument.startswith("--check=tests=FAILED") for argument in commands[-1])


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, f"{gpu_check.DONE}\n===== ERROR SUMMARY: 0 errors", "passed: ERROR SUMMARY: 0 errors"),
        (1, f"{gpu_check.DONE}\n===== ERROR SUMMARY: 2 errors", "FAILED: ERROR SUMMARY: 2 errors"),
        (0, "===== ERROR SUMMARY: 0 errors", "FAILED: ERROR SUMMARY: 0 errors"),  # calls missing
        (1, "Traceback", "FAILED: no summary"),
        (1, "Error: Device not supported", "not run: "),
        (None, gpu_check.DONE, "not finished"),
    ],
)
def test_outcome_of_a_sanitizer(status: int | None, output: str, expected: str) -> None:
    assert gpu_check.sanitizer_outcome(status, output).startswith(expected)


def test_a_step_is_stopped_when_its_time_is_over() -> None:
    code = "print('begun', flush=True); import time; time.sleep(60)"
    status, output = gpu_check.run([sys.executable, "-c", code], 2.0, {})
    assert (status, output) == (None, "begun\n")
    assert gpu_check.run([sys.executable, "-c", "exit(3)"], 20.0, {})[0] == 3


# --- Losses on the CPU ---------------------------------------------------------------------------


def small(case: losses_cpu_cases.LossCase) -> losses_cpu_cases.LossCase:
    sizes = {1: 3, 2: 5}
    shape = tuple(sizes.get(k, 7 - len(case.shape)) for k in range(len(case.shape)))
    return replace(case, shape=shape)


@pytest.mark.parametrize(
    "case",
    {
        (case.op, case.layout, case.mode, len(case.shape)): case
        for case in losses_cpu_cases.cases([1], ["float32"], losses_cpu_cases.MODES)
    }.values(),
    ids=lambda case: f"{case.op}-{case.layout}-{case.mode}-{len(case.shape)}",
)
def test_losses_agree(case: losses_cpu_cases.LossCase) -> None:
    """What is timed against each other computes the same."""
    cpu.verify(case, losses_cpu_cases.contenders(small(case)))
