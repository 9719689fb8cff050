"""By the schedule that the plan chooses: sizes of a row, how exact it is, anything, and nothing."""

import pytest
import torch
from host import Host
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ALL,
    CASTS,
    DIRECTIONS,
    LIMITS,
    NATIVE,
    NEW,
    OLD,
    ROW_WARPS,
    SCHEDULES,
    VECTOR_BYTES,
    WARP,
    Shape,
    Types,
    all_types,
    assert_same_bits,
    ceil_div,
    has_the_accesses_of_another,
    launch,
    ops,
    run,
    values,
)
from lanes import SANITIZERS
from plans import DEVICES
from tolerances import INTEGERS, OPS, SIXTEEN_BIT, largest_error, reference, ulp


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
    (4097, "H100"),     # one more than a chunk of some types
    (4097, "A100"),
    (50257, NEW),       # GPT-2's vocabulary: in a cluster, a block or the grid
    (50257, OLD),
])  # fmt: skip
def test_dim(host: Host, dim: int, device: str, types: Types, op: str) -> None:
    """By the schedule that the plan chooses, of a few rows."""
    plan = run(host, types, op, (3 if dim < 2**12 else 1, dim, 1), device=device)
    vectors, chunks = ceil_div(dim, types.width), types.chunks(dim)
    if dim % types.width != 0 and vectors <= WARP:
        expected = {"packed"}
    elif chunks == 1:
        expected = {"warp"}
    elif DEVICES[device].compute_capability >= 90:
        expected = {"block" if chunks < LIMITS["FewChunks"] else "cluster"}
    else:
        expected = {"block"} if chunks <= ROW_WARPS else {"grid"}
    assert plan.schedule in expected
    assert plan.vectorized == (dim % types.width == 0 and plan.schedule != "packed")


@ops
@pytest.mark.parametrize("dim", [1000, 50257, 2**20, 2**22])
def test_ulp_of_float32(host: Host, dim: int, op: str) -> None:
    x = torch.rand(1, dim, 1) * 4 - 2
    result = host.forward(op, x, 1, device=NEW, orders=host.orders[:1])
    expected = reference(op, x, 1)
    assert largest_error(result.tensor, expected, ulp(expected, torch.float32)) <= 6


@ops
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize(("rows", "dim"), [(2000, 100), (200, 1000), (4, 50257), (1, 2**18)])
def test_results_of_16_bits_are_rounded_as_the_exact_ones(
    host: Host, rows: int, dim: int, dtype: torch.dtype, op: str
) -> None:
    """But for one in a thousand, which is closer to the middle of two neighbours than float32
    arithmetic can tell."""
    x = values((rows, dim, 1), dtype)
    result = host.forward(op, x, 1, device=NEW, orders=host.orders[:1])
    expected = reference(op, x, 1)
    half = ulp(expected, dtype) / 2
    wrong = (result.tensor.double() - expected).abs() > half
    assert wrong.double().mean() <= 1e-3


@st.composite
def any_case(draw: st.DrawFn) -> tuple[Types, str, Shape, dict[str, object]]:
    types = draw(st.sampled_from(NATIVE))
    few = st.integers(1, 9) | st.sampled_from([17, 31, 64, 130])
    long = st.integers(types.chunk - 9, 3 * types.chunk + 9)
    shape = (draw(st.integers(1, 40)), draw(few), draw(st.just(1) | few))
    if draw(st.booleans()):
        shape = (draw(st.integers(1, 6)), draw(long), draw(st.sampled_from([1, 1, 2, 3])))
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
    """It is right by the schedule that the plan chooses, and the bits are those of every other."""
    types, op, shape, how = case
    if host.lane in SANITIZERS and has_the_accesses_of_another(op, types):
        return
    plan = run(host, types, op, shape, **how)
    assert plan.schedule != "grid" and (plan.schedule in ("packed", "columns") or shape[2] == 1)
    x = torch.randn(shape)
    inputs = [x.to(types.load)]
    if types.direction == "backward":
        inputs = [values(shape, types.load), reference(op, x, 1).to(types.load)]
    results = {}
    for schedule in SCHEDULES:
        device = NEW if schedule == "grid" else how.get("device", NEW)
        other = how | {"schedule": schedule, "device": device, "orders": host.orders[-1:]}
        result = launch(host, types, op, inputs, **other)
        if result.plan.blocks > 0:
            results[schedule] = result.tensor
    assert plan.schedule in results
    assert_same_bits(results)


@all_types(ALL)
def test_nothing_is_launched_for_an_empty_tensor(host: Host, types: Types) -> None:
    """A launch of no blocks would be one out of range."""
    for shape in [(0, 5, 1), (5, 0, 1), (0, 5, 3), (5, 0, 3), (5, 3, 0)]:
        for op in OPS:
            assert run(host, types, op, shape).blocks == 0


@ops
@all_types(CASTS)
def test_casts_that_have_no_kernel_are_refused(host: Host, types: Types, op: str) -> None:
    """Whatever schedule would have it."""
    for shape in [(2, 3, 1), (2, 3, 2), (2, 500, 1)]:
        x = torch.ones(shape).to(types.load)
        given = [x] * types.inputs
        with pytest.raises(AssertionError, match="the launch returned an error"):
            launch(host, types, op, given)


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
