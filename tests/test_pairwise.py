from __future__ import annotations

from itertools import combinations, product

from tests.pairwise import covering


def pairs_of(cases):
    return {pair for case in cases for pair in combinations(sorted(case.items()), 2)}


def test_all_pairs_that_occur_are_kept_in_fewer_cases():
    grid = [dict(zip("abcd", values, strict=True)) for values in product(range(2), range(3), range(4), range(2))]
    possible = [case for case in grid if (case["a"], case["b"]) != (1, 2)]
    kept = covering(possible)
    assert pairs_of(possible[at] for at in kept) == pairs_of(possible)
    assert 12 <= len(kept) <= 15 < len(possible)


def test_all_values_of_a_single_parameter_are_kept():
    assert covering([{"a": 0}, {"a": 1}, {"a": 2}]) == {0, 1, 2}
