"""Random calls of every entry, right ones and wrong ones: an exception, or torch's value.

python tests/fuzz.py CALLS [SEED] [LOG]: a process of its own, since what it looks for would end it.
Each call is written to LOG before it is made, so that the last one there is the one that crashed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from tolerances import FLOATING, OPS, OURS, TOLERANCES, TORCH

import softmax_ext

IN_PLACE = {"softmax": softmax_ext.softmax_, "log_softmax": softmax_ext.log_softmax_}
DTYPES = (*FLOATING, torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
# 17 and 300: more than a register, more than a block.
SIZES = st.sampled_from((0, 1, 2, 3, 5, 17, 300))
SHAPES = st.lists(SIZES, max_size=4).filter(lambda sizes: torch.Size(sizes).numel() < 20000)
LAYOUTS = ("plain", "transposed", "expanded", "sliced", "negated", "leaf", "shrunk", "sparse")
ENTRIES = (
    "function",
    "out",
    "in place",
    "operator",
    "backward operator",
    "node",
    "gradient's node",
    "switch",
    "switch, backward",
    "switch, backward out",
    "scores",
    "scores in place",
    "scores' backward operator",
    "cross-entropy",
    "cross-entropy's backward operator",
    "kl-div",
    "kl-div's backward operator",
    "probabilities",
    "probabilities' backward operator",
)


class Drawn:
    """A tensor, described without its elements: they may not be there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __repr__(self) -> str:
        t = self.tensor
        stride = t.stride() if t.layout == torch.strided else None
        return f"({tuple(t.shape)}, {stride}, {t.dtype}, {t.device}, {t.layout})"


@st.composite
def tensors(draw: DrawFn, like: Drawn | None = None) -> Drawn:
    """Of any dtype, shape, layout and device, mostly those of `like`."""
    rarely = st.integers(0, 9).map(lambda k: k == 0)
    shape = list(like.tensor.shape) if like is not None and not draw(rarely) else draw(SHAPES)
    dtype = (
        like.tensor.dtype
        if like is not None and not draw(rarely)
        else draw(st.sampled_from(DTYPES))
    )
    device = "meta" if draw(st.integers(0, 19)) == 0 else "cpu"
    layout = draw(st.sampled_from(LAYOUTS)) if draw(st.booleans()) else "plain"
    sizes = shape
    if layout == "transposed":
        sizes = shape[::-1]
    elif layout == "sliced" and shape:
        sizes = [*shape[:-1], 2 * shape[-1] + 1]
    elif layout == "expanded" and shape:
        sizes = [1, *shape[1:]]
    values = torch.empty(sizes).uniform_(-3, 3)
    if dtype.is_complex or dtype.is_floating_point:
        tensor = values.to(dtype)
    else:
        tensor = values.abs().to(dtype)
    tensor = tensor.to(device)
    if layout == "transposed":
        tensor = tensor.permute(*range(len(shape))[::-1]) if shape else tensor
    elif layout == "sliced" and shape:
        tensor = tensor[..., 1::2]
    elif layout == "expanded" and shape:
        tensor = tensor.expand(shape) if shape[0] else tensor[:0]
    elif layout == "negated" and dtype in FLOATING:
        tensor = torch._neg_view(tensor)
    elif layout == "leaf" and dtype in FLOATING:
        tensor = tensor.requires_grad_()
    elif layout == "shrunk" and device == "cpu":
        tensor.untyped_storage().resize_(draw(st.integers(0, tensor.nbytes)))
    elif layout == "sparse" and dtype in FLOATING and shape and device == "cpu":
        tensor = tensor.to_sparse()
    return Drawn(tensor)


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether all its elements are in its storage: torch's own operators take that on trust."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.device.type == "meta":
        return True
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    return needed <= tensor.untyped_storage().nbytes()


