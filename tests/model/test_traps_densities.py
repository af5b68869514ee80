"""Densities of a logistic-normal latent, which LinearSCVI takes at the wrong point (T5 of the page on defects)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal, nbinom, norm
from scvi.model import LinearSCVI
from torch.distributions import Normal

from ldvae_ext.core.importance import importance_weights, latent_log_density
from ldvae_ext.model._cells import stream_cells
from ldvae_ext.model._comparison import _log_px
from tests.helpers import counts, network, untrained
from tests.traps import codes, dense, encoded, ours_of, pair


@pytest.fixture(params=[True, False], ids=["observed library", "latent library"])
def logistic_normal(request):
    """A model of two logistic-normal latents, whose likelihood has an integral over one or two numbers.

    Posteriors are wide, so that some thousand samples from them are enough.
    """
    adata = counts(n_cells=20, n_batches=3)
    adata.X = sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, adata.shape).astype(np.float32))
    stock = untrained(adata, cls=LinearSCVI, n_latent=2, latent_distribution="ln", use_observed_lib_size=request.param)
    module = stock.module
    with torch.no_grad():
        module.z_encoder.mean_encoder.bias.copy_(torch.tensor([0.5, -0.5]))
        for encoder, variance in ((module.z_encoder, 4.0), (module.l_encoder, 0.3)):
            encoder.mean_encoder.weight *= 0.02
            encoder.var_encoder.weight.zero_()
            encoder.var_encoder.bias.fill_(np.log(variance))
        module.l_encoder.mean_encoder.bias.fill_(np.log(20.0))
    return stock, ours_of(stock)


def log_likelihood_by_quadrature(model, cells):
    """log p(x) of cells: Gauss-Hermite over d = u_1 - u_2 ~ N(0, 2) and, if it is latent, over the log library."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    log_weights = np.log(weights) - 0.5 * np.log(2 * np.pi)
    u = np.stack([nodes, -nodes], axis=1) / np.sqrt(2)
    x, batch = dense(model.adata), codes(model.adata)
    means, variances = (getattr(model.module, f"library_log_{n}", None) for n in ("means", "vars"))
    out = []
    for i in cells:
        scale = network(model, softmax(u, axis=1), np.full(len(u), batch[i]), 1.0).scale.numpy()
        theta = np.exp(model.module.px_r.detach().numpy().astype(float))
        if model.module.use_observed_lib_size:
            library, log_prior = np.array([x[i].sum()]), np.zeros(1)
        else:
            library = np.exp(means[0, batch[i]].item() + nodes * variances[0, batch[i]].item() ** 0.5)
            log_prior = log_weights
        mu = library[:, None, None] * scale
        log_px = nbinom.logpmf(x[i], theta, theta / (theta + mu)).sum(axis=-1)
        out.append(logsumexp(log_px + log_weights + log_prior[:, None]))
    return np.array(out)


def test_marginal_likelihood_of_a_logistic_normal_latent_is_the_integral(logistic_normal):
    # T5
    stock, ours = logistic_normal
    cells = np.arange(10)
    exact = log_likelihood_by_quadrature(ours, cells)

    def estimate(model):
        return model.get_marginal_ll(indices=cells, return_mean=False, n_mc_samples=4000, n_mc_samples_per_pass=500)

    error = np.asarray(estimate(ours)) - exact
    assert np.abs(error).max() < 0.3
    assert np.min(np.asarray(estimate(stock)) - exact) > 0.6, "too good"


# scvi-tools weighs with observed totals, so that a latent library has no integral to compare with.
@pytest.mark.parametrize("logistic_normal", [True], indirect=True)
def test_importance_weights_of_a_logistic_normal_latent_use_densities_on_the_simplex(logistic_normal):
    # T5
    stock, ours = logistic_normal
    cells = np.arange(12)
    qz = encoded(ours)[0]
    mean, deviation = qz.loc.numpy()[cells].astype(float), qz.scale.numpy()[cells].astype(float)
    u = mean + deviation * np.random.default_rng(0).normal(size=(3, 12, 2))
    zs = torch.as_tensor(softmax(u, axis=-1), dtype=torch.float32)
    batch = codes(ours.adata)[cells]

    def weights(model):
        with torch.no_grad():
            px = model.module.generative(
                zs,
                torch.zeros(3, 12, 1),
                torch.as_tensor(batch).reshape(-1, 1),
            )["px"]
        own = Normal(qz.loc[cells], qz.scale[cells])
        return model.get_importance_weights(model.adata, cells, own, px, zs, n_mc_samples=4000)

    # By hand: the ratio of the densities of d = log z_1 - log z_2, in which the Jacobian cancels.
    d = (u[..., 0] - u[..., 1]).ravel()
    log_q = norm.logpdf(d[:, None], mean[:, 0] - mean[:, 1], np.sqrt((deviation**2).sum(axis=1)))
    x, theta = dense(ours.adata)[cells], np.exp(ours.module.px_r.detach().numpy().astype(float))
    scale = network(ours, zs.double().numpy().reshape(-1, 2), np.tile(batch, 3), 1.0).scale.numpy()
    mu = x.sum(axis=1)[:, None] * scale[:, None, :]
    log_px = nbinom.logpmf(x, theta, theta / (theta + mu)).sum(axis=-1) - log_likelihood_by_quadrature(ours, cells)
    expected = softmax(logsumexp(log_px, axis=1) + norm.logpdf(d, 0, np.sqrt(2)) - logsumexp(log_q, axis=1))

    got = weights(ours)
    assert got.shape == (36,)
    assert got.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.log(got), np.log(expected), atol=0.2)
    assert np.abs(np.log(weights(stock)) - np.log(expected)).max() > 1


