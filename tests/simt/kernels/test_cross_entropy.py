"""The kernels of cross-entropy: rows that lanes, a block or several have, columns, and their
gradients, against float64."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host import Host
from lanes import SANITIZERS
from loss_cases import OPTIONS, ROWS, assert_close, scores_of
from losses_on_host import Losses, LossesHost
from pairwise import all_pairs
from tolerances import FLOATING

SHAPES = {  # with the threads along a row, and its parts
    **ROWS,
    "columns": ((2, 19, 33), 1, 1),
    "shared columns": ((1, 40, 40), 8, 1),
}
GRADIENTS = (
    "of each row",
    "of a mean",
    "of lse too",
    "of lse alone, in place",
    "of the entropy too",
    "of the entropy alone, in place",
)


def case(
    shape: tuple[int, ...], dtype: torch.dtype, weighted: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logits, targets of which one in four is ignored (not the first), and weights."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    target.view(-1)[1::4] = -100
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(shape[1], generator=generator).add(0.5).to(wide)
    return x, target, weight if weighted else None


def reference(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, **options: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64: the logits, the losses and lse of the rows, the weights of their targets, and the
    entropies."""
    x = x.double().requires_grad_()
    z = scores_of(x, options)
    w = None if weight is None else weight.double()
    loss = F.cross_entropy(
        z, target, w, reduction="none", label_smoothing=options.get("smoothing", 0.0)
    )
    lse = z.logsumexp(1)
    counts = target != -100
    weights = counts.double() if w is None else w[target.where(counts, torch.tensor(0))] * counts
    loss = loss + options.get("z_loss", 0.0) * weights * lse**2
    return x, loss, lse, weights, torch.special.entr(z.softmax(1)).sum(1)


@pytest.mark.parametrize(
    ("shape", "options", "dtype", "gradient", "weighted"),
    all_pairs(list(itertools.product(SHAPES, OPTIONS, FLOATING, GRADIENTS, [False, True]))),
)
def test_values_and_gradients(
    losses: LossesHost,
    shape: str,
    options: str,
    dtype: torch.dtype,
    gradient: str,
    weighted: bool,
) -> None:
    sizes, along, parts = SHAPES[shape]
    x, target, weight = case(sizes, dtype, weighted)
    how = OPTIONS[options]
    wants_entropy = int("entropy" in gradient)
    found = losses.forward(
        x, target, weight, wants_lse=1, wants_entropy=wants_entropy, is_mean=1, **how
    )
    assert (found.plan["along"], found.plan["parts"]) == (along, parts)
    x64, loss, lse, weights, entropy = reference(x, target, weight, **how)
    eps = torch.finfo(found.loss.dtype).eps
    assert_close(found.loss, loss, 8, 32 * eps)
    assert_close(found.lse, lse, 2, 4 * eps)
    if wants_entropy:
        assert_close(found.entropy, entropy, 16, 16 * eps)
    assert_close(found.total, weights.sum(), 4, 0)
    torch.testing.assert_close(
        found.reduced, loss.detach().sum() / weights.sum(), rtol=8 * eps, atol=32 * eps
    )

    g, g_lse = torch.rand(loss.shape).to(found.loss), torch.rand(loss.shape).to(found.loss) / 8
    given: dict[str, Any] = {"grad_loss": g}
    of_loss, of_lse, of_entropy = g.double(), torch.zeros_like(lse), torch.zeros_like(lse)
    if gradient == "of a mean":
        given = {"grad_loss": g.new_tensor(0.75), "divisor": weights.sum()}
        of_loss = torch.full_like(loss, 0.75) / weights.sum()
    elif gradient != "of each row":
        given |= {"grad_entropy" if wants_entropy else "grad_lse": g_lse}
        (of_entropy if wants_entropy else of_lse).copy_(g_lse)
        if gradient.endswith("alone, in place"):
            given |= {"grad_loss": torch.zeros_like(g), "in_place": 1}
            of_loss = torch.zeros_like(loss)
    dx = losses.backward(x, target, weight, found, **given, **how)
    torch.autograd.backward([loss, lse, entropy], [of_loss, of_lse, of_entropy])
    assert x64.grad is not None
    finfo = torch.finfo(dtype)
    atol = float(x64.grad.abs().max()) * 32 * eps + 0.51 * finfo.smallest_normal * finfo.eps
    assert_close(dx, x64.grad, 0.51 if dtype.itemsize == 2 else 16, atol)


