"""Cross-entropy: values and gradients against float64, layouts, bits.

The float64 reference is torch's own formula on float64 logits, with z_loss, softcap and temperature
written out.
"""

import itertools
import math
from collections.abc import Callable
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
    "all smoothed": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0, "temperature": 2.0},
}
SHAPES = {
    "1-D": (10,),
    "one class": (3, 1),
    "a part of a register": (65, 7),
    "a register of float32": (33, 16),
    "a little more": (21, 17),
    "whole registers": (5, 128),
    "most of a chunk": (3, 4095),
    "a chunk of float32 and one": (2, 4097),
    "many chunks, more rows than threads": (3, 20011),
    "one long row": (1, 50257),
    "columns, a part of a register": (4, 5, 3),
    "columns, odd": (2, 19, 33),
    "columns, more than a block and a tile": (2, 40, 600),
    "columns, two dims": (2, 3, 5, 7),
    "no rows": (0, 5),
}


def reference(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of float64 logits: the logits, the loss and lse."""
    x = input.detach().double().cpu().requires_grad_()
    target = target.cpu()
    dim = 1 if x.dim() > 1 else 0
    z = x / options.get("temperature", 1.0)
    if softcap := options.get("softcap"):
        z = softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(dim)
    w = None if weight is None else weight.double().cpu()
    kwargs = {
        "ignore_index": options.get("ignore_index", -100),
        "label_smoothing": options.get("label_smoothing", 0.0),
    }
    counts = target != kwargs["ignore_index"]
    weights = counts.double() if w is None else w[target.where(counts, torch.tensor(0))] * counts
    rows = F.cross_entropy(z, target, w, reduction="none", **kwargs)
    rows = rows + options.get("z_loss", 0.0) * weights * lse**2
    reduction = options.get("reduction", "mean")
    loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / weights.sum()}[reduction]
    return x, loss, lse


def case(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, with_weight: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logits, targets of which one in four is ignored (not the first), and weights."""
    generator = torch.Generator().manual_seed(sum(shape))
    classes = shape[1] if len(shape) > 1 else shape[0]
    x = torch.randn(shape, generator=generator).mul(2).to(dtype).to(device).requires_grad_()
    of_rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(classes, of_rows, generator=generator)
    if target.dim():
        target.view(-1)[1::4] = -100
    weight = torch.rand(classes, generator=generator).add(0.5).to(dtype).to(device)
    return x, target.to(device), weight if with_weight else None


def assert_close(found: torch.Tensor, expected: torch.Tensor, ulps: float, atol: float) -> None:
    """Within ulps of found's type, and atol."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.detach().double().cpu(), expected.detach(), rtol=ulps * eps, atol=atol, equal_nan=True
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
    x, target, weight = case(SHAPES[shape], dtype, device, weighted)
    kwargs = {**OPTIONS[options], "reduction": reduction}
    loss, lse = softmax_ext.cross_entropy(x, target, weight, return_lse=True, **kwargs)
    x64, expected, expected_lse = reference(x, target, weight, **kwargs)
    assert loss.dtype == x.dtype
    assert loss.shape == expected.shape
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    computed = torch.finfo(lse.dtype).eps
    # 16 bits: a rounding. Otherwise of a sum of terms of either sign, with the size of the largest.
    assert_close(loss, expected, 0.51 if dtype.itemsize == 2 else 8, 32 * computed)
    assert_close(lse, expected_lse, 2, 4 * computed)
    g, g_lse = torch.rand(loss.shape), torch.rand(lse.shape) / 8
    torch.autograd.backward([loss, lse], [g.to(loss), g_lse.to(lse)])
    torch.autograd.backward([expected, expected_lse], [g.to(dtype).double(), g_lse.double()])
    assert x.grad is not None
    assert x64.grad is not None
    assert x.grad.dtype == dtype
    # Of differences of terms of the size of the largest; and a rounding of what is subnormal.
    largest = float(x64.grad.abs().max()) if x.numel() else 0.0
    finfo = torch.finfo(dtype)
    atol = largest * 32 * computed + 0.51 * finfo.smallest_normal * finfo.eps
    assert_close(x.grad, x64.grad, 0.51 if dtype.itemsize == 2 else 16, atol)


@pytest.mark.parametrize("shape", [(64, 9), (8, 5000), (4, 9, 40)], ids=str)
def test_forward_of_far_off_logits(shape: tuple[int, ...], device: str) -> None:
    """The loss and the gradient have no error of the size of what all logits have in common."""
    x, target, _ = case(shape, torch.float32, device)
    far = (x.detach() + 2.0**13).requires_grad_()
    near = (far.detach() - 2.0**13).requires_grad_()  # exactly
    for logits in (far, near):
        softmax_ext.cross_entropy(logits, target, label_smoothing=0.1).backward()
    _, expected, _ = reference(near, target, None, label_smoothing=0.1)
    assert_close(softmax_ext.cross_entropy(far, target, label_smoothing=0.1), expected, 8, 0)
    torch.testing.assert_close(far.grad, near.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(16, 5), (2, 5, 16), (2, 9000)], ids=str)
def test_backward_of_sure_targets(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Where the target's probability rounds to 1, its gradient p - 1 is as exact as any."""
    x = torch.zeros(shape, dtype=dtype, device=device)
    x[:, 0] = 20.0
    x = x.requires_grad_()
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    softmax_ext.cross_entropy(x, target, reduction="sum").backward()
    assert x.grad is not None
    # torch's softmax of float64 is off by 355 ulp here.
    other = math.exp(-20.0) / (1 + (shape[1] - 1) * math.exp(-20.0))
    expected = torch.full(shape, other, dtype=torch.float64)
    expected[:, 0] = -(shape[1] - 1) * other
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_close(x.grad, expected, 0.51 if dtype.itemsize == 2 else 16, tiny)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 5), (6, 9000), (6, 5, 20)], ids=str)
def test_forward_and_backward_of_ignored_rows(
    shape: tuple[int, ...], bad: float, device: str
) -> None:
    """They have loss 0 and gradient 0 whatever they hold, also where all are that."""
    x, target, _ = case(shape, torch.float32, device)
    target[1] = target[4] = -100
    with torch.no_grad():
        x[1] = x[4] = bad
    loss = softmax_ext.cross_entropy(x, target, reduction="none")
    loss.sum().backward()
    assert x.grad is not None
    assert not loss[1].any()
    assert not x.grad[1].any()
    assert not x.grad[4].any()
    assert bool(x.grad[0].isfinite().all())
    nothing = torch.full_like(target, -100)
    assert bool(softmax_ext.cross_entropy(x, nothing).isnan())
    assert softmax_ext.cross_entropy(x, nothing, reduction="sum") == 0


