"""Paired change of a cell's likelihood when latents are set to a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax

from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.likelihood import mean_dependent_part
from ldvae_ext.core.posterior import deterministic_latent


def ablation_effects(
    decoder: LinearDecoder,
    x_ng: np.ndarray,
    mean_nk: np.ndarray,
    library_n: np.ndarray,
    batch: Any,
    value_k: np.ndarray,
    factors: Sequence[int] | np.ndarray,
    *,
    covariates: Any = None,
    label: Any = None,
) -> np.ndarray:
    """Change of each cell's negative log-likelihood when one latent at a time is set to a value.

    A cell is compared with itself: the same posterior mean, library, dispersion and dropout logits on both sides, only
    the logits of the rate move. The difference is taken per gene before it is summed. For a normal latent the logits
    move by ``-weight[:, k] (z_k - value_k)``; for a logistic-normal one ``u_k`` is set and ``z = softmax(u)`` follows.

    Parameters
    ----------
    decoder
        The decoder.
    x_ng
        Counts, shape (cells, genes), dense.
    mean_nk
        Posterior means (of u under ``"ln"``), shape (cells, factors).
    library_n
        Library sizes in counts (size factors under softplus), shape (cells,).
    batch
        See :meth:`ldvae_ext.core.LinearDecoder.batch_codes`.
    value_k
        The value that each latent is set to, shape (factors,).
    factors
        Positions of the latents to ablate, one at a time.
    covariates, label
        See :meth:`ldvae_ext.core.LinearDecoder.scale` and :meth:`~ldvae_ext.core.LinearDecoder.theta`.

    Returns
    -------
    Shape (cells, ablated latents), float64, in nats. Positive: the latent helps. Never clipped.
    """
    x_ng, mean_nk = np.asarray(x_ng, dtype=np.float64), np.asarray(mean_nk, dtype=np.float64)
    library_n1 = np.asarray(library_n, dtype=np.float64).reshape(-1, 1)
    z_nk = deterministic_latent(mean_nk, decoder.latent_distribution)
    theta = None
    if decoder.likelihood != "poisson":
        theta = decoder.theta(batch, len(mean_nk), label=label, z_nk=z_nk, covariates=covariates)
    dropout_ng = decoder.dropout_logits(z_nk, batch, covariates) if decoder.likelihood == "zinb" else None
    logits_ng = decoder.logits(z_nk, batch, covariates)

    def fit(logits: np.ndarray) -> np.ndarray:
        rate_ng = decoder.apply_link(logits)
        rate_ng *= library_n1
        return mean_dependent_part(decoder.likelihood, x_ng, rate_ng, theta, dropout_ng)

    full_ng = fit(logits_ng)
    effect = np.empty((len(mean_nk), len(factors)))
    for column, k in enumerate(factors):
        if decoder.latent_distribution == "ln":
            moved_nk = mean_nk.copy()
            moved_nk[:, k] = value_k[k]
            moved_ng = decoder.logits(softmax(moved_nk, axis=1), batch, covariates)
        else:
            moved_ng = logits_ng - np.outer(mean_nk[:, k] - value_k[k], decoder.weight_gk[:, k])
        effect[:, column] = (full_ng - fit(moved_ng)).sum(axis=1)
    return effect
