"""Intercepts, dispersions and scales of a decoder with given loadings, fitted to counts without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from ldvae_ext._validate import check_number, check_one_of, check_positive_int, warn
from ldvae_ext.core._arrays import as_numbers, names_array
from ldvae_ext.core.cells import at_rows, dense, has_fractions, indicator, values_of
from ldvae_ext.core.derivatives import LOG_MEAN, LOG_THETA, derivatives, softplus_slope
from ldvae_ext.core.heads import heads_at
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.core.projection import posterior_of

if TYPE_CHECKING:
    from ldvae_ext.core.decoder import LinearDecoder

# Standard deviations of weak normal priors: of log-rates, and of log dispersions around 0.
_WIDE, _THETA_SD = 10.0, 2.0
# Newton steps with fixed latents, in each round; the longest step, in log-rate.
_STEPS, _LONGEST = 3, 1.0
# Rounds end when no intercept of a gene that is not rare, nor log scale, changes by more than that.
_TOLERANCE = 5e-3
_CHUNK = 256


def refit(
    decoder: LinearDecoder,
    x_ng: Any,
    batch: Any = None,
    covariates: Any = None,
    library: Any = None,
    label: Any = None,
    *,
    prior_covariance_kk: np.ndarray | None = None,
    offset_sd: float | None = None,
    with_intercept: bool = True,
    with_dispersion: bool = False,
    with_scale: bool = False,
    max_rounds: int = 20,
) -> LinearDecoder:
    """A decoder whose intercepts, and on request dispersions and scales, are fitted to counts, with the loadings given.

    In turn, the posterior modes of the cells (:func:`posterior_of`), and Newton steps for the intercept of each gene in each batch
    and its dispersion; scales by the EM algorithm, so that the mean of ``z^2`` under the posteriors is 1.

    Parameters
    ----------
    decoder
        Where the search starts. Its dispersion must be ``"gene"`` for ``with_dispersion``.
    x_ng, batch, covariates, library, label, prior_covariance_kk
        See :func:`posterior_of`.
    offset_sd
        Standard deviation of a normal prior of each intercept around its present value, in log-rate; nearly flat if None.
    with_intercept, with_dispersion, with_scale
        What is fitted: intercepts; dispersions (with a weak prior: 95 % between 1/50 and 50); a factor for each column of the
        loadings.
    max_rounds
        Largest number of rounds.

    Returns
    -------
    The fitted decoder.

    Raises
    ------
    ValueError
        As in :func:`posterior_of`, or if dispersions or scales cannot be fitted to this decoder.
    """
    check_positive_int("max_rounds", max_rounds)
    if offset_sd is not None:
        check_number("offset_sd", offset_sd, least=1e-6)
    if with_dispersion and (decoder.likelihood != "nb" or decoder.dispersion != "gene"):
        msg = f"`with_dispersion` is for negative binomials with one dispersion for each gene; got {decoder!r}."
        raise ValueError(msg)
    if with_scale and decoder.latent_distribution == "ln":
        msg = "`with_scale` is not for a logistic-normal latent, whose points are on the simplex."
        raise ValueError(msg)
    k = len(decoder.factors)
    precision_kk = np.eye(k) if prior_covariance_kk is None else np.linalg.inv(prior_covariance_kk)
    z_nk, steps = None, _Steps(decoder, _WIDE if offset_sd is None else offset_sd, with_intercept=with_intercept)
    for _ in range(max_rounds):
        found = posterior_of(
            decoder, x_ng, batch, covariates, library, label, prior_covariance_kk=prior_covariance_kk, start_nk=z_nk
        )
        z_nk, change = found.mean_nk, 0.0
        if with_scale:
            scale_k = np.sqrt((np.square(z_nk) + found.variance_nk).mean(axis=0))
            decoder, z_nk = decoder._with(weight_gk=decoder.weight_gk * scale_k), z_nk / scale_k
            change = np.abs(np.log(scale_k)).max()
        before_bg = decoder.intercept_bg
        if with_intercept and decoder.latent_distribution == "normal":
            decoder, z_nk = steps.with_means_of_zero(decoder, z_nk, decoder.batch_codes(batch, len(z_nk)), precision_kk)
        for i in range(_STEPS):
            decoder = steps.take(
                decoder,
                x_ng,
                (z_nk, batch, covariates, library, label),
                with_dispersion=with_dispersion and i == 0,
            )
        share_bg = decoder.apply_link(decoder.intercept_bg)
        is_common = share_bg > 0.01 * share_bg.max(axis=1, keepdims=True)
        change = max(change, np.abs(decoder.intercept_bg - before_bg)[is_common].max())
        if change < _TOLERANCE:
            break
    return decoder


class _Damped:
    """Steps of many parameters at once, each damped where its sign changes: they depend on each other."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._share, self._last = np.ones(shape), np.zeros(shape)

    def __call__(self, step: np.ndarray) -> np.ndarray:
        """The damped step."""
        step = step.clip(-_LONGEST, _LONGEST)
        turned = step * self._last < 0
        self._share, self._last = np.where(turned, 0.5 * self._share, np.minimum(1.2 * self._share, 1)), step
        return self._share * step


