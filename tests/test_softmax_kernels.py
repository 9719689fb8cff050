"""softmax_ext.kernels: the values and gradients of softmax_ext.softmax, without a graph."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_softmax_entries import shrunk
from tolerances import INTEGERS, OPS, OURS, TORCH
from torch._subclasses.fake_tensor import FakeTensorMode

from softmax_ext import kernels

FORWARD = {"softmax": kernels.softmax_forward, "log_softmax": kernels.log_softmax_forward}
BACKWARD = {"softmax": kernels.softmax_backward, "log_softmax": kernels.log_softmax_backward}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_integers_with_a_dtype(op: str, dtype: torch.dtype, device: str) -> None:
    input = torch.randint(0, 2, (3, 5), device=device).to(dtype)
    expected = OURS[op](input, 1, dtype=torch.float32)
    assert torch.equal(FORWARD[op](input, 1, torch.float32), expected)


@pytest.mark.parametrize("op", OPS)
def test_a_graph_is_refused_rather_than_lost(op: str, device: str) -> None:
    leaf = torch.randn(3, 5, device=device, requires_grad=True)
    plain = leaf.detach()
    for argument, call in (
        ("input", lambda: FORWARD[op](leaf, 1)),
        ("grad_output", lambda: BACKWARD[op](leaf, plain, 1, torch.float32)),
        ("output", lambda: BACKWARD[op](plain, leaf, 1, torch.float32)),
    ):
        with pytest.raises(RuntimeError, match=f"'{argument}' requires grad, but the kernels"):
            call()
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                assert not call().requires_grad


@pytest.mark.parametrize("op", OPS)
def test_wrong_types(op: str, device: str) -> None:
    x = torch.randn(3, 5, device=device)
    forward, backward = FORWARD[op], BACKWARD[op]
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
        (forward, (None, 1), "argument 'input' must be Tensor, not NoneType"),
        (forward, ([1.0], 0), "argument 'input' must be Tensor, not list"),
        (forward, (x, 1.0), "argument 'dim' must be int, not float"),
        (forward, (x, True), "argument 'dim' must be int, not bool"),
        (forward, (x, None), "argument 'dim' must be int, not NoneType"),
        (forward, (x, 1, 6), "argument 'dtype' must be torch.dtype, not int"),
        (backward, (None, x, 1, x.dtype), "argument 'grad_output' must be Tensor"),
        (backward, (x, None, 1, x.dtype), "argument 'output' must be Tensor"),
        (backward, (x, x, "1", x.dtype), "argument 'dim' must be int, not str"),
        (backward, (x, x, 1, None), "argument 'input_dtype' must be torch.dtype"),
    ]
    for call, arguments, words in calls:
        with pytest.raises(TypeError, match=rf"^{call.__name__}\(\): {words}"):
            call(*arguments)


@pytest.mark.parametrize("op", OPS)
def test_wrong_values(op: str, device: str) -> None:
    """Of the forward pass; test_softmax_entries.py has those of the backward pass."""
    ones = torch.ones(3, 5, device=device)
    for arguments, error, words in (
        ((ones, 2), IndexError, r"range of \[-2, 1\], but got 2"),
        ((ones.int(), 1), NotImplementedError, "dtype Int"),
        ((ones, 1, torch.int8), NotImplementedError, "'dtype' = Char"),
        ((ones.to_sparse(), 1), NotImplementedError, "Sparse"),
        (
            (shrunk(torch.ones(20, 30, device=device)), 1),
            RuntimeError,
            "requires a storage of 2400 bytes",
        ),
    ):
        with pytest.raises(error, match=words):
            FORWARD[op](*arguments)


@pytest.mark.parametrize("dim", [np.int64(-1), torch.tensor(1)], ids=["numpy", "0-d tensor"])
@pytest.mark.parametrize("op", OPS)
def test_dim_that_is_not_an_int(op: str, dim: Any, device: str) -> None:
    x = torch.randn(3, 5, device=device)
    output = FORWARD[op](x, dim)
    assert torch.equal(output, FORWARD[op](x, 1))
    grad = BACKWARD[op](x, output, dim, x.dtype)
    assert torch.equal(grad, BACKWARD[op](x, output, 1, x.dtype))


@pytest.mark.parametrize("op", OPS)
def test_vmap_and_tangent(op: str, device: str) -> None:
    x, t = torch.randn(2, 3, 4, 5, device=device, dtype=torch.float64)
    torch.testing.assert_close(
        torch.vmap(lambda x: FORWARD[op](x, 0), in_dims=1)(x),
        torch.vmap(lambda x: TORCH[op](x, 0), in_dims=1)(x),
    )
    torch.testing.assert_close(
        torch.vmap(lambda g, y: BACKWARD[op](g, y, 0, g.dtype), in_dims=(2, None))(t, x[..., 0]),
        torch.stack([BACKWARD[op](g, x[..., 0], 0, g.dtype) for g in t.unbind(2)]),
    )
    torch.testing.assert_close(
        torch.func.jvp(lambda x: FORWARD[op](x, 1), (x,), (t,)),
        torch.func.jvp(lambda x: TORCH[op](x, 1), (x,), (t,)),
    )


@pytest.mark.parametrize("op", OPS)
def test_meta_and_fake_tensors(op: str, device: str) -> None:
    real = torch.randn(3, 5, device=device)
    with FakeTensorMode() as mode:
        for x in (mode.from_tensor(real), torch.empty(3, 5, device="meta")):
            y = FORWARD[op](x, 1, torch.float16)
            grad = BACKWARD[op](y, y, 1, torch.float32)
            assert (y.shape, y.dtype, y.device) == (x.shape, torch.float16, x.device)
            assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device)
