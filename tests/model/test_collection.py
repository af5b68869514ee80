"""Cells of an annbatch collection on disk, and of an AnnData that is read lazily."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from ldvae_ext import get, tl
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

pytest.importorskip("annbatch", reason="counts on disk need the extra `large`")
zarr = pytest.importorskip("zarr")

# scvi-tools uses options of anndata and annbatch that are about to go; annbatch writes what other readers of zarr may not read.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part"),
]

SETUP = {
    "batch_key": "batch",
    "labels_key": "kind",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
}
READING = {"batch_size": 32, "chunk_size": 16, "preload_nchunks": 8, "preload_to_gpu": False}


def cells(n=240):
    adata = counts(n, 15, n_batches=3)
    rng = np.random.default_rng(1)
    adata.obs["kind"] = pd.Categorical(rng.choice(["B", "NK/T"], n))
    adata.obs["donor"] = pd.Categorical(rng.choice(["d1", "d2", "d10"], n))
    adata.obs["age"] = rng.normal(size=n).astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files with all cells, and the collection made of them."""
    path = tmp_path_factory.mktemp("collection")
    adata = cells()
    adata[:100].write_h5ad(path / "a.h5ad")
    adata[100:].write_h5ad(path / "b.h5ad")
    LDVAE.setup_annbatch(path / "cells.zarr", [path / "a.h5ad", path / "b.h5ad"], **SETUP, **READING)
    return path


def opened(folder, **options):
    return LDVAE.setup_annbatch(folder / "cells.zarr", rebuild=False, **{**SETUP, **READING, **options})


def trained(datamodule, backend="auto", **options):
    scvi.settings.seed = 0
    model = LDVAE(registry=datamodule.registry, n_latent=3)
    model.train(
        datamodule=datamodule,
        max_epochs=2,
        kl_warmup=1,
        backend=backend,
        batch_size=32,
        check_val_every_n_epoch=1,
        **{"train_size": 0.8, "shuffle_set_split": False, **TRAIN, **options},
    )
    return model


@pytest.fixture(scope="module")
def model(folder):
    return trained(opened(folder))


def test_its_cells_are_those_of_the_files(folder):
    adata, found = cells(), opened(folder).adata
    assert sorted(found.obs_names) == sorted(adata.obs_names)
    np.testing.assert_array_equal(found.X.compute().toarray(), adata[found.obs_names].X.toarray())
    for name in adata.obs:
        assert found.obs[name].tolist() == adata.obs.loc[found.obs_names, name].tolist()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # of scvi-tools
@pytest.mark.parametrize("setup", [SETUP, {}, {"labels_key": "kind"}], ids=["all", "none", "labels"])
def test_sparse_minibatches_are_those_of_scvi_tools(folder, setup):
    datamodule = LDVAE.setup_annbatch(folder / "cells.zarr", rebuild=False, **setup, **READING)
    datamodule.set_split(0.8, shuffle_set_split=False, batch_size=32)
    raw = list(datamodule.train_dataloader())
    datamodule._is_sparse = True
    sparse = list(datamodule.train_dataloader())
    datamodule._is_sparse = False
    assert len(raw) == len(sparse) == len(datamodule.train_dataloader())
    for one, other in zip(raw, sparse, strict=True):
        expected = datamodule.on_before_batch_transfer(one, 0)
        assert other["X"].layout is torch.sparse_csr
        torch.testing.assert_close(other["X"].to_dense(), expected["X"], rtol=0, atol=0)
        assert datamodule.on_before_batch_transfer(other, 0) is other
        for name in other.keys() - {"X"}:
            torch.testing.assert_close(other[name], expected[name].to(other[name].dtype), rtol=0, atol=0)
        assert other.keys() >= {name for name in expected if name.startswith("extra") or name in ("batch", "labels")}


def test_training_by_the_compiled_step_is_that_of_scvi_tools(folder):
    ours, theirs = trained(opened(folder)), trained(opened(folder), "scvi")
    assert ours.trainer.lightning_module._backend.name == "numba"
    for name, history in theirs.history.items():
        np.testing.assert_allclose(ours.history[name].astype(float), history.astype(float), rtol=1e-4, err_msg=name)


