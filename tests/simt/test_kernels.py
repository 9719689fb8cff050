"""Every schedule of the CUDA kernels, forward and backward, run on the host executor.

`host` is the executor as built in one lane. It takes each case through the project's own plan and
launchers, for the device that the case names, and in the o2 lane in four thread orders that have to
give the same bits. Most tests name the schedule that is to run, and all say what its plan is, so
that a change of the plan cannot take a kernel out of their reach; the last two look back at what
all of them together have run.

Sizes come from the limits in plan.h: the last that a schedule, a number of vectors or a number of
threads serves, and the first that it does not.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gcov
import pytest
import torch
from host import Host, Instance, Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pairwise import all_pairs
from plans import DEVICES
from special_rows import INF, ROWS, is_nan_for_torch_too
from tolerances import (
    FLOATING,
    INTEGERS,
    OPS,
    SIXTEEN_BIT,
    assert_close_to_reference,
    assert_gradient_close,
    largest_error,
    reference,
    ulp,
)

from softmax_ext._C import LIMITS, SCHEDULES, Plan

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
VECTOR_BYTES, WARP = LIMITS["VectorBytes"], LIMITS["Warp"]
MOST_WARPS, LONG_WARPS, ROW_WARPS = (LIMITS[f"{of}Warps"] for of in ("Most", "Long", "Row"))
CLUSTER_WARPS, RESIDENT_WARPS = LIMITS["ClusterWarps"], LIMITS["ResidentWarps"]
CLUSTER, BLOCK_CHUNKS = LIMITS["ClusterBlocks"], LIMITS["BlockChunks"]
ROW_SCHEDULES, COLUMN_SCHEDULES = SCHEDULES[:-1], ("packed", "columns")
# All blocks of a grid run at once, so it is run on devices of few SMs: with and without clusters.
NEW, OLD = "4 SMs, 9.0", "4 SMs, 8.0"
SMS = DEVICES[NEW].sm_count
Shape = tuple[int, int, int]  # outer, dim, inner


def power_of_two_from(number: int) -> int:
    return 1 << (number - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def parts_of(dim: int) -> int:
    """Of a column: what one thread has alone, or so many that each is short."""
    if dim <= LIMITS["AloneSteps"]:
        return 1
    return min(LIMITS["MostParts"], max(2, power_of_two_from(ceil_div(dim, LIMITS["PartSteps"]))))


def steps_of(dim: int) -> int:
    return ceil_div(dim, parts_of(dim))


@dataclasses.dataclass(frozen=True)
class Types:
    """A direction, what is read (backward: the output and its gradient) and what is written."""

    direction: str
    load: torch.dtype
    store: torch.dtype

    def __str__(self) -> str:
        return f"{self.direction} {self.load} to {self.store}".replace("torch.", "")

    @property
    def inputs(self) -> int:
        return 1 if self.direction == "forward" else 2

    @property
    def native(self) -> bool:
        """Has kernels: no cast, or that of mixed precision. torch makes all others before."""
        narrow, wide = (
            (self.load, self.store) if self.direction == "forward" else (self.store, self.load)
        )
        if narrow == wide:
            return narrow in FLOATING
        return narrow in SIXTEEN_BIT and wide == torch.float32

    @property
    def width(self) -> int:
        return VECTOR_BYTES // self.load.itemsize

    @property
    def chunk_vectors(self) -> int:
        return LIMITS["ChunkVectorsFloat64" if self.load == torch.float64 else "ChunkVectors"]

    @property
    def chunk(self) -> int:
        """Elements: those of a row that a warp has in registers."""
        return self.chunk_vectors * WARP * self.width

    def chunks(self, dim: int) -> int:
        return ceil_div(dim, self.chunk)

    def sharing(
        self, schedule: str, device: str, chunks: int, team: int, warps: int
    ) -> tuple[str, int, int, int]:
        """How as many blocks, of at most as many warps, share a row: hold, vectors, group, team."""
        if chunks > team * warps:
            warps = min(warps, LONG_WARPS)
        each = ceil_div(chunks, team * warps)
        number = max(4, self.load.itemsize)
        states = 2 * chunks * number * (3 - self.inputs)
        if schedule == "grid":
            states = LIMITS["GridTerms"] * number
        kept = (each - 1) * warps * WARP * self.chunk_vectors * VECTOR_BYTES * self.inputs
        fits = states + kept <= DEVICES[device].shared_bytes - LIMITS["ReservedShared"]
        hold = "registers" if each == 1 else "shared" if fits else "none"
        return hold, self.chunk_vectors, warps * WARP, team

    def most_chunks(self, schedule: str, device: str, team: int, hold: str) -> int:
        """Of a row that is held there by as many blocks as large as they can be."""
        return max(
            (
                chunks
                for chunks in range(1, 64 * team * MOST_WARPS)
                if self.sharing(schedule, device, chunks, team, MOST_WARPS)[0] == hold
            ),
            default=0,
        )


DIRECTIONS = ("forward", "backward")
SAME = [Types(direction, dtype, dtype) for direction in DIRECTIONS for dtype in FLOATING]
ALL = [Types("forward", load, store) for load in (*FLOATING, *INTEGERS) for store in FLOATING]
ALL += [Types("backward", load, store) for load in FLOATING for store in FLOATING]
NATIVE = [types for types in ALL if types.native]
CASTS = [types for types in ALL if not types.native]
FLOAT64 = [types for types in SAME if types.load == torch.float64]

ops = pytest.mark.parametrize("op", OPS)


def all_types(types: list[Types]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("types", types, ids=str)


SANITIZERS = ("asan", "tsan")
# What these tests show is in the values, which are those of the o2 lane.
OF_VALUES = (
    "test_bits_do_not_depend_on_how_a_row_is_run",
    "test_bits_of_long_rows",
    "test_bits_of_special_rows",
    "test_special_rows",
    "test_shares_of_minus_infinity",
    "test_tiles_of_minus_infinity",
    "test_ulp_of_float32",
    "test_results_of_16_bits_are_rounded_as_the_exact_ones",
)


@pytest.fixture(autouse=True)
def only_what_moves_memory_under_sanitizers(request: pytest.FixtureRequest) -> None:
    """An access outside of memory, and a race, are of addresses and barriers. Neither the operation
    nor which of the 16-bit types it is changes one: one of each stands for the other."""
    if request.getfixturevalue("host").lane not in SANITIZERS:
        return
    parameters = request.node.callspec.params
    edge = parameters.get("edge")
    types = edge.types if edge else parameters.get("types")
    # Nowhere else do the kernels that cast all run.
    casts = types is not None and types.load != types.store
    if request.node.originalname in OF_VALUES and not casts:
        pytest.skip("sanitizers: a test of values, run in the o2 lane")
    if has_the_accesses_of_another(parameters.get("op"), types):
        pytest.skip("sanitizers: the same accesses as softmax, or as float16")


def has_the_accesses_of_another(op: str | None, types: Types | None) -> bool:
    return op == "log_softmax" or (
        types is not None and torch.bfloat16 in (types.load, types.store)
    )


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).mul(2).to(dtype)


def run(
    host: Host,
    types: Types,
    op: str,
    shape: Shape,
    input: torch.Tensor | None = None,
    **how: object,
) -> Plan:
    """Of random values, or of this input of the forward. The result is right; the plan that ran."""
    if types.direction == "forward":
        x = values(shape, types.load) if input is None else input
        result = host.forward(op, x, 1, types.store, **how)
        assert_close_to_reference(result.tensor, op, x, 1, types.store)
        return result.plan
    x = torch.randn(shape) if input is None else input
    output = reference(op, x, 1).to(types.load)
    grad_output = values(shape, types.load)
    result = host.backward(op, grad_output, output, 1, types.store, **how)
    assert_gradient_close(result.tensor, op, grad_output, output, 1)
    return result.plan


def launch(host: Host, types: Types, op: str, given: list[torch.Tensor], **how: object) -> Result:
    """Of the inputs, over dim 1. What is right is for the caller to say."""
    call = host.forward if types.direction == "forward" else host.backward
    return call(op, *given, 1, types.store, **how)


# --- The plans and their edges: inner size 1 -----------------------------------------------------


Holding = tuple[str, int, int, int]  # hold, vectors, group, team


@dataclasses.dataclass(frozen=True)
class Edge:
    """The largest dim of a plan, and the plan of the next; None where the schedule has none."""

    name: str
    types: Types
    schedule: str
    device: str
    rows: int
    dim: int
    plan: Holding
    beyond: Holding | None

    def __str__(self) -> str:
        return f"{self.types}, {self.schedule}, {self.device}: {self.name}"

    def ragged(self, dim: int) -> Holding:
        """Of a row, in the warp schedule, whose vectors are shifted between the lanes."""
        vectors = power_of_two_from(ceil_div(ceil_div(dim, self.types.width), WARP))
        return ("registers", max(2, vectors), WARP, 1)


def edges_of_a_warp(types: Types, schedule: str) -> Iterator[Edge]:
    """Of the schedules for rows of one chunk at most. As many rows as leave the last block, where
    blocks have several, with fewer."""
    most = types.chunk_vectors
    plans: list[Holding]
    if schedule == "warp":  # of so few rows
        plans = [("registers", 2, 2**k, 1) for k in range(6)]
        plans += [("registers", vectors, WARP, 1) for vectors in (4, 8) if vectors <= most]
    else:  # a row of more vectors than its threads goes through them in a loop
        alone = () if types.load == torch.float64 else (1, 2, 4)
        plans = [("registers", vectors, 1, 1) for vectors in alone]
        lanes = [2**k for k in range(6) if 2**k > max(alone, default=0)]
        plans += [("shared", 1, group, 1) for group in lanes]
        plans += [("shared", most, WARP, 1)]
    for plan, beyond in itertools.zip_longest(plans, plans[1:]):
        _, vectors, group, _ = plan
        rows = 2 * (WARP // group) + 1
        name = f"{group} threads of {vectors} vectors"
        dim = vectors * group * types.width
        yield Edge(name, types, schedule, "H100", rows, dim, plan, beyond)


def edges_of_warps(types: Types) -> Iterator[Edge]:
    """Of the schedules for rows of several chunks: the last in registers, in shared memory; and
    where a block, or another, is added."""

    def edge(name: str, schedule: str, device: str, rows: int, chunks: int, *shares: int) -> Edge:
        """shares: at most how many warps of how many blocks have this many chunks, and one more."""
        warps, team, more_warps, more_team = shares
        plan = types.sharing(schedule, device, chunks, team, warps)
        beyond = types.sharing(schedule, device, chunks + 1, more_team, more_warps)
        return Edge(name, types, schedule, device, rows, chunks * types.chunk, plan, beyond)

    # A warp, a number that is not a power of two, and one less than there can be.
    for warps in (1, 3, MOST_WARPS - 1):
        yield edge(f"{warps} warps", "block", NEW, 3, warps, warps, 1, warps + 1, 1)
    for device, hold in itertools.product((NEW, OLD), ("registers", "shared")):
        if chunks := types.most_chunks("block", device, 1, hold):
            yield edge(f"all {hold}", "block", device, 1, chunks, MOST_WARPS, 1, MOST_WARPS, 1)
    # Of a grid, where there are rows enough for each block to have its own; then two have one.
    for hold, more_team in (("registers", 1), ("shared", 2)):
        chunks = types.most_chunks("grid", NEW, 1, hold)
        shares = (MOST_WARPS, 1, MOST_WARPS, more_team)
        yield edge(f"all {hold} of a block", "grid", NEW, SMS, chunks, *shares)
    # A cluster's blocks have so many warps, before there are more blocks; then as many as two on an
    # SM, backward one, before a warp has 4 chunks, backward 2.
    for team in (2, 4):
        chunks = team * CLUSTER_WARPS
        shares = (CLUSTER_WARPS, team, ceil_div(chunks + 1, team + 1), team + 1)
        yield edge(f"{team} blocks of a cluster", "cluster", NEW, SMS, chunks, *shares)
    warps, each = (RESIDENT_WARPS // 2, 4) if types.inputs == 1 else (MOST_WARPS, 2)
    chunks = warps * CLUSTER
    shares = (warps, CLUSTER, ceil_div(chunks + 1, CLUSTER * each), CLUSTER)
    yield edge("all registers of a cluster", "cluster", NEW, 1, chunks, *shares)
    yield edge("a warp each", "grid", NEW, 1, SMS, 1, SMS, 2, SMS)
    chunks = types.most_chunks("grid", NEW, SMS, "registers")
    shares = (MOST_WARPS, SMS, MOST_WARPS, SMS)
    yield edge("all registers of a grid", "grid", NEW, 1, chunks, *shares)


EDGES = [
    edge
    for types in SAME
    for edge in (
        *edges_of_a_warp(types, "packed"),
        *edges_of_a_warp(types, "warp"),
        *edges_of_warps(types),
    )
]
WHICH = ("last", "last, unaligned", "one beyond", "one vector beyond")


@pytest.mark.parametrize(("edge", "op"), [
    pytest.param(edge, op, id=f"{edge}-{op}")
    for edge, op in itertools.product(EDGES, OPS)
    # Long rows of one op, and one 16-bit type, stand for those of the other.
    if edge.dim <= CLUSTER * edge.types.chunk or not has_the_accesses_of_another(op, edge.types)
])  # fmt: skip
def test_edge_of_a_plan(host: Host, edge: Edge, op: str) -> None:
    for which in WHICH if edge.dim <= CLUSTER * edge.types.chunk else ("last", "one beyond"):
        check_edge(host, edge, which, op)


def check_edge(host: Host, edge: Edge, which: str, op: str) -> None:
    types, width = edge.types, edge.types.width
    dim = edge.dim + {"one beyond": 1, "one vector beyond": width}.get(which, 0)
    offset = types.load.itemsize if which == "last, unaligned" else 0
    orders = host.orders if dim <= 3 * types.chunk else host.orders[-1:]
    how = {"device": edge.device, "schedule": edge.schedule, "load_offset": offset}
    expected = edge.plan if dim == edge.dim else edge.beyond
    if expected is None:
        how["load_offset"] = 0
        shape = (edge.rows, dim, 1)
        plan = host.plan(types.direction, shape, types.load, types.store, **how)
        assert plan.blocks == 0
        return
    plan = run(host, types, op, (edge.rows, dim, 1), **how, orders=orders)
    whole = offset == 0 and dim % width == 0
    if edge.schedule == "warp" and not whole:
        expected = edge.ragged(dim)
    assert (plan.schedule, plan.vectorized) == (edge.schedule, whole and edge.schedule != "packed")
    assert (plan.hold, plan.vectors, plan.group, plan.team) == expected


@all_types([types for types in SAME if types.load != torch.bfloat16])
@pytest.mark.parametrize(("schedule", "more", "runs"), [
    ("block", 0, True),
    ("block", 1, False),
    ("cluster", 0, True),
    ("cluster", 1, False),
    ("grid", 1, True),  # their states are in device memory: any number
])  # fmt: skip
def test_the_most_chunks_of_a_row(
    host: Host, types: Types, schedule: str, more: int, runs: bool
) -> None:
    """Those whose states a block keeps. All schedules give this row the same bits, so what is right
    of one is right of all: the grid's."""
    dim = BLOCK_CHUNKS * types.chunk + more
    how: dict[str, object] = {"device": NEW, "schedule": schedule, "orders": host.orders[-1:]}
    if not runs:
        plan = host.plan(types.direction, (1, dim, 1), types.load, types.store, **how)
        assert plan.blocks == 0
    elif schedule == "grid" or types.load == torch.float64:
        plan = run(host, types, "softmax", (1, dim, 1), **how)
        assert (plan.schedule, plan.vectorized) == (schedule, more == 0)
    else:
        given = sensitive_inputs(types, "softmax", 1, dim)
        results = {
            name: launch(host, types, "softmax", given, **(how | {"schedule": name}))
            for name in (schedule, "grid")
        }
        assert results[schedule].plan.schedule == schedule
        assert_same_bits({name: result.tensor for name, result in results.items()})


