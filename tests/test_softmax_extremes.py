"""Infinities, NaN, huge, tiny and equal values: in rows of every kernel, in all dtypes."""

import pytest
import torch
from special_rows import ROWS, is_nan_for_torch_too
from tolerances import (
    FLOATING,
    OPS,
    OURS,
    SIXTEEN_BIT,
    TORCH,
    assert_close_to_reference,
    reference,
    ulp,
)

INF = torch.inf


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [3, 16, 37, 1030, 4099])
def test_special_rows_of_the_last_dim(size: int, op: str, dtype: torch.dtype, device: str) -> None:
    """All rows at once: what one row holds must not leak into its neighbours."""
    rows = [make(torch.randn(size)) for make in ROWS.values()]
    input = torch.stack(rows).to(dtype).to(device)
    actual = OURS[op](input, 1)
    for name, x, y in zip(ROWS, input, actual, strict=True):
        try:
            assert_close_to_reference(y, op, x, 0)
            assert is_nan_for_torch_too(op, x, 0, y)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [3, 16, 37, 1030])
def test_special_rows_of_another_dim(size: int, op: str, dtype: torch.dtype, device: str) -> None:
    """Side by side in one vector (pytorch issue 158310: mixed -inf rows of 16-bit log_softmax)."""
    rows = [make(torch.randn(size)) for make in ROWS.values()]
    input = torch.stack(rows, 1).to(dtype).to(device)
    actual = OURS[op](input, 0)
    for index, name in enumerate(ROWS):
        x, y = input[:, index].contiguous(), actual[:, index]
        try:
            assert_close_to_reference(y, op, x, 0)
            assert is_nan_for_torch_too(op, x, 0, y)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


CHUNK = 4096
LONG = 3 * CHUNK + 5


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [-INF, -1e4], ids=["-inf", "-1e4"])
@pytest.mark.parametrize("size", [LONG, 2**17 + 3])
def test_whole_chunks_of_minus_infinity(
    size: int, value: float, op: str, dtype: torch.dtype, device: str
) -> None:
    """A share of a row that is -inf throughout has no maximum to subtract: (-inf) - (-inf)."""
    live = {
        "all but the first chunk": slice(0, CHUNK),
        "all but the last chunk": slice(size - CHUNK, size),
        "all but the last element": slice(size - 1, size),
        "all but the first element": slice(0, 1),
        "all but one in the middle": slice(size // 2, size // 2 + 1),
        "first chunk": slice(CHUNK, size),
        "last chunk": slice(0, size - CHUNK),
    }
    values = torch.randn(size).to(dtype)
    for name, part in live.items():
        input = torch.full((size,), value, dtype=dtype)
        input[part] = values[part]
        input = input.to(device)
        for x, dim in ((input, 0), (input[:, None].expand(-1, 2), 0)):
            actual = OURS[op](x, dim)
            assert not actual.isnan().any(), name
            assert_close_to_reference(actual, op, x, dim)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [2048, 65535, 65536, 65537, 2**20])
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_equal_elements(value: float, size: int, op: str, dtype: torch.dtype, device: str) -> None:
    """Every result is 1 / size, or its log: a sum kept in 16 bits stops at 2048 or overflows."""
    actual = OURS[op](torch.full((size,), value, dtype=dtype, device=device), 0)
    exact = torch.tensor(1.0 / size, dtype=torch.float64)
    expected = exact if op == "softmax" else exact.log()
    error = (actual.cpu().double() - expected).abs().max()
    assert error <= 1.01 * ulp(expected, dtype)
    if dtype in SIXTEEN_BIT:
        assert torch.equal(actual.cpu(), expected.to(dtype).expand(size))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_largest_finite_values(op: str, dtype: torch.dtype, device: str) -> None:
    """No overflow: a difference beyond the dtype is -inf in log_softmax, 0 in softmax."""
    most = torch.finfo(dtype).max
    for values in (
        [most, most, most],
        [most, -most, 0.0],
        [-most, -most],
        [most, most / 2, 1.0],
        [-most, 0.0],
        [most, -INF],
        [most, 1.0, most, -most] * 9,
        [-most] * 40 + [0.0],
    ):
        input = torch.tensor(values, dtype=dtype, device=device)
        actual = OURS[op](input, 0)
        assert not actual.isnan().any(), values
        assert_close_to_reference(actual, op, input, 0)
        columns = input[:, None].repeat(1, 9)
        assert_close_to_reference(OURS[op](columns, 0), op, columns, 0)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("size", "inner"), [(2, 1), (40, 1), (5000, 1), (2, 19), (40, 19)])
