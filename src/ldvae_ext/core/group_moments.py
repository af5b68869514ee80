"""Sums over the cells of populations, which their loadings are computed from."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit

from ldvae_ext.core._design import design_matrix
from ldvae_ext.core.cells import at_rows, indicator
from ldvae_ext.core.decoder import LinearDecoder

# Cells whose latents wait for a pass over the groups, and cells that are decoded at once.
_AT_ONCE, _DECODED = 65_536, 1024


class GroupMoments:
    """Running sums over the cells of each population.

    Parameters
    ----------
    decoder
        The decoder.
    n_groups
        Number of groups.
    scale
        ``"log"`` or ``"expression"`` to also sum derivatives of the decoder, for which each cell is decoded.
    """

    def __init__(self, decoder: LinearDecoder, n_groups: int, scale: str | None = None) -> None:
        n_genes, n_latent = decoder.weight_gk.shape
        self._decoder, self._scale = decoder, scale
        self.n_p = np.zeros(n_groups, dtype=np.int64)
        self._z_pk = np.zeros((n_groups, n_latent))
        self._zz_pkk = np.zeros((n_groups, n_latent, n_latent))
        self._batch_pb = np.zeros((n_groups, len(decoder.batches)))
        self._design_pc = np.zeros((n_groups, sum(c.n_columns for c in decoder.covariates)))
        self._derivative_pgk = None if scale is None else np.zeros((n_groups, n_genes, n_latent))
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray] | None]] = []

    def add(self, z_nk: np.ndarray, batch_n: np.ndarray, covariates: Any, group_n: np.ndarray) -> None:
        """Count some cells in.

        Parameters
        ----------
        z_nk
            Latents (points of the simplex under ``"ln"``), shape (cells, factors).
        batch_n
            Batch codes, shape (cells,).
        covariates
            See :meth:`ldvae_ext.core.LinearDecoder.scale`.
        group_n
            Group codes, shape (cells,); -1 is none.
        """
        decoder, n_groups = self._decoder, len(self.n_p)
        indicator_pn = indicator(group_n, n_groups)
        self.n_p += np.bincount(group_n[group_n >= 0], minlength=n_groups)
        self._z_pk += indicator_pn @ z_nk
        self._batch_pb += indicator_pn @ np.eye(len(decoder.batches))[batch_n]
        design_nc = design_matrix(decoder.covariates, covariates, len(z_nk))
        self._design_pc += indicator_pn @ design_nc
        values = at_rows(covariates, (c.name for c in decoder.covariates), slice(None), len(z_nk))
        self._waiting.append((z_nk, batch_n, group_n, values))
        if sum(len(part[0]) for part in self._waiting) >= _AT_ONCE:
            self._sum_waiting()

    def _sum_waiting(self) -> None:
        """Sum what needs a pass for each group, over the cells of many chunks at once: there may be as many groups as cells in a chunk."""
        if not self._waiting:
            return
        z_parts, batch_parts, group_parts, value_parts = zip(*self._waiting, strict=True)
        self._waiting = []
        group_n = np.concatenate(group_parts)
        order = np.argsort(group_n, kind="stable")
        order = order[np.searchsorted(group_n[order], 0) :]
        z_nk, batch_n, group_n = np.concatenate(z_parts)[order], np.concatenate(batch_parts)[order], group_n[order]
        values = None
        if value_parts[0] is not None:
            values = {name: np.concatenate([part[name] for part in value_parts])[order] for name in value_parts[0]}
        if not len(group_n):
            return
        groups, first = np.unique(group_n, return_index=True)
        for p, start, stop in zip(groups, first, [*first[1:], len(group_n)], strict=True):
            for begin in range(start, stop, _DECODED):
                at = slice(begin, min(begin + _DECODED, stop))
                self._zz_pkk[p] += z_nk[at].T @ z_nk[at]
                if self._derivative_pgk is not None and self._scale is not None:
                    given = None if values is None else {name: value_n[at] for name, value_n in values.items()}
                    batch = self._decoder.batches[batch_n[at]]
                    self._derivative_pgk[p] += summed_derivatives(self._decoder, z_nk[at], batch, given, self._scale)

    @property
    def mean_pk(self) -> np.ndarray:
        """Mean latent of each group."""
        return self._z_pk / self.n_p[:, None]

    @property
    def offset_pg(self) -> np.ndarray:
        """Intercept of each group: mean over its batches, by their shares, and the mean effect of its covariates."""
        total_pg = self._batch_pb @ self._decoder.intercept_bg
        if self._decoder.covariate_cg is not None:
            total_pg = total_pg + self._design_pc @ self._decoder.covariate_cg
        return total_pg / self.n_p[:, None]

    @property
    def covariance_pkk(self) -> np.ndarray:
        """Covariance of the latents between the cells of each group (over the number of cells)."""
        self._sum_waiting()
        mean_pk = self.mean_pk
        return self._zz_pkk / self.n_p[:, None, None] - mean_pk[:, :, None] * mean_pk[:, None, :]

    def rest(self, p: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean latent and intercept of the cells of all other groups."""
        others = np.arange(len(self.n_p)) != p
        weight_p = self.n_p[others] / self.n_p[others].sum()
        return weight_p @ self.mean_pk[others], weight_p @ self.offset_pg[others]

    def gradient_loadings(self) -> np.ndarray:
        """Mean derivative of the decoder in each group, shape (groups, genes, factors); see :func:`summed_derivatives`."""
        if self._derivative_pgk is None:
            msg = "The derivatives were not summed: `scale` must be given."
            raise ValueError(msg)
        self._sum_waiting()
        return self._derivative_pgk / self.n_p[:, None, None]


