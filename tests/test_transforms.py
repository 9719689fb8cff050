"""With torch's other machinery: transforms, fake and meta tensors, subclasses, autocast.

Each result equals what torch's own function gives in the same place.
"""

import copy
import re
import warnings
from typing import Any, ClassVar

import pytest
import torch
from tolerances import FLOATING, OPS, OURS, TORCH
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

EVERY = [*OPS, "softmin"]


@pytest.fixture(autouse=True)
def without_torchs_deprecation_warnings() -> Any:
    """torch.func imports torch.jit, which deprecates itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize(("in_dims", "dim"), [(0, 0), (0, 1), (1, 0), (2, -1), (-1, 0)])
def test_vmap(in_dims: int, dim: int, op: str, device: str) -> None:
    input = torch.randn(3, 4, 5, device=device)
    for dtype in (None, torch.float64):
        ours, theirs = (
            torch.vmap(lambda x, f=f[op], t=dtype: f(x, dim, dtype=t), in_dims=in_dims)(input)
            for f in (OURS, TORCH)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("op", EVERY)
def test_vmap_twice_and_out_dims(op: str, device: str) -> None:
    input = torch.randn(3, 4, 5, device=device)
    ours, theirs = (
        torch.vmap(torch.vmap(lambda x, f=f[op]: f(x, 0)), out_dims=1)(input) for f in (OURS, TORCH)
    )
    torch.testing.assert_close(ours, theirs)


# A row of whole registers and more, of a part of one; columns of one and of several chunks.
SHAPES = [(2, 3, 37), (3, 64, 5), (5, 300, 40), (2, 3, 1000)]


def without_vmap(batch_dim: int, dim: int) -> int:
    """The dim of all samples together that `dim` is of one."""
    return dim if dim < batch_dim else dim + 1


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("batch_dim", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_under_vmap(
    shape: tuple[int, ...], batch_dim: int, op: str, dtype: torch.dtype, device: str
) -> None:
    """Those of the same memory without, of a result and of a gradient; contiguous and not."""
    input = torch.randn(shape, device=device).to(dtype)
    weights = torch.randn(shape, device=device).to(dtype)
    for x in (input, input.transpose(0, 2).contiguous().transpose(0, 2)):
        for dim in (0, 1):

            def function(x: torch.Tensor, dim: int = dim) -> torch.Tensor:
                return OURS[op](x, dim)

            def gradient(x: torch.Tensor, w: torch.Tensor, f: Any = function) -> torch.Tensor:
                return torch.func.vjp(f, x)[1](w)[0]

            found = torch.vmap(function, batch_dim, batch_dim)(x)
            leaf = x.clone().requires_grad_()
            expected = OURS[op](leaf, without_vmap(batch_dim, dim))
            assert torch.equal(found, expected)
            assert found.is_contiguous()
            (grad,) = torch.autograd.grad(expected, leaf, weights)
            assert torch.equal(torch.vmap(gradient, batch_dim, batch_dim)(x, weights), grad)


@pytest.mark.parametrize("op", EVERY)
def test_bits_under_several_vmaps(op: str, device: str) -> None:
    """One within another, over any dims, and a sample alone where each lies in memory as one."""
    x = torch.randn(3, 4, 5, 37, device=device)
    for outer in range(4):
        for inner in range(3):
            mapped = torch.vmap(lambda x: OURS[op](x, 1), inner, inner)
            dims = [dim for dim in range(4) if dim != outer]
            dims.remove(dims[inner])
            found = torch.vmap(mapped, outer, outer)(x)
            assert torch.equal(found, OURS[op](x, dims[1]))
    alone = torch.stack([torch.stack([OURS[op](each, 1) for each in part]) for part in x])
    assert torch.equal(torch.vmap(torch.vmap(lambda x: OURS[op](x, 1)))(x), alone)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batched", ["grad_output", "output", "both, over other dims"])
def test_vmap_of_the_backward_operator(batched: str, op: str, device: str) -> None:
    """Where one of the two is the same for all samples, and where their batch dims differ."""
    operator = getattr(torch.ops.softmax_ext, f"{op}_backward")
    g, y = torch.randn(3, 4, 5, device=device), OURS[op](torch.randn(3, 4, 5, device=device), 1)
    if batched == "grad_output":
        args, in_dims = (g, y[0]), (0, None)
        each = [operator(a, y[0], 0, torch.float32) for a in g]
    elif batched == "output":
        args, in_dims = (g[0], y), (None, 0)
        each = [operator(g[0], b, 0, torch.float32) for b in y]
    else:
        args, in_dims = (g.movedim(0, 2).contiguous(), y), (2, 0)
        each = [operator(a, b, 0, torch.float32) for a, b in zip(g, y, strict=True)]
    found = torch.vmap(lambda a, b: operator(a, b, 0, torch.float32), in_dims)(*args)
    torch.testing.assert_close(found, torch.stack(each))
    with pytest.raises(RuntimeError, match="same size"):
        torch.vmap(lambda a, b: operator(a, b, 0, torch.float32), (2, None))(g, y[0, 0])


@pytest.mark.parametrize("op", EVERY)
def test_vmap_of_numbers(op: str, device: str) -> None:
    """A sample of no dims is a row of one element, in both passes and with a tangent."""
    x = torch.randn(3, device=device, dtype=torch.float64)
    for dim in (0, -1):

        def apply(functions: Any, dim: int = dim) -> Any:
            def function(x: torch.Tensor) -> torch.Tensor:
                return functions[op](x, dim)

            func = torch.func
            return (
                torch.vmap(function)(x),
                torch.vmap(func.grad(function))(x),
                torch.vmap(lambda x: func.jvp(function, (x,), (x,)))(x),
            )

        torch.testing.assert_close(apply(OURS), apply(TORCH))
    with pytest.raises(IndexError, match="out of range"):
        torch.vmap(lambda x: OURS[op](x, 1))(x)


@pytest.mark.parametrize("op", EVERY)
def test_vmap_over_nothing_of_it(op: str, device: str) -> None:
    """The input is of an outer vmap, or of none."""
    x, other = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    for apply in (
        lambda f: torch.vmap(lambda a: torch.vmap(lambda b: f(a, 0) + b)(other))(x),
        lambda f: torch.vmap(lambda b: f(x[0], 0) + b)(other),
        lambda f: torch.vmap(
            lambda a: torch.func.grad(lambda w: torch.vmap(lambda b: f(a, 0) * w * b)(other).sum())(
                a
            )
        )(x),
    ):
        torch.testing.assert_close(apply(OURS[op]), apply(TORCH[op]))


@pytest.mark.parametrize("op", EVERY)
def test_errors_under_transforms(op: str, device: str) -> None:
    """torch's types: of a call that is wrong, and of a tensor that left the function it was of."""
    x = torch.randn(3, 4, 5, device=device)
    left: list[torch.Tensor] = []
    torch.vmap(lambda x: left.append(x) or x)(x)  # type: ignore[func-returns-value]
    calls: list[Any] = [
        lambda f: torch.vmap(lambda x: f(x, 2))(x),
        lambda f: torch.vmap(lambda x: f(x.long(), 0))(x),
        lambda f: torch.func.jvp(lambda x: f(x, 3), (x,), (x,)),
        lambda f: f(left[0], 0),
    ]
    for call in calls:
        with pytest.raises(Exception) as expected:  # noqa: PT011
            call(TORCH[op])
        with pytest.raises(expected.type):
            call(OURS[op])


