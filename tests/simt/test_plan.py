"""The choice of CUDA schedule and launch (plan.h), for any device, without a GPU."""

import ast
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plans import DEVICES

from softmax_ext import _C
from softmax_ext._C import LIMITS, SCHEDULES, Plan

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)
# What has kernels, of a forward: (load, store). A backward has the reverse.
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(FLOAT16, FLOAT32), (BFLOAT16, FLOAT32)]
KIB = 1024
VECTOR, WARP = LIMITS["VectorBytes"], LIMITS["Warp"]

Shape = tuple[int, int, int]  # outer, dim, inner


def make_plan(
    shape: Shape,
    load: torch.dtype = FLOAT32,
    store: torch.dtype | None = None,
    *,
    backward: bool = False,
    aligned: bool = True,
    device: str = "H100",
    schedule: str | None = None,
) -> Plan | None:
    """Of what is read as `load` and written as `store`; None where nothing is to be launched, or
    where the schedule cannot."""
    inputs, properties = 1 + backward, DEVICES[device]
    known = (properties.sm_count, properties.shared_bytes, properties.compute_capability)
    return _C.plan(*shape, load, store or load, inputs, aligned, *known, schedule)


def schedule_of(shape: Shape, *arguments: torch.dtype, **how: object) -> str:
    plan = make_plan(shape, *arguments, **how)  # type: ignore[arg-type]
    assert plan is not None
    return plan.schedule


def chunk(dtype: torch.dtype) -> int:
    """Elements of a row that a warp has in registers: 4 KB, and 2 KB in float64."""
    vectors = LIMITS["ChunkVectorsFloat64" if dtype == FLOAT64 else "ChunkVectors"]
    return WARP * vectors * VECTOR // dtype.itemsize


backward_too = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_devices = pytest.mark.parametrize("device", DEVICES)
with_clusters = [name for name, device in DEVICES.items() if device.compute_capability >= 90]
without_clusters = [name for name in DEVICES if name not in with_clusters]


# --- Which schedule ------------------------------------------------------------------------------


@backward_too
@all_dtypes
@all_devices
def test_rows_of_a_chunk_take_a_warp(device: str, dtype: torch.dtype, backward: bool) -> None:
    """However many; but short ones whose vectors are not whole go through shared memory."""
    width = VECTOR // dtype.itemsize
    for rows in (1, 7, 4096, 2**33):
        for dim, expected in [
            (1, "packed"),
            (width - 1, "packed"),
            (width, "warp"),
            (width + 1, "packed"),
            (WARP * width - 1, "packed"),
            (WARP * width, "warp"),
            (WARP * width + 1, "warp"),
            (chunk(dtype) - 1, "warp"),
            (chunk(dtype), "warp"),
        ]:
            assert schedule_of((rows, dim, 1), dtype, backward=backward, device=device) == expected
            if expected == "warp" and dim <= WARP * width:
                how = {"backward": backward, "device": device, "aligned": False}
                assert schedule_of((rows, dim, 1), dtype, **how) == "packed"
        beyond = schedule_of((rows, chunk(dtype) + 1, 1), dtype, backward=backward, device=device)
        assert beyond == "block"


@backward_too
@all_dtypes
@pytest.mark.parametrize("device", with_clusters)
def test_longer_rows_on_a_device_with_clusters(
    device: str, dtype: torch.dtype, backward: bool
) -> None:
    sm_count, of = DEVICES[device].sm_count, chunk(dtype)
    few = sm_count // 16  # that leave each row all the blocks of two clusters
    for rows, dim, expected in [
        (1, 3 * of, "block"),            # nothing to share out
        (1, 3 * of + 1, "cluster"),
        (sm_count - 1, 3 * of + 1, "cluster"),
        (sm_count, 3 * of + 1, "block"),  # the rows fill the device
        (sm_count, 8 * of, "block"),      # a block of 8 warps
        (sm_count, 8 * of + 1, "cluster"),
        (1, 8 * of + 1, "cluster"),
        (1, 128 * of, "cluster"),         # the registers of a cluster
        (2**33, 128 * of, "cluster"),
        (few, 128 * of + 1, "grid"),
        (few + 1, 1024 * of + 1, "grid"),  # whose states a block cannot keep
        (2**33, 1024 * of + 1, "grid"),
    ]:  # fmt: skip
        if rows > 0:
            shape = (rows, dim, 1)
            actual = schedule_of(shape, dtype, backward=backward, device=device)
            assert actual == expected, shape


