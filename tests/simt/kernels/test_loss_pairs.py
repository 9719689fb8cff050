"""The kernels of losses of two tensors, cross-entropy with probabilities and divergences, and their
gradients, against float64."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import OPTIONS, ROWS, assert_close, scores_of
from losses_on_host import LossesHost
from pairwise import all_pairs
from tolerances import FLOATING

BETAS = (0.0, 0.3, 1.0)
# Whose gradients are wanted, and of what.
GRADIENTS = {
    "both, of each row": {},
    "of the first, of a mean": {"of_second": 0, "grad_factor": 0.25},
    "of the second, of a mean": {"of_first": 0, "grad_factor": 0.25},
}


def logits(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a student and a teacher, somewhat alike."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2)
    y = x + torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def weights(count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, generator=generator).add(0.5).to(computed(dtype))


def computed(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def assert_gradients_close(
    found: list[torch.Tensor], right: list[torch.Tensor | None], how: dict[str, Any]
) -> None:
    wanted = [right[k] for k, name in enumerate(("of_first", "of_second")) if how.get(name, 1)]
    assert len(found) == len(wanted)
    for gradient, expected in zip(found, wanted, strict=True):
        assert expected is not None
        finfo = torch.finfo(gradient.dtype)
        eps = torch.finfo(computed(gradient.dtype)).eps
        atol = float(expected.abs().max()) * 32 * eps + 0.51 * finfo.smallest_normal * finfo.eps
        assert_close(gradient, expected, 0.51 if gradient.itemsize == 2 else 16, atol)


def gradient_of_rows(loss: torch.Tensor, how: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """As a call has it, and as it is in all of each row."""
    if "grad_factor" not in how:
        g = torch.rand(loss.shape).to(loss)
        return g, g.double()
    return loss.new_tensor(0.75), torch.full_like(loss, 0.75 * how["grad_factor"]).double()


@pytest.mark.parametrize(
    ("shape", "options", "dtype", "gradient", "weighted"),
    all_pairs(list(itertools.product(ROWS, OPTIONS, FLOATING, GRADIENTS, [False, True]))),
)
def test_probabilities(
    losses: LossesHost,
    shape: str,
    options: str,
    dtype: torch.dtype,
    gradient: str,
    weighted: bool,
) -> None:
    sizes, along, parts = ROWS[shape]
    how = OPTIONS[options]
    x, y = logits(sizes, dtype)
    target = y.double().softmax(1).mul(1.5).to(dtype)  # whose sum need not be 1
    weight = weights(sizes[1], dtype) if weighted else None
    found = losses.pair_forward("probabilities", x, target, weight, **how)
    assert (found.plan["along"], found.plan["parts"]) == (along, parts)
    x64, t64 = (tensor.double().requires_grad_() for tensor in (x, target))
    z = scores_of(x64, how)
    w = None if weight is None else weight.double()
    lse = z.logsumexp(1)
    loss = F.cross_entropy(z, t64, w, reduction="none", label_smoothing=how.get("smoothing", 0.0))
    loss = loss + how.get("z_loss", 0.0) * lse**2
    eps = torch.finfo(found.loss.dtype).eps
    assert found.lse is not None
    assert_close(found.loss, loss, 8, 32 * eps)
    assert_close(found.lse, lse, 4, 4 * eps)

    wants = GRADIENTS[gradient]
    g, of_rows = gradient_of_rows(found.loss, wants)
    g_lse = None if "grad_factor" in wants else torch.rand(loss.shape).to(found.loss) / 8
    grads = losses.pair_backward(
        "probabilities", x, target, weight, found, g, g_lse, **how, **wants
    )
    of_lse = torch.zeros_like(lse) if g_lse is None else g_lse.double()
    torch.autograd.backward([loss, lse], [of_rows, of_lse])
    assert_gradients_close(grads, [x64.grad, t64.grad], wants)


def reference(
    x: torch.Tensor, y: torch.Tensor, beta: float, factor: float, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64: the logits of student and teacher, and the losses of the rows."""
    x, y = (tensor.double().requires_grad_() for tensor in (x, y))
    log_q, log_p = (F.log_softmax(tensor * factor, 1) for tensor in (x, y))
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        rows = (p * (log_p - log_q)).sum(1)
    elif beta == 1:
        rows = (q * (log_q - log_p)).sum(1)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        rows = beta * (p * (log_p - log_m)).sum(1) + (1 - beta) * (q * (log_q - log_m)).sum(1)
    return x, y, rows if weight is None else rows * weight.double()


@pytest.mark.parametrize(
    ("shape", "beta", "factor", "dtype", "gradient", "weighted"),
    all_pairs(list(itertools.product(ROWS, BETAS, [1.0, 0.5], FLOATING, GRADIENTS, [False, True]))),
)
def test_divergences(
    losses: LossesHost,
    shape: str,
    beta: float,
    factor: float,
    dtype: torch.dtype,
    gradient: str,
    weighted: bool,
) -> None:
    sizes, along, _ = ROWS[shape]
    x, y = logits(sizes, dtype)
    weight = weights(sizes[0], dtype) if weighted else None
    how = {"beta": beta, "factor": factor}
    found = losses.pair_forward("divergence", x, y, weight, **how)
    assert (found.plan["along"], found.plan["parts"]) == (along, 1)
    x64, y64, loss = reference(x, y, beta, factor, weight)
    eps = torch.finfo(found.loss.dtype).eps
    # Of float64 the reference has an error of its own: that of terms of either sign.
    assert_close(found.loss, loss, 8, (64 if dtype == torch.float64 else 1) * eps)
    wants = GRADIENTS[gradient]
    g, of_rows = gradient_of_rows(found.loss, wants)
    grads = losses.pair_backward("divergence", x, y, weight, found, g, **how, **wants)
    loss.backward(of_rows)
    assert_gradients_close(grads, [x64.grad, y64.grad], wants)


