"""What a decoder conditions on besides the latent."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldvae_ext.core import Covariate
from ldvae_ext.core._design import covariates_from_arrays, covariates_to_arrays, design_matrix
from tests.pairwise import examples

AGE, LANE, SITE = Covariate("age"), Covariate("lane", ["L/1", "L/2", "L 3"]), Covariate("site", ["only/one"])
ALL = (AGE, LANE, SITE)


def test_columns_are_values_and_levels_side_by_side():
    values = {"site": ["only/one"] * 3, "lane": ["L 3", "L/1", "L/1"], "age": [0.5, -2, 7]}
    expected = [[0.5, 0, 0, 1, 1], [-2, 1, 0, 0, 1], [7, 1, 0, 0, 1]]
    np.testing.assert_array_equal(design_matrix(ALL, values, 3), expected)
    assert [covariate.n_columns for covariate in ALL] == [1, 3, 1]


@pytest.mark.parametrize(
    "lane",
    [
        ["L 3", "L/1", "L/1"],
        np.array(["L 3", "L/1", "L/1"], dtype=object),
        [2, 0, 0],
        np.array([2, 0, 0], dtype=np.int8),
        pd.Categorical(["L 3", "L/1", "L/1"]),
        pd.Series(["L 3", "L/1", "L/1"], index=list("cba"), dtype="category"),
        pd.array(["L 3", "L/1", "L/1"], dtype="string"),
    ],
)
@pytest.mark.parametrize("site", [None, "only/one", 0, ["only/one"] * 3])
def test_levels_go_by_name_or_code_and_one_that_is_alone_needs_no_name(lane, site):
    got = design_matrix(ALL, {"age": 1, "lane": lane, "site": site}, 3)
    np.testing.assert_array_equal(got, [[1, 0, 0, 1, 1], [1, 1, 0, 0, 1], [1, 1, 0, 0, 1]])


@pytest.mark.parametrize("age", [1, 1.0, np.float32(1), "1", [1, 1], np.ones((2, 1)), pd.Series([1, 1]), [True, True]])
def test_numbers_are_one_for_all_or_one_for_each(age):
    np.testing.assert_array_equal(design_matrix([AGE], {"age": age}, 2), [[1], [1]])


def test_frames_are_read_by_column_in_any_order():
    frame = pd.DataFrame({"site": "only/one", "age": [1.0, 2.0], "lane": ["L/2", "L/1"]}, index=["y", "x"])
    expected = [[1, 0, 1, 0, 1], [2, 1, 0, 0, 1]]
    for given_frame in (frame, frame[["lane", "site", "age"]], frame.astype({"lane": "category"})):
        np.testing.assert_array_equal(design_matrix(ALL, given_frame, 2), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "`covariates` must hold 'age', 'lane', 'site': missing 'age', 'lane', 'site', unknown none"),
        ({"age": 1, "lane": 0}, "missing 'site', unknown none"),
        ({"age": 1, "lane": 0, "site": 0, "Age": 2}, "missing none, unknown 'Age'"),
        ({"Age": 1, "lane": 0, "site": 0}, "missing 'age', unknown 'Age'"),
        (
            {"age": np.nan, "lane": 0, "site": 0},
            "`covariates`: 'age' must be one finite number or one for each of 4 cells",
        ),
        ({"age": [1, 2], "lane": 0, "site": 0}, "'age' must be one finite number or one for each of 4"),
        ({"age": 1, "lane": "L9", "site": 0}, "`lane`: 'L9' is no level of 'lane' .*'L/1', 'L/2', 'L 3' or 0 to 2"),
        ({"age": 1, "lane": 3, "site": 0}, "`lane`: 3 is no level of 'lane'"),
        ({"age": 1, "lane": -1, "site": 0}, "`lane`: -1 is no level of 'lane'"),
        ({"age": 1, "lane": None, "site": 0}, "`lane` is needed, since this decoder has several; allowed are 'L/1'"),
        (
            {"age": 1, "lane": ["L/1", "L/2"], "site": 0},
            "`lane` must be one level of 'lane' or one for each of 4 cells",
        ),
        ({"age": 1, "lane": 0, "site": "elsewhere"}, "`site`: 'elsewhere' is no level of 'site'"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        design_matrix(ALL, values, 4)


def test_integers_that_may_be_names_are_refused():
    numbered = Covariate("lane", [1, 2, 3])
    with pytest.raises(ValueError, match="`lane`: 1 may be a code or a name, since its levels are named '1', '2', '3'"):
        design_matrix([numbered], {"lane": 1}, 2)
    for named in (["3", "1"], pd.Categorical([3, 1])):
        np.testing.assert_array_equal(design_matrix([numbered], {"lane": named}, 2), [[0, 0, 1], [1, 0, 0]])
    # Where names are codes, both say the same.
    np.testing.assert_array_equal(
        design_matrix([Covariate("lane", [0, 1])], {"lane": [1, 0]}, 2),
        design_matrix([Covariate("lane", [0, 1])], {"lane": ["1", "0"]}, 2),
    )


def test_levels_are_unique():
    with pytest.raises(ValueError, match="`lane` must be unique; 'a' occurs more than once"):
        Covariate("lane", ["a", "b", "a"])


def test_no_covariates_have_no_columns():
    assert design_matrix((), None, 3).shape == (3, 0)
    assert covariates_to_arrays(()) == {}
    assert covariates_from_arrays({}) == ()
    with pytest.raises(ValueError, match="`covariates` must hold nothing: missing none, unknown 'age'"):
        design_matrix((), {"age": 1}, 3)


@st.composite
def covariate_lists(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=4).filter(lambda s: "\0" not in s), unique=True, max_size=4))
    level = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=4)
    levels = st.one_of(st.none(), st.lists(level, min_size=1, max_size=4, unique=True))
    return tuple(Covariate(name, draw(levels)) for name in names)


@given(covariate_lists())
@examples(50)
def test_arrays_bring_covariates_back(covariates):
    arrays = covariates_to_arrays(covariates)
    assert all(array.dtype != object for array in arrays.values())
    back = covariates_from_arrays(arrays)
    assert [c.name for c in back] == [c.name for c in covariates]
    for got, want in zip(back, covariates):
        assert (got.levels is None) == (want.levels is None)
        assert got.levels is None or got.levels.tolist() == want.levels.tolist()


@given(st.integers(0, 10_000), st.integers(1, 6))
@examples(50)
def test_names_and_codes_say_the_same(seed, n_cells):
    rng = np.random.default_rng(seed)
    codes, age = rng.integers(0, 3, n_cells), rng.normal(size=n_cells)
    by_code = design_matrix(ALL, {"age": age, "lane": codes, "site": 0}, n_cells)
    by_name = design_matrix(ALL, {"age": age, "lane": LANE.levels[codes], "site": "only/one"}, n_cells)
    np.testing.assert_array_equal(by_code, by_name)
    np.testing.assert_array_equal(by_code[:, 1:4].argmax(axis=1), codes)
    np.testing.assert_array_equal(by_code[:, 1:].sum(axis=1), 2)


def test_a_table_may_hold_more_and_a_mapping_may_not():
    values = {"age": [1.0, 2.0], "cell_type": ["B", "T"]}
    np.testing.assert_array_equal(design_matrix([Covariate("age")], pd.DataFrame(values), 2), [[1.0], [2.0]])
    with pytest.raises(ValueError, match="unknown 'cell_type'"):
        design_matrix([Covariate("age")], values, 2)


@pytest.mark.parametrize(
    ("value", "got"), [("old", "'old'"), ([1.0, 2.0, 3.0], "3 values"), ([1.0, np.nan], "not all finite")]
)
def test_a_number_that_is_none_is_shown(value, got):
    with pytest.raises(ValueError, match=f"'age' must be one finite number or one for each of 2 cells; got .*{got}"):
        design_matrix([Covariate("age")], {"age": value}, 2)
