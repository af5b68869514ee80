"""What is written to AnnData, and that it gives the expression back."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy.special import softmax
from torch.distributions import Normal, kl_divergence

from ldvae_ext import get
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts, untrained


@pytest.fixture(scope="module")
def model():
    adata = counts(n_cells=120, n_batches=3)
    LDVAE.setup_anndata(adata, batch_key="batch")
    model = LDVAE(adata, n_latent=4)
    model.train(15, kl_warmup="auto", **TRAIN)
    return model


def fresh(model):
    """The model's cells without anything that scvi-tools or an export left there."""
    return ad.AnnData(
        X=model.adata.X.copy(), obs=model.adata.obs[["batch"]].copy(), var=pd.DataFrame(index=model.adata.var_names)
    )


def test_latent_kl_is_that_of_torch(model):
    kl = model.get_latent_kl()
    assert kl.columns.tolist() == ["Z_0", "Z_1", "Z_2", "Z_3"]
    assert kl.index.equals(model.adata.obs_names)
    mean, variance = model.get_latent_representation(return_dist=True)
    expected = kl_divergence(Normal(torch.as_tensor(mean), torch.as_tensor(variance).sqrt()), Normal(0.0, 1.0)).numpy()
    np.testing.assert_allclose(kl, expected, atol=1e-5)
    np.testing.assert_allclose(model.get_latent_kl(indices=[5, 1]), kl.iloc[[5, 1]], atol=1e-6)
    loader = model._make_data_loader(model.adata, batch_size=11)
    np.testing.assert_allclose(model.get_latent_kl(dataloader=loader), kl, atol=1e-5)


@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson"])
def test_exported_fields_give_the_expression_back(latent_distribution, gene_likelihood):
    adata = counts(n_batches=3)
    model = untrained(adata, latent_distribution=latent_distribution, gene_likelihood=gene_likelihood)
    model.export_to_anndata()
    expected = model.get_normalized_expression(use_posterior_mean=True).to_numpy()
    decoder = get.decoder(adata)
    np.testing.assert_allclose(decoder.scale(adata.obsm["X_ldvae"], adata.obs["batch"]), expected, atol=1e-6)
    by_hand = adata.obsm["X_ldvae"] @ adata.varm["ldvae_loadings"].T
    by_hand = softmax(by_hand + decoder.intercept_bg[adata.obs["batch"].cat.codes], axis=1)
    np.testing.assert_allclose(by_hand, expected, atol=1e-6)
    np.testing.assert_allclose(get.loadings(adata), decoder.weight_gk, atol=1e-6)
    assert get.loadings(adata).columns.tolist() == decoder.factors.tolist()
    for array in (adata.obsm["X_ldvae"], adata.obsm["X_ldvae_var"], adata.varm["ldvae_loadings"]):
        assert type(array) is np.ndarray
        assert array.dtype == np.float32


def test_order_is_descending_and_reversible(model):
    adata = fresh(model)
    model.export_to_anndata(adata)
    table = get.factors(adata)
    kl = model.get_latent_kl().mean()
    assert table.columns.tolist() == ["dimension", "sign", "kl", "kl_share", "active_unit"]
    assert (np.diff(table["kl"]) <= 0).all()
    assert table.index.tolist() == kl.sort_values(ascending=False, kind="stable").index.tolist()
    np.testing.assert_allclose(table["kl"], kl[table.index], rtol=1e-6)
    np.testing.assert_allclose(table["kl_share"].sum(), 1)
    assert [f"Z_{d}" for d in table["dimension"]] == table.index.tolist()
    mean, variance = model.get_latent_representation(return_dist=True)
    back = np.empty_like(mean)
    back[:, table["dimension"]] = adata.obsm["X_ldvae"] * table["sign"].to_numpy()
    np.testing.assert_allclose(back, mean, atol=1e-6)
    np.testing.assert_allclose(adata.obsm["X_ldvae_var"], variance[:, table["dimension"]], rtol=1e-5)
    np.testing.assert_allclose(table["active_unit"], mean.var(0)[table["dimension"]], rtol=1e-4)
    stored = adata.uns["ldvae"]["decoder"]
    np.testing.assert_allclose(stored["weight_gk"], model.get_loadings(), atol=1e-6)
    assert adata.uns["ldvae"]["kl_weight"] == 1.0


def test_canonical_loadings_are_centred_and_point_to_their_longer_tail(model):
    adata = fresh(model)
    model.export_to_anndata(adata)
    loadings = adata.varm["ldvae_loadings"].astype(np.float64)
    np.testing.assert_allclose(loadings.sum(0), 0, atol=1e-5)
    assert ((loadings**3).sum(0) > 0).all()
    plain = model.get_loadings()[get.factors(adata).index].to_numpy()
    np.testing.assert_allclose(loadings, (plain - plain.mean(0)) * get.factors(adata)["sign"].to_numpy(), atol=1e-6)


