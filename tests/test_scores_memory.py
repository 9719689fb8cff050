"""What a call allocates: its result, and no more than a few floats a row beside it.

A row is long enough for a second tensor of the input's size to show.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scores_arguments import arguments
from scores_reference import OURS
from test_scores_values import ALONE, MODELS

SHAPE = (4, 3, 64, 200)
FLOATS_OF_ROWS = 4 * 4 * 3 * 64  # bytes of one for each row


def allocated(function: Callable[[], Any]) -> int:
    """Bytes, freed or not."""
    function()  # what is made once in a process
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


def every_case(*ops: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for names, values in {
            "dtype": [torch.float32, torch.bfloat16],
            "kinds": [*MODELS, *ALONE],
            "op": ops,
        }.items():
            test = pytest.mark.parametrize(names, values, ids=str)(test)
        return test

    return decorate


@every_case(*OURS)
def test_forward(op: str, kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    """The result, and for each row the lse and what is there of scale, temperature and sink, of
    which a temperature has its inverse in float64."""
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    scores = arguments(kinds, SHAPE, dtype)
    result = OURS[op](x, -1, **scores)
    found = allocated(lambda: OURS[op](x, -1, **scores))
    assert result.nbytes <= found <= result.nbytes + 8 * FLOATS_OF_ROWS + 4096


@every_case(*OURS)
def test_backward(op: str, kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    """The input's gradient; those of the arguments, and the float32 that they are summed in; and
    for each row what is above."""
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    scores = arguments(kinds, SHAPE, dtype)
    leaves = [x, *(each for each in scores.values() if getattr(each, "requires_grad", False))]
    y = OURS[op](x, -1, **scores)
    grad = torch.randn_like(y)
    found = allocated(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True))
    of_arguments = sum(2 * 4 * each.numel() for each in leaves[1:])
    assert x.nbytes <= found <= x.nbytes + of_arguments + 12 * FLOATS_OF_ROWS + 4096
