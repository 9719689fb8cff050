"""softmax_ext.autograd: the bits of softmax_ext.softmax, and every derivative of torch.softmax."""

import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from test_softmax_kernels import BACKWARD, FORWARD
from tolerances import FLOATING, INTEGERS, OPS, OURS, TORCH
from torch.autograd import forward_ad

from softmax_ext import autograd, kernels

Function = type[torch.autograd.Function]
FUNCTIONS: dict[str, Function] = {
    "softmax": autograd.SoftmaxFunction,
    "log_softmax": autograd.LogSoftmaxFunction,
}
BACKWARD_FUNCTIONS: dict[str, Function] = {
    "softmax": autograd.SoftmaxBackwardFunction,
    "log_softmax": autograd.LogSoftmaxBackwardFunction,
}


@pytest.fixture(autouse=True)
def without_torchs_warnings() -> Iterator[None]:
    """torch.func imports torch.jit, which deprecates itself; compilers warn of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_function(op: str, dim: int, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    return lambda x: FUNCTIONS[op].apply(x, dim, dtype)


def by_torch(op: str, dim: int, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    return lambda x: TORCH[op](x, dim, dtype=dtype)


def float64(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


# (input's dtype, dtype asked for): as it is, and casts to both sides of it.
CASTS = [
    *((dtype, None) for dtype in FLOATING),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
]
# A row, a column, a dim between two, and no dim.
SHAPES = [((5, 33), 1), ((5, 33), -2), ((3, 7, 4), 1), ((), 0), ((0, 4), 0)]


@pytest.mark.parametrize(("dtype", "result_dtype"), CASTS, ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_bits_of_softmax(
    op: str,
    shape: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    result_dtype: torch.dtype | None,
    device: str,
) -> None:
    """Forward and backward, of memory in another order too."""
    contiguous = torch.randn(shape, device=device).to(dtype)
    reversed_dims = tuple(range(contiguous.dim()))[::-1]
    strided = contiguous.permute(reversed_dims).contiguous().permute(reversed_dims)
    for input in (contiguous, strided):
        leaf = input.detach().requires_grad_()
        expected = OURS[op](leaf, dim, dtype=result_dtype)
        grad_output = torch.randn_like(expected)
        (expected_grad,) = torch.autograd.grad(expected, leaf, grad_output)

        output = FORWARD[op](input, dim, result_dtype)
        grad = BACKWARD[op](grad_output, output, dim, dtype)
        assert torch.equal(output, expected) and output.dtype == expected.dtype
        assert torch.equal(grad, expected_grad) and grad.dtype == dtype
        assert output.is_contiguous() and grad.is_contiguous()

        output = FUNCTIONS[op].apply(leaf, dim, result_dtype)
        (grad,) = torch.autograd.grad(output, leaf, grad_output)
        assert torch.equal(output, expected) and output.dtype == expected.dtype
        assert torch.equal(grad, expected_grad) and grad.dtype == dtype


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_integers_with_a_dtype(op: str, dtype: torch.dtype, device: str) -> None:
    input = torch.randint(0, 2, (3, 5), device=device).to(dtype)
    output = FUNCTIONS[op].apply(input, 1, torch.float32)
    assert torch.equal(output, OURS[op](input, 1, dtype=torch.float32))
    assert not output.requires_grad


# As the derivatives of softmax_ext.softmax are checked (test_softmax_backward.py).
DERIVATIVE_CASES = [((5,), 0), ((3, 4), 1), ((3, 4), 0), ((2, 3, 4), -2), ((), 0)]


@pytest.mark.parametrize(("shape", "dim"), DERIVATIVE_CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    for function in (by_function(op, dim), lambda x: OURS[op](x, dim)):
        assert torch.autograd.gradcheck(
            function,
            float64(*shape, device=device),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
        )


@pytest.mark.parametrize(("shape", "dim"), DERIVATIVE_CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradgradcheck(op: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    for function in (by_function(op, dim), lambda x: OURS[op](x, dim)):
        assert torch.autograd.gradgradcheck(
            function,
            float64(*shape, device=device),
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            check_batched_grad=True,
        )


@pytest.mark.parametrize(("shape", "dim"), DERIVATIVE_CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_derivatives_of_the_gradient_by_itself(
    op: str, shape: tuple[int, ...], dim: int, device: str
) -> None:
    def gradient(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return BACKWARD_FUNCTIONS[op].apply(g, y, dim, torch.float64)  # type: ignore[no-any-return]

    g, y = float64(*shape, device=device), float64(*shape, device=device)
    for inputs in ((g, y), (g.detach(), y), (g, y.detach())):
        assert torch.autograd.gradcheck(
            gradient,
            inputs,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(gradient, inputs, check_batched_grad=True)


@pytest.mark.parametrize(
    "transforms",
    [t for n in (1, 2, 3) for t in product(("jacrev", "jacfwd"), repeat=n)],
    ids="-".join,
)
@pytest.mark.parametrize("op", OPS)
def test_derivatives_up_to_the_third(op: str, transforms: tuple[str, ...], device: str) -> None:
    """By every sequence of modes: forward over forward is where Functions of torch fail."""
    x = torch.randn(2, 3, device=device, dtype=torch.float64)
    ours, theirs = by_function(op, 1), by_torch(op, 1)
    for transform in transforms:
        ours, theirs = (getattr(torch.func, transform)(f) for f in (ours, theirs))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("transform", ["hessian", "vmap_grad", "jvp", "vjp"])
@pytest.mark.parametrize("op", OPS)
def test_transforms(op: str, transform: str, device: str) -> None:
    input, weights = torch.randn(2, 3, 4, device=device, dtype=torch.float64)

    def apply(function: Callable[..., Any]) -> Any:
        def loss(x: torch.Tensor) -> torch.Tensor:
            return (function(x) * weights[0]).pow(2).sum()

        if transform == "hessian":
            return torch.func.hessian(loss)(input)
        if transform == "vmap_grad":
            return torch.vmap(torch.func.grad(loss))(input)
        if transform == "jvp":
            return torch.func.jvp(function, (input,), (weights,))
        return torch.func.vjp(function, input)[1](weights)  # outside of what made it

    torch.testing.assert_close(apply(by_function(op, -1)), apply(by_torch(op, -1)))


@pytest.mark.parametrize(("dtype", "result_dtype"), CASTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_dtypes_of_derivatives(
    op: str, dtype: torch.dtype, result_dtype: torch.dtype | None, device: str
) -> None:
    """The tangent has the result's dtype, every gradient that of what it is of."""
    x, t = torch.randn(2, 3, 4, device=device).to(dtype)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    ours, theirs = by_function(op, 1, result_dtype), by_torch(op, 1, result_dtype)
    if result_dtype is not None and torch.finfo(result_dtype).eps > tolerance["rtol"]:
        tolerance = dict.fromkeys(tolerance, 4 * torch.finfo(result_dtype).eps)

    def both_orders(function: Callable[..., Any]) -> list[torch.Tensor]:
        tangent = torch.func.jvp(function, (x,), (t,))[1]
        leaf = x.detach().requires_grad_()
        weights = t.to(tangent.dtype).requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf, weights, create_graph=True)
        return [tangent, grad, *torch.autograd.grad(grad, (leaf, weights), x)]

    torch.testing.assert_close(both_orders(ours), both_orders(theirs), **tolerance)


