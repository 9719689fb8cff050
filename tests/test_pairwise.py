"""all_pairs: every pair of values of the full table is in the smaller one."""

import itertools
from collections.abc import Hashable

import pytest
from pairwise import all_pairs

Cases = list[tuple[Hashable, ...]]
PRODUCT: Cases = list(itertools.product("abcdef", range(5), (None, 1.5), ("x", "y", "z")))
TABLES = {
    "a product": PRODUCT,
    "a product with gaps": [case for case in PRODUCT if case[0] != "a" or case[3] == "x"],
    "two parameters": list(itertools.product("abc", "xyz")),
    "one parameter beside one value": [(letter, 0) for letter in "abc"],
    "the same value in two places": list(itertools.product("ab", "ab", "ab")),
    "one case": [("a", "b")],
    "none": [],
}


def pairs(cases: Cases) -> set[tuple[tuple[int, Hashable], ...]]:
    return {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}


@pytest.mark.parametrize("table", TABLES)
def test_every_pair_is_there(table: str) -> None:
    cases = TABLES[table]
    chosen = all_pairs(cases)
    assert pairs(chosen) == pairs(cases)
    assert chosen == [case for case in cases if case in chosen], "in the table's order"
    assert chosen == all_pairs(cases)


def test_it_is_not_much_more_than_the_two_longest_parameters_have() -> None:
    assert 6 * 5 <= len(all_pairs(PRODUCT)) <= 6 * 5 + 3


def test_what_it_begins_with_is_there_and_counts() -> None:
    begin = all_pairs([case for case in PRODUCT if case[2] is None])
    chosen = all_pairs(PRODUCT, begin)
    assert set(begin) <= set(chosen)
    assert pairs(chosen) == pairs(PRODUCT)
    assert len(chosen) < len(begin) + len(all_pairs(PRODUCT))