@pytest.mark.parametrize("op", OPS)
def test_out_under_transforms(op: str, device: str) -> None:
    """Refused as by torch, word for word."""
    x = torch.randn(3, 4, device=device)
    calls: list[Any] = [
        lambda f: torch.vmap(lambda x: f(x, 0, out=torch.empty_like(x)))(x),
        lambda f: torch.func.jvp(lambda x: f(x, 0, out=torch.empty_like(x)), (x,), (x,)),
    ]
    for call in calls:
        messages = []
        for function in (OURS[op], getattr(torch, op)):
            with pytest.raises(RuntimeError) as caught:
                call(function)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def softmaxes_run(function: Any) -> set[str]:
    """The softmax operators that run in a call, torch's and ours."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = profile.events()
    assert events is not None
    return {event.name for event in events if re.fullmatch(r"\w+::\w*softmax\w*", event.name)}


RULES: dict[str, tuple[set[str], Any]] = {
    "vmap": ({""}, lambda f, x: torch.vmap(f, 1)(x)),
    "vmap in autocast": (
        {""},
        lambda f, x: torch.autocast(x.device.type, torch.bfloat16)(torch.vmap(f))(x),
    ),
    "in autocast": ({""}, lambda f, x: torch.autocast(x.device.type, torch.bfloat16)(f)(x)),
    "jvp": ({"", "_backward"}, lambda f, x: torch.func.jvp(f, (x,), (x,))),
    "grad": ({"", "_backward"}, lambda f, x: torch.func.grad(lambda x: f(x).prod())(x)),
    "jacfwd": ({"", "_backward"}, lambda f, x: torch.func.jacfwd(f)(x)),
    "jacrev": ({"", "_backward"}, lambda f, x: torch.func.jacrev(f)(x)),
    "forward over reverse": (
        {"", "_backward"},
        lambda f, x: torch.func.hessian(lambda x: f(x).prod())(x),
    ),
    "reverse over forward": (
        {"", "_backward"},
        lambda f, x: torch.func.jacrev(torch.func.jacfwd(lambda x: f(x).prod()))(x),
    ),
    "batched gradients": (
        {"", "_backward"},
        lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("op", OPS)
def test_only_our_operators_run(op: str, rule: str, device: str) -> None:
    """Where torch's transforms must see a call; log-softmax has a tangent of its own."""
    ends, apply = RULES[rule]
    x = torch.randn(3, 4, device=device, dtype=torch.float64)
    expected = {f"softmax_ext::{op}{end}" for end in ends}
    if op == "log_softmax" and rule in ("jvp", "jacfwd"):
        expected.remove("softmax_ext::log_softmax_backward")
    assert softmaxes_run(lambda: apply(lambda x: OURS[op](x, 0), x)) == expected