def test_network_order_and_key_added(model):
    adata = fresh(model)
    model.export_to_anndata(adata, key_added="mine", order_by="network")
    assert set(adata.obsm) == {"X_mine", "X_mine_var"}
    assert set(adata.varm) == {"mine_loadings", "mine_loadings_error", "mine_scores", "mine_scores_error"}
    assert set(adata.uns) == {"mine"}
    assert "mine" in adata.var
    assert get.factors(adata, key="mine").index.tolist() == ["Z_0", "Z_1", "Z_2", "Z_3"]
    with pytest.raises(KeyError, match=r"No export 'ldvae' in `adata.uns`, which has 'mine'"):
        get.factors(adata)


@pytest.mark.parametrize("store", ["h5ad", "zarr"])
def test_files_bring_the_export_back(tmp_path, model, store):
    adata = fresh(model)
    adata.obs["label/with slash"] = "a/b"
    adata.obs = adata.obs.rename(columns={"label/with slash": "label"})
    model.export_to_anndata(adata, as_pca=True)
    path = tmp_path / f"x.{store}"
    getattr(adata, f"write_{store}")(path)
    back = getattr(ad, f"read_{store}")(path)
    pd.testing.assert_frame_equal(get.factors(back), get.factors(adata), check_index_type=False, check_names=False)
    pd.testing.assert_frame_equal(
        get.loadings(back), get.loadings(adata), check_index_type=False, check_column_type=False
    )
    want, got = get.decoder(adata), get.decoder(back)
    assert got.batches.tolist() == ["CD4+/CD25 T", "b1", "b2"]
    for name, value in want.to_arrays().items():
        np.testing.assert_array_equal(got.to_arrays()[name], value, err_msg=name)


