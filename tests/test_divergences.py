"""kl_div_with_logits: values and gradients against float64, autograd, errors, compilation."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import all_pairs
from tolerances import FLOATING

import softmax_ext
from softmax_ext import kl_div_with_logits

BETAS = (0.0, 0.3, 1.0)
REDUCTIONS = ("none", "sum", "mean", "batchmean")
SHAPES = {
    "1-D": (10,),
    "one class": (3, 1),
    "a part of a register": (65, 7),
    "a register of float32": (33, 16),
    "a little more": (3, 7, 17),
    "a chunk of float32 and one": (2, 4097),
    "many chunks, more rows than threads": (3, 20011),
    "one long row": (1, 50257),
    "no rows": (0, 5),
}


def logits(
    *shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a student and a teacher, somewhat alike."""
    generator = torch.Generator().manual_seed(sum(shape))
    student = torch.randn(shape, dtype=torch.float64, generator=generator) * 2
    teacher = student + torch.randn(shape, dtype=torch.float64, generator=generator)
    of_dtype = (tensor.to(dtype).to(device).requires_grad_() for tensor in (student, teacher))
    return next(of_dtype), next(of_dtype)


def weights(*shape: int) -> torch.Tensor:
    """Of rows, of which one in four does not count (not the first)."""
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    if shape:
        weight.view(-1)[1::4] = 0
    return weight


def reference(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits in float64 and the loss, by torch's functions."""
    x, y = (tensor.detach().double().cpu().requires_grad_() for tensor in (student, teacher))
    log_q, log_p = (F.log_softmax(tensor / temperature, -1) for tensor in (x, y))

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        rows = kl(log_p, log_q)
    elif beta == 1:
        rows = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        rows = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    count = float(rows.numel())
    if weight is not None:
        rows = torch.where(weight != 0, rows * weight.double().cpu(), 0)
        count = float((weight != 0).sum())
    divisor = {"none": 1.0, "sum": 1.0, "mean": count * x.shape[-1], "batchmean": count}[reduction]
    loss = rows if reduction == "none" else rows.sum()
    return x, y, loss / divisor


def assert_close(found: torch.Tensor, expected: torch.Tensor, ulps: float, atol: float) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.detach().double().cpu(), expected.detach(), rtol=ulps * eps, atol=atol, equal_nan=True
    )


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "beta", "temperature", "reduction", "weighted"),
    all_pairs(
        list(itertools.product(SHAPES, FLOATING, BETAS, (1.0, 0.5, 2.0), REDUCTIONS, (False, True)))
    ),
)
def test_forward_and_backward(
    shape: str,
    dtype: torch.dtype,
    beta: float,
    temperature: float,
    reduction: str,
    weighted: bool,
    device: str,
) -> None:
    student, teacher = logits(*SHAPES[shape], dtype=dtype, device=device)
    weight = weights(*SHAPES[shape][:-1]).to(device) if weighted else None
    options: dict[str, Any] = {"beta": beta, "temperature": temperature, "reduction": reduction}
    loss = kl_div_with_logits(student, teacher, weight=weight, **options)
    x, y, expected = reference(student, teacher, weight=weight, **options)
    assert loss.dtype == dtype
    assert loss.shape == expected.shape
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = 0.51 if dtype.itemsize == 2 else 8
    # Of float64 the reference has an error of its own: that of terms of either sign.
    assert_close(loss, expected, rounding, (64 if dtype == torch.float64 else 1) * computed)
    g = torch.rand(loss.shape, dtype=torch.float64).to(dtype)
    torch.autograd.backward(loss, g.to(device))
    torch.autograd.backward(expected, g.double())
    for found, right in ((student, x), (teacher, y)):
        assert found.grad is not None
        assert right.grad is not None
        assert found.grad.dtype == dtype
        # Of differences of terms of the size of the largest; and a rounding of what is subnormal.
        largest = float(right.grad.abs().max()) if right.numel() else 0.0
        finfo = torch.finfo(dtype)
        atol = largest * 32 * computed + 0.51 * finfo.smallest_normal * finfo.eps
        assert_close(found.grad, right.grad, 0.51 if dtype.itemsize == 2 else 16, atol)


