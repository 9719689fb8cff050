"""Linear cross-entropy: values and gradients against float64, what it costs, what it refuses."""

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import all_pairs
from test_losses_values import OPTIONS, reference
from tolerances import FLOATING
from torch._subclasses.fake_tensor import FakeTensorMode

import softmax_ext

has_torchs = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)


LEAVES = ("input", "linear_weight", "linear_bias")


def chunks(rows: int) -> Any:
    """As torch.nn.LinearCrossEntropyOptions, which not every torch has."""
    return SimpleNamespace(batch_chunk_size=rows)


def case(
    dtype: torch.dtype,
    rows: int = 33,
    features: int = 12,
    classes: int = 21,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Leaves, weights of the classes, and targets of which one in four is ignored."""
    generator = torch.Generator().manual_seed(rows)
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    target = torch.randint(classes, (rows,), generator=generator)
    target[1::4] = -100
    tensors = {
        "input": random(rows, features).to(dtype),
        "linear_weight": (random(classes, features) * features**-0.5).to(dtype),
        "linear_bias": random(classes).to(dtype),
        "weight": torch.rand(classes, generator=generator).add(0.5).to(dtype),
        "target": target,
    }
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name in LEAVES:
        tensors[name].requires_grad_()
    return tensors


def by_torch(tensors: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """In float64: loss and lse, which have gradients for leaves of their own, and these."""
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    leaves = [tensors[name].double().requires_grad_() for name in LEAVES]
    logits = F.linear(*leaves)
    x, loss, lse = reference(logits, tensors["target"], tensors.get("weight"), **options)
    return [loss, lse, x, logits, *leaves]


@pytest.mark.parametrize(
    ("options", "dtype", "reduction", "weighted", "chunk", "as_callable", "with_lse"),
    all_pairs(
        list(
            itertools.product(
                OPTIONS,
                FLOATING,
                ["none", "mean", "sum"],
                [False, True],
                [1, 8, 25, 100],  # one row; whole ones; of rows that count, exactly; one chunk
                [False, True],
                [False, True],
            )
        )
    ),
)
def test_forward_and_backward(
    options: str,
    dtype: torch.dtype,
    reduction: str,
    weighted: bool,
    chunk: int,
    as_callable: bool,
    with_lse: bool,
    device: str,
) -> None:
    tensors = case(dtype, device=device)
    if not weighted:
        del tensors["weight"]
    input, linear_weight, linear_bias = (tensors[name] for name in LEAVES)
    kwargs: dict[str, Any] = {**OPTIONS[options], "reduction": reduction}
    projection: Any = linear_weight
    if as_callable:
        projection = lambda x: F.linear(x, linear_weight, linear_bias)  # noqa: E731
    result = softmax_ext.linear_cross_entropy(
        input,
        projection,
        tensors["target"],
        linear_bias=None if as_callable else linear_bias,
        weight=tensors.get("weight"),
        options=chunks(chunk),
        return_lse=with_lse,
        **kwargs,
    )
    loss, lse = result if isinstance(result, tuple) else (result, None)
    expected, expected_lse, x64, logits64, *leaves64 = by_torch(tensors, **kwargs)
    is_half = dtype.itemsize == 2
    assert loss.dtype == (torch.float32 if is_half and as_callable else dtype)
    # Logits of 16 bits are off by half of an ulp each.
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": 8 * eps, "atol": 8 * eps}
    torch.testing.assert_close(loss.double().cpu(), expected, **tolerance)
    g = torch.rand(loss.shape)
    outputs, grads = [loss], [g.to(loss)]
    outputs64, grads64 = [expected], [g.double()]
    if lse is not None:
        torch.testing.assert_close(lse.double().cpu(), expected_lse, **tolerance)
        g_lse = torch.rand(lse.shape) / 8
        outputs, grads = [*outputs, lse], [*grads, g_lse.to(lse)]
        outputs64, grads64 = [*outputs64, expected_lse], [*grads64, g_lse.double()]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(outputs64, grads64)
    logits64.backward(x64.grad)
    for name, leaf64 in zip(LEAVES, leaves64, strict=True):
        found = tensors[name].grad
        assert found is not None
        assert found.dtype == dtype
        assert leaf64.grad is not None
        largest = float(leaf64.grad.abs().max())
        torch.testing.assert_close(
            found.double().cpu(), leaf64.grad, rtol=8 * eps, atol=8 * eps * largest
        )


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_of_losses_is_not_rounded(dtype: torch.dtype, chunk: int) -> None:
    """A sum of many losses, in chunks of any size, is as near as the logits let it be."""
    tensors = case(dtype, rows=1000, classes=300)
    losses = softmax_ext.linear_cross_entropy(
        tensors["input"],
        tensors["linear_weight"],
        tensors["target"],
        reduction="none",
        options=chunks(chunk),
    )
    logits = F.linear(tensors["input"], tensors["linear_weight"])
    expected = F.cross_entropy(logits.double(), tensors["target"])
    total = (tensors["target"] >= 0).sum()
    made = torch.ops.softmax_ext.linear_cross_entropy_of_rows(
        tensors["input"],
        tensors["linear_weight"],
        None,
        tensors["target"],
        None,
        None,
        None,
        [False] * 3,
        False,
        chunk,
        -100,
        0.0,
        0.0,
        1.0,
        0.0,
    )
    rows = made[0].double()
    assert losses.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-5
    torch.testing.assert_close(rows.sum() / total, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_gradient_is_no_less_accurate_than_torchs(dtype: torch.dtype) -> None:
    tensors = case(dtype, rows=600, classes=50)
    loss64 = F.cross_entropy(
        F.linear(
            tensors["input"].detach().double(),
            leaf := tensors["linear_weight"].detach().double().requires_grad_(),
        ),
        tensors["target"],
    )
    (right,) = torch.autograd.grad(loss64, leaf)
    errors = []
    for loss in (
        softmax_ext.linear_cross_entropy(
            tensors["input"], tensors["linear_weight"], tensors["target"], options=chunks(64)
        ),
        F.cross_entropy(F.linear(tensors["input"], tensors["linear_weight"]), tensors["target"]),
    ):
        (found,) = torch.autograd.grad(loss, tensors["linear_weight"])
        errors.append(float((found.double() - right).norm()))
    assert errors[0] <= 1.05 * errors[1]


# ---- torch's samples ----------------------------------------------------------------------------


def infos() -> list[Any]:
    """What has them takes seconds to import, which a run of other tests does without."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [info for info in op_db if info.name == "nn.functional.linear_cross_entropy"]


def samples(dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    for info in infos():
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            yield info, sample


def ours(sample: Any) -> torch.Tensor:
    return softmax_ext.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)


@has_torchs
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_values_of_torchs_samples(dtype: torch.dtype) -> None:
    rounding = 16 * torch.finfo(dtype).eps
    count = 0
    for info, sample in samples(dtype):
        # Without options: the chunked path of torch sums 16 bits in 16 bits.
        sample.kwargs = {k: v for k, v in sample.kwargs.items() if k != "options"}
        expected = info.op(sample.input, *sample.args, **sample.kwargs)
        found = ours(sample)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding, equal_nan=True)
        count += 1
    assert count > 100


