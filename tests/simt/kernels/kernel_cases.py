"""What the tests of the CUDA kernels share: types, the edges of plans, ways to share a row, how a
kernel is run, and how what it gives is compared.

Sizes come from the limits in plan.h: the last that a schedule, a number of vectors or a number of
threads serves, and the first that it does not.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from host import Host, Result
from pairwise import all_pairs
from plans import DEVICES
from tolerances import (
    FLOATING,
    INTEGERS,
    OPS,
    SIXTEEN_BIT,
    assert_close_to_reference,
    assert_gradient_close,
    reference,
)

from softmax_ext._C import LIMITS, SCHEDULES, Plan

CSRC = Path(__file__).resolve().parents[3] / "csrc"
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
        states = 2 * chunks * (4 if number == 4 and self.inputs == 2 else 8)
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


def has_the_accesses_of_another(op: str | None, types: Types | None) -> bool:
    return op == "log_softmax" or (
        types is not None and torch.bfloat16 in (types.load, types.store)
    )


def has_the_barriers_of_another(types: Types | None) -> bool:
    """Those of float32, which in tsan, the slowest lane, stands for all that read and write one
    type: asan sees their accesses. Where a cast makes elements larger or smaller, what is written
    may lie where others are still to be read."""
    return types is not None and types.load == types.store != torch.float32


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

    @property
    def long(self) -> bool:
        return self.dim > CLUSTER * self.types.chunk

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
    else:
        alone = () if types.load == torch.float64 else (1, 2, 4)
        plans = [("registers", vectors, 1, 1) for vectors in alone]
        lanes = [2**k for k in range(6) if 2**k > max(alone, default=0)]
        plans += [("shared", 1, group, 1) for group in lanes]
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


def edges_of(*schedules: str) -> pytest.MarkDecorator:
    """Long rows of one op, and one 16-bit type, stand for those of the other."""
    return pytest.mark.parametrize(("edge", "op"), [
        pytest.param(edge, op, id=f"{edge}-{op}")
        for edge, op in itertools.product(EDGES, OPS)
        if edge.schedule in schedules
        and (not edge.long or not has_the_accesses_of_another(op, edge.types))
    ])  # fmt: skip


def check_edge(host: Host, edge: Edge, op: str) -> None:
    for which in ("last", "one beyond") if edge.long else WHICH:
        check_beside_edge(host, edge, which, op)


def check_beside_edge(host: Host, edge: Edge, which: str, op: str) -> None:
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


# --- Bits ----------------------------------------------------------------------------------------


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


def takes_no(schedule: str, device: str, types: Types, dim: int) -> bool:
    """Whether it cannot take such rows."""
    chunks = types.chunks(dim)
    return {
        "packed": dim > WARP * types.width,
        "warp": chunks > 1,
        "block": chunks > BLOCK_CHUNKS,
        "cluster": not 1 < chunks <= BLOCK_CHUNKS or DEVICES[device].compute_capability < 90,
        "columns": True,
    }.get(schedule, False)


def columns_of(types: Types, inner: int, offset: int = 0) -> int:
    """Neighbouring columns that a thread has: 16 bytes, 8 of a 16-bit type, or one; of tensors that
    begin `offset` bytes beyond a multiple of 16."""
    counts = [types.width, *([types.width // 2] if types.load in SIXTEEN_BIT else [])]
    aligned = [count for count in counts if offset % (count * types.load.itemsize) == 0]
    return next((count for count in aligned if inner % count == 0), 1)


# --- Every way to share a row --------------------------------------------------------------------


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

    def check(self, plan: Plan, types: Types, offset: int = 0) -> None:
        """offset: of a tensor, in bytes beyond a multiple of 16."""
        assert plan.schedule == self.schedule
        if self.schedule == "packed":
            assert (plan.hold, plan.vectors) == {
                "a thread": ("registers", 4),
                "columns": ("shared", 0),
            }.get(self.part, ("shared", 1))
            assert not plan.vectorized
            return
        if self.schedule != "columns":
            assert plan.vectorized == (self.whole and offset == 0)
            assert plan.hold == (self.part if self.schedule != "warp" else "registers")
            return
        columns = {"single": 1, "packets": types.width // 2}.get(self.part, types.width)
        assert plan.columns == columns_of(types, columns, offset)
        assert plan.hold == ("none" if self.part == "none" else "shared")
        assert (plan.team > 1) == (self.part == "cluster")


NAMES = [
    "packed: a thread",
    "packed: one vector",
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