def test_batched_gradients_are_one_call(device: str) -> None:
    """Not one for each of the batch."""
    leaf = torch.randn(3, 4, device=device, requires_grad=True)
    output = OURS["softmax"](leaf, 1)
    basis = torch.eye(12, device=device).view(12, 3, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(output, leaf, basis, is_grads_batched=True)
    events = profile.events()
    assert events is not None
    calls = [event for event in events if event.name == "softmax_ext::softmax_backward"]
    # Of the batch, and the same for all of it.
    assert len(calls) == 2


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize(
    "transform", ["grad", "vmap_grad", "jvp", "vjp", "jacrev", "jacfwd", "hessian"]
)
def test_func(transform: str, op: str, device: str) -> None:
    input = torch.randn(3, 4, device=device, dtype=torch.float64)
    weights = torch.randn(3, 4, device=device, dtype=torch.float64)

    def apply(function: Any) -> Any:
        def loss(x: torch.Tensor) -> torch.Tensor:
            return (function(x, -1) * weights[0]).pow(2).sum()

        func = torch.func
        if transform == "grad":
            return func.grad(loss)(input)
        if transform == "vmap_grad":
            return torch.vmap(func.grad(loss))(input)
        if transform == "jvp":
            return func.jvp(lambda x: function(x, 1), (input,), (weights,))
        if transform == "vjp":
            return func.vjp(lambda x: function(x, 1), input)[1](weights)
        return getattr(func, transform)(
            loss if transform == "hessian" else lambda x: function(x, 1)
        )(input)

    torch.testing.assert_close(apply(OURS[op]), apply(TORCH[op]))


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck_of_forward_mode_and_batched_gradients(dim: int, op: str, device: str) -> None:
    input = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: OURS[op](x, dim),
        input,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        lambda x: OURS[op](x, dim), input, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(3, 4), (1, 3), (4, 1)], ids=str)
def test_gradcheck_of_the_backward_operator(
    shape: tuple[int, int], dim: int, op: str, device: str
) -> None:
    """Its own tangent and gradients, of both of its tensors."""
    operator = getattr(torch.ops.softmax_ext, f"{op}_backward")

    def function(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return operator(g, y, dim, torch.float64)

    g = torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)
    y = OURS[op](torch.randn_like(g), dim).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        function,
        (g, y),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        function, (g, y), check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", EVERY)
