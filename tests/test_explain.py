"""softmax_ext.explain, on paper: no GPU is needed, nor a build with CUDA."""

import dataclasses
import doctest
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import softmax_ext
from benchmarks import time_model
from benchmarks.gpu_model import (
    DEVICES,
    DOCUMENT,
    MEASURED,
    explain_cell,
    measured,
    model_cells,
    render,
)
from benchmarks.softmax_gpu_cells import all_cells
from softmax_ext import Explanation, _explain, explain
from softmax_ext._C import HOLDS, SCHEDULES

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Of every schedule, and every hold.
SHAPES = [
    ((4096, 7), -1, BF16),
    ((4096, 1024), -1, BF16),
    ((4096, 4096), -1, FP32),
    ((4096, 50257), -1, FP16),
    ((1, 4 << 20), -1, BF16),
    ((1, 4 << 20), -1, FP32),
    ((256, 1 << 20), -1, FP32),
    ((16, 1 << 24), -1, FP32),
    ((32, 1000, 196), 1, BF16),
    ((8192, 8192), 0, FP64),
    ((300, 5, 3), 1, FP64),
    ((1,), 0, FP32),
]


@pytest.mark.parametrize("device", _explain.DEVICES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("shape", "dim", "dtype"), SHAPES)
def test_fields(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, backward: bool, device: str
) -> None:
    found = explain(shape, dtype, dim, backward=backward, device=device)
    known = _explain.DEVICES[device]
    assert found.schedule in SCHEDULES
    assert found.hold in HOLDS
    assert found.kernel is not None and found.kernel.split()[0].endswith(
        "backward" if backward else "forward"
    )
    assert found.blocks >= 1 and found.blocks % found.team == 0
    assert found.threads in range(32, 1025, 32)
    assert found.shared_bytes <= known.shared_bytes_of_block
    assert (found.scratch_bytes > 0) >= (found.schedule == "grid")
    assert found.schedule != "cluster" or known.compute_capability >= 90
    assert found.occupancy is not None and 0 < found.occupancy <= 1
    assert found.waves is not None and found.waves > 0
    once = (3 if backward else 2) * math.prod(shape) * dtype.itemsize
    assert (found.bytes_moved == once) == (found.hold != "none")
    # Faster than the memory is impossible.
    assert found.microseconds > found.bytes_moved / (found.bandwidth * 1e3)
    assert 0 < found.copy_fraction < 1
    assert found.limiter in {"bandwidth", "instructions", "float64", "latency"}
    assert found.device == device and not found.cast_first


def test_the_shapes_here_take_every_schedule_and_hold() -> None:
    found = [
        explain(shape, dtype, dim, device=device)
        for shape, dim, dtype in SHAPES
        for device in ("A100", "H100")
    ]
    assert {each.schedule for each in found} == set(SCHEDULES)
    assert {each.hold for each in found} == set(HOLDS)


@pytest.mark.parametrize(("dtype", "out_dtype", "backward", "moved"), [
    (BF16, None, False, 4),
    (BF16, None, True, 6),
    (BF16, FP32, False, 6),
    (BF16, FP32, True, 10),
    (FP64, None, True, 24),
    # A cast by torch: int64 to float32 before, float64 to float32 after.
    (torch.int64, FP32, False, 8 + 8 + 4),
    (FP32, BF16, False, 4 + 4 + 2),
    (FP32, FP64, True, 24 + 8 + 4),
])  # fmt: skip
def test_bytes(
    dtype: torch.dtype, out_dtype: torch.dtype | None, backward: bool, moved: int
) -> None:
    found = explain((512, 1024), dtype, out_dtype=out_dtype, backward=backward, device="H100")
    assert found.bytes_moved == moved * 512 * 1024
    native = out_dtype in (None, dtype) or (dtype, out_dtype) == (BF16, FP32)
    assert found.cast_first == (not native)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_strides_of_a_tensor(backward: bool) -> None:
    """What is read where it lies moves as many bytes as a contiguous one; a copy is read and
    written once more."""
    memory = torch.empty(64, 1028)
    of_contiguous = explain((64, 1024), backward=backward, device="H100")
    for tensor in (memory[:, :1024], memory[:, 1:1025]):
        found = explain(tensor, backward=backward, device="H100")
        assert not found.copy_first
        assert found.bytes_moved == of_contiguous.bytes_moved
    assert explain(memory[:, :1024], device="H100") == explain((64, 1024), device="H100")
    assert explain(memory[:, 1:1025], device="H100") != explain((64, 1024), device="H100")
    copied = explain(torch.empty(1024, 64).t(), backward=backward, device="H100")
    assert copied.copy_first and "no kernel for these strides" in str(copied)
    assert copied.bytes_moved == of_contiguous.bytes_moved + 2 * memory.itemsize * 64 * 1024
    assert copied.microseconds > of_contiguous.microseconds


