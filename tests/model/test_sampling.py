"""Expression that is sampled for a group of cells rather than for each of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import norm
from scvi.model import LinearSCVI

from ldvae_ext.model import LDVAE
from tests.helpers import counts, untrained
from tests.reference import covariate_counts, network64, setup_arguments
from tests.traps import pair


def sampled(model, seed, **kwargs):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - scvi-tools' own generator
    return model.get_normalized_expression(**kwargs)


@pytest.mark.parametrize("weights", [None, "uniform", "importance"])
@pytest.mark.parametrize("n_samples_overall", [25, 100])
def test_draws_of_a_group_come_as_a_frame_without_names_of_cells(n_samples_overall, weights):
    stock, ours = pair(counts(n_batches=3))
    options = {
        "n_samples_overall": n_samples_overall,
        "weights": weights,
        "gene_list": ["gene7", "gene2"],
        "indices": np.arange(30),
    }
    if weights == "importance":
        options |= {"n_mc_samples": 20, "n_mc_samples_per_pass": 20}
    frame = sampled(ours, 1, **options)
    assert frame.shape == (n_samples_overall, 2)
    assert frame.columns.tolist() == ["gene2", "gene7"]
    assert isinstance(frame.index, pd.RangeIndex)
    np.testing.assert_array_equal(frame, sampled(ours, 1, return_numpy=True, **options))
    np.testing.assert_array_equal(frame, sampled(stock, 1, return_numpy=True, **options))
    with pytest.raises(ValueError, match="Shape of passed values"):
        sampled(stock, 1, **options)


def test_draws_of_a_group_are_of_its_cells():
    _, ours = pair(counts(n_batches=3))
    with torch.no_grad():
        ours.module.z_encoder.var_encoder.bias.fill_(-30.0)
        ours.module.z_encoder.var_encoder.weight.zero_()
    cells = np.array([3, 17])
    means = ours.get_normalized_expression(indices=cells, use_posterior_mean=True, return_numpy=True)
    draws = sampled(ours, 0, indices=cells, n_samples_overall=50, return_numpy=True)
    nearest = np.abs(draws[:, None] - means).max(axis=-1)
    assert nearest.min(axis=1).max() < 0.02
    assert set(nearest.argmin(axis=1)) == {0, 1}


@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
@pytest.mark.parametrize("case", ["poisson", "nb with size factors", "zinb with size factors"])
def test_importance_weights_use_the_likelihood_of_the_model(case, latent_distribution, monkeypatch):
    likelihood, size_factor = case.split()[0], "size" in case
    adata = covariate_counts(n_batches=3)
    model = untrained(
        adata,
        n_latent=2,
        setup=setup_arguments(size_factor=size_factor),
        gene_likelihood=likelihood,
        latent_distribution=latent_distribution,
    )
    cells = np.arange(15)
    mean, variance = (v[cells].astype(float) for v in model.get_latent_representation(return_dist=True))
    u = mean + np.sqrt(variance) * np.random.default_rng(0).normal(size=(2, 15, 2))
    z = softmax(u, axis=-1) if latent_distribution == "ln" else u
    x = torch.as_tensor(adata.X[cells].toarray(), dtype=torch.float64)
    size = adata.obs["size"].to_numpy()[cells] if size_factor else x.sum(dim=1).numpy()

    # By hand: each sample against the counts of each cell, in the batch of the cell that it was drawn for. Under "ln" the
    # densities are those of d = u_1 - u_2.
    obs = pd.concat([adata.obs.iloc[cells], adata.obs])  # the reference needs every batch
    log_px = np.empty((30, 15))
    for a in cells:
        for s in range(2):
            every = np.concatenate([z[s], np.zeros((60, 2))])
            px = network64(model, every, obs, "none", size[a])
            log_px[15 * s + cells, a] = px.log_prob(x[a]).sum(dim=-1).numpy()[:15]
    if latent_distribution == "ln":
        d = (u[..., 0] - u[..., 1]).reshape(-1, 1)
        log_p = norm.logpdf(d, 0, np.sqrt(2))[:, 0]
        log_q = norm.logpdf(d, mean[:, 0] - mean[:, 1], np.sqrt(variance.sum(axis=1)))
    else:
        flat = u.reshape(-1, 2)
        log_p = norm.logpdf(flat).sum(axis=1)
        log_q = norm.logpdf(flat[:, None], mean, np.sqrt(variance)).sum(axis=-1)
    marginal = logsumexp(log_px, axis=0) + np.linspace(-1, 1, 15)
    expected = logsumexp(log_px - marginal, axis=1) + log_p - logsumexp(log_q, axis=1)

    monkeypatch.setattr(model, "get_marginal_ll", lambda *_args, **_kwargs: torch.as_tensor(marginal))
    got = model.get_importance_weights(adata, cells, None, None, torch.as_tensor(z, dtype=torch.float32))
    assert got.sum() == pytest.approx(1)
    np.testing.assert_allclose(got, softmax(expected), rtol=1e-3, atol=1e-6)
    cut = model.get_importance_weights(adata, cells, None, None, torch.as_tensor(z).float(), truncation=True)
    np.testing.assert_allclose(cut, np.minimum(got, 1 / 30) / np.minimum(got, 1 / 30).sum(), rtol=1e-3)


def test_truncated_weights_are_cut_from_above():
    adata = counts(n_batches=3)
    weights = {}
    for model in pair(adata):
        cells = np.arange(20)
        (tensors,) = model._make_data_loader(model.adata, indices=cells, batch_size=20)
        for truncation in (False, True):
            torch.manual_seed(0)
            with torch.no_grad():
                inference, generative, _ = model.module(tensors, inference_kwargs={"n_samples": 3})
            given = model.adata, cells, inference["qz"], generative["px"], inference["z"]
            weights[type(model), truncation] = model.get_importance_weights(
                *given, truncation=truncation, n_mc_samples=500, n_mc_samples_per_pass=500
            )
    whole = weights[LDVAE, False]
    np.testing.assert_allclose(whole, weights[LinearSCVI, False], rtol=1e-5, atol=1e-9)
    assert weights[LinearSCVI, True].min() > whole.min() + 1e-3, "scvi-tools raises the small ones instead"
    cut = np.minimum(whole, 1 / 60)
    np.testing.assert_allclose(weights[LDVAE, True], cut / cut.sum(), rtol=1e-3, atol=1e-9)


def test_marginal_likelihood_is_the_mean_over_cells_whatever_the_minibatches():
    for cls in (LDVAE, LinearSCVI):
        model = untrained(counts(), use_observed_lib_size=True, cls=cls)
        for batch_size in (60, 59, 40):
            scvi.settings.seed = 0
            each = model.get_marginal_ll(n_mc_samples=5, batch_size=batch_size, return_mean=False).numpy()
            scvi.settings.seed = 0
            mean = model.get_marginal_ll(n_mc_samples=5, batch_size=batch_size)
            assert mean.ndim == 0
            # LinearSCVI's is the mean of the means of the minibatches.
            is_right = cls is LDVAE or batch_size == 60
            assert np.isclose(mean, each.mean(), rtol=1e-6) == is_right
