"""cross_entropy(inplace_backward=True): the gradient lies where the logits were."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import all_pairs
from test_losses_values import LAYOUTS, OPTIONS, SHAPES, case
from test_scores_memory import allocated
from tolerances import FLOATING

import softmax_ext


def both(
    make: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *args: Any, **options: Any
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient of make(leaf), without and with inplace_backward."""
    results = []
    for in_place in (False, True):
        leaf = x.detach().clone().requires_grad_()
        loss = softmax_ext.cross_entropy(make(leaf), *args, inplace_backward=in_place, **options)
        loss.backward(torch.arange(1.0, 1 + loss.numel()).view(loss.shape).to(loss))
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    return results


@pytest.mark.parametrize(
    ("shape", "options", "dtype", "reduction", "weighted"),
    all_pairs(
        list(itertools.product(SHAPES, OPTIONS, FLOATING, ["none", "mean", "sum"], [False, True]))
    ),
)
def test_it_is_the_gradient(
    shape: str, options: str, dtype: torch.dtype, reduction: str, weighted: bool
) -> None:
    """With the bits of the loss without it, and of the gradient where it is not multiplied but by a
    power of two, which rounds what has few digits."""
    x, target, weight = case(SHAPES[shape], dtype, "cpu", weighted)
    (loss, grad), (found_loss, found) = both(
        lambda leaf: leaf * 1, x, target, weight, reduction=reduction, **OPTIONS[options]
    )
    torch.testing.assert_close(found_loss, loss, rtol=0, atol=0, equal_nan=True)
    rounding = 0.0 if reduction != "none" else torch.finfo(dtype).eps
    largest = float(grad.abs().max()) if grad.numel() else 0.0
    smallest = 2.0**-24 if dtype == torch.float16 and reduction == "mean" else 0.0
    torch.testing.assert_close(
        found, grad, rtol=rounding, atol=rounding * largest + smallest, equal_nan=True
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [2.0**15, 3000.0])
def test_a_mean_with_a_scale_of_the_loss(scale: float, weighted: bool) -> None:
    """In float16 a probability over the number of rows is 0 unless it has the scale already."""
    rows, classes = 4096, 500
    x = (torch.randn(rows, classes) * 3).half()
    target = torch.randint(classes, (rows,))
    target[::5] = -100
    weight = torch.rand(classes).half() if weighted else None
    leaf = x.clone().requires_grad_()
    loss = softmax_ext.cross_entropy(leaf * 1, target, weight, inplace_backward=True)
    (found,) = torch.autograd.grad(loss, leaf, torch.tensor(scale).half())
    x64 = x.double().requires_grad_()
    loss = F.cross_entropy(x64, target, None if weight is None else weight.double())
    (expected,) = torch.autograd.grad(loss, x64, torch.tensor(scale).double())
    # Rounded twice; and what lies below the smallest normal number before the scale.
    torch.testing.assert_close(
        found.double(), expected, rtol=2.0**-10, atol=2.0**-23 * scale / rows
    )
    assert (found != 0).double().mean() > 0.75


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("shape", [(8, 40), (8, 40, 30), (8, 12, 5, 6), (4, 5000)], ids=str)
def test_layout(shape: tuple[int, ...], name: str) -> None:
    """Logits that are a view of others: these have the gradient too."""
    x, _, _ = case(shape, torch.float32, "cpu")
    rows = LAYOUTS[name](x).select(1, 0)
    target = torch.arange(rows.numel()).view(rows.shape) % LAYOUTS[name](x).size(1)
    (loss, grad), (found_loss, found) = both(lambda leaf: LAYOUTS[name](leaf * 1), x, target)
    torch.testing.assert_close(found_loss, loss, rtol=0, atol=0)
    torch.testing.assert_close(found, grad, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 40000), (4, 20, 2000)], ids=str)
def test_threads(shape: tuple[int, ...]) -> None:
    """A long row is shared by threads, of which one may be done with the target's chunk."""
    x, target, _ = case(shape, torch.float32, "cpu")
    count = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(both(lambda leaf: leaf * 1, x, target)[1])
    finally:
        torch.set_num_threads(count)
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(grad, results[0][1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(64, 5000), (64, 70, 71)], ids=str)
def test_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """No tensor of the logits' size, forward and backward: a few numbers a row."""
    x, target, _ = case(shape, dtype, "cpu")
    logits = iter([x.clone() for _ in range(2)])

    def step() -> None:
        loss = softmax_ext.cross_entropy(next(logits), target, inplace_backward=True)
        torch.autograd.grad(loss, x)

    assert allocated(step) <= 8 * 8 * target.numel() + 4096


def test_the_gradient_is_the_logits_memory() -> None:
    x, target, _ = case((5, 7), torch.float32, "cpu")
    logits = x.clone()
    (grad,) = torch.autograd.grad(
        softmax_ext.cross_entropy(logits, target, inplace_backward=True), x
    )
    assert grad.data_ptr() == logits.data_ptr()


# ---- what cannot be had, and says so ------------------------------------------------------------


