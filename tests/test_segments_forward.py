"""segment_softmax, segment_log_softmax and segment_logsumexp: values."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_reference import OPS, assert_close, by_loop, index_of, pointers, shuffled
from test_threads_and_isa import run
from tolerances import FLOATING, INTEGERS

import softmax_ext

HEADS = [
    1,  # a segment is one row
    2,
    3,  # four steps in a register, and lanes that hold none
    8,  # two steps in a register of AVX-512, one of AVX2
    16,  # a register of AVX-512
    40,  # registers, and half of one
]
# No element, one, a register less one, and one, and one more; several registers; a chunk of 8 heads
# (4096 elements), and one more.
LENGTHS = [0, 1, 15, 0, 0, 16, 17, 33, 2, 512, 3, 513, 7, 0]
PTR = pointers(LENGTHS)


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * 4).to(dtype)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_heads_and_dtypes(op: str, dtype: torch.dtype, heads: int, device: str) -> None:
    x = logits(int(PTR[-1]), heads, dtype=dtype).to(device)
    assert_close(OPS[op](x, PTR.to(device)), op, x, ptr=PTR)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_ptr_and_index(op: str, index_dtype: torch.dtype, device: str) -> None:
    ptr = pointers([3, 0, 5000, 40, 1, 0])
    x = logits(int(ptr[-1]), 3).to(device)
    index = index_of(ptr)
    by_ptr = OPS[op](x, ptr.to(device, index_dtype))
    assert_close(by_ptr, op, x, ptr=ptr)
    # Sorted, the same segments but for the empty one at the end.
    by_index = OPS[op](x, index=index.to(device, index_dtype))
    assert torch.equal(by_index, by_ptr[:-1] if op == "logsumexp" else by_ptr)
    mixed = shuffled(index)
    actual = OPS[op](x, index=mixed.to(device, index_dtype), num_segments=6)
    assert_close(actual, op, x, index=mixed, num_segments=6)
    # Elements of a segment stay in their order: the bits are those of the rows side by side.
    order = mixed.argsort(stable=True)
    ordered = OPS[op](x[order.to(device)], ptr.to(device))
    assert torch.equal(actual if op == "logsumexp" else actual[order.to(device)], ordered)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((20,), 0),
        ((20,), -1),
        ((3, 20), 1),
        ((3, 20, 5), 1),
        ((2, 3, 20, 2, 4), 2),
        ((2, 20, 1), -2),
        ((0, 20), 1),
        ((20, 0), 0),
        ((20, 300), 0),  # a step is many registers
    ],
    ids=str,
)
def test_dims(op: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    ptr = pointers([4, 0, 15, 1])
    x = logits(*shape).to(device)
    assert_close(OPS[op](x, ptr.to(device), dim=dim), op, x, dim, ptr=ptr)
    index = shuffled(index_of(ptr))
    actual = OPS[op](x, index=index.to(device), dim=dim, num_segments=5)
    assert_close(actual, op, x, dim, index=index, num_segments=5)


@pytest.mark.parametrize("op", OPS)
def test_strided_input(op: str, device: str) -> None:
    ptr = pointers([4, 0, 15, 1])
    for x in (
        logits(8, 20).to(device).t(),
        logits(20, 16).to(device)[:, ::2],
        logits(1, 8).to(device).expand(20, 8),
        logits(40, 8).to(device)[1::2],
    ):
        assert torch.equal(OPS[op](x, ptr.to(device)), OPS[op](x.contiguous(), ptr.to(device)))
    ptrs = torch.stack([ptr, ptr], 1).to(device)[:, 0]
    index = index_of(ptr).repeat_interleave(2).to(device)[::2]
    x = logits(20, 8).to(device)
    assert torch.equal(OPS[op](x, ptrs), OPS[op](x, ptr.to(device)))
    assert torch.equal(OPS[op](x, index=index), OPS[op](x, index=index.contiguous()))


@pytest.mark.parametrize("heads", [1, 3, 8, 40])
@pytest.mark.parametrize("op", OPS)
def test_long_segments(op: str, heads: int, device: str) -> None:
    """In chunks, between short ones; a sum of 100000 terms is as exact as of few."""
    ptr = pointers([5, 100003, 0, 7, 2 * 4096 // heads + 1, 4096 // heads + 1, 1])
    x = logits(int(ptr[-1]), heads).to(device)
    assert_close(OPS[op](x, ptr.to(device)), op, x, ptr=ptr)
    index = shuffled(index_of(ptr))
    assert_close(OPS[op](x, index=index.to(device)), op, x, index=index)


@pytest.mark.parametrize("op", OPS)
def test_one_segment_is_the_function_without_segments(op: str, device: str) -> None:
    x = logits(2, 1000, 3).to(device)
    ptr = pointers([1000]).to(device)
    expected = {
        "softmax": softmax_ext.softmax,
        "log_softmax": softmax_ext.log_softmax,
        "logsumexp": lambda x, dim: x.logsumexp(dim, keepdim=True),
    }[op](x, 1)
    torch.testing.assert_close(OPS[op](x, ptr, dim=1), expected, rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("scale", [0.125, -3.0, 0.0, 1e-3, 7])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_scale(op: str, dtype: torch.dtype, scale: float, device: str) -> None:
    """Of the input as it is: the product is not rounded to 16 bits."""
    x = logits(int(PTR[-1]), 3, dtype=dtype).to(device)
    assert_close(OPS[op](x, PTR.to(device), scale=scale), op, x, scale=scale, ptr=PTR)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float64, *INTEGERS], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_dtype(op: str, input_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    x = logits(20, 3).round().abs().to(device, input_dtype)
    ptr = pointers([4, 0, 15, 1])
    assert_close(OPS[op](x, ptr.to(device), dtype=dtype), op, x, dtype=dtype, ptr=ptr)


@pytest.mark.parametrize("op", OPS)
def test_no_elements(op: str, device: str) -> None:
    x = torch.empty(0, 3, device=device)
    count = 4 if op == "logsumexp" else 0
    for actual in (
        OPS[op](x, torch.zeros(5, dtype=torch.int64, device=device)),
        OPS[op](x, index=torch.zeros(0, dtype=torch.int64, device=device), num_segments=4),
    ):
        assert torch.equal(actual, torch.full((count, 3), -math.inf, device=device))
    index = torch.zeros(0, dtype=torch.int32, device=device)
    assert OPS[op](x, index=index).shape == (0, 3)


@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("length", [1, 2, 3, 40, 5000])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_infinities_and_nan(
    op: str, dtype: torch.dtype, length: int, heads: int, device: str
) -> None:
    """Segment by segment as torch's function of a row."""
    inf, nan = math.inf, math.nan
    rows = [
        [-inf, -inf],
        [-inf, 1.0],
        [inf, 1.0],
        [inf, inf],
        [inf, -inf],
        [nan, 1.0],
        [nan, -inf],
        [nan, inf],
        [inf, nan],
    ]
    x = torch.cat([torch.tensor([(row * length)[:length]]) for row in rows], 1).flatten()
    x = x.to(dtype)[:, None].expand(-1, heads).contiguous().to(device)
    ptr = pointers([length] * len(rows))
    assert_close(OPS[op](x, ptr.to(device)), op, x, ptr=ptr)


