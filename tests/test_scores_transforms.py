"""Scores with torch's other machinery: derivatives of every kind, transforms, graphs, autocast,
subclasses, modules. Each result is that of the eager call, which test_scores_values.py holds to
float64."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from scores_arguments import KINDS, arguments, to_device
from scores_reference import OURS
from test_scores_values import MODELS
from torch.utils.checkpoint import checkpoint

import softmax_ext

SHAPE = (2, 2, 3, 4)
# Each kind of argument that has a gradient, alone and with others.
DIFFERENTIABLE = [
    *MODELS,
    ("no scale", "softcap", "no mask", "window", "sink"),
    ("no scale", "no softcap", "floating of rows", "causal", "no sink"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compilers, and of torch.func about torch.jit
        yield


def split(
    kinds: tuple[str, ...], device: str, dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], Callable[..., dict[str, Any]]]:
    """The tensors that have a gradient, and what makes keyword arguments of the like of them."""
    scores = to_device(arguments(kinds, SHAPE, dtype), device)
    if "floating" in kinds[2]:  # of differences there are none at -inf
        scores["mask"] = scores["mask"].detach().clamp(min=-3).requires_grad_()
    names = [name for name, value in scores.items() if getattr(value, "requires_grad", False)]

    def joined(*tensors: torch.Tensor) -> dict[str, Any]:
        return {**scores, **dict(zip(names, tensors, strict=True))}

    return [scores[name] for name in names], joined


def finite(y: torch.Tensor) -> torch.Tensor:
    return torch.where(y == -torch.inf, 0.0, y)


def call(op: str, kinds: tuple[str, ...], device: str) -> tuple[Any, list[torch.Tensor]]:
    """A function of the input and the tensors that have a gradient, and these."""
    tensors, joined = split(kinds, device)
    x = torch.randn(SHAPE, device=device, dtype=torch.float64, requires_grad=True)
    return lambda x, *tensors: finite(OURS[op](x, -1, **joined(*tensors))), [x, *tensors]


@pytest.mark.parametrize("kinds", DIFFERENTIABLE, ids=str)
@pytest.mark.parametrize("op", OURS)
def test_gradcheck(op: str, kinds: tuple[str, ...], device: str) -> None:
    """Backward and forward mode, of every tensor; and batched gradients."""
    function, tensors = call(op, kinds, device)
    assert torch.autograd.gradcheck(
        function, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.parametrize("kinds", DIFFERENTIABLE, ids=str)
@pytest.mark.parametrize("op", OURS)
def test_gradgradcheck(op: str, kinds: tuple[str, ...], device: str) -> None:
    function, tensors = call(op, kinds, device)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_gradcheck_in_place(op: str, device: str) -> None:
    tensors, joined = split(MODELS[3], device)
    in_place = getattr(softmax_ext, f"{op}_")
    x = torch.randn(SHAPE, device=device, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return finite(in_place(x * 1, -1, **joined(*tensors)))

    assert torch.autograd.gradcheck(function, [x, *tensors], fast_mode=True)


def test_gradcheck_over_several_dims(device: str) -> None:
    x = torch.randn(2, 3, 4, device=device, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(3, 1, device=device, dtype=torch.float64, requires_grad=True)
    for op in OURS:
        assert torch.autograd.gradcheck(
            lambda x, bias, sink, op=op: OURS[op](x, (0, 2), mask=bias, sink=sink), [x, bias, sink]
        )


def test_checkpoint(device: str) -> None:
    function, tensors = call("softmax", MODELS[3], device)
    grads = [
        torch.autograd.grad(y.square().sum(), tensors)
        for y in (function(*tensors), checkpoint(function, *tensors, use_reentrant=False))
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


# --- torch.func ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", MODELS, ids=str)
@pytest.mark.parametrize("op", OURS)
def test_vmap(op: str, kinds: tuple[str, ...], device: str) -> None:
    """Over the input alone, and over everything."""
    function, tensors = call(op, kinds, device)
    tensors = [each.detach() for each in tensors]
    batched = [torch.stack([each, each * 0.9, each * 1.1]) for each in tensors]
    alone = torch.vmap(function, in_dims=(0, *(None for _ in tensors[1:])))
    expected = torch.stack([function(x, *tensors[1:]) for x in batched[0]])
    torch.testing.assert_close(alone(batched[0], *tensors[1:]), expected)
    expected = torch.stack([function(*each) for each in zip(*batched, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(*batched), expected)


@pytest.mark.parametrize("kinds", MODELS, ids=str)
@pytest.mark.parametrize("op", OURS)
def test_grad_and_jvp(op: str, kinds: tuple[str, ...], device: str) -> None:
    function, tensors = call(op, kinds, device)
    weights = torch.randn(function(*tensors).shape, device=device, dtype=torch.float64)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return (function(*tensors) * weights).sum()

    places = tuple(range(len(tensors)))
    expected = torch.autograd.grad(loss(*tensors), tensors)
    values = tuple(each.detach() for each in tensors)
    found = torch.func.grad(loss, argnums=places)(*values)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    tangents = tuple(torch.randn_like(each) for each in values)
    _, along = torch.func.jvp(loss, values, tangents)
    summed = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(along, summed)
    per_sample = torch.vmap(torch.func.grad(lambda x: loss(x, *values[1:])))
    stacked = torch.stack([values[0], 2 * values[0]])
    torch.testing.assert_close(per_sample(stacked)[0], expected[0])


# --- Graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", OURS)
def test_compile(op: str, backend: str, device: str) -> None:
    """Without a break, forward and backward."""
    for kinds in MODELS if backend == "aot_eager" else MODELS[3:]:
        function, tensors = call(op, kinds, device)
        compiled = torch.compile(
            lambda *tensors, f=function: f(*tensors).square().sum(-1),
            fullgraph=True,
            backend=backend,
        )
        eager = function(*tensors).square().sum(-1)
        graph = compiled(*tensors)
        torch.testing.assert_close(graph, eager)
        grad = torch.randn_like(eager)
        expected = torch.autograd.grad(eager, tensors, grad)
        for one, other in zip(torch.autograd.grad(graph, tensors, grad), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_compiled_in_place_out_and_over_dims(device: str) -> None:
    x, mask = torch.randn(3, 4, 5, device=device), torch.rand(4, 5, device=device) > 0.3

    def function(x: torch.Tensor, out: torch.Tensor) -> Any:
        softmax_ext.softmax(x, 1, scale=0.5, mask=mask, out=out)
        y = softmax_ext.log_softmax_(x * 1, -1, temperature=2.0)
        return y + softmax_ext.softmax(x, (0, 2)) + softmax_ext.logsumexp(x, (0, 1), softcap=2.0)

    outs = torch.empty_like(x), torch.empty_like(x)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, outs[0]), function(x, outs[1]))
    assert torch.equal(*outs)


def test_the_graph_has_our_operator(device: str) -> None:
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, example: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x = torch.randn(3, 4, device=device)
    torch.compile(lambda x: softmax_ext.softmax(x, 1, scale=2.0), fullgraph=True, backend=backend)(
        x
    )
    assert "softmax_ext.score_softmax" in targets


def test_dynamic_shapes_compile_once(device: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda x, mask: softmax_ext.softmax(x, -1, mask=mask, is_causal=True),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for shape in [(3, 17, 19), (5, 40, 41), (9, 100, 300), (33, 7, 8)]:
        x, mask = torch.randn(shape, device=device), torch.randn(shape[1:], device=device)
        expected = softmax_ext.softmax(x, -1, mask=mask, is_causal=True)
        torch.testing.assert_close(function(x, mask), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kinds", MODELS, ids=str)
@pytest.mark.parametrize(("number", "op"), list(enumerate(OURS)), ids=str)
def test_opcheck(number: int, op: str, kinds: tuple[str, ...], device: str) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch of every registered operator."""
    operators = torch.ops.softmax_ext
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    tensors, joined = split(kinds, device, torch.float32)
    scores = joined(*tensors)
    scale, mask, sink = (scores.get(name) for name in ("scale", "mask", "sink"))
    sink = sink.detach().view(-1, 1, 1) if sink is not None and sink.dim() == 1 else sink
    scale = scale if isinstance(scale, torch.Tensor) else None
    band = (-1, 0, 1) if scores.get("is_causal") else (-1, -1, 0)
    rest = (scale, 0.5, scores.get("softcap", 0.0), mask, *band, sink, -torch.inf)
    torch.library.opcheck(operators.score_softmax.default, (number, x, None, *rest))
    torch.library.opcheck(operators.score_softmax_by_torch.default, (number, x, None, *rest))
    y, lse = operators.score_softmax(number, x, None, *rest)
    wanted = [True, *(getattr(each, "requires_grad", False) for each in (scale, mask, sink))]
    grad = torch.randn_like(y)
    arguments = (number, grad, y.detach(), lse.detach(), x.detach())
    rest = tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in rest)
    torch.library.opcheck(
        operators.score_softmax_backward.default, (*arguments, *rest, torch.float32, wanted)
    )