@has_torchs
def test_gradients_of_torchs_samples() -> None:
    for _, sample in samples(torch.float64):
        leaves = [
            t
            for t in (sample.input, *sample.args, *sample.kwargs.values())
            if isinstance(t, torch.Tensor) and t.requires_grad
        ]
        assert leaves
        assert torch.autograd.gradcheck(lambda *_, s=sample: ours(s), leaves, fast_mode=True)


@has_torchs
def test_errors_of_torchs_samples() -> None:
    count = 0
    info = infos()[0]
    for error in info.error_inputs_func(info, "cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            ours(sample)
        count += 1
    assert count > 0


# ---- what it costs ------------------------------------------------------------------------------


def products(function: Any) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        function()
    names = ("aten::mm", "aten::addmm", "aten::addmm_")
    return sum(event.count for event in record.key_averages() if event.key in names)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [((), 3), (("linear_weight",), 2), (("input",), 2), (("input", "linear_weight"), 1)],
    ids=str,
)
def test_products(frozen: tuple[str, ...], expected: int) -> None:
    """One for the logits of a chunk, and one for each gradient that is wanted."""
    tensors = case(torch.float32)
    for name in frozen:
        tensors[name].requires_grad_(False)

    def step() -> None:
        loss = softmax_ext.linear_cross_entropy(
            tensors["input"],
            tensors["linear_weight"],
            tensors["target"],
            linear_bias=tensors["linear_bias"],
            options=chunks(100),
        )
        loss.backward()

    assert products(step) == expected