LONGEST = {"rows": (5, 10), "a block": (3, 2000), "parts": (2, 9001), "columns": (2, 40, 5)}


@pytest.mark.parametrize("shape", LONGEST)
def test_ignored_rows_are_not_read(losses: LossesHost, shape: str) -> None:
    x, target, weight = case(LONGEST[shape], torch.float32, weighted=True)
    x[1], target[1] = torch.nan, -100
    found = losses.forward(x, target, weight, smoothing=0.1)
    assert not found.loss[1].any()
    assert not found.lse[1].any()
    dx = losses.backward(x, target, weight, found, torch.ones_like(found.loss), smoothing=0.1)
    assert not dx[1].any()
    assert bool(dx[0].isfinite().all())
    torch.testing.assert_close(found.reduced, found.loss.double().sum())


@pytest.mark.parametrize("shape", LONGEST)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["target", "other", "all"])
def test_special_values(losses: LossesHost, shape: str, value: float, where: str) -> None:
    """As torch's."""
    if losses.lane in SANITIZERS:
        pytest.skip("sanitizers: a test of values, run without them")
    x, target, _ = case(LONGEST[shape], torch.float32)
    target = torch.ones_like(target)
    x[1, {"target": slice(1, 2), "other": slice(2, 3), "all": slice(None)}[where]] = value
    found = losses.forward(x, target)
    expected = F.cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(found.loss, expected, equal_nan=True)


@pytest.mark.parametrize("shape", LONGEST)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_a_sure_target(losses: LossesHost, shape: str, dtype: torch.dtype) -> None:
    """Where its probability rounds to 1, the loss and the gradient p - 1 are as exact as any."""
    if losses.lane in SANITIZERS:
        pytest.skip("sanitizers: a test of values, run without them")
    x = torch.zeros(LONGEST[shape], dtype=dtype)
    x[:, 0] = 20.0
    target = torch.zeros(x.select(1, 0).shape, dtype=torch.int64)
    found = losses.forward(x, target)
    dx = losses.backward(x, target, None, found, torch.ones_like(found.loss))
    others = (x.size(1) - 1) * torch.tensor(-20.0, dtype=torch.float64).exp()
    assert_close(found.loss, others.log1p().expand(target.shape), 8, 0)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    p_less_1 = (-others / (1 + others)).expand(target.shape)
    assert_close(dx[:, 0], p_less_1, 0.51 if dtype.itemsize == 2 else 16, tiny)


@pytest.mark.parametrize("shape", LONGEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits(losses: LossesHost, shape: str, dtype: torch.dtype) -> None:
    """A row has the same in every batch, and wherever it lies."""
    x, target, weight = case(LONGEST[shape], dtype, weighted=True)

    def run(x: torch.Tensor, target: torch.Tensor) -> tuple[Losses, torch.Tensor]:
        found = losses.forward(x, target, weight, smoothing=0.1)
        g = torch.ones_like(found.loss)
        return found, losses.backward(x, target, weight, found, g, smoothing=0.1)

    found, dx = run(x, target)
    wider = torch.cat([torch.full_like(x[:, :1], torch.nan), x, x[:, :2]], 1)
    for rows in (slice(0, 1), slice(None)):
        of_rows, of_x = run(wider[:, 1 : x.size(1) + 1][rows], target[rows])
        for a, b in [(of_rows.loss, found.loss), (of_rows.lse, found.lse), (of_x, dx)]:
            torch.testing.assert_close(a, b[rows], rtol=0, atol=0)


def test_sums_of_many_rows(losses: LossesHost) -> None:
    """By several blocks, always in the same order."""
    x, target, weight = case((9000, 2), torch.float32, weighted=True)
    found = losses.forward(x, target, weight)
    assert found.plan["sums"] == 3
    torch.testing.assert_close(found.reduced, found.loss.double().sum())
    assert weight is not None
    counted = target[target != -100]
    torch.testing.assert_close(found.total, weight.double()[counted].sum())


@pytest.mark.parametrize("bad", [10, -1])
def test_a_target_out_of_range_fails(host: Host, bad: int) -> None:
    losses = LossesHost(host.lane, host.seed)
    x, target, _ = case((3, 10), torch.float32)
    target[2] = bad
    with pytest.raises(AssertionError, match=f"target 2 of cross_entropy is {bad} of 10 classes"):
        losses.forward(x, target)
    losses.close()
