"""Every way to a kernel with arguments that it must not get: an exception, and nothing touched.

The registered operators, the kernels and Functions of Python, a node called by hand or handed
something else by a saved-tensor hook, the switch, out= and in place. Types and words of the
exceptions are torch's.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerances import FLOATING, OPS, OURS

import softmax_ext

IN_PLACE = {"softmax": softmax_ext.softmax_, "log_softmax": softmax_ext.log_softmax_}


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    softmax_ext.disable()


def by_operator(
    op: str, grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype
) -> Any:
    return getattr(torch.ops.softmax_ext, f"{op}_backward")(grad, output, dim, dtype)


def by_recorded_operator(
    op: str, grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype
) -> Any:
    if grad.is_floating_point():
        grad = grad.detach().requires_grad_()
    return by_operator(op, grad, output, dim, dtype)


def by_kernel(
    op: str, grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype
) -> Any:
    return getattr(softmax_ext.kernels, f"{op}_backward")(grad, output, dim, dtype)


def by_function(
    op: str, grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype
) -> Any:
    function = {"softmax": "SoftmaxBackwardFunction", "log_softmax": "LogSoftmaxBackwardFunction"}
    return getattr(softmax_ext.autograd, function[op]).apply(grad, output, dim, dtype)


def by_node(op: str, grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype) -> Any:
    """A node that recorded another call, whose saved tensor is unpacked as `output`."""
    leaf = torch.ones(2, 2, 2, 2, dtype=dtype, device=output.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: None, lambda _: output):
        node = OURS[op](leaf, dim).grad_fn
    return node(grad)


def by_switch(
    op: str, grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype
) -> Any:
    softmax_ext.enable()
    return getattr(torch.ops.aten, f"_{op}_backward_data")(grad, output, dim, dtype)


def by_switch_out(
    op: str, grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype
) -> Any:
    softmax_ext.enable()
    name = "grad_input" if op == "softmax" else "out"
    result = torch.empty(0, dtype=dtype, device=output.device)
    backward = getattr(torch.ops.aten, f"_{op}_backward_data").out
    return backward(grad, output, dim, dtype, **{name: result})


BACKWARD = {
    f.__name__: f for f in (by_operator, by_recorded_operator, by_kernel, by_function, by_node)
}
SWITCHED = {f.__name__: f for f in (by_switch, by_switch_out)}


@dataclass(frozen=True)
class Fault:
    """What is made of right arguments, and what is raised."""

    wrong: Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any]]
    error: type[Exception]
    words: str


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    """Of a storage that has since been resized, as sharding does it, to less than its elements."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(8)
    return tensor


