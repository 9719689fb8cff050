"""What would run on a GPU, and how long it is expected to take: the plan, and a model on paper."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from softmax_ext._loader import load

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
# By compute capability, of the same guide: blocks of an SM, 32 elsewhere; float64 results of an SM
# in a cycle, 2 elsewhere.
_BLOCKS_OF_SM = {75: 16, 86: 16, 87: 16, 89: 24, 120: 24, 121: 24}
_DOUBLES_OF_SM = {80: 32, 90: 64, 100: 64}


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


# --- What the model takes for granted ------------------------------------------------------------

# Instructions of a warp, counted in the machine code for sm_90, softmax, by direction and bytes of
# an element; to within a fifth or so.
# Rows: `fixed` for the part of a row that a warp has, and `vector` for each vector of a thread; so
# many more if it is not aligned: `shift`, `shift_vector`. `meeting`: to share it with other warps.
_ROW_INSTRUCTIONS = {
    # direction, bytes: fixed, vector, shift, shift_vector, meeting
    (False, 2): (280, 131, 60, 22, 110),
    (False, 4): (280, 125, 60, 20, 110),
    (False, 8): (300, 315, 60, 15, 300),
    (True, 2): (250, 126, 100, 40, 80),
    (True, 4): (250, 60, 100, 36, 80),
    (True, 8): (250, 60, 100, 30, 100),
}
# Short rows: `fixed` for a warp's rows, `vector` for each vector of a thread, with exp kept or not,
# and `step` for each of the steps in which lanes reduce.
_SHORT_INSTRUCTIONS = {
    # direction, bytes: fixed, kept, vector, step
    (False, 2): (100, 95, 122, 18),
    (False, 4): (100, 75, 75, 18),
    (False, 8): (100, 160, 315, 25),
    (True, 2): (100, 105, 105, 9),
    (True, 4): (100, 50, 50, 9),
    (True, 8): (100, 50, 50, 13),
}
# Packed: for a thread's part of a row; for each of its vectors, in registers or not.
_PACKED_INSTRUCTIONS = {
    (False, 2): (130, 270, 583),
    (False, 4): (130, 157, 333),
    (False, 8): (150, 220, 440),
    (True, 2): (100, 417, 476),
    (True, 4): (95, 162, 228),
    (True, 8): (80, 82, 90),
}
_PACKED_COPY = 47  # for a vector to or from shared memory
# The same where a thread has a row: for the row, and for each of its elements.
_PACKED_SHORT_INSTRUCTIONS = {
    (False, 2): (60, 17),
    (False, 4): (60, 25),
    (True, 2): (60, 14),
    (True, 4): (60, 12),
}
_PACKED_SHORT_COPY = 20
# Columns: for each step along dim, and for each of its columns; to combine two states.
_COLUMN_INSTRUCTIONS = {
    (False, 2): (20, 11, 35),
    (False, 4): (20, 22, 35),
    (False, 8): (22, 60, 150),
    (True, 2): (30, 8, 12),
    (True, 4): (30, 6, 12),
    (True, 8): (30, 6, 14),
}
_COLUMN_FIXED = 300
_DOUBLES = {False: 39, True: 3}  # float64 instructions for an element; exp twice in forward

# Of the 4 warp instructions that an SM can issue in a cycle, those that a good kernel does issue.
_ISSUED = 3
# What an SM alone moves in a cycle, to and from the L2.
_PORT_BYTES = 64
# Microseconds: a load from memory that is in use, a warp's reduction (a level of a column's tree
# takes as long), the meeting of a block, and what those of a cluster and a grid take more.
_LOAD, _REDUCE, _BLOCK, _CLUSTER, _GRID = 0.8, 0.15, 0.3, 0.5, 1.5


# --- The explanation -----------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Explanation:
    """What :func:`explain` gives. Its str is a table; nothing in it is measured.

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
    occupancy: float
    waves: float
    bytes_moved: int
    microseconds: float
    limiter: str
    copy_fraction: float
    cast_first: bool
    device: str
    bandwidth: float
    _bandwidth_source: str = "given"

    def __repr__(self) -> str:
        rows = [
            ("device", f"{self.device}, copy {self.bandwidth:.0f} GB/s ({self._bandwidth_source})"),
            ("schedule", f"{self.schedule}, row held in {self.hold}"),
            ("kernel", str(self.kernel)),
            ("cast first", "by torch: no kernel for these dtypes" if self.cast_first else "no"),
            ("launch", f"{self.blocks} blocks of {self.threads} threads, {self.team} to a row"),
            ("registers", "unknown" if self.registers is None else str(self.registers)),
            ("vectors", str(self.vectors)),
            ("shared memory", f"{self.shared_bytes} bytes"),
            ("scratch", f"{self.scratch_bytes} bytes"),
            ("occupancy", f"{self.occupancy:.0%}, {self.waves:.3g} waves"),
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

    @property
    def inputs(self) -> int:
        return 2 if self.backward else 1

    @property
    def elements(self) -> int:
        return self.outer * self.dim * self.inner

    @property
    def rows(self) -> int:
        return self.outer * self.inner


@dataclass(frozen=True)
class Plan:
    """What _C.plan gives, see plan.h."""

    schedule: str
    hold: str
    vectorized: bool
    width: int
    vectors: int
    columns: int
    group: int
    across: int
    items: int
    team: int
    blocks: int
    shared_bytes: int
    scratch_bytes: int

    @property
    def threads(self) -> int:
        packed = self.schedule == "packed"
        return self.across if packed else self.group * self.across * self.items

    @property
    def warps(self) -> int:
        return self.threads // 32


def make_plan(work: Work, device: Device) -> Plan | None:
    """None where there is nothing to launch."""
    found = _C.plan(
        *(work.outer, work.dim, work.inner, work.read, work.written, work.inputs, True),
        *(device.sm_count, device.shared_bytes_of_block, device.compute_capability),
    )
    return Plan(**found) if found else None


def is_short(plan: Plan, work: Work) -> bool:
    """Rows of whole vectors, half a chunk at most, several of which a warp may have."""
    vectors = _chunk(plan, work.read.itemsize) // plan.width
    return plan.schedule == "warp" and plan.vectorized and plan.group * plan.vectors <= vectors / 2


def is_packed_short(plan: Plan) -> bool:
    """A thread has a row."""
    return plan.schedule == "packed" and plan.hold == "registers"


def kernel_name(plan: Plan, work: Work) -> str:
    """As in cuda_budgets.txt."""
    if plan.schedule == "packed" and work.inner > 1:
        kernel, parameter = "packed_columns", ""
    elif is_packed_short(plan):
        kernel, parameter = "packed_short", f" vectors={plan.vectors}"
    elif plan.schedule == "packed":
        kernel, parameter = "packed", f" one={str(plan.vectors == 1).lower()}"
    elif plan.schedule == "columns":
        kernel, parameter = "columns", f" columns={plan.columns}"
    elif is_short(plan, work):
        kernel, parameter = "short", f" vectors={plan.vectors}"
    elif plan.hold == "registers":
        kernel, parameter = "registers", f" vectors={plan.vectors}"
    else:
        kernel, parameter = "long", ""
    read, written = (str(dtype).removeprefix("torch.") for dtype in (work.read, work.written))
    types = read if read == written else f"{read} -> {written}"
    return f"{kernel}_{'backward' if work.backward else 'forward'} softmax {types}{parameter}"


@cache
def register_table() -> dict[int, dict[str, int]]:
    """Of cuda_budgets.txt: registers by compute capability and kernel."""
    text = importlib.resources.files("softmax_ext").joinpath("cuda_budgets.txt").read_text()
    _, header, *rows = [line for line in text.splitlines() if line and line[0] != "#"]
    columns = header.split()[1:]
    table: dict[int, dict[str, int]] = {}
    for row in rows:
        kernel, *cells = row.rsplit(maxsplit=len(columns))
        for column, cell in zip(columns, cells, strict=True):
            if column.startswith("sm_"):
                table.setdefault(int(column[3:]), {})[kernel.strip()] = int(cell)
    return table


def registers_of(kernel: str, device: Device) -> int | None:
    """For the nearest architecture at or below the device's."""
    table = register_table()
    below = [capability for capability in table if capability <= device.compute_capability]
    return table[max(below)].get(kernel) if below else None


def resident_blocks(plan: Plan, registers: int | None, device: Device) -> int:
    """Of an SM, as the occupancy calculator of CUDA counts them."""
    if registers is None:  # what the launch bounds leave
        registers = 128
    of_warp = math.ceil(registers * 32 / 256) * 256
    shared = math.ceil((plan.shared_bytes + 1024) / 128) * 128  # 1 KB is the system's
    return max(
        1,
        min(
            _BLOCKS_OF_SM.get(device.compute_capability, 32),
            device.threads // plan.threads,
            device.registers // of_warp // 4 * 4 // plan.warps,
            device.shared_bytes // shared,
        ),
    )


# --- The model -----------------------------------------------------------------------------------


def _chunk(plan: Plan, itemsize: int) -> int:
    """Elements of a row in the registers of a warp."""
    return 32 * plan.width * (4 if itemsize == 8 else 8)


def _parts(plan: Plan, work: Work) -> int:
    """Of a column, each of as many steps."""
    return 1 << (math.ceil(work.dim / _steps(plan, work)) - 1).bit_length()


def _steps(plan: Plan, work: Work) -> int:
    if plan.schedule == "columns":
        return plan.vectors
    return math.ceil(work.dim / plan.group)


def kernel_bytes(plan: Plan, work: Work) -> int:
    """Read and written, by the kernel."""
    reads = 1
    if plan.hold == "none":
        three = plan.schedule == "columns" and not work.backward
        reads = 3 if three else 2
    return work.elements * (reads * work.inputs * work.read.itemsize + work.written.itemsize)


def instructions(plan: Plan, work: Work) -> float:
    """Of all warps together."""
    itemsize = work.read.itemsize
    key = (work.backward, itemsize)
    if plan.schedule == "packed":
        turns = math.ceil(plan.items / (plan.threads // plan.group))
        if work.inner > 1:
            step, column, combined = _COLUMN_INSTRUCTIONS[key]
            levels = math.log2(plan.group)
            of_rows = turns * (_steps(plan, work) * (step + column) + levels * combined)
            copy = _PACKED_COPY
        elif is_packed_short(plan):
            row, element = _PACKED_SHORT_INSTRUCTIONS[key]
            of_rows = turns * (row + work.dim * element)
            copy = _PACKED_SHORT_COPY
        else:
            part, one, several = _PACKED_INSTRUCTIONS[key]
            vectors = math.ceil(work.dim / (plan.group * plan.width))
            of_rows = turns * (part + vectors * (one if plan.vectors == 1 else several))
            copy = _PACKED_COPY
        elements = plan.items * work.dim  # of a slab
        read = work.inputs * math.ceil(elements * itemsize / 16 / plan.threads)
        written = math.ceil(elements * work.written.itemsize / 16 / plan.threads)
        slabs = math.ceil(work.rows / plan.items)
        return slabs * plan.warps * (of_rows + copy * (read + written))
    if plan.schedule == "columns":
        step, column, combined = _COLUMN_INSTRUCTIONS[key]
        tile = plan.across * plan.columns
        tiles = work.outer * math.ceil(work.inner / tile)
        parts = _parts(plan, work)
        steps = math.ceil(work.dim / (plan.group * plan.team))  # of a thread
        of_thread = _COLUMN_FIXED + steps * (step + column * plan.columns)
        of_thread += combined * math.ceil(parts / plan.team * tile / plan.threads)
        return tiles * plan.team * plan.warps * of_thread
    if is_short(plan, work):
        fixed, kept, vector, step = _SHORT_INSTRUCTIONS[key]
        of_vector = kept if plan.vectors * plan.width <= 32 else vector
        steps = int(math.log2(plan.group))
        return plan.blocks * plan.warps * (fixed + plan.vectors * of_vector + steps * step)
    fixed, vector, shift, shift_vector, meeting = _ROW_INSTRUCTIONS[key]
    if not plan.vectorized:
        fixed, vector = fixed + shift, vector + shift_vector
    if plan.schedule == "warp":
        return plan.blocks * plan.warps * (fixed + plan.vectors * vector)
    warps = plan.team * plan.warps
    # Of a chunk that a warp has only a part of, only that is computed.
    computed = work.dim / _chunk(plan, itemsize)
    parts = max(warps, math.ceil(computed))
    return work.rows * (warps * meeting + parts * fixed + computed * plan.vectors * vector)


def meeting_latency(plan: Plan) -> float:
    """Microseconds from a thread's elements to the row's state."""
    meeting = {"block": _BLOCK, "cluster": _BLOCK + _CLUSTER, "grid": _BLOCK + _GRID}
    if plan.schedule == "columns":
        levels = math.log2(plan.group) + (plan.group > 1)
        return _REDUCE * levels + (_CLUSTER if plan.team > 1 else 0.0)
    return _REDUCE + meeting.get(plan.schedule, 0.0)


def block_latency(plan: Plan, work: Work) -> float:
    """Microseconds of a block that has the device for itself, but for what it moves."""
    itemsize = work.read.itemsize
    loads = reductions = 1  # one after another
    if plan.schedule == "packed":
        vectors = plan.items * work.dim * itemsize / 16
        loads = work.inputs * math.ceil(vectors / (4 * plan.threads))
        reductions = math.ceil(plan.items / (plan.threads // plan.group))
    elif plan.schedule == "columns":
        steps = math.ceil(work.dim / (plan.group * plan.team))
        loads = 1 if plan.hold == "shared" else kernel_reads(plan, work) * math.ceil(steps / 4)
    elif plan.schedule != "warp":
        reductions = math.ceil(work.dim / _chunk(plan, itemsize) / (plan.team * plan.warps))
        loads = 2 * reductions - 1 if plan.hold == "none" else reductions
    return loads * _LOAD + (reductions - 1) * _REDUCE + meeting_latency(plan)


def kernel_reads(plan: Plan, work: Work) -> int:
    """Of each element of an input."""
    once = work.elements * work.inputs * work.read.itemsize
    return (kernel_bytes(plan, work) - work.elements * work.written.itemsize) // once


def predict(plan: Plan, work: Work, resident: int, device: Device) -> tuple[float, str]:
    """Microseconds, and what they are spent on.

    The largest of: the bytes at the bandwidth of a copy; the instructions at what an SM issues; of
    float64 at what its units compute; each with one block's latency at the end. And, one wave of
    blocks after another, a block's latency and what its SM alone can move (Little's law).
    """
    moved = kernel_bytes(plan, work)
    cycles = device.clock * 1e3  # in a microsecond
    of_sm = math.ceil(plan.blocks / device.sm_count)  # blocks, of the SM that has the most
    share = of_sm / plan.blocks
    at_once = min(resident, of_sm)
    waves = math.ceil(plan.blocks / (device.sm_count * at_once))
    turns = 1  # rows of a team one after another
    if plan.schedule == "grid":
        turns = math.ceil(work.rows * plan.team / plan.blocks)
    moved_at_once = moved / (plan.blocks * turns) * at_once
    wave = block_latency(plan, work) + moved_at_once / (_PORT_BYTES * cycles)
    doubles = _DOUBLES[work.backward] * work.elements if work.read == torch.float64 else 0
    end = _LOAD + meeting_latency(plan)
    times = {
        "bandwidth": moved / (device.bandwidth * 1e3) + end,
        "instructions": instructions(plan, work) * share / (_ISSUED * cycles) + end,
        "float64": doubles * share / (_DOUBLES_OF_SM.get(device.compute_capability, 2) * cycles)
        + end,
        "latency": waves * turns * wave,
    }
    limiter = max(times, key=lambda name: times[name])
    return times[limiter], "latency" if times[limiter] < 2 * end else limiter


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


def explain(
    shape: Sequence[int] | Tensor,
    dtype: torch.dtype = torch.float32,
    dim: int = -1,
    *,
    out_dtype: torch.dtype | None = None,
    backward: bool = False,
    device: str | torch.device | None = None,
    bandwidth: float | None = None,
) -> Explanation:
    """What softmax would run on a GPU, and how long it is expected to take.

    No GPU is needed. The time is that of a model on paper (docs/performance_model.md), from the
    launch, the bytes, the instructions and the latencies: an estimate of the kernel's own time,
    without that of the call. Pointers are taken to be multiples of 16 bytes. log_softmax has the
    same plan.

    Args:
        shape: of the input; or a tensor, whose shape and dtype are taken, and whose device if it is
            on a GPU and none is given.
        dtype: of the input.
        dim: of which the slices sum to 1.
        out_dtype: of the output, if it is another than `dtype`.
        backward: of the gradient, which has `dtype`; that of the output has `out_dtype`.
        device: "A100", "H100", "H200", "B200" or "RTX 5090"; or a CUDA device of this machine.
            Without it, the current one, or an H100 where there is none.
        bandwidth: of a copy in GB/s, bytes read and written, instead of the device's.

    Returns:
        An :class:`Explanation`: printed, a table.

    Raises:
        IndexError: `dim` is out of range.
        NotImplementedError: a dtype that has no kernel.
        ValueError: an unknown device, a negative size, or a bandwidth that is not positive.

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
    work = Work(
        math.prod(sizes[:index]),
        sizes[index],
        math.prod(sizes[index + 1 :]),
        *((wide, narrow) if backward else (narrow, wide)),
        backward,
    )
    once = work.elements * (dtype.itemsize + (2 if backward else 1) * wide.itemsize)
    plan = make_plan(work, on)
    if plan is None:
        nothing = ("none", "none", None, 0, 0, 1, 0, None, 0, 0, 0.0, 0.0, 0, 0.0, "nothing to do")
        return Explanation(*nothing, 1.0, cast_first, on.name, on.bandwidth, on.bandwidth_source)
    kernel = kernel_name(plan, work)
    registers = registers_of(kernel, on)
    resident = resident_blocks(plan, registers, on)
    microseconds, limiter = predict(plan, work, resident, on)
    moved = kernel_bytes(plan, work)
    if cast_first:
        cast = work.elements * (dtype.itemsize + wide.itemsize)
        moved += cast
        microseconds += cast / (on.bandwidth * 1e3) + _LOAD
    return Explanation(
        schedule=plan.schedule,
        hold=plan.hold,
        kernel=kernel,
        blocks=plan.blocks,
        threads=plan.threads,
        team=plan.team,
        vectors=plan.vectors,
        registers=registers,
        shared_bytes=plan.shared_bytes,
        scratch_bytes=plan.scratch_bytes,
        occupancy=resident * plan.threads / on.threads,
        waves=plan.blocks / (on.sm_count * resident),
        bytes_moved=moved,
        microseconds=microseconds,
        limiter=limiter,
        copy_fraction=once / (on.bandwidth * 1e3) / microseconds,
        cast_first=cast_first,
        device=on.name,
        bandwidth=on.bandwidth,
        _bandwidth_source=on.bandwidth_source,
    )
