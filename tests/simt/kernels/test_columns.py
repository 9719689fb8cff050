"""The columns schedule, and the bits of columns in it and in slabs."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from host import Host, Instance
from kernel_cases import (
    CLUSTER,
    COLUMN_SCHEDULES,
    LIMITS,
    NATIVE,
    OLD,
    SAME,
    WARP,
    Types,
    all_types,
    assert_same_bits,
    columns_of,
    launch,
    ops,
    parts_of,
    run,
    sensitive_inputs,
    steps_of,
)
from lanes import SANITIZERS
from pairwise import all_pairs
from plans import DEVICES
from special_rows import INF, ROWS
from tolerances import assert_close_to_reference, assert_gradient_close, reference

# Around what a thread has alone; two parts, a last one that is shorter, and ones without a step; as
# many as packed slabs have; the most, and longer ones.
DIMS = [1, 2, 31, 32, 33, 64, 65, 97, 512, 513, 1000, 1024, 1025, 4097, 8192, 8193, 20000]


# Dim, schedule, device, inner size, elements off, the kernel.
Column = tuple[int, str, str, int, int, object]


def ways_of_columns(host: Host, types: Types, dims: list[int]) -> Iterator[Column]:
    """All that there are; of long columns only those beside few others."""
    inners = {2, 3, max(2, types.width // 2), types.width, 2 * types.width, 33}
    for dim, schedule, inner in itertools.product(dims, COLUMN_SCHEDULES, sorted(inners)):
        for device in ("H100", "A100") if dim < 4000 else ("H100", OLD):
            if dim > 4000 and inner > types.width:
                continue
            for offset in (0, 1) if inner <= types.width else (0,):
                how = {"schedule": schedule, "device": device}
                how["load_offset"] = offset * types.load.itemsize
                shape = (2, dim, inner)
                plan = host.plan(types.direction, shape, types.load, types.store, **how)
                if plan.blocks > 0:
                    yield dim, schedule, device, inner, offset, Instance.of_plan(plan)


@ops
@all_types(NATIVE)
def test_bits_of_a_column_depend_on_dim_alone(host: Host, types: Types, op: str) -> None:
    """Not on the inner size, on the schedule and the device, on how many blocks share it, on what
    lies beside it, nor on alignment: of these and the kernels every two together."""
    # Of long columns test_long_columns is enough under sanitizers.
    dims = DIMS if host.lane not in SANITIZERS else DIMS[: DIMS.index(1025)]
    ways = all_pairs(list(ways_of_columns(host, types, dims)))
    for dim in dims:
        packed = parts_of(dim) <= LIMITS["PackedParts"] * WARP
        assert {schedule for of, schedule, *_ in ways if of == dim} == (
            {"packed", "columns"} if packed else {"columns"}
        )
        given = [torch.cat([x, x.flip(0)], 2) for x in sensitive_inputs(types, op, 2, dim)]
        results = {}
        for _, schedule, device, inner, offset, _ in (way for way in ways if way[0] == dim):
            wide = [torch.randn(2, dim, inner).to(types.load) for _ in given]
            for x, y in zip(wide, given, strict=True):
                x[:, :, -2:] = y
            bytes = offset * types.load.itemsize
            how = {"schedule": schedule, "device": device, "load_offset": bytes}
            result = launch(host, types, op, wide, orders=host.orders[-1:], **how)
            assert result.plan.schedule == schedule
            name = f"{schedule}, {device}, {inner} columns, offset {offset}, of {dim}"
            results[name] = result.tensor[:, :, -2:]
        assert_same_bits(results)
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
    columns = columns_of(types, inner, offset)
    # Of long columns test_long_columns is enough under sanitizers.
    long = () if host.lane in SANITIZERS else (1000, 6000) if inner in (3, 32) else (1000,)
    for dim in (1, 2, 3, 32, 33, 100, 257, *long):
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
    outer = 1 if dim > 300 and host.lane in SANITIZERS else 3  # as many clusters take long
    orders = host.orders if dim < 300 else host.orders[-1:]
    for inner in (3, 2 * types.width, 50):
        plan = run(host, types, op, (outer, dim, inner), orders=orders)
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


@ops
@all_types(SAME)
@pytest.mark.parametrize("tail", [0, 1], ids=["vectors", "single"])
def test_tiles_of_minus_infinity(host: Host, tail: int, types: Types, op: str) -> None:
    """All columns of a block of the columns schedule, and all but those."""
    dim, inner = 64 * types.width + 1, 9 * types.width - tail
    shape = (2, dim, inner)
    how = {"schedule": "columns"}
    plan = host.plan(types.direction, shape, types.load, types.store, **how)
    tile = torch.arange(inner) // (plan.across * plan.columns)
    assert tile.max() > 0 and plan.columns == columns_of(types, inner)
    block = torch.arange(2)[:, None] * (int(tile.max()) + 1) + tile
    for mask in (block == 1, block != 1):
        x = torch.randn(shape).masked_fill(mask[:, None], -INF)
        assert run(host, types, op, shape, x.to(types.load), **how) == plan