@pytest.mark.parametrize(("in_dim", "dim"), [(0, 0), (0, 1), (1, 0), (2, -1), (-1, -2)])
@pytest.mark.parametrize("op", OPS)
def test_vmap_over_each_dim(op: str, in_dim: int, dim: int, device: str) -> None:
    x = torch.randn(3, 4, 5, device=device)
    for dtype in (None, torch.float64):
        ours, theirs = (
            torch.vmap(f(op, dim, dtype), in_dims=in_dim)(x) for f in (by_function, by_torch)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 1), (1, 0), (-1, 2)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_vmap_where_one_tensor_has_no_batch(
    op: str, in_dims: tuple[int | None, ...], device: str
) -> None:
    """The gradient is of two tensors."""
    batch = 5

    def tensor(in_dim: int | None) -> torch.Tensor:
        x = torch.randn(batch, 3, 4, device=device)
        return x[0] if in_dim is None else x.movedim(0, in_dim)

    g, y = (tensor(in_dim) for in_dim in in_dims)
    actual = torch.vmap(
        lambda g, y: BACKWARD_FUNCTIONS[op].apply(g, y, 1, g.dtype), in_dims=in_dims
    )(g, y)
    each = [
        x.expand(batch, *x.shape) if d is None else x.movedim(d, 0)
        for x, d in zip((g, y), in_dims, strict=True)
    ]
    expected = [BACKWARD[op](g, y, 1, g.dtype) for g, y in zip(*each, strict=True)]
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("op", OPS)
def test_vmap_of_0d_tensors(op: str, dim: int, device: str) -> None:
    x = torch.randn(4, device=device)
    ours, theirs = (torch.vmap(f(op, dim))(x) for f in (by_function, by_torch))
    torch.testing.assert_close(ours, theirs)
    gradient = torch.vmap(lambda g, y: BACKWARD_FUNCTIONS[op].apply(g, y, dim, g.dtype))
    assert torch.equal(gradient(x, ours), torch.zeros(4, device=device))