def test_tangents_are_rounded_once(op: str, dtype: torch.dtype, device: str) -> None:
    """Of the result's dtype, also where that is another than the input's."""
    x, t = (torch.randn(37, 20, device=device).to(dtype) for _ in range(2))
    for dim in (0, 1):
        for result in (dtype, torch.float32):
            (y, found), (_, expected) = (
                torch.func.jvp(
                    lambda x, f=f, r=r, d=dim: f[op](x, d, dtype=r), (x.to(s),), (t.to(s),)
                )
                for f, r, s in ((OURS, result, dtype), (TORCH, torch.float64, torch.float64))
            )
            assert found.dtype == y.dtype == result
            # Of the output as it is rounded, which the tangent is made of.
            eps = torch.finfo(dtype if result == dtype else torch.float32).eps
            torch.testing.assert_close(found.double(), expected, rtol=2 * eps, atol=8 * eps)


@pytest.mark.parametrize("op", EVERY)
def test_dual_tensor(op: str, device: str) -> None:
    """A tangent is never silently dropped."""
    primal = torch.randn(3, 4, device=device)
    tangent = torch.randn(3, 4, device=device)
    results = []
    for functions in (OURS, TORCH):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(primal, tangent)
            results.append(tuple(forward_ad.unpack_dual(functions[op](dual, 1))))
    assert results[0][1] is not None
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("op", EVERY)
def test_tangent_through_the_graph(op: str, device: str) -> None:
    """Forward over reverse: the gradient of a graph made with a dual input has a tangent."""
    primal = torch.randn(3, 4, device=device, dtype=torch.float64)
    tangent = torch.randn(3, 4, device=device, dtype=torch.float64)
    results = []
    for functions in (OURS, TORCH):
        with forward_ad.dual_level():
            x = primal.clone().requires_grad_()
            dual = forward_ad.make_dual(x, tangent)
            (grad,) = torch.autograd.grad(
                functions[op](dual, 1).pow(2).sum(), dual, create_graph=True
            )
            results.append(tuple(forward_ad.unpack_dual(grad)))
    assert results[0][1] is not None
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("op", EVERY)
def test_batched_grad_outputs(op: str, device: str) -> None:
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    basis = torch.eye(12, device=device, dtype=torch.float64).view(12, 3, 4)
    ours, theirs = (
        torch.autograd.grad(f[op](x, 1), x, basis, is_grads_batched=True)[0] for f in (OURS, TORCH)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("op", EVERY)
def test_functional_call_of_per_sample_gradients(op: str, device: str) -> None:
    model = torch.nn.Linear(4, 3).to(device)
    params = {k: v.detach() for k, v in model.named_parameters()}
    input = torch.randn(5, 4, device=device)
    results = []
    for functions in (OURS, TORCH):

        def loss(p: Any, x: torch.Tensor, function: Any = functions[op]) -> torch.Tensor:
            return function(torch.func.functional_call(model, p, (x,)), 0)[0]

        results.append(torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, input))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_meta(dtype: torch.dtype | None, op: str) -> None:
    for input in (
        torch.empty(3, 5, device="meta"),
        torch.empty(5, 3, device="meta").t(),
        torch.empty(2**33, 4, device="meta"),
        torch.empty((), device="meta"),
        torch.empty(0, 4, device="meta", requires_grad=True),
    ):
        ours, theirs = OURS[op](input, -1, dtype=dtype), TORCH[op](input, -1, dtype=dtype)
        for property in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(ours, property) == getattr(theirs, property)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("op", EVERY)
def test_meta_backward(op: str) -> None:
    input = torch.empty(3, 5, device="meta", requires_grad=True)
    OURS[op](input, 1).sum().backward()
    assert input.grad is not None
    assert input.grad.shape == (3, 5)
    assert input.grad.is_meta


@pytest.mark.parametrize("op", EVERY)
def test_fake_tensor(op: str, device: str) -> None:
    real = torch.randn(3, 5, device=device)
    with FakeTensorMode() as mode:
        for fake in (mode.from_tensor(real), torch.empty(3, 5, device=device)):
            x = fake.detach().requires_grad_()
            ours, theirs = OURS[op](x, 1), TORCH[op](x, 1)
            assert type(ours) is type(theirs)
            assert (ours.shape, ours.dtype, ours.device) == (
                theirs.shape,
                theirs.dtype,
                theirs.device,
            )
            (grad,) = torch.autograd.grad(ours.sum(), x)
            assert type(grad) is type(theirs)
            assert grad.shape == (3, 5)


class Counting(torch.Tensor):
    """A subclass with the default __torch_function__, which counts the calls."""

    calls: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("op", EVERY)
