"""A row's result has the same bits whatever batch it is in; on CUDA, whatever dim it lies along."""

from collections.abc import Callable

import pytest
import torch
from tolerances import FLOATING, OPS, OURS

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# A part of a vector; several vectors, and one element; a chunk of a warp (2048 elements of 16 bits,
# 1024 of float32, 256 of float64), and one more; a cluster's; more than a block's, and not aligned.
SIZES = [3, 65, 256, 257, 1024, 1025, 2049, 20000, 50257, 200003]


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    bits = BITS[actual.element_size()]
    return torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


def gradient(
    function: Callable[..., torch.Tensor], x: torch.Tensor, dim: int, grad: torch.Tensor
) -> torch.Tensor:
    leaf = x.detach().clone().requires_grad_()
    function(leaf, dim).backward(grad)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_alone_and_in_a_batch(size: int, op: str, dtype: torch.dtype, device: str) -> None:
    function = OURS[op]
    # The last rows begin anywhere in 16 bytes where the size is odd.
    x = torch.randn(7, size).to(dtype).to(device)
    grad = torch.randn(7, size).to(dtype).to(device)
    y = function(x, 1)
    dx = gradient(function, x, 1, grad)
    for row in (0, 1, 6):
        alone = x[row : row + 1].clone()
        assert same(function(alone, 1), y[row : row + 1])
        assert same(gradient(function, alone, 1, grad[row : row + 1].clone()), dx[row : row + 1])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
# Less than a vector, whole ones, a rest; wide: by registers of many slices, by tiles of one.
@pytest.mark.parametrize("inner", [2, 9, 49, 64, 250])
@pytest.mark.parametrize("size", [2, 33, 64, 65, 1000])
def test_columns_alone_and_in_a_batch(
    size: int, inner: int, op: str, dtype: torch.dtype, device: str
) -> None:
    """A slice's columns too, and where the output is the input's memory."""
    function = OURS[op]
    x = torch.randn(23, size, inner).to(dtype).to(device)
    grad = torch.randn(23, size, inner).to(dtype).to(device)
    y = function(x, 1)
    dx = gradient(function, x, 1, grad)
    for slice in (0, 1, 22):
        alone = x[slice : slice + 1].clone()
        part = grad[slice : slice + 1].clone()
        assert same(gradient(function, alone, 1, part), dx[slice : slice + 1])
        assert same(function(alone, 1), y[slice : slice + 1])
    assert same(function(x, 1, out=x), y)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)  # on the CPU inner decides the order
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [2, 33, 1000, 1025, 8192, 40000])
def test_columns_among_more_or_fewer(size: int, op: str, dtype: torch.dtype, device: str) -> None:
    """Whatever the inner size, and where memory begins."""
    function = OURS[op]
    x = torch.randn(size, 64).to(dtype).to(device)
    grad = torch.randn(size, 64).to(dtype).to(device)
    y, dx = function(x, 0), gradient(function, x, 0, grad)
    for inner in (2, 3, 33):
        few, few_grad = x[:, :inner].contiguous(), grad[:, :inner].contiguous()
        assert same(function(few, 0), y[:, :inner])
        assert same(gradient(function, few, 0, few_grad), dx[:, :inner])
        shifted = torch.empty(few.numel() + 1, dtype=dtype, device=device)[1:].view(few.shape)
        assert same(function(shifted.copy_(few), 0), y[:, :inner])