def test_bands_that_become_symbolic(device: str) -> None:
    """As in decoding: the offset and the window are arguments that change."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x: torch.Tensor, offset: int, left: int) -> torch.Tensor:
        return softmax_ext.softmax(
            x, -1, is_causal=True, causal_offset=offset, window=(left, 0), sink=0.0
        )

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    x = torch.randn(3, 4, 9, device=device)
    for offset, left in [(5, 3), (2, 4), (7, 6), (3, 5)]:
        torch.testing.assert_close(compiled(x, offset, left), function(x, offset, left))
    assert counter.frame_count <= 2


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sink = torch.nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = softmax_ext.softmax(x, -1, scale=0.5, softcap=20.0, is_causal=True, sink=self.sink)
        z = softmax_ext.log_softmax(x, -1, mask=mask).exp()
        z = z + softmax_ext.softmax_(x * 2, -1, mask=mask) + softmax_ext.softmax(x, (0, 3))
        return y + z + softmax_ext.logsumexp(x, -1, keepdim=True, temperature=2.0)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, device: str) -> None:
    """The program has torch's operators, and so loads without this package."""
    x, mask = torch.randn(SHAPE, device=device), torch.rand(SHAPE[-2:], device=device) > 0.3
    module = Attention().to(device)
    program = torch.export.export(module, (x, mask), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("softmax_ext" in target for target in targets), targets
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(x, mask), module(x, mask))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("kinds", MODELS[:3], ids=str)  # whose tensors are all arguments
def test_make_fx(kinds: tuple[str, ...], mode: str, device: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    function, tensors = call("softmax", kinds, device)
    tensors = [each.detach() for each in tensors]
    graph = make_fx(function, tracing_mode=mode)(*tensors)
    torch.testing.assert_close(graph(*tensors), function(*tensors))


# --- Autocast, subclasses ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OURS)
def test_autocast(op: str, dtype: torch.dtype, device: str) -> None:
    """The result type of torch's function, where a mask and a scale are of another type."""
    x = torch.randn(3, 5, device=device, dtype=dtype)
    mask = torch.randn(5, device=device)
    with torch.autocast(device, torch.bfloat16):
        expected = getattr(torch, op)(x, 1)
        actual = OURS[op](x, 1, mask=mask, scale=torch.tensor(0.5, device=device))
    assert actual.dtype == expected.dtype
    with torch.autocast(device, enabled=False):
        right = OURS[op](x, 1, mask=mask, scale=0.5, dtype=actual.dtype)
    torch.testing.assert_close(actual, right)


class Subclass(torch.Tensor):
    seen: list[tuple[Any, dict[str, Any]]] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append((func, kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("of", ["input", "mask", "sink"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "softmax_"])
def test_subclass(name: str, of: str, device: str) -> None:
    """__torch_function__ gets the function with all its arguments, whichever is the subclass."""
    function = getattr(softmax_ext, name)
    tensors = {
        "input": torch.randn(3, 4, device=device),
        "mask": torch.rand(3, 4, device=device) > 0.3,
        "sink": torch.randn(3, 1, device=device),
    }
    expected = function(tensors["input"].clone(), -1, mask=tensors["mask"], sink=tensors["sink"])
    tensors[of] = tensors[of].as_subclass(Subclass)
    Subclass.seen.clear()
    result = function(tensors["input"], -1, mask=tensors["mask"], sink=tensors["sink"])
    called = [kwargs for func, kwargs in Subclass.seen if func is function]
    assert len(called) == 1
    assert called[0]["mask"] is tensors["mask"] and called[0]["sink"] is tensors["sink"]
    assert type(result) is Subclass
    torch.testing.assert_close(result.as_subclass(torch.Tensor), expected)


class Plain(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_compiled_subclass(device: str) -> None:
    x = torch.randn(3, 4, device=device)
    function = torch.compile(
        lambda x: softmax_ext.softmax(x, 1, scale=2.0), fullgraph=True, backend="eager"
    )
    y = function(x.as_subclass(Plain))
    assert type(y) is Plain
    torch.testing.assert_close(y.as_subclass(torch.Tensor), softmax_ext.softmax(x, 1, scale=2.0))


def test_torch_function_mode(device: str) -> None:
    from torch.overrides import TorchFunctionMode

    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append((func, kwargs))
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 4, device=device)
    with Mode():
        y = softmax_ext.softmax(x, 1, scale=2.0, softcap=None)
    assert [kwargs["scale"] for func, kwargs in seen if func is softmax_ext.softmax] == [2.0]
    assert torch.equal(y, softmax_ext.softmax(x, 1, scale=2.0))


# --- A temperature that is a tensor --------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_wrong_temperature_in_a_graph_and_under_transforms(value: float, device: str) -> None:
    x = torch.randn(3, 4, device=device)
    if device == "cuda":
        return  # an assertion on the device ends its use in this process

    def function(temperature: torch.Tensor) -> torch.Tensor:
        return softmax_ext.softmax(x, 1, temperature=temperature)

    def mapped(temperature: torch.Tensor) -> torch.Tensor:
        return torch.vmap(function)(torch.stack([torch.tensor(1.0), temperature]))

    words = "temperature above 0"
    if torch.__version__.startswith("2.11."):  # which hides whatever a compiled vmap raises
        words += "|dynamicLayerStack"
    for each in (
        mapped,
        torch.func.grad(lambda temperature: function(temperature).sum()),
        *(
            torch.compile(traced, fullgraph=True, backend=backend)
            for traced in (function, mapped)
            for backend in ("eager", "aot_eager", "inductor")
        ),
    ):
        assert each(torch.tensor(2.0)).isfinite().all()
        with pytest.raises((ValueError, RuntimeError), match=words):
            each(torch.tensor(value))


# --- Modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_modules(name: str, inplace: bool, device: str) -> None:
    function = softmax_ext.softmax if name == "Softmax" else softmax_ext.log_softmax
    sink = torch.nn.Parameter(torch.randn(2))
    mask = torch.rand(3, 4) > 0.3
    scores: dict[str, Any] = {"scale": 0.5, "is_causal": True, "sink": sink, "mask": mask}
    module = getattr(softmax_ext, name)(-1, inplace=inplace, **scores).to(device)
    assert [key for key, _ in module.named_parameters()] == ["sink"]
    assert [key for key, _ in module.named_buffers()] == ["mask"]
    assert repr(module) == (
        f"{name}(dim=-1{', inplace=True' * inplace}, scale=0.5, is_causal=True, sink=Tensor(2,), "
        "mask=Tensor(3, 4))"
    )
    x = torch.randn(SHAPE, device=device)
    expected = function(x, -1, **to_device(scores, device))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)))
    for each in (module, *copies, torch.load(file, weights_only=False)):
        given = x.clone()
        y = each(given)
        assert torch.equal(y, expected)
        assert (y.data_ptr() == given.data_ptr()) is inplace
    finite(module(x.clone())).square().sum().backward()
    assert module.sink.grad is not None
    other = getattr(softmax_ext, name)(-1, sink=torch.nn.Parameter(torch.zeros(2)), mask=~mask)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.sink.cpu(), module.sink.cpu())


def test_a_module_over_several_dims(device: str) -> None:
    x = torch.randn(2, 3, 4, device=device)
    module = softmax_ext.Softmax((1, 2))
    assert repr(module) == "Softmax(dim=(1, 2))"
    assert torch.equal(module(x), softmax_ext.softmax(x, (1, 2)))


def test_kinds_of_these_tests_are_all_there_are() -> None:
    assert all(
        name in kind for kinds in DIFFERENTIABLE for name, kind in zip(kinds, KINDS, strict=True)
    )