@pytest.mark.parametrize("beta", BETAS)
def test_forward_of_nearly_equal_distributions(beta: float) -> None:
    """The loss has digits where a sum of terms of either sign has none."""
    student, _ = logits(16, 5000, dtype=torch.float32)
    teacher = student.detach() + 2.0**-10 * torch.randn(16, 5000)
    _, _, expected = reference(student, teacher, beta=beta, reduction="none")
    found = kl_div_with_logits(student, teacher, beta=beta, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    assert (found > 0).all()
    assert torch.equal(
        kl_div_with_logits(student, student, beta=beta, reduction="none"), torch.zeros(16)
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(64, 100), (8, 9000)], ids=str)
def test_forward_is_as_accurate_as_torchs(shape: tuple[int, ...], beta: float) -> None:
    student, teacher = logits(*shape, dtype=torch.float32)
    x, y, expected = reference(student, teacher, beta=beta, reduction="none")
    found = kl_div_with_logits(student, teacher, beta=beta, reduction="none")
    log_q, log_p = (F.log_softmax(tensor, -1) for tensor in (student, teacher))

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        by_torch = kl(log_p, log_q)
    elif beta == 1:
        by_torch = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        by_torch = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    assert (found - expected).abs().mean() <= (by_torch - expected).abs().mean()
    ours = torch.autograd.grad(found.sum(), (student, teacher))
    theirs = torch.autograd.grad(by_torch.sum(), (student, teacher))
    right = torch.autograd.grad(expected.sum(), (x, y))
    for a, b, c in zip(ours, theirs, right, strict=True):
        assert (a - c).abs().mean() <= 1.05 * (b - c).abs().mean()


def test_forward_of_far_off_logits() -> None:
    """Neither has an error of the size of what all its logits have in common."""
    student, teacher = logits(8, 5000, dtype=torch.float32)
    far, further = (student.detach() + 2.0**13), (teacher.detach() - 2.0**14)
    near = (far - 2.0**13, further + 2.0**14)  # exactly
    _, _, expected = reference(*near, reduction="none")
    assert_close(kl_div_with_logits(far, further, reduction="none"), expected, 8, 0)


INFINITE = -math.inf


@pytest.mark.parametrize("compose", [False, True], ids=["kernels", "composed"])
@pytest.mark.parametrize("beta", BETAS)
def test_no_share(beta: float, compose: bool) -> None:
    """A class of which either has nothing, or both: the loss is its limit, and where that is finite
    so are the gradients."""
    student = torch.tensor([[0.0, INFINITE, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.0, INFINITE, 1, 2]])
    teacher = torch.tensor([[1.0, INFINITE, 0.0, 2.0], [0.0, INFINITE, 2, 0.5], [0.0, 1.0, 2, 3]])
    x, y = (tensor.repeat(1, 9).requires_grad_() for tensor in (student, teacher))

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return kl_div_with_logits(x, y, beta=beta, reduction="none")

    if compose:
        found, pull = torch.func.vjp(loss, x, y)
        grads = pull(torch.ones(3))
    else:
        found = loss(x, y)
        grads = torch.autograd.grad(found, (x, y), torch.ones(3))
    p, q = y.detach().double().softmax(-1), x.detach().double().softmax(-1)
    m = q if beta == 0 else p if beta == 1 else beta * p + (1 - beta) * q

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(a == 0, 0, a * (a / b).log()).sum(-1)

    expected = kl(p, m) if beta == 0 else kl(q, m)
    if beta == 0.3:
        expected = beta * kl(p, m) + (1 - beta) * kl(q, m)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-6)
    is_finite = expected.isfinite()
    assert is_finite.sum() == (3 if beta == 0.3 else 2)
    for grad, of in zip(grads, (q, p), strict=True):
        assert grad[is_finite].isfinite().all()
        # What has no share has no gradient, unless the other one's share pulls at it.
        if not ((beta == 0 and of is q) or (beta == 1 and of is p)):
            assert (grad[(of == 0) & is_finite.unsqueeze(-1)] == 0).all()


