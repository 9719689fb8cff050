"""selective_log_softmax: values and gradients against float64, memory, errors."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import all_pairs
from test_scores_memory import allocated
from tolerances import FLOATING
from torch._subclasses.fake_tensor import FakeTensorMode

from softmax_ext import selective_log_softmax

SHAPES = {
    "one row": (10,),
    "one class": (3, 1),
    "several tiles of rows": (700, 500),
    "a row is more than a tile": (2, 300000),
    "dims": (2, 3, 17),
    "no rows": (0, 5),
}


def reference(
    logits: torch.Tensor, index: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (logits / temperature).log_softmax(-1)
    chosen = index.long() if index.dim() == logits.dim() else index.long().unsqueeze(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return log_p.gather(-1, chosen).reshape(index.shape), entropy


@pytest.mark.parametrize(
    ("shape", "dtype", "count", "temperature", "with_entropy"),
    all_pairs(
        list(itertools.product(SHAPES, FLOATING, [None, 0, 1, 3], [1.0, 0.7], [False, True]))
    ),
)
def test_forward_and_backward(
    shape: str,
    dtype: torch.dtype,
    count: int | None,
    temperature: float,
    with_entropy: bool,
    device: str,
) -> None:
    *rows, classes = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(*rows, classes).mul(2).to(dtype).to(device).requires_grad_()
    index = torch.randint(classes, (*rows, *([] if count is None else [count])), device=device)
    x64 = x.detach().double().cpu().requires_grad_()
    result = selective_log_softmax(x, index, temperature=temperature, return_entropy=with_entropy)
    found = list(result) if isinstance(result, tuple) else [result]
    expected = list(reference(x64, index.cpu(), temperature))[: len(found)]
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert found[0].dtype == dtype
    grads = []
    for a, b in zip(found, expected, strict=True):
        eps = torch.finfo(a.dtype).eps
        assert a.shape == b.shape
        torch.testing.assert_close(
            a.detach().double().cpu(), b.detach(), rtol=0.51 * eps + 8 * wide, atol=32 * wide
        )
        grads.append(torch.rand(a.shape).to(a))
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, [g.double().cpu() for g in grads])
    assert x.grad is not None
    assert x64.grad is not None
    largest = float(x64.grad.abs().max()) if x.numel() else 0.0
    # Of 16 bits, a rounding for each class of a row, for lse, for the entropy, and of their sums.
    roundings = 1 if dtype.itemsize > 2 else 8
    tolerance = roundings * torch.finfo(dtype).eps + 64 * wide
    torch.testing.assert_close(
        x.grad.double().cpu(), x64.grad, rtol=tolerance, atol=tolerance * largest
    )


@pytest.mark.parametrize("count", [None, 2])
def test_gradcheck(count: int | None, device: str) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.randint(5, (3, *([] if count is None else [count])), device=device)

    def function(x: torch.Tensor) -> Any:
        return selective_log_softmax(x, index, temperature=0.8, return_entropy=True)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_classes_that_are_masked(device: str) -> None:
    """-inf has no share in the entropy and no gradient, and -inf as its log-probability."""
    x = torch.tensor([[1.0, -torch.inf, 2.0]], device=device, requires_grad=True)
    log_p, entropy = selective_log_softmax(
        x, torch.tensor([[0, 1]], device=device), return_entropy=True
    )
    expected = x.detach()[:, ::2].log_softmax(1)
    torch.testing.assert_close(log_p[0, 0], expected[0, 0])
    assert log_p[0, 1] == -torch.inf
    torch.testing.assert_close(entropy, torch.special.entr(expected.exp()).sum(1))
    (grad,) = torch.autograd.grad(entropy.sum() + log_p[0, 0], x)
    assert grad.isfinite().all()
    assert grad[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [37, 20000])
def test_sure_of_a_class(classes: int, dtype: torch.dtype) -> None:
    """What is left for the others is the entropy, to its last digits."""
    x = torch.randn(4, classes, dtype=dtype)
    x[:, classes // 2] = torch.tensor([15.0, 30.0, 60.0, 90.0])
    _, entropy = selective_log_softmax(x, torch.zeros(4).long(), return_entropy=True)
    # log_softmax has no digits of 1 - p left, in float64 either.
    others = torch.cat([x[:, : classes // 2], x[:, classes // 2 + 1 :]], 1).double()
    below = others - x[:, classes // 2 : classes // 2 + 1].double()
    share = below.exp().sum(1)
    expected = share.log1p() - (below.exp() * below).sum(1) / (1 + share)
    torch.testing.assert_close(entropy.double(), expected, rtol=16 * torch.finfo(dtype).eps, atol=0)


OPTIONS = {
    "plain": (0, -100, 0.0, 0.0, 1.0, 0.0),
    "all": (1, -100, 0.1, 1e-2, 1.4, 5.0),
}


@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    all_pairs(
        list(itertools.product([(7, 19), (2, 20000), (3, 40, 5), (3, 19, 70)], OPTIONS, FLOATING))
    ),
)
def test_entropy_of_the_operator(shape: tuple[int, ...], options: str, dtype: torch.dtype) -> None:
    """Beside loss and lse, of rows and columns, with all options: each gradient alone, and all."""
    torch.manual_seed(0)
    x = torch.randn(shape).mul(2).to(dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[0] = -100
    weight = torch.rand(shape[1]).to(dtype) if options == "all" else None
    found = torch.ops.softmax_ext.cross_entropy(x, target, weight, *OPTIONS[options], True, True)
    reduction, _, smoothing, z_loss, factor, softcap = OPTIONS[options]

    x64 = x.detach().double().requires_grad_()
    z = x64 * factor if softcap == 0 else torch.tanh(x64 * factor / softcap) * softcap
    lse = z.logsumexp(1)
    loss = F.cross_entropy(
        z,
        target,
        None if weight is None else weight.double(),
        label_smoothing=smoothing,
        reduction=["none", "mean"][reduction],
    )
    if z_loss:
        assert weight is not None
        counts = torch.where(target == -100, 0.0, weight.double()[target.clamp(min=0)])
        loss = loss + z_loss * (counts * lse.square()).sum() / counts.sum()
    expected = [loss, lse, torch.special.entr(z.softmax(1)).sum(1)]
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    results = [found[0], found[1], found[4]]
    for a, b in zip(results, expected, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=eps + 32 * wide, atol=32 * wide)
    grads = [torch.rand(a.shape).to(a) for a in results]
    for which in ([2], [0, 2], [0, 1, 2]):
        (grad,) = torch.autograd.grad(
            [results[k] for k in which], x, [grads[k] for k in which], retain_graph=True
        )
        (expected_grad,) = torch.autograd.grad(
            [expected[k] for k in which], x64, [grads[k].double() for k in which], retain_graph=True
        )
        largest = float(expected_grad.abs().max())
        tolerance = torch.finfo(dtype).eps + 128 * wide
        torch.testing.assert_close(
            grad.double(), expected_grad, rtol=tolerance, atol=tolerance * largest
        )


def test_bits() -> None:
    """Of a row's entropy and its gradient: they depend on nothing but the row."""
    for classes in (50, 9000):
        x = torch.randn(33, classes, requires_grad=True)
        index = torch.randint(classes, (33,))
        _, entropy = selective_log_softmax(x, index, return_entropy=True)
        (grad,) = torch.autograd.grad(entropy.sum(), x)
        for row in (0, 16, 32):
            alone = x.detach()[row : row + 1].clone().requires_grad_()
            _, of_row = selective_log_softmax(alone, index[row : row + 1], return_entropy=True)
            assert torch.equal(of_row[0], entropy[row])
            assert torch.equal(torch.autograd.grad(of_row.sum(), alone)[0][0], grad[row])


