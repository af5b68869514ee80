"""Samples of grids of parameters in which all pairs of values occur."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def covering_all_pairs(cases: Sequence[Mapping[Hashable, Hashable]]) -> set[int]:
    """Positions of a part of the cases that has each pair of values of two parameters that occurs in any case.

    Greedy: the case with the most new pairs is next, the first of them if several have as many.
    """
    pairs = [
        set(combinations(sorted(case.items(), key=lambda item: item[0]), 2)) or set(case.items()) for case in cases
    ]
    missing, kept = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda at: (len(pairs[at] & missing), -at))
        kept.add(best)
        missing -= pairs[best]
    return kept