@pytest.mark.parametrize("device", _explain.DEVICES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("keys", [1, 49, 1024, 5000, 1 << 20])
def test_scores(keys: int, dtype: torch.dtype, backward: bool, device: str) -> None:
    found = explain((8, 4, keys), dtype, backward=backward, device=device, scale=0.5)
    assert found.schedule in SCHEDULES
    size = 8 * 4 * keys * dtype.itemsize * (3 if backward else 2)
    assert (found.bytes_moved == size) == (found.hold != "none")
    assert found.registers is not None
    assert found.microseconds > found.bytes_moved / (found.bandwidth * 1e3)
    short = "short_" if keys <= 256 else ""
    direction = "backward" if backward else "forward"
    assert found.kernel == f"{short}scores_{direction} softmax {str(dtype)[6:]}"


def test_bytes_of_scores() -> None:
    shape, size = (2, 3, 64, 128), 2 * 3 * 64 * 128
    mask = torch.empty(64, 128, dtype=torch.bfloat16, device="meta")

    def moved(backward: bool = False, **scores: Any) -> int:
        return explain(shape, BF16, backward=backward, device="H100", **scores).bytes_moved

    assert moved(mask=mask) == 2 * 2 * size + mask.numel() * 2
    assert moved(mask=mask.bool()) == 2 * 2 * size + mask.numel()
    assert moved(backward=True, mask=mask) == 3 * 2 * size
    trained = torch.empty(64, 128, requires_grad=True)
    assert moved(backward=True, mask=trained) == 3 * 2 * size + 4 * mask.numel()
    assert moved(backward=True, softcap=2.0) == 4 * 2 * size
    # Of a causal row what comes before it is not read: of 64 queries, 0 to 63 of the last 64 keys.
    dead = 2 * 3 * (64 * 63 // 2)
    assert moved(is_causal=True) == 2 * (2 * size - dead)
    assert moved(backward=True, is_causal=True) == 2 * (3 * size - 2 * dead)
    assert moved(window=(0, 0)) == 2 * (size + 2 * 3 * 64)
    with pytest.raises(ValueError, match="the last"):
        explain((4, 5), dim=0, scale=2.0)
    with pytest.raises(ValueError, match="out_dtype"):
        explain((4, 5), BF16, out_dtype=FP32, scale=2.0)


def test_what_is_read_again_counts_again() -> None:
    forward = explain((16, 1 << 24), device="H100")
    backward = explain((16, 1 << 24), backward=True, device="H100")
    assert (forward.hold, backward.hold) == ("none", "none")
    assert forward.bytes_moved == 3 * 4 * 16 << 24
    assert backward.bytes_moved == 5 * 4 * 16 << 24
    # Columns that no shared memory holds: for the max, the sum and the result.
    forward = explain((8, 200000, 32), BF16, 1, device="H100")
    assert (forward.schedule, forward.hold) == ("columns", "none")
    assert forward.bytes_moved == 4 * 2 * 8 * 200000 * 32


@pytest.mark.parametrize(("shape", "dim", "dtype", "kernel"), [
    ((4096, 1024), -1, BF16, "short_forward softmax bfloat16 vectors=4"),
    ((4096, 1023), -1, BF16, "registers_forward softmax bfloat16 vectors=4"),
    ((256, 1 << 20), -1, FP32, "long_forward softmax float32"),
    ((4096, 7), -1, FP32, "packed_short_forward softmax float32 vectors=2"),
    ((4096, 777), -1, FP32, "registers_forward softmax float32 vectors=8"),
    ((32, 1000, 196), 1, BF16, "columns_forward softmax bfloat16 columns=4"),
    ((8192, 8192), 0, BF16, "columns_forward softmax bfloat16 columns=8"),
    ((512, 40, 3), 1, BF16, "packed_columns_forward softmax bfloat16"),
])  # fmt: skip
def test_names_of_kernels(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, kernel: str
) -> None:
    assert explain(shape, dtype, dim, device="H100").kernel == kernel


def test_names_of_kernels_that_cast() -> None:
    forward = explain((4096, 1024), BF16, out_dtype=FP32, device="H100")
    assert forward.kernel == "short_forward softmax bfloat16 -> float32 vectors=4"
    backward = explain((4096, 1024), BF16, out_dtype=FP32, backward=True, device="H100")
    assert backward.kernel == "registers_backward softmax float32 -> bfloat16 vectors=8"


@pytest.mark.parametrize("device", _explain.DEVICES)
def test_the_registers_of_every_kernel_of_the_benchmark_are_known(device: str) -> None:
    found = [explain_cell(cell, device) for cell in all_cells() if not cell.is_call]
    assert {each.kernel for each in found if each.registers is None} == set()


def test_registers_are_those_of_the_nearest_architecture_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time_model, "register_table", lambda: {80: {"k": 40}, 90: {"k": 50}})
    device = _explain.DEVICES["H100"]
    for capability, registers in ((75, None), (80, 40), (89, 40), (90, 50), (120, 50)):
        on = dataclasses.replace(device, compute_capability=capability)
        assert time_model.registers_of("k", on) == registers
        assert time_model.registers_of("unknown", on) is None


@pytest.mark.parametrize(("threads", "registers", "shared", "device", "blocks"), [
    (128, 32, 0, "H100", 16),           # threads
    (128, 33, 0, "H100", 12),           # registers are given out by eights, warps by fours
    (128, 64, 0, "H100", 8),
    (512, 128, 0, "H100", 1),
    (32, 32, 0, "H100", 32),            # blocks
    (32, 32, 0, "RTX 5090", 24),
    (128, 32, 32 << 10, "H100", 6),     # shared memory, and 1 KB of each block that is the system's
    (128, 32, 32 << 10, "RTX 5090", 3),
    (128, None, 0, "H100", 4),          # unknown: what the launch bounds leave
])  # fmt: skip
def test_resident_blocks(
    threads: int, registers: int | None, shared: int, device: str, blocks: int
) -> None:
    on = _explain.DEVICES[device]
    assert time_model.resident_blocks(threads, shared, registers, on) == blocks


def test_more_bandwidth_takes_less_time_until_something_else_limits() -> None:
    times = [
        explain((1 << 19, 1024), BF16, device="H100", bandwidth=bandwidth)
        for bandwidth in (1000, 2000, 1e9)
    ]
    assert [each.limiter for each in times[:2]] == ["bandwidth", "bandwidth"]
    assert times[0].microseconds == pytest.approx(2 * times[1].microseconds, rel=0.01)
    assert times[2].limiter != "bandwidth"


@pytest.fixture(params=["no benchmarks", "another project's"])
def hide_the_model(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[], None]:
    """Called, it leaves what an installed package finds."""

    def hide() -> None:
        if request.param == "no benchmarks":
            monkeypatch.setitem(sys.modules, "benchmarks", None)
            return
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "__init__.py").write_text("raise AssertionError('imported')")
        monkeypatch.delitem(sys.modules, "benchmarks")
        monkeypatch.syspath_prepend(tmp_path)

    return hide


