"""Statistics of the posterior of each latent dimension: information, activity, and the deterministic latent."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax


def kl_per_dimension(mean_nk: np.ndarray, variance_nk: np.ndarray) -> np.ndarray:
    """KL divergence of each cell's posterior from the standard normal prior, per latent dimension.

    ``KL_nk = (mean^2 + variance - 1 - log variance) / 2`` (Kingma & Welling 2014, arXiv:1312.6114, appendix B). For a
    logistic-normal latent the same formula holds for u, with z = softmax(u).

    Parameters
    ----------
    mean_nk, variance_nk
        Posterior means and variances, shape (cells, latents).

    Returns
    -------
    Shape (cells, latents), float64, in nats; never negative.

    Examples
    --------
    >>> from ldvae_ext.core import kl_per_dimension
    >>> kl_per_dimension(np.array([[0, 2]]), np.array([[1, 1]]))
    array([[0., 2.]])
    """
    mean_nk = np.asarray(mean_nk, dtype=np.float64)
    variance_nk = np.asarray(variance_nk, dtype=np.float64)
    excess = variance_nk - 1.0
    # log1p keeps the digits that `variance - 1 - log(variance)` loses near the prior, which is the posterior of latents
    # without information.
    return 0.5 * (mean_nk**2 + (excess - np.log1p(excess)))


def deterministic_latent(mean_nk: np.ndarray, latent_distribution: str) -> np.ndarray:
    """Deterministic latent of a cell: the posterior mean, or its softmax for a logistic-normal latent."""
    return softmax(mean_nk, axis=1) if latent_distribution == "ln" else mean_nk
