"""The block, cluster and grid schedules: the warps of one or more blocks share a row."""

import pytest
import torch
from host import Host
from kernel_cases import (
    BLOCK_CHUNKS,
    FLOAT64,
    LIMITS,
    MOST_WARPS,
    NEW,
    OLD,
    SAME,
    SMS,
    WARP,
    Edge,
    Types,
    all_types,
    assert_same_bits,
    check_edge,
    edges_of,
    launch,
    ops,
    run,
    sensitive_inputs,
)
from plans import DEVICES


@edges_of("block", "cluster", "grid")
def test_edge_of_a_plan(host: Host, edge: Edge, op: str) -> None:
    check_edge(host, edge, op)


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