def summed_derivatives(decoder: LinearDecoder, z_nk: np.ndarray, batch: Any, covariates: Any, scale: str) -> np.ndarray:
    """Slope of each gene's expression along each factor, summed over cells.

    On the log scale ``d log rho_g / d z_k = L_gk - E_rho[L_k]``; ``E_rho`` weighs genes by the cell's expression. On the scale
    of expression this is multiplied by ``rho_g``. Under ``"ln"``, z = softmax(u), the derivative along u_k is
    ``sum_j z_j (delta_jk - z_k)`` times the derivative along z_j. Under a softplus ``d log s / dz = L sigmoid / softplus``,
    without a common term.

    Parameters
    ----------
    decoder
        The decoder.
    z_nk, batch, covariates
        See :meth:`ldvae_ext.core.LinearDecoder.scale`.
    scale
        ``"log"`` or ``"expression"``.

    Returns
    -------
    Shape (genes, factors), float64.
    """
    weight_gk = decoder.weight_gk
    logits_ng = decoder.logits(z_nk, batch, covariates)
    expression_ng = decoder.apply_link(logits_ng)
    is_softmax = decoder.link == "softmax"
    # The derivative of a cell is (steepness_g L_gk - common_k), times its expression on that scale.
    steepness_ng = np.ones_like(logits_ng) if is_softmax else softplus_log_slope(logits_ng)
    common_nk = expression_ng @ weight_gk if is_softmax else np.zeros_like(z_nk)
    times_ng = expression_ng if scale == "expression" else np.ones_like(logits_ng)
    steepness_ng = steepness_ng * times_ng
    if decoder.latent_distribution == "normal":
        return steepness_ng.sum(axis=0)[:, None] * weight_gk - times_ng.T @ common_nk
    common_nk = z_nk * (common_nk - (z_nk * common_nk).sum(axis=1, keepdims=True))
    along_ng = z_nk @ weight_gk.T
    return weight_gk * (steepness_ng.T @ z_nk) - (steepness_ng * along_ng).T @ z_nk - times_ng.T @ common_nk


def softplus_log_slope(logits: np.ndarray) -> np.ndarray:
    """Derivative of ``log softplus`` by its argument, also where the softplus is 0 in floats."""
    inside = np.clip(logits, -30.0, 20.0)
    derivative = np.where(logits > 20.0, 1.0 / np.maximum(logits, 1.0), expit(inside) / np.logaddexp(0.0, inside))
    return np.where(logits < -30.0, 1.0, derivative)
