"""What would run on a GPU: the plan, and the bytes that it moves."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from softmax_ext._loader import load
from softmax_ext.functional.scores import Scores, with_scores

if TYPE_CHECKING:
    from softmax_ext._C import Plan

_C = load()

__all__ = ["Explanation", "explain"]

_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_INTEGRAL = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_HALF = {torch.float16, torch.bfloat16}

# --- Devices -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    name: str
    compute_capability: int  # 90 for 9.0
    sm_count: int
    threads: int  # of an SM, at most
    shared_bytes: int  # of an SM
    shared_bytes_of_block: int  # with opt-in
    clock: float  # GHz
    bandwidth: float  # of a copy, bytes read and written, GB/s
    bandwidth_source: str
    registers: int = 65536  # of an SM


# Limits: CUDA programming guide, technical specifications per compute capability. SMs, boost clocks
# and bandwidths of memory (2039, 8000 and 1792 GB/s): the vendor's datasheets; where one gives no
# clock, it is that of its float32 rate. Copies: measured where it says so.
_DATASHEET = "90 % of the datasheet"
_KIB = 1024
DEVICES = {
    device.name: device
    for device in (
        Device("A100", 80, 108, 2048, 164 * _KIB, 163 * _KIB, 1.41, 1835, _DATASHEET),
        Device("H100", 90, 132, 2048, 228 * _KIB, 227 * _KIB, 1.98, 3000, "measured"),
        Device("H200", 90, 132, 2048, 228 * _KIB, 227 * _KIB, 1.98, 4200, "measured"),
        Device("B200", 100, 148, 2048, 228 * _KIB, 227 * _KIB, 1.96, 7200, _DATASHEET),
        Device("RTX 5090", 120, 170, 1536, 100 * _KIB, 99 * _KIB, 2.41, 1613, _DATASHEET),
    )
}


def _from_torch(device: torch.device) -> Device:
    found: Any = torch.cuda.get_device_properties(device)
    for known in DEVICES.values():
        if known.name in found.name and known.sm_count == found.multi_processor_count:
            return known
    transfers = 2 * getattr(found, "memory_clock_rate", 0) / 1e6  # GHz
    width = getattr(found, "memory_bus_width", 0) / 8
    return Device(
        found.name,
        found.major * 10 + found.minor,
        found.multi_processor_count,
        found.max_threads_per_multi_processor,
        found.shared_memory_per_multiprocessor,
        found.shared_memory_per_block_optin,
        getattr(found, "clock_rate", 1.5e6) / 1e6,
        0.9 * transfers * width or 1000.0,
        "90 % of clock times width" if transfers * width else "a guess",
        found.regs_per_multiprocessor,
    )


def find_device(device: str | torch.device | None) -> Device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "H100"
    if isinstance(device, str) and device in DEVICES:
        return DEVICES[device]
    known = f"expected a CUDA device or one of {', '.join(DEVICES)}"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"explain(): unknown device '{device}'; {known}") from None
    if device.type != "cuda":
        raise ValueError(f"explain(): '{device}' is not a GPU; {known}")
    return _from_torch(device)


# --- The explanation -----------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Explanation:
    """What :func:`explain` gives. Its str is a table; nothing in it is measured.

    Without the model of times, `registers`, `occupancy` and `waves` are None, and the expected time
    is that of `bytes_moved` at `bandwidth`.

    Attributes:
        schedule, hold: of the plan, "none" twice for a tensor without elements.
        kernel: the instance that runs, None if there is none.
        blocks, threads: of the launch; threads are those of a block.
        team: blocks that share a row.
        vectors: of 16 bytes that a thread has of a row; with columns, the steps of a part of dim
            (0 for packed ones).
        registers: of a thread, None if unknown.
        shared_bytes, scratch_bytes: dynamic shared memory of a block, and memory of the device.
        occupancy: resident warps of an SM over the most that it has.
        waves: blocks over those that the device has at a time.
        bytes_moved: read and written.
        microseconds: expected.
        limiter: what they are expected to be spent on: "bandwidth", "instructions", "float64" or
            "latency".
        copy_fraction: the time of a copy that moves each tensor once, over the expected time.
        cast_first: the dtypes have no kernel, and a cast by torch comes before it (in backward,
            after it), which is in bytes_moved and microseconds.
        copy_first: the tensor is not read where it lies, but copied by torch first; likewise.
        device, bandwidth: the name, and the GB/s of a copy that were taken.
    """

    schedule: str
    hold: str
    kernel: str | None
    blocks: int
    threads: int
    team: int
    vectors: int
    registers: int | None
    shared_bytes: int
    scratch_bytes: int
    occupancy: float | None
    waves: float | None
    bytes_moved: int
    microseconds: float
    limiter: str
    copy_fraction: float
    cast_first: bool
    copy_first: bool
    device: str
    bandwidth: float
    _bandwidth_source: str = "given"

    def __repr__(self) -> str:
        occupancy = "unknown"
        if self.occupancy is not None:
            occupancy = f"{self.occupancy:.0%}, {self.waves:.3g} waves"
        rows = [
            ("device", f"{self.device}, copy {self.bandwidth:.0f} GB/s ({self._bandwidth_source})"),
            ("schedule", f"{self.schedule}, row held in {self.hold}"),
            ("kernel", str(self.kernel)),
            ("cast first", "by torch: no kernel for these dtypes" if self.cast_first else "no"),
            ("copy first", "by torch: no kernel for these strides" if self.copy_first else "no"),
            ("launch", f"{self.blocks} blocks of {self.threads} threads, {self.team} to a row"),
            ("registers", "unknown" if self.registers is None else str(self.registers)),
            ("vectors", str(self.vectors)),
            ("shared memory", f"{self.shared_bytes} bytes"),
            ("scratch", f"{self.scratch_bytes} bytes"),
            ("occupancy", occupancy),
            ("moves", f"{self.bytes_moved} bytes"),
            ("expected", f"{self.microseconds:.3g} us, {self.copy_fraction:.0%} of a copy"),
            ("limited by", self.limiter),
        ]
        return "\n".join(f"{name:<15}{value}" for name, value in rows)


@dataclass(frozen=True)
class Work:
    outer: int
    dim: int
    inner: int
    read: torch.dtype
    written: torch.dtype
    backward: bool
    # Of scores, what is moved besides a row's input, or gradient and output, and its result; less
    # what takes no part. None of softmax alone.
    more_bytes: int | None = None

    @property
    def of_scores(self) -> bool:
        return self.more_bytes is not None

    @property
    def inputs(self) -> int:
        return 2 if self.backward else 1

    @property
    def elements(self) -> int:
        return self.outer * self.dim * self.inner

    @property
    def rows(self) -> int:
        return self.outer * self.inner


def make_plan(work: Work, device: Device, like: Tensor | None = None, dim: int = 0) -> Plan | None:
    """like: where what is read lies, if the kernels read it there. None where there is nothing to
    launch."""
    if work.of_scores:
        of_scores: Plan | None = _C.score_plan(
            *(work.rows, work.dim, work.read, work.inputs),
            *(device.sm_count, device.shared_bytes_of_block, device.compute_capability),
        )
        return of_scores
    plan: Plan | None = _C.plan(
        *(work.outer, work.dim, work.inner, work.read, work.written, work.inputs, True),
        *(device.sm_count, device.shared_bytes_of_block, device.compute_capability),
        like=like,
        like_dim=dim,
    )
    return plan


def kernel_name(plan: Plan, work: Work) -> str:
    """As in benchmarks/cuda_budgets.txt."""
    with_vectors = dict.fromkeys(("short", "registers", "packed_short"), f"vectors={plan.vectors}")
    parameters = with_vectors | {
        "columns": f"columns={plan.columns}",
    }
    direction = "backward" if work.backward else "forward"
    if work.of_scores:
        is_short = plan.schedule == "warp" and work.dim <= _C.LIMITS["ShortScores"]
        dtype = str(work.read).removeprefix("torch.")
        return f"{'short_' if is_short else ''}scores_{direction} softmax {dtype}"
    read, written = (str(dtype).removeprefix("torch.") for dtype in (work.read, work.written))
    types = read if read == written else f"{read} -> {written}"
    name = f"{plan.kernel}_{direction} softmax {types}"
    return f"{name} {parameters[plan.kernel]}" if plan.kernel in parameters else name


def input_reads(plan: Plan, work: Work) -> int:
    """Of each element."""
    if plan.hold != "none":
        return 1
    max_first = plan.schedule == "columns" or (work.read == torch.float64 and not work.of_scores)
    return 3 if max_first and not work.backward else 2


def kernel_bytes(plan: Plan, work: Work) -> int:
    """Read and written, by the kernel."""
    read = input_reads(plan, work) * work.inputs * work.read.itemsize
    return work.elements * (read + work.written.itemsize) + (work.more_bytes or 0)


# --- Scores --------------------------------------------------------------------------------------


def _live_elements(sizes: Sequence[int], scores: Scores) -> int:
    """Those that a band lets take part, of all."""
    window, is_causal = scores.get("window"), scores.get("is_causal", False)
    if window is None and not is_causal:
        return math.prod(sizes)
    *outer, queries, keys = sizes
    left, right = window or (-1, -1)
    right = 0 if is_causal else right
    offset = scores.get("causal_offset")
    diagonal = torch.arange(queries) + (keys - queries if offset is None else offset)
    begin = (diagonal - left).clamp(0, keys) if left >= 0 else torch.zeros_like(diagonal)
    end = (diagonal + right + 1).clamp(0, keys) if right >= 0 else torch.full_like(diagonal, keys)
    return math.prod(outer) * int((end - begin).clamp_min(0).sum())


def _bytes_of_scores(
    sizes: Sequence[int], dtype: torch.dtype, backward: bool, scores: Scores
) -> int:
    """What is moved because of them, less what is not because of a band."""
    moved, live = 0, _live_elements(sizes, scores)
    mask = scores.get("mask")
    inputs = 2 if backward else 1
    moved -= inputs * (math.prod(sizes) - live) * dtype.itemsize
    if mask is not None and not backward:
        moved += mask.numel() * mask.itemsize
    if not backward:
        return moved
    scale = scores.get("scale", scores.get("temperature"))
    of_scale = isinstance(scale, Tensor) and scale.requires_grad
    if of_scale or scores.get("softcap") is not None:
        moved += live * dtype.itemsize
    if mask is not None and mask.requires_grad:
        moved += mask.numel() * 4
    return moved


# --- What it is expected to take -----------------------------------------------------------------


class Estimate(NamedTuple):
    """What of an Explanation benchmarks/time_model.py gives."""

    registers: int | None
    occupancy: float | None
    waves: float | None
    microseconds: float
    limiter: str


def _time_model() -> Any:
    """benchmarks.time_model, None where there is none: it is not installed. A package of another
    project that is called `benchmarks` too is not imported."""
    spec = find_spec("benchmarks")
    folders = spec.submodule_search_locations if spec else None
    if not any(Path(folder, "cuda_budgets.txt").is_file() for folder in folders or ()):
        return None
    return importlib.import_module("benchmarks.time_model")


def _estimate(plan: Plan, work: Work, kernel: str, of_torch: int, device: Device) -> Estimate:
    """of_torch: bytes that a cast or a copy before the kernel, or after it, moves."""
    model = _time_model()
    if model is not None:
        estimate: Estimate = model.estimate(plan, work, kernel, of_torch, device)
        return estimate
    moved = kernel_bytes(plan, work) + of_torch
    return Estimate(None, None, None, moved / (device.bandwidth * 1e3), "bandwidth")


# --- The public function -------------------------------------------------------------------------


def _is_native(narrow: torch.dtype, wide: torch.dtype) -> bool:
    return narrow == wide or (narrow in _HALF and wide == torch.float32)


def _check_dtypes(dtype: torch.dtype, out_dtype: torch.dtype | None, backward: bool) -> None:
    expected = "expected float16, bfloat16, float32 or float64"
    if out_dtype is not None and out_dtype not in _FLOATING:
        raise NotImplementedError(
            f"explain(): not implemented for an argument 'out_dtype' of {out_dtype}; {expected}"
        )
    integral = dtype in _INTEGRAL and out_dtype is not None and not backward
    if dtype not in _FLOATING and not integral:
        raise NotImplementedError(
            f"explain(): not implemented for an argument 'dtype' of {dtype}; {expected} "
            "(forward, another dtype needs the argument 'out_dtype')"
        )


def _check_scores(sizes: Sequence[int], index: int, out_dtype: torch.dtype | None) -> None:
    if index != len(sizes) - 1:
        raise ValueError(
            f"explain(): expected argument 'dim' to be the last, of scores, but got {index} of "
            f"{len(sizes)} dims"
        )
    if out_dtype is not None:
        raise ValueError("explain(): argument 'out_dtype' is not for scores, which have one dtype")


@with_scores
def explain(
    shape: Sequence[int] | Tensor,
    dtype: torch.dtype = torch.float32,
    dim: int = -1,
    *,
    out_dtype: torch.dtype | None = None,
    backward: bool = False,
    device: str | torch.device | None = None,
    bandwidth: float | None = None,
    **scores: Unpack[Scores],
) -> Explanation:
    """What softmax would run on a GPU, and how long it is expected to take.

    No GPU is needed. The time is that of a model on paper (docs/performance_model.md), from the
    launch, the bytes, the instructions and the latencies: an estimate of the kernel's own time,
    without that of the call. Only a checkout has the model (benchmarks/time_model.py); an installed
    package takes the time of the bytes at the bandwidth of a copy. Memory is taken to begin at a
    multiple of 16 bytes, and tensors to be contiguous but for the one that is given.
    log_softmax has the same plan.

    Args:
        shape: of the input; or a tensor, whose shape, strides (backward those of the output's
            gradient) and dtype are taken, and whose device if it is on a GPU and none is given.
        dtype: of the input.
        dim: of which the slices sum to 1.
        out_dtype: of the output, if it is another than `dtype`.
        backward: of the gradient, which has `dtype`; that of the output has `out_dtype`.
        device: "A100", "H100", "H200", "B200" or "RTX 5090"; or a CUDA device of this machine.
            Without it, the current one, or an H100 where there is none.
        bandwidth: of a copy in GB/s, bytes read and written, instead of the device's.
        **scores: `scale`, `mask`, `is_causal` and the others of :func:`softmax_ext.softmax`, of the
            last dim; of tensors, which may be meta, their sizes and dtypes count, and backward
            whether they require a gradient. The input and the output have `dtype`.

    Returns:
        An :class:`Explanation`: printed, a table.

    Raises:
        IndexError: `dim` is out of range.
        NotImplementedError: a dtype that has no kernel.
        ValueError: an unknown device, a negative size, a bandwidth that is not positive;
            scores over another dim than the last, or with `out_dtype`.

    Source: the CUDA programming guide (occupancy); Little's law.

    Example:
        >>> expected = explain((8192, 128256), torch.bfloat16, device="H100")
        >>> expected.schedule, expected.hold, expected.team
        ('cluster', 'registers', 8)
        >>> expected.bytes_moved == 2 * 2 * 8192 * 128256
        True
    """
    if isinstance(shape, Tensor):
        if device is None and shape.is_cuda:
            device = shape.device
        dtype = shape.dtype
    sizes = [int(size) for size in (shape.shape if isinstance(shape, Tensor) else shape)]
    if any(size < 0 for size in sizes):
        raise ValueError(f"explain(): negative size in {tuple(sizes)}")
    _check_dtypes(dtype, out_dtype, backward)
    limit = max(1, len(sizes))
    if not -limit <= dim < limit:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-limit}, {limit - 1}], "
            f"but got {dim})"
        )
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"explain(): expected a positive bandwidth, but got {bandwidth}")
    on = find_device(device)
    if bandwidth is not None:
        on = replace(on, bandwidth=float(bandwidth), bandwidth_source="given")

    wide = out_dtype or dtype
    cast_first = not _is_native(dtype, wide)
    narrow = wide if cast_first else dtype
    sizes = sizes or [1]
    index = dim % limit
    if scores:
        _check_scores(sizes, index, out_dtype)
    work = Work(
        math.prod(sizes[:index]),
        sizes[index],
        math.prod(sizes[index + 1 :]),
        *((wide, narrow) if backward else (narrow, wide)),
        backward,
        _bytes_of_scores(sizes, dtype, backward, scores) if scores else None,
    )
    once = work.elements * (dtype.itemsize + (2 if backward else 1) * wide.itemsize)
    once += work.more_bytes or 0
    like = shape if isinstance(shape, Tensor) and shape.layout == torch.strided else None
    if cast_first:
        like = None
    if scores:
        copy_first = like is not None and like.stride(-1) != 1 and like.size(-1) > 1
    else:
        copy_first = like is not None and not _C.is_direct_on_cuda(like, dim)
    plan = make_plan(work, on, like, dim)
    if plan is None:
        nothing = ("none", "none", None, 0, 0, 1, 0, None, 0, 0, 0.0, 0.0, 0, 0.0, "nothing to do")
        return Explanation(
            *nothing, 1.0, cast_first, False, on.name, on.bandwidth, on.bandwidth_source
        )
    kernel = kernel_name(plan, work)
    of_torch = 0  # bytes
    if cast_first:
        of_torch = work.elements * (dtype.itemsize + wide.itemsize)
    elif copy_first:
        of_torch = work.elements * 2 * work.read.itemsize
    expected = _estimate(plan, work, kernel, of_torch, on)
    return Explanation(
        schedule=plan.schedule,
        hold=plan.hold,
        kernel=kernel,
        blocks=plan.blocks,
        threads=plan.threads,
        team=plan.team,
        vectors=plan.vectors,
        shared_bytes=plan.shared_bytes,
        scratch_bytes=plan.scratch_bytes,
        bytes_moved=kernel_bytes(plan, work) + of_torch,
        copy_fraction=once / (on.bandwidth * 1e3) / expected.microseconds,
        cast_first=cast_first,
        copy_first=copy_first,
        device=on.name,
        bandwidth=on.bandwidth,
        _bandwidth_source=on.bandwidth_source,
        **expected._asdict(),
    )
