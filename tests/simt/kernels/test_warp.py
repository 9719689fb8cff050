"""The warp schedule: a warp, or a part of one, has a row."""

import pytest
import torch
from host import Host
from kernel_cases import (
    DIRECTIONS,
    LIMITS,
    NATIVE,
    NEW,
    SMS,
    WARP,
    Edge,
    Types,
    all_types,
    ceil_div,
    check_edge,
    edges_of,
    ops,
    run,
)
from plans import DEVICES


@edges_of("warp")
def test_edge_of_a_plan(host: Host, edge: Edge, op: str) -> None:
    check_edge(host, edge, op)


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
