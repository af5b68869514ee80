from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.posterior import deterministic_latent


@given(st.integers(0, 2**31), st.floats(-6, 3))
def test_kl_is_that_of_the_formula_and_never_negative(seed, log_scale):
    rng = np.random.default_rng(seed)
    mean, variance = rng.normal(size=(5, 3)), np.exp(log_scale * rng.random((5, 3)))
    expected = (mean**2 + variance - 1 - np.log(variance)) / 2
    got = kl_per_dimension(mean, variance)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert (got >= 0).all()


def test_kl_keeps_its_digits_near_the_prior():
    excess = 1e-6
    np.testing.assert_allclose(kl_per_dimension(np.zeros((1, 1)), np.array([[1 + excess]])), excess**2 / 4, rtol=1e-3)


def test_deterministic_latent_is_the_mean_or_its_softmax():
    mean = np.array([[0.0, np.log(3.0)]])
    assert deterministic_latent(mean, "normal") is mean
    np.testing.assert_allclose(deterministic_latent(mean, "ln"), [[0.25, 0.75]])
