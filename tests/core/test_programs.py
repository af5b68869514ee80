from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize

from ldvae_ext import datasets
from ldvae_ext.core import match_columns
from ldvae_ext.core.programs import AdditivePrograms, Expression, capped, fit_programs, program_direction


@pytest.fixture(scope="module")
def mixture():
    """Expression that is exactly a mixture of four profiles, and cells of a single profile."""
    rng = np.random.default_rng(0)
    profile = rng.gamma(0.3, 1.0, (40, 4))
    profile /= profile.sum(axis=0)
    usage = np.concatenate([np.eye(4), rng.dirichlet(np.full(4, 0.3), 300)])
    return usage @ profile.T, profile, usage


def test_programs_and_usages_of_a_mixture_are_recovered(mixture):
    expression, profile, usage = mixture
    fit = fit_programs(expression, expression.std(axis=0), 4, cap=np.inf)
    pairs = match_columns(np.corrcoef(profile.T, fit.profile_gk.T)[:4, 4:])
    np.testing.assert_allclose(fit.profile_gk[:, pairs.second], profile, atol=2e-3)
    found = fit.usages(expression)
    np.testing.assert_allclose(found.usage_nk[:, pairs.second], usage, atol=0.02)
    assert found.residual_n.max() < 1e-4
    assert fit.explained > 0.999
    assert (np.diff(found.usage_nk.mean(axis=0)) < 1e-3).all()


def test_profiles_and_usages_sum_to_one_and_are_not_negative(mixture):
    expression = mixture[0] * np.exp(np.random.default_rng(1).normal(0, 0.5, mixture[0].shape))
    expression /= expression.sum(axis=1, keepdims=True)
    fit = fit_programs(expression, expression.std(axis=0), 3)
    usages = fit.usages(expression)
    assert (fit.profile_gk >= 0).all()
    assert (usages.usage_nk >= 0).all()
    np.testing.assert_allclose(fit.profile_gk.sum(axis=0), 1)
    np.testing.assert_allclose(usages.usage_nk.sum(axis=1), 1)
    assert 0 < fit.explained < 1
    assert ((usages.residual_n > 0) & (usages.residual_n < 1)).all()


def test_usages_are_the_non_negative_least_squares(mixture):
    expression, profile, _ = mixture
    rng = np.random.default_rng(2)
    expression = np.abs(expression[:6] + rng.normal(0, 0.02, (6, 40)))
    programs = AdditivePrograms(profile, expression.std(axis=0), 3.0, 1.0)
    got = programs.usages(expression)
    scaled = np.minimum(expression / programs.scale_g, 3.0)
    for n in range(6):

        def loss(u, n=n):
            return np.square(scaled[n] - programs.scaled_gk @ u).sum()

        best = minimize(loss, np.full(4, 0.25), bounds=[(0, None)] * 4, options={"ftol": 1e-15, "gtol": 1e-12})
        np.testing.assert_allclose(got.usage_nk[n], best.x / best.x.sum(), atol=1e-4)
        assert got.residual_n[n] == pytest.approx(best.fun / np.square(scaled[n]).sum(), rel=1e-5)


def test_usages_do_not_depend_on_the_other_cells(mixture):
    fit = fit_programs(mixture[0], mixture[0].std(axis=0), 4)
    together = fit.usages(mixture[0])
    np.testing.assert_allclose(fit.usages(mixture[0][10:13]).usage_nk, together.usage_nk[10:13], atol=1e-12)


def test_genes_without_a_scale_and_programs_without_cells_are_allowed(mixture):
    expression, scale = mixture[0], mixture[0].std(axis=0)
    scale[5] = 0
    fit = fit_programs(expression, scale, 4)
    assert (fit.profile_gk[5] == 0).all()
    assert capped(expression, scale, 2.0).max() == 2
    assert (capped(expression, scale, 2.0)[:, 5] == 0).all()
    same = np.tile(expression[:1], (20, 1))
    fit = fit_programs(same, np.ones(40), 3)
    assert np.isfinite(fit.profile_gk).all()
    assert fit.explained == 1
    assert np.isfinite(fit.usages(np.zeros((2, 40))).usage_nk).all()


def test_programs_match_those_of_another_fit(mixture):
    fit = fit_programs(mixture[0], mixture[0].std(axis=0), 4)
    other = fit.arranged(np.array([2, 0, 3, 1]))
    pairs = fit.match(other)
    assert pairs.second.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(pairs.cosine, 1)


def test_deviation_is_that_of_normalised_counts():
    counts = np.random.default_rng(0).poisson(2.0, (50, 6)).astype(float)
    counts[7] = 0
    sums = Expression(6)
    sums.add(counts[:20])
    sums.add(sparse.csr_array(counts[20:]))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(sums.deviation_g(), share.std(axis=0), rtol=1e-10)


def test_direction_of_a_program_is_the_derivative_of_the_decoder():
    decoder = datasets.simulate(n_cells=2, n_genes=60, n_latent=4)[1]
    n_latent, rng = len(decoder.factors), np.random.default_rng(3)
    mean = decoder.scale(np.zeros((1, n_latent)), decoder.batches[0])[0]
    d = rng.normal(size=n_latent)
    step = 1e-4
    moved = decoder.scale(step * d[None], decoder.batches[0])[0]
    # A program towards which the decoder moves along d: mu + (moved - mu) / e, for a small e.
    found = program_direction(decoder, mean + (moved - mean) / 0.01, mean)
    np.testing.assert_allclose(found.direction_k, d / np.linalg.norm(d), atol=1e-3)
    assert found.angle < 0.5


def test_a_program_that_latents_cannot_make_is_at_a_right_angle():
    decoder = datasets.simulate(n_cells=2, n_genes=60, n_latent=4)[1]
    mean = np.full(len(decoder.genes), 1 / len(decoder.genes))
    centred = decoder.weight_gk - decoder.weight_gk.mean(axis=0)
    change = np.random.default_rng(4).normal(size=len(mean))
    change -= change.mean()
    change -= centred @ np.linalg.lstsq(centred, change, rcond=None)[0]
    found = program_direction(decoder, mean * (1 + change), mean)
    assert found.angle == pytest.approx(90, abs=1e-4)
    np.testing.assert_allclose(found.cosine_k, 0, atol=1e-10)
    along = program_direction(decoder, mean * (1 + 0.1 * centred[:, 1]), mean)
    assert along.angle < 1e-3
    assert along.cosine_k[1] == pytest.approx(1)
    np.testing.assert_allclose(along.direction_k, np.eye(len(along.direction_k))[1], atol=1e-8)
