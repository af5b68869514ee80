"""Ranking of factors that distinguish groups of cells, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._formats import RANKING, check_format
from ldvae_ext._keys import GROUPS_INFO
from ldvae_ext._validate import given_names, listed
from ldvae_ext.core._arrays import strings
from ldvae_ext.get._export import check_is_annotated, warn_if_outdated


def ranking_of(adata: AnnData, key: str = GROUPS_INFO) -> Any:
    """``uns`` entry of a ranking of factors, or an error that names the function that writes one."""
    check_is_annotated(adata)
    if key not in adata.uns:
        msg = f"No ranking {key!r} in `adata.uns`, which has {listed(adata.uns) or 'nothing'}; `tl.rank_factors_groups` writes one."
        raise KeyError(msg)
    if not isinstance(adata.uns[key], Mapping) or "auroc" not in adata.uns[key]:
        msg = f"`adata.uns[{key!r}]` has no AUROC, so it was not written by `tl.rank_factors_groups`."
        raise KeyError(msg)
    params = adata.uns[key]["params"]
    check_format(f"`adata.uns[{key!r}]`", params.get("format"), RANKING)
    if "key" in params:
        warn_if_outdated(adata, f"`adata.uns[{key!r}]`", key=str(params["key"]), mark=params.get("export"))
    return adata.uns[key]


def rank_factors_groups_df(
    adata: AnnData, group: str | Iterable[str] | None = None, *, key: str = GROUPS_INFO
) -> pd.DataFrame:
    """Factors that distinguish groups of cells, best first, as a long table.

    Parameters
    ----------
    adata
        AnnData that :func:`ldvae_ext.tl.rank_factors_groups` wrote to.
    group
        One group or several, in this order. All of them if None.
    key
        ``key_added`` of the ranking.

    Returns
    -------
    One row for each group and factor: ``group``, ``factor``, ``score`` (z-score, t-statistic or coefficient),
    ``mean_difference`` (group minus compared cells, in units of the latent), ``auroc`` (in [0, 1]), ``sign`` (of the
    difference: -1 if it is negative, else 1), ``p_value`` and ``q_value`` (corrected; both NaN for ``"logreg"``).

    Raises
    ------
    KeyError
        If there is no such ranking.
    ValueError
        If it has no such group, or if ``group`` names none.

    Examples
    --------
    >>> ldvae_ext.tl.rank_factors_groups(adata, "bulk_labels")
    >>> best = ldvae_ext.get.rank_factors_groups_df(adata, "CD14+ Monocyte")
    >>> best.columns.tolist()
    ['group', 'factor', 'score', 'mean_difference', 'auroc', 'sign', 'p_value', 'q_value']
    """
    entry = ranking_of(adata, key)
    known = list(entry["names"].dtype.names)
    chosen = known if group is None else given_names("group", group)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        msg = f"`group`: {listed(unknown)} not among the groups of the ranking, which has {listed(known, 50)}."
        raise ValueError(msg)
    tables = []
    for name in chosen:
        difference = np.asarray(entry["logfoldchanges"][name])
        tables.append(
            pd.DataFrame(
                {
                    "group": name,
                    "factor": strings(entry["names"][name]),
                    "score": entry["scores"][name],
                    "mean_difference": difference,
                    "auroc": entry["auroc"][name],
                    "sign": np.where(difference < 0, -1, 1),
                    "p_value": entry["pvals"][name] if "pvals" in entry else np.nan,
                    "q_value": entry["pvals_adj"][name] if "pvals_adj" in entry else np.nan,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
