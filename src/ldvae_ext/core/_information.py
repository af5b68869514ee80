"""What counts say about factors, gene by gene."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from ldvae_ext.core.posterior import deterministic_latent

if TYPE_CHECKING:
    from ldvae_ext.core.decoder import LinearDecoder


def fisher_shares(decoder: LinearDecoder) -> np.ndarray:
    """See :meth:`ldvae_ext.core.LinearDecoder.gene_information`."""
    origin_k = deterministic_latent(np.zeros((1, len(decoder.factors))), decoder.latent_distribution)[0]
    logits_bg = decoder.intercept_bg + decoder.weight_gk @ origin_k
    if decoder.covariate_cg is not None:
        levels = [
            np.zeros(1) if c.levels is None else np.full(c.n_columns, 1 / c.n_columns) for c in decoder.covariates
        ]
        logits_bg = logits_bg + np.concatenate(levels) @ decoder.covariate_cg
    rho_g = decoder.apply_link(logits_bg).mean(axis=0)
    weight_gk = decoder.centered().weight_gk
    if decoder.link == "softmax":
        slope_gk = weight_gk - rho_g @ weight_gk
    else:
        slope_gk = weight_gk * (expit(logits_bg).mean(axis=0) / rho_g)[:, None]
    information_gk = rho_g[:, None] * slope_gk * np.abs(slope_gk)
    total_k = np.abs(information_gk).sum(axis=0)
    return np.divide(information_gk, total_k, out=np.zeros_like(information_gk), where=total_k > 0)
