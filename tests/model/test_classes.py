"""LinearSCVI's models in LDVAE and the other way round, whatever options they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from tests.datamodule import CountsDataModule
from tests.helpers import TRAIN, counts

IGNORED = [
    {"use_layer_norm": "encoder"},
    {"use_layer_norm": "both"},
    {"var_activation": torch.nn.functional.softplus},
    {"extra_encoder_kwargs": {"activation_fn": torch.nn.Tanh}},
    {"encode_covariates": True},
    {"n_labels": 2},
    {"n_continuous_cov": 2},
    {"use_batch_norm": "none"},
    {"use_batch_norm": None, "bias": None},
]


def trained(cls, adata, **options):
    cls.setup_anndata(adata, batch_key="batch")
    model = cls(adata, n_latent=3, n_hidden=16, **options)
    model.train(2, **TRAIN)
    return model


def same_posterior(first, second):
    for one, other in zip(
        first.get_latent_representation(return_dist=True),
        second.get_latent_representation(return_dist=True),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", IGNORED, ids=str)
def test_options_that_linear_scvi_ignores_stay_ignored(options, tmp_path):
    adata = counts(n_batches=3)
    old = trained(LinearSCVI, adata, **options)
    old.save(str(tmp_path / "old"))
    same_posterior(old, LDVAE.from_linear_scvi(old))
    loaded = LDVAE.load(str(tmp_path / "old"), adata, accelerator="cpu")
    same_posterior(old, loaded)
    loaded.save(str(tmp_path / "new"))
    same_posterior(old, LDVAE.load(str(tmp_path / "new"), adata, accelerator="cpu"))


@pytest.mark.filterwarnings("ignore:Training ended with a KL weight")
@pytest.mark.parametrize(
    "options",
    [
        {"use_batch_norm": "both"},
        {"use_batch_norm": "encoder", "bias": True},
        {"bias": "auto"},
        {"bias": "auto", "use_batch_norm": False},
    ],
    ids=str,
)
def test_what_linear_scvi_has_is_saved_in_its_words(options, tmp_path):
    adata = counts(n_batches=3)
    new = trained(LDVAE, adata, **options)
    new.save(str(tmp_path / "new"))
    LinearSCVI.setup_anndata(adata, batch_key="batch")
    old = LinearSCVI.load(str(tmp_path / "new"), adata, accelerator="cpu", allowed_classes_names_list=["LDVAE"])
    same_posterior(old, new)
    np.testing.assert_array_equal(old.get_loadings(), new.get_loadings())


def test_parameters_of_another_network_do_not_open_in_silence():
    adata = counts(n_batches=3)
    LDVAE.setup_anndata(adata, batch_key="batch")
    full = LDVAE(adata).module.state_dict()
    with pytest.raises(RuntimeError, match=r"This network has no 'decoder.factor_regressor.*saved with other options"):
        LDVAE(adata, use_batch_norm="none", bias=True).module.load_state_dict(full)


@pytest.mark.filterwarnings("ignore:Training ended with a KL weight")
def test_minibatches_without_codes_are_not_taken_for_the_first_batch():
    adata = counts(n_batches=3)
    model = trained(LDVAE, adata)
    loader = [{**tensors, "batch": None} for tensors in model._make_data_loader(adata)]
    with pytest.raises(ValueError, match="no 'batch' codes; the model knows 3"):
        model.ablate(dataloader=loader)
    with pytest.raises(ValueError, match="no batch codes; the model has 3 batches"):
        model.posterior_predictive_sample(dataloader=loader)
    with pytest.raises(ValueError, match="`dataloader` is for a model without an AnnData"):
        model.differential_abundance(sample_key="batch", dataloader=loader)


@pytest.mark.filterwarnings("ignore:Training ended with a KL weight")
def test_other_cells_of_a_recalibration_are_named():
    adata = counts(n_batches=3)
    model = trained(LDVAE, adata)
    with pytest.raises(ValueError, match="`indices` and `validation_indices` are needed"):
        model.recalibrate_batch_norm(counts(90, n_batches=3))
    assert model.batch_norm_initial_share > 0.5
    if model.recalibrate_batch_norm()["kept"]:
        assert model.batch_norm_initial_share == 0


@pytest.mark.filterwarnings("ignore:Category 2 in .* has fewer than 3 cells")
def test_a_batch_of_one_cell_gets_the_prior_that_it_has_in_an_anndata():
    adata = counts(n_batches=3)
    adata = adata[(adata.obs["batch"] != "b2").to_numpy() | (np.cumsum(adata.obs["batch"] == "b2") == 1)].copy()
    LDVAE.setup_anndata(adata, batch_key="batch")
    own = LDVAE(adata).module
    streamed = LDVAE(datamodule=CountsDataModule(adata, batch_key="batch")).module
    torch.testing.assert_close(streamed.library_log_means, own.library_log_means)
    torch.testing.assert_close(streamed.library_log_vars, own.library_log_vars)
    assert (own.library_log_vars > 0).all()