def run(entry: str, op: str, tensors: list[torch.Tensor], dim: int, dtype: Any) -> Any:
    """(ours, torch's), each a function; the second one with nothing that torch takes on trust."""
    x, y = tensors
    ops, aten = torch.ops.softmax_ext, torch.ops.aten
    torchs_backward = getattr(torch, f"_{op}_backward_data")

    def backward_by_torch(to: torch.dtype, dim: int = dim) -> Any:
        if x.shape != y.shape:
            raise RuntimeError
        return torchs_backward(x, y, dim, y.dtype).to(to)

    def node(saved: torch.Tensor) -> Any:
        leaf = torch.ones(2, 2, 2, 2, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: saved):
            return OURS[op](leaf, dim).grad_fn

    def gradients_node() -> Any:
        leaf = torch.ones_like(y).requires_grad_()
        result = OURS[op](leaf, dim)
        (grad,) = torch.autograd.grad(result.square().sum(), leaf, create_graph=True)
        return grad.grad_fn

    def switched(function: Any) -> Any:
        with softmax_ext.enabled():
            return function()

    def scores_by_torch(dtype: torch.dtype) -> Any:
        """In float64. A row without anything has no probabilities, and no logarithms."""
        z = x.to(dtype).double() * 0.5
        z = z.masked_fill(~y, -torch.inf) if y.dtype == torch.bool else z + y.double()
        if z.shape != x.shape:
            raise RuntimeError
        nothing = -torch.inf if op == "log_softmax" else 0.0
        return TORCH[op](z, dim).nan_to_num(nan=nothing, neginf=nothing).to(dtype)

    to = dtype or torch.float32
    if entry == "scores":
        return (
            lambda: OURS[op](x, dim, dtype=dtype, scale=0.5, mask=y),
            lambda: scores_by_torch(dtype or x.dtype),
        )
    if entry == "scores in place":
        return (
            lambda: IN_PLACE[op](x, dim, scale=0.5, mask=y),
            lambda: scores_by_torch(x.dtype),
        )
    if entry == "scores' backward operator":
        number, rest = OPS.index(op), (-1, -1, 0, None, -torch.inf)
        return (
            lambda: ops.score_softmax_backward(
                number, x, y, None, None, None, 1.0, 0.0, None, *rest, to, [True] + 3 * [False]
            ),
            lambda: backward_by_torch(to, -1),
        )
    if entry.startswith("kl-div"):
        reduction, beta = 0, {"softmax": 0.0, "log_softmax": 0.3}[op]

        def kl_by_torch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if x.shape != y.shape or not x.dim():
                raise RuntimeError
            log_q, log_p = F.log_softmax(x.double(), -1), F.log_softmax(y.double(), -1)
            if beta == 0:
                return (log_p.exp() * (log_p - log_q)).sum(-1)
            p, q = log_p.exp(), log_q.exp()
            log_m = (beta * p + (1 - beta) * q).log()
            return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)

        def of_ones() -> Any:
            _, kept = ops.kl_div_with_logits(x.detach(), y.detach(), None, reduction, beta, 1.0)
            ones = torch.ones(x.shape[:-1], dtype=x.dtype)
            args = (None, kept, reduction, beta, 1.0, True, False)
            return ops.kl_div_with_logits_backward(ones, x.detach(), y.detach(), *args)[0]

        def of_ones_by_torch() -> Any:
            leaf = x.detach().double().requires_grad_()
            loss = kl_by_torch(leaf, y.detach().double())
            return torch.autograd.grad(loss.sum(), leaf)[0].to(x.dtype)

        if entry == "kl-div":
            return (
                lambda: ops.kl_div_with_logits(x, y, None, reduction, beta, 1.0)[0],
                lambda: kl_by_torch(x, y).to(x.dtype),
            )
        return of_ones, of_ones_by_torch
    if entry.startswith("probabilities"):
        targets = (0, 0.1, 0.0, 1.0, 0.0)

        def loss_of_probabilities(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if x.shape != y.shape or not x.dim():
                raise RuntimeError
            share = 0.9 * y.double() + 0.1 / max(x.size(-1), 1)
            return -(share * F.log_softmax(x.double(), -1)).sum(-1)

        def gradient_of_probabilities() -> Any:
            _, *kept = ops.cross_entropy_of_probabilities(x, y, None, *targets, False)
            ones = torch.ones(x.shape[:-1], dtype=x.dtype)
            args = (x, y, None, *kept, *targets, True, False)
            return ops.cross_entropy_of_probabilities_backward(ones, None, *args)[0]

        def gradient_of_probabilities_by_torch() -> Any:
            leaf = x.detach().double().requires_grad_()
            loss = loss_of_probabilities(leaf, y.detach())
            return torch.autograd.grad(loss.sum(), leaf)[0].to(x.dtype)

        if entry == "probabilities":
            return (
                lambda: ops.cross_entropy_of_probabilities(x, y, None, *targets, False)[0],
                lambda: loss_of_probabilities(x, y).to(x.dtype),
            )
        return gradient_of_probabilities, gradient_of_probabilities_by_torch
    if entry.startswith("cross-entropy"):
        options = (-100, 0.1, 0.0, 1.0, 0.0)

        def of_rows(tensor: torch.Tensor) -> torch.Tensor:
            """Of the shape that it leaves without the classes."""
            classes = min(1, tensor.dim() - 1)
            if classes < 0 or tensor.size(classes):
                return tensor.select(classes, 0) if tensor.dim() else tensor
            return tensor.new_zeros(tensor.shape[:classes] + tensor.shape[classes + 1 :])

        def target() -> torch.Tensor:
            if y.dtype != torch.int64 and not is_whole(y):
                raise RuntimeError  # torch's own cast would read what is not there
            return of_rows(y).long()

        # torch's own formulas of such tensors index what is not there.
        is_empty_meta = x.device.type == "meta" and x.numel() == 0

        def loss_by_torch(x: torch.Tensor, reduction: str) -> torch.Tensor:
            if is_empty_meta:
                return x.new_empty(())
            kwargs = {"reduction": reduction, "label_smoothing": 0.1}
            return F.cross_entropy(x.double(), target(), **kwargs)

        def backward() -> Any:
            right = torch.zeros(of_rows(x).shape, dtype=torch.int64)
            _, *kept, _ = ops.cross_entropy(x, right, None, 0, *options, False, False)
            grad = of_rows(y)
            if is_whole(grad) and not is_whole(y):
                raise RuntimeError  # all that is read of y is there
            grad = grad.to(x.dtype) if is_whole(grad) else grad
            kept = (*kept, None)
            return ops.cross_entropy_backward(grad, None, None, x, right, None, *kept, 0, *options)

        def backward_of_torchs_loss() -> Any:
            if is_empty_meta:
                return torch.empty_like(x)
            leaf = x.detach().double().requires_grad_()
            right = torch.zeros(of_rows(x).shape, dtype=torch.int64)
            loss = F.cross_entropy(leaf, right, reduction="none", label_smoothing=0.1)
            return torch.autograd.grad(loss, leaf, of_rows(y).double())[0].to(x.dtype)

        if entry == "cross-entropy":
            return (
                lambda: ops.cross_entropy(x, target(), None, 1, *options, False, False)[0],
                lambda: loss_by_torch(x, "mean").to(x.dtype),
            )
        return backward, backward_of_torchs_loss
    if entry == "function":
        return lambda: OURS[op](x, dim, dtype=dtype), lambda: TORCH[op](x, dim, dtype=dtype)
    if entry == "out":
        return (
            lambda: OURS[op](x.detach(), dim, dtype=dtype, out=y),
            lambda: TORCH[op](x.detach(), dim, dtype=y.dtype),
        )
    if entry == "in place":
        return lambda: IN_PLACE[op](x, dim), lambda: TORCH[op](x, dim)
    if entry == "operator":
        return lambda: getattr(ops, op)(x, dim, dtype), lambda: TORCH[op](x, dim, dtype=dtype)
    if entry == "backward operator":
        return (
            lambda: getattr(ops, f"{op}_backward")(x, y, dim, to),
            lambda: backward_by_torch(to),
        )
    if entry == "node":
        return lambda: node(y)(x), lambda: backward_by_torch(to, dim % 4)
    if entry == "gradient's node":
        return lambda: gradients_node()(x), None
    if entry == "switch":
        return (
            lambda: switched(lambda: getattr(torch, op)(x, dim, dtype=dtype)),
            lambda: TORCH[op](x, dim, dtype=dtype),
        )
    backward = getattr(aten, f"_{op}_backward_data")
    name = "grad_input" if op == "softmax" else "out"

    def data() -> Any:
        if "out" not in entry:
            return backward(x, y, dim, y.dtype)
        return backward.out(x, y, dim, y.dtype, **{name: torch.empty(0, dtype=y.dtype)})

    def data_by_torch() -> Any:
        if x.shape != y.shape and x.device == y.device == torch.device("cpu"):
            raise RuntimeError  # where torch reads past the end
        return data()

    return lambda: switched(data), data_by_torch


def outcome(function: Any) -> Any:
    try:
        return function()
    except Exception as error:
        # A failed assertion inside is no answer to a user.
        if "INTERNAL ASSERT" in str(error):
            raise
        return error


def check(entry: str, op: str, args: list[torch.Tensor], dim: int, dtype: Any) -> bool:
    """One call; whether there was a value."""
    switched = entry.startswith("switch")
    used = args[:1] if entry in ("function", "in place", "operator", "switch") else args
    whole = all(map(is_whole, used))
    ours_alone = len({t.dtype for t in used}) == 1 and all(
        t.dtype in FLOATING and t.device.type == "cpu" for t in used
    )
    if switched and not whole and not ours_alone:
        return False  # torch's own operator, which reads what is not there
    if switched and not whole and (dtype or args[0].dtype) != args[0].dtype:
        return False  # torch's own cast
    if entry == "gradient's node" and not whole and args[1].device.type == "meta":
        return False  # torch's own node
    ours, torchs = run(entry, op, args, dim, dtype)
    expected = outcome(torchs) if torchs is not None and whole else None
    found = outcome(ours)
    if isinstance(found, Exception):
        return False
    if torchs is None:
        return True
    assert whole, "read what is not there"
    assert not isinstance(expected, Exception), f"torch raised {expected!r}"
    found = found[0] if isinstance(found, tuple) else found
    assert (found.shape, found.device) == (expected.shape, expected.device)
    assert entry == "out" or found.dtype == expected.dtype
    if found.device.type == "cpu" and found.numel():
        # Where torch rounds to the output's type first, so may its value be.
        dtypes = {found.dtype, expected.dtype, *(t.dtype for t in used)} & TOLERANCES.keys()
        tolerance = max(TOLERANCES[each].rtol for each in dtypes)
        # Gradients are differences of terms of up to 3 * 3 * 3, one of them a sum.
        terms = 27 * max(found.shape, default=1) ** 0.5 if len(used) == 2 else 1
        torch.testing.assert_close(
            found.to_dense().double(),
            expected.to_dense().double(),
            rtol=4 * tolerance,
            atol=4 * tolerance * terms,
            equal_nan=True,
        )
    return True


def main(calls: int, number: int, log: Path) -> None:
    counts = {entry: [0, 0] for entry in ENTRIES}

    def calls_of(entries: Sequence[str], number: int) -> None:
        @seed(number)
        @settings(
            max_examples=calls,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def one_call(data: st.DataObject) -> None:
            torch.manual_seed(0)
            entry = data.draw(st.sampled_from(entries))
            op = data.draw(st.sampled_from(OPS))
            second = data.draw(tensors())
            first = data.draw(tensors(like=second))
            dim = data.draw(st.integers(-5, 4)) if data.draw(st.booleans()) else -1
            dtype = data.draw(st.sampled_from((None, *DTYPES)))
            dtype = dtype if data.draw(st.booleans()) else None
            if entry == "node" and dtype not in FLOATING:
                saved = second.tensor.dtype
                dtype = saved if saved in FLOATING else torch.float32
            log.write_text(f"{entry}, {op}, dim {dim}, dtype {dtype}, {first}, {second}\n")
            counts[entry][check(entry, op, [first.tensor, second.tensor], dim, dtype)] += 1

        one_call()

    calls_of(ENTRIES, number)
    # Of an entry that few draws suit there may be no call yet that was taken.
    if lacking := [entry for entry, counted in counts.items() if not all(counted)]:
        calls_of(lacking, number + 1)
    for entry, (refused, taken) in counts.items():
        print(f"{entry}: {refused} refused, {taken} taken")
        assert calls < 1000 or (refused and taken), "one of the two never happened"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
