"""docs/losses.md: each piece of code there against what it stands in for, written out here; and its
table of rows."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_scores_stand_ins import assert_alike, randn

import softmax_ext

DOCUMENT = Path(__file__).parent.parent / "docs" / "losses.md"
DOCUMENTED: dict[str, Any] = {"torch": torch} | {
    name: getattr(softmax_ext, name)
    for name in (
        "cross_entropy",
        "linear_cross_entropy",
        "selective_log_softmax",
        "kl_div_with_logits",
    )
}
for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
    exec(block, DOCUMENTED)

CLASSES = 37


def labels_of(batch: int, tokens: int, device: str) -> torch.Tensor:
    """With a prompt that does not count, and padding."""
    labels = torch.randint(CLASSES, (batch, tokens), device=device)
    labels[:, :2] = labels[0, -3:] = -100
    return labels


def shifted_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, CLASSES), labels[:, 1:].reshape(-1))


def test_causal_language_model(device: str) -> None:
    logits, labels = randn(2, 9, CLASSES, device=device), labels_of(2, 9, device)
    actual = DOCUMENTED["causal_lm_loss"](logits, labels)
    assert_alike(actual, shifted_loss(logits, labels), logits)


def test_causal_language_model_copies_no_logits() -> None:
    """The kernels read them where they lie, and the gradient is the one tensor of their size."""
    logits, labels = randn(4, 64, CLASSES, device="cpu"), labels_of(4, 64, "cpu")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as record:
        DOCUMENTED["causal_lm_loss"](logits, labels).backward()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert [size for size in sizes if size > logits.nbytes / 4] == [logits.nbytes]


def test_causal_language_model_of_states(device: str) -> None:
    states, labels = randn(2, 9, 16, device=device), labels_of(2, 9, device)
    lm_head = torch.nn.Linear(16, CLASSES, bias=False, device=device, dtype=torch.float64)
    actual = DOCUMENTED["causal_lm_loss_of_states"](states, lm_head, labels)
    assert_alike(actual, shifted_loss(lm_head(states), labels), states, lm_head.weight)


def test_z_loss_and_softcap(device: str) -> None:
    logits, labels = randn(12, CLASSES, device=device), labels_of(12, 1, device)[:, 0]
    labels = torch.where(labels < 0, 3, labels)
    labels[4] = -100
    z = torch.tanh(logits / 5.0) * 5.0
    of_rows = z.logsumexp(-1).square()[labels != -100]
    expected = F.cross_entropy(z, labels) + 1e-2 * of_rows.mean()
    actual = DOCUMENTED["loss_of_capped_logits"](logits, labels, 5.0, 1e-2)
    assert_alike(actual, expected, logits)


def test_policy(device: str) -> None:
    logits = randn(2, 7, CLASSES, device=device)
    tokens = torch.randint(CLASSES, (2, 7), device=device)
    z = logits / 0.7
    log_probs = z.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropies = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    found = DOCUMENTED["log_probs_and_entropies"](logits, tokens, 0.7)
    assert_alike(torch.stack(found), torch.stack([log_probs, entropies]), logits)


def test_distillation(device: str) -> None:
    student, teacher = (randn(12, CLASSES, device=device) for _ in range(2))
    log_q, p = F.log_softmax(student / 3.0, dim=-1), F.softmax(teacher / 3.0, dim=-1)
    expected = F.kl_div(log_q, p, reduction="batchmean") * 3.0**2
    assert_alike(DOCUMENTED["distillation_loss"](student, teacher, 3.0), expected, student)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_on_policy_distillation(beta: float, device: str) -> None:
    student, teacher = (randn(2, 9, CLASSES, device=device) for _ in range(2))
    labels = labels_of(2, 9, device)
    log_q, log_p = (F.log_softmax(x / 0.9, dim=-1) for x in (student, teacher))
    mixture = torch.logsumexp(
        torch.stack([log_q + math.log1p(-beta), log_p + math.log(beta)]), dim=0
    )
    of_teacher = F.kl_div(mixture, log_p, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, log_q, reduction="none", log_target=True)
    divergence = beta * of_teacher + (1 - beta) * of_student
    counts = labels != -100
    expected = divergence[counts].sum() / counts.sum()
    actual = DOCUMENTED["jsd_loss"](student, teacher, labels, beta, 0.9)
    assert_alike(actual, expected, student, teacher)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("row", "target", "reduction", "loss", "gradient"),
    [
        ([NAN, 0.0, 0.0], -100, "none", 0.0, [0.0, 0.0, 0.0]),
        ([NAN, 0.0, 0.0], -100, "sum", 0.0, [0.0, 0.0, 0.0]),
        ([1.0, 0.0, 0.0], -100, "mean", NAN, [0.0, 0.0, 0.0]),
        ([-INF, 0.0, 0.0], 0, "none", INF, [-1.0, 0.5, 0.5]),
        ([NAN, 0.0, 0.0], 1, "none", NAN, [NAN, NAN, NAN]),
        ([40.0, 0.0, -INF], 0, "none", math.exp(-40), [-math.exp(-40), math.exp(-40), 0.0]),
    ],
)
def test_what_a_row_gives(
    row: list[float], target: int, reduction: str, loss: float, gradient: list[float], device: str
) -> None:
    x = torch.tensor([row], device=device, requires_grad=True)
    y = torch.tensor([target], device=device)
    found = softmax_ext.cross_entropy(x, y, reduction=reduction)
    (grad,) = torch.autograd.grad(found.sum(), x)
    for actual, expected in ((found.detach().view(()), loss), (grad[0], gradient)):
        right = torch.tensor(expected, device=device)
        torch.testing.assert_close(actual, right, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_a_row_gives_where_the_teacher_gives_a_class_nothing(beta: float, device: str) -> None:
    student = torch.tensor([[1.0, 0.0, 3.0], [NAN, 0.0, 0.0]], device=device, requires_grad=True)
    teacher = torch.tensor([[1.0, -INF, 2.0], [0.0, 0.0, 0.0]], device=device)
    weight = torch.tensor([True, False], device=device)
    options = {"beta": beta, "weight": weight, "reduction": "none"}
    loss = softmax_ext.kl_div_with_logits(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert not loss[1].any()
    assert not grad[1].any()
    assert bool(loss[0].isinf()) == (beta == 1)
    assert bool(grad[0].isfinite().all()) == (beta < 1)
