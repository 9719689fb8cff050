"""Every schedule of the CUDA kernels, forward and backward, run on the host executor.

`host` is the executor as built in one lane. It takes each case through the project's own plan and
launchers, for the device that the case names, and in the o2 lane in four thread orders that have to
give the same bits. Each test says which schedule is to run, so that a change of the plan cannot
take a kernel out of its reach; the last two look back at what all of them together have run.

Sizes come from the limits in plan.h: the last that a schedule, a number of vectors or a number of
threads serves, and the first that it does not.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import gcov
import pytest
import torch
from host import Host, Instance
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from plans import DEVICES, Plan
from special_rows import INF, ROWS, is_nan_for_torch_too
from tolerances import (
    FLOATING,
    INTEGERS,
    OPS,
    assert_close_to_reference,
    assert_gradient_close,
    reference,
)

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
PLAN_H = (CSRC / "include" / "softmax_ext" / "plan.h").read_text()
LIMITS = {name: int(value) for name, value in re.findall(r"constexpr int k(\w+) = (\d+);", PLAN_H)}
VECTOR_BYTES, WARP = LIMITS["VectorBytes"], LIMITS["Warp"]
MOST_THREADS, STRIDED_THREADS = LIMITS["MaxThreads"], LIMITS["StridedThreads"]
# What a block may have in all without having asked for more (CUDA programming guide).
DEFAULT_SHARED = 48 * 1024
Shape = tuple[int, int, int]  # outer, dim, inner


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
        """Has kernels of its own: no cast, or that of mixed precision."""
        narrow, wide = (
            (self.load, self.store) if self.direction == "forward" else (self.store, self.load)
        )
        return narrow == wide or (narrow in SIXTEEN_BIT and wide == torch.float32)

    @property
    def width(self) -> int:
        known = self.native or self.direction == "backward"
        return VECTOR_BYTES // self.load.itemsize if known else 1

    def vectors_in(self, words: int) -> int:
        computed = self.store if self.direction == "forward" else self.load
        return words // (self.width * (4 if computed == torch.float64 else 1) * self.inputs)

    @property
    def register_vectors(self) -> int:
        return max(1, self.vectors_in(LIMITS["RegistersWords"]))

    @property
    def step_vectors(self) -> int:
        """Those that a thread holds at a time in the other schedules."""
        assert LIMITS["StreamingWords"] == LIMITS["StridedWords"]
        return max(1, min(LIMITS["MostVectors"], self.vectors_in(LIMITS["StreamingWords"])))

    @property
    def most_in_registers(self) -> int:
        return MOST_THREADS * self.register_vectors * self.width

    def most_in_shared(self, bytes: int) -> int:
        """The largest dim of which all inputs fit."""
        return bytes // self.inputs // VECTOR_BYTES * VECTOR_BYTES // self.load.itemsize

    def shared_for(self, device: str) -> int:
        return DEVICES[device].shared_bytes - LIMITS["ReservedShared"]

    def schedule_of(self, dim: int, device: str) -> str:
        """Where inner is 1."""
        if self.native and dim <= self.most_in_registers:
            return "registers"
        fits = self.native and dim <= self.most_in_shared(self.shared_for(device))
        return "shared" if fits else "streaming"


SIXTEEN_BIT = (torch.float16, torch.bfloat16)
DIRECTIONS = ("forward", "backward")
SAME = [Types(direction, dtype, dtype) for direction in DIRECTIONS for dtype in FLOATING]
ALL = [Types("forward", load, store) for load in (*FLOATING, *INTEGERS) for store in FLOATING]
ALL += [Types("backward", load, store) for load in FLOATING for store in FLOATING]
NATIVE = [types for types in ALL if types.native]
CASTS = [types for types in ALL if not types.native]

ops = pytest.mark.parametrize("op", OPS)


def all_types(types: list[Types]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("types", types, ids=str)


@pytest.fixture(autouse=True)
def only_what_moves_memory_in_tsan(request: pytest.FixtureRequest) -> None:
    """A race is between accesses that no barrier orders. Neither the operation nor which of the
    16-bit types it is changes an address or a barrier: one of each stands for the other."""
    if request.getfixturevalue("host").lane != "tsan":
        return
    parameters = request.node.callspec.params
    edge = parameters.get("edge")
    types = edge.types if edge else parameters.get("types")
    if is_left_out_of_tsan(parameters.get("op"), types):
        pytest.skip("TSan: the same accesses as softmax, or as float16")


def is_left_out_of_tsan(op: str | None, types: Types | None) -> bool:
    return op == "log_softmax" or (
        types is not None and torch.bfloat16 in (types.load, types.store)
    )


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).mul(2).to(dtype)
    return torch.randint(-9, 10, shape).to(dtype)  # uint8: near both of its ends


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


# --- Rows: inner size 1 --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Edge:
    """The largest dim of a plan, as (schedule, vectors, group), and the plan of the next."""

    name: str
    types: Types
    device: str
    dim: int
    plan: tuple[str, int, int]
    beyond: tuple[str, int, int]

    def __str__(self) -> str:
        return f"{self.types}, {self.device}: {self.name}"


def edges_in_registers(types: Types) -> Iterator[Edge]:
    most, width = types.register_vectors, types.width

    def edge(name: str, plan: tuple[int, int], beyond: tuple[int, int]) -> Edge:
        """Of plans as (vectors, group)."""
        dim = plan[0] * plan[1] * width
        return Edge(name, types, "H100", dim, ("registers", *plan), ("registers", *beyond))

    for group in (1, 2, 4, 8, 16):
        yield edge(f"{group} threads", (1, group), (1, 2 * group))
    for vectors in (1, 2, 4):
        if vectors < most:
            yield edge(f"a warp of {vectors} vectors", (vectors, WARP), (2 * vectors, WARP))
    # Then whole warps: one, a number that is not a power of two, and one less than there can be.
    for warps in (1, 3, MOST_THREADS // WARP - 1):
        group = warps * WARP
        yield edge(f"{warps} warps of {most} vectors", (most, group), (most, group + WARP))


def edges_beyond_registers(types: Types, device: str) -> Iterator[Edge]:
    available = types.shared_for(device)
    # Two rows on an SM leave a block half the threads.
    most_of_two = types.most_in_shared(available // 2)

    def shared(dim: int) -> tuple[str, int, int]:
        group = MOST_THREADS // 2 if dim <= most_of_two else MOST_THREADS
        return ("shared", types.step_vectors, group)

    limit = types.most_in_registers
    if device == "H100":
        registers = ("registers", types.register_vectors, MOST_THREADS)
        yield Edge("all registers", types, device, limit, registers, shared(limit + 1))
        # A row that is all that a block gets unasked, and one that leaves the reductions theirs.
        for spared in (0, LIMITS["ReservedShared"]):
            dim = types.most_in_shared(DEFAULT_SHARED - spared)
            if dim > limit:
                name = f"{DEFAULT_SHARED - spared} bytes of shared memory"
                yield Edge(name, types, device, dim, shared(dim), shared(dim + 1))
    if most_of_two > limit:
        beyond = shared(most_of_two + 1)
        yield Edge("two rows an SM", types, device, most_of_two, shared(most_of_two), beyond)
    most = types.most_in_shared(available)
    streaming = ("streaming", types.step_vectors, MOST_THREADS)
    yield Edge("all shared memory", types, device, most, shared(most), streaming)


def edges_of_streaming(types: Types) -> Iterator[Edge]:
    """Casts stream rows of any size."""
    step = types.step_vectors
    for group in (1, 2, 4, 8, 16, WARP, 3 * WARP, MOST_THREADS):
        more = 2 * group if group < WARP else min(group + WARP, MOST_THREADS)
        name = "all threads, one step" if group == MOST_THREADS else f"{group} threads"
        dim = group * step * types.width
        plan, beyond = ("streaming", step, group), ("streaming", step, more)
        yield Edge(name, types, "H100", dim, plan, beyond)


EDGES = [edge for types in NATIVE for edge in edges_in_registers(types)]
# B200 has the shared memory of H100.
EDGES += [e for types in NATIVE for d in ("A100", "H100") for e in edges_beyond_registers(types, d)]
# One cast for each type that is computed in: the way of a cast is the same for all.
EDGES += [e for s in FLOATING for e in edges_of_streaming(Types("forward", torch.int32, s))]
EDGES += [
    edge
    for load in FLOATING
    for edge in edges_of_streaming(
        next(t for t in CASTS if (t.direction, t.load) == ("backward", load))
    )
]


WHICH = ("last", "last, unaligned", "one beyond", "one vector beyond")


@ops
@pytest.mark.parametrize(
    ("edge", "which"),
    [
        pytest.param(edge, which, id=f"{edge}, {which}")
        for edge, which in itertools.product(EDGES, WHICH)
        if edge.types.native or which in ("last", "one beyond")  # others have no vectors
    ],
)
def test_edge_of_a_plan(host: Host, edge: Edge, which: str, op: str) -> None:
    types, width = edge.types, edge.types.width
    dim = edge.dim + {"one beyond": 1, "one vector beyond": width}.get(which, 0)
    unaligned = which == "last, unaligned"
    offset = types.load.itemsize if unaligned else 0
    # As many as leave the last block, where blocks have several rows, with one.
    rows = 2 * (WARP // edge.plan[2]) + 1
    plan = run(host, types, op, (rows, dim, 1), device=edge.device, load_offset=offset)
    expected = edge.plan if dim == edge.dim else edge.beyond
    assert (plan.schedule, plan.vectors, plan.group) == expected
    assert plan.vectorized == (types.native and not unaligned and dim % width == 0)


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
    (4097, "H100"),     # the elements of 1024 vectors, and one
    (50257, "A100"),    # GPT-2's vocabulary: in shared memory on some devices, or not
    (50257, "H100"),
    (50257, "B200"),
    (50257, "RTX 5090"),
])  # fmt: skip
def test_dim(host: Host, dim: int, device: str, types: Types, op: str) -> None:
    plan = run(host, types, op, (3 if dim < 2**12 else 1, dim, 1), device=device)
    assert plan.schedule == types.schedule_of(dim, device)
    assert plan.vectorized == (dim % types.width == 0)


@all_types(SAME)
@pytest.mark.parametrize(
    ("dim", "op"), [(2**20 + 1, "softmax"), (2**20 + VECTOR_BYTES, "log_softmax")]
)
def test_dim_above_2_to_the_20(host: Host, dim: int, types: Types, op: str) -> None:
    plan = run(host, types, op, (1, dim, 1))
    assert (plan.schedule, plan.vectorized) == ("streaming", dim % types.width == 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fewer", [0, 1], ids=["fills the device", "a block less"])
def test_rows_of_a_block(host: Host, fewer: int, device: str, direction: str) -> None:
    """A block has several rows, of a warp each, if the device is full all the same."""
    types = Types(direction, torch.float64, torch.float64)
    sm_count, most = DEVICES[device].sm_count, LIMITS["ShortRowThreads"] // WARP
    rows = most * (sm_count - fewer)
    plan = run(host, types, "softmax", (rows, WARP * types.width, 1), device=device)
    items = most // (1 + fewer)
    assert (plan.schedule, plan.items, plan.group) == ("registers", items, WARP)
    assert plan.blocks == -(-rows // items)


# --- Columns: inner sizes above 1 ----------------------------------------------------------------


def strided_dims(types: Types, across: int) -> list[int]:
    """The last of each number of threads along dim that is told apart, and one beyond: one thread,
    two, a few, and all that a block has: with more, an item takes more than one step."""
    most = STRIDED_THREADS // across
    ends = [types.step_vectors * group for group in (1, 2, 8, most)]
    return [1, *itertools.chain.from_iterable((end, end + 1) for end in ends)]


@ops
@all_types(SAME)
@pytest.mark.parametrize("inner", [3, 32, 196])
@pytest.mark.parametrize("offset", [0, 8], ids=["", "unaligned"])
def test_inner(host: Host, offset: int, inner: int, types: Types, op: str) -> None:
    width = types.width
    vectorized = inner % width == 0 and offset == 0
    # Few blocks: as few threads side by side as have a sector of memory.
    access = VECTOR_BYTES if vectorized else types.load.itemsize
    columns = -(-inner // width)
    across = min(1 << (columns - 1).bit_length(), WARP, LIMITS["SectorBytes"] // access)
    for dim in strided_dims(types, across):
        plan = run(host, types, op, (2, dim, inner), load_offset=offset)
        group = min(
            1 << (-(-dim // types.step_vectors) - 1).bit_length(), STRIDED_THREADS // across
        )
        assert plan.schedule == "strided"
        assert (plan.vectorized, plan.vectors) == (vectorized, types.step_vectors)
        assert (plan.across, plan.group) == (across, group), dim


@ops
@all_types(NATIVE)
@pytest.mark.parametrize("dim", [1, 2, 3, 31, 32, 33, 127, 1000, 1021])
def test_dim_of_columns(host: Host, dim: int, types: Types, op: str) -> None:
    for inner in (3, types.width):
        plan = run(host, types, op, (3, dim, inner))
        assert (plan.schedule, plan.vectorized) == ("strided", inner == types.width)


@all_types(SAME)
@pytest.mark.parametrize(("columns", "across"), [
    (WARP, WARP),
    (WARP + WARP // 2, WARP // 2),  # half as many leave no thread without a column
])  # fmt: skip
@pytest.mark.parametrize("tail", [0, 1])
def test_a_warp_side_by_side(
    host: Host, tail: int, columns: int, across: int, types: Types
) -> None:
    """Where there are blocks enough; the last thread's vector is whole, or one column short."""
    outer = 2 * DEVICES["AGX Orin"].sm_count
    shape = (outer, types.step_vectors + 1, columns * types.width - tail)
    plan = run(host, types, "softmax", shape, device="AGX Orin")
    assert (plan.schedule, plan.vectorized, plan.across) == ("strided", tail == 0, across)
    assert plan.group == 2