FAULTS = {
    "a larger output": Fault(
        lambda g, y: (g[:1], y.new_ones(1000, 1000)), RuntimeError, "to have same size"
    ),
    "a larger gradient": Fault(
        lambda g, y: (g.new_ones(1000, 1000), y[:1]), RuntimeError, "to have same size"
    ),
    "a gradient that would broadcast": Fault(
        lambda g, y: (g[0], y), RuntimeError, "to have same size"
    ),
    "another order of dims": Fault(lambda g, y: (g, y.t()), RuntimeError, "to have same size"),
    "a half gradient": Fault(
        lambda g, y: (g.half(), y), RuntimeError, "expected scalar type Float but found Half"
    ),
    "a double output": Fault(
        lambda g, y: (g, y.double()), RuntimeError, "expected scalar type Double but found Float"
    ),
    "an integer gradient": Fault(lambda g, y: (g.int(), y), NotImplementedError, "softmax"),
    "integers": Fault(lambda g, y: (g.int(), y.int()), NotImplementedError, "softmax"),
    "booleans": Fault(lambda g, y: (g.bool(), y.bool()), NotImplementedError, "softmax"),
    "complex numbers": Fault(lambda g, y: (g.cfloat(), y.cfloat()), NotImplementedError, "softmax"),
    "a meta gradient": Fault(lambda g, y: (g.to("meta"), y), RuntimeError, "device"),
    "a meta output": Fault(lambda g, y: (g, y.to("meta")), RuntimeError, "device"),
    "an output of fewer dims": Fault(
        lambda g, y: (g[0], y[0]), IndexError, r"range of \[-1, 0\], but got 1"
    ),
    "a gradient without memory": Fault(
        lambda g, y: (shrunk(g), y), RuntimeError, "requires a storage of 2400 bytes"
    ),
    "an output without memory": Fault(
        lambda g, y: (g, shrunk(y)), RuntimeError, "requires a storage of 2400 bytes"
    ),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("entry", [*BACKWARD, *SWITCHED])
@pytest.mark.parametrize("fault", FAULTS)
def test_backward(fault: str, entry: str, op: str, device: str) -> None:
    case = FAULTS[fault]
    grad, output = torch.randn(20, 30, device=device), torch.rand(20, 30, device=device)
    wrong = case.wrong(grad, output)
    if entry in BACKWARD:
        with pytest.raises(case.error, match=case.words):
            BACKWARD[entry](op, *wrong, 1, torch.float32)
    else:  # what the switch leaves to torch has torch's words
        with pytest.raises((RuntimeError, IndexError)):
            SWITCHED[entry](op, *wrong, 1, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_backward_to_a_dtype_without_a_gradient(op: str, dtype: torch.dtype, device: str) -> None:
    grad, output = torch.randn(20, 30, device=device), torch.rand(20, 30, device=device)
    for call in (by_operator, by_recorded_operator, by_kernel, by_function):
        with pytest.raises(NotImplementedError, match="'input_dtype'"):
            call(op, grad, output, 1, dtype)


@pytest.mark.parametrize("fault", ["a larger output", "a meta gradient", "integers"])
@pytest.mark.parametrize("op", OPS)
def test_backward_of_meta_and_fake_tensors(op: str, fault: str) -> None:
    """What a compiled graph is traced with is refused as the tensors themselves would be."""
    case = FAULTS[fault]
    wrong = case.wrong(torch.randn(20, 30), torch.rand(20, 30))
    if fault != "a meta gradient":
        with pytest.raises(case.error, match=case.words):
            by_operator(op, *(x.to("meta") for x in wrong), 1, torch.float32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in wrong]
        with pytest.raises(Exception, match=r"size|device|softmax"):
            by_operator(op, *fake, 1, torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_the_gradient_of_a_gradient(op: str, device: str) -> None:
    """The node of the backward pass, called by hand."""
    leaf = torch.randn(20, 30, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(OURS[op](leaf, 1).square().sum(), leaf, create_graph=True)
    assert grad.grad_fn is not None
    for wrong, words in (
        (torch.ones(30, device=device), "to have same size"),
        (torch.ones(20, 30, device="meta"), "same device"),
    ):
        with pytest.raises(RuntimeError, match=words):
            grad.grad_fn(wrong)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_memory_that_is_not_there(op: str, strided: bool, device: str) -> None:
    x = torch.randn(20, 30, device=device)
    gone = shrunk(x.t() if strided else x)
    calls: list[Callable[[], Any]] = [
        lambda: OURS[op](gone, 1),
        lambda: IN_PLACE[op](gone, 1),
        lambda: softmax_ext.softmin_(gone, 1),
        lambda: getattr(torch.ops.softmax_ext, op)(gone, 1),
        lambda: OURS[op](x.t() if strided else x, 1, out=gone),
        lambda: OURS[op](torch._neg_view(x.t() if strided else x), 1, out=gone),  # by torch
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="requires a storage of 2400 bytes"):
            call()
    softmax_ext.enable()
    with pytest.raises(RuntimeError, match="requires a storage of 2400 bytes"):
        getattr(torch, op)(gone, 1)
    empty = torch.empty(0, 5, device=device)
    empty.untyped_storage().resize_(0)
    assert OURS[op](empty, 1).shape == (0, 5)


@pytest.mark.parametrize("op", OPS)
def test_forward_operators(op: str, device: str) -> None:
    """The registered operators, which have no Python before them."""
    call = getattr(torch.ops.softmax_ext, op)
    ones = torch.ones(3, 5, device=device)
    for arguments, error, words in (
        ((ones, 2), IndexError, re.escape("range of [-2, 1], but got 2")),
        ((ones.int(), 1), NotImplementedError, "softmax"),
        ((ones.cfloat(), 1), NotImplementedError, "softmax"),
        ((ones, 1, torch.int8), NotImplementedError, "'dtype'"),
        ((ones.to("meta"), 2), IndexError, "range"),
        ((ones.to("meta").int(), 1), NotImplementedError, "softmax"),
        ((ones.to_sparse(), 1), NotImplementedError, "Sparse"),
    ):
        with pytest.raises(error, match=words):
            call(*arguments)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_right_calls_are_not_refused(op: str, dtype: torch.dtype, device: str) -> None:
    """By each entry, with strided and expanded gradients, to the same bits."""
    leaf = torch.randn(20, 30, dtype=dtype, device=device).requires_grad_()
    output = OURS[op](leaf, 1)
    grads = (
        torch.randn(20, 30, dtype=dtype, device=device),
        torch.randn(30, 20, dtype=dtype, device=device).t(),
        torch.randn(30, dtype=dtype, device=device).expand(20, 30),
    )
    for grad in grads:
        (expected,) = torch.autograd.grad(output, leaf, grad, retain_graph=True)
        assert torch.equal(by_operator(op, grad, output.detach(), 1, dtype), expected)
        assert torch.equal(by_switch(op, grad, output.detach(), -1, dtype), expected)
        assert output.grad_fn is not None
        assert torch.equal(output.grad_fn(grad), expected)
