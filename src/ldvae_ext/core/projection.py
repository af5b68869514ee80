"""Posteriors of cells from the decoder alone: Newton's method for the mode, and Laplace's approximation around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import softmax

from ldvae_ext._validate import check_positive_int
from ldvae_ext.core.cells import EncodedCells, at_rows, dense, values_of
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.derivatives import DROPOUT, LOG_MEAN, LOG_THETA, derivatives, softplus_slope
from ldvae_ext.core.heads import heads_at, parameters_given
from ldvae_ext.core.likelihood import log_likelihood, mean_dependent_part
from ldvae_ext.core.posterior import deterministic_latent

# Weights of the affine maps that the derivatives belong to.
_WEIGHTS = {LOG_MEAN: "weight_gk", DROPOUT: "dropout_weight_gk", LOG_THETA: "dispersion_weight_gk"}
_HALVINGS = 30
# Eigenvalues of a Hessian that is not positive definite are made positive, and not smaller than that.
_LEAST_CURVATURE = 0.1


class CellPosteriors(NamedTuple):
    """Posteriors of cells given a decoder, from :func:`posterior_of`."""

    mean_nk: np.ndarray
    """Posterior modes (of u under ``"ln"``), cells x factors."""
    variance_nk: np.ndarray
    """Marginal variances, the diagonal of the covariance, cells x factors."""
    covariance_nkk: np.ndarray | None
    """Covariances: inverses of the negative Hessian of the log posterior at the mode; None if they were not requested."""
    log_evidence_n: np.ndarray
    """Laplace's approximation of the log marginal likelihood of each cell's counts, in nats."""
    converged_n: np.ndarray
    """False for cells whose last step was not small; their mode is the best point that was found."""


def posterior_of(
    decoder: LinearDecoder,
    x_ng: Any,
    batch: Any = None,
    covariates: Any = None,
    library: Any = None,
    label: Any = None,
    *,
    prior_covariance_kk: np.ndarray | None = None,
    start_nk: np.ndarray | None = None,
    covariance: bool = True,
    max_iterations: int = 100,
    tolerance: float = 1e-7,
    chunk_size: int = 64,
) -> CellPosteriors:
    """Posterior of each cell's factors given its counts and a decoder, without the network.

    The mode of ``log p(x | z) + log N(z; 0, C)`` is found by Newton's method with a line search, with exact first and second
    derivatives; where the Hessian is not negative definite, with absolute eigenvalues. The posterior is approximated by the
    normal distribution with the same mode and curvature (Laplace), so that with the negative Hessian H at the mode

    ``log p(x) ~ log p(x | z) + log N(z; 0, C) + K/2 log 2 pi - 1/2 log det H``.

    Genes of ``decoder`` that were not measured can be left out of it with :meth:`LinearDecoder.with_genes`: under softmax the
    expression is then relative to the genes that were measured, and no zeros are invented.

    Parameters
    ----------
    decoder
        The decoder, of the genes that were measured. Under ``"ln"`` the posterior is that of u, with z = softmax(u).
    x_ng
        Counts, dense or sparse, shape (cells, genes).
    batch, covariates, label
        Of the cells, see :meth:`LinearDecoder.rate` and :meth:`LinearDecoder.theta`.
    library
        Library sizes in counts, or size factors (needed under softplus), one number or one for each cell. If None, the sum of
        the counts of each cell.
    prior_covariance_kk
        Prior covariance C of the factors, shape (factors, factors); the identity if None. ``Rotation.correlation_kk`` of
        oblique factors.
    start_nk
        Where the search starts, shape (cells, factors), such as the means of an encoder; 0 if None.
    covariance
        False to return variances only.
    max_iterations
        Number of Newton steps.
    tolerance
        A cell has converged if no factor changes by more than that.
    chunk_size
        Cells that are computed together; the result does not depend on it but for rounding.

    Returns
    -------
    The posteriors.

    Raises
    ------
    ValueError
        If shapes do not agree, counts are negative or not finite, the prior covariance is not symmetric and positive definite, or a
        library size is not positive and finite. (Without ``library``, that of a cell without counts is 1, and its posterior is
        nearly the prior.)
    """
    check_positive_int("max_iterations", max_iterations)
    check_positive_int("chunk_size", chunk_size)
    x_ng = _counts(decoder, x_ng)
    n_cells, n_factors = x_ng.shape[0], len(decoder.factors)
    if not tolerance > 0:
        msg = f"`tolerance` must be positive; got {tolerance!r}."
        raise ValueError(msg)
    library_n = _libraries(decoder, x_ng, library)
    precision_kk = _precision(prior_covariance_kk, n_factors)
    start_nk = np.zeros((n_cells, n_factors)) if start_nk is None else np.array(start_nk, dtype=np.float64)
    if start_nk.shape != (n_cells, n_factors) or not np.isfinite(start_nk).all():
        msg = f"`start_nk` must be finite, of shape {(n_cells, n_factors)}; got shape {start_nk.shape}."
        raise ValueError(msg)
    batch_n = decoder.batch_codes(batch, n_cells)
    names = [covariate.name for covariate in decoder.covariates]
    out = CellPosteriors(
        start_nk,
        np.empty_like(start_nk),
        np.empty((n_cells, n_factors, n_factors)) if covariance else None,
        np.empty(n_cells),
        np.zeros(n_cells, dtype=bool),
    )
    for start in range(0, n_cells, chunk_size):
        at = np.arange(start, min(start + chunk_size, n_cells))
        target = _LogPosterior(
            decoder,
            dense(x_ng[at]),
            decoder.batches[np.broadcast_to(batch_n, n_cells)[at]],
            at_rows(covariates, names, at, n_cells),
            library_n[at],
            None if decoder.labels is None else np.broadcast_to(np.asarray(label), (n_cells,))[at],
            precision_kk,
        )
        z_nk, converged_n = _maximise(target, start_nk[at], max_iterations, tolerance)
        value_n, _, hessian_nkk = target(z_nk, with_constant=True)
        inverse_nkk, log_det_n = _inverse(hessian_nkk)
        out.mean_nk[at], out.converged_n[at] = z_nk, converged_n
        out.variance_nk[at] = np.diagonal(inverse_nkk, axis1=1, axis2=2)
        if out.covariance_nkk is not None:
            out.covariance_nkk[at] = inverse_nkk
        out.log_evidence_n[at] = value_n + 0.5 * (np.linalg.slogdet(precision_kk)[1] - log_det_n)
    return out


def _counts(decoder: LinearDecoder, x_ng: Any) -> Any:
    x_ng = x_ng if sparse.issparse(x_ng) else np.asarray(x_ng)
    if x_ng.ndim != 2 or x_ng.shape[1] != len(decoder.genes):
        msg = f"`x_ng` must be cells x the decoder's {len(decoder.genes)} genes; got shape {x_ng.shape}."
        raise ValueError(msg)
    values = values_of(x_ng)
    if not np.isfinite(values).all() or (decoder.likelihood != "normal" and (values < 0).any()):
        msg = "`x_ng` holds values that are not finite, or negative."
        raise ValueError(msg)
    return x_ng.tocsr() if sparse.issparse(x_ng) else x_ng


def _libraries(decoder: LinearDecoder, x_ng: Any, library: Any) -> np.ndarray:
    n_cells = x_ng.shape[0]
    if library is None:
        if decoder.link == "softplus":
            msg = "`library` is needed: this decoder has size factors, which counts do not give."
            raise ValueError(msg)
        total_n = np.asarray(x_ng.sum(axis=1), dtype=np.float64).ravel()
        return np.where(total_n > 0, total_n, 1.0)
    library_n = np.asarray(library, dtype=np.float64).ravel()
    if library_n.size not in (1, n_cells):
        msg = f"`library` must be one number, or one for each of {n_cells} cells; got {library_n.size}."
        raise ValueError(msg)
    library_n = np.array(np.broadcast_to(library_n, (n_cells,)))
    if not (np.isfinite(library_n) & (library_n > 0)).all():
        msg = "`library` must be positive and finite."
        raise ValueError(msg)
    return library_n


def _precision(covariance_kk: np.ndarray | None, n_factors: int) -> np.ndarray:
    if covariance_kk is None:
        return np.eye(n_factors)
    covariance_kk = np.asarray(covariance_kk, dtype=np.float64)
    is_square = covariance_kk.shape == (n_factors, n_factors)
    if (
        not is_square
        or not np.allclose(covariance_kk, covariance_kk.T)
        or not np.linalg.eigvalsh(covariance_kk).min(initial=1) > 0
    ):
        msg = f"`prior_covariance_kk` must be a symmetric, positive definite matrix of shape {(n_factors, n_factors)}."
        raise ValueError(msg)
    return np.linalg.inv(covariance_kk)


class _LogPosterior:
    """Log posterior density of some cells, up to the constant of the prior, with gradient and negative Hessian."""

    def __init__(
        self,
        decoder: LinearDecoder,
        x_ng: np.ndarray,
        batch: np.ndarray,
        covariates: Any,
        library_n: np.ndarray,
        label: np.ndarray | None,
        precision_kk: np.ndarray,
    ) -> None:
        self._decoder, self._x_ng, self._batch, self._covariates = decoder, x_ng, batch, covariates
        self._library_n, self._label, self._precision_kk = library_n, label, precision_kk
        self._of_theta = decoder.dispersion == "gene-cell" and decoder.likelihood != "poisson"
        names = [LOG_MEAN] + [DROPOUT] * (decoder.likelihood == "zinb") + [LOG_THETA] * self._of_theta
        self._weights = {name: getattr(decoder, _WEIGHTS[name]) for name in names}

    def some(self, rows: np.ndarray) -> _LogPosterior:
        """The log posterior of some of the cells."""
        covariates = None if self._covariates is None else {name: v[rows] for name, v in self._covariates.items()}
        return _LogPosterior(
            self._decoder,
            self._x_ng[rows],
            self._batch[rows],
            covariates,
            self._library_n[rows],
            None if self._label is None else self._label[rows],
            self._precision_kk,
        )

    def __call__(self, u_nk: np.ndarray, *, with_constant: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, shape (cells,), gradients, shape (cells, factors), and negative Hessians, (cells, factors, factors).

        Without the constant, values lack terms of the counts and the dispersion alone, which need gamma functions.
        """
        decoder = self._decoder
        is_logistic = decoder.latent_distribution == "ln"
        z_nk = softmax(u_nk, axis=1) if is_logistic else u_nk
        logits_ng = decoder.logits(z_nk, self._batch, self._covariates)
        scale_ng = decoder.apply_link(logits_ng)
        mu_ng = self._library_n[:, None] * scale_ng
        theta, dropout_ng = heads_at(decoder, z_nk, self._batch, self._covariates, self._label)
        arguments = (decoder.likelihood, self._x_ng, mu_ng, theta, dropout_ng)
        value_of = log_likelihood if with_constant or self._of_theta else mean_dependent_part
        value_n = value_of(*arguments).sum(axis=1)
        first, second = derivatives(*arguments, of_theta=self._of_theta)
        if decoder.link == "softmax":
            # d log mu / dz = W - W_mean, and d^2 log mu / dz^2 = -(E WW' - W_mean W_mean') for every gene.
            mean_nk = scale_ng @ self._weights[LOG_MEAN]
            second[LOG_MEAN, LOG_MEAN] = (
                second[LOG_MEAN, LOG_MEAN] - first[LOG_MEAN].sum(axis=1, keepdims=True) * scale_ng
            )
        else:
            mean_nk = np.zeros((len(z_nk), z_nk.shape[1]))
            slope_ng = softplus_slope(scale_ng)
            change_ng = slope_ng * (np.exp(-scale_ng) - slope_ng)
            second[LOG_MEAN, LOG_MEAN] = second[LOG_MEAN, LOG_MEAN] * slope_ng**2 + first[LOG_MEAN] * change_ng
            first[LOG_MEAN] = first[LOG_MEAN] * slope_ng
            for pair in [pair for pair in second if LOG_MEAN in pair and pair != (LOG_MEAN, LOG_MEAN)]:
                second[pair] = second[pair] * slope_ng
        gradient_nk = np.zeros_like(z_nk)
        for name, slope_ng in first.items():
            gradient_nk += slope_ng @ self._weights[name]
        gradient_nk -= first[LOG_MEAN].sum(axis=1, keepdims=True) * mean_nk
        hessian_nkk = np.zeros((len(z_nk), z_nk.shape[1], z_nk.shape[1]))
        for (a, b), curvature_ng in second.items():
            part_nkk = self._products(a, b, curvature_ng, mean_nk)
            hessian_nkk -= part_nkk if a == b else part_nkk + part_nkk.transpose(0, 2, 1)
        if is_logistic:
            gradient_nk, hessian_nkk = _of_logits(z_nk, gradient_nk, hessian_nkk)
        pulled_nk = u_nk @ self._precision_kk
        value_n -= 0.5 * (pulled_nk * u_nk).sum(axis=1)
        return value_n, gradient_nk - pulled_nk, hessian_nkk + self._precision_kk

    def _products(self, a: str, b: str, curvature_ng: np.ndarray, mean_nk: np.ndarray) -> np.ndarray:
        """``sum_g curvature_ng d_ag d_bg'``, where d is the loading, less its mean for the log-mean under softmax."""
        left_gk, right_gk = self._weights[a], self._weights[b]
        n_factors = left_gk.shape[1]
        product_gj = (left_gk[:, :, None] * right_gk[:, None, :]).reshape(len(left_gk), -1)
        out_nkk = (curvature_ng @ product_gj).reshape(-1, n_factors, n_factors)
        left_nk = mean_nk if a == LOG_MEAN else np.zeros_like(mean_nk)
        right_nk = mean_nk if b == LOG_MEAN else np.zeros_like(mean_nk)
        sum_left_nk, sum_right_nk = curvature_ng @ left_gk, curvature_ng @ right_gk
        out_nkk -= left_nk[:, :, None] * sum_right_nk[:, None, :] + sum_left_nk[:, :, None] * right_nk[:, None, :]
        total_n = curvature_ng.sum(axis=1)
        return out_nkk + total_n[:, None, None] * left_nk[:, :, None] * right_nk[:, None, :]


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