def test_memory() -> None:
    """No tensor of the logits' size but the gradient."""
    x = torch.randn(512, 8000, requires_grad=True)
    index = torch.randint(8000, (512,))
    numbers = 16 * 512 * 8

    def step(with_entropy: bool) -> None:
        result = selective_log_softmax(x, index, return_entropy=with_entropy)
        loss = sum(t.sum() for t in result) if isinstance(result, tuple) else result.sum()
        torch.autograd.grad(loss, x)

    def forward(with_entropy: bool) -> None:
        selective_log_softmax(x, index, return_entropy=with_entropy)

    for with_entropy in (False, True):
        assert allocated(partial(forward, with_entropy)) < numbers
        assert allocated(partial(step, with_entropy)) < x.nbytes + numbers

    sliced = torch.randn(4, 128, 8000, requires_grad=True)

    def of_a_slice() -> None:
        selective_log_softmax(sliced[:, :-1], index.view(4, 128)[:, 1:])

    assert allocated(of_a_slice) < numbers


@pytest.mark.parametrize("count", [None, 2])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_slices(backend: str, count: int | None) -> None:
    """Logits of more dims, read where they lie: tokens from the second on, eager and compiled."""
    index = torch.randint(11, (3, 7, *([] if count is None else [count])))

    def loss(function: Any) -> Any:
        return lambda x: function(x[:, :-1], index[:, 1:]).square().sum()

    x = torch.randn(3, 7, 11, requires_grad=True)
    ours = loss(selective_log_softmax)
    (expected,) = torch.autograd.grad(loss(lambda *args: reference(*args, 1.0)[0])(x), x)
    for function in (ours, torch.compile(ours, fullgraph=True, backend=backend)):
        torch.testing.assert_close(torch.autograd.grad(function(x), x)[0], expected)


