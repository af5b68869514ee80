"""Standard errors of loadings, and loadings that are shrunk by them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from ldvae_ext._validate import check_is_decoder, check_number, check_positive_int
from ldvae_ext.core._arrays import checked
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.fisher import logit_information

# Smallest standard deviation of the prior, in the smallest standard error, and ratio of neighbours on the grid.
_FINEST, _RATIO = 0.1, np.sqrt(2)
_MAX_ITERATIONS, _TOLERANCE = 2000, 1e-7
# Genes without an effect that are added to those that are seen.
_NULL_GENES = 9
_BISECTIONS = 50
# Information of a thousandth of a count: loadings without any get a large standard error instead of an infinite one.
_RIDGE = 1e-3


class LoadingInformation:
    """Running Fisher information of counts about the loadings of each gene, given the posterior means of the cells.

    With the information ``w_ng`` of a count about its logit (:func:`ldvae_ext.core.fisher.log_mean_information`), the loadings and
    the batch intercepts of gene g have the information ``sum_n w_ng (z_n, b_n)(z_n, b_n)'``, the loadings alone its
    Schur complement. Standard errors are roots of the diagonal of its inverse: those of a generalised linear model of
    each gene with the latents as covariates. They leave out that latents are estimated, and that genes share a cell's total.

    Parameters
    ----------
    decoder
        The decoder, on the axes whose loadings are meant.

    Examples
    --------
    >>> from ldvae_ext.core import LinearDecoder, LoadingInformation
    >>> from ldvae_ext.core.cells import EncodedCells
    >>> decoder = LinearDecoder.from_loadings([[0], [0]], [0, 0], genes=["a", "b"])
    >>> mean, library, code = np.array([[-1], [1]]), np.full(2, 100), np.zeros(2, int)
    >>> cells = EncodedCells(mean, np.ones((2, 1)), library, code, code, None, None)
    >>> information = LoadingInformation(decoder)
    >>> information.add(cells)
    >>> information.errors().round(3)  # from 50 counts of each gene in each cell
    array([[0.1],
           [0.1]])
    """

    def __init__(self, decoder: LinearDecoder) -> None:
        check_is_decoder(decoder)
        n_genes, n_factors = decoder.weight_gk.shape
        self._decoder, self._n_cells = decoder, 0
        self._total_bg = np.zeros((len(decoder.batches), n_genes))
        self._first_bgk = np.zeros((len(decoder.batches), n_genes, n_factors))
        self._second_gj = np.zeros((n_genes, n_factors * (n_factors + 1) // 2))

    def add(self, cells: EncodedCells) -> None:
        """Count some cells in; their counts are not used."""
        weight_ng, mean_nk = logit_information(self._decoder, cells), np.asarray(cells.mean, dtype=np.float64)
        self._n_cells += len(mean_nk)
        for b in np.unique(cells.batch):
            inside = np.asarray(cells.batch) == b
            self._total_bg[b] += weight_ng[inside].sum(axis=0)
            self._first_bgk[b] += weight_ng[inside].T @ mean_nk[inside]
        first, second = np.triu_indices(mean_nk.shape[1])
        self._second_gj += weight_ng.T @ (mean_nk[:, first] * mean_nk[:, second])

    def errors(self, n_cells: int | None = None) -> np.ndarray:
        """Standard errors of the loadings, shape (genes, factors), in log-rate per unit of latent.

        Parameters
        ----------
        n_cells
            Number of cells that the loadings were estimated from; those that were counted in if None, which otherwise are
            a sample of them.
        """
        if n_cells is not None:
            check_positive_int("n_cells", n_cells)
        n_genes, n_factors = self._decoder.weight_gk.shape
        ratio = 1.0 if n_cells is None else n_cells / max(1, self._n_cells)
        first, second = np.triu_indices(n_factors)
        error_gk = np.empty((n_genes, n_factors))
        for start in range(0, n_genes, 1024):
            at = slice(start, start + 1024)
            information_gkk = np.empty((len(error_gk[at]), n_factors, n_factors))
            information_gkk[:, first, second] = information_gkk[:, second, first] = self._second_gj[at]
            for total_g, first_gk in zip(self._total_bg[:, at], self._first_bgk[:, at], strict=True):
                mean_gk = np.divide(first_gk, total_g[:, None], out=np.zeros_like(first_gk), where=total_g[:, None] > 0)
                information_gkk -= first_gk[:, :, None] * mean_gk[:, None, :]
            inverse_gkk = np.linalg.inv(ratio * information_gkk + _RIDGE * np.eye(n_factors))
            error_gk[at] = np.sqrt(np.diagonal(inverse_gkk, axis1=1, axis2=2))
        return error_gk


class Shrunken(NamedTuple):
    """Posterior of loadings under a prior that was estimated from all of them, shape (genes, factors) each.

    Examples
    --------
    >>> from ldvae_ext.core import shrink
    >>> found = shrink(np.array([[3], [0.1], [-0.1], [0]]), np.full((4, 1), 0.2))
    >>> (found.lower_gk[:2, 0] > 0).tolist()  # only the first is surely positive
    [True, False]
    """

    mean_gk: np.ndarray
    """Posterior means."""
    sd_gk: np.ndarray
    """Posterior standard deviations."""
    lower_gk: np.ndarray
    """Lower ends of the central intervals."""
    upper_gk: np.ndarray
    """Upper ends."""
    false_sign_gk: np.ndarray
    """Local false sign rates: the smaller of the posterior probabilities of ``theta >= 0`` and ``theta <= 0``, in [0, 1]."""


def check_level(level: float) -> None:
    """Raise unless this is a probability of intervals."""
    check_number("level", level)
    if not 0 < level < 1:
        msg = f"`level` must lie between 0 and 1; got {level!r}."
        raise ValueError(msg)


def shrink(weight_gk: np.ndarray, error_gk: np.ndarray, level: float = 0.95) -> Shrunken:
    """Adaptive shrinkage (Stephens 2017, 10.1093/biostatistics/kxw041) of estimates with standard errors, column by column.

    The loadings of a factor have the prior ``pi_0 delta_0 + sum_j pi_j N(0, sigma_j^2)`` on a grid of sigma_j. Its weights
    maximise ``sum_g log p(w_g) + 9 log pi_0`` with ``w_g ~ N(theta_g, s_g^2)``, which is concave in them (EM). The second term
    decides for zeros where small and no effects fit alike, as in ashr. Estimates with large standard errors move most towards 0.

    Parameters
    ----------
    weight_gk
        Estimates, shape (genes, factors).
    error_gk
        Their standard errors, positive, of the same shape.
    level
        Posterior probability of the intervals.

    Returns
    -------
    The posterior.

    Raises
    ------
    ValueError
        If shapes differ, values are not finite, errors are not positive, or ``level`` is not between 0 and 1.

    Examples
    --------
    >>> from ldvae_ext.core import shrink
    >>> weights = np.array([[3], [3], [0.1], [-0.1], [0]])
    >>> errors = np.array([[0.2], [3], [0.2], [0.2], [0.2]])
    >>> shrink(weights, errors).mean_gk[:2, 0].round(1)  # a small, a large error
    array([3. , 0.1])
    """
    weight_gk = checked(weight_gk, (None, None), "weight_gk")
    error_gk = checked(error_gk, weight_gk.shape, "error_gk", positive=True)
    check_level(level)
    columns = [_shrink_column(w_g, s_g, level) for w_g, s_g in zip(weight_gk.T, error_gk.T, strict=True)]
    return Shrunken(*(np.stack(part, axis=1) for part in zip(*columns, strict=True)))


def _shrink_column(weight_g: np.ndarray, error_g: np.ndarray, level: float) -> tuple[np.ndarray, ...]:
    variance_g = np.square(error_g)
    prior_j = np.square(_grid(weight_g, error_g))
    total_gj = variance_g[:, None] + prior_j
    log_gj = -0.5 * (np.log(total_gj) + np.square(weight_g)[:, None] / total_gj)
    log_gj -= log_gj.max(axis=1, keepdims=True)
    share_gj = _responsibilities(np.exp(log_gj))
    mean_gj = weight_g[:, None] * prior_j / total_gj
    sd_gj = np.sqrt(variance_g[:, None] * prior_j / total_gj)
    mean_g = (share_gj * mean_gj).sum(axis=1)
    sd_g = np.sqrt(np.maximum((share_gj * (np.square(sd_gj) + np.square(mean_gj))).sum(axis=1) - mean_g**2, 0))
    tail = 0.5 * (1 - level)
    lower_g = _quantile(tail, share_gj, mean_gj, sd_gj)
    upper_g = _quantile(1 - tail, share_gj, mean_gj, sd_gj)
    below_g = (share_gj[:, 1:] * ndtr(-mean_gj[:, 1:] / sd_gj[:, 1:])).sum(axis=1)
    false_sign_g = np.minimum(share_gj[:, 0] + below_g, 1 - below_g)
    return mean_g, sd_g, lower_g, upper_g, false_sign_g


def _grid(weight_g: np.ndarray, error_g: np.ndarray) -> np.ndarray:
    """Standard deviations of the components of the prior, 0 first."""
    finest = _FINEST * error_g.min()
    widest = max(2 * np.sqrt(np.maximum(np.square(weight_g) - np.square(error_g), 0).max()), 8 * finest)
    n_steps = int(np.ceil(np.log(widest / finest) / np.log(_RATIO)))
    return np.concatenate([[0.0], widest * _RATIO ** np.arange(-n_steps, 1.0)])


def _responsibilities(likelihood_gj: np.ndarray) -> np.ndarray:
    """Posterior probabilities of the components under the estimated weights."""
    weight_j = np.full(likelihood_gj.shape[1], 1 / likelihood_gj.shape[1])
    for _ in range(_MAX_ITERATIONS):
        share_gj = likelihood_gj * weight_j
        share_gj /= share_gj.sum(axis=1, keepdims=True)
        total_j = share_gj.sum(axis=0)
        total_j[0] += _NULL_GENES
        former_j, weight_j = weight_j, total_j / total_j.sum()
        if np.abs(weight_j - former_j).max() < _TOLERANCE:
            break
    return share_gj


def _quantile(probability: float, share_gj: np.ndarray, mean_gj: np.ndarray, sd_gj: np.ndarray) -> np.ndarray:
    """Quantiles of mixtures of normal distributions, the first component of which is the constant 0."""
    reach_g = 10 * sd_gj.max(axis=1) + np.abs(mean_gj).max(axis=1)
    lower_g, upper_g = -reach_g, reach_g.copy()
    for _ in range(_BISECTIONS):
        middle_g = 0.5 * (lower_g + upper_g)
        z_gj = (middle_g[:, None] - mean_gj[:, 1:]) / sd_gj[:, 1:]
        below_g = (share_gj[:, 1:] * ndtr(z_gj)).sum(axis=1) + share_gj[:, 0] * (middle_g >= 0)
        is_below = below_g < probability
        lower_g, upper_g = np.where(is_below, middle_g, lower_g), np.where(is_below, upper_g, middle_g)
    return upper_g