def test_without_gradients_there_is_one_product() -> None:
    tensors = case(torch.float32)
    with torch.no_grad():
        count = products(
            lambda: softmax_ext.linear_cross_entropy(
                tensors["input"], tensors["linear_weight"], tensors["target"], options=chunks(100)
            )
        )
    assert count == 1


def test_ignored_rows_cost_nothing() -> None:
    """Nor are they read: 33 rows, of which 25 count, in chunks of 5."""
    tensors = case(torch.float32)
    with torch.no_grad():
        tensors["input"][tensors["target"] == -100] = float("nan")

    def loss() -> torch.Tensor:
        return softmax_ext.linear_cross_entropy(
            tensors["input"], tensors["linear_weight"], tensors["target"], options=chunks(5)
        )

    assert products(lambda: loss().backward()) == 3 * 5
    grad = tensors["input"].grad
    assert grad is not None
    assert not grad[tensors["target"] == -100].any()
    assert grad.isfinite().all()
    assert loss().isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_callable", [False, True])
def test_memory(dtype: torch.dtype, as_callable: bool) -> None:
    """At most two tiles beside the gradients and what they are added up in; logits never."""
    rows, features, classes, chunk = 512, 8, 4000, 16
    tensors = case(dtype, rows, features, classes)
    input, linear_weight = tensors["input"], tensors["linear_weight"]
    projection: Any = linear_weight
    if as_callable:
        projection = lambda x: F.linear(x, linear_weight)  # noqa: E731
    with torch.profiler.profile(profile_memory=True) as record:
        softmax_ext.linear_cross_entropy(
            input, projection, tensors["target"], options=chunks(chunk)
        ).backward()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    tile = chunk * classes * 4
    weights = classes * features * 4
    # A callable's logits are 16 bits, float32, and gradients of either kind.
    assert peak < (5 * tile if as_callable else 2 * tile) + 4 * weights + 3 * input.nbytes + 65536
    assert peak < rows * classes * dtype.itemsize


