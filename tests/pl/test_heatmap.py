from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ldvae_ext.pl._figure import em
from ldvae_ext.pl._heatmap import heatmap, top_rows


def test_the_rows_with_the_largest_absolute_values_are_chosen():
    values = np.random.default_rng(0).normal(size=(50, 4))
    chosen = top_rows(values, 7)
    peaks = np.abs(values).max(axis=1)
    assert set(chosen) == set(np.argsort(peaks)[-7:])


def test_positive_peaks_come_first_then_columns_then_size():
    values = np.array([[0.0, -3.0], [2.0, 0.0], [0.0, 5.0], [-4.0, 0.0], [3.0, 1.0], [-1.0, 0.5], [0.5, 6.0]])
    assert top_rows(values, 10).tolist() == [4, 1, 6, 2, 5, 3, 0]


def test_one_column_descends():
    values = np.random.default_rng(1).normal(size=(20, 1))
    assert (np.diff(values[top_rows(values, 20), 0]) < 0).all()


def test_nan_is_no_peak():
    values = np.array([[np.nan, 1.0], [np.nan, np.nan], [3.0, np.nan]])
    assert top_rows(values, 2).tolist() == [2, 0]


def test_a_value_that_is_not_known_has_neither_number_nor_sign():
    few = heatmap(np.array([[np.nan, -1.0]]), ["a"], ["x", "y"], label="")
    assert [text.get_text() for text in few.texts] == ["\N{MINUS SIGN}1.00"]
    values = np.full((60, 60), 0.5)
    values[0, :2] = np.nan, -1.0
    many = heatmap(values, list(map(str, range(60))), list(map(str, range(60))), label="")
    assert [(text.get_text(), text.get_position()) for text in many.texts] == [("\N{MINUS SIGN}", (1, 0))]


def test_faint_values_have_no_sign_and_given_colours_are_shown_to_their_ends():
    values = np.full((60, 60), -0.05)
    values[3, 4] = -0.2
    names = list(map(str, range(60)))
    ax = heatmap(values, names, names, label="", largest=1.0, faint=0.1)
    assert [text.get_position() for text in ax.texts] == [(4, 3)]
    image = ax.images[0]
    assert (image.norm.vmin, image.norm.vmax) == (-1, 1)
    assert ax.figure.axes[1].get_ylim() == (-1, 1)


def test_cells_that_are_smaller_than_a_minus_sign_have_none():
    names = list(map(str, range(60)))
    _, ax = plt.subplots(figsize=(2, 2))
    assert not heatmap(np.full((60, 60), -1.0), names, names, label="", ax=ax).texts


@pytest.mark.parametrize("n_rows", [3, 60])
def test_the_colour_bar_is_as_wide_in_a_high_figure_as_in_a_low_one(n_rows):
    rows = list(map(str, range(n_rows)))
    figure = heatmap(np.arange(2.0 * n_rows).reshape(n_rows, 2), rows, ["x", "y"], label="").figure
    figure.draw_without_rendering()
    assert figure.axes[1].get_window_extent().width / figure.dpi / em() == pytest.approx(1, abs=0.4)
