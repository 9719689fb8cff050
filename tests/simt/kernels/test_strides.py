"""Rows and columns that do not lie one after another: the bits of those that do, in every schedule.

What lies between an input's elements is NaN; what lies between those of the result stays as it was,
which Host looks at.
"""

from collections.abc import Callable

import pytest
import torch
from host import Host, Result
from kernel_cases import (
    FEWER_TYPES,
    NATIVE,
    SAME,
    WAYS,
    Types,
    Way,
    all_ways,
    assert_same_bits,
    every_pair,
)
from tolerances import reference

Sizes = tuple[int, ...]
Make = Callable[..., torch.Tensor]
Lay = Callable[[Make, Sizes, int], torch.Tensor]


def wider(make: Make, s: Sizes, before: int, behind: int) -> torch.Tensor:
    """As many elements before and behind those of an outer index."""
    inside = make(*s[:3], before + s[3] * s[4] + behind).narrow(-1, before, s[3] * s[4])
    return inside.unflatten(-1, s[3:])


# Tensors of sizes (a, b, c, dim, inner) in memory of more; `width` elements are 16 bytes.
APART: dict[str, Lay] = {
    "contiguous": lambda make, s, width: make(*s),
    "an element apart": lambda make, s, width: wider(make, s, 0, 1),
    "an element apart, from the second": lambda make, s, width: wider(make, s, 1, 0),
    "a vector apart": lambda make, s, width: wider(make, s, width, 0),
    "all but the first of a batch": lambda make, s, width: make(*s[:2], s[2] + 1, *s[3:])[:, :, 1:],
    "outer dims exchanged": lambda make, s, width: make(s[1], s[0], *s[2:]).transpose(0, 1),
    "outer dims reversed, a part": lambda make, s, width: wider(
        make, (s[2] + 1, s[1], 2 * s[0], *s[3:]), 0, 3
    ).permute(2, 1, 0, 3, 4)[::2, :, :-1],
}
# What can only be read.
SHARED: dict[str, Lay] = {
    "one batch for all": lambda make, s, width: make(1, *s[1:]).expand(s),
    "one row for some": lambda make, s, width: make(*s[:2], 1, *s[3:]).expand(s),
    "one row for all": lambda make, s, width: make(1, 1, 1, *s[3:]).expand(s),
}
# Of columns alone: steps that do not follow each other.
STEPS: dict[str, Lay] = {
    "steps an element apart": lambda make, s, width: make(*s[:4], s[4] + 1)[..., :-1],
    "steps a vector apart": lambda make, s, width: make(*s[:4], s[4] + width)[..., width:],
    "dim outermost": lambda make, s, width: make(s[3], *s[:3], s[4]).permute(1, 2, 3, 0, 4),
}
LAYOUTS = {**APART, **SHARED, **STEPS}
UNALIGNED = [name for name in LAYOUTS if "element" in name or "a part" in name]


def lying(layout: str, values: torch.Tensor, width: int) -> torch.Tensor:
    """The values; of those that share a place, one."""
    result = LAYOUTS[layout](
        lambda *sizes: torch.full(sizes, torch.nan, dtype=values.dtype), tuple(values.shape), width
    )
    for index in torch.cartesian_prod(*(torch.arange(size) for size in values.shape[:3])).tolist():
        result[tuple(index)] = values[tuple(index)]
    return result


def shape_of(way: Way, types: Types) -> Sizes:
    """Twelve outer indices in three dims, four where rows are long or a cluster has a column."""
    long = way.long or way.dim(types) > 3 * types.chunk or way.name == "columns: cluster"
    outer = (2, 1, 2) if long else (2, 3, 2)
    return (*outer, way.dim(types), way.shape(5, types)[2])


def run_over(
    host: Host, types: Types, op: str, inputs: list[torch.Tensor], **how: object
) -> Result:
    call = host.forward if types.direction == "forward" else host.backward
    return call(op, *inputs, 3, types.store, **how)


