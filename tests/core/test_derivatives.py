"""Derivatives of log-likelihoods against central differences."""

from __future__ import annotations

import numpy as np
import pytest

from ldvae_ext.core.derivatives import DROPOUT, LOG_MEAN, LOG_THETA, derivatives
from ldvae_ext.core.likelihood import log_likelihood

LIKELIHOODS = ("nb", "zinb", "poisson", "normal")
X = np.array([[0.0, 1.0, 3.0, 40.0, 0.0, 0.0]])
START = {
    LOG_MEAN: np.array([[-1.0, 0.5, 2.0, 3.0, -6.0, 3.0]]),
    DROPOUT: np.array([[-1.0, 2.0, 0.3, -3.0, 1.0, -0.5]]),
    LOG_THETA: np.array([[0.5, -1.0, 2.0, 0.0, 1.0, -0.3]]),
}


def value(likelihood, parameters):
    theta, dropout = np.exp(parameters[LOG_THETA]), parameters[DROPOUT]
    return log_likelihood(likelihood, X, np.exp(parameters[LOG_MEAN]), theta, dropout)


def moved(name, step):
    return {**START, name: START[name] + step}


@pytest.mark.parametrize("of_theta", [False, True])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_first_and_second_derivatives_are_those_of_differences(likelihood, of_theta):
    def at(parameters):
        theta, dropout = np.exp(parameters[LOG_THETA]), parameters[DROPOUT]
        return derivatives(likelihood, X, np.exp(parameters[LOG_MEAN]), theta, dropout, of_theta=of_theta)

    got, step = at(START), 1e-5
    names = {LOG_MEAN}
    names |= {DROPOUT} if likelihood == "zinb" else set()
    names |= {LOG_THETA} if of_theta and likelihood != "poisson" else set()
    assert set(got.first) == names
    assert {frozenset(pair) for pair in got.second} == {frozenset((a, b)) for a in names for b in names}
    for name in names:
        difference = (value(likelihood, moved(name, step)) - value(likelihood, moved(name, -step))) / (2 * step)
        np.testing.assert_allclose(got.first[name], difference, rtol=1e-5, atol=1e-8)
    for (a, b), curvature in got.second.items():
        difference = (at(moved(b, step)).first[a] - at(moved(b, -step)).first[a]) / (2 * step)
        np.testing.assert_allclose(curvature, difference, rtol=1e-5, atol=1e-8)