def test_extreme_values(device: str) -> None:
    x = torch.tensor([1e30, 0.0, -1e30, 88.0, 89.0, -200.0, -300.0], device=device)
    ptr = pointers([3, 2, 2])
    for op in OPS:
        assert_close(OPS[op](x, ptr.to(device)), op, x, ptr=ptr)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    heads=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_random_segments(lengths: list[int], heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    ptr = pointers(lengths)
    x = logits(int(ptr[-1]), heads)
    index = shuffled(index_of(ptr))
    for op, function in OPS.items():
        assert_close(function(x, ptr), op, x, ptr=ptr)
        actual = function(x, index=index, num_segments=len(lengths))
        assert_close(actual, op, x, index=index, num_segments=len(lengths))


@pytest.mark.parametrize("op", OPS)
def test_threads_change_no_bit(op: str) -> None:
    ptr = pointers([3] * 500 + [100000] + [4096, 4097, 0, 1] * 3)
    x = logits(2, int(ptr[-1]), 3)
    index = shuffled(index_of(ptr))
    grad = torch.randn_like(OPS[op](x, ptr, dim=1))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            y = OPS[op](leaf, ptr, dim=1)
            mixed = OPS[op](x, index=index, dim=1)
            results.append((y.detach(), mixed, *torch.autograd.grad(y, leaf, grad)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_every_instruction_set() -> None:
    """In a process for each: which is in use is decided at import."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from segment_reference import OPS, assert_close, assert_gradient_close, index_of, pointers, shuffled
torch.manual_seed(0)
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for heads in (1, 3, 8, 40):
        ptr = pointers([0, 1, 7, 33, 4096 // heads + 1, 2])
        x = torch.randn(int(ptr[-1]), heads, dtype=torch.float64).to(dtype).requires_grad_()
        index = shuffled(index_of(ptr))
        for op, function in OPS.items():
            for segments in ({"ptr": ptr}, {"index": index}):
                y = function(x, **segments)
                assert_close(y, op, x, **segments)
                grad = torch.randn_like(y)
                (dx,) = torch.autograd.grad(y, x, grad)
                assert_gradient_close(dx, op, grad, x, **segments)
"""
    for isa in softmax_ext.build_info().cpu_isas:
        process = run(code, str(Path(__file__).parent), SOFTMAX_EXT_ISA=isa)
        assert process.returncode == 0, f"{isa}: {process.stderr}"


def test_the_reference() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0], [5.0]], dtype=torch.float64)
    y = by_loop("softmax", x, 0, 1.0, index=torch.tensor([0, 0, 0, 1]))
    assert [round(v, 4) for v in y.flatten().tolist()] == [0.09, 0.2447, 0.6652, 1.0]
