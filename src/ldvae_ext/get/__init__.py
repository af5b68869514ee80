"""Reading results back from AnnData: no torch, nothing written."""

from __future__ import annotations

from ldvae_ext.get._ablation import ablation_df
from ldvae_ext.get._export import decoder, factors, loadings
from ldvae_ext.get._genes import gene_scores, top_genes

__all__ = ["ablation_df", "decoder", "factors", "gene_scores", "loadings", "top_genes"]