def test_density_ratios_on_the_simplex_are_those_of_additive_log_ratios():
    # T5
    rng = np.random.default_rng(0)
    z, mean, variance = rng.dirichlet(np.ones(4), 7), rng.normal(size=(5, 4)), rng.gamma(2.0, 1.0, (5, 4))
    contrast = np.hstack([np.eye(3), -np.ones((3, 1))])
    y = np.log(z) @ contrast.T
    expected = np.stack(
        [multivariate_normal.logpdf(y, contrast @ m, contrast * v @ contrast.T) for m, v in zip(mean, variance)], axis=1
    )
    got = latent_log_density(z, mean, variance, "ln")
    # The two coordinates of the simplex differ by a constant Jacobian, the same for every posterior.
    np.testing.assert_allclose(got - got[:, :1], expected - expected[:, :1], rtol=1e-9, atol=1e-9)
    of_u = norm.logpdf(z[:, None], mean, np.sqrt(variance)).sum(axis=-1)
    assert np.abs((of_u - of_u[:, :1]) - (expected - expected[:, :1])).max() > 1, "scvi-tools: the density of u at z"


def test_importance_weights_of_a_normal_latent_are_those_of_scvi_tools(monkeypatch):
    # T5: the same formula where scvi-tools has it right
    adata = counts(n_batches=3)
    stock, ours = pair(adata)
    cells = np.arange(30)
    marginal = torch.linspace(-80, -60, len(cells))
    (tensors,) = stock._make_data_loader(stock.adata, indices=cells, batch_size=len(cells))
    with torch.no_grad():
        inference, generative, _ = stock.module(tensors, inference_kwargs={"n_samples": 4})
    monkeypatch.setattr(stock, "get_marginal_ll", lambda *_args, **_kwargs: marginal)
    expected = stock.get_importance_weights(stock.adata, cells, inference["qz"], generative["px"], inference["z"])

    z = inference["z"].numpy().astype(float)
    with stream_cells(ours, None, cells) as stream:
        chunks = list(stream.chunks)
    mean, variance = (np.concatenate([getattr(c, n) for c in chunks]) for n in ("mean", "variance"))
    log_px = np.concatenate([_log_px(ours, z_nk, chunks, cells) for z_nk in z])
    flat = z.reshape(-1, z.shape[-1])
    got = importance_weights(
        latent_log_density(flat, np.zeros((1, 4)), np.ones((1, 4)), "normal")[:, 0],
        latent_log_density(flat, mean, variance, "normal"),
        log_px,
        marginal.numpy(),
    )
    np.testing.assert_allclose(np.exp(got), expected, atol=1e-3)
    assert expected.max() > 0.05, "some weights matter"
    assert np.exp(got).sum() == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:Using 128 after custom Dataloader")
def test_differential_abundance_of_a_logistic_normal_latent_is_of_u():
    # T5
    stock, ours = pair(counts(n_batches=3), latent_distribution="ln")
    qz = encoded(ours)[0]
    mean, deviation = qz.loc.numpy().astype(float), qz.scale.numpy().astype(float)
    batch = ours.adata.obs["batch"].to_numpy()
    log_q = norm.logpdf(mean[:, None], mean, deviation).sum(axis=-1)
    frames = []
    for model in (stock, ours):
        model.differential_abundance(sample_key="batch")
        frames.append(model.adata.obsm.pop("da_log_probs"))
    for name in np.unique(batch):
        members = batch == name
        expected = logsumexp(log_q[:, members], axis=1) - np.log(members.sum())
        np.testing.assert_allclose(frames[1][name], expected, rtol=1e-4, atol=1e-4)
        assert np.abs(frames[0][name] - expected).max() > 1
