"""Ablations summarised by group."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._validate import check_column


def ablation_df(ablation: AnnData, groupby: str) -> pd.DataFrame:
    """What each group of cells loses without each latent.

    Parameters
    ----------
    ablation
        Cells x latents, from :meth:`ldvae_ext.model.LDVAE.ablate`.
    groupby
        Categorical column of its ``obs``; cells where it is NaN are left out, groups without cells too.

    Returns
    -------
    One row for each group and latent: ``group``, ``factor``, ``n_cells``, ``mean`` and ``median`` change of the negative
    log-likelihood (nats per cell; positive: the latent helps) and ``share_helped``, the share of cells where it is positive.
    """
    check_column(ablation.obs.columns, "groupby", groupby)
    effect = pd.DataFrame(np.asarray(ablation.X, dtype=np.float64), columns=ablation.var_names.astype(str))
    group_of = pd.Categorical(pd.Series(ablation.obs[groupby]))
    tables = []
    for group in group_of.categories:
        cells = effect[np.asarray(group_of == group)]
        if len(cells):
            tables.append(
                pd.DataFrame(
                    {
                        "group": str(group),
                        "factor": effect.columns,
                        "n_cells": len(cells),
                        "mean": cells.mean().to_numpy(),
                        "median": cells.median().to_numpy(),
                        "share_helped": (cells > 0).mean().to_numpy(),
                    }
                )
            )
    if not tables:
        msg = f"`groupby`: no cell has a value in {groupby!r}."
        raise ValueError(msg)
    return pd.concat(tables, ignore_index=True)
