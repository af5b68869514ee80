"""Groups of cells, by a column of obs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._keys import ABLATION_INFO
from ldvae_ext._validate import check_column, listed


def table_of(frame: Any) -> pd.DataFrame:
    """A table of an AnnData, read from disk where the AnnData is read lazily.

    Parameters
    ----------
    frame
        ``obs`` or ``var``.
    """
    return frame.to_memory() if hasattr(frame, "to_memory") else frame


def groups_of(obs: Any, groupby: str) -> tuple[list[str], np.ndarray]:
    """Names of the groups that have cells, and the group of each cell as a code; -1 where the column has no value.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If no cell has a value, or labels are empty or equal as strings.
    """
    if not isinstance(groupby, str):
        what = f"an {type(groupby).__name__}; `adata=` takes one" if isinstance(groupby, AnnData) else repr(groupby)
        msg = f"`groupby` must be the name of a column of `obs`; got {what}."
        raise TypeError(msg)
    obs = table_of(obs)
    check_column(obs.columns, "groupby", groupby)
    if pd.api.types.is_float_dtype(obs[groupby]) and (pd.Series(obs[groupby]).dropna() % 1 != 0).any():
        msg = f"`groupby`: {groupby!r} holds numbers such as {pd.Series(obs[groupby]).dropna().iloc[0]:g}, not groups; `pd.cut` makes some."
        raise ValueError(msg)
    column = pd.Categorical(pd.Series(obs[groupby])).remove_unused_categories()
    if not len(column.categories):
        msg = f"`groupby`: no cell has a value in {groupby!r}."
        raise ValueError(msg)
    names = [str(name) for name in column.categories]
    # Labels become names of fields, and numpy replaces empty names.
    if len(set(names)) < len(names) or "" in names:
        msg = f"`groupby`: the labels of {groupby!r} must be distinct and not empty, as strings; they are {listed(names)}."
        raise ValueError(msg)
    return names, np.asarray(column.codes, dtype=np.int64)


def codes_at(code_n: np.ndarray | None, at: np.ndarray) -> np.ndarray:
    """Group codes of the cells at given positions; without groups, all cells are in group 0."""
    return np.zeros(len(at), dtype=np.int64) if code_n is None else code_n[at]


def gene_ablation(
    total_pgs: np.ndarray,
    n_p: np.ndarray,
    groups: list[str],
    genes: np.ndarray,
    names: list[str],
    description: dict[str, Any],
) -> AnnData:
    """AnnData, (groups x genes) x sets of latents, with means from sums over cells of shape (groups, genes, sets)."""
    (present_p,) = np.nonzero(n_p)
    n_rows = n_p[present_p].repeat(len(genes))
    group = np.asarray(groups)[present_p].repeat(len(genes))
    gene = np.tile(genes, len(present_p))
    return AnnData(
        X=total_pgs[present_p].reshape(-1, total_pgs.shape[2]) / n_rows[:, None],
        obs=pd.DataFrame(
            {"group": pd.Categorical(group, [groups[p] for p in present_p]), "gene": gene, "n_cells": n_rows},
            index=[f"{p}: {g}" for p, g in zip(group, gene, strict=True)],
        ),
        var=pd.DataFrame(index=names),
        uns={ABLATION_INFO: {**description, "of": "genes"}},
    )


def directions_table(
    groups: Sequence[str],
    names: Sequence[str],
    factors: Sequence[str],
    share_pjk: np.ndarray,
    variance_pj: np.ndarray,
) -> pd.DataFrame:
    """Share of each factor in the directions of variation inside groups, as a long table."""
    n_groups, n_directions, n_factors = share_pjk.shape
    whole_p1 = variance_pj.sum(axis=1, keepdims=True)
    variance_share_pj = np.divide(variance_pj, whole_p1, where=whole_p1 > 0, out=np.full_like(variance_pj, np.nan))
    return pd.DataFrame(
        {
            "group": np.repeat(np.asarray(groups), n_directions * n_factors),
            "direction": np.tile(np.repeat(np.asarray(names), n_factors), n_groups),
            "factor": np.tile(np.asarray(factors), n_groups * n_directions),
            "share": share_pjk.ravel(),
            "variance": variance_pj.ravel().repeat(n_factors),
            "variance_share": variance_share_pj.ravel().repeat(n_factors),
        }
    )
