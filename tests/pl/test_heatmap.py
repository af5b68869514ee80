from __future__ import annotations

import numpy as np

from ldvae_ext.pl._heatmap import top_rows


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
