from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ldvae_ext import get, pl, tl
from ldvae_ext.core import LinearDecoder
from tests.pl.conftest import POPULATIONS
from tests.pl.helpers import assert_legible, drawn_texts


@pytest.fixture
def populations(readable):
    """Makes an export with population loadings."""

    def make(n_latent=5, n_groups=4, kind="contribution", *, n_batches=1, link="softmax", **kwargs):
        adata = readable(n_latent, n_groups, n_batches=n_batches, link=link)
        tl.population_loadings(adata, "population", kind, **kwargs)
        return adata

    return make


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def wide(adata, factor, **kwargs):
    table = get.population_loadings_df(adata, factor=factor, **kwargs)
    return table.pivot_table(index="gene", columns="group", values="value")


@pytest.mark.grid(0)
@pytest.mark.parametrize(
    ("kind", "factor", "scale", "said", "times"),
    [
        ("gradient", "Z_1", "log", "log-rate\nper unit of latent", 1),
        ("gradient", "Z_1", None, "counts per 10,000\nper unit of latent", 1e4),
        ("contribution", "Z_1", None, "(log-rate)", 1),
        ("path", "Z_1", None, "(log-rate)", 1),
        ("path", "batch", None, "(log-rate)", 1),
        ("within", "D_0", None, "log-rate\nper s.d. of the cells", 1),
    ],
)
def test_cells_hold_the_stored_values_in_the_unit_that_is_said(populations, kind, factor, scale, said, times):
    adata = populations(kind=kind, scale=scale, n_batches=2)
    figure = pl.population_loadings(adata, factor, return_fig=True)
    ax = figure.axes[0]
    genes = labels(ax.yaxis)
    assert len(set(genes)) == 20
    assert labels(ax.xaxis) == POPULATIONS
    np.testing.assert_allclose(ax.images[0].get_array(), times * wide(adata, factor).loc[genes, POPULATIONS])
    assert said in figure.axes[1].get_ylabel()
    assert ax.get_xlabel() == "population"
    assert ax.get_title().split("\n")[0] == factor
    assert_legible(figure)


def test_slopes_of_expression_are_counts_in_ten_thousand(populations):
    """The slope at each cell, from the decoder itself."""
    adata = populations(kind="gradient", scale="expression")
    ax = pl.population_loadings(adata, 2, show=False)
    decoder = LinearDecoder.from_arrays(adata.uns["ldvae"]["decoder"])
    info = adata.uns["ldvae"]
    z = (adata.obsm["X_ldvae"].astype(float) * info["signs"])[:, np.argsort(info["order"])]
    k, step = info["order"][2], 1e-4 * np.eye(5)[info["order"][2]] * info["signs"][2]
    assert info["names"][2] == decoder.factors[k]
    slope = 1e4 * (decoder.scale(z + step) - decoder.scale(z - step)) / 2e-4
    inside = (adata.obs["population"] == "B").to_numpy()
    genes = [decoder.genes.tolist().index(gene) for gene in labels(ax.yaxis)]
    drawn = ax.images[0].get_array()[:, POPULATIONS.index("B")]
    np.testing.assert_allclose(drawn, slope[inside].mean(axis=0)[genes], rtol=1e-4)


def test_under_a_softplus_nothing_is_multiplied(populations):
    adata = populations(kind="gradient", scale="expression", link="softplus")
    figure = pl.population_loadings(adata, "Z_1", return_fig=True)
    genes = labels(figure.axes[0].yaxis)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), wide(adata, "Z_1").loc[genes, POPULATIONS])
    assert "size factor 1" in figure.axes[1].get_ylabel()
    assert "10,000" not in figure.axes[1].get_ylabel()


def test_genes_are_those_that_move_most_in_the_populations_drawn(populations):
    adata = populations(kind="within")
    groups = ["CD34+", "B"]
    ax = pl.population_loadings(adata, "D_1", groups=groups, n_genes=7, show=False)
    assert labels(ax.xaxis) == groups
    values = wide(adata, "D_1")[groups]
    assert set(labels(ax.yaxis)) == set(values.abs().max(axis=1).nlargest(7).index)
    np.testing.assert_allclose(ax.images[0].get_array(), values.loc[labels(ax.yaxis)])
    assert labels(pl.population_loadings(adata, "D_1", groups="B", show=False).xaxis) == ["B"]


def test_genes_that_go_up_come_before_those_that_go_down(populations):
    drawn = pl.population_loadings(populations(), "Z_0", groups="B", show=False).images[0].get_array()[:, 0]
    assert drawn[0] > 0 > drawn[-1]
    assert (np.diff(drawn) <= 0).all()


def test_genes_that_the_model_does_not_know_are_not_drawn(populations):
    adata = populations()
    ax = pl.population_loadings(adata, "Z_0", n_genes=200, show=False)
    assert set(labels(ax.yaxis)) == set(adata.var_names[1:])


def test_up_is_red_as_in_the_other_figures_of_populations(populations):
    image = pl.population_loadings(populations(), "Z_0", show=False).images[0]
    up, down = image.to_rgba(np.array([1e3, -1e3]))[:, :3]
    assert up[0] > up[2]
    assert down[2] > down[0]


@pytest.mark.parametrize(("reference", "said"), [("rest", "the rest"), ("prior", "the prior"), ("B", "B")])
def test_what_populations_are_compared_with_is_said(populations, reference, said):
    adata = populations(reference=reference)
    ax = pl.population_loadings(adata, "Z_0", show=False)
    assert ax.get_title() == f"Z_0\nagainst {said}"
    assert ("B" in labels(ax.xaxis)) == (reference != "B")


def test_another_key_is_read(populations):
    adata = populations(key_added="other")
    assert pl.population_loadings(adata, "Z_0", key="other", return_fig=True).axes
    with pytest.raises(KeyError, match=r"No population loadings 'ldvae_population_loadings'.*tl\.population_loadings"):
        pl.population_loadings(adata, "Z_0")


@pytest.mark.grid(0)
@pytest.mark.parametrize(
    ("n_latent", "n_groups", "n_genes"), [(1, 2, 1), (3, 2, 20), (3, 10, 20), (30, 10, 20), (30, 30, 40), (3, 30, 2)]
)
def test_no_label_overlaps_another_or_is_cut_off(populations, n_latent, n_groups, n_genes):
    adata = populations(n_latent, n_groups, reference="prior")
    figure = pl.population_loadings(adata, 0, n_genes=n_genes, return_fig=True)
    assert_legible(figure)
    assert len(drawn_texts(figure)) > n_groups + n_genes


@pytest.mark.parametrize("factor", ["Z_9", "D_0", "batch", 5, None, ["Z_0"]])
def test_anything_but_one_known_factor_is_named(populations, factor):
    with pytest.raises(ValueError, match="`factor`"):
        pl.population_loadings(populations(), factor)
    assert not plt.get_fignums()


@pytest.mark.parametrize("groups", ["T", ["B", "T"], []])
def test_unknown_groups_are_named(populations, groups):
    with pytest.raises(ValueError, match=r"`groups` must name some of .*; got ('T'|none)"):
        pl.population_loadings(populations(), 0, groups=groups)
    assert not plt.get_fignums()


def test_a_number_of_genes_is_a_count(populations):
    with pytest.raises(ValueError, match="`n_genes` must be an integer of at least 1"):
        pl.population_loadings(populations(), 0, n_genes=0)
