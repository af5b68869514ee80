"""Importance weights of latents for a group of cells, for any likelihood and latent that a decoder can have."""

from __future__ import annotations

import numpy as np
from scipy.linalg import null_space
from scipy.special import logsumexp


def latent_log_density(
    z_nk: np.ndarray, mean_ak: np.ndarray, variance_ak: np.ndarray, latent_distribution: str
) -> np.ndarray:
    """Log density of latents under Gaussian posteriors, up to a term that depends only on the latent.

    For a normal latent the density itself. For a logistic-normal one, z = softmax(u) with u ~ N(m, diag v), the density
    of ``y = H' log z``. The columns of H are an orthonormal basis of the vectors that sum to zero, so that y = H' u does
    not depend on the constant that softmax removes. It is Gaussian with mean H' m and covariance H' diag(v) H. The Jacobian
    of y depends on z only, so that ratios of densities at one z are exact.

    Parameters
    ----------
    z_nk
        Latents, shape (latents, factors); under ``"ln"`` points of the simplex.
    mean_ak, variance_ak
        Means and variances of the posteriors (of u under ``"ln"``), shape (posteriors, factors).
    latent_distribution
        ``"normal"`` or ``"ln"``.

    Returns
    -------
    Shape (latents, posteriors), float64.
    """
    z_nk, mean_ak, variance_ak = (np.asarray(v, dtype=np.float64) for v in (z_nk, mean_ak, variance_ak))
    n_factors = z_nk.shape[1]
    if latent_distribution == "normal":
        basis, y_nj = np.eye(n_factors), z_nk
    else:
        basis = null_space(np.ones((1, n_factors)))
        # A float32 softmax can round a coordinate to zero.
        y_nj = np.log(np.maximum(z_nk, np.finfo(np.float32).tiny)) @ basis
    out_na = np.empty((len(z_nk), len(mean_ak)))
    for a, (mean_k, variance_k) in enumerate(zip(mean_ak, variance_ak, strict=True)):
        cholesky = np.linalg.cholesky((basis.T * variance_k) @ basis)
        standard_jn = np.linalg.solve(cholesky, (y_nj - mean_k @ basis).T)
        out_na[:, a] = -0.5 * (standard_jn**2).sum(axis=0) - np.log(np.diag(cholesky)).sum()
    return out_na - 0.5 * basis.shape[1] * np.log(2 * np.pi)


def importance_weights(
    log_prior_n: np.ndarray, log_posterior_na: np.ndarray, log_px_na: np.ndarray, log_marginal_a: np.ndarray
) -> np.ndarray:
    """Weight of each latent for the mixture of posteriors of a group of anchor cells.

    ``w_n ~ sum_a p(x_a | z_n) p(z_n) / (p(x_a) sum_b q(z_n | x_b))`` (Boyeau et al. 2023,
    10.1073/pnas.2209124120), as in scvi-tools.

    Parameters
    ----------
    log_prior_n
        Log density of each latent under the prior, shape (latents,).
    log_posterior_na
        Under the posterior of each anchor, shape (latents, anchors).
    log_px_na
        Log-likelihood of each anchor's counts given each latent, same shape.
    log_marginal_a
        Marginal log-likelihood of each anchor, shape (anchors,).

    Returns
    -------
    Log weights, shape (latents,), float64, whose exponentials sum to 1.
    """
    log_ratio_n = log_prior_n - logsumexp(log_posterior_na, axis=1)
    log_weight_n = logsumexp(log_px_na - log_marginal_a, axis=1) + log_ratio_n
    return log_weight_n - logsumexp(log_weight_n)
