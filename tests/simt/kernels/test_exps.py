"""How often the kernels take exp in float64, which costs more than to hold a row."""

import pytest
import torch
from host import Host
from kernel_cases import CLUSTER_WARPS, NEW, SMS, WARP, Types, Way, ops, values
from tolerances import assert_close_to_reference

TYPES = Types("forward", torch.float64, torch.float64)
CHUNK = TYPES.chunk
LANES = WARP * TYPES.width  # elements of a vector a lane
LONG = {name: Way(name) for name in ("block: shared", "block: none", "cluster: shared")}
LONG |= {name: Way(name) for name in ("grid: shared", "grid: none")}


# Rows that fill the vectors of as many threads as share them, and the threads of each block.
@ops
@pytest.mark.parametrize(("name", "kernel", "rows", "dim", "device"), [
    ("packed: registers", "packed", 64, LANES, NEW),
    ("warp: short", "short", 16, 2 * LANES, NEW),
    ("warp: registers", "registers", 16, CHUNK, NEW),
    ("block: registers", "registers", 3, 3 * CHUNK, NEW),
    ("cluster: registers", "registers", SMS, 2 * CLUSTER_WARPS * CHUNK, NEW),
    ("grid: registers", "registers", 1, 2 * SMS * CHUNK, NEW),
    *((name, "long", SMS, way.dim(TYPES), way.device) for name, way in LONG.items()),
])  # fmt: skip
def test_exp_is_taken_once_of_an_element(
    host: Host, name: str, kernel: str, rows: int, dim: int, device: str, op: str
) -> None:
    """And once more where the result is made of exp, of what is not held until it is written: all
    but a chunk of each warp."""
    schedule, hold = name.split(": ")
    x = values((rows, dim, 1), torch.float64)
    result = host.forward(op, x, 1, schedule=schedule, device=device, orders=host.orders[:1])
    assert_close_to_reference(result.tensor, op, x, 1, torch.float64)
    assert (result.plan.schedule, result.plan.kernel) == (schedule, kernel)
    assert name not in LONG or result.plan.hold == hold
    warps = result.plan.team * result.plan.group // WARP
    again = dim - warps * CHUNK if (hold, op) == ("none", "softmax") else 0
    assert result.exps == rows * (dim + again)
