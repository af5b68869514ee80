"""Posteriors of cells from the decoder alone: Newton's method for the mode, and Laplace's approximation around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import gammaln

from ldvae_ext._validate import check_is_decoder, check_number, check_positive_int
from ldvae_ext.core._arrays import per_cell
from ldvae_ext.core._decode import logit_offsets
from ldvae_ext.core._design import design_matrix
from ldvae_ext.core._log_posterior import Prepared, is_theta_of_cell
from ldvae_ext.core._tables import plain
from ldvae_ext.core.cells import at_rows, dense, nonzero, values_of
from ldvae_ext.core.likelihood import EPS
from ldvae_ext.kernels.threads import is_compiled, over_rows

if TYPE_CHECKING:
    from ldvae_ext.core.decoder import LinearDecoder

# Small decoders are left to numpy, since compiled loops take a second to load. Not the number of cells decides it: where there are
# several modes, the two searches can find different ones.
_FEW_GENES = 100
# Cells that compiled loops are given at a time.
_COMPILED_CELLS = 4096
_HALVINGS = 30
# Eigenvalues of a Hessian that is not positive definite are made positive, and not smaller than that.
_LEAST_CURVATURE = 0.1


class CellPosteriors(NamedTuple):
    """Posteriors of cells given a decoder, from :func:`posterior_of`.

    Examples
    --------
    >>> from ldvae_ext.core import LinearDecoder, posterior_of
    >>> decoder = LinearDecoder.from_loadings([[1], [-1]], [0, 0], genes=["a", "b"])
    >>> found = posterior_of(decoder, [[5, 5], [9, 1]])
    >>> found.mean_nk.shape, found.covariance_nkk.shape
    ((2, 1), (2, 1, 1))
    >>> found.converged_n
    array([ True,  True])
    """

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

    ``log p(x) ~ log p(x | z) + log N(z; 0, C) + K/2 log 2 pi - 1/2 log det H`` (Tierney & Kadane 1986,
    10.1080/01621459.1986.10478240).

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
        A cell has converged if no factor changes by more than that in its last step. The error is of the order of the square.
    chunk_size
        Cells that numpy computes together; the result does not depend on it but for rounding.

    Returns
    -------
    The posteriors.

    Raises
    ------
    ValueError
        If shapes do not agree, counts are negative or not finite, the prior covariance is not symmetric and positive definite, or a
        library size is not positive and finite. (Without ``library``, that of a cell without counts is 1, and its posterior is
        nearly the prior.)

    Examples
    --------
    >>> from ldvae_ext.core import LinearDecoder, posterior_of
    >>> decoder = LinearDecoder.from_loadings([[1], [-1]], [0, 0], genes=["a", "b"])
    >>> posterior_of(decoder, [[9, 1], [1, 9]]).mean_nk[:, 0].round(3)
    array([ 0.889, -0.889])
    """
    check_is_decoder(decoder)
    check_positive_int("max_iterations", max_iterations)
    check_positive_int("chunk_size", chunk_size)
    x_ng = _counts(decoder, x_ng)
    n_cells, n_factors = x_ng.shape[0], len(decoder.factors)
    check_number("tolerance", tolerance)
    if not tolerance > 0:
        msg = f"`tolerance` must be positive; got {tolerance!r}."
        raise ValueError(msg)
    library_n = _libraries(decoder, x_ng, library)
    precision_kk = _precision(prior_covariance_kk, n_factors)
    start_nk = np.zeros((n_cells, n_factors)) if start_nk is None else np.array(start_nk, dtype=np.float64)
    if start_nk.shape != (n_cells, n_factors) or not np.isfinite(start_nk).all():
        msg = f"`start_nk` must be finite, of shape {(n_cells, n_factors)}; got shape {start_nk.shape}."
        raise ValueError(msg)
    prepared = Prepared.of(decoder, precision_kk, n_cells, batch, covariates, library_n, label)
    out = CellPosteriors(
        start_nk,
        np.empty_like(start_nk),
        np.empty((n_cells, n_factors, n_factors)) if covariance else None,
        np.empty(n_cells),
        np.zeros(n_cells, dtype=bool),
    )
    log_det_prior = np.linalg.slogdet(precision_kk)[1]
    find = _compiled_modes if _is_for_loops(prepared) else _modes
    chunk_size = _COMPILED_CELLS if find is _compiled_modes else chunk_size
    for start in range(0, n_cells, chunk_size):
        at = np.arange(start, min(start + chunk_size, n_cells))
        found = find(prepared, x_ng[at], at, start_nk[at], max_iterations, tolerance)
        inverse_nkk, log_det_n = _inverse(found.hessian_nkk)
        out.mean_nk[at], out.converged_n[at] = found.z_nk, found.converged_n
        out.variance_nk[at] = np.diagonal(inverse_nkk, axis1=1, axis2=2)
        if out.covariance_nkk is not None:
            out.covariance_nkk[at] = inverse_nkk
        out.log_evidence_n[at] = found.value_n + 0.5 * (log_det_prior - log_det_n)
    return out


