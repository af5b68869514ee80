"""The mathematics of a linear decoder: numpy and scipy only, no AnnData, no torch, no pandas."""

from __future__ import annotations

from ldvae_ext.core._design import Covariate
from ldvae_ext.core.ablation import ablation_effects
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.fold import BatchNorm, RawLinear
from ldvae_ext.core.likelihood import log_likelihood
from ldvae_ext.core.populations import path_attribution, within_directions
from ldvae_ext.core.posterior import kl_per_dimension

__all__ = [
    "BatchNorm",
    "Covariate",
    "LinearDecoder",
    "RawLinear",
    "ablation_effects",
    "kl_per_dimension",
    "log_likelihood",
    "path_attribution",
    "within_directions",
]
