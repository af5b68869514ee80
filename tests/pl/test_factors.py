"""Cards of factors, against the tables that they are drawn from."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from ldvae_ext import get, pl
from ldvae_ext.pl._figure import BLUE
from tests.pl.helpers import assert_legible


def test_a_card_has_the_genes_and_the_quartiles_of_each_population(exported):
    adata = exported()
    figure = pl.factors(adata, groupby="population", factors=[2, 0], n_genes=4, rank_by="loading", show=False)
    names = get.factors(adata).index
    for row, k in enumerate((2, 0)):
        left, right = figure.axes[2 * row : 2 * row + 2]
        assert left.get_title(loc="left").startswith(f"{names[k]}: KL {get.factors(adata)['kl'].iloc[k]:.2f}")
        top = get.top_genes(adata, names[k], n=4, rank_by="loading")
        assert [label.get_text() for label in left.get_yticklabels()] == top["gene"].tolist()
        np.testing.assert_allclose([bar.get_width() for bar in left.patches], top["loading"])
        by_group = adata.obsm["X_ldvae"][:, k].astype(float)
        groups = adata.obs["population"].cat.categories
        expected = [np.quantile(by_group[adata.obs["population"] == g], [0.25, 0.5, 0.75]) for g in groups]
        assert [label.get_text() for label in right.get_yticklabels()] == groups.tolist()
        np.testing.assert_allclose(right.lines[0].get_xdata(), [q[1] for q in expected])
        segments = right.collections[0].get_segments()
        np.testing.assert_allclose([s[:, 0] for s in segments], [(q[0], q[2]) for q in expected])


@pytest.mark.parametrize("n_latent", [1, 10])
def test_cards_are_legible(exported, n_latent):
    adata = exported(n_latent)
    assert_legible(pl.factors(adata, groupby="population", factors=range(n_latent), rank_by="loading", show=False))


def test_the_first_five_are_drawn(exported):
    adata = exported(8)
    figure = pl.factors(adata, groupby="population", rank_by="loading", return_fig=True)
    assert len(figure.axes) == 10
    with pytest.raises(KeyError, match="`groupby`: 'type' is not a column"):
        pl.factors(adata, groupby="type")
    with pytest.raises(ValueError, match="`n_genes`"):
        pl.factors(adata, groupby="population", n_genes=0)


def colors_of(ax):
    return [to_hex(color) for color in ax.collections[0].get_edgecolors()]


def test_populations_have_the_colours_of_the_anndata_also_where_one_has_no_cells(exported):
    adata = exported()
    colors = ["#111111", "#222222", "#333333", "#444444"]
    adata.uns["population_colors"] = np.array(colors)
    present = adata[adata.obs["population"] != "B"].copy()
    present.uns["population_colors"] = np.array(colors)
    present.obs["population"] = present.obs["population"].cat.set_categories(adata.obs["population"].cat.categories)
    for data, expected in ((adata, colors), (present, [colors[i] for i in (0, 1, 3)])):
        figure = pl.factors(data, groupby="population", factors=0, rank_by="loading", return_fig=True)
        assert colors_of(figure.axes[1]) == expected


def test_too_few_colours_are_not_used(exported):
    adata = exported()
    adata.uns["population_colors"] = ["#111111", "#222222"]
    figure = pl.factors(adata, groupby="population", factors=0, rank_by="loading", return_fig=True)
    assert set(colors_of(figure.axes[1])) == {BLUE.lower()}


def test_genes_and_populations_have_rows_of_the_same_height(exported):
    figure = pl.factors(exported(), groupby="population", factors=0, rank_by="loading", return_fig=True)
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] > max(*left.get_yticks(), *right.get_yticks())