def _counts(decoder: LinearDecoder, x_ng: Any) -> Any:
    x_ng = x_ng if sparse.issparse(x_ng) else np.asarray(x_ng)
    if x_ng.ndim != 2 or x_ng.shape[1] != len(decoder.genes):
        msg = f"`x_ng` must be cells x the decoder's {len(decoder.genes)} genes; got shape {x_ng.shape}."
        raise ValueError(msg)
    values = values_of(x_ng)
    if values.dtype.kind not in "biuf":
        msg = f"`x_ng` must hold real numbers; got type {values.dtype}."
        raise ValueError(msg)
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
        total_n = np.asarray(x_ng.sum(axis=1, dtype=np.float64)).ravel()
        return np.where(total_n > 0, total_n, 1.0)
    library_n = np.array(per_cell(library, n_cells, "library"))
    if not (np.isfinite(library_n) & (library_n > 0)).all():
        msg = "`library` must be positive and finite."
        raise ValueError(msg)
    return library_n


def _precision(covariance_kk: np.ndarray | None, n_factors: int) -> np.ndarray:
    if covariance_kk is None:
        return np.eye(n_factors)
    covariance_kk = np.asarray(covariance_kk, dtype=np.float64)
    if (
        covariance_kk.shape != (n_factors, n_factors)
        or not np.isfinite(covariance_kk).all()
        or not np.allclose(covariance_kk, covariance_kk.T)
        or not np.linalg.eigvalsh(covariance_kk).min(initial=1) > 0
    ):
        msg = f"`prior_covariance_kk` must be a symmetric, positive definite matrix of shape {(n_factors, n_factors)}."
        raise ValueError(msg)
    return np.linalg.inv(covariance_kk)


class _Modes(NamedTuple):
    """Modes of some cells, with values and negative Hessians of the log posterior there."""

    z_nk: np.ndarray
    value_n: np.ndarray
    hessian_nkk: np.ndarray
    converged_n: np.ndarray


def _modes(
    prepared: Prepared, x_ng: Any, at: np.ndarray, z_nk: np.ndarray, max_iterations: int, tolerance: float
) -> _Modes:
    """Modes of cells, all of them together, for every kind of decoder."""
    target = prepared.log_posterior(dense(x_ng), at)
    z_nk, converged_n = z_nk.copy(), np.zeros(len(z_nk), dtype=bool)
    rows, part = np.arange(len(z_nk)), target
    at_mode = list(part(z_nk))
    for _ in range(max_iterations):
        value_n, gradient_nk, hessian_nkk = (values[rows] for values in at_mode)
        step_nk = _newton_step(gradient_nk, hessian_nkk)
        is_done = np.abs(step_nk).max(axis=1) <= tolerance
        z_nk[rows[is_done]] += step_nk[is_done]
        converged_n[rows[is_done]] = True
        if is_done.all():
            break
        if is_done.any():
            rows, part = rows[~is_done], part.some(np.flatnonzero(~is_done))
            step_nk, value_n = step_nk[~is_done], value_n[~is_done]
        size_n, waiting, old_nk = np.ones(len(rows)), np.arange(len(rows)), z_nk[rows]
        for _ in range(_HALVINGS):
            trial_nk = old_nk[waiting] + size_n[waiting, None] * step_nk[waiting]
            new = (part if len(waiting) == len(rows) else part.some(waiting))(trial_nk)
            # Rounding of a sum of many terms can hide the gain of the last steps.
            is_better = new[0] >= value_n[waiting] - 1e-12 * np.abs(value_n[waiting])
            accepted = rows[waiting[is_better]]
            z_nk[accepted] = trial_nk[is_better]
            for values, found in zip(at_mode, new, strict=True):
                values[accepted] = found[is_better]
            waiting = waiting[~is_better]
            if not len(waiting):
                break
            size_n[waiting] *= 0.5
    return _Modes(z_nk, at_mode[0] + target.constant(), at_mode[2], converged_n)


