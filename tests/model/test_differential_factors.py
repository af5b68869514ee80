"""Differential expression through some of the factors."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy.special import softmax
from scvi.model.base import RNASeqMixin
from sklearn.covariance import EllipticEnvelope

from ldvae_ext import datasets
from ldvae_ext.model import LDVAE
from ldvae_ext.model._stock import with_u
from tests.helpers import TRAIN, counts, untrained

N_SAMPLES = 200


@pytest.fixture(scope="module", params=["normal", "ln"])
def model(request):
    adata, _ = datasets.simulate(120, 30, 3, n_batches=2, n_populations=2)
    LDVAE.setup_anndata(adata, "batch")
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=3, n_hidden=16, latent_distribution=request.param)
    model.train(20, kl_warmup=1, batch_size=32, **TRAIN)
    return model


def compared(model, method=LDVAE.differential_expression, **options):
    """Differential expression, always with the same random numbers."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - scvi-tools' own generator
    groups = {"groupby": "population", "group1": "population_0"} if "idx1" not in options else {}
    return method(model, silent=True, **{**groups, "mode": "change", "n_samples_overall": N_SAMPLES, **options})


def assert_whole(module):
    """Nothing of a restriction is left."""
    assert "forward" not in vars(module)
    if module.latent_distribution == "ln":
        assert not module.z_encoder.z_transformation._forward_pre_hooks


ALL_SORTS = {
    "change": {},
    "vanilla": {"mode": "vanilla"},
    "uncorrected": {"batch_correction": False},
    "weighted": {
        "weights": "importance",
        "importance_weighting_kwargs": {"n_mc_samples": 20, "n_mc_samples_per_pass": 20},
    },
    "filtered": {"filter_outlier_cells": True},
    "permuted": {"use_permutation": True, "m_permutation": 400},
    "indices": {"idx1": np.arange(20), "idx2": np.arange(60, 120)},
    "queries": {"idx1": "population == 'population_1'"},
    "pairs": {"group1": ["population_0", "population_1"], "batch_size": 17, "all_stats": False, "delta": None},
    "one batch": {"batchid1": ["batch_1"], "batchid2": ["batch_1"], "test_mode": "two", "cred_interval_lvls": [0.9]},
}


@pytest.mark.filterwarnings("ignore:Determinant has increased:RuntimeWarning")  # scikit-learn's, of few cells
@pytest.mark.parametrize("sort", ALL_SORTS)
class TestBoundaries:
    @pytest.mark.grid(1)
    def test_all_factors_are_the_whole_model(self, model, sort):
        options = {"batch_correction": True, **ALL_SORTS[sort]}
        got = compared(model, factors=["Z_0", "Z_1", "Z_2"], **options)
        pd.testing.assert_frame_equal(got, compared(model, **options), check_exact=True)
        assert_whole(model.module)

    @pytest.mark.grid(1)
    def test_without_the_argument_it_is_that_of_scvi_tools(self, model, sort):
        # batchid1 and batchid2 ask for it; elsewhere ours is left out and scvi-tools' is False.
        correction = {"batch_correction": True} if sort == "one batch" else {}
        with model.module.evaluating():
            expected = compared(model, with_u(RNASeqMixin.differential_expression), **ALL_SORTS[sort], **correction)
        got = compared(model, **ALL_SORTS[sort], **correction)
        pd.testing.assert_frame_equal(got, expected, check_exact=True)

    @pytest.mark.grid(1)
    def test_no_factors_are_no_calls(self, model, sort):
        options = dict(ALL_SORTS[sort])
        if sort in ("uncorrected", "pairs"):
            options.update(batch_correction=True, delta=0.25)
        table = compared(model, factors=[], **options)
        if options.get("mode") == "vanilla":
            assert (table["proba_m1"] == 0).all()
        else:
            assert not table["is_de_fdr_0.05"].any()
            assert (table["proba_de"] == 0).all()
        np.testing.assert_allclose(table["scale1"], table["scale2"], rtol=1e-6)
        assert_whole(model.module)


def test_factors_alone_correct_for_the_batch(model):
    pd.testing.assert_frame_equal(compared(model, factors=[1]), compared(model, factors="Z_1", batch_correction=True))
    pd.testing.assert_frame_equal(compared(model), compared(model, batch_correction=False))
    assert (compared(model, factors=[], batch_correction=False, idx1="batch == 'batch_0'")["lfc_mean"] != 0).any()


def test_arguments_keep_the_order_of_scvi_tools():
    def positional(function):
        return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    ours, theirs = LDVAE.differential_expression, RNASeqMixin.differential_expression
    assert positional(ours) == positional(theirs)
    assert inspect.signature(ours).parameters["factors"].kind is inspect.Parameter.KEYWORD_ONLY
    defaults = [
        {name: p.default for name, p in inspect.signature(f).parameters.items() if name not in ("batch_correction",)}
        for f in (ours, theirs)
    ]
    assert defaults[0] == {**defaults[1], "factors": None}


