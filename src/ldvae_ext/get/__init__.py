"""Results from AnnData as tables, without torch; nothing is written."""

from __future__ import annotations

from ldvae_ext.get._ablation import ablation_df, gene_ablation_df
from ldvae_ext.get._export import decoder, factors, loadings
from ldvae_ext.get._genes import gene_scores, top_genes
from ldvae_ext.get._groups import rank_factors_groups_df
from ldvae_ext.get._populations import population_directions_df, population_loadings_df
from ldvae_ext.get._programs import programs
from ldvae_ext.get._stability import consensus_loadings, factor_ranks, rotation, stability

__all__ = [
    "ablation_df",
    "consensus_loadings",
    "decoder",
    "factor_ranks",
    "factors",
    "gene_ablation_df",
    "gene_scores",
    "loadings",
    "population_directions_df",
    "population_loadings_df",
    "programs",
    "rank_factors_groups_df",
    "rotation",
    "stability",
    "top_genes",
]
