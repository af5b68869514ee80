"""Factors on an embedding, against the arrays of the export."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba

from ldvae_ext import get, pl
from tests.pl.helpers import assert_legible


@pytest.fixture
def placed(exported):
    def make(n_latent=5, **options):
        adata = exported(n_latent, **options)
        adata.obsm["X_umap"] = np.random.default_rng(1).normal(size=(adata.n_obs, 2))
        return adata

    return make


def test_each_panel_has_all_cells_coloured_by_its_factor(placed):
    adata = placed()
    figure = pl.embedding_factors(adata, show=False)
    names = get.factors(adata).index.tolist()
    panels = figure.axes[: len(names)]
    assert [ax.get_title() for ax in panels] == names
    for k, ax in enumerate(panels):
        (points,) = ax.collections
        value = np.asarray(points.get_array())
        # The ends are drawn last.
        assert (np.diff(np.abs(value)) >= 0).all()
        order = np.argsort(np.abs(adata.obsm["X_ldvae"][:, k].astype(float)), kind="stable")
        np.testing.assert_allclose(value, adata.obsm["X_ldvae"][order, k])
        np.testing.assert_allclose(points.get_offsets(), adata.obsm["X_umap"][order])
        assert points.norm.vmin == -points.norm.vmax
        assert points.norm.vmax == pytest.approx(np.quantile(np.abs(adata.obsm["X_ldvae"]), 0.98))


def test_zero_has_the_colour_of_the_middle(placed):
    adata = placed(2)
    adata.obsm["X_ldvae"][0] = 0
    figure = pl.embedding_factors(adata, factors=[0], show=False)
    (points,) = figure.axes[0].collections
    figure.canvas.draw()
    np.testing.assert_allclose(points.to_rgba(np.array([0.0]))[0], to_rgba("#dddddd"), atol=0.01)


@pytest.mark.parametrize("n_latent", [1, 10, 50])
def test_figures_are_legible_with_any_number_of_factors(placed, n_latent):
    assert_legible(pl.embedding_factors(placed(n_latent), show=False))


def test_other_embeddings_and_errors(placed):
    adata = placed()
    adata.obsm["mine"] = adata.obsm["X_umap"][:, [1, 0]]
    figure = pl.embedding_factors(adata, basis="mine", factors=["Z_1"], show=False)
    assert figure.axes[0].get_xlabel() == "mine1"
    assert pl.embedding_factors(adata, factors=[1], return_fig=True).axes[0].get_xlabel() == "UMAP1"
    with pytest.raises(KeyError, match=r"`basis`: there is no 'tsne' in `adata.obsm`"):
        pl.embedding_factors(adata, basis="tsne")
    adata.obsm["X_line"] = adata.obsm["X_umap"][:, :1]
    with pytest.raises(ValueError, match="must have two columns or more"):
        pl.embedding_factors(adata, basis="line")
    plt.close("all")


def test_factors_that_other_trainings_do_not_confirm_say_so(placed):
    adata = placed(3)
    adata.uns["ldvae"]["statistics"]["reproducibility"] = np.array([0.9, 0.7, 0.1])
    names = get.factors(adata).index
    expected = [names[0], f"{names[1]} (uncertain)", f"{names[2]} (unstable)"]
    for figure in (
        pl.embedding_factors(adata, show=False),
        pl.loadings(adata, n_genes=3, rank_by="loading", show=False),
    ):
        assert [ax.get_title() for ax in figure.axes[:3]] == expected
