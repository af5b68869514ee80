"""Gene scores: how the expression of each gene changes with the usage of a factor or program."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from ldvae_ext._validate import check_positive_int
from ldvae_ext.core._arrays import check_shape, checked

# Counts per cell that expression is normalised to, as in scanpy's tutorials.
TARGET_SUM = 1e4


class GeneScores(NamedTuple):
    """Scores of genes, shape (genes, factors) each.

    Examples
    --------
    >>> from ldvae_ext.core import SlopeSums
    >>> sums = SlopeSums(n_genes=2, n_factors=1)
    >>> sums.add(np.array([[1, 9], [5, 5], [9, 1]]), np.array([[-1], [0], [1]]))
    >>> scores, errors = sums.scores()
    >>> scores.shape, errors.shape
    ((2, 1), (2, 1))
    """

    score_gk: np.ndarray
    """Slope of the standardised log-normalised expression on the standardised usage: in [-1, 1], 0 where either is constant."""
    error_gk: np.ndarray
    """Standard error of the slope; NaN where expression or usage is constant, or with fewer than three cells."""


class SlopeSums:
    """Running sums over cells, from which slopes of log-normalised expression on usages are computed.

    With ``y = log(1 + 10,000 x / sum_g x)`` and usages u, both standardised over cells, the slope of a gene on one usage at a time is
    their correlation r, and its standard error ``sqrt((1 - r^2) / (n - 2))``. Slopes on all usages together, as in
    cNMF's gene scores (Kotliar et al. 2019, 10.7554/eLife.43803), replicate less well: usages that sum to one are collinear.

    Parameters
    ----------
    n_genes, n_factors
        Sizes.

    Examples
    --------
    >>> from ldvae_ext.core import SlopeSums
    >>> sums = SlopeSums(n_genes=2, n_factors=1)
    >>> sums.add(np.array([[1, 9], [5, 5], [9, 1]]), np.array([[-1], [0], [1]]))
    >>> sums.scores().score_gk.round(2)
    array([[ 0.97],
           [-0.97]])
    """

    def __init__(self, n_genes: int, n_factors: int) -> None:
        check_positive_int("n_genes", n_genes)
        check_positive_int("n_factors", n_factors)
        self._n = 0
        self._y_g, self._yy_g = np.zeros(n_genes), np.zeros(n_genes)
        self._u_k, self._uu_k = np.zeros(n_factors), np.zeros(n_factors)
        self._uy_kg = np.zeros((n_factors, n_genes))

    def add(self, x_ng: Any, usage_nk: np.ndarray) -> None:
        """Count some cells in: counts, dense or sparse, shape (cells, genes), and usages, shape (cells, factors)."""
        check_shape(x_ng, (None, len(self._y_g)), "x_ng")
        usage_nk = checked(usage_nk, (np.shape(x_ng)[0], len(self._u_k)), "usage_nk", finite=False)
        y_ng = log_normalised(x_ng)
        self._n += len(usage_nk)
        self._y_g += y_ng.sum(axis=0)
        self._yy_g += (y_ng * y_ng).sum(axis=0)
        self._u_k += usage_nk.sum(axis=0)
        self._uu_k += np.square(usage_nk).sum(axis=0)
        self._uy_kg += (y_ng.T @ usage_nk).T

    def scores(self) -> GeneScores:
        """Slopes and standard errors."""
        n = max(1, self._n)
        y_g, u_k = self._y_g / n, self._u_k / n
        var_g, var_k = self._yy_g / n - y_g**2, self._uu_k / n - u_k**2
        # Rounding leaves a constant with a variance of about 1e-16 of its squared mean.
        norm_gk = np.sqrt(
            np.outer(np.where(var_g > 1e-12 * y_g**2, var_g, 0), np.where(var_k > 1e-12 * u_k**2, var_k, 0))
        )
        covariance_gk = self._uy_kg.T / n - np.outer(y_g, u_k)
        slope_gk = np.divide(covariance_gk, norm_gk, out=np.zeros_like(norm_gk), where=norm_gk > 0).clip(-1, 1)
        error_gk = np.sqrt((1 - slope_gk**2) / (n - 2)) if n > 2 else np.full_like(slope_gk, np.nan)
        return GeneScores(slope_gk, np.where(norm_gk > 0, error_gk, np.nan))


def log_normalised(x_ng: Any) -> sparse.csr_array:
    """``log(1 + 10,000 x / sum_g x)``, shape (cells, genes); zeros for a cell without counts."""
    return (TARGET_SUM * shares(x_ng)).log1p()


def shares(x_ng: Any) -> sparse.csr_array:
    """``x / sum_g x``, shape (cells, genes); zeros for a cell without counts."""
    x_ng = sparse.csr_array(x_ng, dtype=np.float64)
    total_n = x_ng.sum(axis=1)
    return (sparse.diags_array(1 / np.where(total_n > 0, total_n, 1.0)) @ x_ng).tocsr()
