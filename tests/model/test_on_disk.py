"""Training and reading of cells whose counts are on disk."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pytest
import scvi
import torch
from scipy import sparse
from scvi.model import LinearSCVI

from ldvae_ext import tl
from ldvae_ext.backends.loader import CountsLoader
from ldvae_ext.core import rows
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

N = 300


def written(folder, kind="csr"):
    adata = counts(N, 12, n_batches=3)
    if kind == "dense":
        adata.X = adata.X.toarray()
    elif kind == "csc":
        adata.X = sparse.csc_matrix(adata.X)
    adata.write_h5ad(folder / "cells.h5ad")
    return ad.read_h5ad(folder / "cells.h5ad"), ad.read_h5ad(folder / "cells.h5ad", backed="r")


def trained(adata, cls=LDVAE, epochs=2, **options):
    cls.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    model = cls(adata, n_latent=3)
    scvi.settings.seed = 0
    plan = {"n_epochs_kl_warmup": 1}
    model.train(epochs, batch_size=50, train_size=0.8, check_val_every_n_epoch=1, plan_kwargs=plan, **TRAIN, **options)
    return model


@pytest.fixture(autouse=True)
def _small_window(monkeypatch):
    """A few minibatches are read ahead, not all cells."""
    monkeypatch.setattr(rows, "READ_AHEAD_BYTES", 12_000)


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_training_from_a_file_is_that_of_linear_scvi(tmp_path, kind):
    _, backed = written(tmp_path, kind)
    ours, theirs = trained(backed), trained(backed.copy(tmp_path / "copy.h5ad"), LinearSCVI)
    assert ours.trainer.lightning_module._backend.name == "numba"
    for name, history in theirs.history.items():
        np.testing.assert_allclose(ours.history[name].astype(float), history.astype(float), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(ours.module.get_loadings(), theirs.module.get_loadings(), rtol=1e-3, atol=1e-4)


def test_minibatches_from_a_file_are_those_in_memory(tmp_path):
    in_memory, backed = written(tmp_path)
    for adata in (in_memory, backed):
        LDVAE.setup_anndata(adata, batch_key="batch")
    order = np.random.default_rng(0).permutation(N)[:210]
    both = []
    for adata in (in_memory, backed):
        torch.manual_seed(0)
        loader = CountsLoader(LDVAE(adata).adata_manager, order, batch_size=16, shuffle=True)
        both.append([batch for _ in range(2) for batch in loader])
    for one, other in zip(*both, strict=True):
        assert list(one) == list(other)
        np.testing.assert_array_equal(one["X"].to_dense(), other["X"].to_dense())
        np.testing.assert_array_equal(one["batch"], other["batch"])


@pytest.mark.parametrize("indices", [None, np.random.default_rng(0).permutation(N)[:70]], ids=["all", "some"])
def test_results_from_a_file_are_those_in_memory_in_the_order_that_was_asked_for(tmp_path, indices):
    in_memory, backed = written(tmp_path)
    model = trained(in_memory)
    LDVAE.setup_anndata(backed, batch_key="batch")
    model.save(tmp_path / "model")
    on_disk = LDVAE.load(tmp_path / "model", adata=backed)
    for read in (
        lambda m: m.get_latent_representation(indices=indices),
        lambda m: m.get_latent_kl(indices=indices).to_numpy(),
        lambda m: m.ablate(indices=indices).X,
        lambda m: m.get_normalized_expression(indices=indices, return_numpy=True, n_samples=1),
        lambda m: m.get_normalized_expression(indices=indices, return_numpy=True, n_samples=3),
        lambda m: m.get_latent_library_size(indices=indices),
        lambda m: m.posterior_predictive_sample(indices=indices).todense(),
        lambda m: m.get_explained_deviance(indices=indices)["cumulative"].to_numpy(),
    ):
        results = []
        for one in (model, on_disk):
            scvi.settings.seed = 0
            results.append(read(one))
        np.testing.assert_array_equal(*results)


def test_export_of_cells_in_a_file_is_that_in_memory(tmp_path):
    in_memory, backed = written(tmp_path)
    model = trained(in_memory)
    model.export_to_anndata()
    on_disk = LDVAE.load(str(_saved(model, tmp_path)), adata=backed)
    on_disk.export_to_anndata()
    for name in ("X_ldvae", "X_ldvae_var"):
        np.testing.assert_array_equal(backed.obsm[name], in_memory.obsm[name])
    np.testing.assert_array_equal(backed.varm["ldvae_scores"], in_memory.varm["ldvae_scores"])


def test_a_file_of_columns_is_refused_with_the_way_out(tmp_path):
    _, backed = written(tmp_path, "csc")
    LDVAE.setup_anndata(backed, batch_key="batch")
    with pytest.raises(ValueError, match=r"CSC matrix on disk.*tocsr"):
        LDVAE(backed, n_latent=3).train(1, **TRAIN)


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_genes_in_another_order_are_read_from_the_file(tmp_path, kind):
    in_memory, backed = written(tmp_path, kind)
    model = trained(in_memory)
    in_memory[:, ::-1].copy().write_h5ad(tmp_path / "reversed.h5ad")
    other = ad.read_h5ad(tmp_path / "reversed.h5ad", backed="r")
    np.testing.assert_array_equal(model.get_latent_kl(other), model.get_latent_kl(backed))
    np.testing.assert_array_equal(model.get_latent_kl(other), model.get_latent_kl())


def test_workers_do_not_change_the_order_of_cells(tmp_path, monkeypatch):
    _, backed = written(tmp_path)
    model = trained(backed)
    order = np.random.default_rng(0).permutation(N)[:70]
    expected = model.get_latent_kl().to_numpy()[order]
    monkeypatch.setattr(scvi.settings, "dl_num_workers", 1)
    np.testing.assert_allclose(model.get_latent_kl(indices=order), expected, rtol=1e-5)
    assert model.get_latent_representation(indices=order).shape == (70, 3)
    with pytest.raises(ValueError, match="loader that takes no options; got pin_memory"):
        model.get_latent_library_size(indices=order, pin_memory=False)


def test_a_damaged_file_is_named(tmp_path):
    in_memory, _ = written(tmp_path)
    model = trained(in_memory)
    model.export_to_anndata()
    in_memory.write_h5ad(tmp_path / "export.h5ad")
    with h5py.File(tmp_path / "export.h5ad", "r+") as file:
        file["X/indices"][5] = 200_000
    damaged = ad.read_h5ad(tmp_path / "export.h5ad", backed="r")
    for read in (lambda: LDVAE.setup_anndata(damaged), lambda: model.ablate(damaged), lambda: tl.ablate(damaged)):
        with pytest.raises(ValueError, match="columns of its counts must be 0 to 11; got 0 to 200000"):
            read()


def _saved(model, folder):
    model.save(folder / "model")
    return folder / "model"
