"""Latents of cells in groups, as an export leaves them, without a model."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._keys import export_keys

GROUPS = ("CD4+/CD25 T Reg", "B", "CD14+ Monocyte")


def latents(
    n_cells: int = 90, n_latent: int = 5, groups: tuple[str, ...] = GROUPS, *, key: str = "ldvae", ties: bool = False
) -> AnnData:
    """Cells whose groups lie apart in each factor, in either direction; with ``ties``, latents are whole numbers."""
    rng = np.random.default_rng(0)
    group_n = rng.permutation(np.arange(n_cells) % len(groups))
    z_nk = rng.normal(size=(len(groups), n_latent))[group_n] + rng.normal(size=(n_cells, n_latent))
    keys = export_keys(key)
    return AnnData(
        obs=pd.DataFrame(
            {"population": pd.Categorical.from_codes(group_n.tolist(), categories=pd.Index(groups))},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        obsm={keys.latent: (np.round(z_nk) if ties else z_nk).astype(np.float32)},
        uns={keys.info: {"names": np.array([f"Z_{k}" for k in rng.permutation(n_latent)]), "decoder": {}}},
    )
