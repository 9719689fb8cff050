"""enable(), disable(), enabled(): torch's own softmax on these kernels, and back."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_threads_and_isa import run
from tolerances import FLOATING, OPS, OURS, TORCH

import softmax_ext


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    softmax_ext.disable()


# Where the two give other bits, so that which one ran can be seen.
def telling(device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(64, 1000, device=device) * 3).to(dtype)


WAYS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "torch.softmax": ("softmax", lambda x: torch.softmax(x, 1)),
    "torch.special.softmax": ("softmax", lambda x: torch.special.softmax(x, 1)),
    "Tensor.softmax": ("softmax", lambda x: x.softmax(1)),
    "F.softmax": ("softmax", lambda x: F.softmax(x, 1)),
    "nn.Softmax": ("softmax", lambda x: torch.nn.Softmax(1)(x)),
    "aten::_softmax": ("softmax", lambda x: torch.ops.aten._softmax(x, 1, False)),
    "out=": ("softmax", lambda x: torch.softmax(x, 1, out=torch.empty_like(x))),
    "torch.log_softmax": ("log_softmax", lambda x: torch.log_softmax(x, 1)),
    "nn.LogSoftmax": ("log_softmax", lambda x: torch.nn.LogSoftmax(1)(x)),
    "log, out=": ("log_softmax", lambda x: torch.log_softmax(x, 1, out=torch.empty_like(x))),
    "aten::_safe_softmax": ("softmax", lambda x: torch.ops.aten._safe_softmax(x, 1)),
}


@pytest.mark.parametrize("way", WAYS)
def test_forward(way: str, device: str) -> None:
    op, function = WAYS[way]
    x = telling(device)
    theirs, ours = function(x), OURS[op](x, 1)
    assert not torch.equal(theirs, ours)
    with softmax_ext.enabled():
        assert torch.equal(function(x), ours)
    assert torch.equal(function(x), theirs)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_backward_and_its_out_form(op: str, dtype: torch.dtype, device: str) -> None:
    y, grad = OURS[op](telling(device, dtype), 1), telling(device, dtype)
    backward = getattr(torch.ops.aten, f"_{op}_backward_data")
    name = "grad_input" if op == "softmax" else "out"
    leaf = telling(device, dtype).requires_grad_()
    (expected,) = torch.autograd.grad(OURS[op](leaf, 1), leaf, grad)
    with softmax_ext.enabled():
        (found,) = torch.autograd.grad(TORCH[op](leaf, 1), leaf, grad)
        result = backward(grad, y, 1, dtype)
        out = torch.empty(0, device=device, dtype=dtype)
        strided = torch.empty(1000, 64, device=device, dtype=dtype).t()
        backward.out(grad, y, 1, dtype, **{name: out})
        backward.out(grad, y, 1, dtype, **{name: strided})
        over = grad.clone()
        backward.out(over, y, 1, dtype, **{name: over})
    assert torch.equal(found, expected)
    for each in (out, strided, over):
        assert torch.equal(each, result)


def test_loss_attention_and_sdpa(device: str) -> None:
    """Of the library's own callers: other bits while on, the same values, and as before after."""
    x = telling(device)
    target = torch.arange(64, device=device)
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True).to(device)
    query = torch.randn(2, 50, 32, device=device, requires_grad=True)

    def sdpa() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, query, query)

    def attend() -> torch.Tensor:
        return attention(query, query, query)[1]

    for function in (lambda: F.cross_entropy(x, target), attend, sdpa):
        before = function()
        with softmax_ext.enabled():
            during = function()
        torch.testing.assert_close(during, before)
        assert torch.equal(function(), before)


