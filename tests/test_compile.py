"""torch.compile, torch.export, make_fx, and the operators that they put into graphs."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_softmax_in_place import IN_PLACE
from test_switch import telling
from test_threads_and_isa import run
from tolerances import FLOATING, OPS, OURS, TORCH

import softmax_ext

EVERY = [*OPS, "softmin"]
BACKENDS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compilers about themselves
        yield


def compiled(function: Callable[..., Any], backend: str, **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def graph_of(function: Callable[..., Any], *args: Any) -> list[str]:
    """The operators of the graph that Dynamo makes."""
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, example: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch.compile(function, fullgraph=True, backend=backend)(*args)
    return targets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", EVERY)
def test_inference_and_training(op: str, backend: str, device: str) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (OURS[op](x * 2, -1) * w).sum(-1)

    x = torch.randn(6, 33, device=device, dtype=torch.float64)
    w = torch.randn(6, 33, device=device, dtype=torch.float64)
    step = compiled(function, backend)
    with torch.no_grad():
        torch.testing.assert_close(step(x, w), function(x, w))
    grads = []
    for each in (step, function):
        leaf = x.clone().requires_grad_()
        each(leaf, w).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("op", OPS)
def test_the_graph_has_our_operator(op: str, device: str) -> None:
    """Not torch's, nor a break; forward and backward."""
    x = torch.randn(6, 33, device=device, requires_grad=True)
    assert f"softmax_ext.{op}" in graph_of(lambda x: OURS[op](x, 1), x)
    names: list[str] = []

    def record(module: torch.fx.GraphModule, example: Any) -> Any:
        names.extend(str(node.target) for node in module.graph.nodes)
        return module

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(
        fw_compiler=lambda module, example: make_boxed_func(record(module, example).forward)
    )
    torch.compile(lambda x: OURS[op](x, 1), fullgraph=True, backend=backend)(x).sum().backward()
    assert f"softmax_ext.{op}.default" in names
    assert f"softmax_ext.{op}_backward.default" in names


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("op", EVERY)
def test_cast(op: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randint(-5, 6, (4, 9), device=device).to(dtype)
    function = compiled(lambda x: OURS[op](x, 1, dtype=torch.float32), "aot_eager")
    assert torch.equal(function(x), OURS[op](x, 1, dtype=torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_shapes_compile_once(backend: str, device: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    function = torch.compile(
        lambda x: OURS["softmax"](x, -1), fullgraph=True, dynamic=True, backend=counter
    )
    for shape in [(3, 17), (5, 40), (9, 1000), (33, 7)]:
        x = torch.randn(shape, device=device, requires_grad=True)
        y = function(x)
        (grad,) = torch.autograd.grad(y, x, x.detach())
        expected = TORCH["softmax"](x, -1)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, x, x.detach())[0])
    assert counter.frame_count == 1


class Subclass(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("op", EVERY)
def test_subclass(op: str, dim: int | None, device: str) -> None:
    x = torch.randn(4, 9, device=device)
    for function in (OURS[op], lambda x, dim: IN_PLACE[op](x * 1, dim)):
        y = compiled(lambda x, f=function: f(x, dim), "eager")(x.as_subclass(Subclass))
        assert type(y) is Subclass
        torch.testing.assert_close(y.as_subclass(torch.Tensor), TORCH[op](x, 1))


DIMS = {"numpy": np.int64(1), "numpy, negative": np.int64(-1), "0-d tensor": torch.tensor(1)}


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("op", EVERY)
def test_dim_that_is_not_an_int(op: str, dim: str, device: str) -> None:
    """As a constant of the function and as an argument: of a graph as it is, and with a break.

    Dynamo has a tensor for it, which AOTAutograd cannot trace, in torch's functions either.
    """
    x = torch.randn(4, 9, device=device)
    for function in (OURS[op], lambda x, dim: IN_PLACE[op](x * 1, dim)):
        constant = compiled(lambda x, f=function: f(x, DIMS[dim]), "eager")
        argument = compiled(lambda x, dim, f=function: f(x, dim), "eager")
        broken = torch.compile(lambda x, dim, f=function: f(x, dim), backend="aot_eager")
        for y in (constant(x), argument(x, DIMS[dim]), broken(x, DIMS[dim])):
            torch.testing.assert_close(y, TORCH[op](x, 1))


def test_dim_that_becomes_symbolic(device: str) -> None:
    """Dynamo makes an int argument that changes a symbol; the operators have one graph a dim."""
    x = torch.randn(4, 9, 3, device=device)
    function = compiled(lambda x, dim: softmax_ext.softmax(x, dim), "aot_eager")
    for dim in (0, 1, 2, -1):
        torch.testing.assert_close(function(x, dim), torch.softmax(x, dim))


@pytest.mark.parametrize("dim", [True, 1.0])
def test_dim_that_is_refused(dim: Any, device: str) -> None:
    x = torch.randn(4, 9, device=device)
    with pytest.raises(Exception, match="must be int"):
        compiled(lambda x: softmax_ext.softmax(x, dim), "eager")(x)


def test_the_switch_within(device: str) -> None:
    """`enabled` is traced without a break, as a block and as a decorator, and changes nothing."""
    x = telling(device)

    def block(x: torch.Tensor) -> torch.Tensor:
        with softmax_ext.enabled():
            return torch.softmax(x, 1)

    decorated = softmax_ext.enabled()(lambda x: torch.softmax(x, 1))
    torch.testing.assert_close(compiled(block, "inductor")(x), torch.softmax(x, 1))
    for function in (block, decorated, lambda x: decorated(x) * 1):
        assert torch.equal(compiled(function, "eager")(x), torch.softmax(x, 1))
        with softmax_ext.enabled():  # as it is when the graph runs
            assert torch.equal(compiled(function, "eager")(x), softmax_ext.softmax(x, 1))
        assert torch.equal(function(x), softmax_ext.softmax(x, 1))
        assert not softmax_ext.is_enabled()


def test_the_switch_around_a_graph_break(device: str) -> None:
    """Left as often as it was entered."""
    x = telling(device)

    def function(x: torch.Tensor) -> torch.Tensor:
        with softmax_ext.enabled():
            y = torch.softmax(x, 1)
            torch._dynamo.graph_break()
            return torch.log_softmax(y, 1)

    y = torch.compile(function, backend="eager")(x)
    torch.testing.assert_close(y, function(x))
    assert not softmax_ext.is_enabled()


def test_is_enabled_within(device: str) -> None:
    function = compiled(lambda x: x + softmax_ext.is_enabled(), "eager")
    x = torch.zeros(2, device=device)
    assert function(x).tolist() == [0, 0]
    with softmax_ext.enabled():
        assert function(x).tolist() == [1, 1]
    assert function(x).tolist() == [0, 0]


@pytest.mark.parametrize("dim", [None, 1])
def test_module_and_implicit_dim(dim: int | None, device: str) -> None:
    x = torch.randn(4, 9, device=device)
    module = torch.nn.Sequential(
        torch.nn.Linear(9, 5), softmax_ext.Softmax(dim), softmax_ext.LogSoftmax(dim)
    ).to(device)
    torch.testing.assert_close(compiled(module, "aot_eager")(x), module(x))


def test_out_and_in_place(device: str) -> None:
    x = torch.randn(4, 9, device=device)
    out = torch.empty_like(x)
    result = compiled(lambda x, out: softmax_ext.softmax(x, 1, out=out), "aot_eager")(x, out)
    torch.testing.assert_close(out, torch.softmax(x, 1))
    torch.testing.assert_close(result, out)

    def in_place(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        softmax_ext.softmax_(y, 1)
        return softmax_ext.log_softmax_(y * 3, 0)

    results = []
    for function in (compiled(in_place, "aot_eager"), in_place):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, x)))
    torch.testing.assert_close(results[0], results[1])
    changed = x.clone()
    compiled(lambda x: softmax_ext.softmax_(x, 1), "aot_eager")(changed)
    torch.testing.assert_close(changed, torch.softmax(x, 1))


@pytest.mark.parametrize("op", EVERY)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_autocast(dtype: torch.dtype, op: str, device: str) -> None:
    """The dtype under autocast is that of an eager call."""
    x = torch.randn(4, 9, device=device).to(dtype)

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return OURS[op](x, 1)

    y = compiled(function, "aot_eager")(x)
    assert y.dtype == function(x).dtype
    torch.testing.assert_close(y, function(x))


@pytest.mark.parametrize("transform", ["vmap", "grad", "vmap_grad", "jvp", "jacrev"])
@pytest.mark.parametrize("op", OPS)
def test_transforms_within(op: str, transform: str, device: str) -> None:
    """A torch.func transform inside a compiled function: values and tangents."""
    x = torch.randn(4, 9, device=device, dtype=torch.float64)
    t = torch.randn(4, 9, device=device, dtype=torch.float64)

    def apply(f: Callable[..., torch.Tensor], x: torch.Tensor, t: torch.Tensor) -> Any:
        def loss(x: torch.Tensor) -> torch.Tensor:
            return f(x, -1).square().sum()

        if transform == "vmap":
            return torch.vmap(lambda x: f(x, 0))(x)
        if transform == "grad":
            return torch.func.grad(loss)(x)
        if transform == "vmap_grad":
            return torch.vmap(torch.func.grad(loss))(x)
        if transform == "jacrev":
            return torch.func.jacrev(lambda x: f(x, 1))(x)
        return torch.func.jvp(lambda x: f(x, 1), (x,), (t,))

    ours = compiled(lambda x, t: apply(OURS[op], x, t), "aot_eager")(x, t)
    torch.testing.assert_close(ours, apply(TORCH[op], x, t))


def test_double_backward_is_refused_as_torchs(device: str) -> None:
    """What AOTAutograd cannot do for any operator."""
    messages = []
    for function in (OURS["softmax"], TORCH["softmax"]):
        x = torch.randn(4, 9, device=device, requires_grad=True)
        y = compiled(lambda x, f=function: f(x, 1), "aot_eager")(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError) as caught:
            grad.sum().backward()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "double backward" in messages[0]


class Exported(torch.nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return IN_PLACE[self.op](OURS[self.op](x * 2, -1), 0)


def expected_of_exported(op: str, x: torch.Tensor) -> torch.Tensor:
    return TORCH[op](TORCH[op](x * 2, -1), 0)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("op", EVERY)
def test_export(op: str, strict: bool, device: str) -> None:
    """The program has torch's operators, and so loads without this package, and can be lowered."""
    x = torch.randn(4, 9, device=device)
    rows = torch.export.Dim("rows")
    program = torch.export.export(Exported(op), (x,), dynamic_shapes=({0: rows},), strict=strict)
    found = {str(node.target) for node in program.graph.nodes if "softmax" in str(node.target)}
    assert found == {"aten.log_softmax.int" if op == "log_softmax" else "aten.softmax.int"}
    other = torch.randn(7, 9, device=device)
    torch.testing.assert_close(program.module()(other), expected_of_exported(op, other))
    # Nor has exporting changed what a graph that is compiled has.
    assert f"softmax_ext.{op.replace('min', 'max')}" in graph_of(lambda x: OURS[op](x, 1), x)


LOAD = """
import sys
sys.modules["softmax_ext"] = None  # cannot be imported
import torch
x = torch.load(sys.argv[1], weights_only=True)
programs = [torch.export.load(file).module() for file in sys.argv[2:4]]
programs.append(torch.jit.load(sys.argv[4]))
torch.save([program(x) for program in programs], sys.argv[1])
"""


def test_saved_programs_need_no_package(tmp_path: Path) -> None:
    x = torch.randn(4, 9)
    files = [tmp_path / name for name in ("x.pt", "loose.pt2", "strict.pt2", "script.pt")]
    torch.save(x, files[0])
    for file, strict in zip(files[1:3], (False, True), strict=True):
        torch.export.save(torch.export.export(Exported("softmin"), (x,), strict=strict), file)
    torch.jit.save(torch.jit.script(softmax_ext.Softmin(1, inplace=True)), str(files[3]))
    process = run(LOAD, *map(str, files))
    assert process.returncode == 0, process.stderr
    loose, strict, scripted = torch.load(files[0], weights_only=True)
    torch.testing.assert_close(loose, expected_of_exported("softmin", x))
    torch.testing.assert_close(strict, loose)
    torch.testing.assert_close(scripted, TORCH["softmin"](x, 1))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("op", EVERY)
def test_make_fx(op: str, mode: str, device: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(4, 9, device=device)

    def function(x: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(OURS[op](leaf, 1).square().sum(), leaf)[0]

    graph = make_fx(function, tracing_mode=mode)(x)
    assert "softmax" in graph.code
    other = torch.randn(4, 9, device=device)
    torch.testing.assert_close(graph(other), function(other))


# Of each kind of input and of result.
OPERATOR_SAMPLES = [
    ((3, 5), torch.float32, None),
    ((2, 3, 4), torch.bfloat16, None),
    ((3, 5), torch.float16, torch.float32),
    ((3, 5), torch.int64, torch.float64),
    ((), torch.float32, None),
    ((0, 4), torch.float64, None),
]


@pytest.mark.parametrize(("shape", "dtype", "result"), OPERATOR_SAMPLES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, result: torch.dtype | None, device: str
) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch of every registered operator."""
    operators = torch.ops.softmax_ext
    x = torch.randn(shape, device=device).mul(3).to(dtype)
    if dtype.is_floating_point:
        x.requires_grad_()
    for dim in (0, -1):
        torch.library.opcheck(getattr(operators, op).default, (x, dim, result))
    y = getattr(operators, op)(x.detach(), -1, result)
    input_dtype = dtype if dtype.is_floating_point else y.dtype
    arguments = (
        torch.randn(shape, device=device).to(y.dtype).requires_grad_(),
        y.requires_grad_(),
        -1,
        input_dtype,
    )
    torch.library.opcheck(getattr(operators, f"{op}_backward").default, arguments)


def test_every_registered_operator_is_checked() -> None:
    """Those of scores by test_scores_transforms.py, of segments by test_segments_backward.py, of
    losses by test_losses.py, test_losses_in_place.py, test_linear_losses.py and
    test_probabilities.py, of divergences by test_divergences.py."""
    names = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("softmax_ext::")
    }
    of_softmax = {f"{op}{end}" for op in OPS for end in ("", "_backward")}
    of_scores = {f"score_softmax{end}" for end in ("", "_backward", "_by_torch")}
    of_segments = {f"segment_{op}{end}" for op in (*OPS, "logsumexp") for end in ("", "_backward")}
    of_targets = ("cross_entropy", "cross_entropy_of_probabilities")
    of_losses = {f"{loss}{end}" for loss in of_targets for end in ("", "_backward")}
    of_losses |= {"cross_entropy_of_rows_", "linear_cross_entropy_of_rows"}
    of_divergences = {f"kl_div_with_logits{end}" for end in ("", "_backward")}
    of_all = of_softmax | of_scores | of_segments | of_losses | of_divergences
    assert names == {f"softmax_ext::{name}" for name in of_all}


@pytest.mark.parametrize("op", OPS)
def test_operator_by_itself(op: str, device: str) -> None:
    """torch.ops.softmax_ext outside of a compiled graph: gradients of both orders, errors."""
    operator = getattr(torch.ops.softmax_ext, op)
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.equal(operator(x, 1), OURS[op](x, 1))
    assert torch.autograd.gradcheck(
        lambda x: operator(x, 1), x, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda x: operator(x, 1), x, check_fwd_over_rev=True)
    torch.testing.assert_close(
        torch.func.hessian(lambda x: operator(x, 1).square().sum())(x.detach()),
        torch.func.hessian(lambda x: TORCH[op](x, 1).square().sum())(x.detach()),
    )
    with pytest.raises(IndexError):
        operator(x, 2)
    with pytest.raises(NotImplementedError):
        operator(torch.ones(3, dtype=torch.int64, device=device), 0)
