from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ldvae_ext import get, pl, tl
from tests.pl.helpers import assert_legible, drawn_texts, panel_inches

REG = "CD4+/CD45RA+/CD25- Naive T"


@pytest.fixture
def ranked(exported):
    """Makes an export with a ranking of its factors, of as many groups as wanted."""

    def make(n_latent=5, n_groups=4, *, key_added="rank_factors_groups", **kwargs):
        adata = exported(n_latent, n_cells=max(60, 4 * n_groups))
        names = [*adata.obs["population"].cat.categories, *(f"{REG}, subset {i}" for i in range(n_groups))][:n_groups]
        adata.obs["population"] = pd.Categorical.from_codes(
            (np.arange(adata.n_obs) % n_groups).tolist(), categories=pd.Index(names)
        )
        tl.rank_factors_groups(adata, "population", key_added=key_added, **kwargs)
        return adata

    return make


def dots(ax):
    """Values and sizes of the dots, groups x factors, wherever they are in the collection."""
    (points,) = ax.collections
    rows, columns = len(ax.get_yticklabels()), len(ax.get_xticklabels())
    value, size = np.full((rows, columns), np.nan), np.full((rows, columns), np.nan)
    x, y = np.asarray(points.get_offsets(), dtype=int).T
    value[y, x], size[y, x] = points.get_array(), points.get_sizes()
    return value, size


def wide(adata, column):
    """Groups x factors in the exported order."""
    table = get.rank_factors_groups_df(adata)
    pivot = table.pivot_table(index="group", columns="factor", values=column)
    return pivot.loc[table["group"].unique(), adata.uns["ldvae"]["names"]]


def test_rows_are_groups_and_columns_factors_in_the_exported_order(ranked):
    adata = ranked()
    ax = pl.factor_groups(adata, show=False)
    assert [label.get_text() for label in ax.get_xticklabels()] == adata.uns["ldvae"]["names"].tolist()
    assert [label.get_text() for label in ax.get_yticklabels()] == adata.obs["population"].cat.categories.tolist()
    assert ax.get_ylabel() == "population"
    top, bottom = ax.get_ylim()[1], ax.get_ylim()[0]
    assert top < 0 < 3 < bottom


def test_colours_are_differences_of_means_and_areas_the_distance_of_the_auroc_from_a_half(ranked):
    adata = ranked()
    ax = pl.factor_groups(adata, show=False)
    value, size = dots(ax)
    np.testing.assert_allclose(value, wide(adata, "mean_difference"))
    distance = np.abs(2 * wide(adata, "auroc").to_numpy() - 1)
    np.testing.assert_allclose(size / size.max(), distance / distance.max())


def test_factors_are_drawn_in_the_order_asked_for(ranked):
    adata = ranked()
    first, fourth = adata.uns["ldvae"]["names"][[0, 3]]
    ax = pl.factor_groups(adata, factors=[fourth, first], show=False)
    assert [label.get_text() for label in ax.get_xticklabels()] == [fourth, first]
    np.testing.assert_allclose(dots(ax)[0], wide(adata, "mean_difference")[[fourth, first]])


def test_opposite_differences_have_equally_strong_colours(ranked):
    figure = pl.factor_groups(ranked(), return_fig=True)
    (points,) = figure.axes[0].collections
    low, high = figure.axes[1].get_ylim()
    assert low == -high
    assert high >= np.abs(points.get_array()).max()
    up, down, nothing = points.cmap(points.norm([high, low, 0.0]))[:, :3]
    assert up.sum() == pytest.approx(down.sum(), abs=0.15)
    assert up[0] > up[2]
    assert down[2] > down[0]
    assert (nothing > 0.95).all()


def test_the_legend_shows_the_size_of_some_aurocs(ranked):
    adata = ranked()
    adata.uns["rank_factors_groups"]["auroc"]["B"][:] = 0
    figure = pl.factor_groups(adata, return_fig=True)
    full = figure.axes[0].collections[0].get_sizes().max()
    legend = figure.axes[1].get_legend()
    assert legend.get_title().get_text() == "AUROC"
    for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
        high, low = map(float, text.get_text().split(" or "))
        assert high == pytest.approx(1 - low)
        assert handle.get_markersize() ** 2 == pytest.approx(full * abs(2 * high - 1))


