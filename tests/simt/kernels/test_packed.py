"""The packed schedule: slabs of short rows, and of columns."""

import pytest
import torch
from host import Host
from kernel_cases import (
    LIMITS,
    NATIVE,
    OLD,
    SMS,
    VECTOR_BYTES,
    Edge,
    Types,
    all_types,
    ceil_div,
    check_edge,
    edges_of,
    ops,
    run,
)


@edges_of("packed")
def test_edge_of_a_plan(host: Host, edge: Edge, op: str) -> None:
    check_edge(host, edge, op)


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
        assert alone or inner > 1 or plan.vectors == 1


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
