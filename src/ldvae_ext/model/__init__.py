"""The model layer: scvi-tools' API."""

from __future__ import annotations

from ldvae_ext._stats import FactorStats
from ldvae_ext.model._ensemble import Ensemble
from ldvae_ext.model._ldvae import LDVAE
from ldvae_ext.model._refinement import RefinedPosterior
from ldvae_ext.model._shrinkage import ShrunkenLoadings
from ldvae_ext.model.ensemble import fit_ensemble
from ldvae_ext.model.n_latent import NLatentSuggestion, suggest_n_latent
from ldvae_ext.model.order import order_latents
from ldvae_ext.model.programs import Programs

__all__ = [
    "LDVAE",
    "Ensemble",
    "FactorStats",
    "NLatentSuggestion",
    "Programs",
    "RefinedPosterior",
    "ShrunkenLoadings",
    "fit_ensemble",
    "order_latents",
    "suggest_n_latent",
]
