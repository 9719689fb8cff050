"""Softmax, log-softmax and logsumexp of scores: every schedule and kernel against float64, and the
bits.

What takes no part is NaN in memory wherever that can be, so that reading it shows.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from host import Host
from kernel_cases import NEW, OLD, SMS, assert_same_bits
from pairwise import all_pairs
from scores_arguments import BANDS, KINDS, arguments
from scores_on_host import ScoresOnHost, chunk_of
from scores_reference import OURS, assert_like_reference
from scores_reference import band as mask_of_band
from tolerances import FLOATING

from softmax_ext._C import LIMITS

SHORT, WIDTH, WARPS = LIMITS["ShortScores"], LIMITS["ScoreWidth"], LIMITS["ScoreWarpsFloat64"]
# Lengths of rows that are not shared by warps.
SHORT_DIMS = {
    1: "a key",
    7: "fewer than the lanes that share it",
    49: "a window of Swin",
    64: "whole vectors that 8 lanes share",
    65: "the first that 16 lanes share",
    197: "patches of a picture and a token",
    SHORT: "the last that a part of a warp has",
}
WAYS = ("short", "warp", "block", "cluster", "grid")


def schedule_of(way: str) -> dict[str, Any]:
    device = NEW if way in ("block", "cluster", "grid") else "H100"
    return {"schedule": "warp" if way == "short" else way, "device": device}


def dim_of(way: str, dtype: torch.dtype) -> int:
    """Of a row for it: whole chunks, and one of which a part is there; of some, whole vectors."""
    chunk = chunk_of(dtype)
    if way == "warp":  # where a part of a warp has a chunk of float64, that
        return max(SHORT + 1, chunk - 24) if chunk > SHORT else SHORT
    return {"short": 49, "block": 2 * chunk + 5, "cluster": 9 * chunk + 4, "grid": 3 * chunk - 8}[
        way
    ]


def leaf(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


# --- Values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "kinds", "way"),
    [
        (op, tuple(kinds), way)
        for op, way, *kinds in all_pairs(list(itertools.product(OURS, ("short", "block"), *KINDS)))
    ],
    ids=str,
)
def test_every_pair_of_arguments(host: Host, op: str, kinds: tuple[str, ...], way: str) -> None:
    shape = (2, 3, 4, 7) if way == "short" else (1, 3, 2, dim_of(way, torch.float64))
    function = ScoresOnHost(host, op, **schedule_of(way))
    scores = arguments(kinds, shape, torch.float64)
    assert_like_reference(op, leaf(shape, torch.float64), 3, function=function, **scores)


# As what models ask for: each with another broadcast.
MODELS = [
    ("scale", "no softcap", "floating of batch", "no band", "no sink"),
    ("scale of heads", "softcap", "floating of queries and keys", "no band", "sink"),
    ("scale, 0-d", "no softcap", "bool of batch", "causal window", "sink of heads"),
    ("temperature of rows", "softcap", "floating of rows", "causal, top left", "sink of rows"),
]


@pytest.mark.parametrize(
    ("op", "dtype", "way", "kinds"),
    [
        (op, dtype, way, MODELS[(3 * k + k // 4) % len(MODELS)])
        for k, (op, dtype, way) in enumerate(itertools.product(OURS, FLOATING, WAYS))
    ],
    ids=str,
)
def test_every_kernel(
    host: Host, op: str, dtype: torch.dtype, way: str, kinds: tuple[str, ...]
) -> None:
    """Each type in each schedule, of every operation."""
    dim = dim_of(way, dtype)
    shape = (1, 2, 2, dim) if way in ("cluster", "grid") else (2, 2, 3, dim)
    function = ScoresOnHost(host, op, **schedule_of(way))
    assert_like_reference(
        op, leaf(shape, dtype), 3, function=function, **arguments(kinds, shape, dtype)
    )
    assert [plan.schedule for plan in function.plans] == [schedule_of(way)["schedule"]] * 2
    if way == "short":
        assert function.plans[0].group < LIMITS["Warp"]


@pytest.mark.parametrize("op", OURS)
@pytest.mark.parametrize("dim", SHORT_DIMS)
def test_short_rows(host: Host, op: str, dim: int) -> None:
    """By 8, 16 or 32 lanes, with rows left over for the last block."""
    shape = (1, 3, 3, dim)
    function = ScoresOnHost(host, op, schedule="warp")
    scores = arguments(MODELS[1], shape, torch.float32)
    assert_like_reference(op, leaf(shape, torch.float32), 3, function=function, **scores)


HELD = {  # schedule, device, and chunks that are held so: of float64, forward and backward
    "block: shared": ("block", NEW, WARPS + 2),
    "block: none": ("block", OLD, 10 * WARPS),
    "cluster: shared": ("cluster", NEW, 8 * WARPS + 3),
    "grid: shared": ("grid", NEW, SMS * WARPS + 3),
    "grid: none": ("grid", OLD, 10 * SMS * WARPS),
}


@pytest.mark.parametrize(("op", "way"), [
    (op, way) for op, way in itertools.product(OURS, HELD)
    if op != "log_softmax" or way == "block: shared"
])  # fmt: skip
def test_long_rows(host: Host, op: str, way: str) -> None:
    """Of which a warp has several chunks, in shared memory or read again."""
    schedule, device, chunks = HELD[way]
    shape = (1, 1, 2 if chunks < 200 else 1, chunks * chunk_of(torch.float64) - 3)
    function = ScoresOnHost(
        host, op, schedule=schedule, device=device, orders=host.orders[-1:]
    )  # fmt: skip
    kinds = ("scale of rows", "no softcap", "floating of keys", "causal", "sink of rows")
    scores = arguments(kinds, shape, torch.float64)
    assert_like_reference(op, leaf(shape, torch.float64), 3, function=function, **scores)
    hold = way.split(": ")[1]
    assert function.plans[0].hold == hold
    if op != "logsumexp":  # which has half as much of a row to hold
        assert function.plans[1].hold == ("none" if hold == "none" else function.plans[1].hold)


def test_more_rows_than_teams(host: Host) -> None:
    """Each has several, one after another."""
    for way in ("short", "block", "cluster", "grid"):
        shape = (3, 2, 5, dim_of(way, torch.float64))
        function = ScoresOnHost(
            host, "softmax", most_blocks=2, orders=host.orders[-1:], **schedule_of(way)
        )
        kinds = (
            "scale of heads",
            "no softcap",
            "floating of queries and keys",
            "causal",
            "sink of heads",
        )
        scores = arguments(kinds, shape, torch.float64)
        assert_like_reference("softmax", leaf(shape, torch.float64), 3, function=function, **scores)


# --- Bits ----------------------------------------------------------------------------------------


def results_of(
    function: ScoresOnHost, input: torch.Tensor, scores: dict[str, Any], grad: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The result and all gradients."""
    leaves = {"input": input.detach().requires_grad_()}
    leaves |= {k: v for k, v in scores.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    x = leaves["input"]
    result = function(x, x.dim() - 1, **scores)
    grads = torch.autograd.grad(result, list(leaves.values()), grad)
    return {"result": result.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_all_same(found: dict[str, dict[str, torch.Tensor]]) -> None:
    for name in next(iter(found.values())):
        assert_same_bits({way: each[name] for way, each in found.items()})


KINDS_OF_BITS = (
    "scale of rows", "no softcap", "floating of queries and keys", "causal window", "sink of rows"
)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_bits_of_every_schedule(host: Host, op: str, dtype: torch.dtype) -> None:
    shape = (2, 1, 2, 3 * chunk_of(dtype) - 7)
    input, scores = torch.randn(shape).to(dtype), arguments(KINDS_OF_BITS, shape, dtype)
    scores["window"] = (shape[-1] // 2, 5)
    grad = (torch.randn(shape) + 10).to(dtype)
    ways = [("block", NEW), ("block", OLD), ("cluster", NEW), ("grid", NEW)]
    assert_all_same({
        f"{schedule}, {device}": results_of(
            ScoresOnHost(host, op, schedule=schedule, device=device, orders=host.orders[-1:]),
            input, scores, grad,
        )
        for schedule, device in ways
    })  # fmt: skip


LAYOUTS = {
    "an element apart": lambda t: wider(t, 0, 1),
    "from the second": lambda t: wider(t, 1, 0),
    "a batch apart": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], 1)[:, 0],
    "outer dims reversed": lambda t: t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
}


def wider(t: torch.Tensor, before: int, behind: int) -> torch.Tensor:
    parts = [t.new_full((*t.shape[:-1], size), torch.nan) for size in (before, behind)]
    return torch.cat([parts[0], t, parts[1]], -1)[..., before : before + t.size(-1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["short", "short, vectors", "block", "block, vectors"])
def test_bits_of_every_layout(host: Host, way: str, layout: str) -> None:
    """What lies between the elements is NaN, and of a result, stays what it was. Rows of whole
    vectors begin where those do; torch's layer copies others first."""
    way, _, vectors = way.partition(", ")
    dim, lay = dim_of(way, torch.float16), LAYOUTS[layout]
    if vectors:
        dim = dim // WIDTH * WIDTH
        if "element" in layout or "second" in layout:
            lay = lambda t: wider(t, WIDTH, 2 * WIDTH)  # noqa: E731
    shape = (2, 3, 4, dim)
    input, scores = torch.randn(shape).half(), arguments(KINDS_OF_BITS, shape, torch.float16)
    grad = (torch.randn(shape) + 10).half()
    assert_all_same({
        name: results_of(
            ScoresOnHost(host, "softmax", lay=lay, orders=host.orders[-1:], **schedule_of(way)),
            input, scores, grad,
        )
        for name, lay in (("contiguous", None), (layout, lay))
    })  # fmt: skip


def test_rows_that_begin_between_vectors_are_refused(host: Host) -> None:
    function = ScoresOnHost(host, "softmax", lay=lambda t: wider(t, 1, 1))
    with pytest.raises(AssertionError, match="the launch returned an error"):
        function(torch.randn(3, 5, 8), 2)


@pytest.mark.parametrize("band", [band for band in BANDS if band != "no band"])
@pytest.mark.parametrize("way", ["short", "block"])
def test_a_band_has_the_bits_of_its_mask(host: Host, way: str, band: str) -> None:
    shape = (1, 2, 6, dim_of(way, torch.float32))
    of_band = BANDS[band](shape, torch.float32)
    mask = mask_of_band(*shape[-2:], **of_band)
    input, grad = torch.randn(shape), torch.randn(shape) + 10
    for op in ("softmax", "log_softmax"):
        function = ScoresOnHost(host, op, orders=host.orders[-1:], **schedule_of(way))
        of_op = grad.masked_fill(~mask, 0)
        assert_all_same({
            "band": results_of(function, input.masked_fill(~mask, torch.nan), of_band, of_op),
            "mask": results_of(function, input, {"mask": mask}, of_op),
        })  # fmt: skip


def test_a_part_without_rows_is_refused(host: Host) -> None:
    function = ScoresOnHost(host, "softmax", parts=4)
    mask = torch.zeros(3, 8, requires_grad=True)
    with pytest.raises(AssertionError, match="the launch returned an error"):
        function(torch.zeros(5, 3, 8), 2, mask=mask).sum().backward()


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("way", ["short", "block"])
def test_parts_of_the_gradient_of_a_mask(host: Host, way: str, parts: int) -> None:
    """Of integers, whose sums are exact, in any number of parts; 5 rows share one of the mask."""
    dim = dim_of(way, torch.float64)
    input = torch.zeros(5, 1, 3, dim, dtype=torch.float64)
    mask = torch.zeros(3, dim, dtype=torch.float64, requires_grad=True)
    grad = torch.randint(-3, 4, input.shape).double() * dim * dim
    function = ScoresOnHost(host, "softmax", parts=parts, most_blocks=2, **schedule_of(way))
    (found,) = torch.autograd.grad(function(input, 3, mask=mask), mask, grad)
    torch.testing.assert_close(found, (grad / dim - grad.sum(-1, True) / dim / dim).sum((0, 1)))


# --- Special values ------------------------------------------------------------------------------


def special_rows(dim: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, dim)."""
    x = torch.randn(9, dim).to(dtype)
    x[1] = -math.inf
    x[2, dim // 2] = math.inf
    x[3, dim // 3] = math.nan
    x[4] = torch.finfo(dtype).min
    x[5, 0], x[5, -1] = math.nan, math.inf
    x[6, ::2] = -math.inf
    x[7] = torch.finfo(dtype).max
    x[8, 0] = torch.finfo(dtype).max
    return x


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("way", ["short", "block"])
@pytest.mark.parametrize("op", OURS)
def test_special_rows(host: Host, op: str, way: str, dtype: torch.dtype) -> None:
    """As torch has them; and under a mask of all, where -inf takes no part."""
    x, rtol = special_rows(dim_of(way, dtype), dtype), max(2 * torch.finfo(dtype).eps, 1e-5)
    function = ScoresOnHost(host, op, orders=host.orders[-1:], **schedule_of(way))
    expected = getattr(torch, op)(x.double(), 1)
    torch.testing.assert_close(
        function(x, 1).double(), expected.to(dtype).double(), equal_nan=True, rtol=rtol, atol=1e-6
    )
    of_safe = expected
    if op != "logsumexp":
        of_safe = expected.masked_fill(x == -math.inf, 0 if op == "softmax" else -math.inf)
    found = function(x, 1, mask=torch.ones(1, x.size(1), dtype=torch.bool))
    torch.testing.assert_close(
        found.double(), of_safe.to(dtype).double(), equal_nan=True, rtol=rtol, atol=1e-6
    )


@pytest.mark.parametrize("way", ["short", "block"])
@pytest.mark.parametrize("op", OURS)
def test_rows_of_which_nothing_takes_part(host: Host, op: str, way: str) -> None:
    """0, or -inf, and no gradient; NaN that is masked is nowhere."""
    dim = dim_of(way, torch.float32)
    x = torch.full((4, dim), torch.nan)
    mask = torch.zeros(4, dim, dtype=torch.bool)
    mask[1:, : dim // 2] = True
    x[1:, : dim // 2] = torch.randn(3, dim // 2)
    x[3, 1] = torch.nan
    x.requires_grad_()
    scale = torch.ones(4, 1, requires_grad=True)
    function = ScoresOnHost(host, op, **schedule_of(way))
    result = function(x, 1, mask=mask, scale=scale)
    grads = torch.autograd.grad(result, (x, scale), torch.ones_like(result))
    if op == "logsumexp":
        assert result[0] == -math.inf
    else:
        dead = 0.0 if op == "softmax" else -math.inf
        assert bool((result[~mask] == dead).all())
    assert bool(torch.isfinite(result[1:3] if op == "logsumexp" else result[1:3, : dim // 2]).all())
    assert bool(result[3].isnan().any())
    assert bool((grads[0][:3][~mask[:3]] == 0).all())
    assert bool(torch.isfinite(grads[0][:3]).all())
    assert bool(torch.isfinite(grads[1][:3]).all())
    assert grads[1][0] == 0


@pytest.mark.parametrize("way", WAYS)
def test_in_place(host: Host, way: str) -> None:
    """Over the input, and over the gradient that comes."""
    dim = dim_of(way, torch.float32)
    shape = (2, 2, dim)
    scores = {"scale": 0.5, "mask": torch.rand(2, 1, dim) > 0.3, "is_causal": True}
    x, grad = torch.randn(shape), torch.randn(shape)
    found = {}
    for in_place in (0, 1):
        function = ScoresOnHost(host, "softmax", in_place=in_place, **schedule_of(way))
        found[f"in place: {in_place}"] = results_of(function, x, scores, grad)
    assert_all_same(found)