@pytest.mark.parametrize("op", OPS)
def test_vmap_nested(op: str, device: str) -> None:
    x = torch.randn(3, 4, 5, device=device)
    ours, theirs = (
        torch.vmap(torch.vmap(f(op, 0)), in_dims=1, out_dims=1)(x) for f in (by_function, by_torch)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 4), 1), ((3, 4), -2), ((3,), 1), ((3,), -2)], ids=str
)
@pytest.mark.parametrize("op", OPS)
def test_vmap_dim_out_of_range(op: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    """That of the tensor without the batch, which is never what is summed over."""
    x = torch.randn(shape, device=device)
    words = rf"expected to be in range of \[-1, 0\], but got {dim}"
    for function in (by_function, by_torch):
        with pytest.raises(IndexError, match=words):
            torch.vmap(function(op, dim))(x)
    with pytest.raises(TypeError, match="'dim' must be int, not str"):
        torch.vmap(by_function(op, "0"))(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", OPS)
def test_when_a_graph_is_made(op: str, device: str) -> None:
    leaf = torch.randn(3, 5, device=device, requires_grad=True)
    function = by_function(op, 1)
    assert function(leaf).requires_grad
    assert not function(leaf.detach()).requires_grad
    with torch.no_grad():
        assert not function(leaf).requires_grad
    (grad,) = torch.autograd.grad(function(leaf).pow(2).sum(), leaf)
    assert not grad.requires_grad


@pytest.mark.parametrize("op", OPS)
def test_the_output_is_all_that_is_saved(op: str, device: str) -> None:
    leaf = torch.randn(3, 5, device=device, requires_grad=True)
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x) or x,  # type: ignore[func-returns-value]
        lambda x: x,
    ):
        output = FUNCTIONS[op].apply(leaf, 1, None)
    assert len(packed) == 1
    assert packed[0].data_ptr() == output.data_ptr()


@pytest.mark.parametrize("op", OPS)
def test_output_changed_before_backward(op: str, device: str) -> None:
    leaf = torch.randn(3, 5, device=device, requires_grad=True)
    output = FUNCTIONS[op].apply(leaf, 1, None)
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_of_one_argument_of_the_gradient(op: str, device: str) -> None:
    g, y, t = torch.randn(3, 3, 5, device=device, dtype=torch.float64)
    aten = getattr(torch.ops.aten, f"_{op}_backward_data")
    for which in (0, 1):
        tangents = []
        for function in (BACKWARD_FUNCTIONS[op].apply, aten):
            with forward_ad.dual_level():
                arguments = [g, y]
                arguments[which] = forward_ad.make_dual(arguments[which], t)
                result = function(*arguments, 1, torch.float64)
                tangents.append(forward_ad.unpack_dual(result).tangent)
        torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str, device: str) -> None:
    for dtype in FLOATING:
        leaf = torch.randn(3, 5, device=device).to(dtype).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            output, expected = FUNCTIONS[op].apply(leaf, 1, None), TORCH[op](leaf, 1)
        assert output.dtype == expected.dtype
        (grad,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
        assert grad.dtype == dtype


class Scaled(torch.autograd.Function):
    """softmax(x * scale), as a user would write it: without a jvp, its backward not recorded."""

    @staticmethod
    def forward(x: torch.Tensor, scale: float) -> torch.Tensor:
        return kernels.softmax_forward(x * scale, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, ctx.scale = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (y,) = ctx.saved_tensors
        return kernels.softmax_backward(grad_output, y, -1, ctx.dtype) * ctx.scale, None


class ScaledTwice(Scaled):
    """The same with a backward that is recorded."""

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (y,) = ctx.saved_tensors
        gradient = autograd.SoftmaxBackwardFunction.apply
        return gradient(grad_output, y, -1, ctx.dtype) * ctx.scale, None


def test_functions_of_users(device: str) -> None:
    x = float64(3, 5, device=device)
    for function in (Scaled, ScaledTwice):
        assert torch.autograd.gradcheck(lambda x, f=function: f.apply(x, 0.5), x)
    assert torch.autograd.gradgradcheck(lambda x: ScaledTwice.apply(x, 0.5), x)
    with pytest.raises(RuntimeError, match="'output' requires grad, but the kernels record no"):
        torch.autograd.grad(Scaled.apply(x, 0.5).sum(), x, create_graph=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_functions_of_users(backend: str, device: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 5, device=device, requires_grad=True)
    weights = torch.randn(3, 5, device=device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return (Scaled.apply(x, 0.5) * weights).sum()  # type: ignore[no-any-return]

    value = torch.compile(function, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(value, function(x))
    expected = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(torch.autograd.grad(value, x), expected)


@pytest.mark.parametrize("op", OPS)
def test_compiled_without_a_gradient(op: str, device: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 5, device=device)
    for function in (by_function(op, 1), lambda x: FORWARD[op](x, 1)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("in_graph", [False, True], ids=["break", "allow_in_graph"])
@pytest.mark.parametrize("op", OPS)
def test_compiled_with_a_gradient(op: str, in_graph: bool, device: str) -> None:
    """Dynamo breaks the graph at a Function that has a jvp."""
    torch._dynamo.reset()
    # A class of its own, since what is allowed stays so.
    function = type(op, (FUNCTIONS[op],), {})
    if in_graph:
        torch.compiler.allow_in_graph(function)
    compiled = torch.compile(
        lambda x: function.apply(x * 2, 1, None), fullgraph=in_graph, backend="aot_eager"
    )
    x = torch.randn(3, 5, device=device, requires_grad=True)
    weights = torch.randn(3, 5, device=device)
    output, expected = compiled(x), OURS[op](x * 2, 1)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, x, weights), torch.autograd.grad(expected, x, weights)
    )
