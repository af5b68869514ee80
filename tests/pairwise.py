"""Samples of tests: parameters in which all pairs of values occur, and fewer examples of properties."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

from hypothesis import settings

# True with `--grid`; set before the tests are imported.
is_full = False


def examples(number: int) -> settings:
    """Settings of a property with a number of examples under `--grid`, and a quarter of them, at least 5, otherwise."""
    return settings(max_examples=number if is_full else max(5, number // 4), deadline=None)


def covering(cases: Sequence[Mapping[Hashable, Hashable]], strength: int = 2) -> set[int]:
    """Positions of a part of the cases that has each pair of values of two parameters that occurs in any case.

    Greedy: the case with the most new pairs is next, the first of them if several have as many. With ``strength`` 1 each
    value occurs, not each pair; with 0 the first case is kept.
    """
    pairs = [
        set(combinations(sorted(case.items(), key=lambda item: item[0]), strength)) or set(case.items())
        for case in cases
    ]
    missing, kept = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda at: (len(pairs[at] & missing), -at))
        kept.add(best)
        missing -= pairs[best]
    return kept