class TestTargets:
    def test_full_object_gets_nan_for_genes_that_the_model_lacks(self):
        full = counts(n_genes=30)
        part = full[:, [3, 20, 0, 11]].copy()
        model = untrained(part)
        full.X = np.log1p(full.X)  # the usual fate of a full object; the cells go by name
        with pytest.warns(
            UserWarning, match="60 cells of `adata` were identified with those of the model by their names only"
        ):
            model.export_to_anndata(full)
        assert full.var["ldvae"].sum() == 4
        assert np.isnan(full.varm["ldvae_loadings"][~full.var["ldvae"]]).all()
        model.export_to_anndata()
        np.testing.assert_array_equal(full.obsm["X_ldvae"], part.obsm["X_ldvae"])
        np.testing.assert_array_equal(full[:, part.var_names].varm["ldvae_loadings"], part.varm["ldvae_loadings"])
        assert get.loadings(full).index.tolist() == [f"gene{i}" for i in (0, 3, 11, 20)]
        expected = model.get_normalized_expression(use_posterior_mean=True)[get.loadings(full).index]
        np.testing.assert_allclose(get.decoder(full).scale(full.obsm["X_ldvae"]), expected, atol=1e-6)

    def test_own_cells_go_by_name_in_any_order_and_without_counts(self, model):
        bare = ad.AnnData(obs=pd.DataFrame(index=["cell7", "cell3"]), var=pd.DataFrame(index=["something"]))
        with pytest.warns(UserWarning, match="by their names only"):
            model.export_to_anndata(bare, order_by="network")
        model.export_to_anndata(order_by="network")
        np.testing.assert_allclose(bare.obsm["X_ldvae"], model.adata.obsm["X_ldvae"][[7, 3]], atol=1e-6)
        assert np.isnan(bare.varm["ldvae_loadings"]).all()

    def test_other_cells_under_the_same_names_are_encoded(self, model):
        other = counts(n_cells=30, n_batches=3, seed=5)
        assert set(other.obs_names) <= set(model.adata.obs_names)
        renamed = other.copy()
        renamed.obs_names = [f"new{i}" for i in range(30)]
        model.export_to_anndata(other)
        model.export_to_anndata(renamed)
        np.testing.assert_array_equal(other.obsm["X_ldvae"], renamed.obsm["X_ldvae"])
        assert not np.allclose(
            other.obsm["X_ldvae"],
            model.get_latent_representation(indices=range(30))[:, get.factors(other)["dimension"]],
        )
        assert [c for c in other.obs if c.startswith("_scvi")] == []
        assert set(other.uns) == {"ldvae"}

    def test_other_cells_under_the_same_names_that_lack_genes_are_an_error(self, model):
        other = counts(n_cells=30, n_batches=3, seed=5)[:, :18].copy()
        with pytest.raises(ValueError, match="lacks 2 of the 20 genes of the model"):
            model.export_to_anndata(other)
        assert len(other.obsm) == 0

    def test_own_cells_with_fewer_genes_go_by_name_without_a_word(self, model):
        part = fresh(model)[[4, 2], :18].copy()
        model.export_to_anndata(part)
        whole = fresh(model)
        model.export_to_anndata(whole)
        columns = [get.factors(whole).index.get_loc(name) for name in get.factors(part).index]
        np.testing.assert_allclose(part.obsm["X_ldvae"], whole.obsm["X_ldvae"][[4, 2]][:, columns], atol=1e-6)

    def test_loadings_and_decoder_follow_the_genes_of_the_target(self, model):
        turned = fresh(model)[:, ::-1].copy()
        model.export_to_anndata(turned, as_pca=True)
        decoder = get.decoder(turned)
        assert decoder.genes.tolist() == turned.var_names.tolist() == get.loadings(turned).index.tolist()
        by_hand = (
            turned.obsm["X_ldvae"] @ turned.varm["ldvae_loadings"].T
            + decoder.intercept_bg[turned.obs["batch"].cat.codes]
        )
        expected = model.get_normalized_expression(use_posterior_mean=True)[turned.var_names]
        np.testing.assert_allclose(softmax(by_hand, axis=1), expected, atol=1e-6)
        np.testing.assert_allclose(decoder.theta_bg[0], model.get_decoder().theta_bg[0][::-1])

    def test_a_pca_has_zeros_for_genes_that_the_model_lacks(self):
        full = counts(n_genes=30)
        model = untrained(full[:, :20].copy())
        model.export_to_anndata(full, as_pca=True)
        assert (full.varm["PCs"][20:] == 0).all()
        assert np.isfinite(full.varm["PCs"]).all()

    def test_no_cells_and_taken_names_are_errors(self, model):
        with pytest.raises(ValueError, match="no cells to export"):
            model.export_to_anndata(fresh(model)[:0].copy())
        adata = fresh(model)
        adata.var["highly_variable"] = True
        with pytest.raises(ValueError, match="exists and is no export's"):
            model.export_to_anndata(adata, key_added="highly_variable")
        with pytest.raises(ValueError, match="would replace scanpy's PCA"):
            model.export_to_anndata(adata, key_added="pca")
        model.export_to_anndata(adata, key_added="highly_variable", overwrite=True)
        model.export_to_anndata(adata)
        model.export_to_anndata(adata)

    def test_other_cells_in_a_layer_are_told_apart_without_an_x(self):
        adata = counts(n_batches=3)
        adata.layers["counts"] = adata.X.copy()
        LDVAE.setup_anndata(adata, "batch", layer="counts")
        model = LDVAE(adata, n_latent=2)
        model.is_trained_ = True
        other = counts(n_batches=3, seed=5)
        other.layers["counts"] = other.X
        del other.X
        model.export_to_anndata(other, order_by="network")
        model.export_to_anndata(order_by="network")
        assert not np.allclose(other.obsm["X_ldvae"], adata.obsm["X_ldvae"])

    def test_missing_genes_of_other_cells_are_an_error_and_nothing_is_written(self, model):
        other = counts(n_cells=30, n_batches=3)[:, :18].copy()
        other.obs_names = [f"new{i}" for i in range(30)]
        with pytest.raises(ValueError, match="lacks 2 of the 20 genes of the model: 'gene18', 'gene19'"):
            model.export_to_anndata(other)
        assert len(other.obsm) == len(other.uns) == len(other.varm) == 0

    def test_a_batch_that_the_model_has_not_seen_is_an_error(self, model):
        other = counts(n_cells=30, n_batches=3)
        other.obs_names = [f"new{i}" for i in range(30)]
        other.obs["batch"] = "unseen"
        with pytest.raises(
            ValueError, match=r"`batch_key`: the model has not seen 'unseen' in `adata.obs\['batch'\]`; it knows 'CD4"
        ):
            model.export_to_anndata(other)


