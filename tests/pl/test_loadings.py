from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ldvae_ext import get, pl
from tests.pl.helpers import assert_legible, panel_inches


def bars_of(ax) -> dict[str, float]:
    """Lengths of the bars by gene, from top to bottom."""
    genes = [label.get_text() for label in ax.get_yticklabels()]
    bars = sorted(zip(ax.get_yticks(), ax.patches, genes, strict=True), key=lambda row: row[0])
    assert ax.yaxis_inverted()
    return {gene: bar.get_width() for _, bar, gene in bars}


def test_each_panel_has_the_largest_and_smallest_loadings_in_descending_order(exported):
    adata = exported()
    table = get.loadings(adata)
    figure = pl.loadings(adata, n_genes=4, rank_by="loading", show=False)
    assert [ax.get_title() for ax in figure.axes] == table.columns.tolist()
    for ax in figure.axes:
        ranked = table[ax.get_title()].sort_values(ascending=False)
        drawn = bars_of(ax)
        np.testing.assert_array_equal(list(drawn.values()), np.r_[ranked[:4], ranked[-4:]])
        assert all(drawn[gene] == table.loc[gene, ax.get_title()] for gene in drawn)


@pytest.mark.parametrize("rank_by", ["information", "regression"])
def test_genes_can_be_chosen_by_a_score_and_bars_stay_loadings(exported, rank_by):
    adata = exported()
    adata.var_names = get.decoder(adata).genes
    adata.varm["ldvae_scores"] = np.random.default_rng(0).uniform(-1, 1, adata.varm["ldvae_loadings"].shape)
    figure = pl.loadings(adata, n_genes=4, rank_by=rank_by, show=False)
    for ax in figure.axes:
        factor = ax.get_title()
        ranked = get.gene_scores(adata, kind=rank_by)[factor].sort_values(ascending=False).index
        drawn = bars_of(ax)
        assert list(drawn) == [*ranked[:4], *ranked[-4:]]
        np.testing.assert_array_equal(list(drawn.values()), get.loadings(adata).loc[list(drawn), factor])
    assert f"genes by {rank_by}" in figure.get_supxlabel()


def test_genes_that_the_model_does_not_know_are_not_drawn(exported):
    adata = exported()
    figure = pl.loadings(adata, factors=[0, 1], n_genes=(adata.n_vars - 1) // 2, show=False)
    assert not any(np.isnan(list(bars_of(ax).values())).any() for ax in figure.axes)


def test_factors_are_drawn_in_the_order_asked_for(exported):
    adata = exported()
    names = get.loadings(adata).columns
    figure = pl.loadings(adata, factors=[names[3], 0, names[3]], show=False)
    assert [ax.get_title() for ax in figure.axes] == [names[3], names[0]]
    assert [ax.get_title() for ax in pl.loadings(adata, factors=names[2], show=False).axes] == [names[2]]


def test_genes_that_share_a_name_each_get_a_bar(exported):
    adata = exported()
    adata.var_names = ["TBCE"] * adata.n_vars
    figure = pl.loadings(adata, rank_by="loading", factors=0, n_genes=3, show=False)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["TBCE"] * 6


def test_all_panels_have_the_same_scale(exported):
    figure = pl.loadings(exported(7), ncols=3, show=False)
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    assert "log-rate per unit of latent" in figure.get_supxlabel()


@pytest.mark.parametrize(("n_latent", "ncols"), [(3, 5), (7, 5), (7, 2), (5, 1)])
def test_panels_fill_rows_of_the_asked_width(exported, n_latent, ncols):
    figure = pl.loadings(exported(n_latent), n_genes=2, ncols=ncols, show=False)
    lefts = {round(ax.get_position().x0, 3) for ax in figure.axes}
    assert len(lefts) == min(ncols, n_latent)


@pytest.mark.grid(0)
@pytest.mark.parametrize(
    ("n_latent", "n_genes", "ncols"), [(1, 8, 5), (2, 1, 5), (3, 8, 5), (10, 15, 5), (30, 2, 7), (4, 3, 1)]
)
def test_no_label_overlaps_another_or_is_cut_off(exported, n_latent, n_genes, ncols):
    assert_legible(pl.loadings(exported(n_latent), n_genes=n_genes, ncols=ncols, return_fig=True))


def test_long_gene_names_do_not_take_room_from_the_bars(exported):
    adata = exported(2)
    before = panel_inches(pl.loadings(adata, rank_by="loading", show=False))
    adata.var_names = [f"{gene}_of_a_rather_verbose_reference_genome" for gene in adata.var_names]
    figure = pl.loadings(adata, rank_by="loading", show=False)
    assert_legible(figure)
    np.testing.assert_allclose(panel_inches(figure), before, rtol=0.02)


@pytest.mark.parametrize("argument", ["n_genes", "ncols"])
@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_counts_must_be_counts(exported, argument, wrong):
    with pytest.raises(ValueError, match=f"`{argument}` must be an integer of at least 1"):
        pl.loadings(exported(), **{argument: wrong})
    assert not plt.get_fignums()


def test_no_gene_is_drawn_at_both_ends(exported):
    with pytest.raises(ValueError, match="`n_genes` must be at most 39, half of the genes of the model; got 40"):
        pl.loadings(exported(n_genes=80), n_genes=40)