# ---- autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward(reduction: str) -> None:
    tensors = case(torch.float64)
    leaves = [tensors[name] for name in LEAVES[:2]]
    loss = softmax_ext.linear_cross_entropy(*leaves, tensors["target"], reduction=reduction).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_gradients_that_are_changed() -> None:
    """Those of a graph that is kept are the caller's: the next backward makes others."""
    tensors = case(torch.float32)
    leaves = [tensors[name] for name in LEAVES[:2]]
    loss = softmax_ext.linear_cross_entropy(*leaves, tensors["target"])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    for a, b in zip(torch.autograd.grad(loss, leaves, retain_graph=True), kept, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(torch.autograd.grad(loss, leaves), kept, strict=True):
        assert torch.equal(a, b)

    module = softmax_ext.LinearCrossEntropyLoss(12, 21)
    loss = module(tensors["input"].detach(), tensors["target"])
    for _ in range(3):
        loss.backward(retain_graph=True)
    three = module.linear.weight.grad.clone()
    module.linear.weight.grad.zero_()
    loss.backward()
    torch.testing.assert_close(3 * module.linear.weight.grad, three)


def test_batched_gradients() -> None:
    tensors = case(torch.float64)
    w = tensors["linear_weight"]
    loss = softmax_ext.linear_cross_entropy(tensors["input"], w, tensors["target"])
    factors = torch.tensor([1.0, 2.0, 0.5]).double()
    (found,) = torch.autograd.grad(loss, w, factors, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(found, factors[:, None, None] * one)


def test_fake_tensors_and_traces() -> None:
    x, w, y = torch.randn(6, 4), torch.randn(5, 4), torch.randint(5, (6,))
    y[2] = -100
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, w, y)]
        for projection in (fake[1], lambda rows: rows @ fake[1].t()):
            assert softmax_ext.linear_cross_entropy(fake[0], projection, fake[2]).shape == ()
    traced = torch.jit.trace(lambda x, y: softmax_ext.linear_cross_entropy(x, w, y), (x, y))
    torch.testing.assert_close(traced(x, y), softmax_ext.linear_cross_entropy(x, w, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int8, torch.int16], ids=str)
@pytest.mark.parametrize("as_callable", [False, True])
def test_targets_of_another_dtype_raise(as_callable: bool, dtype: torch.dtype) -> None:
    x, w, y = torch.randn(4, 6), torch.randn(5, 6), torch.tensor([0, 1, 1, 0]).to(dtype)

    def error_of(function: Callable[[], object]) -> str:
        """In torch 2.11 checkpoint keeps its hooks in place as long as a traceback is kept."""
        try:
            function()
        except RuntimeError as error:
            return str(error)
        return "none"

    projection = (lambda x: x @ w.t()) if as_callable else w
    expected = error_of(lambda: F.cross_entropy(x @ w.t(), y))
    assert expected != "none"
    assert error_of(lambda: softmax_ext.linear_cross_entropy(x, projection, y)) == expected


def test_float64_under_autocast() -> None:
    """Autocast leaves it, and so the loss, as they are."""
    x, w = torch.randn(4, 6).double().requires_grad_(), torch.randn(5, 6).double()
    y = torch.tensor([0, 1, 4, 2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = softmax_ext.linear_cross_entropy(x, w, y)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.t(), y))
    assert torch.autograd.grad(loss, x)[0].dtype == torch.float64


def test_weights_of_classes_that_are_ignored() -> None:
    """An infinite one is not in the mean, and a target out of range is named as without weights."""
    x, w, weight = torch.randn(4, 6), torch.randn(5, 6), torch.rand(5)
    weight[0] = torch.inf
    y = torch.tensor([0, 1, 4, 2])
    found = softmax_ext.linear_cross_entropy(x, w, y, weight=weight, ignore_index=0)
    expected = F.cross_entropy(x @ w.t(), y, weight, ignore_index=0)
    torch.testing.assert_close(found, expected)
    for weight_or_none in (None, weight):
        with pytest.raises(IndexError, match="Target 5 is out of bounds"):
            softmax_ext.linear_cross_entropy(
                x, w, torch.tensor([5, 1, 2, 3]), weight=weight_or_none
            )


def test_double_backward_raises() -> None:
    tensors = case(torch.float64)
    leaves = [tensors[name] for name in LEAVES[:2]]
    loss = softmax_ext.linear_cross_entropy(*leaves, tensors["target"])
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_double_backward_of_a_callable() -> None:
    tensors = case(torch.float64, rows=5, features=3, classes=4)
    input, linear_weight = tensors["input"], tensors["linear_weight"]

    def loss(x: torch.Tensor, w: torch.Tensor) -> Any:
        return softmax_ext.linear_cross_entropy(
            x, lambda rows: rows @ w.T, tensors["target"], options=chunks(2)
        )

    assert torch.autograd.gradcheck(loss, (input, linear_weight))


