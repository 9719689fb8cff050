"""Infinities and NaN, by every way to share a row."""

from collections.abc import Iterator

import torch
from host import Host
from kernel_cases import (
    FEWER,
    FEWER_TYPES,
    ROWS_OF_A_FEW,
    SAME,
    WARP,
    Types,
    Way,
    all_ways,
    every_pair,
    launch,
    run,
    steps_of,
)
from special_rows import INF, ROWS, is_nan_for_torch_too
from tolerances import assert_close_to_reference, assert_gradient_close, reference

from softmax_ext._C import Plan

TORCH_BACKWARD = {
    "softmax": torch.ops.aten._softmax_backward_data,
    "log_softmax": torch.ops.aten._log_softmax_backward_data,
}


def laid_out(rows: list[torch.Tensor], types: Types, way: Way) -> torch.Tensor:
    outer, dim, inner = way.shape(len(rows), types)
    x = torch.randn(outer * inner, dim)
    x[: len(rows)] = torch.stack(rows)
    return x.view(outer, inner, dim).movedim(2, 1)


@every_pair(all_ways(SAME, FEWER, long=FEWER_TYPES))
def test_special_rows(host: Host, types: Types, op: str, way: Way) -> None:
    """Each is right, and NaN where torch has NaN: what one row holds does not leak into others."""
    dim = way.dim(types)
    x = laid_out([make(torch.randn(dim)) for make in ROWS.values()], types, way)
    given = [x.to(types.load)]
    if types.direction == "backward":
        given = [torch.randn(x.shape).to(types.load), reference(op, x, 1).to(types.load)]
    orders = host.orders[-1:]
    result = launch(host, types, op, given, **way.how(types), orders=orders)
    way.check(result.plan, types)
    apart = [tensor.movedim(1, 2).flatten(0, 1) for tensor in (result.tensor, *given)]
    for row, name in enumerate(ROWS):
        actual, *of = (tensor[row] for tensor in apart)
        try:
            if types.direction == "forward":
                assert_close_to_reference(actual, op, of[0], 0, types.store)
                assert is_nan_for_torch_too(op, of[0], 0, actual)
            else:
                assert_gradient_close(actual, op, of[0], of[1], 0)
                assert torch.equal(actual.isnan(), TORCH_BACKWARD[op](*of, 0, of[0].dtype).isnan())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def shares(plan: Plan, types: Types, dim: int) -> Iterator[torch.Tensor]:
    """For each kind of share of a row, the number of that which an element belongs to: a lane's, a
    chunk, a warp's chunks, and those of a block; of a column a part, a thread's, a block's,
    and every other step."""
    element = torch.arange(dim)
    if plan.schedule == "columns" or plan.vectors == 0:
        part = element // steps_of(dim)
        yield part
        yield part % plan.team
        yield part // plan.team % plan.group
        yield element % 2
        return
    vector, chunk = element // types.width, element // types.chunk
    yield vector % WARP
    yield vector % plan.group
    if plan.schedule in ("packed", "warp"):
        return
    yield chunk
    warps = plan.group // WARP
    yield chunk % (plan.team * warps)
    yield chunk % (plan.team * warps) // warps
    yield chunk % WARP


@every_pair(all_ways(SAME, FEWER, long=FEWER_TYPES))
def test_shares_of_minus_infinity(host: Host, types: Types, op: str, way: Way) -> None:
    """A share that is -inf throughout has no maximum to subtract: (-inf) - (-inf). That of each
    kind, and all but those."""
    dim = way.dim(types)
    shape = way.shape(ROWS_OF_A_FEW, types)
    how = way.how(types)
    plan = host.plan(types.direction, shape, types.load, types.store, **how)
    masks = []
    for share in shares(plan, types, dim):
        last = int(share.max())
        for number in {0, last} if way.long else {0, min(1, last), last // 2, last}:
            masks += [share == number, share != number]
    masks = [mask for mask in masks if not mask.all() and mask.any()]
    distinct = list({mask.numpy().tobytes(): mask for mask in masks}.values())
    distinct += distinct[:ROWS_OF_A_FEW]  # as many as the rows that the way is for
    x = laid_out([torch.randn(dim).masked_fill(mask, -INF) for mask in distinct], types, way)
    orders = host.orders[-1:]
    ran = run(host, types, op, tuple(x.shape), x.to(types.load), **how, orders=orders)
    way.check(ran, types)
