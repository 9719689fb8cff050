"""torch.jit.script and trace: what torch's functions and modules become there, ours become too."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_softmax_in_place import IN_PLACE
from tolerances import OPS, OURS, TORCH

import softmax_ext

EVERY = [*OPS, "softmin"]
MODULES = ["Softmax", "LogSoftmax", "Softmin", "Softmax2d"]


@pytest.fixture(autouse=True)
def without_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of torch.jit about itself
            warnings.simplefilter("ignore", category)
        yield


def operators(program: Any) -> list[str]:
    """Those of softmax in a program."""
    return re.findall(r"\w+::\w*softmax\w*", str(program.inlined_graph))


def with_gradient(
    function: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf * 1, *args)
    weights = torch.arange(y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return y, torch.autograd.grad((y * weights).sum(), leaf)[0]


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("op", EVERY)
def test_functions(op: str, dim: int, device: str) -> None:
    x = torch.randn(3, 5, device=device, dtype=torch.float64)
    for ours, theirs in ((OURS[op], TORCH[op]), (IN_PLACE[op], TORCH[op])):
        program = torch.jit.script(ours)
        assert set(operators(program)) <= {"aten::softmax", "aten::log_softmax"}
        found, expected = (with_gradient(f, x, dim) for f in (program, torch.jit.script(theirs)))
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    changed = x.clone()
    assert torch.equal(torch.jit.script(IN_PLACE[op])(changed, dim), changed)
    assert not torch.equal(changed, x)


def calls(x: torch.Tensor, dim: int) -> torch.Tensor:
    y = softmax_ext.softmax(x, dim, dtype=torch.float64) + softmax_ext.softmin(input=x, dim=dim)
    return y + softmax_ext.log_softmax(x, dim, 3, torch.float64) + softmax_ext.softmax_(x * 2, 0)


def test_called_by_a_scripted_function(device: str) -> None:
    """By position and by name, with a dtype."""
    x = torch.randn(3, 5, device=device)
    program = torch.jit.script(calls)
    torch.testing.assert_close(program(x, 1), calls(x, 1))
    with pytest.raises(RuntimeError, match="Dimension out of range"):
        program(x, 2)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, inplace: bool, device: str) -> None:
    dims = {} if name == "Softmax2d" else {"dim": 1}
    x = torch.randn(2, 3, 4, 5, device=device, dtype=torch.float64)
    program = torch.jit.script(getattr(softmax_ext, name)(inplace=inplace, **dims))
    expected = with_gradient(torch.jit.script(getattr(torch.nn, name)(**dims)), x)
    for found, each in zip(with_gradient(program, x), expected, strict=True):
        torch.testing.assert_close(found, each)
    input = x.clone()
    torch.testing.assert_close(program(input), expected[0])
    assert torch.equal(input, x) is not inplace
    if name == "Softmax2d":
        with pytest.raises(Exception, match="3D or 4D, got 2D"):
            program(x[0, 0])


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 4), softmax_ext.Softmax(1))
        self.last = softmax_ext.LogSoftmax(-1, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(x) + softmax_ext.softmin(x[:, :4], 1))


@pytest.mark.parametrize("way", ["script", "trace"])
def test_a_model_saved_and_loaded(way: str, device: str) -> None:
    model = Model().to(device)
    x = torch.randn(3, 5, device=device)
    program = torch.jit.script(model) if way == "script" else torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for each in (program, loaded):
        torch.testing.assert_close(each(x), model(x))
        assert set(operators(each)) == {"aten::log_softmax", "aten::softmax"}


def test_the_switch(device: str) -> None:
    """A program runs on these kernels while it is on."""
    x = torch.randn(64, 1000, device=device)
    program = torch.jit.script(softmax_ext.Softmax(1))
    assert torch.equal(program(x), torch.softmax(x, 1))
    with softmax_ext.enabled():
        assert torch.equal(program(x), softmax_ext.softmax(x, 1))