@pytest.mark.parametrize("threads", [1, 7], ids=["exps kept", "exps made again"])
@pytest.mark.parametrize("beta", BETAS)
def test_a_chunk_of_no_share(beta: float, threads: int) -> None:
    """It adds nothing, however far below 0 the other chunks are."""
    student, teacher = (tensor.detach() - 300 for tensor in logits(2, 9000, dtype=torch.float32))
    x, y = (F.pad(t, (5000, 0), value=INFINITE).requires_grad_() for t in (student, teacher))
    u, v = student.requires_grad_(), teacher.requires_grad_()
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = kl_div_with_logits(x, y, beta=beta)
        grads = torch.autograd.grad(found, (x, y))
    finally:
        torch.set_num_threads(count)
    expected = kl_div_with_logits(u, v, beta=beta)
    torch.testing.assert_close(found, expected)
    for grad, right in zip(grads, torch.autograd.grad(expected, (u, v)), strict=True):
        assert (grad[:, :5000] == 0).all()
        torch.testing.assert_close(grad[:, 5000:], right)


@pytest.mark.parametrize("beta", BETAS)
def test_nan_and_infinity(beta: float) -> None:
    student, teacher = logits(5, 40, dtype=torch.float32)
    with torch.no_grad():
        student[0, 3] = math.nan
        teacher[1, 4] = math.nan
        student[2] = INFINITE
        teacher[3, 7] = math.inf
    found = kl_div_with_logits(student, teacher, beta=beta, reduction="none")
    assert found.isnan().tolist() == [True, True, True, True, False]
    if beta == 0.3:
        x, y = logits(2, 40, dtype=torch.float32)
        near_end = kl_div_with_logits(x, y, beta=1e-12)
        assert near_end >= 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(9, 33), (2, 9000)], ids=str)
def test_rows_without_weight_are_not_read(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: str
) -> None:
    student, teacher = logits(*shape)
    weight = torch.ones(shape[:-1]).to(dtype)
    weight[1::4] = 0
    with torch.no_grad():
        student[1::8] = math.nan
        teacher[1::4] = math.nan
    loss = kl_div_with_logits(student, teacher, weight=weight, reduction=reduction)
    loss.sum().backward()
    counts = weight != 0
    x, y, expected = reference(student[counts], teacher[counts], reduction=reduction)
    expected.sum().backward()
    if reduction == "none":
        assert (loss[~counts] == 0).all()
        loss = loss[counts]
    torch.testing.assert_close(loss, expected)
    for found, right in ((student, x), (teacher, y)):
        assert found.grad is not None
        assert (found.grad[~counts] == 0).all()
        torch.testing.assert_close(found.grad[counts], right.grad)


def test_mean_and_sum_are_torchs() -> None:
    student, teacher = logits(5, 7)
    q, p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    expected = F.kl_div(q, p, reduction="none", log_target=True)
    for reduction, right in {
        "sum": expected.sum(),
        "mean": expected.mean(),
        "batchmean": expected.sum() / 5,
    }.items():
        torch.testing.assert_close(kl_div_with_logits(student, teacher, reduction=reduction), right)


# ---- layout, bits -------------------------------------------------------------------------------