@pytest.mark.parametrize(("shape", "dtype", "out_dtype", "backward", "copy_fraction"), [
    ((4096, 1024), BF16, None, False, 1),
    ((4096, 1024), BF16, FP32, True, 1),
    ((16, 1 << 24), FP32, None, False, 2 / 3),  # read twice
    ((16, 1 << 24), FP32, None, True, 3 / 5),
    ((512, 1024), FP32, BF16, False, 6 / 10),   # after a cast by torch
])  # fmt: skip
def test_without_the_model_the_time_is_that_of_the_bytes(
    hide_the_model: Callable[[], None],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    backward: bool,
    copy_fraction: float,
) -> None:
    known = explain(shape, dtype, out_dtype=out_dtype, backward=backward, device="H100")
    hide_the_model()
    found = explain(shape, dtype, out_dtype=out_dtype, backward=backward, device="H100")
    assert found.microseconds == pytest.approx(found.bytes_moved / 3000e3)
    assert found.copy_fraction == pytest.approx(copy_fraction)
    assert found.limiter == "bandwidth"
    assert (found.registers, found.occupancy, found.waves) == (None, None, None)
    assert "occupancy      unknown" in str(found)
    # All else is the plan.
    times = ("microseconds", "copy_fraction", "limiter", "registers", "occupancy", "waves")
    assert dataclasses.replace(known, **{name: getattr(found, name) for name in times}) == found


def test_a_tensor_gives_its_shape_and_dtype() -> None:
    tensor = torch.empty(64, 1000, dtype=BF16)
    assert explain(tensor, device="H100") == explain((64, 1000), BF16, device="H100")
    scalar = explain(torch.tensor(1.0), device="H100")
    assert scalar == explain((), device="H100") == explain((1,), device="H100")