def inputs_of(types: Types, op: str, shape: Sizes) -> list[torch.Tensor]:
    x = torch.randn(shape).mul(2)
    if types.direction == "forward":
        return [x.to(types.load)]
    return [torch.randn(shape).to(types.load), reference(op, x, 3).to(types.load)]


def check(
    host: Host, way: Way, types: Types, op: str, layouts: list[str], in_place: int = -1
) -> None:
    """layouts: of what is read, and of the result, which in place is one of them."""
    shape = shape_of(way, types)
    values = inputs_of(types, op, shape)
    given = [lying(name, x, types.width) for name, x in zip(layouts, values, strict=False)]
    out = lying(layouts[-1], torch.zeros(shape, dtype=types.store), types.width)
    how = way.how(types) | {"orders": host.orders[-1:]}
    expected = run_over(host, types, op, given, **how)
    result = run_over(host, types, op, given, **how, out=out, in_place=in_place)
    assert_same_bits({"contiguous": expected.tensor, ", ".join(layouts): result.tensor})
    assert result.plan.schedule == way.schedule
    if way.schedule not in ("packed", "columns") and not set(layouts) & set(UNALIGNED):
        assert result.plan.vectorized == way.whole
        assert result.plan.vectorized == expected.plan.vectorized


TYPES = [types for types in NATIVE if torch.bfloat16 not in (types.load, types.store)]
ROWS = all_ways(TYPES, WAYS, long=FEWER_TYPES)
COLUMNS = [(way, types) for way, types in ROWS if way.schedule == "columns"]


def together(read: dict[str, Lay], written: dict[str, Lay]) -> list[tuple[str, str, str]]:
    """Layouts of a call: each of what is read, in either place, and each of what is written."""
    inputs, results = list(read), list(written)
    count = max(len(inputs), len(results))
    return [
        (inputs[k % len(inputs)], inputs[-k % len(inputs)], results[(3 * k + 1) % len(results)])
        for k in range(count)
    ]


@every_pair(ROWS, layouts=together({**APART, **SHARED}, APART))
def test_outer_strides(
    host: Host, types: Types, op: str, way: Way, layouts: tuple[str, str, str]
) -> None:
    check(host, way, types, op, [*layouts[: types.inputs], layouts[2]])


@every_pair(COLUMNS, layouts=together({**STEPS, "contiguous": APART["contiguous"]}, STEPS))
def test_strides_along_dim(
    host: Host, types: Types, op: str, way: Way, layouts: tuple[str, str, str]
) -> None:
    check(host, way, types, op, [*layouts[: types.inputs], layouts[2]])


@every_pair(all_ways(SAME, WAYS, long=FEWER_TYPES), layout=APART, in_place=[0, 1])
def test_in_place(host: Host, types: Types, op: str, way: Way, layout: str, in_place: int) -> None:
    """Over the input; backward over the gradient that comes, or over the output."""
    layouts = ["outer dims exchanged"] * types.inputs
    layouts[in_place] = layout
    check(host, way, types, op, [*layouts, layout], in_place)


@pytest.mark.parametrize("inner", [1, 3, 16])
def test_more_slabs_than_blocks(host: Host, inner: int) -> None:
    """Whose last has fewer outer indices than the others, in each run of several."""
    types = Types("forward", torch.float32, torch.float32)
    x = lying("all but the first of a batch", torch.randn(3, 2, 301, 5, inner), types.width)
    out = torch.empty(x.shape)
    how = {"schedule": "packed", "device": "AGX Orin", "most_blocks": 2, "resident": 2}
    result = run_over(host, types, "softmax", [x], **how, out=out)
    expected = run_over(host, types, "softmax", [x], **how)
    assert 1 < result.plan.items // inner < 301
    assert 301 % (result.plan.items // inner) > 0
    assert_same_bits({"contiguous": expected.tensor, "strided": result.tensor})
