"""Rows not one after another: the bits of those that are, and nothing written between them."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from pairwise import all_pairs
from tolerances import FLOATING, OPS, OURS

import softmax_ext

IN_PLACE = {"softmax": softmax_ext.softmax_, "log_softmax": softmax_ext.log_softmax_}

# (shape, dim), each for another kernel of the CPU. Outer sizes of 2 and 3, so that few rows lie at
# even distances; others that are no whole registers.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "rows of a register": ((3, 11, 7), 2),
    "rows of whole registers": ((3, 5, 64), 2),
    "rows of several groups": ((4, 37, 7), 2),
    "short rows": ((9, 3, 203), 2),
    "rows of two to a chunk": ((2, 3, 1031), 2),
    "rows of several chunks": ((2, 3, 9001), 2),
    "a row that threads share": ((1, 1, 40009), 2),
    "columns of one block": ((2, 3, 5, 301), 2),
    "columns of several": ((2, 3, 37, 530), 2),
    "two inner dims": ((3, 4, 6, 9, 35), 2),
    "two narrow inner dims": ((3, 4, 6, 3, 2), 2),
    "narrow columns": ((5, 3, 7, 3), 2),
    "narrow columns of whole registers": ((5, 3, 20, 16), 2),
    "narrow columns of two blocks": ((5, 3, 20, 3), 2),
    "narrow columns that overlap": ((3, 2, 20, 61), 2),
    "steps that are packed": ((2, 3, 103, 5), 2),
    "steps that are packed, of whole registers": ((2, 3, 230, 16), 2),
    "the first dim": ((37, 3, 43), 0),
}

Make = Callable[..., torch.Tensor]

# How a tensor of sizes (a, b, ...) lies in the memory of one that `make` makes. Some begin and some
# end where their memory does, beyond which nothing may be read.
APART: dict[str, Callable[[Make, tuple[int, ...], int], torch.Tensor]] = {
    "contiguous": lambda make, s, dim: make(*s),
    "not aligned": lambda make, s, dim: make(torch.Size(s).numel() + 1)[1:].view(s),
    "all but the last of a batch": lambda make, s, dim: make(s[0], s[1] + 1, *s[2:])[:, :-1],
    "all but the first of a batch": lambda make, s, dim: make(s[0], s[1] + 1, *s[2:])[:, 1:],
    "every other of a batch": lambda make, s, dim: make(s[0], 2 * s[1], *s[2:])[:, 1::2],
    "the first of a longer dim": lambda make, s, dim: longer(make, s, dim, 3).narrow(
        dim, 0, s[dim]
    ),
    "the last of a longer dim": lambda make, s, dim: longer(make, s, dim, 1).narrow(dim, 1, s[dim]),
    "the last columns": lambda make, s, dim: longer(make, s, -1, 2).narrow(-1, 2, s[-1]),
    "every other column": lambda make, s, dim: longer(make, s, -1, s[-1])[..., ::2],
    "every other step": lambda make, s, dim: longer(make, s, dim, s[dim])[
        (slice(None),) * dim + (slice(1, None, 2),)
    ],
    "outer dims exchanged": lambda make, s, dim: make(s[1], s[0], *s[2:]).transpose(0, 1),
    "outer dims exchanged and a part": lambda make, s, dim: make(s[1], s[0] + 1, *s[2:]).transpose(
        0, 1
    )[:-1],
    "dim innermost": lambda make, s, dim: make(*s[:dim], *s[dim + 1 :], s[dim]).movedim(-1, dim),
    "dim outermost": lambda make, s, dim: make(s[dim], *s[:dim], *s[dim + 1 :]).movedim(0, dim),
    "all dims reversed": lambda make, s, dim: make(*s[::-1]).permute(*range(len(s))[::-1]),
    "a part of all, reversed": lambda make, s, dim: make(*(n + 2 for n in s[::-1])).permute(
        *range(len(s))[::-1]
    )[tuple(slice(1, -1) for _ in s)],
}
# What can only be read.
SHARED: dict[str, Callable[[Make, tuple[int, ...], int], torch.Tensor]] = {
    "one batch for all": lambda make, s, dim: make(1, *s[1:]).expand(s),
    "one row for all": lambda make, s, dim: make(s[0], 1, *s[2:]).expand(s),
    "one step for all": lambda make, s, dim: make(*s[:dim], 1, *s[dim + 1 :]).expand(s),
    "one column for all": lambda make, s, dim: make(*s[:-1], 1).expand(s),
    "one element for all": lambda make, s, dim: make(1).expand(s),
    "rows that overlap": lambda make, s, dim: make(sum(s)).as_strided(s, (1,) * len(s)),
}
LAYOUTS = {**APART, **SHARED}


def longer(make: Make, shape: tuple[int, ...], dim: int, more: int) -> torch.Tensor:
    sizes = list(shape)
    sizes[dim] += more
    return make(*sizes)


def random(layout: str, shape: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    def make(*sizes: int) -> torch.Tensor:
        x = torch.randn(sizes, device=device) * 3
        return x.to(dtype) if dtype.is_floating_point else x.round().to(dtype)

    return LAYOUTS[layout](make, *SHAPES[shape])


class Canary:
    """A tensor to be written, in memory of which the rest must stay as it is."""

    def __init__(self, layout: str, shape: str, dtype: torch.dtype, device: str) -> None:
        def make(*sizes: int) -> torch.Tensor:
            self.memory = torch.full(sizes, 7, dtype=dtype, device=device)
            return self.memory

        self.tensor = APART[layout](make, *SHAPES[shape])

    def check(self, expected: torch.Tensor) -> None:
        assert torch.equal(self.tensor, expected)
        self.tensor.fill_(7)
        assert (self.memory == 7).all()


def pairs(*values: Iterable[Any]) -> list[tuple[Any, ...]]:
    return all_pairs(list(itertools.product(*values)))


@pytest.mark.parametrize(
    ("shape", "layout", "op", "dtype"), pairs(SHAPES, LAYOUTS, OPS, FLOATING), ids=str
)
def test_forward(shape: str, layout: str, op: str, dtype: torch.dtype, device: str) -> None:
    x = random(layout, shape, dtype, device)
    dim = SHAPES[shape][1]
    before = x.clone()
    result = OURS[op](x, dim)
    assert result.is_contiguous()
    assert torch.equal(result, OURS[op](x.contiguous(), dim))
    assert torch.equal(x, before)


CASTS = [
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float16),
    (torch.int8, torch.float64),
    (torch.int64, torch.float32),
    (torch.bool, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("shape", "layout", "op", "dtypes"), pairs(SHAPES, LAYOUTS, OPS, CASTS), ids=str
)
def test_forward_with_a_cast(
    shape: str, layout: str, op: str, dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    x = random(layout, shape, dtypes[0], device)
    dim = SHAPES[shape][1]
    expected = OURS[op](x.contiguous(), dim, dtype=dtypes[1])
    assert torch.equal(OURS[op](x, dim, dtype=dtypes[1]), expected)


@pytest.mark.parametrize(
    ("shape", "layout", "out_layout", "op", "dtype"),
    pairs(SHAPES, LAYOUTS, APART, OPS, FLOATING),
    ids=str,
)
def test_out(
    shape: str, layout: str, out_layout: str, op: str, dtype: torch.dtype, device: str
) -> None:
    x = random(layout, shape, dtype, device)
    dim = SHAPES[shape][1]
    out = Canary(out_layout, shape, dtype, device)
    strides, address = out.tensor.stride(), out.tensor.data_ptr()
    assert OURS[op](x, dim, out=out.tensor) is out.tensor
    assert (out.tensor.stride(), out.tensor.data_ptr()) == (strides, address)
    out.check(OURS[op](x.contiguous(), dim))


@pytest.mark.parametrize(
    ("shape", "layout", "op", "dtype"), pairs(SHAPES, APART, OPS, FLOATING), ids=str
)
def test_in_place(shape: str, layout: str, op: str, dtype: torch.dtype, device: str) -> None:
    dim = SHAPES[shape][1]
    x = Canary(layout, shape, dtype, device)
    x.tensor.copy_(random("contiguous", shape, dtype, device))
    expected = OURS[op](x.tensor.contiguous(), dim)
    assert IN_PLACE[op](x.tensor, dim) is x.tensor
    x.check(expected)


def backward(
    op: str, grad: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    result: torch.Tensor = getattr(torch.ops.softmax_ext, f"{op}_backward")(
        grad, output, dim, dtype
    )
    return result


# What is read, and the gradient's type.
GRADIENTS = [
    *((dtype, dtype) for dtype in FLOATING),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(
    ("shape", "grad_layout", "layout", "op", "dtypes"),
    pairs(SHAPES, LAYOUTS, APART, OPS, GRADIENTS),
    ids=str,
)
def test_backward(
    shape: str,
    grad_layout: str,
    layout: str,
    op: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: str,
) -> None:
    dim = SHAPES[shape][1]
    grad = random(grad_layout, shape, dtypes[0], device)
    output = Canary(layout, shape, dtypes[0], device)
    output.tensor.copy_(OURS[op](random("contiguous", shape, dtypes[0], device), dim))
    before = output.tensor.clone(), grad.clone()
    result = backward(op, grad, output.tensor, dim, dtypes[1])
    assert result.is_contiguous()
    contiguous = grad.contiguous(), output.tensor.contiguous()
    assert torch.equal(result, backward(op, *contiguous, dim, dtypes[1]))
    assert torch.equal(grad, before[1])
    output.check(before[0])


def aten_backward(
    op: str, grad: torch.Tensor, output: torch.Tensor, dim: int, grad_input: torch.Tensor
) -> None:
    """Into memory that is given: only the switch has that."""
    with softmax_ext.enabled():
        name = "grad_input" if op == "softmax" else "out"
        getattr(torch.ops.aten, f"_{op}_backward_data").out(
            grad, output, dim, grad.dtype, **{name: grad_input}
        )


@pytest.mark.parametrize("into", ["memory of its own", "grad_output", "output"])
@pytest.mark.parametrize(
    ("shape", "layout", "grad_layout", "op", "dtype"),
    pairs(SHAPES, APART, APART, OPS, FLOATING),
    ids=str,
)
def test_backward_into(
    shape: str,
    layout: str,
    grad_layout: str,
    op: str,
    dtype: torch.dtype,
    into: str,
    device: str,
) -> None:
    """Its own memory, or that of a tensor which is read."""
    dim = SHAPES[shape][1]
    written = Canary(layout, shape, dtype, device)
    grad = random(grad_layout, shape, dtype, device)
    output = OURS[op](random(grad_layout, shape, dtype, device), dim)
    if into == "grad_output":
        grad = written.tensor.copy_(grad)
    elif into == "output":
        output = written.tensor.copy_(output)
    expected = backward(op, grad.contiguous(), output.contiguous(), dim, dtype)
    aten_backward(op, grad, output, dim, written.tensor)
    written.check(expected)


# An input and an out= of sizes (6, 37) in the same memory of (40, 41).
OVERLAPS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "rows beside rows": lambda m: (m[:6, :20], m[:6, 20:40]),
    "rows between rows": lambda m: (m[:12:2, :37], m[1:12:2, :37]),
    "the next rows": lambda m: (m[:6, :37], m[1:7, :37]),
    "the rows before": lambda m: (m[1:7, :37], m[:6, :37]),
    "the next column": lambda m: (m[:6, :37], m[:6, 1:38]),
    "the first rows, further apart": lambda m: (m[:6, :37], m[:12:2, :37]),
    "the same, transposed": lambda m: (m[:37, :37], m[:37, :37].t()),
    "the same rows in another order": lambda m: (
        m[:6, :36].view(2, 3, 36),
        m[:6, :36].view(3, 2, 36).transpose(0, 1),
    ),
    "rows of one": lambda m: (m[:1, :37].expand(6, 37), m[:6, :37]),
    "contiguous, from a part": lambda m: (m[:6, :37], m.view(-1)[: 6 * 37].view(6, 37)),
    "a part, from contiguous": lambda m: (m.view(-1)[: 6 * 37].view(6, 37), m[:6, :37]),
    "another type of another size": lambda m: (
        m.view(torch.int16)[:6, :37],
        m[:6, :37],
    ),
    "another type of the same size": lambda m: (m.view(torch.int32)[:6, :37], m[:6, :37]),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_out_in_the_memory_of_the_input(overlap: str, dim: int, op: str, device: str) -> None:
    """Read before it is written, or copied first."""
    memory = torch.randn(40, 41, device=device)
    memory.view(torch.int32)[:, 0] = 3  # bits that are some number of either type
    if "another type" in overlap:
        memory.view(torch.int32).copy_(torch.randint(-9, 9, (40, 41), device=device))
    x, out = OVERLAPS[overlap](memory)
    before = memory.clone()
    expected = OURS[op](x.clone(), dim, dtype=torch.float32)
    assert OURS[op](x, dim, dtype=torch.float32, out=out) is out
    assert torch.equal(out, expected)
    written = torch.zeros_like(memory, dtype=torch.bool)
    written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    bits = memory.view(torch.int32), before.view(torch.int32)
    assert torch.equal(bits[0][~written], bits[1][~written])


@pytest.mark.parametrize("op", OPS)
def test_elements_that_share_memory_in_place(op: str, device: str) -> None:
    """torch takes them where it does not see it; the result is a copy of the right one."""
    memory = torch.randn(60, device=device)
    x = memory.as_strided((9, 37), (2, 1))
    expected = memory.clone()
    expected.as_strided((9, 37), (2, 1)).copy_(OURS[op](x.clone(), 1))
    IN_PLACE[op](x, 1)
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 5, 11])
def test_more_dims_than_strides_are_kept_of(dim: int, op: str, device: str) -> None:
    x = torch.randn((2,) * 12, device=device).permute(*range(12)[::-1])
    out = torch.empty((2,) * 12, device=device).permute(*range(12)[::-1])
    expected = OURS[op](x.contiguous(), dim)
    assert torch.equal(OURS[op](x, dim), expected)
    assert torch.equal(OURS[op](x, dim, out=out), expected)
    assert torch.equal(IN_PLACE[op](x.clone(memory_format=torch.preserve_format), dim), expected)
    assert torch.equal(
        backward(op, x, expected, dim, x.dtype),
        backward(op, x.contiguous(), expected, dim, x.dtype),
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("slices", ["rows", "columns"])
def test_large_out_of_parts(slices: str, op: str, device: str) -> None:
    """32 MB and more, which the CPU writes past its caches: whole lines of memory, and others."""
    for size, more in ((1024, 16), (1024, 1), (1031, 9)):
        shape = (8, 1100, size) if slices == "rows" else (220, 40, size)
        dim = 2 if slices == "rows" else 1
        x = torch.randn(1, *shape[1:], device=device).expand(shape)
        memory = torch.full((*shape[:2], size + more), 7.0, device=device)
        OURS[op](x, dim, out=memory[..., :size])
        assert torch.equal(memory[..., :size], OURS[op](x[:1], dim).expand(shape))
        assert (memory[..., size:] == 7).all()