def test_a_tensor_without_elements_runs_nothing() -> None:
    found = explain((0, 5), device="H100")
    assert (found.blocks, found.bytes_moved, found.microseconds) == (0, 0, 0)
    assert found.kernel is None and found.limiter == "nothing to do"
    assert "nothing to do" in str(found)


def test_the_printed_table() -> None:
    found = explain((10682, 50257), BF16, device="H100")
    assert repr(found) == str(found)
    lines = str(found).splitlines()
    assert {line[14] for line in lines} == {" "} and " " not in {line[15] for line in lines}
    for shown in ("H100", "3000 GB/s (measured)", str(found.kernel), f"{found.blocks} blocks"):
        assert shown in str(found)
    assert "3210 GB/s (given)" in str(explain((5, 5), device="H100", bandwidth=3210))
    assert "cast first     by torch" in str(explain((5, 5), FP64, out_dtype=BF16, device="H100"))


@pytest.mark.parametrize("dim", [-3, 2])
def test_a_dim_out_of_range(dim: int) -> None:
    with pytest.raises(IndexError, match=rf"range of \[-2, 1\], but got {dim}"):
        explain((3, 3), dim=dim, device="H100")


@pytest.mark.parametrize(("dtype", "out_dtype", "backward"), [
    (torch.complex64, None, False),
    (torch.complex64, FP32, False),
    (torch.int64, None, False),
    (torch.int64, FP32, True),
    (FP32, torch.int64, False),
    (torch.float8_e4m3fn, FP32, False),
])  # fmt: skip
def test_a_dtype_without_a_kernel(
    dtype: torch.dtype, out_dtype: torch.dtype | None, backward: bool
) -> None:
    with pytest.raises(NotImplementedError, match="expected float16, bfloat16, float32 or float64"):
        explain((3, 3), dtype, out_dtype=out_dtype, backward=backward, device="H100")


@pytest.mark.parametrize("device", ["H1000", "cpu", torch.device("cpu")])
def test_an_unknown_device(device: str | torch.device) -> None:
    with pytest.raises(ValueError, match="A100, H100, H200, B200, RTX 5090"):
        explain((3, 3), device=device)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="negative size"):
        explain((3, -3), device="H100")
    with pytest.raises(ValueError, match="positive bandwidth"):
        explain((3, 3), device="H100", bandwidth=0)


def test_the_current_device_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA L40S", 8, 9, 142
        max_threads_per_multi_processor, regs_per_multiprocessor = 1536, 65536
        shared_memory_per_multiprocessor, shared_memory_per_block_optin = 102400, 101376
        clock_rate, memory_clock_rate, memory_bus_width = 2520000, 9001000, 384

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain((3, 3)).device == "H100"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    found = explain((4096, 50257))
    assert found.device == "NVIDIA L40S" and found.schedule == "grid"
    assert found.bandwidth == pytest.approx(0.9 * 864, rel=0.01)
    Properties.name, Properties.multi_processor_count = "NVIDIA H200", 132
    assert explain((3, 3), device="cuda:0").bandwidth == 4200
    del Properties.memory_clock_rate
    Properties.name = "another"
    assert "a guess" in str(explain((3, 3), device="cuda"))


def test_the_document_has_what_the_model_gives() -> None:
    text = DOCUMENT.read_text()
    assert render(text) == text, "to renew it: python -m benchmarks.gpu_model"


def test_the_document_has_every_cell_for_every_device() -> None:
    cells = model_cells()
    assert {cell.group for cell in cells} == {"rows", "few_rows", "strided", "cast"}
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    width = 5 + 3 * len(DEVICES) + len(MEASURED)
    assert sum(line.count(" x ") >= 2 and line.count("|") == width for line in rows) == len(cells)
    # Every one of them has been measured where there are results.
    assert all(cell in measured(device) for device in MEASURED for cell in cells)


def test_the_example() -> None:
    result = doctest.testmod(_explain)
    assert result.attempted > 0 and result.failed == 0
    assert softmax_ext.explain is explain and "explain" in softmax_ext.__all__
    assert softmax_ext.Explanation is Explanation


def test_it_needs_no_gpu() -> None:
    script = "import softmax_ext; print(softmax_ext.explain((64, 1000)).device)"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(DOCUMENT.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert (result.stdout.strip(), result.returncode) == ("H100", 0), result.stderr
