from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ldvae_ext import pl
from tests.pl.helpers import assert_legible


def history(n_epochs=100, *, validation=True, first=5000.0):
    """What scvi-tools logs: tables of one column, of numbers or, as it happens, objects."""
    epoch = np.arange(n_epochs)
    decay = 1 / (1 + epoch)
    tables = {"kl_weight": pd.DataFrame({"kl_weight": epoch / n_epochs})}
    for i, cells in enumerate(("train", "validation")[: 1 + validation]):
        reconstruction, kl = 700 + 10 * i + first * decay**2 + 100 * decay, 15 + i + 20 * decay
        for name, values in (("elbo", reconstruction + kl), ("reconstruction_loss", reconstruction), ("kl_local", kl)):
            column = f"{name}_{cells}"
            tables[column] = pd.DataFrame({column: values}, index=pd.Index(epoch, name="epoch"), dtype=object)
    return tables


def test_each_metric_has_a_panel_with_training_and_validation(shown):
    given = history()
    figure = pl.training_curves(given, show=False)
    names = ("elbo", "reconstruction_loss", "kl_local")
    assert len(figure.axes) == 3
    for ax, name in zip(figure.axes, names, strict=True):
        drawn = {line.get_label(): line for line in ax.lines}
        assert set(drawn) == {"train", "validation"}
        for cells, line in drawn.items():
            table = given[f"{name}_{cells}"]
            np.testing.assert_array_equal(line.get_xdata(), table.index)
            np.testing.assert_array_equal(line.get_ydata(), table.to_numpy(dtype=float).ravel())


def test_the_elbo_is_labelled_as_the_negative_one(shown):
    figure = pl.training_curves(history(), show=False)
    assert figure.axes[0].get_title() == "Negative ELBO\n(lower is better)"
    assert figure.axes[0].get_ylabel() == "nats per cell"


def test_validation_may_be_missing():
    figure = pl.training_curves(history(validation=False), show=False)
    assert [len(ax.lines) for ax in figure.axes] == [1, 1, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train"]


def test_validation_may_be_checked_in_some_epochs_only():
    given = history()
    sparse = {name: table.iloc[9::10] if name.endswith("validation") else table for name, table in given.items()}
    lines = pl.training_curves(sparse, show=False).axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [100, 10]


def test_a_metric_that_was_not_logged_has_no_panel():
    given = {name: table for name, table in history().items() if not name.startswith("kl_local")}
    assert len(pl.training_curves(given, show=False).axes) == 2


@pytest.mark.parametrize("first", [1e3, 1e5, 1e8, -1e5])
def test_early_epochs_leave_the_axis_and_are_noted_if_they_flatten_the_rest(first):
    figure = pl.training_curves(history(first=first), show=False)
    ax = figure.axes[1]
    later = np.concatenate([line.get_ydata()[34:] for line in ax.lines])
    low, high = ax.get_ylim()
    assert low <= later.min()
    assert high >= later.max()
    assert np.ptp(later) >= 0.4 * (high - low)
    far = max((value for line in ax.lines for value in line.get_ydata()), key=abs)
    assert [text.get_text() for text in ax.texts] == [f"early epochs: {'up' if first > 0 else 'down'} to {far:,.0f}"]
    assert_legible(figure)


def test_all_epochs_stay_on_the_axis_where_they_fit():
    given = {"elbo_train": pd.DataFrame({"elbo_train": np.linspace(900.0, 700.0, 50)})}
    ax = pl.training_curves(given, show=False).axes[0]
    low, high = ax.get_ylim()
    assert low < 700 < 900 < high
    assert not ax.texts


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [np.nan, np.nan], [9.0, np.nan, 8.0, np.inf], [np.nan]])
def test_short_and_broken_trainings_can_be_drawn(values):
    figure = pl.training_curves({"elbo_train": pd.DataFrame({"elbo_train": values})}, show=False)
    assert len(figure.axes[0].lines) == 1
    assert_legible(figure)


def test_a_single_epoch_is_seen():
    figure = pl.training_curves(history(1), show=False)
    assert all(line.get_marker() == "o" for line in figure.axes[0].lines)


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_epochs", [1, 2, 20, 400])
@pytest.mark.parametrize("validation", [True, False])
def test_no_label_overlaps_another_or_is_cut_off(n_epochs, validation):
    assert_legible(pl.training_curves(history(n_epochs, validation=validation), return_fig=True))


@pytest.mark.parametrize("wrong", [None, [1, 2]])
def test_an_untrained_model_has_no_history(wrong):
    with pytest.raises(TypeError, match=r"`history` must be `model.history` of a trained model"):
        pl.training_curves(wrong)
    assert not plt.get_fignums()


def test_another_history_is_named_before_anything_is_drawn():
    with pytest.raises(KeyError, match=r"`history` must have one of 'elbo_train'.*; it has 'loss'"):
        pl.training_curves({"loss": pd.DataFrame({"loss": [1.0]})})
    assert not plt.get_fignums()
