"""An ablation by scvi-tools' own network and distributions in float64, from its definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from tests.core.brute_force import own_and_new, replaced_sets
from tests.helpers import network


class Encoded(NamedTuple):
    """Cells as scvi-tools' encoder sees them."""

    mean: np.ndarray
    variance: np.ndarray
    library: np.ndarray
    batch: np.ndarray
    x: np.ndarray


def encoded(model: Any, adata: ad.AnnData) -> Encoded:
    module = model.module
    x = torch.as_tensor(adata.X.toarray() if sparse.issparse(adata.X) else adata.X, dtype=torch.float32)
    batch = pd.Categorical(adata.obs["batch"]).codes.astype(np.int64)
    with torch.no_grad():
        out = module.inference(x, torch.as_tensor(batch).reshape(-1, 1))
    if module.use_observed_lib_size:
        library = x.double().sum(1).numpy()
    else:
        library = out["ql"].loc.double().exp().ravel().numpy()
    return Encoded(out["qz"].loc.numpy(), out["qz"].variance.numpy(), library, batch, x.double().numpy())


def counts_distribution(model: Any, cells: Encoded, u_nk: np.ndarray, batch: int | None = None) -> Any:
    """Distribution of the counts of cells with these latents (u under ``"ln"``), in their batch or another."""
    z = model.module.z_encoder.z_transformation(torch.as_tensor(u_nk))
    return network(model, z, cells.batch if batch is None else np.full(len(u_nk), batch), cells.library)


def network_ablation(
    model: Any,
    adata: ad.AnnData,
    *,
    mode: str,
    latents: Any = None,
    scheme: str = "leave_out",
    refit_heads: bool = False,
    batches: tuple[int | None, ...] = (None,),
    **values: Any,
) -> np.ndarray:
    """Change of the NLL of each count, shape (cells, genes, sets)."""
    cells = encoded(model, adata)
    names = [f"Z_{k}" for k in range(model.n_latent)]
    sets = replaced_sets(names, cells.mean, cells.variance, latents, scheme, mode)
    pairs = list(own_and_new(cells.mean, cells.variance, mode, **values))
    x, out = torch.as_tensor(cells.x), np.zeros((*cells.x.shape, len(sets)))
    for own, new in pairs:
        for batch in batches:
            full = counts_distribution(model, cells, own, batch)
            for s, members in enumerate(sets.values()):
                moved = own.copy()
                moved[:, members] = new[:, members]
                px = counts_distribution(model, cells, np.nan_to_num(moved, neginf=-np.inf), batch)
                if model.module.gene_likelihood == "zinb" and not refit_heads:
                    px.zi_logits = full.zi_logits
                out[:, :, s] += (full.log_prob(x) - px.log_prob(x)).numpy() / (len(pairs) * len(batches))
    if mode == "group_mean":
        out[values["group_n"] < 0] = np.nan
    return out
