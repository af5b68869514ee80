"""Log posterior density of cells given a decoder, with exact first and second derivatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import softmax

from ldvae_ext.core._changes import to_log_rate
from ldvae_ext.core._design import design_matrix, level_codes
from ldvae_ext.core.cells import at_rows
from ldvae_ext.core.derivatives import DROPOUT, LOG_MEAN, LOG_THETA, derivatives, softplus_slope
from ldvae_ext.core.heads import heads_at
from ldvae_ext.core.likelihood import constant_part, log_likelihood, mean_dependent_part

if TYPE_CHECKING:
    from ldvae_ext.core.decoder import LinearDecoder

# Weights of the affine maps that the derivatives belong to.
_WEIGHTS = {LOG_MEAN: "weight_gk", DROPOUT: "dropout_weight_gk", LOG_THETA: "dispersion_weight_gk"}

Terms = tuple[np.ndarray, np.ndarray, np.ndarray]


class Squares(NamedTuple):
    """Products of loadings, with which weighted sums of squares over genes are one matrix product."""

    product_gj: np.ndarray
    """Products of each pair of factors, loadings of the left and of the right parameter, and ones."""
    pair_kk: np.ndarray
    """Column of each pair."""
    left_k: np.ndarray
    """Columns of the loadings of the left parameter."""
    right_k: np.ndarray
    """Columns of those of the right one."""

    @classmethod
    def of(cls, left_gk: np.ndarray, right_gk: np.ndarray, *, is_same: bool) -> Squares:
        """The products of the loadings of two parameters; each pair of factors once if they are the same."""
        k = left_gk.shape[1]
        i, j = np.triu_indices(k) if is_same else (a.ravel() for a in np.indices((k, k)))
        pair_kk = np.empty((k, k), dtype=np.int64)
        pair_kk[j, i] = np.arange(len(i))
        pair_kk[i, j] = np.arange(len(i))
        parts = [left_gk[:, i] * right_gk[:, j], left_gk, *([] if is_same else [right_gk]), np.ones((len(left_gk), 1))]
        left_k = len(i) + np.arange(k)
        return cls(np.hstack(parts), pair_kk, left_k, left_k if is_same else left_k + k)

    def sums(self, weight_ng: np.ndarray, mean_left_nk: np.ndarray, mean_right_nk: np.ndarray) -> np.ndarray:
        """``sum_g weight_g (left_g - mean_left)(right_g - mean_right)'`` of each cell, shape (cells, factors, factors)."""
        sum_nj = weight_ng @ self.product_gj
        left_nk, right_nk, total_n = sum_nj[:, self.left_k], sum_nj[:, self.right_k], sum_nj[:, -1]
        out_nkk = sum_nj[:, self.pair_kk] - mean_left_nk[:, :, None] * right_nk[:, None, :]
        out_nkk -= (left_nk - total_n[:, None] * mean_left_nk)[:, :, None] * mean_right_nk[:, None, :]
        return out_nkk


@dataclass(frozen=True)
class Prepared:
    """All that the log posteriors of many cells share: decoder, prior, and the conditions of all cells."""

    decoder: LinearDecoder
    precision_kk: np.ndarray
    batch_n: np.ndarray
    label_n: np.ndarray | None
    library_n: np.ndarray
    covariates: Any
    squares: dict[tuple[str, str], Squares]
    """By pair of parameters."""

    @classmethod
    def of(
        cls,
        decoder: LinearDecoder,
        precision_kk: np.ndarray,
        n_cells: int,
        batch: Any,
        covariates: Any,
        library_n: np.ndarray,
        label: Any,
    ) -> Prepared:
        """The shared parts; names of batches and labels are checked."""
        if decoder.covariates or covariates is not None:
            design_matrix(decoder.covariates, covariates, n_cells)  # raises if one is missing or unknown
        names = [LOG_MEAN] + [DROPOUT] * (decoder.likelihood == "zinb") + [LOG_THETA] * is_theta_of_cell(decoder)
        weights = {name: getattr(decoder, _WEIGHTS[name]) for name in names}
        squares = {(a, b): Squares.of(weights[a], weights[b], is_same=a == b) for a in names for b in names}
        return cls(
            decoder,
            precision_kk,
            decoder.batch_codes(batch, n_cells),
            None if decoder.labels is None else level_codes(decoder.labels, label, n_cells, "label"),
            library_n,
            {c.name: covariates[c.name] for c in decoder.covariates} if decoder.covariates else covariates,
            squares,
        )

    def log_posterior(self, x_ng: np.ndarray, at: np.ndarray) -> LogPosterior:
        """The log posterior of the cells at these positions, with these counts."""
        names = [covariate.name for covariate in self.decoder.covariates]
        return LogPosterior(
            self,
            x_ng,
            self.batch_n[at],
            None if self.label_n is None else self.label_n[at],
            self.library_n[at],
            at_rows(self.covariates, names, at, len(self.library_n)),
        )


def is_theta_of_cell(decoder: LinearDecoder) -> bool:
    return decoder.dispersion == "gene-cell" and decoder.likelihood != "poisson"