def test_the_prior_of_the_library_is_that_of_the_cells_in_memory(model):
    adata = cells()
    LDVAE.setup_anndata(adata, batch_key="batch")
    expected = LDVAE(adata).module
    order = np.argsort(
        sorted(adata.obs["batch"].cat.categories)
    )  # codes of a data module are in the order of the names
    names = adata.obs["batch"].cat.categories
    at = [sorted(names).index(name) for name in names]
    assert len(order) == 3
    for name in ("library_log_means", "library_log_vars"):
        np.testing.assert_allclose(getattr(model.module, name)[0, at], getattr(expected, name)[0], rtol=1e-5)


METHODS = {
    "ablate": lambda m, c: m.ablate(c).X,
    "ablate in groups": lambda m, c: m.ablate(c, mode="group_mean", groupby="kind").X,
    "ablate_genes": lambda m, c: m.ablate_genes("kind", c).X,
    "get_latent_kl": lambda m, c: m.get_latent_kl(c).to_numpy(),
    "get_explained_deviance": lambda m, c: m.get_explained_deviance("kind", c)["cumulative"].to_numpy(),
    "get_factor_stats": lambda m, c: m.get_factor_stats("kind", c).factors.iloc[:, 3:].to_numpy(float),
    "get_population_loadings": lambda m, c: m.get_population_loadings("kind", "path", c)["NK/T"].to_numpy(),
    "get_population_expression": lambda m, c: m.get_population_expression("kind", c).to_numpy(),
    "get_refined_posterior": lambda m, c: m.get_refined_posterior(c).mean.to_numpy(),
    "get_latent_representation": lambda m, c: m.get_latent_representation(c),
    "get_normalized_expression": lambda m, c: m.get_normalized_expression(
        c, use_posterior_mean=True, return_numpy=True
    ),
    "some cells": lambda m, c: m.get_latent_representation(c, indices=[7, 3, 200]),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_the_data_module_in_place_of_an_anndata(folder, model, method):
    datamodule = opened(folder)
    in_memory = cells()[datamodule.adata.obs_names].copy()
    lazy = ad.AnnData(datamodule.adata.X, obs=in_memory.obs, var=in_memory.var)
    expected = METHODS[method](model, in_memory)
    assert np.isfinite(expected).all()
    for given in (datamodule, lazy):
        np.testing.assert_allclose(METHODS[method](model, given), expected, rtol=1e-6, atol=1e-6)


def test_a_data_module_is_a_data_loader_too(folder, model):
    datamodule = opened(folder)
    expected = model.ablate(datamodule).X
    for loader in (datamodule, datamodule.inference_dataloader()):
        np.testing.assert_allclose(model.ablate(dataloader=loader).X, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="A data module of `setup_annbatch` is given as `adata`"):
        model.ablate(dataloader=datamodule, groupby="kind")


@pytest.mark.parametrize("written", ["h5ad", "zarr"])
def test_a_lazily_read_anndata_is_read_as_one_in_memory(tmp_path, written):
    adata = cells()
    LDVAE.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=3)
    model.train(2, plan_kwargs={"n_epochs_kl_warmup": 1}, **TRAIN)
    model.export_to_anndata()
    path = tmp_path / f"cells.{written}"
    getattr(adata, f"write_{written}")(path)
    lazy = ad.experimental.read_lazy(path)
    other = lazy[:, ::-1]
    np.testing.assert_allclose(model.ablate(other).X, model.ablate().X, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(model.get_latent_representation(lazy), model.get_latent_representation())
    np.testing.assert_allclose(tl.ablate(lazy).X, tl.ablate(adata).X, rtol=1e-6, atol=1e-6)
    for read in (
        lambda cells: tl.ablate_genes(cells, "kind").X,
        lambda cells: tl.population_loadings(cells, "kind", copy=True).varm["ldvae_population_loadings"],
    ):
        np.testing.assert_allclose(read(lazy), read(adata), rtol=1e-6, atol=1e-6)


def test_the_export_of_a_collection_is_written_while_it_is_computed(tmp_path, folder, model):
    datamodule = opened(folder)
    in_memory = cells()[datamodule.adata.obs_names].copy()
    model.export_to_anndata(in_memory)
    stored = model.export_to_anndata(datamodule, store=tmp_path / "export.zarr")
    read = ad.read_zarr(tmp_path / "export.zarr")
    assert not isinstance(stored.obsm["X_ldvae"], np.ndarray)
    for found in (stored, read):
        np.testing.assert_allclose(np.asarray(found.obsm["X_ldvae"]), in_memory.obsm["X_ldvae"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.varm["ldvae_scores"], in_memory.varm["ldvae_scores"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.obs["ldvae_library"], in_memory.obs["ldvae_library"], rtol=1e-5)
        assert found.obs["kind"].tolist() == in_memory.obs["kind"].tolist()
        pd.testing.assert_frame_equal(get.factors(found), get.factors(in_memory), rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["export.zarr"]


def test_an_ablation_is_written_while_it_is_computed(tmp_path, folder, model):
    datamodule = opened(folder)
    expected = model.ablate(datamodule)
    stored = model.ablate(datamodule, store=tmp_path / "effects.zarr")
    read = ad.read_zarr(tmp_path / "effects.zarr")
    for found in (stored, read):
        np.testing.assert_array_equal(np.asarray(found.X), expected.X)
        pd.testing.assert_frame_equal(get.ablation_df(found, "kind"), get.ablation_df(expected, "kind"))
    adata = cells()
    model.export_to_anndata(adata)
    from_export = tl.ablate(adata, store=tmp_path / "of export.zarr")
    np.testing.assert_array_equal(np.asarray(from_export.X), tl.ablate(adata).X)
    some = tl.ablate(adata, indices=[], store=tmp_path / "none.zarr")
    assert some.shape == (0, 3)


def test_nothing_is_left_of_a_result_that_was_not_completed(tmp_path, folder, model, monkeypatch):
    from ldvae_ext.core.plan import AblationPlan

    def fails(*args):
        raise RuntimeError

    monkeypatch.setattr(AblationPlan, "effects", fails)
    with pytest.raises(RuntimeError):
        model.ablate(opened(folder), store=tmp_path / "effects.zarr")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("there", FileExistsError, "`store`: .* exists; remove it"),
        ("no folder/x.zarr", FileNotFoundError, "`store`: there is no folder"),
        (3, TypeError, "`store` must be the path of a folder; got 3"),
    ],
)
def test_a_store_is_checked_before_any_work(tmp_path, folder, model, path, error, message):
    (tmp_path / "there").mkdir()
    for write in (model.ablate, model.export_to_anndata):
        with pytest.raises(error, match=message):
            write(opened(folder), store=path if path == 3 else tmp_path / path)
    assert list((tmp_path / "there").iterdir()) == []


def test_the_setting_of_zarr_is_as_it_was(folder):
    before = zarr.config.get("codec_pipeline.path")
    opened(folder)
    assert zarr.config.get("codec_pipeline.path") == before


@pytest.mark.filterwarnings("ignore:Trying to modify attribute `.obs` of view")  # of annbatch
def test_genes_are_those_of_the_columns_of_the_collection(tmp_path):
    adata = cells()
    adata[:100, [0, 1, 2, 10, 11, 3]].copy().write_h5ad(tmp_path / "a.h5ad")
    adata[100:, [3, 2, 1, 0, 11]].copy().write_h5ad(tmp_path / "b.h5ad")
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    joined = ad.concat([ad.read_h5ad(path) for path in paths], join="outer", fill_value=0)
    for at, options in enumerate(({}, {"var_subset": ["gene11", "gene1", "gene3"]})):
        datamodule = LDVAE.setup_annbatch(tmp_path / f"{at}.zarr", paths, **READING, **options)
        model = LDVAE(registry=datamodule.registry, n_latent=2)
        names = model.get_var_names().tolist()
        assert names == datamodule.adata.var_names.tolist()
        expected = joined.to_df().sum()
        np.testing.assert_array_equal(np.asarray(datamodule.adata.X.compute().sum(axis=0)).ravel(), expected[names])


def test_counts_of_a_layer_train_and_are_read(tmp_path):
    adata = cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "a.h5ad")
    datamodule = LDVAE.setup_annbatch(tmp_path / "a.zarr", [tmp_path / "a.h5ad"], layer="counts", **READING)
    model = trained(datamodule)
    np.testing.assert_allclose(
        model.ablate(datamodule).X, model.ablate(adata[datamodule.adata.obs_names].copy()).X, rtol=1e-6, atol=1e-6
    )


def test_the_intercept_starts_at_the_share_of_each_gene_in_all_counts(folder):
    datamodule, adata = opened(folder), cells()
    model = LDVAE(datamodule=datamodule, n_latent=3, use_batch_norm="encoder", bias="auto")
    total_g = np.asarray(adata[:, model.get_var_names()].X.sum(axis=0)).ravel() + 0.5
    expected = np.log(total_g / total_g.sum())
    found = model.module.decoder.factor_regressor.fc_layers[0][0].bias.detach().numpy()
    np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=1e-4)


