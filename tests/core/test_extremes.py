"""Means that are smaller or larger than a float, and models that fit far worse than the null model."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_expit, log_softmax, softmax

from ldvae_ext.core import LinearDecoder, ablation_effects
from ldvae_ext.core._changes import ablation_changes
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.explained import ExplainedSums, PooledProfile, explained_sets
from ldvae_ext.core.plan import AblationRequest
from ldvae_ext.kernels.threads import compiled


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
