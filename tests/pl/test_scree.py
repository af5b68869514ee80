from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ldvae_ext import get, pl
from ldvae_ext._stats import MEASURES
from ldvae_ext.pl._scree import _MEASURES
from tests.helpers import counts, untrained
from tests.pl.helpers import assert_legible


def test_bars_are_the_kl_of_the_factors_in_the_exported_order(exported):
    adata = exported()
    table = get.factors(adata)
    ax = pl.factor_scree(adata, show=False)
    assert [bar.get_height() for bar in ax.patches] == table["kl"].tolist()
    assert [label.get_text() for label in ax.get_xticklabels()] == table.index.tolist()
    assert table.index.tolist() != sorted(table.index)
    assert "nats" in ax.get_ylabel()


def test_the_line_is_the_share_of_the_kl_up_to_each_factor(exported):
    adata = exported()
    kl = get.factors(adata)["kl"].to_numpy()
    pl.factor_scree(adata, show=False)
    (line,) = plt.gcf().axes[1].lines
    np.testing.assert_allclose(line.get_ydata(), np.cumsum(kl) / kl.sum())
    assert line.get_ydata()[-1] == pytest.approx(1)


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_latent", [1, 2, 3, 10, 30, 60])
def test_all_labels_are_legible(exported, n_latent):
    assert_legible(pl.factor_scree(exported(n_latent), return_fig=True))


STORED = {
    "mutual_information": [0.5, 2.0, 1.0, 0.1, 0.3],
    "dimension_wise_kl": [0.1, 0.2, 0.3, 0.4, 0.5],
    "total_correlation": [0.0, 0.0, 0.0, 0.0, 0.0],
    "explained_deviance": [0.003, 0.001, 0.002, -0.001, 0.0],
    "ablation_zero": [3.0, -2.0, 1.0, 1.0, 0.5],
    "ablation_mean": [1.0, 2.0, np.nan, 4.0, 5.0],
    "ablation_permute": [np.nan] * 5,
}


def with_measures(adata):
    statistics = adata.uns["ldvae"]["statistics"]
    n_factors = len(statistics["kl"])
    for name, values in STORED.items():
        statistics[name] = np.resize(np.array(values), n_factors)
    return adata


def bars(ax) -> dict[int, float]:
    return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in ax.patches}


def ranks(ax) -> dict[int, str]:
    return {text.xy[0]: text.get_text() for text in ax.texts if text.get_text()}


def test_every_measure_of_the_ledger_has_a_name_and_a_unit():
    assert tuple(_MEASURES) == MEASURES


def test_bars_are_the_values_of_each_measure_in_the_exported_order(exported):
    adata = with_measures(exported())
    names = ["explained_deviance", "kl", "ablation_zero"]
    figure = pl.factor_scree(adata, measures=names, show=False)
    table = get.factors(adata)
    assert len(figure.axes) == 3
    for ax, name in zip(figure.axes, names, strict=True):
        assert bars(ax) == dict(enumerate(table[name]))
        assert ax.get_shared_x_axes().joined(ax, figure.axes[-1])
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == table.index.tolist()
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Explained deviance", "KL", "Ablation to zero"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["share of\ndeviance", "nats per cell", "nats per cell"]


def test_ranks_stand_above_the_bars_also_above_negative_ones(exported):
    adata = with_measures(exported())
    ax = pl.factor_scree(adata, measures="ablation_zero", show=False)
    assert ranks(ax) == {0: "1", 1: "5", 2: "2.5", 3: "2.5", 4: "4"}
    assert [text.xy[1] for text in ax.texts] == [3.0, 0.0, 1.0, 1.0, 0.5]
    ax.figure.draw_without_rendering()
    top = ax.get_window_extent().y1
    assert max(text.get_window_extent().y1 for text in ax.texts) <= top
    assert ax.get_ylim()[0] < -2


def test_one_measure_is_drawn_in_given_axes_and_several_are_not(exported):
    adata = with_measures(exported())
    ax = plt.figure().subplots()
    assert pl.factor_scree(adata, measures="mutual_information", ax=ax, show=False) is ax
    assert ranks(ax) == {0: "3", 1: "1", 2: "2", 3: "5", 4: "4"}
    assert ax.get_ylabel() == "nats"
    empty = plt.figure().subplots()
    with pytest.raises(ValueError, match="`ax` has room for one measure"):
        pl.factor_scree(adata, measures=["kl"], ax=empty)
    assert not empty.patches


def test_a_measure_that_is_not_known_says_so_and_others_are_drawn(exported):
    adata = with_measures(exported())
    figure = pl.factor_scree(adata, measures=["ablation_mean", "ablation_permute"], return_fig=True)
    some, none = figure.axes
    assert bars(some) == {0: 1.0, 1: 2.0, 3: 4.0, 4: 5.0}
    assert ranks(some) == {0: "4", 1: "3", 3: "2", 4: "1"}
    assert not none.patches
    assert [text.get_text() for text in none.texts] == ["not known: it needs counts"]
    assert_legible(figure)


def test_a_measure_that_is_0_throughout_has_a_scale_and_ties(exported):
    ax = pl.factor_scree(with_measures(exported()), measures="total_correlation", show=False)
    assert set(ranks(ax).values()) == {"3"}
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylim()[1] >= 1


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_latent", [1, 2, 5, 10, 30])
@pytest.mark.parametrize("measures", ["kl", ("kl", "explained_deviance"), MEASURES])
def test_all_labels_of_measures_are_legible(exported, n_latent, measures):
    assert_legible(pl.factor_scree(with_measures(exported(n_latent)), measures=measures, return_fig=True))


@pytest.mark.grid(0)
@pytest.mark.parametrize("n_latent", [2, 10, 30])
def test_long_names_are_legible_below_measures(exported, n_latent):
    adata = with_measures(exported(n_latent))
    adata.uns["ldvae"]["names"] = np.array([f"interferon response of some cells, part {k}" for k in range(n_latent)])
    assert_legible(pl.factor_scree(adata, measures=["kl", "active_unit"], return_fig=True))


def test_what_an_export_stores_can_be_drawn():
    model = untrained(counts(n_genes=30), n_latent=3)
    model.export_to_anndata(stats=True)
    figure = pl.factor_scree(model.adata, measures=MEASURES, return_fig=True)
    stats = model.get_factor_stats().table().loc[get.factors(model.adata).index]
    for ax, name in zip(figure.axes, MEASURES, strict=True):
        np.testing.assert_allclose(list(bars(ax).values()), stats[name])


def test_a_measure_that_is_not_stored_says_how_to_store_it(exported):
    with pytest.raises(
        ValueError, match=r"'ldvae' has 'kl', 'active_unit', but not 'ablation_zero'.*export_to_anndata\(stats=True\)"
    ):
        pl.factor_scree(exported(), measures=["kl", "ablation_zero"])
    assert not plt.get_fignums()


@pytest.mark.parametrize("wrong", ["dimension", "sign", "Kl", ["kl", "entropy"]])
def test_measures_must_be_known(exported, wrong):
    with pytest.raises(ValueError, match="`measures` must be one of 'kl', 'mutual_information'"):
        pl.factor_scree(with_measures(exported()), measures=wrong)
    with pytest.raises(ValueError, match="`measures` must name at least one"):
        pl.factor_scree(with_measures(exported()), measures=[])
    assert not plt.get_fignums()