# --- Casts ---------------------------------------------------------------------------------------


@ops
@all_types(CASTS)
def test_cast(host: Host, types: Types, op: str) -> None:
    """From any type to any floating one: a part of a warp, whole warps, several steps; columns."""
    steps = MOST_THREADS * types.step_vectors * types.width
    for dim in (1, 37, WARP * types.step_vectors * types.width + 1, steps + 1):
        plan = run(host, types, op, (2, dim, 1))
        assert (plan.schedule, plan.vectorized) == ("streaming", False)
    for inner in (3, types.width + 8):
        plan = run(host, types, op, (2, 37, inner))
        assert (plan.schedule, plan.vectorized) == ("strided", False)


@all_types([Types("forward", dtype, store) for dtype in INTEGERS for store in FLOATING])
def test_cast_of_the_least_and_the_largest_integer(host: Host, types: Types) -> None:
    if types.load == torch.bool:
        least, most = 0, 1
    else:
        least, most = torch.iinfo(types.load).min, torch.iinfo(types.load).max
    for pair in ((least, most), (most, most), (least, 0)):
        input = torch.tensor([pair], dtype=types.load)[:, :, None]
        run(host, types, "log_softmax", (1, 2, 1), input)


# --- Every way to share a row, in every circumstance ---------------------------------------------


