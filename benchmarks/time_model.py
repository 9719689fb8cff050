"""How long a CUDA plan is expected to take: a model on paper (docs/performance_model.md).

softmax_ext.explain has its figures from here where this can be imported, as in a checkout.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch

from softmax_ext._C import LIMITS, Plan
from softmax_ext._explain import Device, Estimate, Work, input_reads, kernel_bytes

BUDGETS = Path(__file__).with_name("cuda_budgets.txt")
WARP = LIMITS["Warp"]

# --- What the model takes for granted ------------------------------------------------------------

# By compute capability, of the CUDA programming guide: blocks of an SM, 32 elsewhere; float64
# results of an SM in a cycle, 2 elsewhere.
_BLOCKS_OF_SM = {75: 16, 86: 16, 87: 16, 89: 24, 120: 24, 121: 24}
_DOUBLES_OF_SM = {80: 32, 90: 64, 100: 64}

# Instructions of a warp, counted in the machine code for sm_90, softmax, by direction and bytes of
# an element; to within a fifth or so.
# Rows: `fixed` for the part of a row that a warp has, and `vector` for each vector of a thread; so
# many more if it is not aligned: `shift`, `shift_vector`. `meeting`: to share it with other warps.
_ROW_INSTRUCTIONS = {
    # direction, bytes: fixed, vector, shift, shift_vector, meeting
    (False, 2): (280, 131, 60, 22, 110),
    (False, 4): (280, 125, 60, 20, 110),
    (False, 8): (300, 240, 60, 15, 300),
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
# Packed: for a thread's part of a row, which is a vector.
_PACKED_INSTRUCTIONS = {
    (False, 2): 400,
    (False, 4): 287,
    (False, 8): 295,
    (True, 2): 517,
    (True, 4): 257,
    (True, 8): 162,
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
# Scores with a mask: for the part of a row that a warp has, and for each element of a lane; so many
# more where it has single elements.
_SCORE_SINGLE = 5
_SCORE_INSTRUCTIONS = {
    (False, 2): (400, 20),
    (False, 4): (400, 34),
    (False, 8): (550, 85),
    (True, 2): (350, 13),
    (True, 4): (350, 12),
    (True, 8): (400, 16),
}
# float64 instructions for an element: 16 for exp and its argument, which is taken again where the
# element is read again; the others for the max, the sum and the quotient.
_DOUBLES = {False: 21, True: 3}
_DOUBLES_AGAIN = 16

# Of the 4 warp instructions that an SM can issue in a cycle, those that a good kernel does issue.
_ISSUED = 3
# What an SM alone moves in a cycle, to and from the L2.
_PORT_BYTES = 64
# Microseconds: a load from memory that is in use, a warp's reduction (a level of a column's tree
# takes as long), the meeting of a block, and what those of a cluster and a grid take more.
_LOAD, _REDUCE, _BLOCK, _CLUSTER, _GRID = 0.8, 0.15, 0.3, 0.5, 1.5


# --- Occupancy -----------------------------------------------------------------------------------


@cache
def register_table() -> dict[int, dict[str, int]]:
    """Of cuda_budgets.txt: registers by compute capability and kernel."""
    lines = BUDGETS.read_text().splitlines()
    _, header, *rows = [line for line in lines if line and line[0] != "#"]
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


def resident_blocks(threads: int, shared_bytes: int, registers: int | None, device: Device) -> int:
    """Of an SM, as the occupancy calculator of CUDA counts them."""
    if registers is None:  # what the launch bounds leave
        registers = 128
    of_warp = math.ceil(registers * WARP / 256) * 256
    shared = math.ceil((shared_bytes + 1024) / 128) * 128  # 1 KB is the system's
    return max(
        1,
        min(
            _BLOCKS_OF_SM.get(device.compute_capability, 32),
            device.threads // threads,
            device.registers // of_warp // 4 * 4 // (threads // WARP),
            device.shared_bytes // shared,
        ),
    )


# --- Time ----------------------------------------------------------------------------------------


def _warps(plan: Plan) -> int:
    """Of a block."""
    return plan.threads // WARP


def _chunk(plan: Plan, itemsize: int) -> int:
    """Elements of a row in the registers of a warp."""
    return WARP * plan.width * LIMITS["ChunkVectorsFloat64" if itemsize == 8 else "ChunkVectors"]


def _parts(plan: Plan, work: Work) -> int:
    """Of a column, each of as many steps."""
    return 1 << (math.ceil(work.dim / _steps(plan, work)) - 1).bit_length()


def _steps(plan: Plan, work: Work) -> int:
    if plan.schedule == "columns":
        return plan.vectors
    return math.ceil(work.dim / plan.group)


def instructions(plan: Plan, work: Work) -> float:
    """Of all warps together."""
    itemsize = work.read.itemsize
    key = (work.backward, itemsize)
    if work.of_scores:
        fixed, item = _SCORE_INSTRUCTIONS[key]
        item += _SCORE_SINGLE if work.dim % LIMITS["ScoreWidth"] else 0
        if plan.group < WARP:  # several rows a warp
            items = math.ceil(work.dim / plan.group / 4) * 4
            return plan.blocks * _warps(plan) * (fixed + items * item)
        parts = math.ceil(work.dim / _chunk(plan, itemsize))
        return work.rows * (parts * fixed + work.dim / WARP * item)
    if plan.schedule == "packed":
        turns = math.ceil(plan.items / (plan.threads // plan.group))
        if plan.kernel == "packed_columns":
            step, column, combined = _COLUMN_INSTRUCTIONS[key]
            levels = math.log2(plan.group)
            of_rows = turns * (_steps(plan, work) * (step + column) + levels * combined)
            copy = _PACKED_COPY
        elif plan.kernel == "packed_short":
            row, element = _PACKED_SHORT_INSTRUCTIONS[key]
            of_rows = turns * (row + work.dim * element)
            copy = _PACKED_SHORT_COPY
        else:
            of_rows = turns * _PACKED_INSTRUCTIONS[key]
            copy = _PACKED_COPY
        elements = plan.items * work.dim  # of a slab
        read = work.inputs * math.ceil(elements * itemsize / 16 / plan.threads)
        written = math.ceil(elements * work.written.itemsize / 16 / plan.threads)
        slabs = math.ceil(work.rows / plan.items)
        return slabs * _warps(plan) * (of_rows + copy * (read + written))
    if plan.schedule == "columns":
        step, column, combined = _COLUMN_INSTRUCTIONS[key]
        tile = plan.across * plan.columns
        tiles = work.outer * math.ceil(work.inner / tile)
        parts = _parts(plan, work)
        steps = math.ceil(work.dim / (plan.group * plan.team))  # of a thread
        of_thread = _COLUMN_FIXED + steps * (step + column * plan.columns)
        of_thread += combined * math.ceil(parts / plan.team * tile / plan.threads)
        return tiles * plan.team * _warps(plan) * of_thread
    if plan.kernel == "short":
        fixed, kept, vector, step = _SHORT_INSTRUCTIONS[key]
        of_vector = kept if plan.vectors * plan.width <= 32 else vector
        steps = int(math.log2(plan.group))
        return plan.blocks * _warps(plan) * (fixed + plan.vectors * of_vector + steps * step)
    fixed, vector, shift, shift_vector, meeting = _ROW_INSTRUCTIONS[key]
    if not plan.vectorized:
        fixed, vector = fixed + shift, vector + shift_vector
    if plan.schedule == "warp":
        return plan.blocks * _warps(plan) * (fixed + plan.vectors * vector)
    warps = plan.team * _warps(plan)
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
        loads = 1 if plan.hold == "shared" else input_reads(plan, work) * math.ceil(steps / 4)
    elif plan.schedule != "warp":
        reductions = math.ceil(work.dim / _chunk(plan, itemsize) / (plan.team * _warps(plan)))
        reads = input_reads(plan, work)
        loads = reads * (reductions - 1) + 1 if plan.hold == "none" else reductions
    return loads * _LOAD + (reductions - 1) * _REDUCE + meeting_latency(plan)


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
    doubles = 0
    if work.read == torch.float64:
        again = _DOUBLES_AGAIN if plan.hold == "none" and not work.backward else 0
        doubles = (_DOUBLES[work.backward] + again) * work.elements
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


def estimate(plan: Plan, work: Work, kernel: str, of_torch: int, device: Device) -> Estimate:
    """kernel: its line in BUDGETS. of_torch: bytes of a cast or a copy before it, or after."""
    registers = registers_of(kernel, device)
    resident = resident_blocks(plan.threads, plan.shared_bytes, registers, device)
    microseconds, limiter = predict(plan, work, resident, device)
    if of_torch:
        microseconds += of_torch / (device.bandwidth * 1e3) + _LOAD
    return Estimate(
        registers=registers,
        occupancy=resident * plan.threads / device.threads,
        waves=plan.blocks / (device.sm_count * resident),
        microseconds=microseconds,
        limiter=limiter,
    )