def test_cells_and_a_data_loader_are_not_given_together(folder, model):
    datamodule = opened(folder)
    with pytest.raises(ValueError, match="Only one of `adata` or `dataloader`"):
        model.get_latent_kl(datamodule, dataloader=datamodule.inference_dataloader())


def test_a_level_that_the_model_has_not_seen_is_an_error(folder, model):
    adata = cells()
    adata.obs["donor"] = "d99"
    with pytest.raises(ValueError, match="the model has not seen 'd99'"):
        model.ablate(adata)
    from ldvae_ext.model._columns import Columns

    with pytest.raises(ValueError, match="`donor`: the model has not seen 'd99'; it has"):
        Columns(model.registry).of(adata.obs, adata.n_obs)


def test_methods_that_register_cells_say_that_they_need_an_anndata(folder, model):
    datamodule = opened(folder)
    for call in (
        lambda: model.differential_expression(datamodule, groupby="kind"),
        lambda: model.differential_abundance(datamodule, sample_key="kind"),
    ):
        with pytest.raises(ValueError, match="needs a model that was set up with an AnnData"):
            call()
    assert len(model.get_programs(n_programs=2, adata=datamodule).profiles) == 15


def test_a_collection_is_checked_once(folder, model, monkeypatch):
    from ldvae_ext.model import _cells

    datamodule, seen = opened(folder), []
    check = _cells.check_counts
    monkeypatch.setattr(_cells, "check_counts", lambda *args, **kwargs: seen.append(1) or check(*args, **kwargs))
    for _ in range(3):
        model.get_latent_kl(datamodule, indices=[3])
    assert len(seen) == 1
    for _ in range(2):
        model.get_latent_kl(cells())
    assert len(seen) == 3


