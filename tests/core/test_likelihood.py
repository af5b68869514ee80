from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats
from scipy.special import gammaln

from ldvae_ext.core import log_likelihood
from ldvae_ext.core.likelihood import deviance, mean_dependent_part, sparse_deviance


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    shape = (30, 12)
    mu = np.exp(rng.normal(0, 3, shape))
    mu[0] = 1e-12  # where scvi-tools' eps decides
    return {
        "x": rng.poisson(rng.gamma(0.5, 4.0, shape)).astype(float),
        "mu": mu,
        "theta": np.exp(rng.normal(0, 1, (1, 12))),
        "dropout": rng.normal(0, 2, shape),
    }


EPS = 1e-8


def by_hand(likelihood, v):
    """scvi-tools' formulas, with its eps; tests/backends compares with its code."""
    x, mu, theta, dropout = (v[name] for name in ("x", "mu", "theta", "dropout"))
    if likelihood == "poisson":
        return stats.poisson.logpmf(x, mu)
    total = np.log(theta + mu + EPS)
    nb = theta * (np.log(theta + EPS) - total) + x * (np.log(mu + EPS) - total)
    nb = nb + gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)
    if likelihood == "nb":
        return nb
    dropped = 1 / (1 + np.exp(-dropout))
    at_zero = theta * (np.log(theta + EPS) - total)
    return np.where(x < EPS, np.log(dropped + (1 - dropped) * np.exp(at_zero)), np.log1p(-dropped) + nb)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_log_likelihood_is_that_of_the_formula(likelihood, values):
    got = log_likelihood(likelihood, values["x"], values["mu"], values["theta"], values["dropout"])
    np.testing.assert_allclose(got, by_hand(likelihood, values), rtol=1e-10, atol=1e-10)


def test_negative_binomial_agrees_with_scipy_where_eps_does_not_matter(values):
    mu, theta = values["mu"][1:] + 0.1, values["theta"]
    got = log_likelihood("nb", values["x"][1:], mu, theta)
    np.testing.assert_allclose(got, stats.nbinom.logpmf(values["x"][1:], theta, theta / (theta + mu)), atol=1e-5)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_mean_dependent_part_differs_from_the_likelihood_by_what_the_mean_does_not_change(likelihood, values):
    args = (values["theta"], values["dropout"])
    other = values["mu"] * 1.7
    by_parts = mean_dependent_part(likelihood, values["x"], other, *args) - mean_dependent_part(
        likelihood, values["x"], values["mu"], *args
    )
    whole = log_likelihood(likelihood, values["x"], other, *args) - log_likelihood(
        likelihood, values["x"], values["mu"], *args
    )
    np.testing.assert_allclose(by_parts, whole, atol=1e-9)


def test_unknown_likelihood_is_an_error(values):
    with pytest.raises(ValueError, match="'nb', 'zinb', 'poisson', 'normal'; got 'beta'"):
        log_likelihood("beta", values["x"], values["mu"], values["theta"])


def test_normal_is_that_of_scipy(values):
    x, mu, sd = values["x"] - 3.5, values["mu"], values["theta"]
    got = log_likelihood("normal", x, mu, sd)
    np.testing.assert_allclose(got, stats.norm.logpdf(x, mu, sd), rtol=1e-10, atol=1e-10)
    by_parts = mean_dependent_part("normal", x, mu + 1, sd) - mean_dependent_part("normal", x, mu, sd)
    np.testing.assert_allclose(by_parts, log_likelihood("normal", x, mu + 1, sd) - got, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("container", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize("theta", ["gene", "cell"])
@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_sparse_deviance_is_the_sum_over_genes(likelihood, theta, container, values):
    theta = values["theta"] if theta == "gene" else np.abs(values["dropout"]) + 0.1
    theta[0, 0] = 1e7  # nearly a Poisson
    expected = deviance(likelihood, values["x"], values["mu"], theta).sum(axis=1)
    got = sparse_deviance(likelihood, container(values["x"]), values["mu"], theta)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