def test_transforms_are_torchs() -> None:
    tensors = case(torch.float64)

    def loss(function: Any) -> Any:
        return lambda w: function(tensors["input"].detach(), w, tensors["target"])

    def composed(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    w = tensors["linear_weight"].detach()
    for transform in (torch.func.grad, torch.func.hessian):
        found = transform(loss(softmax_ext.linear_cross_entropy))(w)
        torch.testing.assert_close(found, transform(loss(composed))(w))
    tangent = torch.rand_like(w)
    _, found = torch.func.jvp(loss(softmax_ext.linear_cross_entropy), (w,), (tangent,))
    _, expected = torch.func.jvp(loss(composed), (w,), (tangent,))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction: str) -> None:
    tensors = case(torch.float32)
    leaves = [tensors[name] for name in LEAVES[:2]]
    options = chunks(8)

    def loss(*leaves: torch.Tensor) -> Any:
        return softmax_ext.linear_cross_entropy(
            *leaves, tensors["target"], reduction=reduction, options=options
        ).sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    tensors = {name: t.detach() for name, t in case(torch.float32).items()}
    for grads in ((torch.tensor(0.5), None), (torch.rand(33), torch.rand(33))):
        torch.library.opcheck(
            torch.ops.softmax_ext.linear_cross_entropy_of_rows.default,
            (
                *(tensors[name] for name in (*LEAVES, "target", "weight")),
                *grads,
                [True] * 3,
                grads[1] is not None,
                8,
                -100,
                0.1,
                1e-3,
                1.0,
                0.0,
            ),
        )


def test_autocast() -> None:
    """Products in 16 bits, rows and the loss in float32, as linear and cross_entropy have it."""
    tensors = case(torch.float32)
    leaves = [tensors[name] for name in LEAVES]

    def both() -> Iterator[tuple[torch.Tensor, ...]]:
        for function in (
            lambda x, w, b: softmax_ext.linear_cross_entropy(
                x, w, tensors["target"], linear_bias=b
            ),
            lambda x, w, b: F.cross_entropy(F.linear(x, w, b), tensors["target"]),
        ):
            with torch.autocast("cpu", torch.bfloat16):
                loss = function(*leaves)
            yield (loss, *torch.autograd.grad(loss, leaves))

    found, expected = both()
    assert found[0].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


# ---- other projections and targets --------------------------------------------------------------