@all_types(FLOAT64)
def test_more_chunks_than_a_grid_adds_at_a_time(host: Host, types: Types) -> None:
    """The next terms take the place of the first in shared memory. float64 has the shortest
    chunks."""
    dim = (LIMITS["GridTerms"] + MOST_WARPS * WARP) * types.chunk
    plan = run(host, types, "softmax", (1, dim, 1), device=NEW, schedule="grid")
    assert plan.schedule == "grid" and types.chunks(dim) > LIMITS["GridTerms"]


@ops
@all_types(NATIVE)
@pytest.mark.parametrize(("dim", "device"), [
    (1, "H100"),
    (2, "H100"),        # less than a vector
    (3, "H100"),
    (31, "H100"),       # a lane less than a warp
    (32, "H100"),
    (33, "H100"),
    (127, "H100"),
    (1000, "H100"),     # whole vectors of every type; ImageNet's classes
    (1021, "H100"),     # prime
    (4097, "H100"),     # one more than a chunk of some types
    (4097, "A100"),
    (50257, NEW),       # GPT-2's vocabulary: in a cluster, a block or the grid
    (50257, OLD),
])  # fmt: skip
def test_dim(host: Host, dim: int, device: str, types: Types, op: str) -> None:
    """By the schedule that the plan chooses, of a few rows."""
    plan = run(host, types, op, (3 if dim < 2**12 else 1, dim, 1), device=device)
    vectors, chunks = ceil_div(dim, types.width), types.chunks(dim)
    if dim % types.width != 0 and vectors <= WARP:
        expected = {"packed"}
    elif chunks == 1:
        expected = {"warp"}
    elif DEVICES[device].compute_capability >= 90:
        expected = {"block" if chunks < LIMITS["FewChunks"] else "cluster"}
    else:
        expected = {"block"} if chunks <= ROW_WARPS else {"grid"}
    assert plan.schedule in expected
    assert plan.vectorized == (dim % types.width == 0 and plan.schedule != "packed")


