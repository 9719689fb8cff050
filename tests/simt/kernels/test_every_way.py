"""Every way to share a row, in every circumstance: several rows a block, in place, unaligned."""

import pytest
import torch
from host import Host
from kernel_cases import (
    DIRECTIONS,
    FEWER_TYPES,
    FEWER_WHOLE,
    NEW,
    ROWS_OF_A_FEW,
    SAME,
    SCHEDULES,
    SMS,
    VECTOR_BYTES,
    WARP,
    WHOLE,
    Types,
    Way,
    all_ways,
    ceil_div,
    every_pair,
    run,
)

from softmax_ext._C import Plan


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
    way.check(run(host, types, op, shape, **how), types, offset)
    if pointer == 0 and dim <= 3 * types.chunk:
        plan = run(host, types, op, shape, **how, in_place=0)
        way.check(plan, types, offset)