def overwritten(**options: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    x, target, _ = case((5, 7), torch.float64, "cpu")
    logits = x * 1
    return x, logits, softmax_ext.cross_entropy(logits, target, inplace_backward=True, **options)


def test_another_use_raises() -> None:
    x, logits, loss = overwritten()
    with pytest.raises(RuntimeError, match="were used again, but hold their gradient"):
        (loss + logits.sum()).backward()
    assert x.grad is None


def test_another_use_of_what_they_are_a_view_of_raises() -> None:
    x, target, _ = case((5, 7), torch.float64, "cpu")
    base = x * 1
    softmax_ext.cross_entropy(base[:, :-1], target.clamp(max=5), inplace_backward=True)
    with pytest.raises(RuntimeError, match="were used again, but hold their gradient"):
        base.sum().backward()


def test_what_was_saved_of_them_before_raises() -> None:
    x, target, _ = case((5, 7), torch.float64, "cpu")
    logits = x * 1
    before = logits.square().sum()
    softmax_ext.cross_entropy(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


def test_a_second_backward_raises() -> None:
    _, _, loss = overwritten()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_raises_under_saved_tensor_hooks() -> None:
    """Which have no version to look at."""
    x, target, _ = case((5, 7), torch.float64, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        loss = softmax_ext.cross_entropy(x * 1, target, inplace_backward=True)
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x, target), x)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(RuntimeError, match="given away by an earlier backward"):
        loss.backward()


def test_a_change_of_the_gradient_raises() -> None:
    _, logits, loss = overwritten()
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_raises() -> None:
    x, _, loss = overwritten()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_the_gradient_of_lse_raises() -> None:
    _, _, (_, lse) = overwritten(return_lse=True)
    with pytest.raises(RuntimeError, match="lse has no gradient where inplace_backward=True"):
        lse.sum().backward()


def test_a_leaf_raises() -> None:
    x, target, _ = case((5, 7), torch.float64, "cpu")
    kept = x.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        softmax_ext.cross_entropy(x, target, inplace_backward=True)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_logits_that_share_their_elements_raise() -> None:
    x, target, _ = case((1, 7), torch.float64, "cpu")
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        softmax_ext.cross_entropy((x * 1).expand(5, 7), target.expand(5) % 7, inplace_backward=True)


@pytest.mark.parametrize("grad", [False, True])
def test_logits_without_a_gradient_stay(grad: bool) -> None:
    x, target, _ = case((5, 7), torch.float64, "cpu")
    logits = x * 1 if grad else x.detach().clone()
    kept = logits.detach().clone()
    with torch.set_grad_enabled(not grad):
        loss = softmax_ext.cross_entropy(logits, target, inplace_backward=True)
    torch.testing.assert_close(logits, kept, rtol=0, atol=0)
    torch.testing.assert_close(loss, softmax_ext.cross_entropy(kept, target))


def test_compile_and_transforms_change_nothing() -> None:
    x, target, _ = case((5, 7), torch.float64, "cpu")

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        return softmax_ext.cross_entropy(leaf * 1, target, inplace_backward=True)

    (expected,) = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


def test_compiled_autograd() -> None:
    x, _, loss = overwritten()
    (expected,) = torch.autograd.grad(loss, x)
    x, _, loss = overwritten()
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        loss.backward()
    torch.testing.assert_close(x.grad, expected)


# ---- the operator -------------------------------------------------------------------------------


def test_opcheck_of_rows() -> None:
    x, target, weight = case((5, 7), torch.float32, "cpu", with_weight=True)
    grad_lse = torch.rand(5)
    for grads in ((torch.tensor(1.0), None), (torch.rand(5), grad_lse), (None, None)):
        arguments = (x.detach().clone(), target, weight, *grads, -100, 0.1, 1e-3, 0.5, 4.0)
        torch.library.opcheck(torch.ops.softmax_ext.cross_entropy_of_rows_.default, arguments)


def test_rows() -> None:
    """Losses and lse of the type computed in, and the gradient of what they are multiplied by."""
    x, target, weight = case((6, 9), torch.float64, "cpu", with_weight=True)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2}
    losses, lse = softmax_ext.cross_entropy(
        x, target, weight, reduction="none", return_lse=True, **options
    )
    g, g_lse = torch.rand(6).double(), torch.rand(6).double()
    torch.autograd.backward([losses, lse], [g, g_lse])
    over = x.detach().clone()
    found, found_lse = torch.ops.softmax_ext.cross_entropy_of_rows_(
        over, target, weight, g, g_lse, -100, 0.1, 1e-2, 1.0, 0.0
    )
    torch.testing.assert_close(found, losses.detach())
    torch.testing.assert_close(found_lse, lse.detach())
    torch.testing.assert_close(over, x.grad)


@pytest.mark.parametrize(
    ("grad_loss", "grad_lse", "message"),
    [
        (torch.ones(5), torch.ones(4), r"'grad_lse' to have the size \[5\], but got \[4\]"),
        (torch.ones(4), None, r"'grad_loss' to have the size \[5\] or \[\], but got \[4\]"),
        (torch.ones(5).double(), None, "expected scalar type Float but found Double"),
        (None, torch.ones(5).double(), "found Double for argument 'grad_lse'"),
        (torch.ones(5, device="meta"), None, "same device"),
    ],
)
def test_rows_refuse_other_gradients(
    grad_loss: torch.Tensor | None, grad_lse: torch.Tensor | None, message: str
) -> None:
    x, target, _ = case((5, 7), torch.float32, "cpu")
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        torch.ops.softmax_ext.cross_entropy_of_rows_(
            x.detach(), target, None, grad_loss, grad_lse, -100, 0.0, 0.0, 1.0, 0.0
        )
