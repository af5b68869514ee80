"""Figures, drawn with matplotlib from what an export or an ablation holds: no torch, nothing written."""

from __future__ import annotations

from ldvae_ext.pl._ablation import ablation
from ldvae_ext.pl._loadings import loadings
from ldvae_ext.pl._pairs import latent_pairs
from ldvae_ext.pl._scree import factor_scree
from ldvae_ext.pl._training import training_curves

__all__ = ["ablation", "factor_scree", "latent_pairs", "loadings", "training_curves"]