@backward_too
@all_dtypes
@pytest.mark.parametrize("device", without_clusters)
def test_longer_rows_on_a_device_without_clusters(
    device: str, dtype: torch.dtype, backward: bool
) -> None:
    few, of = DEVICES[device].sm_count // 2, chunk(dtype)  # that leave each row two blocks
    for rows, dim, expected in [
        (1, 8 * of, "block"),
        (1, 8 * of + 1, "grid"),
        (few, 8 * of + 1, "grid"),
        (few + 1, 8 * of + 1, "block"),
        (few + 1, 16 * of, "block"),      # the registers of a block
        (few + 1, 1024 * of + 1, "grid"),  # whose states a block cannot keep
        (2**33, 1024 * of + 1, "grid"),
    ]:  # fmt: skip
        shape = (rows, dim, 1)
        actual = schedule_of(shape, dtype, backward=backward, device=device)
        assert actual == expected, shape


@backward_too
@all_dtypes
@all_devices
def test_long_rows_are_read_once_where_a_schedule_can(
    device: str, dtype: torch.dtype, backward: bool
) -> None:
    """By a cluster, or a block, that holds them; or by the grid."""
    has_clusters = DEVICES[device].compute_capability >= 90
    shared = "cluster" if has_clusters else "block"
    for rows, chunks in itertools.product((1, 2, 200, 2**33), (17, 40, 129, 200, 513, 1024, 5000)):
        shape = (rows, chunks * chunk(dtype), 1)
        how = {"backward": backward, "device": device}
        plan = make_plan(shape, dtype, **how)
        others = {name: make_plan(shape, dtype, schedule=name, **how) for name in (shared, "grid")}
        assert plan is not None and others[plan.schedule] == plan
        if plan.hold == "none":
            assert all(other.hold == "none" for other in others.values() if other)
        if rows == 2**33 and others[shared] and others[shared].hold != "none":
            assert plan.schedule == shared  # which need not meet in device memory


