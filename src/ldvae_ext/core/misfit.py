"""How well cells are described by a decoder, beside counts drawn from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldvae_ext.core.cells import EncodedCells, dense
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.draws import COUNTS, generator_of
from ldvae_ext.core.heads import parameters_given
from ldvae_ext.core.likelihood import deviance
from ldvae_ext.core.posterior import deterministic_latent

# Counts that are drawn for each cell, at least.
_LEAST_DRAWN = 1000


def deviance_ratio(decoder: LinearDecoder, cells: EncodedCells, position_n: np.ndarray, seed: int = 0) -> np.ndarray:
    """Deviance of each cell's counts, relative to that of counts drawn from the decoder at the same latent and library.

    Near 1 for a cell that the decoder describes, larger for one with variation that neither factors nor dispersions account
    for. A deviance per count would depend on the library size and on the genes; the ratio hardly does.

    Parameters
    ----------
    decoder
        The decoder.
    cells
        Latents (of u under ``"ln"``), counts and conditions of the cells.
    position_n
        Positions of the cells, shape (cells,). A cell's draws depend only on its position and the seed.
    seed
        Seed of the draws.

    Returns
    -------
    Shape (cells,); NaN for a cell without counts.
    """
    x_ng = dense(cells.counts)
    z_nk = deterministic_latent(np.asarray(cells.mean, dtype=np.float64), decoder.latent_distribution)
    mu_ng, theta, dropout_ng = parameters_given(decoder, z_nk, cells, cells.library)
    n_draws = -(-_LEAST_DRAWN // x_ng.shape[1])
    drawn_n = np.zeros(len(x_ng))
    for n, position in enumerate(position_n):
        generator = generator_of(seed, COUNTS, position)
        at = slice(n, n + 1)
        theta_of_cell = theta if theta is None or len(theta) == 1 else theta[at]
        parts = (mu_ng[at], theta_of_cell, None if dropout_ng is None else dropout_ng[at])
        for _ in range(n_draws):
            drawn_g = draw_counts(decoder.likelihood, generator, *parts)
            drawn_n[n] += deviance(decoder.likelihood, drawn_g, *parts).sum() / n_draws
    observed_n = deviance(decoder.likelihood, x_ng, mu_ng, theta, dropout_ng).sum(axis=1)
    has_counts = (x_ng != 0).any(axis=1) & (drawn_n > 0)
    return np.divide(observed_n, drawn_n, where=has_counts, out=np.full(len(x_ng), np.nan))


def draw_counts(
    likelihood: str, generator: np.random.Generator, mu_ng: np.ndarray, theta: Any = None, dropout_ng: Any = None
) -> np.ndarray:
    """Counts drawn from a likelihood.

    Parameters
    ----------
    likelihood, mu_ng, theta, dropout_ng
        See :func:`ldvae_ext.core.likelihood.log_likelihood`.
    generator
        Source of random numbers.

    Returns
    -------
    Shape (cells, genes), float64.
    """
    if likelihood == "normal":
        return generator.normal(mu_ng, theta)
    rate_ng = (
        mu_ng if likelihood == "poisson" else generator.gamma(np.broadcast_to(theta, mu_ng.shape)) * (mu_ng / theta)
    )
    drawn_ng = generator.poisson(rate_ng).astype(np.float64)
    if likelihood == "zinb":
        drawn_ng[generator.random(mu_ng.shape) < 1 / (1 + np.exp(-dropout_ng))] = 0
    return drawn_ng
