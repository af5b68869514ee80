"""Deviance of cells relative to counts drawn from the decoder, against means over many draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import nbinom

from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.likelihood import deviance
from ldvae_ext.core.misfit import deviance_ratio, draw_counts
from tests.core.decoders import full_decoder


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
def test_draws_have_the_mean_and_variance_of_the_likelihood(likelihood):
    rng, mu, theta = np.random.default_rng(0), np.array([[0.5, 20.0]]), np.array([[2.0, 5.0]])
    dropout = np.array([[0.0, -1.0]])
    draws = draw_counts(likelihood, rng, np.repeat(mu, 200_000, axis=0), theta, np.repeat(dropout, 200_000, axis=0))
    mean = mu if likelihood != "zinb" else mu / (1 + np.exp(dropout))
    np.testing.assert_allclose(draws.mean(axis=0), mean[0], rtol=0.02)
    if likelihood == "nb":
        np.testing.assert_allclose(draws.var(axis=0), nbinom.var(theta, theta / (theta + mu))[0], rtol=0.03)
    if likelihood == "poisson":
        np.testing.assert_allclose(draws.var(axis=0), mu[0], rtol=0.03)
    if likelihood == "normal":
        np.testing.assert_allclose(draws.std(axis=0), theta[0], rtol=0.03)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_the_ratio_is_that_to_the_mean_over_draws(likelihood):
    decoder = full_decoder(0, n_genes=60, n_factors=2, likelihood=likelihood, dispersion="gene", covariates=())
    rng = np.random.default_rng(1)
    z, library, batch = rng.normal(size=(3, 2)), np.array([50.0, 200.0, 90.0]), np.array([0, 1, 0])
    mu = decoder.rate(z, decoder.batches[batch], library=library)
    dropout = decoder.dropout_logits(z, decoder.batches[batch]) if likelihood == "zinb" else None
    x = draw_counts(likelihood, rng, mu, decoder.theta_bg, dropout) + 1.0
    x[2] = 0
    cells = EncodedCells(
        mean=z,
        variance=np.ones_like(z),
        library=library,
        batch=batch,
        label=np.zeros(3, int),
        covariates=None,
        counts=x,
    )
    got = deviance_ratio(decoder, cells, np.arange(3))
    assert np.isnan(got[2])
    for n in range(2):
        rows = np.repeat(mu[[n]], 4000, axis=0), None if dropout is None else np.repeat(dropout[[n]], 4000, axis=0)
        drawn = draw_counts(likelihood, rng, rows[0], decoder.theta_bg, rows[1])
        expected = deviance(likelihood, drawn, rows[0], decoder.theta_bg, rows[1]).sum(axis=1).mean()
        observed = deviance(
            likelihood, x[[n]], mu[[n]], decoder.theta_bg, None if dropout is None else dropout[[n]]
        ).sum()
        # Some 17 draws of 60 genes.
        np.testing.assert_allclose(got[n], observed / expected, rtol=0.2)
    # A cell's draws depend on its position alone.
    one = deviance_ratio(
        decoder, EncodedCells(z[[1]], z[[1]], library[[1]], batch[[1]], batch[[1]] * 0, None, x[[1]]), np.array([1])
    )
    np.testing.assert_allclose(one[0], got[1])
