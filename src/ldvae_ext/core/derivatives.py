"""First and second derivatives of the log-likelihood of counts in log-mean, dropout logit and log-dispersion."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.special import digamma, expit, polygamma

from ldvae_ext.core.likelihood import EPS

# Parameters of a count that depend on the latent, in this order.
LOG_MEAN, DROPOUT, LOG_THETA = "log_mean", "dropout", "log_theta"


class Derivatives(NamedTuple):
    """Derivatives of the log-likelihood of each count, shape (cells, genes) each."""

    first: dict[str, np.ndarray]
    """By parameter."""
    second: dict[tuple[str, str], np.ndarray]
    """By pair of parameters; each pair once."""


def derivatives(
    likelihood: str,
    x_ng: np.ndarray,
    mu_ng: np.ndarray,
    theta: Any = None,
    dropout_ng: Any = None,
    *,
    of_theta: bool = False,
) -> Derivatives:
    """Derivatives of :func:`ldvae_ext.core.likelihood.log_likelihood`, with scvi-tools' eps.

    Parameters
    ----------
    likelihood, x_ng, mu_ng, theta, dropout_ng
        As there.
    of_theta
        True to include derivatives in ``log theta``, the log of the standard deviation under ``"normal"``.
    """
    if likelihood == "poisson":
        return Derivatives({LOG_MEAN: x_ng - mu_ng}, {(LOG_MEAN, LOG_MEAN): -mu_ng})
    if likelihood == "normal":
        return _of_normal(x_ng, mu_ng, theta, of_theta=of_theta)
    inner = _of_negative_binomial(x_ng, mu_ng, theta, of_theta=of_theta)
    return inner if likelihood == "nb" else _with_dropout(inner, x_ng, mu_ng, theta, dropout_ng)


def _of_normal(x_ng: np.ndarray, mu_ng: np.ndarray, sd: Any, *, of_theta: bool) -> Derivatives:
    scaled_ng, times_ng = (x_ng - mu_ng) / sd, mu_ng / sd
    first = {LOG_MEAN: scaled_ng * times_ng}
    second = {(LOG_MEAN, LOG_MEAN): first[LOG_MEAN] - times_ng**2}
    if of_theta:
        first[LOG_THETA] = scaled_ng**2 - 1
        second[LOG_MEAN, LOG_THETA] = -2 * first[LOG_MEAN]
        second[LOG_THETA, LOG_THETA] = -2 * scaled_ng**2
    return Derivatives(first, second)


def _of_negative_binomial(x_ng: np.ndarray, mu_ng: np.ndarray, theta: Any, *, of_theta: bool) -> Derivatives:
    sum_ng, count_ng = theta + mu_ng + EPS, x_ng + theta
    share_ng, ratio_ng = mu_ng / sum_ng, mu_ng / (mu_ng + EPS)
    first = {LOG_MEAN: x_ng * ratio_ng - count_ng * share_ng}
    second = {
        (LOG_MEAN, LOG_MEAN): x_ng * ratio_ng * (1 - ratio_ng) - count_ng * share_ng * (1 - share_ng),
    }
    if of_theta:
        excess_ng = (mu_ng + EPS - x_ng) / sum_ng
        slope_ng = np.log((theta + EPS) / sum_ng) + theta / (theta + EPS) - count_ng / sum_ng
        curvature_ng = (theta + 2 * EPS) / np.square(theta + EPS) - (1 + excess_ng) / sum_ng
        # The gamma functions of a count of zero cancel.
        at = np.nonzero(x_ng)
        theta_at, count_at = np.broadcast_to(theta, x_ng.shape)[at], count_ng[at]
        slope_ng[at] += digamma(count_at) - digamma(theta_at)
        curvature_ng[at] += polygamma(1, count_at) - polygamma(1, theta_at)
        first[LOG_THETA] = theta * slope_ng
        second[LOG_MEAN, LOG_THETA] = -theta * share_ng * excess_ng
        second[LOG_THETA, LOG_THETA] = first[LOG_THETA] + theta**2 * curvature_ng
    return Derivatives(first, second)


def _with_dropout(
    inner: Derivatives, x_ng: np.ndarray, mu_ng: np.ndarray, theta: Any, dropout_ng: np.ndarray
) -> Derivatives:
    """Zero inflation: a positive count is not dropped, and a zero is ``log(e^dropout + e^inner) - softplus(dropout)``."""
    is_zero_ng, dropped_ng = x_ng <= EPS, expit(dropout_ng)
    # Posterior probability that a zero is a count of the negative binomial.
    log_zero_ng = theta * np.log((theta + EPS) / (theta + mu_ng + EPS))
    counted_ng = np.where(is_zero_ng, expit(log_zero_ng - dropout_ng), 1.0)
    spread_ng = counted_ng * (1 - counted_ng)
    first = {name: counted_ng * slope_ng for name, slope_ng in inner.first.items()}
    first[DROPOUT] = np.where(is_zero_ng, 1 - counted_ng, 0.0) - dropped_ng
    second = {
        (a, b): counted_ng * curvature_ng + spread_ng * inner.first[a] * inner.first[b]
        for (a, b), curvature_ng in inner.second.items()
    }
    for name, slope_ng in inner.first.items():
        second[name, DROPOUT] = -spread_ng * slope_ng
    second[DROPOUT, DROPOUT] = spread_ng - dropped_ng * (1 - dropped_ng)
    return Derivatives(first, second)


def softplus_slope(scale_ng: np.ndarray) -> np.ndarray:
    """Derivative of ``log softplus(m)`` by m, from ``scale = softplus(m)``: ``(1 - e^-scale) / scale``, which tends to 1 at 0."""
    return np.divide(-np.expm1(-scale_ng), scale_ng, out=np.ones_like(scale_ng), where=scale_ng > 0)