def test_subnormal_results_of_softmax(
    size: int, inner: int, dtype: torch.dtype, device: str
) -> None:
    """Down to the smallest number of the dtype: subnormals aren't flushed or rounded twice."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    deepest = torch.log(torch.tensor(smallest, dtype=torch.float64)).item()
    largest = torch.log(torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64)).item()
    for step in range(24):
        low = largest + (deepest - largest) * step / 23
        column = torch.full((size,), low, dtype=torch.float64)
        column[size // 2] = 0.0
        input = column.to(dtype)[:, None].repeat(1, inner).to(device)
        actual = OURS["softmax"](input, 0).cpu()
        expected = reference("softmax", input, 0)
        # At e^-745 and e^-104 the argument's rounding moves the result by less than an ulp of a
        # subnormal, so only the last rounding is left.
        error = (actual.double() - expected).abs()
        subnormal = expected < torch.finfo(dtype).tiny
        assert (error[subnormal] <= 1.1 * smallest).all(), f"exp({low})"
        kept = expected >= smallest
        assert (actual[kept] > 0).all(), f"exp({low}) is flushed"


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_subnormal_inputs(op: str, dtype: torch.dtype, device: str) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    input = torch.tensor([tiny / 2, -tiny / 4, tiny, 0.0, -0.0] * 7, dtype=dtype, device=device)
    assert_close_to_reference(OURS[op](input, 0), op, input, 0)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [1, 2, 40])
def test_signed_zeros(size: int, op: str, dtype: torch.dtype, device: str) -> None:
    """-0 counts as 0, and the log of a certain outcome is +0, as torch's."""
    for zeros in (0.0, -0.0):
        input = torch.full((size,), zeros, dtype=dtype, device=device)
        input[0] = 0.0
        assert_close_to_reference(OURS[op](input, 0), op, input, 0)
    certain = torch.full((size,), -INF, dtype=dtype, device=device)
    certain[0] = 5.0
    actual = OURS[op](certain, 0)
    assert torch.equal(actual, TORCH[op](certain, 0))
    assert torch.equal(actual.signbit(), TORCH[op](certain, 0).signbit())


@pytest.mark.parametrize("op", OPS)
def test_dominant_logit_keeps_its_precision(op: str, device: str) -> None:
    """The log of a probability close to 1 is far smaller than 1, and still right."""
    for gap in (1.0, 5.0, 10.0, 14.0):
        input = torch.tensor([gap, 0.0, 0.0], device=device)
        assert_close_to_reference(OURS[op](input, 0), op, input, 0)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 1])
def test_gradient_of_special_rows(dim: int, op: str, dtype: torch.dtype, device: str) -> None:
    """NaN where torch has NaN; elsewhere torch's gradient in float64 of the same values."""
    rows = [make(torch.randn(37)) for make in ROWS.values()]
    input = torch.stack(rows, 1 - dim).to(dtype).to(device)
    grad_output = torch.randn(input.shape).to(dtype).to(device)
    grads = []
    for function, x, g in (
        (OURS[op], input, grad_output),
        (TORCH[op], input.cpu().double(), grad_output.cpu().double()),
    ):
        x = x.detach().requires_grad_()
        grads.append(torch.autograd.grad(function(x, dim), x, g)[0].cpu())
    ours, theirs = grads
    assert torch.equal(ours.isnan(), theirs.isnan())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), theirs, rtol=4 * eps, atol=64 * eps, equal_nan=True)


@pytest.mark.parametrize("rounding", ["up", "down", "even"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_cast_of_the_result_rounds_to_nearest(
    rounding: str, dtype: torch.dtype, device: str
) -> None:
    """Two logits chosen so that the larger probability is just above, below or near a tie."""
    eps = torch.finfo(dtype).eps
    tie = 0.5 + eps / 4 * (1 if rounding != "even" else 3)
    probability = tie + {"up": 1, "down": -1, "even": 0.5}[rounding] * eps / 64
    logit = torch.tensor([probability / (1 - probability)], dtype=torch.float64).log()
    input = torch.cat([logit, torch.zeros(1, dtype=torch.float64)]).float().to(device)
    actual = OURS["softmax"](input.double(), 0, dtype=dtype)
    assert_close_to_reference(actual, "softmax", input.double(), 0, dtype)


# Bit patterns of float32's NaNs: quiet and signalling, of both signs, with all of the payload, with
# the half alone that 16-bit types lack, and what a memset of 0xff leaves.
NANS = [0x7FC00000, 0x7F800001, 0x7F808000, 0x7FFFFFFF, -0x400000, -0x7FFFFF, -1]


@pytest.mark.parametrize("result", FLOATING, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(7, 5), (7, 1030), (7, 5, 17), (7, 70, 3), (7, 3, 130)], ids=str)
def test_nans_of_any_payload_stay_nans(
    shape: tuple[int, ...], op: str, dtype: torch.dtype, result: torch.dtype, device: str
) -> None:
    """Where a NaN is rounded to fewer bits, a carry out of its payload would make it a zero."""
    nans = torch.tensor(NANS, dtype=torch.int32).view(torch.float32)
    if dtype in SIXTEEN_BIT:  # the same patterns, in the bits that there are
        nans = torch.tensor([0x7FFF, 0x7FFE, -1], dtype=torch.int16).view(dtype).repeat(3)[:7]
    input = torch.randn(shape, device=device).to(dtype)
    input[:, -1] = nans.to(device, dtype).reshape(-1, *[1] * (len(shape) - 2))
    assert OURS[op](input, 1, dtype=result).isnan().all()

    backward = getattr(torch.ops.softmax_ext, f"{op}_backward")
    output = TORCH[op](torch.randn(shape, device=device), 1).to(dtype)
    assert backward(input, output, 1, result).isnan()[:, -1].all()
    assert backward(output, input, 1, result).isnan()[:, -1].all()
