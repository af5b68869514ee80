from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ldvae_ext.core.draws import POSTERIOR, PRIOR, donors, normal_draws
from tests.pairwise import examples


@given(
    seed=st.integers(0, 2**63),
    purpose=st.sampled_from((POSTERIOR, PRIOR)),
    positions=st.lists(st.integers(0, 2**40), min_size=1, max_size=8),
    n_latent=st.integers(1, 5),
    n_samples=st.integers(1, 4),
)
@examples(50)
def test_a_cell_has_its_draws_whichever_cells_and_samples_are_asked_for(seed, purpose, positions, n_latent, n_samples):
    draws_snk = normal_draws(seed, purpose, np.array(positions), n_latent, n_samples)
    assert draws_snk.shape == (n_samples, len(positions), n_latent)
    for n, position in enumerate(positions):
        alone_snk = normal_draws(seed, purpose, np.array([position]), n_latent, n_samples + 3)
        np.testing.assert_array_equal(alone_snk[:n_samples, 0], draws_snk[:, n])


def test_no_number_is_shared_between_cells_samples_latents_purposes_and_seeds():
    position_n = np.array([*range(300), 2**31, 2**32, 2**32 + 1])
    draws = [
        normal_draws(seed, purpose, position_n, 6, 5).ravel()
        for seed in (0, 1, 2, 2**32)
        for purpose in (POSTERIOR, PRIOR)
    ]
    assert len(np.unique(np.concatenate(draws))) == 8 * 303 * 6 * 5


@pytest.mark.parametrize("purpose", [POSTERIOR, PRIOR])
def test_draws_are_standard_normal_and_independent(purpose):
    draws_snk = normal_draws(0, purpose, np.arange(5000), 3, 2)
    assert stats.kstest(draws_snk.ravel(), "norm").pvalue > 0.001
    columns = [*draws_snk[0].T, *draws_snk[1].T]
    correlation = np.corrcoef(columns) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(5000), "latents and samples"
    for lag in (1, 2, 3):
        neighbours = [np.corrcoef(column[:-lag], column[lag:])[0, 1] for column in columns]
        assert np.abs(neighbours).max() < 5 / np.sqrt(5000), "cells"


def test_donors_are_a_permutation_that_the_seed_decides():
    first, second = donors(0, 1000), donors(1, 1000)
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    np.testing.assert_array_equal(donors(0, 1000), first)
    assert (first != second).mean() > 0.9
    assert (first == np.arange(1000)).sum() < 10
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 5 / np.sqrt(1000)
