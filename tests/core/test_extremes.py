"""Means that are smaller or larger than a float, extreme counts, and models that fit far worse than the null model."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import log_expit, log_softmax, softmax

from ldvae_ext.core import (
    LinearDecoder,
    SlopeSums,
    ablation_effects,
    kl_per_dimension,
    log_likelihood,
    path_attribution,
    posterior_of,
    promax,
    varimax,
)
from ldvae_ext.core._changes import ablation_changes
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.explained import ExplainedSums, PooledProfile, explained_sets
from ldvae_ext.core.group_moments import GroupMoments
from ldvae_ext.core.plan import AblationRequest
from ldvae_ext.core.populations import contribution_loadings
from ldvae_ext.kernels.threads import compiled
from tests.core.decoders import full_decoder
from tests.pairwise import examples


def decoder_of(link="softmax", scale=1.0):
    rng = np.random.default_rng(0)
    return LinearDecoder(
        weight_gk=scale * rng.normal(size=(7, 3)),
        intercept_bg=rng.normal(size=(1, 7)),
        genes=[f"g{i}" for i in range(7)],
        batches=["0"],
        factors=["Z_0", "Z_1", "Z_2"],
        likelihood="poisson",
        link=link,
    )


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("value", [1e3, -1e3, 1e5])
@pytest.mark.parametrize("link", ["softmax", "softplus"])
def test_poisson_effects_of_large_values_are_those_in_log_space(on, value, link):
    decoder, rng = decoder_of(link), np.random.default_rng(1)
    x_ng, mean_nk, library_n = rng.poisson(3.0, (5, 7)).astype(float), rng.normal(size=(5, 3)), np.full(5, 20.0)

    def log_mean(z_nk):
        logits_ng = z_nk @ decoder.weight_gk.T + decoder.intercept_bg[0]
        if link == "softmax":
            return np.log(20.0) + log_softmax(logits_ng, axis=1)
        softplus = -log_expit(-logits_ng)
        with np.errstate(divide="ignore"):
            return np.log(20.0) + np.where(logits_ng < -30, logits_ng, np.log(softplus))

    def loss(z_nk):
        return (np.exp(log_mean(z_nk)) - x_ng * log_mean(z_nk)).sum(axis=1)

    expected = np.empty((5, 3))
    for k in range(3):
        moved = mean_nk.copy()
        moved[:, k] = value
        expected[:, k] = loss(moved) - loss(mean_nk)
    with compiled(on=on):
        found = ablation_effects(decoder, x_ng, mean_nk, library_n, None, np.full(3, value), np.arange(3))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_a_cell_without_counts_has_finite_effects():
    decoder = decoder_of()
    changes = ablation_changes(
        decoder, np.zeros((1, 7)), np.ones((1, 3)), np.zeros(1), None, np.zeros(3), [np.array([0])]
    )
    np.testing.assert_array_equal(next(iter(changes)), 0)


def test_a_model_that_is_far_worse_than_the_null_model_explains_a_negative_share():
    decoder, rng = decoder_of(), np.random.default_rng(1)
    x_ng = rng.poisson(50 * softmax(rng.normal(size=(40, 7)), axis=1)).astype(float)
    cells = EncodedCells(
        mean=rng.normal(size=(40, 3)),
        variance=np.ones((40, 3)),
        library=np.full(40, 1e15),
        batch=np.zeros(40, dtype=int),
        label=np.zeros(40, dtype=int),
        covariates=None,
        counts=x_ng,
    )
    plan = explained_sets(AblationRequest(decoder=decoder, has_groups=False, scheme="keep_top").plan(default_seed=0))
    profile, sums = PooledProfile(1, 7), ExplainedSums(1, plan)
    profile.add(cells)
    sums.add(decoder, cells, np.arange(40), np.zeros(40, dtype=int), profile.share_bg)
    table = sums.columns(["all"], ["Z_0", "Z_1", "Z_2"])
    assert np.isfinite(table["cumulative"]).all()
    assert (table["cumulative"] < -1e6).all()


SCALES = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3])
EXTREME_THETA = np.array([1e-8, 1e-4, 1.0, 1e4, 1e8])


@st.composite
def extreme_cases(draw):
    """A decoder with dispersions of both extremes, and cells with counts to 1e6, libraries from 1 to 1e8 and large latents."""
    likelihood = draw(st.sampled_from(["nb", "zinb", "poisson"]))
    link = draw(st.sampled_from(["softmax", "softplus"]))
    dispersion = draw(st.sampled_from(["gene", "gene-batch"]))
    seed, dtype = draw(st.integers(0, 2**16)), draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(seed)
    # All kinds of dispersion among the genes.
    changes = (
        {}
        if likelihood == "poisson"
        else {"theta_bg": rng.choice(EXTREME_THETA, (1 if dispersion == "gene" else 2, 9))}
    )
    decoder = full_decoder(seed, likelihood=likelihood, link=link, dispersion=dispersion, covariates=(), **changes)
    n_cells = 6
    x_ng = np.where(
        rng.random((n_cells, 9)) < 0.4, 0, rng.integers(0, 10 ** rng.integers(0, 7, (n_cells, 9)) + 1)
    ).astype(dtype)
    z_nk = (draw(SCALES) * rng.normal(size=(n_cells, 3))).astype(dtype)
    library_n = (10.0 ** rng.uniform(0, 8, n_cells)).astype(dtype)
    return decoder, x_ng, z_nk, library_n, rng.integers(0, 2, n_cells)


def all_finite(*values):
    return all(np.isfinite(value).all() for value in values)


@settings(examples(200), derandomize=True)
@given(extreme_cases())
def test_decoded_expression_and_likelihood_of_extreme_cells_are_finite(case):
    decoder, x_ng, z_nk, library_n, batch_n = case
    scale, rate = decoder.scale(z_nk, batch_n), decoder.rate(z_nk, batch_n, library=library_n)
    assert all_finite(scale, rate)
    assert (rate >= 0).all()
    theta = None if decoder.likelihood == "poisson" else decoder.theta(batch_n, len(z_nk))
    dropout = decoder.dropout_logits(z_nk, batch_n) if decoder.likelihood == "zinb" else None
    value = log_likelihood(decoder.likelihood, x_ng, rate, theta, dropout)
    if decoder.likelihood != "poisson":
        assert all_finite(value)
    else:
        # A Poisson whose mean is 0 in floats cannot give a count: its likelihood is 0.
        np.testing.assert_array_equal(np.isneginf(value), (rate == 0) & (x_ng > 0))
        assert not np.isnan(value).any()


@pytest.mark.parametrize("on", [True, False])
@settings(examples(100), derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=extreme_cases(), value=st.sampled_from([0.0, 1e3, -1e3]))
def test_effects_of_ablations_in_extreme_cells_are_finite(on, case, value):
    decoder, x_ng, z_nk, library_n, batch_n = case
    with compiled(on=on):
        found = ablation_effects(decoder, x_ng, z_nk, library_n, batch_n, np.full(3, value), np.arange(3))
    assert all_finite(found)


@settings(examples(40), derandomize=True)
@given(extreme_cases())
def test_posteriors_of_extreme_cells_are_finite(case):
    decoder, x_ng, z_nk, library_n, batch_n = case
    for start_nk in (None, z_nk):
        found = posterior_of(decoder, x_ng, batch_n, library=library_n, start_nk=start_nk)
        assert all_finite(found.mean_nk, found.variance_nk, found.covariance_nkk, found.log_evidence_n)
        assert (found.variance_nk > 0).all()


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
@pytest.mark.parametrize("start", [0.0, 1e3, -1e4])
def test_the_search_for_a_posterior_comes_back_from_far_away(on, likelihood, start):
    decoder, rng = (
        full_decoder(3, 120, 3, 1, likelihood=likelihood, dispersion="gene", covariates=()),
        np.random.default_rng(0),
    )
    x_ng = rng.poisson(decoder.rate(rng.normal(size=(5, 3)), library=500.0))
    with compiled(on=on):
        near = posterior_of(decoder, x_ng)
        found = posterior_of(decoder, x_ng, start_nk=np.full((5, 3), start))
    assert all_finite(*found)
    assert found.converged_n.all()
    # From far away the search may end in another mode; it is a maximum as well.
    np.testing.assert_allclose(found.mean_nk, near.mean_nk, atol=1e-5)


@settings(examples(100), derandomize=True)
@given(
    st.integers(0, 2**16), st.sampled_from([np.float32, np.float64]), st.sampled_from([1e-30, 1e-8, 1.0, 1e8]), SCALES
)
def test_divergences_of_extreme_posteriors_are_finite(seed, dtype, variance, scale):
    rng = np.random.default_rng(seed)
    mean_nk = (scale * rng.normal(size=(5, 3))).astype(dtype)
    assert all_finite(kl_per_dimension(mean_nk, np.full((5, 3), variance, dtype)))


def test_the_divergence_of_a_posterior_without_a_variance_is_infinite():
    # A point mass is infinitely far from the prior; float32 has no smaller positive number.
    assert np.isposinf(kl_per_dimension(np.zeros((1, 1)), np.zeros((1, 1)))).all()


@settings(examples(60), derandomize=True)
@given(st.integers(0, 2**16), st.sampled_from([np.float32, np.float64]), st.sampled_from([1e-6, 1.0, 1e3]))
def test_rotations_of_small_and_large_loadings_are_finite_and_turn_alike(seed, dtype, scale):
    rng = np.random.default_rng(seed)
    value_gk = rng.normal(size=(12, 3)).astype(dtype)
    found = varimax(value_gk * dtype(scale))
    assert all_finite(found)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-6)
    assert all_finite(promax(value_gk * dtype(scale), found))


@settings(examples(60), derandomize=True)
@given(extreme_cases())
def test_population_loadings_and_gene_scores_of_extreme_cells_are_finite(case):
    decoder, x_ng, z_nk, _, batch_n = case
    group_n = np.arange(6) % 2
    for scale in ("log", "expression"):
        moments = GroupMoments(decoder, 2, scale)
        moments.add(z_nk, batch_n, None, group_n)
        assert all_finite(moments.mean_pk, moments.offset_pg, moments.covariance_pkk, moments.gradient_loadings())
    mean_pk = moments.mean_pk
    assert all_finite(contribution_loadings(decoder, mean_pk[0] - mean_pk[1]))
    offset_pg = moments.offset_pg
    with warnings.catch_warnings():
        # Said of paths that are too long to be split exactly; the split is of numbers all the same.
        warnings.filterwarnings("ignore", "A path is so long", UserWarning)
        assert all_finite(path_attribution(decoder, mean_pk[0], offset_pg[0], mean_pk[1], offset_pg[1]))
    sums = SlopeSums(9, 3)
    sums.add(x_ng, z_nk)
    scores = sums.scores()
    assert all_finite(scores.score_gk)
    # A constant gene or factor has no error.
    assert all_finite(scores.error_gk[scores.score_gk != 0])