class TestScanpy:
    @pytest.fixture
    def exported(self, model):
        adata = fresh(model)
        model.export_to_anndata(adata, as_pca=True)
        return adata

    @pytest.mark.slow
    def test_the_first_factors_make_a_neighbour_graph(self, exported):
        sc.pp.neighbors(exported, use_rep="X_ldvae", n_pcs=2, n_neighbors=5)
        graph = exported.obsp["distances"].toarray()
        alone = fresh_with(exported, exported.obsm["X_ldvae"][:, :2])
        sc.pp.neighbors(alone, use_rep="X", n_neighbors=5)
        np.testing.assert_allclose(graph, alone.obsp["distances"].toarray(), rtol=1e-5)

    def test_pca_plots_work_unmodified(self, exported):
        import matplotlib as mpl
        import matplotlib.pyplot as plt

        mpl.use("Agg")
        sc.pl.pca_loadings(exported, components="1,2", show=False)
        assert any(text.get_text() in exported.var_names for ax in plt.gcf().axes for text in ax.texts)
        sc.pl.pca_variance_ratio(exported, n_pcs=4, show=False)
        sc.pl.pca_overview(exported, color="batch", show=False)
        plt.close("all")
        np.testing.assert_array_equal(exported.obsm["X_pca"], exported.obsm["X_ldvae"])
        np.testing.assert_allclose(exported.uns["pca"]["variance_ratio"], get.factors(exported)["kl_share"])
        assert exported.uns["pca"]["params"]["variance_ratio"] == "share of KL"

    def test_a_pca_is_not_replaced_unasked(self, model):
        adata = fresh(model)
        adata.obsm["X_pca"] = np.zeros((adata.n_obs, 2))
        with pytest.raises(ValueError, match="'X_pca' would be replaced; `overwrite=True` does that"):
            model.export_to_anndata(adata, as_pca=True)
        assert "X_ldvae" not in adata.obsm
        model.export_to_anndata(adata, as_pca=True, overwrite=True)
        assert adata.obsm["X_pca"].shape == (120, 4)


def fresh_with(adata, matrix):
    return ad.AnnData(X=matrix, obs=adata.obs[[]].copy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order_by": "size"}, "`order_by` must be one of 'network', 'kl', 'mutual_information', .*; got 'size'"),
        ({"key_added": "a/b"}, "without '/'.*got 'a/b'"),
        ({"key_added": ""}, "non-empty"),
    ],
)
def test_bad_input_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.export_to_anndata(**arguments)


def test_a_model_without_data_asks_for_it(tmp_path, model):
    model.save(tmp_path / "m")
    bare = LDVAE.load(tmp_path / "m", adata=False)
    for method in (bare.export_to_anndata, bare.ablate, bare.get_latent_kl):
        with pytest.raises(ValueError, match="loaded without data: give `adata`"):
            method()
    adata = fresh(model)
    bare.export_to_anndata(adata)
    assert bare.adata is None, "it stays without"
    assert set(adata.uns) == {"ldvae"}
    assert [column for column in adata.obs if column.startswith("_scvi")] == []
    pd.testing.assert_frame_equal(bare.get_latent_kl(adata), model.get_latent_kl())
    np.testing.assert_allclose(get.factors(adata)["kl"], np.sort(model.get_latent_kl().mean())[::-1], rtol=1e-5)


def test_nothing_is_written_to_the_models_data_unless_asked(pbmc_trained):
    before = pbmc_trained.adata.copy()
    pbmc_trained.get_latent_kl()
    pbmc_trained.ablate(indices=[0])
    pbmc_trained.get_decoder()
    pbmc_trained.get_ablated_expression("Z_0", indices=[0])
    pbmc_trained.export_to_anndata(before)
    after = pbmc_trained.adata
    assert set(after.obsm) == set(after.varm) == set()
    assert set(after.uns) == {"_scvi_uuid", "_scvi_manager_uuid"}


def test_a_column_of_obs_that_is_no_library_size_is_kept():
    model = untrained(counts(), use_observed_lib_size=True)
    model.adata.obs["ldvae_library"] = "mine"
    with pytest.raises(ValueError, match=r"`adata.obs\['ldvae_library'\]` exists and is no library size"):
        model.export_to_anndata()
    assert "ldvae" not in model.adata.uns
    model.export_to_anndata(overwrite=True)
    np.testing.assert_allclose(model.adata.obs["ldvae_library"], model.adata.X.toarray().sum(axis=1), rtol=1e-6)


def test_what_the_tools_need_is_exported():
    adata = counts(n_batches=3)
    model = untrained(adata, latent_distribution="ln", use_observed_lib_size=True)
    model.export_to_anndata()
    mean, _ = model.get_latent_representation(return_dist=True)
    order = adata.uns["ldvae"]["order"]
    np.testing.assert_allclose(adata.obsm["X_ldvae_u"], mean[:, order], atol=1e-6 * np.abs(mean).max())
    np.testing.assert_allclose(adata.obs["ldvae_library"], adata.X.toarray().sum(axis=1), rtol=1e-6)
    assert adata.uns["ldvae"]["setup"] == {"batch_key": "batch"}