def _maximise(
    target: _LogPosterior, z_nk: np.ndarray, max_iterations: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Modes, and which cells have converged."""
    z_nk, converged_n = z_nk.copy(), np.zeros(len(z_nk), dtype=bool)
    rows, part = np.arange(len(z_nk)), target
    value_n, gradient_nk, hessian_nkk = part(z_nk)
    for _ in range(max_iterations):
        step_nk = _newton_step(gradient_nk, hessian_nkk)
        size_n, found = np.ones(len(rows)), [value_n, gradient_nk, hessian_nkk]
        waiting = np.arange(len(rows))
        moved_nk = z_nk[rows]
        for _ in range(_HALVINGS):
            trial_nk = z_nk[rows[waiting]] + size_n[waiting, None] * step_nk[waiting]
            new = (part if len(waiting) == len(rows) else part.some(waiting))(trial_nk)
            # Rounding of a sum of many terms can hide the gain of the last steps.
            is_better = new[0] >= value_n[waiting] - 1e-12 * np.abs(value_n[waiting])
            accepted = waiting[is_better]
            moved_nk[accepted] = trial_nk[is_better]
            for old, values in zip(found, new, strict=True):
                old[accepted] = values[is_better]
            waiting = waiting[~is_better]
            if not len(waiting):
                break
            size_n[waiting] *= 0.5
        change_n = np.abs(moved_nk - z_nk[rows]).max(axis=1)
        z_nk[rows] = moved_nk
        is_done = (change_n <= tolerance) & (np.abs(step_nk).max(axis=1) <= np.sqrt(tolerance))
        converged_n[rows[is_done]] = True
        if is_done.all():
            break
        if is_done.any():
            rows, part = rows[~is_done], part.some(np.flatnonzero(~is_done))
            value_n, gradient_nk, hessian_nkk = (values[~is_done] for values in found)
    return z_nk, converged_n


def _newton_step(gradient_nk: np.ndarray, hessian_nkk: np.ndarray) -> np.ndarray:
    return np.linalg.solve(_positive(hessian_nkk), gradient_nk[:, :, None])[:, :, 0]


def _inverse(hessian_nkk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverses and log determinants; at a point that is no maximum, of the matrix with absolute eigenvalues."""
    hessian_nkk = _positive(hessian_nkk)
    return np.linalg.inv(hessian_nkk), np.linalg.slogdet(hessian_nkk)[1]


def _positive(hessian_nkk: np.ndarray) -> np.ndarray:
    """The matrices, those that are not positive definite with absolute eigenvalues."""
    try:
        np.linalg.cholesky(hessian_nkk)
    except np.linalg.LinAlgError:
        value_nk, vector_nkk = np.linalg.eigh(hessian_nkk)
        (wrong,) = np.nonzero(value_nk[:, 0] <= 0)
        value_nk = np.maximum(np.abs(value_nk[wrong]), _LEAST_CURVATURE)
        hessian_nkk = hessian_nkk.copy()
        hessian_nkk[wrong] = (vector_nkk[wrong] * value_nk[:, None, :]) @ vector_nkk[wrong].transpose(0, 2, 1)
    return hessian_nkk


def evidence_bound(
    decoder: LinearDecoder,
    cells: EncodedCells,
    mean_nk: np.ndarray,
    covariance_nkk: np.ndarray,
    noise_snk: np.ndarray,
) -> np.ndarray:
    """ELBO of normal posteriors, given the library sizes: mean log-likelihood of draws less the KL from the prior N(0, I).

    Parameters
    ----------
    decoder
        The decoder, on orthogonal axes.
    cells
        Counts, batches, covariates and library sizes of the cells; their posteriors are not used.
    mean_nk, covariance_nkk
        Means and covariances of the posteriors (of u under ``"ln"``), shapes (cells, factors) and (cells, factors, factors).
    noise_snk
        Standard normal draws, shape (samples, cells, factors).

    Returns
    -------
    Shape (cells,), in nats.
    """
    counts_ng, root_nkk = dense(cells.counts), np.linalg.cholesky(covariance_nkk)
    log_det_n = 2 * np.log(np.diagonal(root_nkk, axis1=1, axis2=2)).sum(axis=1)
    kl_n = 0.5 * (
        np.trace(covariance_nkk, axis1=1, axis2=2) + np.square(mean_nk).sum(axis=1) - mean_nk.shape[1] - log_det_n
    )
    value_n = -kl_n
    for noise_nk in noise_snk:
        u_nk = mean_nk + (root_nkk @ noise_nk[:, :, None])[:, :, 0]
        z_nk = deterministic_latent(u_nk, decoder.latent_distribution)
        mu_ng, theta, dropout_ng = parameters_given(decoder, z_nk, cells, cells.library)
        value_n += log_likelihood(decoder.likelihood, counts_ng, mu_ng, theta, dropout_ng).sum(axis=1) / len(noise_snk)
    return value_n