@ops
@all_types(NATIVE)
def test_lanes_of_a_short_row(host: Host, types: Types, op: str) -> None:
    """Where rows fill the device few lanes have many vectors each: four lanes at least, if there
    are as many vectors; but a warp where there are more than 64."""
    most = types.chunk_vectors // types.inputs
    short = WARP * types.chunk_vectors // 2
    for room in (2**k for k in range(1, short.bit_length())):
        vectors = 4 if room > 64 else min(most, max(2, room // 4))
        group = room // vectors
        rows = SMS * LIMITS["FillingThreads"] // group
        for dim in {room * types.width, (room // 2 + 1) * types.width}:
            how = {"device": NEW, "orders": host.orders[-1:]}
            plan = run(host, types, op, (rows, dim, 1), **how)
            assert (plan.kernel, plan.vectors, plan.group) == ("short", vectors, group)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("device", ["A100", "H100", "B200", "RTX 5090", "AGX Orin"])
@pytest.mark.parametrize("fewer", [0, 1], ids=["fills the device", "a block less"])
def test_rows_of_a_block(host: Host, fewer: int, device: str, direction: str) -> None:
    """A block has several rows, of a warp each, if the device is full all the same."""
    types = Types(direction, torch.float64, torch.float64)
    sm_count, most = DEVICES[device].sm_count, LIMITS["ShortRowThreads"] // WARP
    rows = most * (sm_count - fewer)
    plan = run(host, types, "softmax", (rows, 2 * WARP * types.width, 1), device=device)
    items = most // (1 + fewer)
    assert (plan.schedule, plan.items, plan.group) == ("warp", items, WARP)
    assert plan.blocks == ceil_div(rows, items)


# --- A row's bits --------------------------------------------------------------------------------


INTEGER_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    """Every NaN as one."""
    return x.contiguous().view(INTEGER_OF[x.itemsize]).masked_fill(x.isnan(), -1)


def assert_same_bits(results: dict[str, torch.Tensor]) -> None:
    (first, expected), *others = results.items()
    for name, actual in others:
        if torch.equal(bits(actual), bits(expected)):
            continue
        different = bits(actual) != bits(expected)
        at = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{different.sum()} of {different.numel()} elements differ, the first at {at}: "
            f"{actual[at].item()!r} with {name}, {expected[at].item()!r} with {first}"
        )


def sensitive_inputs(types: Types, op: str, rows: int, dim: int) -> list[torch.Tensor]:
    """(rows, dim, 1) of each input, such that the last bit of a row's sum shows in its result.

    A gradient is a difference: it is small beside what is subtracted, for many elements of softmax
    and for the likeliest of log_softmax. An output of 16 bits hides most of what the sum does,
    but one of float32 from the same input shows it.
    """
    x = values((rows, dim, 1), torch.float32)
    if types.direction == "forward":
        return [x.to(types.load)]
    grad = torch.randn(rows, dim, 1)
    if op == "softmax":
        grad += 100
    else:
        x[:, dim // 3] = 20
        grad[:, dim // 3] = 100
    return [grad.to(types.load), reference(op, x, 1).to(types.load)]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in which tensor a row lies."""

    outer: int = 1
    inner: int = 1
    row: tuple[int, int] = (0, 0)  # among the outer and the inner indices
    offset: int = 0  # of the inputs, in elements; of the second one more, and of the output two

    def __str__(self) -> str:
        return f"{self.outer}x_x{self.inner} at {self.row}, offset {self.offset}"

    def around(self, row: torch.Tensor) -> torch.Tensor:
        x = torch.randn(self.outer, row.numel(), self.inner).to(row.dtype)
        x[self.row[0], :, self.row[1]] = row
        return x

    def how(self, types: Types) -> dict[str, object]:
        def bytes(elements: int, dtype: torch.dtype) -> int:
            return elements * dtype.itemsize % VECTOR_BYTES if self.offset else 0

        loads = tuple(bytes(self.offset + number, types.load) for number in range(types.inputs))
        return {"load_offset": loads, "store_offset": bytes(self.offset + 2, types.store)}


def places(types: Types, dim: int) -> Iterator[tuple[str, str, Place]]:
    """With the schedule and the device; all that a row of this size can be run by."""
    width, chunks = types.width, types.chunks(dim)
    if chunks > CLUSTER:  # fewer of them: these take longer
        for schedule, device in itertools.product(ROW_SCHEDULES, (NEW, OLD)):
            yield schedule, device, Place()
            yield schedule, device, Place(outer=2, row=(1, 0), offset=1)
        return
    batch = SMS + 1 if chunks <= 3 else 2  # more rows than SMs, or fewer
    for schedule in ROW_SCHEDULES:
        for device in (NEW, OLD, "A100", "H100"):
            # A grid of more blocks than run at once.
            if schedule != "grid" or DEVICES[device].sm_count == SMS or chunks <= 3:
                yield schedule, device, Place()
        device = NEW if schedule in ("cluster", "grid") else OLD
        for offset in (0, 1, width // 2):
            yield schedule, device, Place(outer=batch, row=(1, 0), offset=offset)
        yield schedule, device, Place(offset=width - 1)
    if dim % width == 0 and WARP * width <= dim <= types.chunk // 2:  # many short rows
        outer = SMS * LIMITS["FillingThreads"] // 4
        yield "warp", NEW, Place(outer=outer, row=(outer - 1, 0))


def sizes(types: Types) -> list[int]:
    """Of a row: around a vector, a vector of each lane, a chunk, some of them, and 32 chunks, whose
    states are one for each lane."""
    width, chunk = types.width, types.chunk
    of_vectors = [1, 3, width, width + 1]
    of_warps = [vectors * WARP * width + more for vectors in (1, 2, 4) for more in (-1, 0, 1)]
    of_chunks = [chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 5, CLUSTER * chunk + 1]
    of_blocks = [MOST_WARPS * chunk + 3, WARP * chunk, WARP * chunk + 1]
    return [*of_vectors, *of_warps, *of_chunks, *of_blocks]


@ops
@all_types(NATIVE)
def test_bits_do_not_depend_on_how_a_row_is_run(host: Host, types: Types, op: str) -> None:
    """Whatever the schedule, the device, the batch and the alignment: the same."""
    for dim in sizes(types):
        same_bits_everywhere(host, types, op, dim)


def same_bits_everywhere(host: Host, types: Types, op: str, dim: int) -> None:
    chunks = types.chunks(dim)
    inputs = sensitive_inputs(types, op, 1, dim)
    results = {}
    schedules = set()
    for schedule, device, place in places(types, dim):
        how = {"schedule": schedule, "device": device, **place.how(types)}
        if chunks > 1 and schedule in ("packed", "warp"):
            continue
        given = [place.around(x.flatten()) for x in inputs]
        result = launch(host, types, op, given, orders=host.orders[:1], **how)
        if result.plan.blocks == 0:
            assert takes_no(schedule, device, chunks), (dim, schedule, device, place)
            continue
        name = f"{schedule}, {device}, {place}, of {dim}"
        results[name] = result.tensor[place.row[0], :, place.row[1]]
        schedules.add(schedule)
    assert_same_bits(results)
    expected = {schedule for schedule in ROW_SCHEDULES if not takes_no(schedule, NEW, chunks)}
    assert schedules == expected
    one = next(iter(results.values())).view(1, dim, 1)
    if types.direction == "forward":
        assert_close_to_reference(one, op, inputs[0], 1, types.store)
    else:
        assert_gradient_close(one, op, *inputs, 1)


def takes_no(schedule: str, device: str, chunks: int) -> bool:
    """Whether it cannot take rows of so many chunks."""
    return {
        "packed": chunks > 1,
        "warp": chunks > 1,
        "block": chunks > BLOCK_CHUNKS,
        "cluster": not 1 < chunks <= BLOCK_CHUNKS or DEVICES[device].compute_capability < 90,
        "columns": True,
    }.get(schedule, False)


@ops
@all_types(FLOAT64)
@pytest.mark.parametrize("chunks", [3 * WARP, CLUSTER * MOST_WARPS + 1, BLOCK_CHUNKS + 1])
def test_bits_of_long_rows(host: Host, chunks: int, types: Types, op: str) -> None:
    """Several chunks a lane; several a warp of a cluster; more than but the grid takes.
    float64 has the shortest chunks."""
    same_bits_everywhere(host, types, op, chunks * types.chunk - 1)


@ops
@all_types(NATIVE)
def test_bits_of_special_rows(host: Host, types: Types, op: str) -> None:
    """Infinities, NaN, and shares of -inf: the same elements are NaN, and the others' bits."""
    for chunks in (1, 3) if types.load != torch.float64 else (1, 3, WARP + 1):
        dim = chunks * types.chunk - 1
        x = torch.stack([make(torch.randn(dim)) for make in ROWS.values()])[:, :, None]
        given = [x.to(types.load)]
        if types.direction == "backward":
            given = [torch.randn(x.shape).to(types.load), reference(op, x, 1).to(types.load)]
        results = {}
        for schedule in ROW_SCHEDULES:
            if takes_no(schedule, NEW, chunks):
                continue
            how = {"schedule": schedule, "device": NEW, "orders": host.orders[:1]}
            rows = launch(host, types, op, given, **how)
            results[f"{schedule}, {chunks} chunks"] = rows.tensor
        assert_same_bits(results)


# --- Columns -------------------------------------------------------------------------------------


def columns_of(types: Types, inner: int, aligned: bool = True) -> int:
    """Neighbouring columns that a thread has: 16 bytes, 8 of a 16-bit type, or one."""
    counts = [types.width, *([types.width // 2] if types.load in SIXTEEN_BIT else [])]
    return next((count for count in counts if aligned and inner % count == 0), 1)


# Around what a thread has alone; two parts, a last one that is shorter, and ones without a step; as
# many as packed slabs have; the most, and longer ones.
DIMS = [1, 2, 31, 32, 33, 64, 65, 97, 512, 513, 1000, 1024, 1025, 4097, 8192, 8193, 20000]


@ops
@all_types(NATIVE)
def test_bits_of_a_column_depend_on_dim_alone(host: Host, types: Types, op: str) -> None:
    """Not on the inner size, on the schedule and the device, on how many blocks share it, on what
    lies beside it, nor on alignment."""
    for dim in DIMS:
        given = [torch.cat([x, x.flip(0)], 2) for x in sensitive_inputs(types, op, 2, dim)]
        results = {}
        holds = set()
        inners = (2, 3, types.width // 2, types.width, 2 * types.width, 33)
        devices = ("H100", "A100") if dim < 4000 else ("H100", OLD)
        for schedule, device, inner in itertools.product(COLUMN_SCHEDULES, devices, set(inners)):
            if inner < 2 or (dim > 4000 and inner > types.width and device != "H100"):
                continue
            for offset in (0, 1) if inner <= types.width else (0,):
                wide = [torch.randn(2, dim, inner).to(types.load) for _ in given]
                for x, y in zip(wide, given, strict=True):
                    x[:, :, -2:] = y
                bytes = offset * types.load.itemsize
                how = {"schedule": schedule, "device": device, "load_offset": bytes}
                result = launch(host, types, op, wide, orders=host.orders[-1:], **how)
                if result.plan.blocks > 0:
                    name = f"{schedule}, {device}, {inner} columns, offset {offset}, of {dim}"
                    results[name] = result.tensor[:, :, -2:]
                    holds.add((schedule, result.plan.hold, result.plan.team > 1))
        assert_same_bits(results)
        assert {schedule for schedule, _, _ in holds} == (
            {"packed", "columns"} if parts_of(dim) <= LIMITS["PackedParts"] * WARP else {"columns"}
        )
        one = next(iter(results.values()))
        if types.direction == "forward":
            assert_close_to_reference(one, op, given[0], 1, types.store)
        else:
            assert_gradient_close(one, op, *given, 1)


@ops
@all_types(NATIVE)
@pytest.mark.parametrize("dim", [31, 200, 1100])
def test_bits_of_special_columns(host: Host, dim: int, types: Types, op: str) -> None:
    """Infinities, NaN, and parts of -inf: the same elements are NaN, and the others' bits."""
    x = torch.stack([make(torch.randn(dim)) for make in ROWS.values()], 1)[None]
    given = [x.to(types.load)]
    if types.direction == "backward":
        given = [torch.randn(x.shape).to(types.load), reference(op, x, 1).to(types.load)]
    results = {}
    for schedule, offset in itertools.product(COLUMN_SCHEDULES, (0, 1)):
        how = {"schedule": schedule, "load_offset": offset * types.load.itemsize}
        for doubled in (given, [torch.cat([x, x, x, x, x, x, x, x], 2) for x in given]):
            result = launch(host, types, op, doubled, **how, orders=host.orders[-1:])
            if result.plan.blocks > 0:
                name = f"{schedule}, offset {offset}, {doubled[0].shape}"
                results[name] = result.tensor[:, :, : x.shape[2]]
    assert_same_bits(results)


@ops
@all_types(SAME)
@pytest.mark.parametrize("inner", [2, 3, 12, 32, 50])
@pytest.mark.parametrize("offset", [0, 8], ids=["", "unaligned"])
def test_inner(host: Host, offset: int, inner: int, types: Types, op: str) -> None:
    """Around one thread along dim, two, and a few; and where a cluster shares a column."""
    columns = columns_of(types, inner, offset == 0)
    for dim in (1, 2, 3, 32, 33, 100, 257, 1000) + ((6000,) if inner in (3, 32) else ()):
        few = dim > 300
        how = {"load_offset": offset, "schedule": "columns"}
        how["orders"] = host.orders[-1:] if few else host.orders
        plan = run(host, types, op, (1 if few else 2, dim, inner), **how)
        assert (plan.schedule, plan.vectorized) == ("columns", columns > 1)
        assert (plan.columns, plan.vectors) == (columns, steps_of(dim))
        of_block = parts_of(dim) // plan.team
        assert plan.group <= of_block
        assert plan.group == of_block or 2 * plan.threads > LIMITS["MostColumnThreads"]
        assert plan.threads % WARP == 0
        assert plan.hold == "shared"


@ops
@all_types(NATIVE)
@pytest.mark.parametrize("dim", [1, 2, 3, 31, 32, 33, 127, 1000, 1021])
def test_dim_of_columns(host: Host, dim: int, types: Types, op: str) -> None:
    """By the schedule that the plan chooses: few or short columns are a small slab."""
    for inner in (3, 2 * types.width, 50):
        plan = run(host, types, op, (3, dim, inner))
        small = dim * inner * types.load.itemsize <= LIMITS["SlabBytes"]
        narrow = inner * types.load.itemsize < LIMITS["SectorBytes"]
        assert plan.schedule == ("packed" if small or narrow else "columns")


@all_types(SAME)
@pytest.mark.parametrize("tail", [0, 1])
def test_a_tile_that_is_wider_than_the_inner_size(host: Host, tail: int, types: Types) -> None:
    """Threads without a column come along; of the last tile of several, and of the only one."""
    for vectors in (1, 3, 5):
        inner = vectors * types.width - tail
        if inner == 1:
            continue
        plan = run(host, types, "softmax", (3, 40, inner), schedule="columns")
        tile = plan.across * plan.columns
        assert plan.columns == columns_of(types, inner)
        assert tile > inner or inner % tile > 0


@all_types(SAME)
def test_many_columns_side_by_side(host: Host, types: Types) -> None:
    """Where there are blocks enough, a block is wider."""
    outer, inner = 4 * DEVICES["AGX Orin"].sm_count, 64 * types.width
    how = {"device": "AGX Orin", "schedule": "columns", "orders": host.orders[-1:]}
    plan = run(host, types, "softmax", (outer, 4, inner), **how)
    assert (plan.columns, plan.across, plan.group) == (types.width, 64, 1)


@ops
@all_types(SAME)
@pytest.mark.parametrize(("device", "dim", "inner", "team", "hold"), [
    ("H100", 500, 32, 4, "shared"),    # of float32; others have more or fewer
    ("RTX 5090", 5000, 32, 8, "shared"),
    ("H100", 16384, 32, 16, "shared"),
    ("H100", 70000, 16, 16, "none"),
    ("A100", 9000, 16, 1, "none"),
    (OLD, 5000, 33, 1, "none"),
])  # fmt: skip
def test_long_columns(
    host: Host, device: str, dim: int, inner: int, team: int, hold: str, types: Types, op: str
) -> None:
    """A cluster's, and what no shared memory holds. Several tiles a block, or a cluster."""
    how: dict[str, object] = {"device": device, "schedule": "columns", "most_blocks": CLUSTER + 1}
    plan = run(host, types, op, (3, dim, inner), **how, orders=host.orders[-1:])
    if types.load == torch.float32:
        forward = types.inputs == 1
        assert plan.hold == hold or (device == "H100" and not forward)
        assert plan.team == team or not forward
    assert plan.team == 1 or DEVICES[device].compute_capability >= 90


# --- Slabs ---------------------------------------------------------------------------------------


@ops
@all_types(NATIVE)
@pytest.mark.parametrize("inner", [1, 2, 3, 5, 7, 15])
def test_slabs(host: Host, inner: int, types: Types, op: str) -> None:
    """Of several outer indices, and a last one of fewer; wherever they begin in 16 bytes, which
    need not be where the results do."""
    for dim, offset in [(1, 0), (3, 1), (types.width + 1, 3), (4 * types.width - 1, 2), (33, 0)]:
        one = dim * inner * types.load.itemsize
        per_slab = min(LIMITS["SlabBytes"] // one, 9)
        outer = 2 * per_slab * SMS - 1 if inner < 7 else 3 * SMS - 1
        how = {
            "load_offset": offset % types.width * types.load.itemsize,
            "store_offset": 2 * offset * types.store.itemsize % VECTOR_BYTES,
            "orders": host.orders[-2:],
        }
        plan = run(host, types, op, (outer, dim, inner), device=OLD, schedule="packed", **how)
        slab = plan.items // inner
        assert (plan.schedule, plan.across) == ("packed", LIMITS["PackedThreads"])
        assert slab > 1 and plan.blocks == ceil_div(outer, slab) >= SMS
        assert outer % slab != 0
        # Rows of a slab that are more than there are threads for, too.
        alone = types.load != torch.float64 and inner == 1 and dim <= 4 * types.width
        assert plan.hold == ("registers" if alone else "shared")
        assert alone or inner > 1 or plan.vectors == 1 or dim > WARP * types.width


@ops
@all_types(NATIVE)
@pytest.mark.parametrize("offset", [0, 1])
def test_large_slabs(host: Host, offset: int, types: Types, op: str) -> None:
    """One outer index that fills more of a block's shared memory: with more threads. Few long rows,
    and many short ones."""
    size = types.load.itemsize
    least = LIMITS["LargeSlabBytes"]
    for dim in (1023, 33 * types.width, 5):
        inner = least // (dim * size) + 1
        offsets = {"load_offset": offset * size, "store_offset": offset * types.store.itemsize}
        how = {"schedule": "packed", "orders": host.orders[-1:], **offsets}
        plan = run(host, types, op, (2, dim, inner), **how)
        assert (plan.schedule, plan.threads) == ("packed", LIMITS["LargePackedThreads"])
        assert plan.blocks == 2
        below = host.plan(types.direction, (2, dim, inner - 1), types.load, types.store, **how)
        assert below.threads == LIMITS["PackedThreads"]


# --- Grids ---------------------------------------------------------------------------------------


@ops
@all_types(SAME)
@pytest.mark.parametrize(("device", "rows", "chunks", "team", "most_blocks"), [
    (NEW, 1, 5, SMS, SMS),
    (OLD, 2, 5, SMS // 2, SMS),
    (NEW, 2, 5, SMS // 2, SMS // 2),  # one team, two turns
    (OLD, 3, 3, 1, SMS),              # a block of the device has no row
    (NEW, SMS + 2, 3, 1, SMS),        # two teams have none in the last turn
    (OLD, 3 * SMS + 1, 2, 1, SMS),    # turns enough to use the states' buffers again
    ("H100", 50, 2, 2, 100),
    ("H100", 50, 2, 2, 40),           # 20 teams in turns of 20, 20 and 10
    ("H100", 5, 8, 8, 16),            # 2 teams of 8
])  # fmt: skip
def test_teams_of_a_grid(
    host: Host, device: str, rows: int, chunks: int, team: int, most_blocks: int, types: Types,
    op: str,
) -> None:  # fmt: skip
    """They meet for every row, though some of them have none."""
    how = {"device": device, "schedule": "grid", "most_blocks": most_blocks}
    orders = host.orders if rows < 4 else host.orders[-2:]
    plan = run(host, types, op, (rows, chunks * types.chunk - 1, 1), **how, orders=orders)
    assert (plan.schedule, plan.hold, plan.team) == ("grid", "registers", team)
    assert plan.blocks == min(most_blocks, min(rows, DEVICES[device].sm_count) * team)


# --- Every way to share a row, in every circumstance ---------------------------------------------


@dataclasses.dataclass(frozen=True)
class Way:
    """How threads share a row."""

    name: str
    whole: bool = True  # the rows' vectors

    def __str__(self) -> str:
        return self.name if self.whole else f"{self.name}, not of whole vectors"

    @property
    def schedule(self) -> str:
        return self.name.split(":")[0]

    @property
    def part(self) -> str:
        return self.name.split(": ")[1]

    @property
    def long(self) -> bool:
        return self.part in ("shared", "none")

    def takes(self, types: Types) -> bool:
        """Whether there is one, and rows for it are not too long to be run often. Of the long
        kernel in a cluster, shared memory holds all that float64 can have there."""
        if self.name == "columns: packets":
            return types.load in SIXTEEN_BIT
        if self.name == "packed: a thread":
            return types.load != torch.float64
        if self.name == "cluster: shared":
            return types.load == torch.float64
        if self.name == "cluster: none":
            return types.load == torch.float32
        if self.name == "grid: none":
            return types.load not in SIXTEEN_BIT
        return True

    @property
    def device(self) -> str:
        if self.name == "cluster: none":
            return "RTX 5090"  # the least shared memory
        if self.name in ("columns: none", "block: none", "grid: none"):
            return OLD
        if self.schedule == "columns" and self.part != "cluster":
            return "A100"  # where there are clusters, few columns are shared by one
        return NEW if self.schedule in ("block", "cluster", "grid") else "H100"

    def dim(self, types: Types) -> int:
        """The last vector of a row has a gap where it is not whole."""
        width, chunk = types.width, types.chunk
        team = {"cluster": CLUSTER, "grid": SMS}.get(self.schedule, 1)
        if self.name == "grid: shared":
            team = 1  # where there are rows enough
        if self.schedule in ("block", "cluster", "grid"):
            chunks = 3  # of a cluster: one of its warps has none
            if self.part != "registers":
                most = types.most_chunks(self.schedule, self.device, team, "registers")
                held = types.most_chunks(self.schedule, self.device, team, "shared")
                chunks = (most if self.part == "shared" else max(most, held)) + 1
                if self.name == "cluster: none":  # a warp may have four
                    chunks = max(chunks, 4 * CLUSTER * LONG_WARPS + 1)
            dim = chunks * chunk
        else:
            dim = {
                "packed: a thread": 4 * width,
                "packed: one vector": 7 * width,
                "packed: many vectors": 33 * width,
                "packed: columns": 50,
                "warp: a part": 4 * width,
                "warp: all": chunk,
                "columns: single": 40,
                "columns: packets": 40,
                "columns: alone": 20,
                "columns: vectors": 1000,
                "columns: none": 6000,
                "columns: cluster": 2000,
            }[self.name]
        return dim - (not self.whole)

    def shape(self, rows: int, types: Types) -> Shape:
        """Of as many rows, and where they are columns a few more."""
        dim = self.dim(types)
        if self.name == "packed: columns":
            return (ceil_div(rows, 3), dim, 3)
        if self.schedule != "columns":
            return (rows, dim, 1)
        inner = ceil_div(rows, types.width) * types.width
        more = {"single": 1, "packets": types.width // 2}.get(self.part, 0)
        return (1, dim, inner + more)

    def how(self, types: Types) -> dict[str, object]:
        return {"schedule": self.schedule, "device": self.device}

    def check(self, plan: Plan, types: Types, aligned: bool = True) -> None:
        assert plan.schedule == self.schedule
        if self.schedule == "packed":
            assert (plan.hold, plan.vectors) == {
                "a thread": ("registers", 4),
                "many vectors": ("shared", types.chunk_vectors),
                "columns": ("shared", 0),
            }.get(self.part, ("shared", 1))
            assert not plan.vectorized
            return
        if self.schedule != "columns":
            assert plan.vectorized == (self.whole and aligned)
            assert plan.hold == (self.part if self.schedule != "warp" else "registers")
            return
        columns = {"single": 1, "packets": types.width // 2}.get(self.part, types.width)
        assert plan.columns == (columns if aligned else 1)
        assert plan.hold == ("none" if self.part == "none" else "shared")
        assert (plan.team > 1) == (self.part == "cluster")


NAMES = [
    "packed: a thread",
    "packed: one vector",
    "packed: many vectors",
    "packed: columns",
    "warp: a part",
    "warp: all",
    "block: registers",
    "block: shared",
    "block: none",
    "cluster: registers",
    "cluster: shared",
    "cluster: none",
    "grid: registers",
    "grid: shared",
    "grid: none",
    "columns: single",
    "columns: packets",
    "columns: alone",
    "columns: vectors",
    "columns: none",
    "columns: cluster",
]
WAYS = [Way(name, whole) for name in NAMES for whole in (True, False)]


def all_ways(
    types: list[Types], ways: list[Way] = WAYS, long: list[Types] = SAME
) -> list[tuple[Way, Types]]:
    """Of the types, those that each takes; for long rows, of these."""
    return [
        (way, each)
        for way in ways
        for each in types
        if way.takes(each) and (not way.long or each in long)
    ]


def every_pair(ways: list[tuple[Way, Types]], **others: Iterable[object]) -> pytest.MarkDecorator:
    """Each two together of a way's name, whether it is whole, the direction, the type, the
    operation, and other parameters; and so without what the sanitizers leave out."""
    names = ["way", "types", "op", *others]
    cases = {
        (way.name, way.whole, types.direction, types.load, *rest): (way, types, *rest)
        for (way, types), *rest in itertools.product(ways, OPS, *others.values())
        if types.inputs == 2 or 1 not in rest  # a forward has one input, number 0
    }
    moving = [
        key for key, case in cases.items() if not has_the_accesses_of_another(case[2], case[1])
    ]
    chosen = [cases[key] for key in all_pairs(list(cases), all_pairs(moving))]
    ids = ["-".join(map(str, case)) for case in chosen]
    return pytest.mark.parametrize(names, chosen, ids=ids)


WHOLE = [way for way in WAYS if way.whole]
# The longest rows are run less often, and of the others those of the types that have the fewest
# elements: where a row is held does not depend on the type.
FEWER = [way for way in WAYS if way.name != "cluster: none"]
FEWER_WHOLE = [way for way in FEWER if way.whole]
FEWER_TYPES = [types for types in SAME if types.load not in SIXTEEN_BIT]
ROWS_OF_A_FEW = SMS + 1  # with more rows than SMs, a grid's teams have a block each


@every_pair(all_ways(SAME, long=[types for types in SAME if types.load != torch.bfloat16]))
def test_blocks_that_take_several_rows(host: Host, types: Types, op: str, way: Way) -> None:
    """Where the grid is smaller than the rows ask for, two blocks or a cluster at a time. Three
    turns and more, of which every other one uses the same states."""
    outer, dim, inner = way.shape(ROWS_OF_A_FEW, types)
    how = way.how(types)
    unlimited = host.plan(types.direction, (outer, dim, inner), types.load, types.store, **how)
    per_block = max(1, unlimited.items // inner)
    outer = 5 * per_block + 1
    orders = host.orders if dim <= 3 * types.chunk else host.orders[-1:]
    shape = (outer, dim, inner)
    plan = run(host, types, op, shape, **how, most_blocks=2, resident=2, orders=orders)
    way.check(plan, types)
    assert plan.blocks == max(2 // plan.team, 1) * plan.team


@pytest.mark.parametrize(
    ("way", "types"),
    all_ways([types for types in SAME if types.load in (torch.float32, torch.float64)], WHOLE),
    ids=str,
)
def test_blocks_side_by_side(host: Host, types: Types, way: Way) -> None:
    """Shared memory is each block's own, and no block touches the rows of another."""
    outer, dim, inner = way.shape(ROWS_OF_A_FEW, types)
    how = way.how(types)
    unlimited = host.plan(types.direction, (outer, dim, inner), types.load, types.store, **how)
    shape = (5 * max(1, unlimited.items // inner), dim, inner)
    resident = 3 if unlimited.team == 1 else 2
    plan = run(host, types, "softmax", shape, **how, resident=resident)
    way.check(plan, types)
    assert plan.blocks >= 4


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_than_one_wave_of_blocks(host: Host, schedule: str, direction: str) -> None:
    """More blocks than the device has threads for at a time; all of a grid's run, in turns."""
    types = Types(direction, torch.float64, torch.float64)
    dim, inner = {"packed": (3, 3), "warp": (WARP * types.width, 1), "columns": (3, 7)}.get(
        schedule, (2 * types.chunk, 1)
    )
    how: dict[str, object] = {"schedule": schedule, "device": NEW}
    many = host.plan(direction, (2**20, dim, inner), types.load, types.store, **how)
    wave = 2048 // many.threads * SMS // many.team * many.team
    outer = wave // many.team * max(1, many.items // inner) + 1
    plan = run(host, types, "softmax", (outer, dim, inner), **how)
    blocks = SMS if schedule == "grid" else wave + many.team
    if schedule == "columns":
        blocks = outer * ceil_div(inner, plan.across)
    assert plan == Plan(**many.members() | {"blocks": blocks})
    assert plan.schedule == schedule


@every_pair(all_ways(SAME, long=FEWER_TYPES), in_place=[0, 1])
def test_in_place(host: Host, types: Types, in_place: int, op: str, way: Way) -> None:
    """Over the input; backward over the gradient that comes, or over the output."""
    dim = way.dim(types)
    orders = host.orders if dim <= 3 * types.chunk else host.orders[-1:]
    how = {**way.how(types), "in_place": in_place, "orders": orders}
    way.check(run(host, types, op, way.shape(ROWS_OF_A_FEW, types), **how), types)


@every_pair(
    all_ways(SAME, FEWER_WHOLE, long=FEWER_TYPES),
    pointer=[0, 1, "result"],
    by=["an element", "half a vector"],
)
def test_unaligned(
    host: Host, by: str, types: Types, pointer: int | str, op: str, way: Way
) -> None:
    """One pointer that is not a multiple of 16 is enough to be read, or written, another way; and
    in place, where all that is written is."""
    offset = types.load.itemsize if by == "an element" else VECTOR_BYTES // 2
    dim = way.dim(types)
    how = {
        **way.how(types),
        "load_offset": tuple(offset * (number == pointer) for number in range(types.inputs)),
        "store_offset": offset * (pointer == "result"),
        "orders": host.orders[-2:] if dim <= 3 * types.chunk else host.orders[-1:],
    }
    shape = way.shape(ROWS_OF_A_FEW if dim <= 3 * types.chunk else SMS, types)
    way.check(run(host, types, op, shape, **how), types, aligned=False)
    if pointer == 0 and dim <= 3 * types.chunk:
        plan = run(host, types, op, shape, **how, in_place=0)
        way.check(plan, types, aligned=False)


# --- Infinities and NaN --------------------------------------------------------------------------


TORCH_BACKWARD = {
    "softmax": torch.ops.aten._softmax_backward_data,
    "log_softmax": torch.ops.aten._log_softmax_backward_data,
}


def laid_out(rows: list[torch.Tensor], types: Types, way: Way) -> torch.Tensor:
    outer, dim, inner = way.shape(len(rows), types)
    x = torch.randn(outer * inner, dim)
    x[: len(rows)] = torch.stack(rows)
    return x.view(outer, inner, dim).movedim(2, 1)


@every_pair(all_ways(SAME, FEWER, long=FEWER_TYPES))
def test_special_rows(host: Host, types: Types, op: str, way: Way) -> None:
    """Each is right, and NaN where torch has NaN: what one row holds does not leak into others."""
    dim = way.dim(types)
    x = laid_out([make(torch.randn(dim)) for make in ROWS.values()], types, way)
    given = [x.to(types.load)]
    if types.direction == "backward":
        given = [torch.randn(x.shape).to(types.load), reference(op, x, 1).to(types.load)]
    orders = host.orders[-1:]
    result = launch(host, types, op, given, **way.how(types), orders=orders)
    way.check(result.plan, types)
    apart = [tensor.movedim(1, 2).flatten(0, 1) for tensor in (result.tensor, *given)]
    for row, name in enumerate(ROWS):
        actual, *of = (tensor[row] for tensor in apart)
        try:
            if types.direction == "forward":
                assert_close_to_reference(actual, op, of[0], 0, types.store)
                assert is_nan_for_torch_too(op, of[0], 0, actual)
            else:
                assert_gradient_close(actual, op, of[0], of[1], 0)
                assert torch.equal(actual.isnan(), TORCH_BACKWARD[op](*of, 0, of[0].dtype).isnan())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def shares(plan: Plan, types: Types, dim: int) -> Iterator[torch.Tensor]:
    """For each kind of share of a row, the number of that which an element belongs to: a lane's, a
    chunk, a warp's chunks, and those of a block; of a column a part, a thread's, a block's,
    and every other step."""
    element = torch.arange(dim)
    if plan.schedule == "columns" or plan.vectors == 0:
        part = element // steps_of(dim)
        yield part
        yield part % plan.team
        yield part // plan.team % plan.group
        yield element % 2
        return
    vector, chunk = element // types.width, element // types.chunk
    yield vector % WARP
    yield vector % plan.group
    if plan.schedule in ("packed", "warp"):
        return
    yield chunk
    warps = plan.group // WARP
    yield chunk % (plan.team * warps)
    yield chunk % (plan.team * warps) // warps
    yield chunk % WARP


@every_pair(all_ways(SAME, FEWER, long=FEWER_TYPES))
def test_shares_of_minus_infinity(host: Host, types: Types, op: str, way: Way) -> None:
    """A share that is -inf throughout has no maximum to subtract: (-inf) - (-inf). That of each
    kind, and all but those."""
    dim = way.dim(types)
    shape = way.shape(ROWS_OF_A_FEW, types)
    how = way.how(types)
    plan = host.plan(types.direction, shape, types.load, types.store, **how)
    masks = []
    for share in shares(plan, types, dim):
        last = int(share.max())
        for number in {0, last} if way.long else {0, min(1, last), last // 2, last}:
            masks += [share == number, share != number]
    masks = [mask for mask in masks if not mask.all() and mask.any()]
    distinct = list({mask.numpy().tobytes(): mask for mask in masks}.values())
    distinct += distinct[:ROWS_OF_A_FEW]  # as many as the rows that the way is for
    x = laid_out([torch.randn(dim).masked_fill(mask, -INF) for mask in distinct], types, way)
    orders = host.orders[-1:]
    ran = run(host, types, op, tuple(x.shape), x.to(types.load), **how, orders=orders)
    way.check(ran, types)


@ops
@all_types(SAME)
@pytest.mark.parametrize("tail", [0, 1], ids=["vectors", "single"])
def test_tiles_of_minus_infinity(host: Host, tail: int, types: Types, op: str) -> None:
    """All columns of a block of the columns schedule, and all but those."""
    dim, inner = 64 * types.width + 1, 9 * types.width - tail
    shape = (4, dim, inner)
    how = {"schedule": "columns"}
    plan = host.plan(types.direction, shape, types.load, types.store, **how)
    tile = torch.arange(inner) // (plan.across * plan.columns)
    assert tile.max() > 0 and plan.columns == columns_of(types, inner)
    block = torch.arange(4)[:, None] * (int(tile.max()) + 1) + tile
    for mask in (block == 1, block != 1):
        x = torch.randn(shape).masked_fill(mask[:, None], -INF)
        assert run(host, types, op, shape, x.to(types.load), **how) == plan


# --- How exact -----------------------------------------------------------------------------------


@ops
@pytest.mark.parametrize("dim", [1000, 50257, 2**20, 2**22])
def test_ulp_of_float32(host: Host, dim: int, op: str) -> None:
    x = torch.rand(1, dim, 1) * 4 - 2
    result = host.forward(op, x, 1, device=NEW, orders=host.orders[:1])
    expected = reference(op, x, 1)
    assert largest_error(result.tensor, expected, ulp(expected, torch.float32)) <= 6


@ops
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize(("rows", "dim"), [(2000, 100), (200, 1000), (4, 50257), (1, 2**18)])
def test_results_of_16_bits_are_rounded_as_the_exact_ones(
    host: Host, rows: int, dim: int, dtype: torch.dtype, op: str
) -> None:
    """But for one in a thousand, which is closer to the middle of two neighbours than float32
    arithmetic can tell."""
    x = values((rows, dim, 1), dtype)
    result = host.forward(op, x, 1, device=NEW, orders=host.orders[:1])
    expected = reference(op, x, 1)
    half = ulp(expected, dtype) / 2
    wrong = (result.tensor.double() - expected).abs() > half
    assert wrong.double().mean() <= 1e-3


# --- Anything ------------------------------------------------------------------------------------


@st.composite
def any_case(draw: st.DrawFn) -> tuple[Types, str, Shape, dict[str, object]]:
    types = draw(st.sampled_from(NATIVE))
    few = st.integers(1, 9) | st.sampled_from([17, 31, 64, 130])
    long = st.integers(types.chunk - 9, 3 * types.chunk + 9)
    shape = (draw(st.integers(1, 40)), draw(few), draw(st.just(1) | few))
    if draw(st.booleans()):
        shape = (draw(st.integers(1, 6)), draw(long), draw(st.sampled_from([1, 1, 2, 3])))
    offsets = st.sampled_from(range(0, VECTOR_BYTES, types.load.itemsize))
    how: dict[str, object] = {
        "device": draw(st.sampled_from(list(DEVICES))),
        "resident": draw(st.integers(1, 3)),
        "most_blocks": draw(st.sampled_from([2**31 - 1, 1, 2, 5])),
        "load_offset": tuple(draw(offsets) for _ in range(types.inputs)),
        "store_offset": draw(st.sampled_from(range(0, VECTOR_BYTES, types.store.itemsize))),
    }
    if types.load == types.store:
        how["in_place"] = draw(st.integers(-1, types.inputs - 1))
    return types, draw(st.sampled_from(OPS)), shape, how


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(any_case())
@example((Types("forward", torch.float16, torch.float16), "softmax", (1, 1, 1), {}))
def test_any_case(host: Host, case: tuple[Types, str, Shape, dict[str, object]]) -> None:
    """It is right by the schedule that the plan chooses, and the bits are those of every other."""
    types, op, shape, how = case
    if host.lane in SANITIZERS and has_the_accesses_of_another(op, types):
        return
    plan = run(host, types, op, shape, **how)
    assert plan.schedule != "grid" and (plan.schedule in ("packed", "columns") or shape[2] == 1)
    x = torch.randn(shape)
    inputs = [x.to(types.load)]
    if types.direction == "backward":
        inputs = [values(shape, types.load), reference(op, x, 1).to(types.load)]
    results = {}
    for schedule in SCHEDULES:
        device = NEW if schedule == "grid" else how.get("device", NEW)
        other = how | {"schedule": schedule, "device": device, "orders": host.orders[-1:]}
        result = launch(host, types, op, inputs, **other)
        if result.plan.blocks > 0:
            results[schedule] = result.tensor
    assert plan.schedule in results
    assert_same_bits(results)


# --- Nothing, and what cannot be -----------------------------------------------------------------


@all_types(ALL)
def test_nothing_is_launched_for_an_empty_tensor(host: Host, types: Types) -> None:
    """A launch of no blocks would be one out of range."""
    for shape in [(0, 5, 1), (5, 0, 1), (0, 5, 3), (5, 0, 3), (5, 3, 0)]:
        for op in OPS:
            assert run(host, types, op, shape).blocks == 0


@ops
@all_types(CASTS)
def test_casts_that_have_no_kernel_are_refused(host: Host, types: Types, op: str) -> None:
    """Whatever schedule would have it."""
    for shape in [(2, 3, 1), (2, 3, 2), (2, 500, 1)]:
        x = torch.ones(shape).to(types.load)
        given = [x] * types.inputs
        with pytest.raises(AssertionError, match="the launch returned an error"):
            launch(host, types, op, given)


@ops
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_output_of_integers_is_refused(
    host: Host, direction: str, dtype: torch.dtype, op: str
) -> None:
    x = torch.ones(2, 3).to(dtype)
    call = {
        "forward": lambda: host.forward(op, x, 1, dtype),
        "backward": lambda: host.backward(op, x, x, 1, torch.float32),
    }[direction]
    with pytest.raises(AssertionError, match="the launch returned an error"):
        call()


# --- Looking back --------------------------------------------------------------------------------


def kernels_of(types: Types) -> int:
    """Of each op: of rows in registers, of longer ones, of short ones, of slabs, of columns, and
    of slabs of those."""
    registers = types.chunk_vectors.bit_length() - 1
    short = registers + 1 - types.inputs
    packed = 2 if types.load == torch.float64 else 5
    columns = 3 if types.load in SIXTEEN_BIT else 2
    return registers + 1 + short + packed + 1 + columns


def test_every_kernel_that_a_plan_can_ask_for_has_run(host: Host, whole_module: bool) -> None:
    """For all types, with and without vectors. Of what plans can ask for, asking around every power
    of two leaves nothing out."""
    if not whole_module:
        pytest.skip("only a part of this module was selected")
    shapes = [(1, 2**k + more, 1) for k in range(24) for more in (0, 1)]
    inners = (1, 2, 3, 4, 12, VECTOR_BYTES)
    shapes += [(SMS, dim, inner) for _, dim, _ in shapes for inner in inners]
    shapes += [(2**20, 2**k, 1) for k in range(12)]
    wanted = set()
    for types, shape, device in itertools.product(NATIVE, shapes, (NEW, OLD)):
        plan = host.plan(types.direction, shape, types.load, types.store, device=device)
        read = (types.load, types.store, *Instance.of_plan(plan))
        for op in OPS:
            if host.lane not in SANITIZERS or not has_the_accesses_of_another(op, types):
                wanted.add(Instance(types.direction, op, *read))
    kernels = {instance.kernel for instance in wanted}
    assert kernels == {
        "registers",
        "long",
        "short",
        "packed_short",
        "packed",
        "packed_columns",
        "columns",
    }
    assert not wanted - host.instances


def test_lines_that_ran(
    host: Host, whole_module: bool, summary: Callable[[str, str], None]
) -> None:
    """Of what the host build has of the kernels and of the headers that they share."""
    if host.lane != "o2":
        pytest.skip(f"lines are counted in the o2 lane, not in {host.lane}")
    if not whole_module:
        pytest.skip("only a part of this module was selected")
    tool = gcov.find_gcov()
    if tool is None:
        pytest.skip("lines are counted by g++ and its gcov")
    host.close()
    sources = [*CSRC.glob("cuda/*.cuh"), *CSRC.glob("cuda/launch*.cu")]
    sources += CSRC.glob("include/softmax_ext/*.h")
    coverage = gcov.read(tool, host.counts, sources)
    title = "lines of the CUDA kernels that ran on the host executor"
    summary(title, gcov.table(coverage.lines))

    kernels = {
        name: ran
        for name, ran in coverage.functions.items()
        if re.match(r"void softmax_ext::cuda::\w+_kernel<", name)
    }
    assert len(kernels) == len(OPS) * sum(map(kernels_of, NATIVE)), "every instance is counted"
    assert [name for name, ran in kernels.items() if not ran] == []
    ran = [ran for lines in coverage.lines.values() for ran in lines.values()]
    assert len(ran) > 300
    assert sum(ran) >= 0.95 * len(ran)