class _Steps:
    """Newton steps for the intercept and the dispersion of each gene, with the other genes and the latents as they are."""

    def __init__(self, decoder: LinearDecoder, sd: float, *, with_intercept: bool) -> None:
        self._start_bg, self._sd, self._with_intercept = decoder.intercept_bg, sd, with_intercept
        self._damped, self._theta_damped = _Damped(self._start_bg.shape), _Damped(self._start_bg.shape[1:])

    def with_means_of_zero(
        self, decoder: LinearDecoder, z_nk: np.ndarray, batch_n: np.ndarray, precision_kk: np.ndarray
    ) -> tuple[LinearDecoder, np.ndarray]:
        """The decoder and the latents after a shift between latents and intercepts, which changes no rate.

        Steps of one and of the other in turn would take long to come to it.
        """
        intercept_bg, z_nk, weight_gk = decoder.intercept_bg.copy(), z_nk.copy(), decoder.weight_gk
        if decoder.link == "softmax":
            weight_gk = weight_gk - weight_gk.mean(axis=0)
        for b in range(len(intercept_bg)):
            (rows,) = np.nonzero(batch_n == b)
            if not len(rows):
                continue
            pull_kk = len(rows) * precision_kk
            off_k = weight_gk.T @ (intercept_bg[b] - self._start_bg[b]) / self._sd**2
            pulled_k = pull_kk @ z_nk[rows].mean(axis=0) - off_k
            shift_k = np.linalg.solve(pull_kk + weight_gk.T @ weight_gk / self._sd**2, pulled_k)
            intercept_bg[b] += weight_gk @ shift_k
            z_nk[rows] -= shift_k
        return decoder._with(intercept_bg=intercept_bg), z_nk

    def take(
        self, decoder: LinearDecoder, x_ng: Any, cells: tuple[np.ndarray, Any, Any, Any, Any], *, with_dispersion: bool
    ) -> LinearDecoder:
        """The decoder after a step."""
        first_bg, second_bg, theta_first_g, theta_second_g = _sums(decoder, x_ng, *cells, of_theta=with_dispersion)
        parts: dict[str, np.ndarray] = {}
        if self._with_intercept:
            slope_bg = first_bg - (decoder.intercept_bg - self._start_bg) / self._sd**2
            step_bg = self._damped(slope_bg / (np.maximum(-second_bg, 0.0) + 1 / self._sd**2))
            if decoder.link == "softmax":
                # A constant added to all genes changes nothing; the prior leaves it nearly free.
                step_bg -= step_bg.mean(axis=1, keepdims=True)
            parts["intercept_bg"] = decoder.intercept_bg + step_bg
        if with_dispersion and decoder.theta_bg is not None:
            log_theta_g = np.log(decoder.theta_bg[0])
            slope_g = theta_first_g - log_theta_g / _THETA_SD**2
            step_g = self._theta_damped(slope_g / (np.abs(theta_second_g) + 1 / _THETA_SD**2))
            parts["theta_bg"] = np.exp(log_theta_g + step_g)[None]
        return decoder._with(**parts)


