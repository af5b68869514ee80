"""The start of the ordering rotation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logsumexp
from scipy.stats import nbinom, poisson

from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.fisher import fisher_rotation, log_mean_information, logit_information
from ldvae_ext.core.rotation import with_signs
from tests.core.decoders import cells, full_decoder

RNG = np.random.default_rng(0)


def encoded(decoder, n_cells=6):
    of = cells(decoder, n_cells)
    names = {c.name: c for c in decoder.covariates}
    covariates = of["covariates"] and {
        name: value if names[name].levels is None else np.asarray(names[name].levels)[value]
        for name, value in of["covariates"].items()
    }
    rng = np.random.default_rng(2)
    return EncodedCells(
        mean=of["z"].astype(np.float32),
        variance=np.ones_like(of["z"]),
        library=rng.gamma(5.0, 10.0, n_cells),
        batch=of["batch"],
        label=of["label"],
        covariates=covariates,
        counts=None,
    )


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_information_is_the_variance_of_the_score(likelihood):
    mu, theta, x = np.array([[0.3, 4.0]]), np.array([0.7, 3.0]), np.arange(2000)[:, None]
    law = poisson(mu) if likelihood == "poisson" else nbinom(theta, theta / (theta + mu))
    score = x - mu if likelihood == "poisson" else x - (x + theta) * mu / (theta + mu)
    expected = (law.pmf(x) * score**2).sum(axis=0)
    np.testing.assert_allclose(log_mean_information(likelihood, mu, theta)[0], expected, rtol=1e-6)


def test_information_of_a_normal_is_that_of_its_standard_deviation():
    mu, sigma = np.array([[2.0, 3.0]]), np.array([0.5, 2.0])
    np.testing.assert_allclose(log_mean_information("normal", mu, sigma), (mu / sigma) ** 2)


def test_dropout_leaves_less_information_and_never_less_than_there_is():
    mu, theta, dropout = 3.0, 2.0, 0.4
    x = np.arange(3000)
    stay = -np.logaddexp(0, dropout)

    def log_prob(log_mu):
        nb = nbinom(theta, theta / (theta + np.exp(log_mu))).logpmf(x)
        return np.where(x == 0, logsumexp(np.stack([np.full(len(x), stay + dropout), nb + stay]), axis=0), nb + stay)

    score = (log_prob(np.log(mu) + 1e-5) - log_prob(np.log(mu) - 1e-5)) / 2e-5
    exact = (np.exp(log_prob(np.log(mu))) * score**2).sum()
    bound = float(log_mean_information("zinb", np.array(mu), theta, np.array(dropout)))
    assert exact < bound < log_mean_information("nb", np.array(mu), theta)
    assert bound == pytest.approx(float(log_mean_information("nb", np.array(mu), theta)) * expit(-dropout))


@pytest.mark.parametrize("link", ["softmax", "softplus"])
@pytest.mark.parametrize(
    ("likelihood", "dispersion"),
    [("nb", "gene"), ("nb", "gene-label"), ("zinb", "gene-cell"), ("poisson", "gene"), ("normal", "gene-batch")],
)
def test_information_about_logits(likelihood, dispersion, link):
    decoder = full_decoder(likelihood=likelihood, dispersion=dispersion, link=link)
    some = encoded(decoder)
    batch = decoder.batches[some.batch]
    mu = decoder.rate(some.mean, batch, some.covariates, library=some.library)
    label = None if decoder.labels is None else decoder.labels[some.label]
    theta = dropout = None
    if likelihood != "poisson":
        theta = decoder.theta(batch, len(mu), label=label, z_nk=some.mean, covariates=some.covariates)
    if likelihood == "zinb":
        dropout = decoder.dropout_logits(some.mean, batch, some.covariates)
    information = log_mean_information(likelihood, mu, theta, dropout)
    if link == "softplus":
        logits, step = decoder.logits(some.mean, batch, some.covariates), 1e-6
        slope = (np.log(decoder.apply_link(logits + step)) - np.log(decoder.apply_link(logits - step))) / (2 * step)
        information = information * slope**2
    np.testing.assert_allclose(logit_information(decoder, some), information, rtol=1e-6)


def quadratic_loss(decoder, mean_nk, weight_g, rotation, j):
    """Nats that the Gaussian approximation loses per cell if only the first j factors are kept."""
    kept = rotation[:, :j] @ rotation[:, :j].T
    lost = (mean_nk - mean_nk @ kept) @ decoder.weight_gk.T
    if decoder.link == "softmax":
        lost = lost - np.average(lost, axis=1, weights=weight_g)[:, None]
    return 0.5 * (weight_g * lost**2).sum(axis=1).mean()


@pytest.mark.parametrize("link", ["softmax", "softplus"])
def test_first_axes_lose_least_where_the_latents_are_white(link):
    decoder = full_decoder(n_genes=30, n_factors=4, link=link)
    mean_nk = np.linalg.qr(RNG.normal(size=(200, 4)))[0] * np.sqrt(200)
    # A few genes count for most, as in real counts.
    weight_g = RNG.gamma(0.2, 1.0, 30)
    rotation = fisher_rotation(decoder, mean_nk, weight_g)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(4), atol=1e-12)
    for j in range(1, 4):
        best = quadratic_loss(decoder, mean_nk, weight_g, rotation, j)
        for _ in range(50):
            near = rotation @ np.linalg.qr(np.eye(4) + 0.1 * RNG.normal(size=(4, 4)))[0]
            assert best <= quadratic_loss(decoder, mean_nk, weight_g, near, j) + 1e-9
            other = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
            assert best <= quadratic_loss(decoder, mean_nk, weight_g, other, j) + 1e-9


def test_axes_that_cells_do_not_use_come_last():
    decoder = full_decoder(n_genes=30, n_factors=3, covariates=())
    mean_nk = RNG.normal(size=(500, 3)) * [1.0, 0.0, 5.0]
    rotation = fisher_rotation(decoder, mean_nk, np.ones(30))
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.abs(rotation[:, 2]), [0, 1, 0], atol=1e-6)
    assert abs(rotation[2, 0]) > 0.9


def test_a_constant_over_genes_counts_for_nothing_under_softmax():
    decoder = full_decoder(n_genes=30, n_factors=3)
    mean_nk, weight_g = RNG.normal(size=(100, 3)), RNG.gamma(1.0, 1.0, 30)
    shifted = decoder._with(weight_gk=decoder.weight_gk + np.array([50.0, 0.0, -9.0]))
    np.testing.assert_allclose(
        fisher_rotation(shifted, mean_nk, weight_g), fisher_rotation(decoder, mean_nk, weight_g), atol=1e-9
    )


def test_columns_point_to_their_longer_tail_of_genes():
    decoder = full_decoder(n_genes=30, n_factors=3)
    rotation = fisher_rotation(decoder, RNG.normal(size=(100, 3)), np.ones(30))
    assert (decoder.rotated(rotation).signs() == 1).all()
    np.testing.assert_array_equal(with_signs(decoder, -rotation), rotation)


def test_the_former_axes_do_not_matter():
    decoder = full_decoder(n_genes=30, n_factors=4)
    mean_nk, weight_g = RNG.normal(size=(100, 4)), RNG.gamma(1.0, 1.0, 30)
    turn = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    expected = fisher_rotation(decoder, mean_nk, weight_g)
    again = turn @ fisher_rotation(decoder.rotated(turn), mean_nk @ turn, weight_g)
    np.testing.assert_allclose(again, expected, atol=1e-8)
