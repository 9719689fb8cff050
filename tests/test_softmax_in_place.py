"""softmax_ and log_softmax_: results, gradients, memory, torch's rules for what is in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_softmax_layout import LAYOUTS
from tolerances import FLOATING, OPS, OURS, TORCH

import softmax_ext

IN_PLACE: dict[str, Callable[..., torch.Tensor]] = {
    "softmax": softmax_ext.softmax_,
    "log_softmax": softmax_ext.log_softmax_,
    "softmin": softmax_ext.softmin_,
}
MODULES = {
    "softmax": softmax_ext.Softmax,
    "log_softmax": softmax_ext.LogSoftmax,
    "softmin": softmax_ext.Softmin,
}


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


@pytest.mark.parametrize("op", IN_PLACE)
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


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize("dim", [0, 1])
def test_gradient(dim: int, op: str, device: str) -> None:
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        IN_PLACE[op](y, dim)
        return y.clone()

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("op", IN_PLACE)
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


@pytest.mark.parametrize("op", IN_PLACE)
def test_leaves_and_views_of_leaves(op: str, device: str) -> None:
    """Refused as torch refuses exp_, word for word; allowed without a graph."""
    leaf = torch.randn(3, 4, device=device, requires_grad=True)
    for tensor in (leaf, leaf[1:], leaf.detach().requires_grad_().split(1)[0]):
        assert error_of(lambda t=tensor: IN_PLACE[op](t, 0)) == error_of(lambda t=tensor: t.exp_())
    expected = OURS[op](leaf.detach(), 0)
    with torch.no_grad():
        IN_PLACE[op](leaf, 0)
    assert torch.equal(leaf, expected)


@pytest.mark.parametrize("op", IN_PLACE)
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


@pytest.mark.parametrize("op", IN_PLACE)
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


BASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a view": lambda x: (x * 1)[1:],
    "a view of a view": lambda x: (x * 1)[1:].t(),
    "a view made without a graph": lambda x: no_grad(x * 1, lambda y: y[1:]),
    "a view of several outputs": lambda x: (x * 1).unbind()[0],
    "a view of a leaf made without a graph": lambda x: no_grad(x, lambda y: y[1:]),
    "a view made in inference mode": lambda x: inference(x * 1, lambda y: y[1:]),
    "a detached view": lambda x: (x * 1).detach()[1:],
}


def no_grad(x: torch.Tensor, view: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return view(x)


def inference(x: torch.Tensor, view: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return view(x)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("op", IN_PLACE)
def test_how_the_view_was_made(op: str, base: str, device: str) -> None:
    """What torch allows exp_, and what it refuses it, word for word."""
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    outcomes: list[Any] = []
    for function in (lambda t: IN_PLACE[op](t, 0), torch.Tensor.exp_):
        view = BASES[base](x)
        try:
            function(view)
            outcomes.append((view.requires_grad, view.is_leaf, view._base is None))
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("op", IN_PLACE)
def test_allow_mutation_on_saved_tensors(op: str, device: str) -> None:
    """What is saved is copied when it is changed, the output in place too."""
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    (expected,) = torch.autograd.grad((TORCH[op](x * 2, 1) * weights).sum(), x)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        for function in (OURS[op], IN_PLACE[op]):
            y = function(x * 2, 1)
            loss = (y * weights).sum()
            y.zero_()
            (grad,) = torch.autograd.grad(loss, x)
            torch.testing.assert_close(grad, expected)


# What is refused, of each kind: made of a float32 tensor of shape (3, 4); and the dim.
REFUSED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Any]] = {
    "dim out of range": (lambda x: x, 2),
    "dim no integer": (lambda x: x, 1.0),
    "no dim, where warnings are errors": (lambda x: x, None),
    "integers": (lambda x: x.long(), 0),
    "a leaf": (lambda x: x.requires_grad_(), 0),
    "a view of a leaf": (lambda x: x.requires_grad_()[1:], 0),
    "one view of several": (lambda x: (x.requires_grad_() * 1).unbind()[0], 0),
    "an expanded tensor": (lambda x: x[:1].expand(3, 4), 0),
    "an inference tensor": (lambda x: inference(x, torch.clone), 0),
    "an inference tensor that torch takes": (
        lambda x: inference(x, lambda t: torch._neg_view(t.clone())),
        0,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.filterwarnings("error:Implicit")
def test_what_is_refused_is_not_changed(op: str, case: str, device: str) -> None:
    """Neither the values nor the version; by the module as by the function."""
    make, dim = REFUSED[case]
    for function in (IN_PLACE[op], lambda x, dim: MODULES[op](dim, inplace=True)(x)):
        x = make(torch.randn(3, 4, device=device))
        before, version = x.detach().clone(), None if x.is_inference() else x._version
        with pytest.raises((RuntimeError, IndexError, TypeError, UserWarning)):
            function(x, dim)
        assert torch.equal(x, before)
        assert version is None or x._version == version


AROUND: dict[str, Callable[[Callable[[torch.Tensor], Any], torch.Tensor], Any]] = {
    "autocast": lambda f, x: torch.autocast(x.device.type, torch.bfloat16)(f)(x),
    "a tangent": lambda f, x: torch.func.jvp(f, (x,), (x.clone(),)),
    "vmap": lambda f, x: torch.vmap(f)(x.expand(1, 3, 4)),
    "torch.compile": lambda f, x: torch.compile(f, backend="aot_eager", fullgraph=True)(x),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_refused_within_is_not_changed(op: str, around: str, device: str) -> None:
    x = torch.randn(3, 4, device=device)
    before = x.clone()
    for function in (IN_PLACE[op], lambda x, dim: MODULES[op](dim, inplace=True)(x)):
        # What is raised while tracing is another error up to torch 2.12.
        with pytest.raises((IndexError, torch._dynamo.exc.TorchRuntimeError)):
            AROUND[around](lambda x, f=function: f(x, 2), x)
        assert torch.equal(x, before)
        assert x._version == 0


def test_softmax2d_of_another_rank_is_not_changed(device: str) -> None:
    x = torch.randn(3, 4, device=device)
    before = x.clone()
    with pytest.raises(ValueError, match="3D or 4D"):
        softmax_ext.Softmax2d(inplace=True)(x)
    assert torch.equal(x, before)
    assert x._version == 0


@pytest.mark.parametrize("op", IN_PLACE)
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
    assert y.grad_fn is not None
    y.grad_fn(torch.randn_like(y))
    assert torch.cuda.max_memory_allocated() - before <= 2.1 * x.nbytes
