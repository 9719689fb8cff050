"""Of a table of cases, enough to have every two parameter values together that it has together.

Most faults take one value, or two together, to show (Kuhn, Wallace and Gallo, "Software fault
interactions and implications for software testing", 2004); planted_faults.py asks it of the tests.
"""

import functools
import heapq
import operator
import random
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import TypeVar

Case = TypeVar("Case", bound=tuple[Hashable, ...])


def all_pairs(cases: Sequence[Case], begin: Sequence[Case] = ()) -> list[Case]:
    """Some of the cases, in their order: those to begin with, then greedily one with the most new
    pairs.

    A case is a tuple of one value for each parameter. What cannot be together is in no case. Of
    equals one is drawn, so that no value is in most cases: the same one in every process.
    """
    pairs = masks_of_pairs(cases)
    chosen = [cases.index(case) for case in begin]
    left = functools.reduce(operator.or_, pairs, 0)
    for index in chosen:
        left &= ~pairs[index]
    # By what each had when it was last looked at, which can only have become less.
    draw = random.Random(0).random
    heap = [(-of_case.bit_count(), draw(), index) for index, of_case in enumerate(pairs)]
    heapq.heapify(heap)
    while left:
        _, drawn, index = heap[0]
        pairs[index] &= left
        now = (-pairs[index].bit_count(), drawn, index)
        if now > heap[0]:
            heapq.heapreplace(heap, now)
            continue
        heapq.heappop(heap)
        left &= ~pairs[index]
        chosen.append(index)
    return [cases[index] for index in sorted(chosen)]


def masks_of_pairs(cases: Sequence[Case]) -> list[int]:
    """Of each case the pairs that it has, a bit each."""
    masks = [0] * len(cases)
    parameters = []
    for values in zip(*cases, strict=True):
        numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
        parameters.append([numbers[value] for value in values])
    bits = 0
    for one, other in combinations(parameters, 2):
        found: dict[tuple[int, int], int] = {}
        for index, pair in enumerate(zip(one, other, strict=True)):
            masks[index] |= 1 << found.setdefault(pair, bits + len(found))
        bits += len(found)
    return masks
