"""Derivatives of the operations on segments; transforms and compilers."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from segment_reference import (
    OPS,
    assert_close,
    assert_gradient_close,
    by_loop,
    index_of,
    pointers,
    shuffled,
)
from tolerances import FLOATING
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

PTR = pointers([3, 0, 1, 5, 2])
INDEX = torch.tensor([1, 0, 4, 3, 0, 3, 0, 3, 1, 1, 4])
WAYS: dict[str, dict[str, Any]] = {
    "ptr": {"ptr": PTR},
    "index": {"index": INDEX, "num_segments": 6},
}


def on(device: str, segments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: each.to(device) if isinstance(each, torch.Tensor) else each
        for name, each in segments.items()
    }


@pytest.mark.parametrize("heads", [1, 3, 8, 16, 40])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradient(op: str, dtype: torch.dtype, heads: int, device: str) -> None:
    """Of short segments, empty ones, and one of several chunks."""
    ptr = pointers([0, 1, 15, 16, 0, 17, 513, 9000, 3])
    x = torch.randn(int(ptr[-1]), heads, device=device).to(dtype).requires_grad_()
    index = shuffled(index_of(ptr))
    for segments in ({"ptr": ptr}, {"index": index}):
        y = OPS[op](x, **on(device, segments), scale=0.5)
        grad = torch.randn_like(y)
        (actual,) = torch.autograd.grad(y, x, grad)
        assert actual.dtype == dtype
        assert_gradient_close(actual, op, grad, x, scale=0.5, **segments)


@pytest.mark.parametrize("op", OPS)
def test_strides_dims_and_dtype(op: str, device: str) -> None:
    """A gradient that is expanded, a leaf that is transposed, a result of another dtype."""
    x = torch.randn(4, 11, 3, device=device, dtype=torch.float64).transpose(0, 2).requires_grad_()
    y = OPS[op](x, PTR.to(device), dim=-2)
    grad = torch.ones((), device=device, dtype=torch.float64).expand_as(y)
    (actual,) = torch.autograd.grad(y, x, grad)
    assert_gradient_close(actual, op, grad, x, dim=1, ptr=PTR)
    half = x.detach().to(torch.bfloat16).requires_grad_()
    y = OPS[op](half, PTR.to(device), dim=1, dtype=torch.float32)
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, half, grad)
    assert actual.dtype == torch.bfloat16
    assert_gradient_close(actual, op, grad, half, dim=1, ptr=PTR)


@pytest.mark.parametrize("op", OPS)
def test_infinities_have_torchs_gradients(op: str, device: str) -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([-inf, -inf, 1.0, -inf, inf, 2.0, nan, 0.0], device=device)
    ptr = pointers([2, 2, 2, 2])
    leaf = x.clone().requires_grad_()
    y = OPS[op](leaf, ptr.to(device))
    (actual,) = torch.autograd.grad(y.sum(), leaf)
    reference = x.cpu().double().requires_grad_()
    (expected,) = torch.autograd.grad(by_loop(op, reference, 0, 1.0, ptr=ptr).sum(), reference)
    torch.testing.assert_close(actual.cpu().double(), expected, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, way: str, device: str) -> None:
    """Reverse, forward, batched, and each over the other."""
    x = torch.randn(11, 2, device=device, dtype=torch.float64, requires_grad=True)
    segments = on(device, WAYS[way])

    def function(x: torch.Tensor) -> torch.Tensor:
        y = OPS[op](x, **segments, scale=0.7)
        return y.where(y.isfinite(), 0)  # of an empty segment there are no finite differences

    assert gradcheck(
        function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_transforms(op: str, way: str, device: str) -> None:
    """vmap over the input, the gradient of each sample, a Hessian."""
    segments = on(device, WAYS[way])

    def ours(x: torch.Tensor) -> torch.Tensor:
        return OPS[op](x, **segments, scale=2.0)

    def by_row(x: torch.Tensor) -> torch.Tensor:
        return by_loop(op, x, 0, 2.0, **segments)

    x = torch.randn(11, 3, 4, device=device, dtype=torch.float64)
    for in_dim in (1, 2, -1):
        actual = torch.vmap(ours, in_dims=in_dim, out_dims=in_dim)(x)
        torch.testing.assert_close(actual, ours(x))
    twice = torch.vmap(torch.vmap(ours, in_dims=1, out_dims=1), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(twice, ours(x))

    def loss(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda x: function(x).square().nan_to_num(0, 0, 0).sum()

    actual = torch.vmap(torch.func.grad(loss(ours)), in_dims=1)(x)
    expected = torch.stack([torch.func.grad(loss(by_row))(x[:, k]) for k in range(3)])
    torch.testing.assert_close(actual, expected)
    small = x[:, 0, 0]
    for hessian in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        torch.testing.assert_close(hessian(loss(ours))(small), hessian(loss(by_row))(small))


def test_vmap_over_the_segments_is_refused(device: str) -> None:
    x = torch.randn(11, device=device)
    pointers_of_each = torch.stack([PTR, PTR]).to(device)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"vmap|ptr"):
        torch.vmap(lambda ptr: OPS["softmax"](x, ptr))(pointers_of_each)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_compile(op: str, way: str, backend: str, device: str) -> None:
    def function(x: torch.Tensor, segments: dict[str, Any]) -> torch.Tensor:
        y = OPS[op](x * 2, **segments, scale=0.5, dtype=torch.float64)
        return y.exp().nan_to_num(0, 0, 0).sin()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    segments = on(device, WAYS[way])
    grads = []
    for each in (compiled, function):
        x = torch.arange(33.0, device=device).sin().view(11, 3).requires_grad_()
        y = each(x, segments)
        y.sum().backward()
        grads.append((y.detach(), x.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_dynamic_shapes_compile_once(device: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, ptr: OPS["softmax"](x, ptr), fullgraph=True, dynamic=True, backend=counter
    )
    for lengths in ([3, 4, 5], [2, 9], [1, 0, 7, 30]):
        ptr = pointers(lengths).to(device)
        x = torch.randn(int(ptr[-1]), 3, device=device)
        torch.testing.assert_close(compiled(x, ptr), OPS["softmax"](x, ptr))
    assert counter.frame_count == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, way: str, device: str) -> None:
    x = torch.randn(11, 3, device=device, requires_grad=True)
    segments = on(device, WAYS[way])
    ptr, index = segments.get("ptr"), segments.get("index")
    operator = getattr(torch.ops.softmax_ext, f"segment_{op}")
    args = (x, ptr, index, None, 0, 0.5, segments.get("num_segments"))
    torch.library.opcheck(operator.default, args)
    y = operator(*args).detach()
    backward = getattr(torch.ops.softmax_ext, f"segment_{op}_backward").default
    if op == "logsumexp":
        torch.library.opcheck(backward, (y, y, x.detach(), ptr, index, None, 0, 0.5))
    else:
        torch.library.opcheck(backward, (y, y, *args[1:]))


@pytest.mark.parametrize("op", OPS)
def test_fake_and_meta_tensors(op: str) -> None:
    shape = (6, 3) if op == "logsumexp" else (11, 3)
    with FakeTensorMode() as mode:
        x, index = mode.from_tensor(torch.randn(11, 3)), mode.from_tensor(INDEX)
        assert OPS[op](x, index=index, num_segments=6).shape == shape
        assert OPS[op](x, mode.from_tensor(PTR)).shape[1:] == shape[1:]
    x, index = torch.empty(11, 3, device="meta"), INDEX.to("meta")
    assert OPS[op](x, index=index, num_segments=6).shape == shape
    if op == "logsumexp":
        with pytest.raises(ValueError, match="num_segments"):
            OPS[op](x, index=index)


class Watched(TorchDispatchMode):
    """Sees each operator; what must see them gets the composition."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_composition(op: str, way: str, dtype: torch.dtype, device: str) -> None:
    """By torch's operators, as on devices without kernels; its gradient is theirs."""
    x = torch.randn(2, 11, 3, device=device).to(dtype).requires_grad_()
    segments = on(device, WAYS[way])
    with Watched() as watched:
        y = OPS[op](x, **segments, dim=1, scale=0.5)
    assert not any("softmax_ext" in call for call in watched.calls)
    assert_close(y.contiguous(), op, x, dim=1, scale=0.5, **segments)
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, x, grad)
    assert_gradient_close(actual, op, grad, x, dim=1, scale=0.5, **segments)