def test_a_module_with_hooks() -> None:
    """Its forward is called, not its weight read; its parameters get their gradients once."""
    tensors = case(torch.float64)
    layer = torch.nn.Linear(12, 21).double()
    adapter = torch.nn.Linear(12, 21, bias=False).double()
    layer.register_forward_hook(lambda _, args, output: output + adapter(args[0]))
    parameters = [*layer.parameters(), *adapter.parameters()]
    losses = (
        softmax_ext.linear_cross_entropy(
            tensors["input"], layer, tensors["target"], options=chunks(8)
        ),
        F.cross_entropy(layer(tensors["input"]), tensors["target"]),
    )
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, [tensors["input"], *parameters]) for loss in losses]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_probabilities(reduction: str) -> None:
    tensors = case(torch.float64)
    target = torch.rand(33, 21).double().softmax(1).requires_grad_()
    leaves = [*(tensors[name] for name in LEAVES), target]
    kwargs: dict[str, Any] = {"weight": tensors["weight"], "reduction": reduction}
    losses = (
        softmax_ext.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], options=chunks(8), **kwargs
        ),
        F.cross_entropy(F.linear(*leaves[:3]), target, **kwargs),
    )
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss.sum(), leaves) for loss in losses]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_other_indices(dtype: torch.dtype) -> None:
    tensors = case(torch.float64)
    target = tensors["target"].clamp(min=0)
    torch.testing.assert_close(
        softmax_ext.linear_cross_entropy(*list(tensors.values())[:2], target.to(dtype)),
        softmax_ext.linear_cross_entropy(*list(tensors.values())[:2], target),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_callable", [False, True])
@pytest.mark.parametrize("rows", [0, 6])
def test_no_rows_that_count(rows: int, as_callable: bool, dtype: torch.dtype) -> None:
    """The loss of torch; gradients of 0, also of a mean."""
    tensors = case(dtype, rows=rows)
    tensors["target"].fill_(-100)
    leaves = [tensors[name] for name in LEAVES[:2]]
    projection: Any = (lambda x: F.linear(x, leaves[1])) if as_callable else leaves[1]
    for reduction, expected in {"mean": float("nan"), "sum": 0.0}.items():
        loss = softmax_ext.linear_cross_entropy(
            leaves[0], projection, tensors["target"], reduction=reduction
        )
        assert loss.float().item() == pytest.approx(expected, nan_ok=True)
        assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"linear_weight": 3}, TypeError, "'linear_weight' must be Tensor or callable, not int"),
        ({"input": [1.0]}, TypeError, "'input' must be Tensor, not list"),
        ({"input": torch.ones(2, 3, 12)}, RuntimeError, "dimensionality 1 or 2, got 3"),
        ({"input": torch.ones(33, 11)}, RuntimeError, "got 11 and 12, respectively"),
        ({"linear_bias": torch.ones(20)}, RuntimeError, r"bias shape \(21,\), got \(20,\)"),
        ({"target": torch.zeros(32).long()}, ValueError, "batch_size"),
        ({"target": torch.full((33,), 21)}, IndexError, "Target 21 is out of bounds"),
        ({"target": torch.full((33,), -7)}, IndexError, "element 0 is not"),
        ({"reduction": "max"}, ValueError, "max is not a valid value for reduction"),
        ({"temperature": 0.0}, ValueError, "'temperature' to be above 0"),
        ({"softcap": -1.0}, ValueError, "'softcap' to be above 0"),
        ({"label_smoothing": 2.0}, RuntimeError, "label_smoothing must be between"),
        ({"weight": torch.ones(20)}, RuntimeError, "weight tensor should be defined"),
        ({"input": torch.ones(33, 12).double()}, RuntimeError, "dtype"),
        (
            {"linear_weight": lambda x: x, "linear_bias": torch.ones(21)},
            ValueError,
            "takes no 'linear_bias'",
        ),
        ({"options": chunks(0)}, ValueError, "'chunk' to be above 0, but got 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = case(torch.float32)
    arguments = {name: tensors[name] for name in ("input", "linear_weight", "target")}
    arguments |= {k: v for k, v in changes.items() if k in arguments}
    kwargs = {k: v for k, v in changes.items() if k not in arguments}
    with pytest.raises(error, match=message):
        softmax_ext.linear_cross_entropy(*arguments.values(), **kwargs)


# ---- the module ---------------------------------------------------------------------------------


def test_module() -> None:
    """With the parameters of torch's, whose state it takes."""
    module = softmax_ext.LinearCrossEntropyLoss(5, 7, bias=True, label_smoothing=0.1)
    x, y = torch.randn(3, 5), torch.tensor([0, 6, -100])
    expected = F.cross_entropy(module.linear(x), y, label_smoothing=0.1)
    torch.testing.assert_close(module(x, y), expected)
    assert set(module.state_dict()) == {"linear.weight", "linear.bias"}
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        torchs = torch.nn.LinearCrossEntropyLoss(5, 7, bias=True, label_smoothing=0.1)
        module.load_state_dict(torchs.state_dict())
        torch.testing.assert_close(module(x, y), torchs(x, y))


def test_module_of_more_dims() -> None:
    module = softmax_ext.LinearCrossEntropyLoss(5, 7, out_features=(2, 3))
    x, y = torch.randn(4, 5), torch.randint(7, (4, 2, 3))
    expected = F.cross_entropy(module.linear(x).view(4, 7, 2, 3), y)
    torch.testing.assert_close(module(x, y), expected)