def test_what_groups_are_compared_with_is_said(ranked):
    figure = pl.factor_groups(ranked(), return_fig=True)
    assert "rest" in figure.axes[1].get_ylabel()
    assert figure.axes[0].get_title() == ""
    figure = pl.factor_groups(ranked(reference=REG), return_fig=True)
    assert "reference" in figure.axes[1].get_ylabel()
    assert REG in figure.axes[0].get_title()
    assert REG not in [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert_legible(figure)


def test_a_long_reference_is_not_cut_off(ranked):
    adata = ranked(1)
    adata.obs["population"] = adata.obs["population"].cat.rename_categories({"B": f"{REG}/" * 3})
    tl.rank_factors_groups(adata, "population", reference=f"{REG}/" * 3)
    assert_legible(pl.factor_groups(adata, return_fig=True))


def test_a_regression_can_be_drawn(ranked):
    adata = ranked(method="logreg")
    np.testing.assert_allclose(dots(pl.factor_groups(adata, show=False))[0], wide(adata, "mean_difference"))


def test_another_ranking_is_read(ranked):
    assert pl.factor_groups(ranked(key_added="other"), key="other", return_fig=True).axes


def test_a_ranking_without_differences_can_be_drawn(ranked):
    adata = ranked()
    adata.obsm["X_ldvae"][:] = 0
    tl.rank_factors_groups(adata, "population")
    figure = pl.factor_groups(adata, return_fig=True)
    assert not figure.axes[0].collections[0].get_sizes().any()
    assert figure.axes[1].get_ylim() == (-1, 1)
    assert_legible(figure)


SIZES = [(1, 2), (1, 30), (3, 4), (10, 2), (10, 25), (30, 30), (50, 2)]


@pytest.mark.grid(0)
@pytest.mark.parametrize(("n_latent", "n_groups"), SIZES)
def test_no_label_overlaps_another_or_is_cut_off(ranked, n_latent, n_groups):
    figure = pl.factor_groups(ranked(n_latent, n_groups), return_fig=True)
    assert_legible(figure)
    assert len(drawn_texts(figure)) > n_latent + n_groups


@pytest.mark.grid(0)
@pytest.mark.parametrize(("n_latent", "n_groups"), SIZES)
def test_no_dot_touches_another(ranked, n_latent, n_groups):
    figure = pl.factor_groups(ranked(n_latent, n_groups), return_fig=True)
    width, height = panel_inches(figure)
    largest = figure.axes[1].get_legend().legend_handles[0].get_markersize() / 72
    assert largest < min(width / n_latent, height / n_groups)


def test_dots_shrink_where_given_axes_are_small(ranked):
    adata = ranked(30, 30)
    figure, ax = plt.subplots(figsize=(4, 3))
    pl.factor_groups(adata, ax=ax, show=False)
    width, height = panel_inches(figure)
    largest = figure.axes[1].get_legend().legend_handles[0].get_markersize() / 72
    assert 0 < largest < min(width, height) / 30


def test_very_long_labels_take_no_room_from_the_panel(ranked):
    short, long = ranked(10, 4), ranked(10, 4)
    long.obs["annotation_of_the_third_consensus_round"] = long.obs["population"].cat.rename_categories(
        lambda name: f"{name}/" * 6
    )
    tl.rank_factors_groups(long, "annotation_of_the_third_consensus_round")
    figures = [pl.factor_groups(adata, return_fig=True) for adata in (short, long)]
    assert_legible(figures[1])
    np.testing.assert_allclose(panel_inches(figures[0])[0], panel_inches(figures[1])[0], atol=0.05)


def test_a_missing_ranking_is_named_before_anything_is_drawn(exported):
    with pytest.raises(KeyError, match=r"No ranking 'rank_factors_groups'.*tl\.rank_factors_groups"):
        pl.factor_groups(exported())
    assert not plt.get_fignums()


def test_unknown_factors_are_named_before_anything_is_drawn(ranked):
    for wrong in (["Z_0", "Z_9"], [], "Z_9"):
        with pytest.raises(ValueError, match="`factors`"):
            pl.factor_groups(ranked(), factors=wrong)
    assert not plt.get_fignums()