def test_a_column_that_cannot_be_written_is_named_before_any_work(tmp_path, model, monkeypatch):
    from ldvae_ext.core.plan import AblationPlan

    monkeypatch.setattr(AblationPlan, "effects", lambda *_: pytest.fail("has begun"))
    adata = cells()
    adata.obs["a/b"] = 1
    for write in (model.ablate, model.export_to_anndata):
        with pytest.raises(ValueError, match="'a/b' with a slash"):
            write(adata, store=tmp_path / "x.zarr")


def test_an_earlier_export_is_no_obstacle(tmp_path, model):
    adata = cells()
    model.export_to_anndata(adata)
    model.export_to_anndata(adata, store=tmp_path / "x.zarr")
    np.testing.assert_array_equal(ad.read_zarr(tmp_path / "x.zarr").obsm["X_ldvae"], adata.obsm["X_ldvae"])


def test_a_model_of_a_collection_is_saved_and_reads_the_collection_again(tmp_path, folder, model):
    model.save(tmp_path / "model")
    for options in ({}, {"trusted": False}):
        loaded = LDVAE.load(tmp_path / "model", adata=False, **options)
        np.testing.assert_array_equal(loaded.get_latent_kl(opened(folder)), model.get_latent_kl(opened(folder)))
    untrained = LDVAE(registry=opened(folder).registry, n_latent=3)
    with pytest.raises(ValueError, match="give `datamodule`"):
        untrained.save(tmp_path / "other")