def _is_for_loops(prepared: Prepared) -> bool:
    """True if compiled loops can find the modes, and are worth the second that it takes to load them."""
    decoder = prepared.decoder
    return (
        is_compiled()
        and decoder.link == "softmax"
        and decoder.latent_distribution == "normal"
        and (decoder.likelihood == "poisson" or (decoder.likelihood == "nb" and not is_theta_of_cell(decoder)))
        and len(decoder.genes) >= _FEW_GENES
    )


def _compiled_modes(
    prepared: Prepared, x_ng: Any, at: np.ndarray, z_nk: np.ndarray, max_iterations: int, tolerance: float
) -> _Modes:
    """Modes of cells, one after another, by compiled loops."""
    from ldvae_ext.kernels import posterior

    decoder, n_cells = prepared.decoder, len(at)
    counts = nonzero(x_ng)
    at_n, at_g = np.divmod(counts.at, len(decoder.genes))
    theta_rg, theta_n = _theta_rows(prepared, at)
    design_nc = None
    if decoder.covariates:
        names = [covariate.name for covariate in decoder.covariates]
        covariates = at_rows(prepared.covariates, names, at, len(prepared.library_n))
        design_nc = design_matrix(decoder.covariates, covariates, n_cells)
    out = _Modes(z_nk.copy(), np.empty(n_cells), np.empty((*z_nk.shape, z_nk.shape[1])), np.zeros(n_cells, dtype=bool))
    state_n = np.empty(n_cells, dtype=np.int64)
    over_rows(
        posterior.modes,
        n_cells,
        out.z_nk,
        decoder._tables.weight_kg,
        *logit_offsets(decoder, prepared.batch_n[at], design_nc),
        np.searchsorted(at_n, np.arange(n_cells + 1)),
        plain(at_g, np.int64),
        counts.value,
        plain(prepared.library_n[at], np.float64),
        theta_rg,
        theta_n,
        decoder.likelihood == "poisson",
        prepared.precision_kk,
        max_iterations,
        tolerance,
        out.value_n,
        out.hessian_nkk,
        state_n,
    )
    # Gamma functions of counts of zero cancel.
    constant = -gammaln(counts.value + 1.0)
    if decoder.likelihood == "nb":
        theta = theta_rg[theta_n[at_n], at_g]
        constant += gammaln(counts.value + theta) - gammaln(theta)
        out.value_n[:] += (theta_rg * np.log(theta_rg + EPS)).sum(axis=1)[theta_n]
    out.value_n[:] += np.bincount(at_n, constant, n_cells)
    out.converged_n[:] = state_n == posterior.CONVERGED
    (left,) = np.nonzero(state_n == posterior.INDEFINITE)
    if len(left):
        others = _modes(prepared, x_ng[left], at[left], out.z_nk[left], max_iterations, tolerance)
        for values, found in zip(out, others, strict=True):
            values[left] = found
    return out


def _theta_rows(prepared: Prepared, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dispersions of batches or labels, and each cell's row of them."""
    theta_bg, row_n = prepared.decoder.theta_bg, np.zeros(len(at), dtype=np.int64)
    if theta_bg is None:
        return np.ones((1, len(prepared.decoder.genes))), row_n
    if len(theta_bg) > 1:
        row_n = prepared.batch_n[at] if prepared.label_n is None else prepared.label_n[at]
    return plain(theta_bg, np.float64), plain(row_n, np.int64)


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
