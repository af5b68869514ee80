"""The level of a batch, label or covariate that a value names."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from ldvae_ext._validate import listed


def match_levels(name: str, values: Sequence[Any], levels: Sequence[Any]) -> np.ndarray:
    """Positions of values among levels: the same value, else the same string, else the same whole number.

    A level ``"1"`` has the value 1 in a table that was written without quotes, and 1.0 where a value was missing once. True
    is not 1.

    Parameters
    ----------
    name
        Name in messages.
    values
        Distinct values.
    levels
        Distinct levels.

    Returns
    -------
    Shape (values,), int64; -1 for a value that is no level.

    Raises
    ------
    ValueError
        If two values would be one level.
    """
    position = np.full(len(values), -1)
    for form in (_typed, str, level_text):
        candidates = _positions([form(level) for level in levels])
        for i, value in enumerate(values):
            if position[i] < 0:
                found = candidates.get(form(value), [])
                position[i] = found[0] if len(found) == 1 else -1
    used, counts = np.unique(position, return_counts=True)
    twice = (counts > 1) & (used >= 0)
    if twice.any():
        at = int(used[twice][0])
        same = [values[i] for i in np.flatnonzero(position == at).tolist()]
        msg = f"`{name}`: {listed(same)} would all be the level {levels[at]!r}; give each level one name."
        raise ValueError(msg)
    return position


def _positions(names: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    out: dict[Hashable, list[int]] = {}
    for i, name in enumerate(names):
        out.setdefault(name, []).append(i)
    return out


def _typed(value: Any) -> Hashable:
    """The value, such that True is not 1."""
    value = value.item() if isinstance(value, np.generic) else value
    return (isinstance(value, bool), value)


def level_text(value: Any) -> str:
    """Text of a level; of a whole number without decimals.

    Parameters
    ----------
    value
        The level.
    """
    value = value.item() if isinstance(value, np.generic) else value
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