# Keyword arguments of F.cross_entropy, and what is made of class indices as targets.
LOSSES: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "plain": ({}, lambda y: y),
    "none": ({"reduction": "none"}, lambda y: y),
    "sum": ({"reduction": "sum", "ignore_index": 7}, lambda y: y),
    "smoothing": ({"label_smoothing": 0.1}, lambda y: y),
    "weights": ({"weight": torch.linspace(0.1, 2, 1000)}, lambda y: y),
    "probabilities": ({}, lambda y: F.one_hot(y, 1000).float() * 0.5 + 0.0005),
}


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy(name: str, device: str) -> None:
    """Loss and gradient have the bits of our function's, also of the module and of the rows of
    linear_cross_entropy; in inference mode; and by torch's kernels again after."""
    kwargs, make = LOSSES[name]
    if name == "probabilities" and device == "cuda":
        pytest.skip("composed there by torch, and by our function")
    kwargs = {k: v.to(device) if k == "weight" else v for k, v in kwargs.items()}
    x = telling(device).requires_grad_()
    target = make(torch.arange(64, device=device))

    def loss_and_gradient(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss = function(x, target, **kwargs)
        return loss.detach(), *torch.autograd.grad(loss.sum(), x)

    theirs = loss_and_gradient(F.cross_entropy)
    ours = loss_and_gradient(softmax_ext.cross_entropy)
    assert not torch.equal(theirs[1], ours[1])
    with softmax_ext.enabled():
        found = loss_and_gradient(F.cross_entropy)
        module = loss_and_gradient(lambda x, y, **kwargs: torch.nn.CrossEntropyLoss(**kwargs)(x, y))
        with torch.inference_mode():
            assert torch.equal(F.cross_entropy(x, target, **kwargs), ours[0])
        if hasattr(F, "linear_cross_entropy"):
            loss = F.linear_cross_entropy(x, torch.eye(1000, device=device), target, **kwargs)
            assert torch.equal(loss, ours[0])
            assert loss.grad_fn.name().startswith("SoftmaxExtCrossEntropy")
    for these in (found, module):
        assert all(map(torch.equal, these, ours))
    assert all(map(torch.equal, loss_and_gradient(F.cross_entropy), theirs))


def test_cross_entropy_below_autograd() -> None:
    """Within another function's forward nothing is recorded, as of torch's own operators there."""

    class Below(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
                loss = F.cross_entropy(x, torch.arange(64))
            assert loss.grad_fn is None
            return loss

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad.new_ones(64, 1000)

    x = telling("cpu").requires_grad_()
    with softmax_ext.enabled():
        loss = Below.apply(x)
    assert torch.equal(loss, softmax_ext.cross_entropy(x, torch.arange(64)))
    loss.backward()
    assert torch.equal(x.grad, torch.ones(64, 1000))


def test_cross_entropy_under_transforms_and_in_programs() -> None:
    """What something above the kernels must see is composed by torch, as without the switch."""
    x, y = torch.randn(4, 3, 5), torch.tensor([0, 1, 2])

    def f(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, y, label_smoothing=0.1)

    def all_of_them() -> Iterator[torch.Tensor]:
        yield torch.vmap(f)(x)
        yield torch.vmap(torch.func.grad(f))(x)
        yield torch.func.hessian(f)(x[0])
        yield from torch.func.jvp(f, (x[0],), (x[1],))
        yield torch.compile(f, backend="aot_eager", fullgraph=True)(x[0])
        yield torch.jit.trace(f, x[0])(x[1])
        with torch.autocast("cpu"):
            yield f(x[0].bfloat16())
        exported = torch.export.export(torch.nn.CrossEntropyLoss(), (x[0], y))
        operators = {node.target for node in exported.graph.nodes if node.op == "call_function"}
        assert operators == {torch.ops.aten.cross_entropy_loss.default}
        yield exported.module()(x[0], y)

    expected = list(all_of_them())
    with softmax_ext.enabled():
        torch.testing.assert_close(list(all_of_them()), expected)
    torch._dynamo.reset()


def test_what_the_kernels_do_not_take(device: str) -> None:
    """torch's own results and errors: dtypes, dims, layouts, and a cast that only CUDA has."""
    cases: list[Callable[[], torch.Tensor]] = [
        lambda: torch.softmax(torch.ones(3, dtype=torch.int64, device=device), 0),
        lambda: torch.softmax(torch.ones(3, dtype=torch.complex64, device=device), 0),
        lambda: torch.softmax(torch.ones(3, device=device), 1),
        lambda: torch.ops.aten._softmax(torch.ones(3, dtype=torch.half, device=device), 0, True),
        lambda: torch.softmax(torch.ones(3, device=device), 0, out=torch.ones(3).long()),
        lambda: torch.ops.aten._softmax_backward_data(
            torch.ones(3, device=device), torch.ones(3, device=device).double(), 0, torch.float32
        ),
        lambda: torch.ops.aten._softmax_backward_data(
            torch.ones(3, device=device), torch.ones(4, device=device), 0, torch.float32
        ),
        lambda: torch.softmax(torch.ones(2, 3).to_sparse(), 1).to_dense(),
        lambda: torch.softmax(torch.ones(2, 3, device="meta"), 1),
        lambda: F.cross_entropy(
            torch.ones(2, 3, device="meta"), torch.ones(2, device="meta").long()
        ),
        lambda: F.cross_entropy(
            torch.ones(2, 3, device=device), torch.ones(3, device=device).long()
        ),
        lambda: F.cross_entropy(
            torch.ones(2, 3, device=device), torch.ones(2, device=device).int()
        ),
        lambda: F.cross_entropy(torch.ones(3, device=device), torch.ones((), device=device).byte()),
        lambda: F.cross_entropy(
            torch.ones(2, 3, device=device),
            torch.ones(2, device=device).long(),
            torch.ones(3, device=device, requires_grad=True),
        ),
        lambda: F.cross_entropy(
            torch.ones(2, 3, device=device), torch.ones(2, 3, device=device), ignore_index=1
        ),
        lambda: F.cross_entropy(
            torch.ones(3, device=device), torch.tensor(0, device=device), label_smoothing=1.5
        ),
    ]
    for case in cases:
        outcomes = []
        for on in (False, True):
            softmax_ext.enable() if on else softmax_ext.disable()
            try:
                result = case()
                outcomes.append((result.dtype, result.shape, result.device))
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


def is_on() -> bool:
    x = telling("cpu")
    on = torch.equal(torch.softmax(x, 1), softmax_ext.softmax(x, 1))
    assert softmax_ext.is_enabled() is on
    return on


def test_nesting_and_exceptions() -> None:
    assert not is_on()
    softmax_ext.disable()  # twice off is off
    softmax_ext.enable()
    softmax_ext.enable()
    assert is_on()
    softmax_ext.disable()
    assert not is_on()
    with softmax_ext.enabled():
        with softmax_ext.enabled():
            assert is_on()
        assert is_on()
        softmax_ext.disable()  # not before the block ends
        assert is_on()
    assert not is_on()
    with pytest.raises(KeyError), softmax_ext.enabled():
        raise KeyError
    assert not is_on()
    softmax_ext.enable()
    with softmax_ext.enabled():
        pass
    assert is_on()

    softmax_ext.disable()
    decorated = softmax_ext.enabled()(is_on)
    assert decorated()
    assert decorated()
    assert not is_on()


def test_threads() -> None:
    """Contexts that come and go in some threads while others compute: always one of two results."""
    x = telling("cpu")
    possible = [torch.softmax(x, 1), softmax_ext.softmax(x, 1)]
    wrong: list[torch.Tensor] = []

    def work(switching: bool) -> None:
        for _ in range(200):
            if switching:
                with softmax_ext.enabled():
                    y = torch.softmax(x, 1)
                    if not torch.equal(y, possible[1]):
                        wrong.append(y)
            else:
                y = torch.softmax(x, 1)
                if not any(torch.equal(y, each) for each in possible):
                    wrong.append(y)

    threads = [threading.Thread(target=work, args=(k % 2 == 0,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not is_on()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no setitimer")
def test_signal_handler() -> None:
    """Its `enabled` may come while the thread that it interrupts is in another's first line."""
    calls, deadline = 0, time.monotonic() + 10

    def handler(*args: object) -> None:
        nonlocal calls
        if time.monotonic() > deadline:
            raise TimeoutError
        calls += 1
        with softmax_ext.enabled():
            assert softmax_ext.is_enabled()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        while calls < 200:
            with softmax_ext.enabled():
                assert softmax_ext.is_enabled()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not is_on()


@pytest.mark.parametrize("op", OPS)
def test_under_autograd_and_transforms(op: str, device: str) -> None:
    """torch's own rules stay, above the kernels."""
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    with softmax_ext.enabled():
        assert torch.autograd.gradcheck(
            lambda x: TORCH[op](x, 1),
            x,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(lambda x: TORCH[op](x, 1), x, check_fwd_over_rev=True)
        hessian = torch.func.hessian(lambda x: TORCH[op](x, 1).square().sum())(x.detach())
        compiled = torch.compile(lambda x: TORCH[op](x, 1), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), OURS[op](x, 1))
    torch._dynamo.reset()
    expected = torch.func.hessian(lambda x: TORCH[op](x, 1).square().sum())(x.detach())
    torch.testing.assert_close(hessian, expected)


def test_half_to_float_on_a_gpu(device: str) -> None:
    if device != "cuda":
        pytest.skip("torch has this cast on CUDA only")
    x = telling(device, torch.float16).requires_grad_()
    expected = softmax_ext.softmax(x, 1, dtype=torch.float32)
    with softmax_ext.enabled():
        y = torch.softmax(x, 1, dtype=torch.float32)
        (grad,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(y, expected)
    assert torch.equal(grad, torch.autograd.grad(expected, x, y.detach())[0])


def test_no_warning_and_no_change_at_import() -> None:
    """Importing changes no operator; enabling one prints nothing."""
    script = """
import sys, warnings
warnings.simplefilter("error")
import torch
names = ("aten::_softmax", "aten::cross_entropy_loss")
before = [torch._C._dispatch_dump(name) for name in names]
import softmax_ext
assert [torch._C._dispatch_dump(name) for name in names] == before
softmax_ext.enable()
x = torch.randn(64, 1000)
assert torch.equal(torch.softmax(x, 1), softmax_ext.softmax(x, 1))
"""
    process = run(script)
    assert process.returncode == 0, process.stderr
    assert process.stdout == process.stderr == ""