@pytest.mark.parametrize("op", OPS)
def test_composition_of_infinities_and_wrong_values(op: str, device: str) -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([-inf, -inf, 1.0, -inf, inf, 2.0, nan, 0.0, inf, nan], device=device)
    ptr = pointers([2, 2, 0, 2, 2, 2])
    with Watched():
        assert_close(OPS[op](x, ptr.to(device)), op, x, ptr=ptr)
        for wrong in (ptr + 1, ptr[:-1], ptr.flip(0)):
            with pytest.raises(RuntimeError, match="'ptr' must go from 0"):
                OPS[op](x, wrong.to(device))
        with pytest.raises(RuntimeError, match="'index' must have values from 0"):
            OPS[op](x, index=index_of(ptr).to(device), num_segments=5)


@pytest.mark.parametrize("op", OPS)
def test_backward_by_torchs_operators(op: str, device: str) -> None:
    """The operators' own composition, as the tangent's linear part has it."""
    x = torch.randn(11, 3, device=device, dtype=torch.float64)
    segments = on(device, WAYS["index"])
    jacobian = torch.func.jacfwd(lambda x: OPS[op](x, **segments, scale=0.5))(x)
    by_reverse = torch.func.jacrev(lambda x: OPS[op](x, **segments, scale=0.5))(x)
    torch.testing.assert_close(jacobian, by_reverse)


def test_compiled_logsumexp_of_an_index_needs_the_number_of_segments(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, index: OPS["logsumexp"](x, index=index), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="num_segments"):
        compiled(torch.randn(11, device=device), INDEX.to(device))


def test_the_segments_may_not_change_before_the_gradient(device: str) -> None:
    """As torch's index: a version that is not the saved one is an error, not a wrong gradient."""
    ptr = PTR.clone().to(device)
    x = torch.randn(11, device=device, requires_grad=True)
    y = OPS["softmax"](x, ptr)
    ptr.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_names_and_saved_tensors(device: str) -> None:
    x = torch.randn(11, device=device, requires_grad=True)
    node: Any = OPS["logsumexp"](x, PTR.to(device), scale=0.5).grad_fn
    assert type(node).__name__ == "SoftmaxExtSegmentLogsumexpBackward"
    assert torch.equal(node._saved_ptr.cpu(), PTR)
    assert (node._saved_dim, node._saved_scale) == (0, 0.5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_compiled_autograd(op: str, way: str, device: str) -> None:
    x = torch.randn(11, 3, device=device, requires_grad=True)
    segments = on(device, WAYS[way])
    grads = []
    for compiled in (False, True):
        y = OPS[op](x, **segments).sigmoid().sum()
        torch._dynamo.reset()
        compiler = torch.compile(backend="aot_eager", fullgraph=True)
        with compiled_autograd._enable(compiler) if compiled else nullcontext():
            y.backward()
        grads.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*grads)
