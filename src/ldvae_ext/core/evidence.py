"""Log marginal likelihoods of cells by draws from normal posteriors: lower bounds, and importance sampling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import logsumexp

from ldvae_ext.core.cells import EncodedCells, dense
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.heads import parameters_given
from ldvae_ext.core.likelihood import log_likelihood
from ldvae_ext.core.posterior import deterministic_latent


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
    root_nkk = np.linalg.cholesky(covariance_nkk)
    kl_n = 0.5 * (
        np.trace(covariance_nkk, axis1=1, axis2=2)
        + np.square(mean_nk).sum(axis=1)
        - mean_nk.shape[1]
        - _log_determinants(root_nkk)
    )
    draws = _log_likelihoods(decoder, cells, mean_nk, root_nkk, noise_snk)
    return sum(value_n for value_n, _ in draws) / len(noise_snk) - kl_n


def sampled_evidence(
    decoder: LinearDecoder,
    cells: EncodedCells,
    mean_nk: np.ndarray,
    covariance_nkk: np.ndarray,
    noise_snk: np.ndarray,
) -> np.ndarray:
    """Log marginal likelihood by importance sampling, given the library sizes: ``log mean p(x | u) N(u; 0, I) / q(u)``.

    Burda et al. 2016, arXiv:1509.00519.

    Parameters
    ----------
    decoder, cells, noise_snk
        See :func:`evidence_bound`.
    mean_nk, covariance_nkk
        Means and covariances of the normal distributions q that are drawn from, such as Laplace's approximation.

    Returns
    -------
    Shape (cells,), in nats; biased towards lower values if q is far from the posterior.
    """
    root_nkk = np.linalg.cholesky(covariance_nkk)
    weights = []
    for (value_n, u_nk), noise_nk in zip(
        _log_likelihoods(decoder, cells, mean_nk, root_nkk, noise_snk), noise_snk, strict=True
    ):
        weights.append(value_n + 0.5 * (np.square(noise_nk).sum(axis=1) - np.square(u_nk).sum(axis=1)))
    return logsumexp(weights, axis=0) - np.log(len(weights)) + 0.5 * _log_determinants(root_nkk)


def _log_determinants(root_nkk: np.ndarray) -> np.ndarray:
    return 2 * np.log(np.diagonal(root_nkk, axis1=1, axis2=2)).sum(axis=1)


def _log_likelihoods(
    decoder: LinearDecoder,
    cells: EncodedCells,
    mean_nk: np.ndarray,
    root_nkk: np.ndarray,
    noise_snk: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Log-likelihood of each cell at each draw, shape (cells,), with the draw."""
    counts_ng = dense(cells.counts)
    for noise_nk in noise_snk:
        u_nk = mean_nk + (root_nkk @ noise_nk[:, :, None])[:, :, 0]
        z_nk = deterministic_latent(u_nk, decoder.latent_distribution)
        mu_ng, theta, dropout_ng = parameters_given(decoder, z_nk, cells, cells.library)
        yield log_likelihood(decoder.likelihood, counts_ng, mu_ng, theta, dropout_ng).sum(axis=1), u_nk