@dataclasses.dataclass(frozen=True)
class Way:
    """How threads share a row."""

    name: str
    vectorized: bool

    def __str__(self) -> str:
        return f"{self.name}, {'vectors' if self.vectorized else 'elements'}"

    @property
    def schedule(self) -> str:
        return self.name.split(":")[0]

    def of(self, types: Types) -> tuple[int, int, str]:
        """dim, inner, device. The last vector of a row has a gap where there are no vectors."""
        width, small = types.width, "RTX 5090"
        if self.schedule == "strided":
            inner = 2 * width - (not self.vectorized)
            across = LIMITS["SectorBytes"] // VECTOR_BYTES
            groups = {"one step": 7, "two steps": STRIDED_THREADS // across + 1}
            return groups[self.name.split(": ")[1]] * types.step_vectors, inner, "H100"
        dim = {
            "registers: part of a warp": 4 * width,
            "registers: a warp": WARP * width,
            "registers: warps": 3 * WARP * types.register_vectors * width,
            "shared": types.most_in_registers + width,
            "streaming": types.most_in_shared(types.shared_for(small)) + width,
        }[self.name]
        return dim - (not self.vectorized), 1, small if self.schedule == "streaming" else "A100"

    def check(self, plan: Plan) -> None:
        assert (plan.schedule, plan.vectorized) == (self.schedule, self.vectorized)


WAYS = [
    Way(name, vectorized)
    for name in (
        "registers: part of a warp",
        "registers: a warp",
        "registers: warps",
        "shared",
        "streaming",
        "strided: one step",
        "strided: two steps",
    )
    for vectorized in (True, False)
]
ways = pytest.mark.parametrize("way", WAYS, ids=str)
vectorized_ways = pytest.mark.parametrize("way", [w for w in WAYS if w.vectorized], ids=str)


@ways
@ops
@all_types(SAME)
def test_blocks_that_take_several_rows(host: Host, types: Types, op: str, way: Way) -> None:
    """Where the grid is smaller than the rows ask for, two blocks at a time."""
    dim, inner, device = way.of(types)
    unlimited = host.plan(types.direction, (1, dim, inner), types.load, types.store, device=device)
    outer = 3 * unlimited.items + 1
    plan = run(host, types, op, (outer, dim, inner), device=device, most_blocks=2, resident=2)
    way.check(plan)
    assert plan.blocks == 2


@vectorized_ways
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_blocks_side_by_side(host: Host, direction: str, way: Way) -> None:
    """Shared memory is each block's own, and no block touches the rows of another."""
    types = Types(direction, torch.float32, torch.float32)
    dim, inner, device = way.of(types)
    unlimited = host.plan(types.direction, (1, dim, inner), types.load, types.store, device=device)
    shape = (4 * unlimited.items, dim, inner)
    plan = run(host, types, "softmax", shape, device=device, resident=3)
    way.check(plan)
    assert plan.blocks >= 4


@pytest.mark.parametrize("schedule", ["registers", "shared", "streaming", "strided"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_more_than_one_wave_of_blocks(host: Host, direction: str, schedule: str) -> None:
    """More blocks than the device has threads for at a time. float64 has the shortest rows."""
    load, store = torch.float64, torch.float64
    if schedule == "streaming":  # a cast: rows of any size
        store = torch.float32
    types = Types(direction, load, store)
    dim, inner = {
        "registers": (WARP * types.width, 1),
        "shared": (types.most_in_registers + types.width, 1),
        "streaming": (5, 1),
        "strided": (5, 3),
    }[schedule]
    device = "AGX Orin"
    many = host.plan(direction, (2**20, dim, inner), load, store, device=device)
    wave = 2048 // many.threads * DEVICES[device].sm_count
    shape = (wave * many.items + 1, dim, inner)
    plan = run(host, types, "softmax", shape, device=device)
    assert plan == dataclasses.replace(many, blocks=wave + 1)
    assert plan.schedule == schedule


@ways
@ops
@pytest.mark.parametrize(
    ("types", "in_place"),
    [(types, number) for types in SAME for number in range(types.inputs)],
    ids=str,
)
def test_in_place(host: Host, types: Types, in_place: int, op: str, way: Way) -> None:
    """Over the input; backward over the gradient that comes, or over the output."""
    dim, inner, device = way.of(types)
    way.check(run(host, types, op, (2, dim, inner), device=device, in_place=in_place))


@vectorized_ways
@ops
@pytest.mark.parametrize(
    ("types", "pointer"),
    [(types, pointer) for types in SAME for pointer in (*range(types.inputs), "result")],
    ids=str,
)
@pytest.mark.parametrize("by", ["an element", "half a vector"])
def test_unaligned(
    host: Host, by: str, types: Types, pointer: int | str, op: str, way: Way
) -> None:
    """One pointer that is not a multiple of 16 is enough to do without vectors."""
    offset = types.load.itemsize if by == "an element" else VECTOR_BYTES // 2
    dim, inner, device = way.of(types)
    plan = run(
        host,
        types,
        op,
        (2, dim, inner),
        device=device,
        load_offset=tuple(offset * (number == pointer) for number in range(types.inputs)),
        store_offset=offset * (pointer == "result"),
    )
    Way(way.name, vectorized=False).check(plan)


# --- Infinities and NaN --------------------------------------------------------------------------


TORCH_BACKWARD = {
    "softmax": torch.ops.aten._softmax_backward_data,
    "log_softmax": torch.ops.aten._log_softmax_backward_data,
}


def shape_of(rows: int, types: Types, way: Way) -> Shape:
    """The rows one after another or, in the strided schedule, side by side; there one more where
    they are not to be whole vectors."""
    assert rows % types.width == 0
    dim = way.of(types)[0]
    return (1, dim, rows + (not way.vectorized)) if way.schedule == "strided" else (rows, dim, 1)


def laid_out(rows: list[torch.Tensor], types: Types, way: Way) -> torch.Tensor:
    outer, dim, inner = shape_of(len(rows), types, way)
    x = torch.randn(outer * inner, dim)
    x[: len(rows)] = torch.stack(rows)
    return x.view(outer, inner, dim).movedim(2, 1)


@ways
@ops
@all_types(SAME)
def test_special_rows(host: Host, types: Types, op: str, way: Way) -> None:
    """Each is right, and NaN where torch has NaN: what one row holds does not leak into others."""
    dim, _, device = way.of(types)
    x = laid_out([make(torch.randn(dim)) for make in ROWS.values()], types, way)
    if types.direction == "forward":
        given = [x.to(types.load)]
        result = host.forward(op, given[0], 1, types.store, device=device)
    else:
        given = [torch.randn(x.shape).to(types.load), reference(op, x, 1).to(types.load)]
        result = host.backward(op, given[0], given[1], 1, types.store, device=device)
    way.check(result.plan)
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


@ways
@ops
@all_types(SAME)
def test_shares_of_minus_infinity(host: Host, types: Types, op: str, way: Way) -> None:
    """A share that is -inf throughout has no maximum to subtract: (-inf) - (-inf). That of a thread
    and that of a warp, and all but those."""
    shape = shape_of(16, types, way)
    dim, device = shape[1], way.of(types)[2]
    plan = host.plan(types.direction, shape, types.load, types.store, device=device)
    vectors_of_a_row = plan.vectorized and plan.schedule != "strided"
    thread = torch.arange(dim) // (plan.width if vectors_of_a_row else 1) % plan.group
    rows = []
    for of_a_unit in (1, WARP // plan.across):
        unit = thread // of_a_unit
        last = int(unit.max())
        for number in (0, 1, last // 2, last):
            rows += [torch.randn(dim).masked_fill(unit == number, -INF)]
            rows += [torch.randn(dim).masked_fill(unit != number, -INF)]
    x = laid_out(rows, types, way).to(types.load)
    assert run(host, types, op, shape, x, device=device) == plan
    way.check(plan)


@ops
@all_types(SAME)
@pytest.mark.parametrize("tail", [0, 1], ids=["vectors", "elements"])
def test_blocks_of_minus_infinity(host: Host, tail: int, types: Types, op: str) -> None:
    """All columns of a block of the strided schedule, and all but those."""
    outer, dim, inner = 4 * WARP, types.step_vectors + 1, 3 * types.width - tail
    plan = host.plan(types.direction, (outer, dim, inner), types.load, types.store)
    of_one = -(-inner // (plan.across * plan.width))
    column = torch.arange(inner) // (plan.across * plan.width)
    block = (torch.arange(outer)[:, None] * of_one + column) // plan.items
    assert block.max() > 1
    for mask in (block == 1, block != 1):
        x = torch.randn(outer, dim, inner).masked_fill(mask[:, None], -INF)
        assert run(host, types, op, (outer, dim, inner), x.to(types.load)) == plan
    assert (plan.schedule, plan.vectorized) == ("strided", tail == 0)


# --- Anything ------------------------------------------------------------------------------------


@st.composite
def any_case(draw: st.DrawFn) -> tuple[Types, str, Shape, dict[str, object]]:
    types = draw(st.sampled_from(ALL))
    sizes = st.integers(1, 9) | st.sampled_from([17, 31, 64, 130])
    shape = (draw(st.integers(1, 40)), draw(sizes), draw(st.just(1) | sizes))
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
    types, op, shape, how = case
    if host.lane == "tsan" and is_left_out_of_tsan(op, types):
        return
    plan = run(host, types, op, shape, **how)
    assert (plan.schedule == "strided") == (shape[2] > 1)


# --- Nothing, and what cannot be -----------------------------------------------------------------


@all_types(ALL)
def test_nothing_is_launched_for_an_empty_tensor(host: Host, types: Types) -> None:
    """A launch of no blocks would be one out of range."""
    for shape in [(0, 5, 1), (5, 0, 1), (0, 5, 3), (5, 0, 3), (5, 3, 0)]:
        for op in OPS:
            assert run(host, types, op, shape).blocks == 0


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


def test_every_kernel_that_a_plan_can_ask_for_has_run(host: Host, whole_module: bool) -> None:
    """For all types, with and without vectors. Of what plans can ask for, asking around every power
    of two leaves nothing out."""
    if not whole_module:
        pytest.skip("only a part of this module was selected")
    shapes = [(1, 2**k + more, 1) for k in range(21) for more in (0, 1)]
    shapes += [(1, 2**k, inner) for k in range(10) for inner in (3, VECTOR_BYTES)]
    wanted = set()
    for types, shape in itertools.product(ALL, shapes):
        plan = host.plan(types.direction, shape, types.load, types.store)
        read = (types.load, types.store, plan.schedule, plan.vectorized, plan.vectors)
        for op in OPS:
            if host.lane != "tsan" or not is_left_out_of_tsan(op, types):
                wanted.add(Instance(types.direction, op, *read))
    assert len({instance.schedule for instance in wanted}) == 4
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
    assert len(kernels) >= len(SAME) * len(OPS) * 4, "an instance of each schedule"
    assert [name for name, ran in kernels.items() if not ran] == []
    ran = [ran for lines in coverage.lines.values() for ran in lines.values()]
    assert len(ran) > 300
    assert sum(ran) >= 0.95 * len(ran)