def test_subclass(op: str, device: str) -> None:
    """__torch_function__ is called with a function of this name, and its result is returned."""
    input = torch.randn(3, 5, device=device)
    Counting.calls.clear()
    result = OURS[op](input.as_subclass(Counting), 1)
    assert type(result) is Counting
    assert op in [getattr(f, "__name__", None) for f in Counting.calls]
    torch.testing.assert_close(result.as_subclass(torch.Tensor), TORCH[op](input, 1))


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "handled"


@pytest.mark.parametrize("op", EVERY)
def test_subclass_that_returns_something_else(op: str, device: str) -> None:
    input = torch.randn(3, 5, device=device).as_subclass(Refusing)
    assert OURS[op](input, 1) == TORCH[op](input, 1) == "handled"
    assert OURS[op](input) == "handled"


@pytest.mark.parametrize("op", EVERY)
def test_parameter(op: str, device: str) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 5, device=device))
    result = OURS[op](parameter, 1)
    assert type(result) is torch.Tensor
    assert result.requires_grad


@pytest.mark.parametrize("op", EVERY)
def test_torch_function_mode(op: str, device: str) -> None:
    """A mode sees the call, as it sees torch's."""

    class Mode(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    input = torch.randn(3, 5, device=device)
    with Mode() as mode:
        result = OURS[op](input, 1)
    assert any("softm" in name for name in mode.names)
    torch.testing.assert_close(result, TORCH[op](input, 1))


@pytest.mark.parametrize("op", EVERY)
def test_torch_dispatch_mode(op: str, device: str) -> None:
    """A mode that rewrites operators sees a softmax operator, forward and backward."""

    class Mode(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    input = torch.randn(3, 5, device=device, requires_grad=True)
    weights = torch.randn(3, 5, device=device)
    with Mode() as mode:
        result = OURS[op](input, 1)
        (grad,) = torch.autograd.grad(result, input, weights)
    assert any("softmax" in name and "backward" not in name for name in mode.names)
    assert any("softmax" in name and "backward" in name for name in mode.names)
    expected = TORCH[op](input, 1)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, input, weights)[0])


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(amp: torch.dtype, op: str, device: str) -> None:
    """The result's dtype under autocast is torch's, on each device."""
    for dtype in FLOATING:
        input = torch.randn(3, 5, device=device).to(dtype)
        with torch.autocast(device, dtype=amp):
            ours, theirs = OURS[op](input, 1), TORCH[op](input, 1)
            cast = OURS[op](input, 1, dtype=torch.float64)
        assert ours.dtype == theirs.dtype
        assert cast.dtype == torch.float64
        tolerance = 2 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", EVERY)
def test_autocast_of_a_model(op: str, device: str) -> None:
    model = torch.nn.Linear(8, 4).to(device)
    input = torch.randn(16, 8, device=device)
    grads = []
    for functions in (OURS, TORCH):
        each = copy.deepcopy(model)
        with torch.autocast(device, dtype=torch.bfloat16):
            output = functions[op](each(input), 1)
            loss = (output.float() * input[:, :4]).sum()
        loss.backward()
        assert each.weight.grad is not None
        grads.append((output, each.weight.grad))
    assert grads[0][0].dtype == grads[1][0].dtype
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("op", OPS)
def test_types_that_only_torch_takes(op: str) -> None:
    """uint16 with a dtype, MKL-DNN and nested tensors: torch's own operator does them."""
    small = torch.tensor([1, 2, 60000], dtype=torch.uint16)
    torch.testing.assert_close(
        OURS[op](small, 0, dtype=torch.float32), TORCH[op](small, 0, dtype=torch.float32)
    )
    jagged = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    ours, theirs = OURS[op](jagged, -1), TORCH[op](jagged, -1)
    for a, b in zip(ours.unbind(), theirs.unbind(), strict=True):
        torch.testing.assert_close(a, b)


def test_mkldnn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without MKL-DNN")
    input = torch.randn(3, 5)
    result = OURS["softmax"](input.to_mkldnn(), 1)
    assert result.is_mkldnn
    torch.testing.assert_close(result.to_dense(), torch.softmax(input, 1))


def test_default_device_and_dtype(device: str) -> None:
    """Neither changes a result: both follow the input."""
    input = torch.randn(3, 5, device=device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            result = OURS["softmax"](input, 1)
    finally:
        torch.set_default_dtype(before)
    assert result.dtype == torch.float32
    assert result.device == input.device