def test_several_classes_of_large_logits() -> None:
    """No less accurate than one class a row: a difference of logits, not of one and their lse; but
    where the first of the classes is masked."""
    x = torch.tensor([[1e4, 1e4 + 0.25, 1e4 + 1, -torch.inf]], requires_grad=True)
    for order in ([0, 1, 2], [2, 1, 0, 3], [1]):
        index = torch.tensor([order])
        (found,) = torch.autograd.grad(selective_log_softmax(x, index)[:, :3].sum(), x)
        expected = x.detach().double().log_softmax(-1).gather(-1, index)
        torch.testing.assert_close(
            selective_log_softmax(x, index).double(), expected, rtol=1e-6, atol=0
        )
        assert found.isfinite().all()
    masked = torch.tensor([[3, 1]])
    found = selective_log_softmax(x, masked)
    torch.testing.assert_close(
        found.double(), x.detach().double().log_softmax(-1).gather(-1, masked), rtol=1e-3, atol=0
    )
    assert torch.autograd.grad(found[0, 1], x)[0].isfinite().all()


def test_several_classes_under_autocast() -> None:
    x, index = torch.randn(4, 6, dtype=torch.bfloat16), torch.randint(6, (4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = selective_log_softmax(x, index)
        one = selective_log_softmax(x, index[:, 0])
    assert found.dtype == one.dtype == torch.float32
    torch.testing.assert_close(found[:, 0], one)


def test_vmap_and_fake_tensors() -> None:
    """Neither has values to look at."""
    x, index = torch.randn(2, 3, 5), torch.randint(5, (2, 3, 2))
    found = torch.vmap(selective_log_softmax)(x, index)
    torch.testing.assert_close(found, selective_log_softmax(x, index))
    with FakeTensorMode() as mode:
        fake = selective_log_softmax(mode.from_tensor(x), mode.from_tensor(index))
    assert fake.shape == index.shape
    meta = selective_log_softmax(x.to("meta"), index.to("meta"))
    assert meta.shape == index.shape and meta.is_meta


def test_transforms_and_compile(device: str) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, device=device)
    index = torch.tensor([0, 5, 2, 1], device=device)

    def loss(function: Any) -> Any:
        def of(x: torch.Tensor) -> torch.Tensor:
            log_p, entropy = function(x)
            return (log_p + 0.3 * entropy).square().sum()

        return of

    ours = loss(lambda x: selective_log_softmax(x, index, return_entropy=True))
    theirs = loss(lambda x: reference(x, index, 1.0))
    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(leaf), leaf), torch.autograd.grad(theirs(leaf), leaf)
    )


@pytest.mark.parametrize(
    ("logits", "index", "temperature", "error", "message"),
    [
        ((3, 5), torch.tensor([0, 1]), 1.0, ValueError, r"'index' of the shape \(3,\) or"),
        ((3, 5), torch.zeros(3, 2, 2).long(), 1.0, ValueError, r"but got \(3, 2, 2\)"),
        ((), torch.tensor(0), 1.0, ValueError, "for 'logits' of the shape"),
        ((3, 5), torch.tensor([0, 1, 5]), 1.0, IndexError, "Target 5 is out of bounds"),
        ((3, 5), torch.tensor([0, -100, 1]), 1.0, IndexError, "Target -100 is out of bounds"),
        ((3, 5), torch.tensor([0, -(2**63), 1]), 1.0, IndexError, "is out of bounds"),
        ((3, 5), torch.tensor([[0], [-1], [1]]), 1.0, IndexError, r"in \[0, 5\), but got -1"),
        ((3, 5), torch.zeros(3), 1.0, TypeError, "int64, int32 or uint8, but got torch.float32"),
        ((3, 5), torch.zeros(3).long(), 0.0, ValueError, "'temperature' to be above 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors(
    logits: tuple[int, ...],
    index: torch.Tensor,
    temperature: float,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        selective_log_softmax(torch.zeros(logits), index, temperature=temperature)


def test_integers_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="'logits' of dtype"):
        selective_log_softmax(torch.zeros(2, 3).long(), torch.tensor([0, 1]))
