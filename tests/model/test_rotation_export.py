"""Rotated factors in AnnData: what an export holds, and that it gives everything back."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

from ldvae_ext import get, tl
from ldvae_ext._stats import MEASURES
from ldvae_ext.core import kl_per_dimension
from tests import rotated
from tests.helpers import counts, untrained
from tests.rotated import fresh, full_kl, grouped, grouped_model, turn_at_random

METHODS = ("varimax", "score-varimax", "deviance")


@pytest.fixture(autouse=True, params=["orthogonal", "oblique"])
def axes(request, monkeypatch):
    """Kind of the axes that are drawn at random."""
    monkeypatch.setattr(rotated, "random_axes", getattr(rotated, request.param))
    return request.param


@pytest.fixture
def model():
    """The trained model on its own axes; tests may rotate it, and nothing else."""
    trained = grouped_model()
    trained.rotate("none")
    yield trained
    trained.rotate("none")


class TestExport:
    @pytest.mark.parametrize("method", METHODS)
    def test_factors_in_order_decode_to_the_expression(self, model, method):
        model.rotate(method)
        adata = fresh(model)
        model.export_to_anndata(adata)
        table, rotation = get.factors(adata), model.rotation.matrix_kk
        mean, variance = (v.astype(float) for v in model.get_latent_representation(return_dist=True))
        f, f_var = mean @ rotation, variance @ rotation**2
        kl = kl_per_dimension(f, f_var).mean(axis=0)
        if method == "deviance":
            assert table.index.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        assert [f"F_{d}" for d in table["dimension"]] == table.index.tolist()
        np.testing.assert_allclose(table["kl"], kl[table["dimension"]], rtol=1e-5)
        if method != "deviance":
            assert (np.diff(table["kl"]) <= 0).all()
            assert table["dimension"].tolist() == [0, 1, 2, 3], "the cells are those that numbered them"
        np.testing.assert_allclose(table["active_unit"], f.var(axis=0)[table["dimension"]], rtol=1e-4)
        np.testing.assert_allclose(
            adata.obsm["X_ldvae"], f[:, table["dimension"]] * table["sign"].to_numpy(), atol=1e-5
        )
        np.testing.assert_allclose(adata.obsm["X_ldvae_var"], f_var[:, table["dimension"]], rtol=1e-5)
        np.testing.assert_allclose(adata.obsm["X_ldvae_network_var"], variance, rtol=1e-6)
        assert {adata.obsm[name].dtype for name in adata.obsm} == {np.dtype(np.float32)}
        expected = model.get_normalized_expression(use_posterior_mean=True).to_numpy()
        decoder, codes = get.decoder(adata), adata.obs["batch"].cat.codes
        by_hand = adata.obsm["X_ldvae"] @ adata.varm["ldvae_loadings"].T + decoder.intercept_bg[codes]
        np.testing.assert_allclose(softmax(by_hand, axis=1), expected, atol=1e-6)
        scale = decoder.scale(adata.obsm["X_ldvae"], adata.obs["batch"].astype(str))
        np.testing.assert_allclose(scale, expected, atol=1e-6)
        assert decoder.factors.tolist() == table.index.tolist() == get.loadings(adata).columns.tolist()
        np.testing.assert_allclose(get.loadings(adata), decoder.weight_gk, atol=1e-6)
        np.testing.assert_allclose(
            get.loadings(adata), model.get_loadings(canonical=True)[table.index], atol=1e-6, err_msg="canonical"
        )

    def test_the_order_is_by_the_exported_cells(self, model):
        model.rotate()
        some = fresh(model)
        some = some[some.obs["type"] == "NK"].copy()
        model.export_to_anndata(some)
        mean, variance = model.get_latent_representation(
            indices=(model.adata.obs["type"] == "NK").to_numpy().nonzero()[0], return_dist=True
        )
        rotation = model.rotation.matrix_kk
        kl = kl_per_dimension(mean.astype(float) @ rotation, variance.astype(float) @ rotation**2).mean(axis=0)
        assert get.factors(some).index.tolist() == [f"F_{k}" for k in np.argsort(-kl)]
        model.export_to_anndata(some, order_by="network")
        assert get.factors(some).index.tolist() == ["F_0", "F_1", "F_2", "F_3"]

    def test_the_rotation_and_the_networks_variances_give_everything_back(self, model):
        matrix = turn_at_random(model)
        adata = fresh(model)
        model.export_to_anndata(adata)
        rotation, table = get.rotation(adata), get.factors(adata)
        assert rotation.index.tolist() == ["Z_0", "Z_1", "Z_2", "Z_3"]
        assert rotation.columns.tolist() == table.index.tolist()
        np.testing.assert_allclose(rotation, matrix[:, table["dimension"]] * table["sign"].to_numpy())
        assert (table["sign"] < 0).any(), "a random rotation turns some"
        mean = model.get_latent_representation()
        np.testing.assert_allclose(adata.obsm["X_ldvae"], mean @ rotation.to_numpy(), atol=1e-5)
        np.testing.assert_allclose(adata.obsm["X_ldvae"] @ np.linalg.inv(rotation.to_numpy()), mean, atol=1e-5)
        np.testing.assert_allclose(
            adata.obsm["X_ldvae_var"], adata.obsm["X_ldvae_network_var"] @ rotation.to_numpy() ** 2, rtol=1e-5
        )
        kl = full_kl(mean, adata.obsm["X_ldvae_network_var"], rotation.to_numpy())
        np.testing.assert_allclose(kl, model.get_latent_kl().sum(axis=1).mean(), rtol=1e-4)
        assert adata.uns["ldvae"]["rotation"]["method"] == "varimax"

    def test_an_export_without_a_rotation_takes_its_traces_away(self, model):
        adata = fresh(model)
        model.rotate()
        model.export_to_anndata(adata)
        assert "X_ldvae_network_var" in adata.obsm
        model.rotate("none")
        model.export_to_anndata(adata)
        assert set(adata.obsm) == {"X_ldvae", "X_ldvae_var"}
        assert "rotation" not in adata.uns["ldvae"]
        assert get.factors(adata).index.str.startswith("Z_").all()
        with pytest.raises(KeyError, match="export 'ldvae' was made on the network's own axes"):
            get.rotation(adata)
        with pytest.raises(KeyError, match="No export 'other'"):
            get.rotation(adata, key="other")

    def test_key_added_renames_all_of_it(self, model):
        adata = fresh(model)
        model.rotate()
        model.export_to_anndata(adata, key_added="mine")
        assert set(adata.obsm) == {"X_mine", "X_mine_var", "X_mine_network_var"}
        assert get.rotation(adata, key="mine").shape == (4, 4)
        np.testing.assert_allclose(tl.ablate(adata, key="mine").X, model.ablate().X, atol=1e-4)

    @pytest.mark.parametrize("store", ["h5ad", "zarr"])
    def test_files_bring_it_back(self, model, tmp_path, store):
        adata = fresh(model)
        model.rotate("deviance")
        model.export_to_anndata(adata, stats=True, as_pca=True)
        getattr(adata, f"write_{store}")(tmp_path / "x")
        back = getattr(ad, f"read_{store}")(tmp_path / "x")
        relaxed = {"check_index_type": False, "check_column_type": False, "check_names": False}
        pd.testing.assert_frame_equal(get.rotation(back), get.rotation(adata), **relaxed)
        pd.testing.assert_frame_equal(get.factors(back), get.factors(adata), **relaxed)
        pd.testing.assert_frame_equal(get.factor_ranks(back), get.factor_ranks(adata), **relaxed)
        pd.testing.assert_frame_equal(get.loadings(back), get.loadings(adata), **relaxed)
        assert str(back.uns["ldvae"]["rotation"]["method"]) == "deviance"
        for name, value in get.decoder(adata).to_arrays().items():
            np.testing.assert_array_equal(get.decoder(back).to_arrays()[name], value, err_msg=name)
        np.testing.assert_array_equal(tl.ablate(back, mode="permute").X, tl.ablate(adata, mode="permute").X)

    @pytest.mark.grid(1)
    @pytest.mark.parametrize("order_by", MEASURES)
    @pytest.mark.parametrize("rotated", [False, True])
    def test_any_measure_orders_and_is_stored(self, model, order_by, rotated):
        if rotated:
            model.rotate()
        adata = fresh(model)
        model.export_to_anndata(adata, order_by=order_by)
        table, stats = get.factors(adata), model.get_factor_stats().table()
        assert table.index.tolist() == stats[order_by].sort_values(ascending=False).index.tolist()
        assert adata.uns["ldvae"]["order_by"] == order_by
        stored = [name for name in MEASURES if name in table]
        for name in stored:
            np.testing.assert_allclose(table[name], stats.loc[table.index, name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert stored == (["kl", "active_unit"] if order_by in ("kl", "active_unit") else list(MEASURES))

    def test_stats_are_stored_beside_any_order_and_ranked(self, model):
        model.rotate()
        adata = fresh(model)
        model.export_to_anndata(adata, order_by="network", stats=True)
        ranks, table = get.factor_ranks(adata), get.factors(adata)
        assert ranks.columns.tolist() == list(MEASURES)
        assert ranks.index.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        for name in MEASURES:
            np.testing.assert_array_equal(ranks[name], table[name].rank(ascending=False))
        model.export_to_anndata(adata)
        assert get.factor_ranks(adata).columns.tolist() == ["kl", "active_unit"]

    def test_statistics_of_other_cells_are_theirs(self, model):
        model.rotate()
        other = grouped(40, seed=5)
        other.obs_names = [f"new{i}" for i in range(40)]
        model.export_to_anndata(other, stats=True)
        stats, table = model.get_factor_stats(None, other).table(), get.factors(other)
        for name in MEASURES:
            np.testing.assert_allclose(table[name], stats.loc[table.index, name], rtol=1e-4, atol=1e-5, err_msg=name)
        some = fresh(model)[[7, 3, 50, 21, 90]].copy()
        model.export_to_anndata(some, stats=True)
        stats, table = model.get_factor_stats(indices=[7, 3, 50, 21, 90]).table(), get.factors(some)
        for name in MEASURES:
            np.testing.assert_allclose(table[name], stats.loc[table.index, name], rtol=1e-4, atol=1e-5, err_msg=name)

    def test_an_order_that_needs_counts_is_refused_without_them(self):
        model = untrained(counts(60, n_batches=3))
        model.minify_adata()
        with (
            pytest.warns(UserWarning, match="minified without counts"),
            pytest.raises(ValueError, match="`order_by='explained_deviance'` needs counts"),
        ):
            model.export_to_anndata(order_by="explained_deviance")
        assert "ldvae" not in model.adata.uns

    def test_a_lost_network_variance_is_named(self, model):
        model.rotate()
        adata = fresh(model)
        model.export_to_anndata(adata)
        del adata.obsm["X_ldvae_network_var"]
        with pytest.raises(KeyError, match=r"lacks `adata.obsm\['X_ldvae_network_var'\]`"):
            tl.ablate(adata)
