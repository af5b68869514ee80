"""What a row of the table is, and which there are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from suite.lab import Lab


class Unavailable(Exception):
    """A row cannot be measured here, for the reason that the message gives."""


@dataclass(frozen=True)
class Row:
    """One line of the table, and what its ratio has to reach."""

    name: str
    title: str
    target: float | None = None
    """Of the ratio, stock over ours, or ours over stock where it is an upper bound. None: the row is a report."""
    is_upper_bound: bool = False
    against: str = "LinearSCVI"
    """What stands on the left of the table."""
    clock: Literal["cpu", "wall"] = "cpu"
    """Which ratio is compared with the target, where both were measured."""
    in_short: bool = False
    """Whether `--short` has it: quick, and steady on a machine that others use too."""

    def reached(self, ratio: float, share: float = 1.0) -> bool | None:
        """Whether the ratio is at least this share of the target; None for a report."""
        if self.target is None:
            return None
        return ratio * share <= self.target if self.is_upper_bound else ratio >= share * self.target


@dataclass(frozen=True)
class Measured:
    """What a row found: medians over rounds."""

    stock: float | None
    ours: float
    unit: str
    ratio: float
    """The one that is compared with the target."""
    low: float | None = None
    high: float | None = None
    """Smallest and largest ratio of a round."""
    cpu_ratio: float | None = None
    wall_ratio: float | None = None
    n: int = 1
    """Rounds, or whatever the medians are over."""
    note: str = ""
    more: dict[str, object] = field(default_factory=dict)
    """Numbers for the JSON file alone."""


Found = dict[str, Measured | Unavailable]


@dataclass(frozen=True)
class Case:
    """Rows that are measured together, since they share a contestant."""

    rows: tuple[Row, ...]
    measure: Callable[[Lab, tuple[Row, ...]], Found]
    """From the lab and the rows that are asked for to what each row found, by name."""


CASES: list[Case] = []


def case(*rows: Row) -> Callable[[Callable[..., Found]], Callable[..., Found]]:
    """Register a function that measures these rows."""

    def register(measure: Callable[..., Found]) -> Callable[..., Found]:
        CASES.append(Case(rows, measure))
        return measure

    return register


def chosen(only: str | None, *, short: bool) -> list[Case]:
    """The cases with the rows that are asked for."""
    out = []
    for one in CASES:
        rows = tuple(
            row
            for row in one.rows
            if (only is None or re.search(only, row.name)) and (row.in_short or not short or only is not None)
        )
        if rows:
            out.append(Case(rows, one.measure))
    return out