def _sums(
    decoder: LinearDecoder,
    x_ng: Any,
    u_nk: np.ndarray,
    batch: Any,
    covariates: Any,
    library: Any,
    label: Any,
    *,
    of_theta: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sums over cells of first and second derivatives in the intercepts, by batch, and in the log dispersions."""
    n_cells, shape = len(u_nk), decoder.intercept_bg.shape
    batch_n = decoder.batch_codes(batch, n_cells)
    total_n = np.asarray(x_ng.sum(axis=1, dtype=np.float64) if library is None else library, dtype=np.float64).ravel()
    library_n = np.broadcast_to(np.where(total_n > 0, total_n, 1.0), (n_cells,))
    z_nk = deterministic_latent(u_nk, decoder.latent_distribution)
    first_bg, second_bg, theta_first_g, theta_second_g = (np.zeros(s) for s in (shape, shape, shape[1], shape[1]))
    names = [covariate.name for covariate in decoder.covariates]
    for start in range(0, n_cells, _CHUNK):
        at = np.arange(start, min(start + _CHUNK, n_cells))
        given = (decoder.batches[batch_n[at]], at_rows(covariates, names, at, n_cells))
        label_n = None if decoder.labels is None else np.broadcast_to(np.asarray(label).ravel(), (n_cells,))[at]
        scale_ng = decoder.apply_link(decoder.logits(z_nk[at], *given))
        theta, dropout_ng = heads_at(decoder, z_nk[at], *given, label_n)
        arguments = (decoder.likelihood, dense(x_ng[at]), library_n[at, None] * scale_ng, theta, dropout_ng)
        first, second = derivatives(*arguments, of_theta=of_theta)
        first_ng, second_ng = first[LOG_MEAN], second[LOG_MEAN, LOG_MEAN]
        if decoder.link == "softmax":
            first_ng = first_ng - first_ng.sum(axis=1, keepdims=True) * scale_ng
        else:
            slope_ng = softplus_slope(scale_ng)
            first_ng, second_ng = first_ng * slope_ng, second_ng * slope_ng**2
        of_batch_bn = indicator(batch_n[at], shape[0])
        first_bg += of_batch_bn @ first_ng
        second_bg += of_batch_bn @ second_ng
        if of_theta:
            theta_first_g += first[LOG_THETA].sum(axis=0)
            theta_second_g += second[LOG_THETA, LOG_THETA].sum(axis=0)
    return first_bg, second_bg, theta_first_g, theta_second_g


def decoder_from_loadings(
    cls: type[LinearDecoder],
    loadings: Any,
    intercept: Any = None,
    *,
    counts: Any = None,
    genes: Any = None,
    factors: Any = None,
    likelihood: str | None = None,
    rescale: bool = True,
) -> LinearDecoder:
    """See :meth:`LinearDecoder.from_loadings`."""
    if hasattr(loadings, "columns"):
        genes = loadings.index if genes is None else genes
        factors = loadings.columns if factors is None else factors
    weight_gk = np.array(as_numbers(loadings, "loadings"))
    if weight_gk.ndim != 2 or not np.isfinite(weight_gk).all():
        n_wrong = int((~np.isfinite(weight_gk)).sum())
        msg = f"`loadings` must be genes x factors, finite; got shape {weight_gk.shape}, {n_wrong} values not finite."
        raise ValueError(msg)
    if genes is None:
        msg = "`genes` must name the rows of `loadings`, which are no table with names."
        raise ValueError(msg)
    n_genes, n_factors = weight_gk.shape
    likelihood = likelihood or ("poisson" if counts is None else "nb")
    check_one_of("likelihood", likelihood, ("nb", "poisson"))
    if counts is None and (intercept is None or likelihood == "nb"):
        msg = "`counts` is needed to fit the intercept and the dispersions; without it, give `intercept` and `likelihood='poisson'`."
        raise ValueError(msg)
    counts = None if counts is None else _checked_counts(counts, n_genes)
    constant = np.ptp(weight_gk, axis=0) <= 1e-9 * np.abs(weight_gk).max(axis=0)
    if rescale and counts is not None and constant.any():
        msg = f"`loadings` must differ between genes; those of factor {int(np.flatnonzero(constant)[0])} do not."
        raise ValueError(msg)
    start_g = _log_shares(counts) if intercept is None else np.array(as_numbers(intercept, "intercept")).ravel()
    if start_g.size != n_genes:
        msg = f"`intercept` must have the {n_genes} genes of `loadings`; got {start_g.size}."
        raise ValueError(msg)
    if rescale and counts is not None:
        # A standard deviation of log-rates over genes near those of trained models; the fit goes on from there.
        weight_gk = weight_gk * 0.3 / weight_gk.std(axis=0)
    decoder = cls(
        weight_gk=weight_gk,
        intercept_bg=start_g[None],
        genes=names_array(genes, n_genes, "genes"),
        batches=np.array(["0"]),
        factors=names_array([f"Z_{k}" for k in range(n_factors)] if factors is None else factors, n_factors, "factors"),
        likelihood=likelihood,
        theta_bg=np.ones((1, n_genes)) if likelihood == "nb" else None,
    )
    if counts is None:
        return decoder
    return refit(
        decoder,
        counts,
        with_intercept=intercept is None,
        with_dispersion=likelihood == "nb",
        with_scale=rescale,
        max_rounds=50,
    )


def _checked_counts(counts: Any, n_genes: int) -> Any:
    """Counts as an array or sparse matrix, or an error that names the argument."""
    if hasattr(counts, "X"):
        msg = f"`counts` must be a matrix, such as `adata[:, genes].X`; got {type(counts).__name__}."
        raise TypeError(msg)
    counts = counts.tocsr() if sparse.issparse(counts) else np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != n_genes or not len(values_of(counts)):
        msg = f"`counts` must be cells x the {n_genes} genes of `loadings`; got shape {counts.shape}."
        raise ValueError(msg)
    values = values_of(counts)
    # Both comparisons are false for NaN.
    if not (values.min() >= 0 and values.max() < np.inf):
        msg = "`counts` holds values that are negative or not finite."
        raise ValueError(msg)
    if has_fractions(counts):
        warn("`counts` holds values that are not integers; dispersions and posteriors are those of raw counts.")
    return counts


def _log_shares(counts: Any) -> np.ndarray:
    """Log of the share of each gene in all counts, with a pseudocount of 1/2."""
    total_g = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel() + 0.5
    return np.log(total_g / total_g.sum())
