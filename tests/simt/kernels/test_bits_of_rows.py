"""The bits of a row: the same by every schedule, device, batch and alignment."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from host import Host, Instance
from kernel_cases import (
    BLOCK_CHUNKS,
    CLUSTER,
    FLOAT64,
    LIMITS,
    MOST_WARPS,
    NATIVE,
    NEW,
    OLD,
    ROW_SCHEDULES,
    SMS,
    VECTOR_BYTES,
    WARP,
    Types,
    all_types,
    assert_same_bits,
    launch,
    ops,
    sensitive_inputs,
    takes_no,
)
from pairwise import all_pairs
from plans import DEVICES
from special_rows import ROWS
from tolerances import assert_close_to_reference, assert_gradient_close, reference


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


Row = tuple[int, str, str, Place, object]  # dim, schedule, device, where it lies, the kernel


def sizes(types: Types) -> list[int]:
    """Of a row: around a vector, a vector of each lane, a chunk, some of them, and 32 chunks, whose
    states are one for each lane."""
    width, chunk = types.width, types.chunk
    of_vectors = [1, 3, width, width + 1]
    of_warps = [vectors * WARP * width + more for vectors in (1, 2, 4) for more in (-1, 0, 1)]
    of_chunks = [chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 5, CLUSTER * chunk + 1]
    of_blocks = [MOST_WARPS * chunk + 3, WARP * chunk, WARP * chunk + 1]
    return [*of_vectors, *of_warps, *of_chunks, *of_blocks]


def ways_of_rows(host: Host, types: Types, dims: list[int]) -> Iterator[Row]:
    for dim in dims:
        for schedule, device, place in places(types, dim):
            how = {"schedule": schedule, "device": device, **place.how(types)}
            shape = (place.outer, dim, place.inner)
            plan = host.plan(types.direction, shape, types.load, types.store, **how)
            if plan.blocks == 0:
                assert takes_no(schedule, device, types, dim), (dim, schedule, device, place)
            else:
                yield dim, schedule, device, place, Instance.of_plan(plan)


@ops
@all_types(NATIVE)
def test_bits_do_not_depend_on_how_a_row_is_run(host: Host, types: Types, op: str) -> None:
    """Whatever the schedule, the device, the batch and the alignment: the same. Of these, the
    sizes and the kernels every two together."""
    dims = sizes(types)
    ways = all_pairs(list(ways_of_rows(host, types, dims)))
    for dim in dims:
        same_bits(host, types, op, [way for way in ways if way[0] == dim])


def same_bits(host: Host, types: Types, op: str, ways: list[Row]) -> None:
    """Of rows of one size."""
    dim = ways[0][0]
    inputs = sensitive_inputs(types, op, 1, dim)
    results = {}
    for _, schedule, device, place, _ in ways:
        how = {"schedule": schedule, "device": device, **place.how(types)}
        given = [place.around(x.flatten()) for x in inputs]
        result = launch(host, types, op, given, orders=host.orders[:1], **how)
        assert result.plan.schedule == schedule
        name = f"{schedule}, {device}, {place}, of {dim}"
        results[name] = result.tensor[place.row[0], :, place.row[1]]
    assert_same_bits(results)
    expected = {schedule for schedule in ROW_SCHEDULES if not takes_no(schedule, NEW, types, dim)}
    assert {schedule for _, schedule, *_ in ways} == expected
    one = next(iter(results.values())).view(1, dim, 1)
    if types.direction == "forward":
        assert_close_to_reference(one, op, inputs[0], 1, types.store)
    else:
        assert_gradient_close(one, op, *inputs, 1)


@ops
@all_types(FLOAT64)
@pytest.mark.parametrize("chunks", [3 * WARP, CLUSTER * MOST_WARPS + 1, BLOCK_CHUNKS + 1])
def test_bits_of_long_rows(host: Host, chunks: int, types: Types, op: str) -> None:
    """Several chunks a lane; several a warp of a cluster; more than but the grid takes.
    float64 has the shortest chunks."""
    same_bits(host, types, op, list(ways_of_rows(host, types, [chunks * types.chunk - 1])))


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
            if takes_no(schedule, NEW, types, dim):
                continue
            how = {"schedule": schedule, "device": NEW, "orders": host.orders[:1]}
            rows = launch(host, types, op, given, **how)
            results[f"{schedule}, {chunks} chunks"] = rows.tensor
        assert_same_bits(results)