LONGEST = {"rows": (5, 10), "a block": (3, 2000), "parts": (2, 9001)}


@pytest.mark.parametrize("shape", LONGEST)
@pytest.mark.parametrize("beta", BETAS)
def test_rows_without_weight_are_not_read(losses: LossesHost, shape: str, beta: float) -> None:
    x, y = logits(LONGEST[shape], torch.float32)
    weight = weights(x.size(0), torch.float32)
    weight[1] = 0
    x[1] = torch.nan
    found = losses.pair_forward("divergence", x, y, weight, beta=beta)
    assert found.loss[1] == 0
    grads = losses.pair_backward(
        "divergence", x, y, weight, found, torch.ones_like(found.loss), beta=beta
    )
    for of_one in grads:
        assert not of_one[1].any()
        assert bool(of_one[0].isfinite().all())
        assert bool(of_one[0].any())


@pytest.mark.parametrize("shape", LONGEST)
@pytest.mark.parametrize("beta", BETAS)
def test_nearly_equal_distributions(losses: LossesHost, shape: str, beta: float) -> None:
    """The divergence has digits where a sum of terms of either sign has none, and is 0 of equal
    ones."""
    x, _ = logits(LONGEST[shape], torch.float32)
    y = x + 2.0**-10 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = losses.pair_forward("divergence", x, y, beta=beta)
    _, _, expected = reference(x, y, beta, 1.0, None)
    torch.testing.assert_close(found.loss.double(), expected.detach(), rtol=1e-3, atol=0)
    same = losses.pair_forward("divergence", x, x, beta=beta)
    assert not same.loss.any()


@pytest.mark.parametrize("shape", LONGEST)
@pytest.mark.parametrize("beta", BETAS)
def test_classes_of_no_share(losses: LossesHost, shape: str, beta: float) -> None:
    """What a distribution gives nothing counts as its limit; what only one of them gives nothing is
    infinite where it has to be."""
    x, y = logits(LONGEST[shape], torch.float32)
    x[0, 1], y[0, 1] = -torch.inf, -torch.inf  # of neither
    x[1, 2], y[1, 3] = -torch.inf, -torch.inf  # of one
    found = losses.pair_forward("divergence", x, y, beta=beta)
    x64, y64 = (tensor.double() for tensor in (x, y))
    kept = torch.ones(x.size(1), dtype=torch.bool)
    kept[1] = False
    _, _, expected = reference(x64[:1, kept], y64[:1, kept], beta, 1.0, None)
    assert_close(found.loss[:1], expected, 8, 0)
    p, q = y64[1].softmax(0), x64[1].softmax(0)
    m = {0.0: q, 1.0: p}.get(beta, beta * p + (1 - beta) * q)
    kl = [(torch.special.xlogy(a, a) - torch.special.xlogy(a, m)).sum() for a in (p, q)]
    in_one = {0.0: kl[0], 1.0: kl[1]}.get(beta, beta * kl[0] + (1 - beta) * kl[1])
    assert_close(found.loss[1], in_one, 8, 0)
    grads = losses.pair_backward(
        "divergence", x, y, None, found, torch.ones_like(found.loss), beta=beta
    )
    assert all(bool(of_one[0].isfinite().all()) for of_one in grads)


@pytest.mark.parametrize("loss", ["probabilities", "divergence"])
@pytest.mark.parametrize("shape", LONGEST)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_value_that_is_no_number_shows(
    losses: LossesHost, loss: str, shape: str, value: float, which: int
) -> None:
    """In its row, and in no other."""
    tensors = logits(LONGEST[shape], torch.float32)
    tensors[which][1, 4] = value
    found = losses.pair_forward(loss, *tensors, beta=0.5)
    is_finite = found.loss.isfinite()
    assert not is_finite[1]
    assert is_finite[:1].all()
    assert is_finite[2:].all()


@pytest.mark.parametrize("loss", ["probabilities", "divergence"])
@pytest.mark.parametrize("shape", LONGEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits_of_pairs(losses: LossesHost, loss: str, shape: str, dtype: torch.dtype) -> None:
    """A row has the same in every batch, and wherever it lies."""
    x, y = logits(LONGEST[shape], dtype)

    def run(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        found = losses.pair_forward(loss, x, y, beta=0.5)
        g = torch.ones_like(found.loss)
        kept = found.kept.view(x.size(0), -1)
        return [found.loss, kept, *losses.pair_backward(loss, x, y, None, found, g, beta=0.5)]

    expected = run(x, y)
    wider = [torch.cat([torch.full_like(t[:, :1], torch.nan), t, t[:, :2]], 1) for t in (x, y)]
    for rows in (slice(0, 1), slice(None)):
        found = run(*(tensor[:, 1 : x.size(1) + 1][rows] for tensor in wider))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=0, atol=0)