@all_devices
@all_dtypes
@backward_too
def test_columns_are_packed_where_they_are_narrow_or_few(
    dtype: torch.dtype, device: str, backward: bool
) -> None:
    """Less than 32 bytes side by side, or a slab of 8 KB; 1024 steps at most."""
    how = {"device": device, "backward": backward}
    sector, slab = 32 // dtype.itemsize, 8 * KIB // dtype.itemsize
    assert schedule_of((1000, 500 // dtype.itemsize, sector - 1), dtype, **how) == "packed"
    for inner in (2 * sector, 4 * sector, slab // 2):
        assert schedule_of((1000, slab // inner, inner), dtype, **how) == "packed"
        assert schedule_of((1000, slab // inner + 1, inner), dtype, **how) == "columns"
    assert schedule_of((1000, 1024, 2), dtype, **how) == "packed"
    assert schedule_of((1000, 1025, 2), dtype, **how) == "columns"
    # Where it does not fit shared memory: a forward of almost a sector of 1024 steps.
    widest = sector - 1
    most = (DEVICES[device].shared_bytes - KIB) // ((2 + backward) * widest * dtype.itemsize)
    plan = make_plan((1000, min(most + 1, 1024), widest), dtype, **how)
    assert plan and plan.schedule == ("columns" if most < 1024 else "packed")


def test_what_a_schedule_cannot_take() -> None:
    of = chunk(FLOAT32)
    for shape, can in [
        ((3, 128, 1), {"packed", "warp", "block", "grid"}),  # a vector of each lane
        ((3, 129, 1), {"warp", "block", "grid"}),
        ((3, of, 1), {"warp", "block", "grid"}),
        ((3, of + 1, 1), {"block", "cluster", "grid"}),
        ((3, 1024 * of, 1), {"block", "cluster", "grid"}),
        ((3, 1024 * of + 1, 1), {"grid"}),
        ((3, of, 2), {"packed", "columns"}),
        ((3, of, 1000), {"columns"}),
        ((3, of + 1, 2), {"columns"}),
    ]:
        for device in ("A100", "H100"):
            plans = {name: make_plan(shape, schedule=name, device=device) for name in SCHEDULES}
            assert all(plan.schedule == name for name, plan in plans.items() if plan)
            actual = {name for name, plan in plans.items() if plan}
            assert actual == (can if device == "H100" else can - {"cluster"})
    with pytest.raises(TypeError):
        make_plan((3, 5, 1), schedule="no such schedule")


# --- Within the limits ---------------------------------------------------------------------------


ROWS = [1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 256, 257, 1000, 1023, 1024, 1025, 2048, 2049, 4097, 8193]
ROWS += [16384, 16385, 50257, 2**17 + 1, 2**20, 2**20 + 1, 2**21 + 1, 2**22, 2**31, 2**33 + 1]


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
@all_devices
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@backward_too
def test_launches_are_within_the_limits(
    backward: bool, pair: tuple[torch.dtype, torch.dtype], device: str, schedule: str | None
) -> None:
    load, store = reversed(pair) if backward else pair
    how = {"backward": backward, "device": device, "schedule": schedule}
    for dim, rows, inner in itertools.product(ROWS, (1, 5, 64, 2**20), (1, 2, 7, 16, 1000)):
        shape = (rows, dim, inner)
        for aligned in (True, False):
            plan = make_plan(shape, load, store, aligned=aligned, **how)  # type: ignore[arg-type]
            if plan is None:
                assert schedule is not None
                continue
            check_limits(plan, shape, load, device, aligned)
            check_holding(plan, dim, load, backward)


def check_limits(plan: Plan, shape: Shape, load: torch.dtype, device: str, aligned: bool) -> None:
    outer, dim, inner = shape
    width = VECTOR // load.itemsize
    assert plan.width == width
    # The launch bounds of the kernels; those of a warp's rows are of 128 threads, as they are.
    most = LIMITS["ShortRowThreads"] if plan.schedule == "warp" else LIMITS["MostWarps"] * WARP
    assert plan.threads % WARP == 0 and plan.threads <= most
    assert 0 <= plan.shared_bytes <= DEVICES[device].shared_bytes
    assert 1 <= plan.blocks <= LIMITS["MaxBlocks"] and plan.blocks % plan.team == 0
    # Vector accesses need whole vectors of aligned tensors.
    if plan.schedule == "columns":
        whole = plan.columns > 1
        assert not whole or (aligned and inner % plan.columns == 0)
    else:
        whole = aligned and dim % width == 0 and plan.schedule != "packed"
    assert plan.vectorized == whole
    if plan.schedule == "cluster":
        assert 2 <= plan.team <= LIMITS["ClusterBlocks"]
    elif plan.schedule == "grid":
        # All blocks are to run at once, one on an SM.
        assert plan.blocks <= DEVICES[device].sm_count
    elif plan.schedule == "columns":
        large = 90 <= DEVICES[device].compute_capability < 110
        assert plan.team <= LIMITS["LargeClusterBlocks" if large else "ClusterBlocks"]
    else:
        assert plan.team == 1
    if plan.team > 1 and plan.schedule != "grid":
        assert DEVICES[device].compute_capability >= 90
    assert plan.columns == 1 or plan.schedule == "columns"
    assert plan.across == 1 or plan.schedule in ("columns", "packed")
    assert plan.schedule in ("warp", "packed") or plan.items == 1
    # None is without a row, and no row without one.
    teams = plan.blocks // plan.team
    if plan.schedule == "columns":
        tile = plan.across * plan.columns
        assert teams == min(outer * -(-inner // tile), LIMITS["MaxBlocks"] // plan.team)
    elif plan.schedule == "packed":
        assert plan.items % inner == 0
        assert teams == min(-(-outer // (plan.items // inner)), LIMITS["MaxBlocks"])
    elif plan.schedule == "grid":
        assert 1 <= teams <= min(outer, DEVICES[device].sm_count)
    else:
        assert teams == min(-(-outer // plan.items), LIMITS["MaxBlocks"] // plan.team)


def check_holding(plan: Plan, dim: int, load: torch.dtype, backward: bool) -> None:
    """A row fits what its threads hold, and the states of its chunks where they meet."""
    of, number = chunk(load), max(4, load.itemsize)
    inputs, chunks = 1 + backward, -(-dim // of)
    two = not backward and not (load == torch.float64 and plan.schedule != "columns")
    state = 2 * number if two else number  # of a row in float64 the max, then the sum
    if plan.schedule == "packed" and plan.vectors == 0:
        assert dim <= LIMITS["PackedParts"] * WARP * LIMITS["PartSteps"] and plan.hold == "shared"
        assert plan.shared_bytes >= plan.items * dim * load.itemsize * inputs
    elif plan.schedule == "packed":
        assert chunks == 1
        assert plan.hold == "shared" or (plan.hold == "registers" and plan.group == 1)
        assert plan.shared_bytes >= plan.items * dim * load.itemsize * inputs
        assert plan.group * plan.vectors * plan.width >= dim
    elif plan.schedule == "warp":
        assert plan.hold == "registers" and plan.group * plan.vectors * plan.width >= dim
        assert WARP % plan.group == 0
    elif plan.schedule == "columns":
        short = 2 ** (-(-dim // LIMITS["PartSteps"]) - 1).bit_length()
        parts = min(LIMITS["MostParts"], max(2, short)) if dim > LIMITS["AloneSteps"] else 1
        assert plan.vectors == -(-dim // parts)
        assert parts % (plan.team * plan.group) == 0
        tile = plan.across * plan.columns
        states = (parts // plan.team + plan.team * (plan.team > 1)) * tile * state
        elements = parts // plan.team * plan.vectors * tile * load.itemsize * inputs
        assert plan.hold in ("shared", "none")
        assert plan.shared_bytes >= states + (elements if plan.hold == "shared" else 0)
    else:
        warps = plan.team * plan.group // WARP
        each = -(-chunks // warps)
        assert (plan.hold == "registers") == (each == 1)
        kept = (each - 1) * plan.group * plan.vectors * VECTOR * inputs
        assert plan.vectors * WARP * plan.width == of
        assert plan.hold != "shared" or plan.shared_bytes >= kept
        teams = plan.blocks // plan.team
        states = plan.scratch_bytes // teams if plan.schedule == "grid" else plan.shared_bytes
        assert states >= 2 * chunks * state  # of this row and the next
    assert plan.scratch_bytes == 0 or plan.schedule == "grid"


@pytest.mark.parametrize(("rows", "dim", "load", "expected"), [
    (4096, 8, FLOAT16, (1, 2)),      # one vector
    (4096, 64, FLOAT16, (4, 2)),     # several rows a warp
    (4096, 256, FLOAT16, (16, 2)),
    (4096, 264, FLOAT16, (32, 2)),
    (2**20, 32, FLOAT16, (2, 2)),
    (2**20, 64, FLOAT16, (4, 2)),    # two sectors at a time
    (2**20, 128, FLOAT16, (4, 4)),   # rows that fill the device
    (2**20, 256, FLOAT16, (4, 8)),
    (2**20, 512, FLOAT16, (8, 8)),
    (2**20, 1024, FLOAT16, (32, 4)),  # more vectors than few lanes can add as a warp does
    (2**20, 128, FLOAT64, (16, 4)),
    (4096, 2048, FLOAT16, (32, 8)),  # a warp, all the vectors that a thread can hold
    (4096, 1024, FLOAT32, (32, 8)),
    (4096, 128, FLOAT64, (32, 2)),
    (4096, 256, FLOAT64, (32, 4)),
    (4096, 257, FLOAT32, (32, 4)),   # not whole: by all lanes, which shift them
])  # fmt: skip
def test_threads_and_vectors_of_a_row(
    rows: int, dim: int, load: torch.dtype, expected: tuple[int, int]
) -> None:
    plan = make_plan((rows, dim, 1), load)
    assert plan and (plan.schedule, plan.group, plan.vectors) == ("warp", *expected)


def test_short_rows_share_a_block_where_the_device_is_full_all_the_same() -> None:
    for rows, items in [(1, 1), (132 * 4 - 3, 4), (132 * 4 - 4, 2), (131, 1), (132, 1)]:
        plan = make_plan((rows, 1024, 1))
        assert plan and (plan.schedule, plan.items) == ("warp", items)


@backward_too
def test_the_blocks_of_a_cluster(backward: bool) -> None:
    """As many as there can be for few rows; of four warps each; or of as many as leave the fewest
    of those that an SM has room for (24, backward 16) without a chunk."""
    for rows, chunks, forward_team, backward_team in [
        (16, 16, 8, 8), (17, 16, 4, 4), (1, 4, 4, 4), (1, 8, 8, 8), (1, 128, 8, 8),
        (132, 16, 4, 4), (132, 17, 5, 5), (132, 32, 8, 8),
        (132, 48, 8, 6), (132, 50, 7, 7), (132, 64, 8, 8), (132, 75, 7, 5),
    ]:  # fmt: skip
        shape = (rows, chunks * 1024, 1)
        plan = make_plan(shape, schedule="cluster", backward=backward)
        team = backward_team if backward else forward_team
        assert plan and (plan.hold, plan.team) == ("registers", team), (rows, chunks)
        assert plan.group == WARP * -(-chunks // team)


@backward_too
def test_a_cluster_holds_in_shared_memory_what_few_of_its_blocks_would_fit_an_sm_with(
    backward: bool,
) -> None:
    """Of 13 warps forward, of 17 backward; then a warp has 4 chunks, backward 2."""
    for chunks, forward, of_backward in [
        (96, ("registers", 8, 12), ("registers", 6, 16)),
        (97, ("shared", 8, 4), ("registers", 7, 14)),
        (128, ("shared", 8, 4), ("registers", 8, 16)),
        (129, ("shared", 8, 5), ("shared", 8, 9)),
        (192, ("shared", 8, 6), ("shared", 8, 12)),
        (193, ("shared", 8, 7), ("shared", 8, 7)),  # 4 chunks a warp
        (1024, ("none", 8, 12), ("none", 8, 12)),
    ]:
        plan = make_plan((1000, chunks * 1024, 1), schedule="cluster", backward=backward)
        expected = of_backward if backward else forward
        assert plan and (plan.hold, plan.team, plan.group // WARP) == expected, chunks


def test_a_grid_shares_the_device_among_the_rows() -> None:
    """Each of many has as many blocks as hold it: 60 chunks each, in 12 warps."""
    for rows, chunks, teams, team in [
        (1, 1000, 1, 132), (1, 100, 1, 100), (2, 1000, 2, 66), (3, 1000, 3, 44), (5, 1000, 5, 26),
        (66, 9, 66, 2), (67, 9, 67, 1), (1000, 9, 132, 1), (1000, 60, 132, 1), (1000, 61, 66, 2),
        (1000, 1000, 7, 18), (1000, 66 * 60, 2, 66), (1000, 66 * 60 + 1, 1, 132),
    ]:  # fmt: skip
        plan = make_plan((rows, chunks * 1024, 1), schedule="grid")
        assert plan and (plan.team, plan.blocks) == (team, teams * team), (rows, chunks)
        assert plan.hold == ("registers" if chunks <= 16 * team else "shared")


def test_small_inner_sizes_leave_neighbouring_threads_on_neighbouring_memory() -> None:
    for inner in (2, 3, 4):
        plan = make_plan((1000, 5000, inner))
        assert plan and plan.schedule == "columns"
        assert plan.across * plan.columns < 2 * inner and plan.group >= 32


@all_dtypes
@backward_too
@pytest.mark.parametrize(("shape", "bytes", "team"), [
    ((64, 512, 1024), 128, 2),
    ((32, 1000, 200), 128, 4),
    ((1, 4096, 4096), 64, 8),   # of 128 bytes, 8 blocks would be too large
    ((1, 8192, 8192), 64, 16),
])  # fmt: skip
def test_an_sm_has_several_blocks_of_columns(
    shape: Shape, bytes: int, team: int, dtype: torch.dtype, backward: bool
) -> None:
    """Some load or store while others compute. The smallest cluster that holds a wide tile so."""
    plan = make_plan(shape, dtype, backward=backward)
    assert plan and plan.hold == "shared"
    assert 3 * (plan.shared_bytes + KIB) <= 228 * KIB
    assert (plan.across * plan.columns * dtype.itemsize, plan.team) == (bytes, team)
    assert plan.threads >= 128


def test_narrow_accesses_make_a_narrower_tile() -> None:
    """16-bit types by 8 bytes: 64 bytes are 8 threads side by side."""
    plan = make_plan((32, 1000, 196), BFLOAT16)
    assert plan and (plan.columns, plan.across, plan.team) == (4, 8, 4)


@all_dtypes
@backward_too
def test_short_columns_are_side_by_side(dtype: torch.dtype, backward: bool) -> None:
    """No thread shares one, and several blocks fit an SM."""
    plan = make_plan((8, 19, 512 * 512), dtype, backward=backward)
    assert plan and plan.hold == "shared" and plan.group == plan.team == 1
    assert plan.threads >= 64 and 3 * (plan.shared_bytes + KIB) <= 228 * KIB


@all_dtypes
@backward_too
def test_columns_that_no_cluster_holds_are_read_again(dtype: torch.dtype, backward: bool) -> None:
    """By wide tiles."""
    plan = make_plan((1, 200000, 4096), dtype, backward=backward)
    assert plan and (plan.hold, plan.team) == ("none", 16)
    assert plan.across * plan.columns * dtype.itemsize == 128


# --- Sizes of 64 bits, and none ------------------------------------------------------------------


def test_block_counts_are_64_bit_and_clamped_to_the_grid() -> None:
    for shape, blocks in [
        ((2**31 - 1, 2048, 1), 2**31 - 1),
        ((2**31, 2048, 1), 2**31 - 1),
        ((2**33, 1024, 1), 2**31 - 1),     # 4 rows a block
        ((2**32, 1024, 1), 2**30),
        ((2**33, 4, 1), 2**33 // 128),     # as many rows as threads
        ((2**40, 3, 3), 2**31 - 1),        # slabs
        ((2**33, 9 * 1024, 1), 2**31 - 2),  # clusters of 3
        ((2**40, 64, 1024), 2**31 - 1),
    ]:  # fmt: skip
        plan = make_plan(shape)
        assert plan and plan.blocks == blocks, shape


@backward_too
@all_devices
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [
    (1, 2**31, 1), (1, 2**33 + 1, 1), (2**31, 3, 1), (2**33, 1, 1), (2**20, 2**21 + 1, 1),
    (1, 2, 2**33), (1, 3, 2**33 + 1), (2, 2**31, 16), (2**31, 2, 2), (2**20, 2**12 + 1, 2**10),
])  # fmt: skip
def test_sizes_beyond_32_bits(
    shape: Shape, pair: tuple[torch.dtype, torch.dtype], device: str, backward: bool
) -> None:
    load, store = reversed(pair) if backward else pair
    plan = make_plan(shape, load, store, backward=backward, device=device)
    assert plan is not None
    check_limits(plan, shape, load, device, aligned=True)
    check_holding(plan, shape[1], load, backward)


@pytest.mark.parametrize("shape", [(0, 5, 1), (5, 0, 1), (0, 5, 3), (5, 0, 3), (5, 3, 0)])
def test_nothing_is_launched_for_an_empty_tensor(shape: Shape) -> None:
    for schedule in (None, *SCHEDULES):
        assert make_plan(shape, schedule=schedule) is None


# --- In Python -----------------------------------------------------------------------------------


def test_a_plan_is_its_members() -> None:
    plan = make_plan((4096, 1024, 1))
    assert plan is not None
    members = plan.members()
    assert members == {name: getattr(plan, name) for name in members}
    assert plan == Plan(**members) != Plan(**members | {"blocks": 7})
    assert (
        repr(plan) == f"Plan({', '.join(f'{name}={value!r}' for name, value in members.items())})"
    )
    for wrong in (members | {"x": 1}, {"blocks": 7}):
        with pytest.raises(TypeError):
            Plan(**wrong)


def test_the_stub_has_the_members_of_a_plan() -> None:
    stub = ast.parse(Path(_C.__file__).with_name("_C.pyi").read_text())
    (of_plan,) = (
        node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "Plan"
    )
    declared = [
        ast.unparse(node.target) for node in of_plan.body if isinstance(node, ast.AnnAssign)
    ]
    plan = make_plan((4096, 1024, 1))
    assert plan and declared == list(plan.members())


# --- Where tensors lie ---------------------------------------------------------------------------

Make = Callable[..., torch.Tensor]

# (tensor in memory that `make` makes, dim), and whether the kernels read it there.
LYING: dict[str, tuple[Callable[[Make], torch.Tensor], int, bool]] = {
    "contiguous": (lambda make: make(8, 9, 1000), -1, True),
    "a part of the batch": (lambda make: make(8, 9, 1000)[:, :-1], -1, True),
    "a part of each row": (lambda make: make(8, 1024)[:, :1000], -1, True),
    "of another alignment": (lambda make: make(8, 1025)[:, 1:], -1, True),
    "outer dims exchanged": (lambda make: make(4, 8, 3, 64).transpose(1, 2), -1, True),
    "one batch for all": (lambda make: make(1, 9, 64).expand(8, 9, 64), -1, True),
    "four outer dims": (lambda make: make(2, 3, 2, 3, 64).permute(3, 2, 1, 0, 4), -1, True),
    "five": (lambda make: make(2, 3, 2, 3, 2, 64).permute(4, 3, 2, 1, 0, 5), -1, False),
    "one element for all": (lambda make: make(8, 1).expand(8, 64), -1, False),
    "transposed": (lambda make: make(64, 80).t(), -1, False),
    "transposed columns": (lambda make: make(64, 80).t(), 0, False),
    "channels last": (
        lambda make: make(2, 19, 16, 16).to(memory_format=torch.channels_last),
        1,
        False,
    ),
    "a part of the columns": (lambda make: make(8, 50, 100)[..., 3:80], 1, True),
    "every other step": (lambda make: make(8, 50, 100)[:, ::2], 1, True),
    "two inner dims": (lambda make: make(8, 50, 20, 20)[..., :16], 1, False),
    # By 16 bytes, or a sector, no more: slabs, of what lies together.
    "a part of each short row": (lambda make: make(4096, 8)[:, :7], -1, False),
    "short rows, unaligned": (lambda make: make(4096, 128)[:, 1:65], -1, False),
    "a part of a batch of short rows": (lambda make: make(4, 3000, 7)[:, :-1], -1, True),
    "few of each batch": (lambda make: make(400, 20, 7)[:, :-1], -1, False),
    "a part of narrow columns": (lambda make: make(8, 50, 4)[..., :3], 1, False),
    "narrow columns of a batch": (lambda make: make(4, 30, 50, 3)[:, :-1], 2, True),
}


@all_dtypes
@pytest.mark.parametrize("name", LYING)
def test_what_is_read_where_it_lies(name: str, dtype: torch.dtype) -> None:
    make, dim, expected = LYING[name]
    tensor = make(lambda *sizes: torch.empty(sizes, dtype=dtype))
    assert _C.is_direct_on_cuda(tensor, dim) == expected


@all_dtypes
@backward_too
@pytest.mark.parametrize("name", [name for name, (_, _, direct) in LYING.items() if direct])
def test_the_plan_follows_the_strides(name: str, backward: bool, dtype: torch.dtype) -> None:
    """Vectors where all rows, or steps, begin at multiples of 16 bytes; no slab has rows that lie
    apart."""
    lay, dim, _ = LYING[name]
    tensor = lay(lambda *sizes: torch.empty(sizes, dtype=dtype))
    dim %= tensor.dim()
    sizes, strides = tensor.shape, tensor.stride()
    shape = (sizes[:dim].numel(), sizes[dim], sizes[dim + 1 :].numel())
    device = DEVICES["H100"]
    known = (device.sm_count, device.shared_bytes, device.compute_capability)
    arguments = (*shape, dtype, dtype, 1 + backward, True, *known)
    plan = _C.plan(*arguments, like=tensor, like_dim=dim)
    assert plan is not None
    if shape[2] == 1:
        starts = [stride * dtype.itemsize for stride in strides[:dim]]
        starts.append(tensor.storage_offset() * dtype.itemsize)
        aligned = all(start % VECTOR == 0 for start in starts)
        whole = aligned and shape[1] * dtype.itemsize % VECTOR == 0
        assert plan.vectorized == (whole and plan.schedule != "packed")
    elif plan.schedule == "columns":
        access = plan.columns * dtype.itemsize
        starts = [tensor.storage_offset(), *strides[: dim + 1]]
        assert all(start * dtype.itemsize % access == 0 for start in starts)
    if plan.schedule == "packed" and not tensor.is_contiguous():
        assert plan.items <= sizes[dim - 1] * shape[2]
    contiguous = _C.plan(*arguments)
    if tensor.is_contiguous():
        assert plan == contiguous


def test_no_part_of_the_gradient_of_a_mask_is_without_rows() -> None:
    for rows, sharing in itertools.product((1, 7, 147, 4096, 10**6), range(1, 700)):
        parts = _C.mask_gradient_parts(rows, sharing)
        each = -(-sharing // parts)
        assert 1 <= parts <= sharing
        assert (parts - 1) * each < sharing
        assert each <= 64
