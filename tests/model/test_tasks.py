"""scVI's tasks, in the configurations that scvi-tools has no linear model for."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import stats
from scvi.criticism import PosteriorPredictiveCheck
from sklearn.covariance import EllipticEnvelope

from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

EVERYTHING = [
    {"gene_likelihood": "nb"},
    {"gene_likelihood": "zinb", "dispersion": "gene-batch", "use_observed_lib_size": True},
    {"gene_likelihood": "poisson", "latent_distribution": "ln"},
    {"gene_likelihood": "nb", "dispersion": "gene-cell", "encode_covariates": True},
    {"gene_likelihood": "zinb", "dispersion": "gene-label", "batch_representation": "embedding"},
    {"gene_likelihood": "nb", "size_factor_key": "size", "latent_distribution": "ln"},
]


def cells(n_batches=2, seed=0):
    adata, rng = counts(60, 20, n_batches, seed), np.random.default_rng(seed)
    adata.obs["type"] = rng.choice(["T/NK", "B"], 60)
    adata.obs["donor"] = rng.choice(["d/1", "d2", "d3"], 60)
    adata.obs["age"] = rng.normal(size=60)
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() / 40
    return adata


def trained(adata=None, epochs=3, size_factor_key=None, **kwargs):
    adata = cells() if adata is None else adata
    LDVAE.setup_anndata(
        adata,
        "batch",
        "type",
        size_factor_key=size_factor_key,
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
    )
    model = LDVAE(adata, n_latent=3, n_hidden=16, **kwargs)
    model.train(epochs, kl_warmup=1, batch_size=32, **TRAIN)
    return model


@pytest.fixture(params=EVERYTHING, ids=lambda case: "-".join(map(str, case.values())))
def model(request):
    return trained(**request.param)


@pytest.mark.grid(0)
@pytest.mark.filterwarnings("ignore:Determinant has increased:RuntimeWarning")  # scikit-learn's, of twenty cells
def test_differential_expression_in_every_mode(model):
    for options in (
        {"mode": "vanilla"},
        {"mode": "change"},
        {"mode": "change", "batch_correction": True},
        {"mode": "vanilla", "weights": "importance"},
        {"mode": "change", "filter_outlier_cells": True},
    ):
        with np.errstate(all="ignore"):
            table = model.differential_expression(groupby="type", group1="B", silent=True, **options)
        assert sorted(table.index) == sorted(model.adata.var_names)
        assert np.isfinite(table["bayes_factor"]).all()


def test_outliers_under_ln_are_sought_among_gaussian_vectors(monkeypatch):
    model = trained(latent_distribution="ln")
    u = model.get_latent_representation(return_dist=True)[0]
    seen = []
    monkeypatch.setattr(EllipticEnvelope, "fit_predict", lambda _, x: seen.append(x) or np.ones(len(x)))
    model.differential_expression(groupby="type", group1="B", silent=True, filter_outlier_cells=True)
    is_b = (model.adata.obs["type"] == "B").to_numpy()
    np.testing.assert_allclose(seen[0], u[is_b], rtol=1e-5)
    assert "get_latent_representation" not in vars(model)


def test_differential_expression_finds_a_planted_gene():
    adata = cells()
    is_b = (adata.obs["type"] == "B").to_numpy()
    x = adata.X.toarray()
    x[is_b, 5] += 60
    adata.X = x
    for likelihood in ("nb", "poisson"):
        model = trained(adata.copy(), 60, gene_likelihood=likelihood, use_observed_lib_size=True)
        table = model.differential_expression(groupby="type", group1="B", mode="change", silent=True)
        assert table["lfc_mean"].idxmax() == "gene5", likelihood


def test_differential_abundance_writes_a_density_for_each_sample(model):
    model.differential_abundance(sample_key="donor")
    table = model.adata.obsm["da_log_probs"]
    assert sorted(table.columns) == ["d/1", "d2", "d3"]
    assert np.isfinite(table.to_numpy()).all()


@pytest.mark.grid(0)
def test_posterior_predictive_samples_have_the_mean_of_the_network(model):
    samples = model.posterior_predictive_sample(n_samples=300, indices=np.arange(6)).todense()
    assert samples.shape == (6, 20, 300)
    means = model.get_likelihood_parameters(indices=np.arange(6), n_samples=300, give_mean=True)
    expected = means["mean"] * (1 - means.get("dropout", 0.0))
    observed = samples.mean(axis=-1)
    error = 6 * samples.std(axis=-1) / np.sqrt(300) + 0.3 * expected + 0.05
    assert (np.abs(observed - expected) < error).all()


@pytest.mark.slow
def test_posterior_predictive_check_runs_on_a_dictionary_of_models(model):
    check = PosteriorPredictiveCheck(model.adata, {"ours": model}, n_samples=2)
    check.coefficient_of_variation("cells")
    assert np.isfinite(check.metrics["cv_gene"]["ours"]).all()


def test_genes_that_rise_together_correlate(model):
    matrix = model.get_feature_correlation_matrix(n_samples=3, correlation_type="pearson")
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-6)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)


def test_poisson_correlation_is_that_of_decoded_expression():
    model = trained(gene_likelihood="poisson")
    scvi.settings.seed = 1
    rates = model.get_normalized_expression(library_size=1000, batch_size=64)
    scvi.settings.seed = 1
    got = model.get_feature_correlation_matrix(n_samples=1, correlation_type="spearman")
    np.testing.assert_allclose(got, stats.spearmanr(rates).statistic, atol=1e-6)


def test_normal_likelihood_has_no_rate_to_correlate_and_no_weights():
    model = trained(gene_likelihood="normal")
    with pytest.raises(ValueError, match="has no counts"):
        model.get_feature_correlation_matrix()
    with pytest.raises(ValueError, match="has none"):
        model.get_normalized_expression(n_samples_overall=5, weights="importance")
    parameters = model.get_likelihood_parameters()
    np.testing.assert_allclose(
        parameters["dispersions"], np.broadcast_to(model.get_decoder().theta(), (60, 20)), rtol=1e-5
    )


@pytest.mark.parametrize("case", [{"dispersion": "gene-label"}, {"gene_likelihood": "zinb"}, {}], ids=str)
def test_every_getter_takes_a_dataloader(case):
    model = trained(**case)

    def loader():
        return model._make_data_loader(model.adata, batch_size=25)

    pd.testing.assert_frame_equal(
        pd.DataFrame(model.get_latent_kl(dataloader=loader())),
        pd.DataFrame(model.get_latent_kl().to_numpy()),
        rtol=1e-5,
    )
    np.testing.assert_allclose(model.ablate(dataloader=loader()).X, model.ablate().X, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        model.ablate(dataloader=list(loader()), mode="mean").X,
        model.ablate(mode="mean").X,
        rtol=1e-3,
        atol=1e-4,
    )
    for name in ("get_normalized_expression", "get_ablated_expression"):
        options = {"use_posterior_mean": True} if name == "get_normalized_expression" else {"latents": "Z_1"}
        np.testing.assert_allclose(
            getattr(model, name)(dataloader=loader(), **options),
            getattr(model, name)(return_numpy=True, **options),
            rtol=1e-4,
        )
    error = model.get_reconstruction_error(dataloader=loader(), use_posterior_mean=True, return_mean=False)
    assert error["reconstruction_loss"].shape == (60,)
    assert model.get_latent_representation(dataloader=loader()).shape == (60, 3)
    assert np.isfinite(float(model.get_elbo(dataloader=loader())))
    assert model.get_marginal_ll(dataloader=loader(), n_mc_samples=3, return_mean=False).shape == (60,)
    assert model.get_latent_library_size(dataloader=loader(), give_mean=False).shape == (60, 1)
    assert model.get_feature_correlation_matrix(dataloader=loader(), n_samples=2).shape == (20, 20)
    assert model.get_normalized_expression(dataloader=loader()).shape == (60, 20)
    assert model.get_likelihood_parameters(dataloader=loader())["mean"].shape == (60, 20)
    assert model.posterior_predictive_sample(dataloader=loader()).shape == (60, 20)


def test_feature_correlation_of_a_dataloader_is_that_of_the_cells():
    model = trained(gene_likelihood="poisson")
    loader = model._make_data_loader(model.adata, batch_size=64)
    scvi.settings.seed = 1
    want = model.get_feature_correlation_matrix(n_samples=2, batch_size=64)
    scvi.settings.seed = 1
    got = model.get_feature_correlation_matrix(n_samples=2, dataloader=loader)
    np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match="leave out"):
        model.get_feature_correlation_matrix(dataloader=loader, transform_batch="b1")


def test_reconstruction_error_at_the_posterior_mean_is_the_likelihood_of_the_network(model):
    adata = model.adata
    x = torch.from_numpy(adata.X.toarray())
    tensors = next(iter(model._make_data_loader(adata, batch_size=60)))
    with torch.no_grad():
        encoded = model.module.inference(**model.module._get_inference_input(tensors))
        encoded["z"] = model.module.z_encoder.z_transformation(encoded["qz"].loc)
        encoded["library"] = encoded["library"] if encoded["ql"] is None else encoded["ql"].loc
        px = model.module.generative(**model.module._get_generative_input(tensors, encoded))["px"]
    want = -px.log_prob(x).sum(-1).numpy()
    got = model.get_reconstruction_error(use_posterior_mean=True, return_mean=False, batch_size=7)
    np.testing.assert_allclose(got["reconstruction_loss"], want, rtol=2e-5)
    mean = model.get_reconstruction_error(use_posterior_mean=True)["reconstruction_loss"]
    np.testing.assert_allclose(mean, want.mean(), rtol=2e-5)
    with pytest.raises(TypeError, match="forward pass"):
        model.get_reconstruction_error(use_posterior_mean=True, inference_kwargs={})


@pytest.mark.grid(1)
@pytest.mark.parametrize("counts_kept", [True, False])
def test_minified_data_give_what_the_cells_gave(model, tmp_path, counts_kept):
    adata = model.adata
    adata.obsm["X_latent_qzm"], adata.obsm["X_latent_qzv"] = model.get_latent_representation(return_dist=True)
    latent = model.get_latent_representation(use_posterior_mean=True)
    expression = model.get_normalized_expression(use_posterior_mean=True, library_size="latent")
    ablated, kl = model.ablate().X, model.get_latent_kl()
    kind = "latent_posterior_parameters" + ("_with_counts" if counts_kept else "")
    model.minify_adata(kind)
    model.save(str(tmp_path / "m"), save_anndata=True)
    for again in (model, LDVAE.load(str(tmp_path / "m"), accelerator="cpu")):
        assert again.minified_data_type == again.module.minified_data_type == kind
        assert again.module.use_observed_lib_size == model.module.use_observed_lib_size
        np.testing.assert_allclose(again.get_latent_representation(use_posterior_mean=True), latent, rtol=1e-5)
        np.testing.assert_allclose(again.get_latent_kl(), kl, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(
            again.get_normalized_expression(use_posterior_mean=True, library_size="latent"), expression, rtol=1e-4
        )
        again.get_normalized_expression(n_samples=2, library_size="latent")
        again.posterior_predictive_sample()
        if counts_kept:
            np.testing.assert_allclose(again.ablate().X, ablated, rtol=1e-2, atol=1e-3)
            assert np.isfinite(float(again.get_elbo()))
            again.get_reconstruction_error(use_posterior_mean=True)
        else:
            for method in ("get_elbo", "get_marginal_ll", "get_reconstruction_error", "ablate"):
                with pytest.raises(ValueError, match=f"`{method}` needs counts.*with_counts'\\)` keeps them"):
                    getattr(again, method)()


def test_a_latent_library_goes_into_the_field_of_the_observed_one():
    model = trained()
    adata = model.adata
    x = torch.from_numpy(adata.X.toarray())
    with torch.no_grad():
        want = model.module.inference(x, torch.zeros(60, 1, dtype=torch.int64))["ql"].loc.exp().ravel()
    model.minify_adata()
    assert not [key for key in adata.obsm if "latent" in key]
    np.testing.assert_allclose(model.adata.obs["observed_lib_size"], want, rtol=1e-5)


def test_hub_saves_and_loads_by_the_parent_module(tmp_path):
    card = pytest.importorskip("huggingface_hub", reason="scvi-tools' hub needs huggingface_hub").ModelCard
    from scvi.hub import HubMetadata, HubModel

    model = trained()
    folder = str(tmp_path / "hub")
    model.save(folder, save_anndata=True)
    metadata = HubMetadata.from_dir(folder, anndata_version="0.12", model_parent_module="ldvae_ext.model")
    hub = HubModel(folder, metadata=metadata, model_card=card("---\nlicense: cc-by-4.0\n---\nAn LDVAE."))
    hub.save(overwrite=True)
    again = HubModel(folder).model
    assert isinstance(again, LDVAE)
    np.testing.assert_allclose(again.get_latent_representation(), model.get_latent_representation(), rtol=1e-5)


def test_levels_keep_their_codes_when_a_column_lists_them_in_another_order():
    model = trained()
    other = cells()
    other.obs["donor"] = pd.Categorical(other.obs["donor"], categories=["d2", "d3", "d/1"])
    np.testing.assert_array_equal(
        model.get_normalized_expression(other, use_posterior_mean=True),
        model.get_normalized_expression(use_posterior_mean=True),
    )
    scvi.settings.seed = 0
    own = model.get_normalized_expression()
    scvi.settings.seed = 0
    np.testing.assert_array_equal(model.get_normalized_expression(other), own)


def test_directories_with_a_prefix(tmp_path):
    model = trained(gene_likelihood="zinb", dispersion="gene-batch")
    model.save(str(tmp_path / "m"), prefix="first_")
    again = LDVAE.load(str(tmp_path / "m"), model.adata, prefix="first_", accelerator="cpu")
    np.testing.assert_array_equal(
        again.get_decoder().scale(np.eye(3), 0, {"donor": "d2", "age": 1.5}),
        model.get_decoder().scale(np.eye(3), 0, {"donor": "d2", "age": 1.5}),
    )


def test_early_stopping_stops():
    adata = cells()
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=2)
    model.train(200, kl_warmup=1, early_stopping=True, early_stopping_patience=2, early_stopping_min_delta=1e6, **TRAIN)
    assert len(model.history["elbo_train"]) < 10


def test_checkpoints_hold_the_model(tmp_path):
    from scvi.train import SaveCheckpoint

    model_folder = str(tmp_path / "checkpoints")
    adata = cells()
    LDVAE.setup_anndata(adata, "batch", categorical_covariate_keys=["donor"])
    model = LDVAE(adata, n_latent=2)
    callback = SaveCheckpoint(dirpath=model_folder, monitor="elbo_validation", load_best_on_end=True)
    model.train(3, kl_warmup=1, check_val_every_n_epoch=1, callbacks=[callback], enable_checkpointing=True, **TRAIN)
    best = LDVAE.load(callback.best_model_path, adata, accelerator="cpu")
    for name, value in model.module.state_dict().items():
        torch.testing.assert_close(best.module.state_dict()[name], value, msg=name)


def test_histories_by_step():
    adata = cells()
    LDVAE.setup_anndata(adata)
    model = LDVAE(adata, n_latent=2)
    model.train(3, kl_warmup=1, batch_size=16, plan_kwargs={"on_step": True, "on_epoch": False}, **TRAIN)
    assert any(len(curve) >= 3 for name, curve in model.history.items() if "elbo" in name or "loss" in name)
    assert model.final_kl_weight == 1
