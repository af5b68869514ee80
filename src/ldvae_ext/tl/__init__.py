"""Tools that read an export from AnnData and write results back, without torch."""

from __future__ import annotations

from ldvae_ext.tl._ablation import ablate, ablate_genes
from ldvae_ext.tl._expression import population_expression
from ldvae_ext.tl._groups import rank_factors_groups
from ldvae_ext.tl._matching import FactorMatch, match_factors
from ldvae_ext.tl._populations import population_loadings
from ldvae_ext.tl._project import project

__all__ = [
    "FactorMatch",
    "ablate",
    "ablate_genes",
    "match_factors",
    "population_expression",
    "population_loadings",
    "project",
    "rank_factors_groups",
]
