"""What scvi-tools' own tests ask of LinearSCVI and SCVI, asked of LDVAE."""

from __future__ import annotations

import inspect
from unittest import mock

import anndata as ad
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from scipy import sparse
from scvi.data import synthetic_iid
from scvi.dataloaders import DataSplitter
from scvi.module._constants import MODULE_KEYS

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN

QUICK = {**TRAIN, "kl_warmup": 1}
pytestmark = pytest.mark.filterwarnings("ignore:Training ended with a KL weight of 0.00")  # of a single epoch


def data(**kwargs):
    return synthetic_iid(batch_size=40, n_genes=20, **kwargs)


@pytest.fixture
def model():
    adata = data()
    LDVAE.setup_anndata(adata, batch_key="batch", labels_key="labels")
    model = LDVAE(adata, n_latent=5, gene_likelihood="zinb", var_activation=torch.nn.Softplus())
    model.train(1, check_val_every_n_epoch=1, train_size=0.5, **QUICK)
    return model


def test_parts_have_their_names(model):
    assert LDVAE._module_cls.__name__ == "LDVAEModule"
    assert model.module.z_encoder.encoder.fc_layers[0][0].weight.shape == (128, 20)
    assert model.module.l_encoder.mean_encoder.weight.shape == (1, 128)
    assert model.module.px_r.shape == (20,)
    assert model.module.decoder.factor_regressor.fc_layers[0][0].weight.shape == (20, 7)
    assert model.module.decoder.px_dropout_decoder.fc_layers[0][0].weight.shape == (20, 7)


def test_getters_take_other_cells_views_and_copies(model):
    other = data()
    with pytest.raises(ValueError, match="not setup with LDVAE"):
        model.view_anndata_setup(adata=other)
    for adata in (other, other[:60], model.adata.copy()):
        assert np.isfinite(float(model.get_elbo(adata)))
    assert model.get_marginal_ll(other, n_mc_samples=3, return_mean=False).shape == (80,)
    assert model.get_latent_representation(other, indices=[1, 2, 3]).shape == (3, 5)
    for batch in ("batch_1", ["batch_0", "batch_1"]):
        assert model.get_normalized_expression(other, indices=[1, 2], transform_batch=batch).shape == (2, 20)
    sample = model.posterior_predictive_sample(other, indices=[1, 2], gene_list=["gene_1", "gene_2"], n_samples=3)
    assert sample.shape == (2, 2, 3)
    parameters = model.get_likelihood_parameters(other, indices=[1, 2], n_samples=3, give_mean=True)
    assert parameters["mean"].shape == parameters["dropout"].shape == (2, 20)
    assert model.get_latent_library_size(other, indices=[1, 2]).shape == (2, 1)
    model.get_feature_correlation_matrix(other, indices=[1, 2, 3], transform_batch=["batch_0", "batch_1"])
    model.view_anndata_setup(adata=other)


def test_unknown_labels_are_refused(model):
    other = data()
    other.obs["labels"] = other.obs["labels"].cat.rename_categories(["a", "b", "c"])
    with pytest.raises(ValueError, match="`labels_key`: the model has not seen 'b', 'c', 'a'"):
        model.get_elbo(other)


def test_another_adata_can_take_the_place_of_the_models(model):
    other = data()
    model.adata = other
    assert model.get_latent_representation().shape == (80, 5)
    nameless = data()
    del nameless.obs["batch"]
    with pytest.raises(KeyError, match="batch"):
        model.adata = nameless


@pytest.mark.parametrize(
    "groups",
    [{"groupby": "labels"}, {"idx1": [0, 1, 2], "idx2": [3, 4, 5]}, {"idx1": [0, 1, 2], "weights": "importance"}],
    ids=str,
)
def test_differential_expression_by_group_or_index(model, groups):
    with np.errstate(all="ignore"):
        assert len(model.differential_expression(silent=True, **groups)) >= 20


def test_batches_may_be_numbers():
    adata = data()
    adata.obs["batch"] = (np.arange(80) < 30).astype(float)
    LDVAE.setup_anndata(adata, batch_key="batch")
    model = LDVAE(adata, n_latent=3)
    model.train(1, **QUICK)
    one = model.get_normalized_expression(transform_batch=1, use_posterior_mean=True)
    both = model.get_normalized_expression(transform_batch=[0, 1], use_posterior_mean=True)
    zero = model.get_normalized_expression(transform_batch=0, use_posterior_mean=True)
    np.testing.assert_allclose(both, (one + zero) / 2, rtol=1e-5)
    model.get_normalized_expression(transform_batch=[0, 1])