@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
@pytest.mark.parametrize("n_samples", [10, N_SAMPLES], ids=["a draw", "several draws"])
@pytest.mark.parametrize("factors", [["Z_1"], [2, "Z_0"], []], ids=str)
def test_expression_is_the_decoder_with_the_other_latents_at_zero(factors, n_samples, latent_distribution, monkeypatch):
    adata = counts(60, 20, 2)
    model = untrained(adata, n_latent=3, latent_distribution=latent_distribution, use_observed_lib_size=True)
    is_first = np.arange(60) < 25

    draws = []
    for name in ("rsample", "sample"):
        real = getattr(torch.distributions.Normal, name)

        def remembered(self, shape=(), real=real):
            out = real(self, torch.Size(shape))
            draws.append(out.numpy().astype(np.float64))
            return out

        monkeypatch.setattr(torch.distributions.Normal, name, remembered)
    table = compared(model, idx1=is_first, idx2=~is_first, factors=factors, n_samples_overall=2 * n_samples)
    if n_samples == N_SAMPLES:
        draws = [u for u in draws if u.ndim == 3]

    # By hand: for each group and batch, each of the draws is decoded in the batch, and as many are picked.
    kept = [int(str(factor).removeprefix("Z_")) for factor in factors]
    decoder, scale = model.get_decoder(), []
    np.random.seed(0)  # noqa: NPY002 - scvi-tools' own generator
    picks = iter(draws)
    for n_cells in (25, 35):
        means = []
        for batch in decoder.batches:
            u = next(picks).reshape(-1, 3)
            assert len(u) % n_cells == 0
            restricted = np.zeros_like(u)
            restricted[:, kept] = u[:, kept]
            z = softmax(restricted, axis=1) if latent_distribution == "ln" else restricted
            logits = z @ decoder.weight_gk.T + decoder.intercept_bg[list(decoder.batches).index(batch)]
            picked = np.random.choice(len(u), n_samples, replace=True)  # noqa: NPY002
            means.append(softmax(logits, axis=1)[picked].mean(axis=0))
        scale.append(np.mean(means, axis=0))
    assert next(picks, None) is None
    table = table.loc[adata.var_names]
    np.testing.assert_allclose(table["scale1"], scale[0], rtol=2e-5)
    np.testing.assert_allclose(table["scale2"], scale[1], rtol=2e-5)


def with_the_true_decoder(adata, decoder):
    """A model whose decoder is the one that made the data, and whose encoder has learned to serve it."""
    LDVAE.setup_anndata(adata)
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=2, use_batch_norm="encoder", bias=True, use_observed_lib_size=True)
    layer = model.module.decoder.factor_regressor.fc_layers[0][0]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(decoder.weight_gk))
        layer.bias.copy_(torch.tensor(decoder.intercept_bg[0]))
    layer.requires_grad_(requires_grad=False)
    model.train(60, kl_warmup=1, **TRAIN)
    return model


@pytest.mark.slow
def test_a_factor_that_separates_groups_calls_its_genes_and_no_others():
    adata, decoder = datasets.simulate(600, 100, 2, median_library=2000)
    model = with_the_true_decoder(adata, decoder)
    true_z = adata.obsm["z_true"]
    assert abs(np.corrcoef(model.get_latent_representation()[:, 0], true_z[:, 0])[0, 1]) > 0.9

    def called(**options):
        options |= {"idx1": true_z[:, 0] > 1, "idx2": true_z[:, 0] < -1, "delta": 0.5}
        table = compared(model, n_samples_overall=2000, **options)
        return set(table.index[table["is_de_fdr_0.05"]])

    own = set(decoder.genes[np.abs(decoder.weight_gk[:, 0]) > 0])
    strong = set(decoder.genes[np.abs(decoder.weight_gk[:, 0]) > 0.7])
    assert strong <= called(factors=["Z_0"]) <= own
    assert called(factors=["Z_1"]) == set()


def test_importance_weights_are_those_of_all_factors(model, monkeypatch):
    seen = []
    real = LDVAE.get_importance_weights

    def spy(self, adata, indices, qz, px, zs, **kwargs):
        weights = real(self, adata, indices, qz, px, zs, **kwargs)
        seen.append((px.scale.numpy(), zs.numpy(), weights))
        return weights

    monkeypatch.setattr(LDVAE, "get_importance_weights", spy)
    for factors in (None, ["Z_2"], []):
        compared(model, factors=factors, batch_correction=True, **ALL_SORTS["weighted"])
    n_calls = len(seen) // 3
    assert n_calls == 4
    for whole, *restricted in zip(seen[:n_calls], seen[n_calls : 2 * n_calls], seen[2 * n_calls :], strict=True):
        assert np.ptp(whole[2]) > 0
        for other in restricted:
            for expected, got in zip(whole, other, strict=True):
                np.testing.assert_array_equal(got, expected)


