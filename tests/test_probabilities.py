"""cross_entropy with class probabilities by the kernels: values and gradients against float64.

What is the same for all targets, torch's samples among it, test_losses.py has.
"""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import all_pairs
from tolerances import FLOATING

import softmax_ext

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0, "temperature": 2.0},
}
SHAPES = {
    "1-D": (10,),
    "one class": (3, 1),
    "a part of a register": (65, 7),
    "a little more": (21, 17),
    "a chunk of float32 and one": (2, 4097),
    "many chunks, more rows than threads": (3, 20011),
    "one long row": (1, 50257),
}


def case(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, probabilities whose sum is not 1, and weights of the classes."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * 2
    target = torch.randn(shape, dtype=torch.float64, generator=generator).softmax(-1) * 1.5
    weight = torch.rand(shape[-1], dtype=torch.float64, generator=generator) + 0.5
    x, target, weight = (t.to(dtype).to(device) for t in (x, target, weight))
    return x.requires_grad_(), target.requires_grad_(), weight


def reference(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, ...]:
    """In float64: the logits, the target, the loss and lse."""
    x, t = (tensor.detach().double().cpu().requires_grad_() for tensor in (input, target))
    z = x / options.get("temperature", 1.0)
    if softcap := options.get("softcap"):
        z = softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(-1)
    rows = F.cross_entropy(
        z,
        t,
        None if weight is None else weight.double().cpu(),
        reduction="none",
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    rows = rows + options.get("z_loss", 0.0) * lse**2
    loss = {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[options["reduction"]]
    return x, t, loss, lse


def assert_close(found: torch.Tensor, expected: torch.Tensor, ulps: float, atol: float) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.detach().double().cpu(), expected.detach(), rtol=ulps * eps, atol=atol
    )


@pytest.mark.parametrize(
    ("shape", "options", "dtype", "reduction", "weighted"),
    all_pairs(
        list(itertools.product(SHAPES, OPTIONS, FLOATING, ["none", "mean", "sum"], [False, True]))
    ),
)
def test_forward_and_backward(
    shape: str, options: str, dtype: torch.dtype, reduction: str, weighted: bool, device: str
) -> None:
    x, target, weight = case(SHAPES[shape], dtype, device)
    w = weight if weighted else None
    kwargs = {**OPTIONS[options], "reduction": reduction}
    loss, lse = softmax_ext.cross_entropy(x, target, w, return_lse=True, **kwargs)
    x64, t64, expected, expected_lse = reference(x, target, w, **kwargs)
    assert loss.dtype == dtype
    assert loss.shape == expected.shape
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = 0.51 if dtype.itemsize == 2 else 16
    assert_close(loss, expected, rounding, 32 * computed)
    assert_close(lse, expected_lse, 4, 4 * computed)
    g, g_lse = torch.rand(loss.shape), torch.rand(lse.shape) / 8
    torch.autograd.backward([loss, lse], [g.to(loss), g_lse.to(lse)])
    torch.autograd.backward([expected, expected_lse], [g.to(dtype).double(), g_lse.double()])
    for found, right in ((x, x64), (target, t64)):
        assert found.grad is not None
        assert right.grad is not None
        assert found.grad.dtype == dtype
        # Of differences of terms of the size of the largest; and a rounding of what is subnormal.
        finfo = torch.finfo(dtype)
        atol = float(right.grad.abs().max()) * 32 * computed
        atol += 0.51 * finfo.smallest_normal * finfo.eps
        assert_close(found.grad, right.grad, rounding, atol)


def test_forward_of_far_off_logits() -> None:
    """The loss has no error of the size of what all logits have in common."""
    x, target, _ = case((8, 5000), torch.float32)
    far = x.detach() + 2.0**13
    _, _, expected, _ = reference(far - 2.0**13, target, None, reduction="none")
    assert_close(softmax_ext.cross_entropy(far, target, reduction="none"), expected, 8, 0)


@pytest.mark.parametrize("shape", [(4, 9), (1, 9000)], ids=str)
def test_infinities_and_nan_are_torchs(shape: tuple[int, ...]) -> None:
    x, target, _ = case(shape)
    with torch.no_grad():
        for k, value in enumerate((-math.inf, math.inf, math.nan)):
            x[k % shape[0], 4] = value
    found = softmax_ext.cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(found, F.cross_entropy(x, target, reduction="none"), equal_nan=True)


def test_layout() -> None:
    x, target, _ = (tensor.detach() for tensor in case((6, 70), torch.float32))
    expected = softmax_ext.cross_entropy(x, target, reduction="none")
    wide = torch.full((6, 75), math.nan)
    wide[:, 2:72] = target
    strided = [x.t().contiguous().t(), wide[:, 2:72], torch.cat([x, x], 1)[:, :70]]
    for a, b in ((strided[0], target), (x, strided[1]), (strided[2], strided[1])):
        assert torch.equal(softmax_ext.cross_entropy(a, b, reduction="none"), expected)
    one = target[:1].expand(6, 70)
    assert torch.equal(
        softmax_ext.cross_entropy(x, one), softmax_ext.cross_entropy(x, one.contiguous())
    )


@pytest.mark.parametrize("shape", [(40, 30), (3, 20011)], ids=str)
def test_invariance(shape: tuple[int, ...]) -> None:
    """A row has the same bits in any batch, on any number of threads."""
    x, target, _ = case(shape, torch.float32)

    def bits(x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = softmax_ext.cross_entropy(x, target, reduction="none", label_smoothing=0.1)
        return (loss, *torch.autograd.grad(loss.sum(), (x, target)))

    expected = bits(x, target)
    count = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            first = bits(*(t.detach()[:1].clone().requires_grad_() for t in (x, target)))
            for found, alone, right in zip(bits(x, target), first, expected, strict=True):
                assert torch.equal(found, right)
                assert torch.equal(alone, right[:1])
    finally:
        torch.set_num_threads(count)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=str)
def test_gradcheck(shape: tuple[int, ...], options: str, reduction: str) -> None:
    """Of both arguments, first and second order, batched, forward mode; lse's among them."""
    x, target, weight = case(shape)

    def function(x: torch.Tensor, target: torch.Tensor) -> Any:
        return softmax_ext.cross_entropy(
            x, target, weight, reduction=reduction, return_lse=True, **OPTIONS[options]
        )

    assert torch.autograd.gradcheck(
        function, (x, target), check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(function, (x, target))


def test_one_gradient_alone() -> None:
    """Also of lse alone, and of a target alone."""
    x, target, _ = case((4, 9))
    loss, lse = softmax_ext.cross_entropy(x, target, return_lse=True)
    (grad,) = torch.autograd.grad(lse.sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, x.softmax(1))
    of_target = softmax_ext.cross_entropy(x.detach(), target)
    assert torch.equal(
        torch.autograd.grad(of_target, target)[0], torch.autograd.grad(loss, target)[0]
    )


def test_kernels_run() -> None:
    """For the shapes and dtypes that they take, and for no others."""
    x, target, weight = case((4, 9), torch.float32)
    name = "SoftmaxExtCrossEntropyOfProbabilitiesBackward"

    def node(*args: Any, **kwargs: Any) -> str:
        return str(softmax_ext.cross_entropy(*args, **kwargs).grad_fn.name())

    assert node(x, target, weight) == node(x[0], target[0]) == name
    assert node(x.unsqueeze(-1), target.unsqueeze(-1)) != name
    assert node(x, target.double()) != name


def test_compile() -> None:
    def function(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss, lse = softmax_ext.cross_entropy(
            x, target, label_smoothing=0.2, softcap=5.0, temperature=2.0, return_lse=True
        )
        return loss + lse.mean()

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for classes in (12, 31):
        inputs = case((6, classes), torch.float32)[:2]
        found, expected = compiled(*inputs), function(*inputs)
        assert torch.equal(found, expected)
        for a, b in zip(
            torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(reduction: int) -> None:
    x, target, weight = case((4, 9), torch.float32)
    ops, options = torch.ops.softmax_ext, (reduction, 0.1, 0.1, 1.0, 0.0)
    torch.library.opcheck(ops.cross_entropy_of_probabilities, (x, target, weight, *options, True))
    x, target = x.detach(), target.detach()
    loss, *kept = ops.cross_entropy_of_probabilities(x, target, weight, *options, True)
    torch.library.opcheck(
        ops.cross_entropy_of_probabilities_backward,
        (torch.ones_like(loss), kept[0], x, target, weight, *kept, *options, True, True),
    )


def test_errors_of_the_operators() -> None:
    """Each relies on nothing that it has not checked."""
    ops, options = torch.ops.softmax_ext, (1, 0.0, 0.0, 1.0, 0.0)
    x, target, weight = (tensor.detach() for tensor in case((4, 9)))
    _, lse, kept = ops.cross_entropy_of_probabilities(x, target, None, *options, True)
    for args in (
        (x, target[:2], None, *options),
        (x, target.float(), None, *options),
        (x, target, weight[:3], *options),
        (x, target, weight.float(), *options),
        (x.unsqueeze(0), target.unsqueeze(0), None, *options),
        (x, target, None, 3, *options[1:]),
        (x, target, None, 1, 2.0, *options[2:]),
        (x, target, None, 1, 0.0, 0.0, 0.0, 0.0),
        (x, target, None, 1, 0.0, 0.0, 1.0, -1.0),
    ):
        with pytest.raises((RuntimeError, ValueError), match="cross_entropy"):
            ops.cross_entropy_of_probabilities(*args, True)
    one = torch.ones((), dtype=x.dtype)
    for grad, grad_lse, of_rows in (
        (lse, None, kept),
        (one, one, kept),
        (one, None, kept[:, :3]),
        (one, lse.float(), kept),
    ):
        with pytest.raises(RuntimeError, match="cross_entropy_backward"):
            ops.cross_entropy_of_probabilities_backward(
                grad, grad_lse, x, target, None, lse, of_rows, *options, True, True
            )