def test_dispersion_of_each_cell_has_likelihood_parameters():
    adata = data()
    LDVAE.setup_anndata(adata, batch_key="batch")
    model = LDVAE(adata, dispersion="gene-cell", n_latent=3)
    assert model.get_likelihood_parameters(indices=np.arange(10))["dispersions"].shape == (10, 20)
    assert model.get_likelihood_parameters(n_samples=4)["dispersions"].shape == (4, 80, 20)


def test_callbacks_see_the_learning_rate():
    adata = data()
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata)
    model.train(
        3,
        callbacks=[LearningRateMonitor()],
        check_val_every_n_epoch=1,
        log_every_n_steps=1,
        plan_kwargs={"reduce_lr_on_plateau": True},
        **QUICK,
    )
    assert "lr-Adam" in model.history


@pytest.mark.parametrize("kind", ["dense", "csr", "csc"])
def test_backed_data(tmp_path, kind):
    adata = data()
    if kind != "dense":
        adata.X = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[kind](adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r+")
    LDVAE.setup_anndata(backed, batch_key="batch")
    model = LDVAE(backed, n_latent=5)
    if kind == "csc":  # scvi-tools' loader cannot read rows of a column-wise file
        return
    model.train(1, train_size=0.5, **QUICK)
    assert model.get_latent_representation().shape == (80, 5)
    assert np.isfinite(float(model.get_elbo()))
    assert model.ablate().shape == (80, 5)


@pytest.mark.parametrize("encode_covariates", [True, False])
@pytest.mark.parametrize("use_observed_lib_size", [True, False])
def test_batch_embeddings(tmp_path, encode_covariates, use_observed_lib_size):
    adata = data(n_batches=3)
    LDVAE.setup_anndata(adata, batch_key="batch")
    model = LDVAE(
        adata,
        batch_representation="embedding",
        encode_covariates=encode_covariates,
        use_observed_lib_size=use_observed_lib_size,
        batch_embedding_kwargs={"embedding_dim": 4},
    )
    model.train(1, **QUICK)
    representation = model.get_batch_representation()
    assert representation.shape == (120, 4)
    model.save(str(tmp_path / "m"))
    again = LDVAE.load(str(tmp_path / "m"), adata, accelerator="cpu")
    np.testing.assert_allclose(again.get_batch_representation(), representation)
    with pytest.raises(KeyError):
        again.module.init_embedding("batch", 3)
    again.module.remove_embedding("batch")
    with pytest.raises(KeyError):
        again.get_batch_representation()


def test_a_network_that_waits_for_a_data_module():
    adata = data(n_batches=3)
    LDVAE.setup_anndata(adata, batch_key="batch")
    datamodule = DataSplitter(LDVAE._get_most_recent_anndata_manager(adata), batch_size=32)
    datamodule.n_vars, datamodule.n_batch = adata.n_vars, 3
    with pytest.warns(UserWarning, match="built when `train"):
        model = LDVAE(n_latent=5, gene_likelihood="zinb")
    assert model._module_init_on_train
    assert model.module is None
    with pytest.raises(ValueError, match="`max_epochs` is needed"):
        model.train(datamodule=datamodule)
    with pytest.raises(ValueError, match="give `datamodule`"):
        model.train()
    model.train(1, datamodule=datamodule, **QUICK)
    assert model.module.n_latent == 5
    assert model.module.gene_likelihood == "zinb"
    own = LDVAE(adata, n_latent=5).module
    torch.testing.assert_close(model.module.library_log_means, own.library_log_means)
    torch.testing.assert_close(model.module.library_log_vars, own.library_log_vars, rtol=1e-4, atol=1e-6)
    assert model.get_decoder().scale(np.eye(5), 2).shape == (5, 20)


def test_modules_that_answer_in_scvi_tools_old_words(model):
    network = model.module
    model.module = mock.Mock(wraps=network)

    def inference(*args, **kwargs):
        out = network.inference(*args, **kwargs)
        qz = out.pop(MODULE_KEYS.QZ_KEY)
        return {**out, MODULE_KEYS.QZM_KEY: qz.loc, MODULE_KEYS.QZV_KEY: qz.scale**2}

    def forward(*args, **kwargs):
        out, decoded = network.forward(*args, **kwargs)
        px = decoded.pop(MODULE_KEYS.PX_KEY)
        return out, {**decoded, "px_scale": px.scale, "px_r": px.theta}

    model.module.inference.side_effect = inference
    assert model.get_latent_representation().shape == (80, 5)
    model.module.forward.side_effect = forward
    model.module.generative.__signature__ = inspect.signature(network.generative)
    assert model.get_feature_correlation_matrix().shape == (20, 20)