@pytest.mark.parametrize("shape", [(6, 5), (6, 9000), (6, 5, 20)], ids=str)
def test_backward_where_a_class_is_ignored(shape: tuple[int, ...], device: str) -> None:
    """lse of a row that is ignored has the gradient of any."""
    x, target, _ = case(shape, torch.float32, device)
    target[::2], target[1::2] = 3, 4
    kwargs: dict[str, Any] = {"ignore_index": 3, "label_smoothing": 0.1}
    loss, lse = softmax_ext.cross_entropy(x, target, return_lse=True, **kwargs)
    (loss + lse.sum()).backward()
    x64, expected, expected_lse = reference(x, target, None, **kwargs)
    (expected + expected_lse.sum()).backward()
    assert x.grad is not None
    assert x64.grad is not None
    assert_close(x.grad, x64.grad, 16, 1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["target", "other", "all"])
def test_forward_of_special_values(value: float, where: str, device: str) -> None:
    """As torch's, in rows, long rows and columns."""
    for shape in [(3, 5), (3, 9000), (3, 5, 4)]:
        x, target, _ = case(shape, torch.float32, device)
        target = torch.ones_like(target)
        with torch.no_grad():
            x[1, {"target": slice(1, 2), "other": slice(2, 3), "all": slice(None)}[where]] = value
        found = softmax_ext.cross_entropy(x, target, reduction="none")
        torch.testing.assert_close(
            found, F.cross_entropy(x, target, reduction="none"), equal_nan=True
        )


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "without the last rows": lambda x: x[:-1],
    "every other row": lambda x: x[::2],
    "of wider rows": lambda x: x[:, :-3],
    "classes every other element": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(5, *x.shape[1:]),
    "from an odd element": lambda x: x[:, 1:],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 40), (8, 40, 30), (8, 12, 5, 6), (4, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout(shape: tuple[int, ...], name: str, dtype: torch.dtype, device: str) -> None:
    """Any strides give the bits of the contiguous logits, and their gradient."""
    x, _, _ = case(shape, dtype, device)
    view = LAYOUTS[name](x)
    plain = view.detach().contiguous().requires_grad_()
    target = torch.arange(view.numel() // view.size(1), device=device) % view.size(1)
    target = target.view(view.shape[:1] + view.shape[2:])
    options = {"label_smoothing": 0.1}
    loss = softmax_ext.cross_entropy(view, target, reduction="none", **options)
    expected = softmax_ext.cross_entropy(plain, target, reduction="none", **options)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), view)
    (expected_grad,) = torch.autograd.grad(expected.sum(), plain)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)


def test_layout_of_channels_last(device: str) -> None:
    """Pixels are rows then, and so is their gradient."""
    x, target, _ = case((2, 21, 8, 9), torch.float32, device)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    for logits in (x, last):
        softmax_ext.cross_entropy(logits, target).backward()
    torch.testing.assert_close(last.grad, x.grad)
    assert last.grad is not None
    assert last.grad.stride() == last.stride()


@pytest.mark.parametrize("shape", [(40, 300), (3, 40000), (4, 20, 2000)], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_invariance(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """A row has the same bits in any batch and on any number of threads, and so has the mean."""
    x, target, _ = case(shape, dtype, device)
    options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none"}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x.grad = None
            softmax_ext.cross_entropy(x, target, **options).float().sum().backward()
            assert x.grad is not None
            results.append((softmax_ext.cross_entropy(x, target), x.grad.clone()))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    rows = softmax_ext.cross_entropy(x, target, **options)
    alone = softmax_ext.cross_entropy(x[2:3], target[2:3], **options)
    torch.testing.assert_close(rows[2:3], alone, rtol=0, atol=0)
