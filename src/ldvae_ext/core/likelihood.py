"""Log-likelihoods of counts, with scvi-tools' own formulas.

scvi-tools adds ``eps = 1e-8`` inside the logarithms of its negative binomials (``scvi.distributions``), which matters
when an ablation makes a mean very small; the same eps is used here. Its Poisson is torch's, without eps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import gammaln, xlogy

from ldvae_ext._validate import check_one_of
from ldvae_ext.core._arrays import check_broadcasts
from ldvae_ext.core.cells import nonzero

EPS = 1e-8


def log_likelihood(
    likelihood: str,
    x_ng: np.ndarray,
    mu_ng: np.ndarray,
    theta: Any = None,
    dropout_ng: Any = None,
) -> np.ndarray:
    """Log-likelihood of each count.

    Parameters
    ----------
    likelihood
        ``"nb"``, ``"zinb"``, ``"poisson"`` or ``"normal"``.
    x_ng, mu_ng
        Counts and their means, shape (cells, genes).
    theta
        Inverse dispersion, broadcast to (cells, genes); the standard deviation under ``"normal"``; not used by
        ``"poisson"``.
    dropout_ng
        Logits of zero inflation, shape (cells, genes); used by ``"zinb"`` only.

    Returns
    -------
    Shape (cells, genes), in nats.

    Examples
    --------
    >>> from ldvae_ext.core import log_likelihood
    >>> log_likelihood("poisson", np.array([[0, 2]]), np.array([[1, 2]])).round(3)
    array([[-1.   , -1.307]])
    """
    check_one_of("likelihood", likelihood, ("nb", "zinb", "poisson", "normal"))
    needed = {
        "theta": likelihood != "poisson" and theta is None,
        "dropout_ng": likelihood == "zinb" and dropout_ng is None,
    }
    for name, is_missing in needed.items():
        if is_missing:
            msg = f"`{name}` is needed by `likelihood={likelihood!r}`; got None."
            raise ValueError(msg)
    check_broadcasts(mu_ng, np.shape(x_ng), "mu_ng")
    return mean_dependent_part(likelihood, x_ng, mu_ng, theta, dropout_ng) + constant_part(likelihood, x_ng, theta)


def constant_part(likelihood: str, x_ng: np.ndarray, theta: Any = None) -> Any:
    """The terms of :func:`log_likelihood` that depend on counts and dispersion alone; a number, or one for each count.

    Parameters
    ----------
    likelihood, x_ng, theta
        See :func:`log_likelihood`.
    """
    if likelihood == "poisson":
        return -gammaln(x_ng + 1.0)
    if likelihood == "normal":
        return -np.log(theta) - 0.5 * np.log(2 * np.pi)
    constant = gammaln(x_ng + theta) - gammaln(theta) - gammaln(x_ng + 1.0)
    if likelihood == "zinb":
        return np.where(x_ng > EPS, constant, 0.0)
    return constant + theta * np.log(theta + EPS)


def mean_dependent_part(
    likelihood: str,
    x_ng: np.ndarray,
    mu_ng: np.ndarray,
    theta: Any = None,
    dropout_ng: Any = None,
) -> np.ndarray:
    """The terms of :func:`log_likelihood` that the mean changes; all that a paired difference needs.

    No gamma function is computed: these terms depend only on counts and dispersion, and cancel.
    """
    if likelihood == "poisson":
        return xlogy(x_ng, mu_ng) - mu_ng
    if likelihood == "normal":
        return -0.5 * np.square((x_ng - mu_ng) / theta)
    log_theta_mu = np.log(theta + mu_ng + EPS)
    if likelihood == "nb":
        return x_ng * np.log(mu_ng + EPS) - (x_ng + theta) * log_theta_mu
    if likelihood == "zinb":
        stay_zero = -dropout_ng + theta * (np.log(theta + EPS) - log_theta_mu)
        positive = stay_zero + x_ng * (np.log(mu_ng + EPS) - log_theta_mu)
        # softplus(s) = log(1 + e^s)
        return np.where(x_ng > EPS, positive, np.logaddexp(0.0, stay_zero)) - np.logaddexp(0.0, -dropout_ng)
    msg = f"`likelihood` must be 'nb', 'zinb', 'poisson' or 'normal'; got {likelihood!r}."
    raise ValueError(msg)


def deviance(
    likelihood: str,
    x_ng: np.ndarray,
    mu_ng: np.ndarray,
    theta: Any = None,
    dropout_ng: Any = None,
) -> np.ndarray:
    """Deviance of each count: twice the log-likelihood lost against a mean that equals the count.

    Parameters
    ----------
    likelihood, x_ng, mu_ng, theta, dropout_ng
        See :func:`log_likelihood`; dispersion and dropout are the same on both sides.

    Returns
    -------
    Shape (cells, genes), in nats (of 2 log-likelihoods), not negative but for scvi-tools' ``eps`` and rounding.
    """
    saturated = mean_dependent_part(likelihood, x_ng, x_ng, theta, dropout_ng)
    return 2 * (saturated - mean_dependent_part(likelihood, x_ng, mu_ng, theta, dropout_ng))


def sparse_deviance(likelihood: str, x_ng: Any, mu_ng: np.ndarray, theta: Any = None) -> np.ndarray:
    """Sum over genes of :func:`deviance`, from the non-zero counts and the deviance of a cell without any.

    A count of zero needs one logarithm under ``"nb"`` and none under ``"poisson"``, where the sum over all genes of its terms
    is ``2 sum_g theta log(1 + mu / (theta + eps))`` and ``2 sum_g mu``.

    Parameters
    ----------
    likelihood
        ``"nb"`` or ``"poisson"``.
    x_ng
        Counts, dense or sparse, shape (cells, genes).
    mu_ng, theta
        See :func:`log_likelihood`.

    Returns
    -------
    Shape (cells,), in nats (of 2 log-likelihoods).
    """
    at, x = nonzero(x_ng)
    at_n, at_g = np.divmod(at, mu_ng.shape[1])
    mu = mu_ng[at_n, at_g]
    if likelihood == "poisson":
        zeros_n, change = mu_ng.sum(axis=1), xlogy(x, x) - x - xlogy(x, mu)
    else:
        theta_ng = np.broadcast_to(theta, mu_ng.shape)
        of_zero_ng = mu_ng / (theta_ng + EPS)
        of_zero_ng += 1.0
        zeros_n = np.einsum("ng,ng->n", np.log(of_zero_ng, out=of_zero_ng), theta_ng)
        r = theta_ng[at_n, at_g]
        change = x * np.log((x + EPS) / (mu + EPS)) - r * np.log((r + x + EPS) / (r + EPS))
        change -= x * np.log((r + x + EPS) / (r + mu + EPS))
    return 2 * (zeros_n + np.bincount(at_n, weights=change, minlength=len(zeros_n)))