@dataclass(frozen=True)
class LogPosterior:
    """Log posterior density of some cells, up to :meth:`constant` and that of the prior."""

    prepared: Prepared
    x_ng: np.ndarray
    batch_n: np.ndarray
    label_n: np.ndarray | None
    library_n: np.ndarray
    covariates: dict[str, np.ndarray] | None

    def some(self, rows: np.ndarray) -> LogPosterior:
        """The log posterior of some of the cells."""
        return replace(
            self,
            x_ng=self.x_ng[rows],
            batch_n=self.batch_n[rows],
            label_n=None if self.label_n is None else self.label_n[rows],
            library_n=self.library_n[rows],
            covariates=None if self.covariates is None else {name: v[rows] for name, v in self.covariates.items()},
        )

    def constant(self) -> np.ndarray:
        """Terms of counts and dispersion alone, which values lack since they need gamma functions, shape (cells,)."""
        decoder = self.prepared.decoder
        if is_theta_of_cell(decoder):
            return np.zeros(len(self.x_ng))
        theta = None
        if decoder.likelihood != "poisson":
            label = None if decoder.labels is None else decoder.labels[self.label_n]
            theta = decoder.theta(decoder.batches[self.batch_n], len(self.x_ng), label=label)
        return np.broadcast_to(constant_part(decoder.likelihood, self.x_ng, theta), self.x_ng.shape).sum(axis=1)

    def __call__(self, u_nk: np.ndarray) -> Terms:
        """Values, shape (cells,), gradients, shape (cells, factors), and negative Hessians, (cells, factors, factors)."""
        precision_kk = self.prepared.precision_kk
        is_logistic = self.prepared.decoder.latent_distribution == "ln"
        z_nk = softmax(u_nk, axis=1) if is_logistic else u_nk
        value_n, gradient_nk, hessian_nkk = self._likelihood(z_nk)
        if is_logistic:
            gradient_nk, hessian_nkk = _of_logits(z_nk, gradient_nk, hessian_nkk)
        pulled_nk = u_nk @ precision_kk
        return value_n - 0.5 * (pulled_nk * u_nk).sum(axis=1), gradient_nk - pulled_nk, hessian_nkk + precision_kk

    def _likelihood(self, z_nk: np.ndarray) -> Terms:
        """Log-likelihood in z, up to :meth:`constant`, with gradient and negative Hessian."""
        decoder = self.prepared.decoder
        batch, label = decoder.batches[self.batch_n], None if decoder.labels is None else decoder.labels[self.label_n]
        logits_ng = decoder.logits(z_nk, batch, self.covariates)
        scale_ng = decoder.apply_link(logits_ng)
        mu_ng = self.library_n[:, None] * scale_ng
        theta, dropout_ng = heads_at(decoder, z_nk, batch, self.covariates, label)
        arguments, of_theta = (decoder.likelihood, self.x_ng, mu_ng, theta, dropout_ng), is_theta_of_cell(decoder)
        if decoder.likelihood == "poisson":
            # A mean that is 0 in floats has a logarithm all the same, with which a search comes back from there.
            to_log_rate(decoder, logits_ng, self.library_n[:, None])
            value_n = (self.x_ng * logits_ng - mu_ng).sum(axis=1)
        else:
            value_n = (log_likelihood if of_theta else mean_dependent_part)(*arguments).sum(axis=1)
        first, second = derivatives(*arguments, of_theta=of_theta)
        if decoder.link == "softmax":
            # d log mu / dz = W - W_mean, and d^2 log mu / dz^2 = -(E WW' - W_mean W_mean') for every gene.
            mean_nk = scale_ng @ decoder.weight_gk
            second[LOG_MEAN, LOG_MEAN] = (
                second[LOG_MEAN, LOG_MEAN] - first[LOG_MEAN].sum(axis=1, keepdims=True) * scale_ng
            )
        else:
            mean_nk = np.zeros(z_nk.shape)
            slope_ng = softplus_slope(scale_ng)
            change_ng = slope_ng * (np.exp(-scale_ng) - slope_ng)
            second[LOG_MEAN, LOG_MEAN] = second[LOG_MEAN, LOG_MEAN] * slope_ng**2 + first[LOG_MEAN] * change_ng
            first[LOG_MEAN] = first[LOG_MEAN] * slope_ng
            for pair in [pair for pair in second if LOG_MEAN in pair and pair != (LOG_MEAN, LOG_MEAN)]:
                second[pair] = second[pair] * slope_ng
        gradient_nk = np.zeros_like(z_nk)
        for name, slope_ng in first.items():
            gradient_nk += slope_ng @ getattr(decoder, _WEIGHTS[name])
        gradient_nk -= first[LOG_MEAN].sum(axis=1, keepdims=True) * mean_nk
        hessian_nkk = np.zeros((*z_nk.shape, z_nk.shape[1]))
        no_mean_nk = np.zeros_like(mean_nk)
        for (a, b), curvature_ng in second.items():
            means = (mean_nk if name == LOG_MEAN else no_mean_nk for name in (a, b))
            part_nkk = self.prepared.squares[a, b].sums(curvature_ng, *means)
            hessian_nkk -= part_nkk if a == b else part_nkk + part_nkk.transpose(0, 2, 1)
        return value_n, gradient_nk, hessian_nkk


def _of_logits(z_nk: np.ndarray, gradient_nk: np.ndarray, hessian_nkk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and negative Hessian in u of a function of z = softmax(u)."""
    jacobian_nkk = z_nk[:, :, None] * np.eye(z_nk.shape[1]) - z_nk[:, :, None] * z_nk[:, None, :]
    times_nk = gradient_nk * z_nk
    total_n = times_nk.sum(axis=1)
    of_u_nk = times_nk - total_n[:, None] * z_nk
    # sum_k gradient_k d^2 z_k / du^2
    curvature_nkk = times_nk[:, :, None] * np.eye(z_nk.shape[1])
    curvature_nkk -= times_nk[:, :, None] * z_nk[:, None, :] + z_nk[:, :, None] * times_nk[:, None, :]
    curvature_nkk += total_n[:, None, None] * (z_nk[:, :, None] * z_nk[:, None, :] - jacobian_nkk)
    return of_u_nk, jacobian_nkk @ hessian_nkk @ jacobian_nkk - curvature_nkk