def test_outliers_are_sought_among_all_latents(model, monkeypatch):
    seen = []
    monkeypatch.setattr(EllipticEnvelope, "fit_predict", lambda _, x: seen.append(x) or np.ones(len(x)))
    compared(model, factors=["Z_1"], filter_outlier_cells=True)
    is_first = (model.adata.obs["population"] == "population_0").to_numpy()
    u = model.get_latent_representation(return_dist=True)[0]
    np.testing.assert_allclose(seen[0], u[is_first], rtol=1e-5)


def test_nothing_is_left_on_the_module_after_an_error(model, monkeypatch):
    before = compared(model)
    state = set(vars(model.module))
    model.module.train()

    def fails(*_, **__):
        msg = "no weights today"
        raise RuntimeError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(LDVAE, "get_importance_weights", fails)
        with pytest.raises(RuntimeError, match="no weights today"):
            compared(model, factors=["Z_1"], weights="importance")
    assert_whole(model.module)
    assert set(vars(model.module)) == state
    assert model.module.training
    model.module.eval()
    pd.testing.assert_frame_equal(compared(model), before, check_exact=True)


@pytest.mark.parametrize("factors", ["Z_3", ["Z_0", "Z_9"], [3], [-1], [True], [1.0], [None]], ids=str)
def test_unknown_factors_are_named(model, factors):
    with pytest.raises(ValueError, match=r"`factors`: .* is no latent of this model; allowed are 'Z_0', 'Z_1', 'Z_2'"):
        compared(model, factors=factors)
    assert_whole(model.module)


@pytest.mark.parametrize("likelihood", ["zinb", "poisson", "normal"])
def test_every_likelihood_and_size_factors(likelihood):
    adata = counts(60, 20, 2)
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() / 40
    model = untrained(adata, gene_likelihood=likelihood, setup={"size_factor_key": "size"})
    groups = {"idx1": np.arange(25), "batch_correction": True}
    everything = compared(model, factors=range(4), **groups)
    pd.testing.assert_frame_equal(everything, compared(model, **groups), check_exact=True)
    assert not compared(model, factors=[], **groups)["is_de_fdr_0.05"].any()
    assert not np.allclose(compared(model, factors=[0], **groups)["lfc_mean"], everything["lfc_mean"])


def test_covariates_still_move_the_expression():
    adata = counts(60, 20, 2)
    adata.obs["lane"] = np.where(np.arange(60) < 30, "L/1", "L2")
    model = untrained(adata, setup={"categorical_covariate_keys": ["lane"]})
    assert (compared(model, factors=[], idx1="lane == 'L2'")["lfc_mean"].abs() > 0.01).any()


@pytest.mark.filterwarnings("ignore:Count statistics make no sense:UserWarning")
@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
def test_minified_data(latent_distribution):
    adata = counts(60, 20, 2)
    model = untrained(adata, use_observed_lib_size=True, latent_distribution=latent_distribution)
    adata.obsm["mean"], adata.obsm["variance"] = model.get_latent_representation(return_dist=True)
    model.minify_adata(use_latent_qzm_key="mean", use_latent_qzv_key="variance")
    options = {"idx1": np.arange(25), "all_stats": False, "pseudocounts": 1e-6, "batch_correction": True}
    everything = compared(model, factors=range(4), **options)
    pd.testing.assert_frame_equal(everything, compared(model, **options), check_exact=True)
    assert (compared(model, factors=[], **options)["proba_de"] == 0).all()
    some = compared(model, factors=["Z_1"], **options)
    assert not np.allclose(some["scale1"], everything.loc[some.index, "scale1"])


def test_cells_from_a_dataloader_are_decoded_in_their_own_batches(tmp_path):
    adata = counts(60, 20, 2)
    adata.obs["type"] = np.where(np.arange(60) < 25, "T/NK", "B")
    model = untrained(adata, setup={"labels_key": "type"})
    loader = model._make_data_loader(adata, batch_size=25)
    model.save(str(tmp_path / "m"))
    alone = LDVAE.load(str(tmp_path / "m"), adata=False, accelerator="cpu")
    groups = {"groupby": "type", "group1": "B", "dataloader": loader, "n_samples_overall": 100}
    with pytest.raises(ValueError, match="are decoded in their own; `batch_correction=False` takes"):
        compared(alone, factors=["Z_1"], **groups)
    everything = compared(alone, factors=range(4), batch_correction=False, **groups)
    pd.testing.assert_frame_equal(everything, compared(alone, **groups), check_exact=True)
    some = compared(alone, factors=["Z_1"], batch_correction=False, **groups)
    assert not np.allclose(some["scale1"], everything.loc[some.index, "scale1"])
