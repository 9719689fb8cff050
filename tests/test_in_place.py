"""softmax_ and log_softmax_: results, gradients, memory, torch's rules for what is in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_layout import LAYOUTS
from tolerances import FLOATING, OPS, OURS, TORCH

import softmax_ext

IN_PLACE: dict[str, Callable[..., torch.Tensor]] = {
    "softmax": softmax_ext.softmax_,
    "log_softmax": softmax_ext.log_softmax_,
}
MODULES = {"softmax": softmax_ext.Softmax, "log_softmax": softmax_ext.LogSoftmax}


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [3, 37, 5000])
def test_result(size: int, dim: int, op: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randn((size, 4) if dim == 0 else (4, size), device=device).to(dtype)
    expected = OURS[op](x, dim)
    address, version = x.data_ptr(), x._version
    assert IN_PLACE[op](x, dim) is x
    assert torch.equal(x, expected)
    assert (x.data_ptr(), x._version) == (address, version + 1)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if "expanded" not in name and "overlapping" not in name]
)
def test_layouts(layout: str, op: str, device: str) -> None:
    x = LAYOUTS[layout](device)
    strides = x.stride()
    expected = OURS[op](x.clone(), 0)
    assert IN_PLACE[op](x, 0) is x
    torch.testing.assert_close(x, expected)  # a negated view is torch's
    assert x.stride() == strides


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 1])
def test_gradient(dim: int, op: str, device: str) -> None:
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        IN_PLACE[op](y, dim)
        return y.clone()

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("op", OPS)
def test_view(op: str, device: str) -> None:
    """Of a part of a tensor: the rest keeps its gradient, and the base sees the change."""
    x = torch.randn(4, 6, device=device, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, in_place: bool) -> torch.Tensor:
        y = x * 1
        if in_place:
            IN_PLACE[op](y[1:3, ::2], 1)
            return y
        rest = y.clone()
        rest[1:3, ::2] = OURS[op](y[1:3, ::2], 1)
        return rest

    torch.testing.assert_close(function(x, True), function(x, False))
    weights = torch.randn_like(x)
    grads = [torch.autograd.grad((function(x, k) * weights).sum(), x)[0] for k in (True, False)]
    torch.testing.assert_close(grads[0], grads[1])


def error_of(function: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(RuntimeError) as caught:
        function()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("op", OPS)
def test_leaves_and_views_of_leaves(op: str, device: str) -> None:
    """Refused as torch refuses exp_, word for word; allowed without a graph."""
    leaf = torch.randn(3, 4, device=device, requires_grad=True)
    for tensor in (leaf, leaf[1:], leaf.detach().requires_grad_().split(1)[0]):
        assert error_of(lambda t=tensor: IN_PLACE[op](t, 0)) == error_of(lambda t=tensor: t.exp_())
    expected = OURS[op](leaf.detach(), 0)
    with torch.no_grad():
        IN_PLACE[op](leaf, 0)
    assert torch.equal(leaf, expected)


@pytest.mark.parametrize("op", OPS)
def test_what_torch_forbids(op: str, device: str) -> None:
    expanded = torch.randn(3, 1, device=device).expand(3, 4)
    assert "single memory location" in error_of(lambda: IN_PLACE[op](expanded, 0))[1]
    with torch.inference_mode():
        inference = torch.randn(3, 4, device=device)
        assert torch.equal(IN_PLACE[op](inference.clone(), 1), OURS[op](inference, 1))
    assert "inference" in error_of(lambda: IN_PLACE[op](inference, 0))[1]
    x = torch.randn(3, 4, device=device, requires_grad=True)
    y = x.exp()  # whose gradient needs it as it is
    IN_PLACE[op](y, 1)
    assert "modified by an inplace operation" in error_of(lambda: y.sum().backward())[1]
    y = IN_PLACE[op](x * 2, 1)
    y.add_(1)  # the same the other way round
    assert "modified by an inplace operation" in error_of(lambda: y.sum().backward())[1]


@pytest.mark.parametrize("op", OPS)
def test_other_errors(op: str, device: str) -> None:
    x = torch.randn(3, 4, device=device)
    before = x.clone()
    with pytest.raises(IndexError):
        IN_PLACE[op](x, 2)
    with pytest.raises(TypeError, match="dim"):
        IN_PLACE[op](x, 1.0)
    with pytest.raises(TypeError, match="input"):
        IN_PLACE[op]([1.0], 0)
    with pytest.raises(NotImplementedError, match="Long"):
        IN_PLACE[op](torch.ones(3, dtype=torch.int64, device=device), 0)
    assert torch.equal(x, before)
    with pytest.warns(UserWarning, match=f"Implicit dimension choice for {op}_"):
        IN_PLACE[op](x)
    assert torch.equal(x, OURS[op](before, 1))


@pytest.mark.parametrize("op", OPS)
def test_under_transforms(op: str, device: str) -> None:
    x = torch.randn(3, 4, device=device, dtype=torch.float64)
    for transform in (torch.vmap, lambda f: torch.func.jacrev(f), lambda f: torch.func.jacfwd(f)):
        ours = transform(lambda x: IN_PLACE[op](x * 1, -1))(x)
        torch.testing.assert_close(ours, transform(lambda x: OURS[op](x * 1, -1))(x))


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax", "Softmin", "Softmax2d"])
def test_modules(name: str, device: str) -> None:
    dims = {} if name == "Softmax2d" else {"dim": 1}
    module = getattr(softmax_ext, name)(inplace=True, **dims)
    assert repr(module) == f"{name}({'' if name == 'Softmax2d' else 'dim=1, '}inplace=True)"
    x = torch.randn(2, 3, 4, 5, device=device)
    expected = getattr(softmax_ext, name)(**dims)(x)
    assert module(x) is x
    assert torch.equal(x, expected)
    old = module.__dict__.copy()
    del old["inplace"]  # pickled before there was one
    restored = type(module).__new__(type(module))
    restored.__setstate__(old)
    assert restored.inplace is False


def tensors_allocated(function: Callable[..., torch.Tensor]) -> float:
    """By a forward and a backward, in sizes of the input: all of them, also those freed again."""
    x = torch.randn(512, 512, requires_grad=True) * 1
    grad_output = torch.randn(512, 512)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = function(x, 1)
        assert y.grad_fn is not None
        y.grad_fn(grad_output)
    events = profile.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]") / x.nbytes


@pytest.mark.parametrize("op", OPS)
def test_memory_on_the_cpu(op: str) -> None:
    """Beside the input and the output's gradient: the input's gradient. torch: the output too."""
    assert tensors_allocated(TORCH[op]) == pytest.approx(2, rel=0.01)
    assert tensors_allocated(IN_PLACE[op]) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("op", OPS)
def test_peak_memory_on_a_gpu(op: str, device: str) -> None:
    """Beside the input: the output's gradient and the input's."""
    x = torch.randn(1024, 1024, device=device, requires_grad=True) * 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = IN_PLACE[op](x, 1)
    y.backward(torch.randn_like(y))
    assert torch.cuda.max_memory_allocated() - before <= 2.1 * x.nbytes
