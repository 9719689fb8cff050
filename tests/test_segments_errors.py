"""The operations on segments: what is wrong raises first, naming the argument."""

from typing import Any

import pytest
import torch
from segment_reference import OPS
from test_threads_and_isa import run

X = torch.zeros(4, 2)
PTR = torch.tensor([0, 1, 4])
INDEX = torch.tensor([0, 1, 1, 0])

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, r"exactly one of the arguments 'ptr' and 'index', but got neither"),
    ({"ptr": PTR, "index": INDEX}, ValueError, r"'ptr' and 'index', but got both"),
    ({"ptr": [0, 4]}, TypeError, r"argument 'ptr' must be Tensor, not list"),
    ({"index": 3}, TypeError, r"argument 'index' must be Tensor, not int"),
    ({"ptr": PTR, "dim": 2}, IndexError, "Dimension out of range"),
    ({"ptr": PTR, "dim": -3}, IndexError, "Dimension out of range"),
    ({"ptr": PTR, "dim": 0.0}, TypeError, "'dim' must be int, not float"),
    ({"ptr": PTR, "scale": "1"}, TypeError, "'scale' must be float, not str"),
    ({"ptr": PTR, "dtype": "half"}, TypeError, "'dtype' must be torch.dtype, not str"),
    ({"ptr": PTR, "dtype": torch.int32}, NotImplementedError, "argument 'dtype' = Int"),
    ({"ptr": PTR, "num_segments": 3}, ValueError, "'num_segments' to be 2, .* but got 3"),
    ({"index": INDEX, "num_segments": -1}, ValueError, "'num_segments' .* but got -1"),
    ({"index": INDEX, "num_segments": 2.0}, TypeError, "'num_segments' must be int, not float"),
    ({"ptr": PTR.float()}, RuntimeError, "'ptr' to have dtype Int or Long, but got Float"),
    ({"index": INDEX.bool()}, RuntimeError, "'index' to have dtype Int or Long, but got Bool"),
    ({"index": INDEX.short()}, RuntimeError, "'index' .* but got Short"),
    ({"ptr": PTR[None]}, RuntimeError, "'ptr' to have 1 dimension, but got 2"),
    ({"index": INDEX[0]}, RuntimeError, "'index' to have 1 dimension, but got 0"),
    ({"ptr": PTR[:0]}, RuntimeError, "'ptr' to have a pointer more than there are segments"),
    ({"index": INDEX[:3]}, RuntimeError, "'index' to have the length .* 4, but got 3"),
    ({"index": INDEX, "dim": 1}, RuntimeError, "'index' to have the length .* 2, but got 4"),
    ({"ptr": PTR.to("meta")}, RuntimeError, "same device, but found 'input' on cpu .* 'ptr'"),
    # Values.
    ({"ptr": PTR + 1}, RuntimeError, "'ptr' .* from 0 .* but got 1 at 0"),
    ({"ptr": PTR[:2]}, RuntimeError, "'ptr' .* up to 4, .* but got 1 at 1"),
    ({"ptr": torch.tensor([0, 3, 2, 4])}, RuntimeError, "'ptr' .* but got 2 at 2 after 3"),
    ({"ptr": torch.tensor([0, 5])}, RuntimeError, "'ptr' .* up to 4, .* but got 5 at 1"),
    ({"ptr": torch.tensor([0, -1, 4])}, RuntimeError, "'ptr' .* but got -1 at 1 after 0"),
    ({"ptr": torch.tensor([0])}, RuntimeError, "'ptr' .* but got 0 at 0"),
    ({"index": torch.tensor([0, 1, -1, 0])}, IndexError, "'index' .* no negative .* got -1"),
    ({"index": INDEX, "num_segments": 1}, IndexError, "'index' .* below 'num_segments', 1, .* 1"),
    ({"index": INDEX, "num_segments": 0}, IndexError, "'index' .* below 'num_segments', 0"),
]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
@pytest.mark.parametrize("op", OPS)
def test_wrong_arguments(
    op: str,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    index_dtype: torch.dtype,
) -> None:
    arguments = {
        name: value.to(index_dtype)
        if isinstance(value, torch.Tensor) and value.dtype == torch.int64
        else value
        for name, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        OPS[op](X, **arguments)


@pytest.mark.parametrize("op", OPS)
def test_wrong_input(op: str) -> None:
    with pytest.raises(TypeError, match="'input' must be Tensor, not list"):
        OPS[op]([1.0], PTR)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="'input' of dtype Int"):
        OPS[op](X.int(), PTR)
    with pytest.raises(IndexError, match="no dimensions"):
        OPS[op](torch.zeros(()), PTR)
    resized = torch.zeros(4, 2)
    resized.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="'input' requires a storage of 32 bytes"):
        OPS[op](resized, PTR)


def test_operators_check_what_they_are_given() -> None:
    """torch.ops takes an order, and gradients, of anyone."""
    ops = torch.ops.softmax_ext
    order = torch.tensor([0, 1, 2, 4])
    for bad in (order, order - 1):
        with pytest.raises(IndexError, match="'order' to have values from 0 to 3"):
            ops.segment_softmax(X, PTR, None, bad, 0, 1.0, None)
    with pytest.raises(RuntimeError, match="'order' to have the length"):
        ops.segment_softmax(X, PTR, None, order[:3], 0, 1.0, None)
    with pytest.raises(ValueError, match="an 'order' needs"):
        ops.segment_softmax(X, None, INDEX, order, 0, 1.0, None)
    with pytest.raises(RuntimeError, match="'grad_output' to have the size"):
        ops.segment_softmax_backward(X[:3], X, PTR, None, None, 0, 1.0, None)
    with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
        ops.segment_softmax_backward(X.double(), X, PTR, None, None, 0, 1.0, None)
    with pytest.raises(RuntimeError, match="'output' to have the size"):
        ops.segment_logsumexp_backward(X, X, X, PTR, None, None, 0, 1.0)
    with pytest.raises(IndexError, match="'index'"):
        ops.segment_logsumexp_backward(X[:1], X[:1], X, None, INDEX, None, 0, 1.0)


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ptr=torch.tensor([0, 3, 2, 4], device=device)", "segment 1 of 3 goes from 3 to 2 of 4"),
        ("index=torch.tensor([0, 1, -1, 0], device=device), num_segments=2", "segment 0 of 2"),
        ("index=torch.tensor([0, 1, 2, 2**32], device=device), num_segments=3", "segment 2 of 3"),
    ],
)
def test_wrong_values_on_a_device(arguments: str, message: str, device: str) -> None:
    """They show once the device comes to them, and end its use by the process."""
    script = f"""
import torch, softmax_ext
device = {device!r}
y = softmax_ext.segment_softmax(torch.zeros(4, 2, device=device), {arguments})
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print(error)
"""
    result = run(script)
    assert message in result.stdout
    assert "device-side assert" in result.stdout


@pytest.mark.parametrize("device", ["cuda"])
def test_no_segments_on_a_device(device: str) -> None:
    x = torch.zeros(4, 2, device=device)
    for segments in (
        {"ptr": torch.zeros(1, dtype=torch.int64, device=device)},
        {"index": INDEX.to(device), "num_segments": 0},
    ):
        with pytest.raises(IndexError, match=r"4 elements of 'input' .* no segments"):
            OPS["softmax"](x, **segments)
