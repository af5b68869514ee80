"""Figures of exports, tools and ablations, drawn with matplotlib, without torch; nothing is written.

Where other trainings do not confirm a factor of an export, its name has the flag of :func:`ldvae_ext.get.factors` behind it,
"(uncertain)" or "(unstable)".
"""

from __future__ import annotations

from ldvae_ext.pl._ablation import ablation
from ldvae_ext.pl._ablation_genes import ablation_genes
from ldvae_ext.pl._attribution import attribution
from ldvae_ext.pl._embedding import embedding_factors
from ldvae_ext.pl._factors import factors
from ldvae_ext.pl._groups import factor_groups
from ldvae_ext.pl._loadings import loadings
from ldvae_ext.pl._match import match
from ldvae_ext.pl._pairs import latent_pairs
from ldvae_ext.pl._populations import population_loadings
from ldvae_ext.pl._rotation import rotation
from ldvae_ext.pl._scree import factor_scree
from ldvae_ext.pl._stability import stability
from ldvae_ext.pl._training import training_curves

__all__ = [
    "ablation",
    "ablation_genes",
    "attribution",
    "embedding_factors",
    "factor_groups",
    "factor_scree",
    "factors",
    "latent_pairs",
    "loadings",
    "match",
    "population_loadings",
    "rotation",
    "stability",
    "training_curves",
]
