"""Reading results back from AnnData: no torch, nothing written."""

from __future__ import annotations

from ldvae_ext.get._ablation import ablation_df
from ldvae_ext.get._export import decoder, factors, loadings

__all__ = ["ablation_df", "decoder", "factors", "loadings"]
