"""Statistics of the posterior of each latent dimension: information, activity, and the deterministic latent."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from ldvae_ext.core._arrays import as_numbers, check_shape


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
    Shape (cells, latents), float64, in nats; never negative. Infinite for a variance of 0.

    Examples
    --------
    >>> from ldvae_ext.core import kl_per_dimension
    >>> kl_per_dimension(np.array([[0, 2]]), np.array([[1, 1]]))
    array([[0., 2.]])
    """
    mean_nk, variance_nk = as_numbers(mean_nk, "mean_nk"), as_numbers(variance_nk, "variance_nk")
    check_shape(variance_nk, mean_nk.shape, "variance_nk")
    if (variance_nk < 0).any():
        msg = f"`variance_nk` must not be negative; got {variance_nk[variance_nk < 0].flat[0]:g}."
        raise ValueError(msg)
    excess, is_small = variance_nk - 1.0, np.less(variance_nk, 0.5)
    # log1p keeps the digits that `variance - 1 - log(variance)` loses near the prior, which is the posterior of latents
    # without information. A small variance has none of them left in `variance - 1`.
    log_variance = np.where(is_small, 0.0, np.log1p(np.where(is_small, 0.0, excess)))
    with np.errstate(divide="ignore"):
        np.log(variance_nk, out=log_variance, where=is_small)
    return 0.5 * (mean_nk**2 + (excess - log_variance))


def deterministic_latent(mean_nk: np.ndarray, latent_distribution: str) -> np.ndarray:
    """Deterministic latent of a cell: the posterior mean, or its softmax for a logistic-normal latent."""
    return softmax(mean_nk, axis=1) if latent_distribution == "ln" else mean_nk


class InformationSums:
    """Information and activity of latents, from the posteriors of cells that come in parts.

    Parameters
    ----------
    n_latent
        Number of latents.
    """

    def __init__(self, n_latent: int) -> None:
        self.n_cells = 0
        self._kl_k, self._mean_k, self._square_k = (np.zeros(n_latent) for _ in range(3))

    def add(self, mean_nk: np.ndarray, variance_nk: np.ndarray) -> None:
        """Add cells.

        Parameters
        ----------
        mean_nk, variance_nk
            Posterior means and variances, shape (cells, latents).
        """
        if not len(mean_nk):
            return
        mean_nk = np.asarray(mean_nk, dtype=np.float64)
        self._kl_k += kl_per_dimension(mean_nk, variance_nk).sum(axis=0)
        # Means of two parts and their squared deviations (Chan et al. 1982).
        n_before, self.n_cells = self.n_cells, self.n_cells + len(mean_nk)
        part_k = mean_nk.mean(axis=0)
        shift_k = part_k - self._mean_k
        self._mean_k = self._mean_k + shift_k * len(mean_nk) / self.n_cells
        self._square_k += np.square(mean_nk - part_k).sum(axis=0) + shift_k**2 * n_before * len(mean_nk) / self.n_cells

    def statistics(self) -> dict[str, np.ndarray]:
        """Mean KL in nats, its share, and the variance of the posterior mean, shape (latents,) each."""
        kl_k = self._kl_k / self.n_cells
        return {"kl": kl_k, "kl_share": kl_k / kl_k.sum(), "active_unit": self._square_k / self.n_cells}
