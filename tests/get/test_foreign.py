"""Exports, colours and keys that something else left in an AnnData."""

from __future__ import annotations

import anndata as ad
import matplotlib as mpl
import numpy as np
import pytest

from ldvae_ext import get, pl, tl
from ldvae_ext.pl._color import look_of
from tests.helpers import counts, untrained

mpl.use("Agg")


@pytest.fixture
def exported():
    model = untrained(counts(n_batches=2))
    model.export_to_anndata()
    return model.adata


@pytest.mark.parametrize(
    "read",
    [
        lambda a: tl.ablate(a),
        lambda a: tl.rank_factors_groups(a, "batch"),
        lambda a: pl.latent_pairs(a, show=False),
        lambda a: tl.population_expression(a, "batch"),
    ],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_merged_exports_are_refused(exported, read):
    other = untrained(counts(n_batches=2, seed=1), seed=3)
    other.export_to_anndata()
    merged = ad.concat([exported, other.adata], uns_merge="first", merge="first", index_unique="-")
    with pytest.raises(ValueError, match=r"`adata` has 120 cells, but the export 'ldvae' is of 60: .* were merged"):
        read(merged)
    read(exported[:40].copy())  # a part of the cells is fine


def test_an_export_with_other_columns_is_refused(exported):
    exported.obsm["X_ldvae"] = exported.obsm["X_ldvae"][:, :2]
    with pytest.raises(
        ValueError, match=r"`adata.obsm\['X_ldvae'\]` has 2 columns, but the export 'ldvae' has 4 factors"
    ):
        tl.ablate(exported)
    del exported.obsm["X_ldvae"]
    with pytest.raises(KeyError, match="has no latents"):
        tl.ablate(exported)
    assert len(get.factors(exported)) == 4


@pytest.mark.parametrize("slot", ["obsm", "varm", "uns"])
def test_keys_of_something_else_are_not_replaced_unless_asked(slot):
    model = untrained(counts(n_batches=2))
    key, value = {
        "obsm": ("X_ldvae", np.zeros((60, 2))),
        "varm": ("ldvae_loadings", np.zeros((20, 2))),
        "uns": ("ldvae", {"mine": 1}),
    }[slot]
    getattr(model.adata, slot)[key] = value
    with pytest.raises(ValueError, match=rf"`adata` has {slot}\['{key}'\], which no export describes"):
        model.export_to_anndata()
    assert getattr(model.adata, slot)[key] is value or np.array_equal(getattr(model.adata, slot)[key], value)
    model.export_to_anndata(overwrite=True)
    model.export_to_anndata()
    assert len(get.factors(model.adata)) == 4


def test_fewer_colours_than_groups_are_not_used(exported):
    exported.uns["batch_colors"] = "red"
    colors = look_of(exported, "batch").color_n
    del exported.uns["batch_colors"]
    np.testing.assert_array_equal(colors, look_of(exported, "batch").color_n)


@pytest.mark.parametrize("colors", [["no colour", "red"], ["#12", "#ff0000"]])
def test_colours_that_are_none_are_replaced_with_a_warning(exported, colors):
    exported.uns["batch_colors"] = colors
    with pytest.warns(
        UserWarning, match=r"`adata.uns\['batch_colors'\]` has .* which is no colour; the default colours"
    ):
        pl.latent_pairs(exported, color="batch", show=False)