def layouts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of other strides, whose elements are those of (6, 5, 70)."""
    wide = torch.full((6, 5, 75), math.nan, dtype=tensor.dtype)
    wide[..., 2:72] = tensor
    return {
        "a slice of classes": wide[..., 2:72],
        "shifted rows": torch.cat([tensor, tensor[:, :1]], 1)[:, :-1],
        "rows transposed": tensor.transpose(0, 1).contiguous().transpose(0, 1),
        "classes not side by side": tensor.movedim(-1, 0).contiguous().movedim(0, -1),
    }


@pytest.mark.parametrize("name", layouts(torch.empty(6, 5, 70)))
def test_layout(name: str) -> None:
    student, teacher = (tensor.detach() for tensor in logits(6, 5, 70, dtype=torch.float32))
    expected = kl_div_with_logits(student, teacher, reduction="none")
    x, y = layouts(student)[name], layouts(teacher)[name]
    for a, b in ((x, y), (x, teacher), (student, y)):
        assert torch.equal(kl_div_with_logits(a, b, reduction="none"), expected)
    leaf = x.requires_grad_()
    kl_div_with_logits(leaf, teacher).backward()
    other = student.clone().requires_grad_()
    kl_div_with_logits(other, teacher).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0,)], ids=str)
def test_no_elements(shape: tuple[int, ...], reduction: str) -> None:
    """Sums of nothing, and gradients of no elements, of either order."""
    leaves = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = kl_div_with_logits(*leaves, reduction=reduction).sum()
    divisor = {"mean": 0, "batchmean": math.prod(shape[:-1])}.get(reduction, 1)
    assert bool(loss.isnan()) == (divisor == 0)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    assert [grad.shape for grad in grads] == [shape, shape]


def test_an_expanded_teacher() -> None:
    student, teacher = (tensor.detach() for tensor in logits(6, 70))
    x = teacher[:1].expand(6, 70).requires_grad_()
    assert torch.equal(
        kl_div_with_logits(student, x, reduction="none"),
        kl_div_with_logits(student, x.contiguous(), reduction="none"),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(40, 30), (3, 20011)], ids=str)
def test_invariance(shape: tuple[int, ...], beta: float) -> None:
    """A row has the same bits in any batch, on any number of threads."""
    student, teacher = logits(*shape, dtype=torch.float32)

    def bits(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = kl_div_with_logits(x, y, beta=beta, reduction="none")
        return (loss, *torch.autograd.grad(loss.sum(), (x, y)))

    expected = bits(student, teacher)
    count = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            for found, right in zip(bits(student, teacher), expected, strict=True):
                assert torch.equal(found, right)
            first = bits(*(t.detach()[:1].clone().requires_grad_() for t in (student, teacher)))
            for found, right in zip(first, expected, strict=True):
                assert torch.equal(found, right[:1])
    finally:
        torch.set_num_threads(count)


# ---- autograd, transforms, compilation ----------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(beta: float, reduction: str, weighted: bool) -> None:
    """Of first and second order, forward mode, batched."""
    inputs = logits(3, 2, 5)
    weight = weights(3, 2).double() if weighted else None

    def function(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kl_div_with_logits(
            student, teacher, beta=beta, reduction=reduction, weight=weight, temperature=1.5
        )

    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["student", "teacher"])
@pytest.mark.parametrize("beta", BETAS)
def test_one_gradient_alone(beta: float, wanted: tuple[bool, bool]) -> None:
    both = logits(4, 9)
    expected = torch.autograd.grad(kl_div_with_logits(*both, beta=beta), both)
    alone = [
        tensor.detach().requires_grad_(is_wanted)
        for tensor, is_wanted in zip(both, wanted, strict=True)
    ]
    kl_div_with_logits(*alone, beta=beta).backward()
    for tensor, is_wanted, grad in zip(alone, wanted, expected, strict=True):
        assert (tensor.grad is not None) == is_wanted
        assert not is_wanted or torch.equal(tensor.grad, grad)
    assert not kl_div_with_logits(*(tensor.detach() for tensor in both)).requires_grad


def test_transforms() -> None:
    student, teacher = (tensor.detach() for tensor in logits(4, 3, 9))

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return kl_div_with_logits(x, y, beta=0.3)

    of_samples = torch.stack([loss(x, y) for x, y in zip(student, teacher, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(student, teacher), of_samples)
    x = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, teacher), x)
    torch.testing.assert_close(torch.func.grad(loss)(student, teacher), expected)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("weighted", [False, True])
def test_compile(beta: float, weighted: bool) -> None:
    torch.compiler.reset()
    weight = weights(6) if weighted else None

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return kl_div_with_logits(x, y, beta=beta, weight=weight, temperature=2.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for classes in (12, 31):
        inputs = logits(6, classes, dtype=torch.float32)
        found, expected = compiled(*inputs), function(*inputs)
        assert torch.equal(found, expected)
        for a, b in zip(
            torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool) -> None:
    student, teacher = logits(4, 9, dtype=torch.float32)
    weight = weights(4) if weighted else None
    args = (weight, 3, 0.3, 0.5)
    ops = torch.ops.softmax_ext
    torch.library.opcheck(ops.kl_div_with_logits, (student, teacher, *args))
    _, kept = ops.kl_div_with_logits(student.detach(), teacher.detach(), *args)
    of_both = (torch.ones(()), student.detach(), teacher.detach(), weight, kept, 3, 0.3, 0.5)
    torch.library.opcheck(ops.kl_div_with_logits_backward, (*of_both, True, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    student, teacher = logits(4, 9, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kl_div_with_logits(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, kl_div_with_logits(student.float(), teacher.float()))
    loss.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype


def test_saved_tensors_and_name() -> None:
    student, teacher = logits(4, 9)
    node: Any = kl_div_with_logits(student, teacher, beta=0.3).grad_fn
    assert node.name() == "SoftmaxExtKlDivWithLogitsBackward"
    assert node._saved_kept.shape == (4, 7)
    assert node._saved_beta == 0.3


# ---- errors -------------------------------------------------------------------------------------


def wrong() -> dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]]:
    x, y = (tensor.detach() for tensor in logits(3, 5))
    return {
        "shape": (ValueError, "teacher", (x, y[:2]), {}),
        "broadcast": (ValueError, "teacher", (x, y[:1]), {}),
        "dtype": (RuntimeError, "teacher", (x, y.float()), {}),
        "integers": (NotImplementedError, "student", (x.long(), y), {}),
        "no dims": (RuntimeError, "student", (x[0, 0], y[0, 0]), {}),
        "no tensor": (TypeError, "teacher", (x, 1.0), {}),
        "weight's shape": (ValueError, "weight", (x, y), {"weight": torch.ones(5)}),
        "weight's gradient": (
            RuntimeError,
            "weight",
            (x, y),
            {"weight": torch.ones(3, requires_grad=True)},
        ),
        "complex weight": (RuntimeError, "weight", (x, y), {"weight": torch.ones(3) * 1j}),
        "no weight tensor": (TypeError, "weight", (x, y), {"weight": 1.0}),
        "beta": (ValueError, "beta", (x, y), {"beta": 1.5}),
        "beta of another type": (TypeError, "beta", (x, y), {"beta": "1"}),
        "temperature": (ValueError, "temperature", (x, y), {"temperature": 0.0}),
        "reduction": (ValueError, "reduction", (x, y), {"reduction": "max"}),
    }


@pytest.mark.parametrize("name", wrong())
def test_errors(name: str) -> None:
    error, argument, args, kwargs = wrong()[name]
    with pytest.raises(error, match=argument):
        kl_div_with_logits(*args, **kwargs)


def test_errors_of_the_operators() -> None:
    """Each relies on nothing that it has not checked."""
    ops = torch.ops.softmax_ext
    x, y = (tensor.detach() for tensor in logits(3, 5))
    loss, kept = ops.kl_div_with_logits(x, y, None, 3, 0.0, 1.0)
    for args in (
        (x, y[:2], None, 3, 0.0, 1.0),
        (x, y.float(), None, 3, 0.0, 1.0),
        (x, y, torch.ones(2), 3, 0.0, 1.0),
        (x, y, None, 4, 0.0, 1.0),
        (x, y, None, 3, -1.0, 1.0),
        (x, y, None, 3, 0.0, math.inf),
        (x[0, 0], y[0, 0], None, 3, 0.0, 1.0),
    ):
        with pytest.raises((RuntimeError, ValueError), match="kl_div_with_logits"):
            ops.kl_div_with_logits(*args)
    for grad, of_rows in ((loss, kept[:2]), (loss, kept[:, :6]), (loss.float(), kept), (x, kept)):
        with pytest.raises(RuntimeError, match="kl_div_with_logits_backward"):
            ops.kl_div_with_logits_backward(grad, x, y, None, of_rows, 3, 0.0, 1.0, True, True)
    with pytest.raises(RuntimeError, match="device"):
        softmax_ext.kl_div_with_logits(x, y.to("meta"))
