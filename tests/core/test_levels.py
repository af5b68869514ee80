"""The level that a value names."""

from __future__ import annotations

import numpy as np
import pytest

from ldvae_ext.core.levels import match_levels


@pytest.mark.parametrize(
    ("values", "levels", "expected"),
    [
        (["a", "c", "x"], ["c", "a"], [1, 0, -1]),
        ([2, 1], ["1", "2"], [1, 0]),
        (["2", "1"], [1, 2], [1, 0]),
        ([1.0, 2.0], [1, 2], [0, 1]),
        ([1.0, 2.0], ["1", "2"], [0, 1]),
        ([np.float32(2), np.int8(1)], ["1", "2"], [1, 0]),
        ([1.5], ["1.5"], [0]),
        ([True, False], ["True", "False"], [0, 1]),
        (["False"], [True, False], [1]),
        ([True, False], [1, 0], [-1, -1]),
        ([1, 0], [True, False], [-1, -1]),
        (["1.0"], ["1.0", "1"], [0]),
        ([1.0], ["1.0", "1"], [0]),
        ([np.nan, None], ["a"], [-1, -1]),
        ([np.inf], ["inf"], [0]),
        ([], ["a"], []),
    ],
)
def test_the_same_value_then_the_same_string_then_the_same_whole_number(values, levels, expected):
    assert match_levels("batch", values, levels).tolist() == expected


@pytest.mark.parametrize(("values", "levels"), [(["1", 1], ["1", "2"]), ([1.0, "1"], [1, 2]), (["1.0", "1"], [1.0, 3])])
def test_two_values_never_become_one_level(values, levels):
    with pytest.raises(ValueError, match=r"`batch`: .* would all be the level '?1(.0)?'?;"):
        match_levels("batch", values, levels)
