"""Top genes of a factor."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._keys import DEFAULT_KEY, POPULATION_LOADINGS, ExportKeys
from ldvae_ext._validate import check_one_of, check_positive_int, factor_indices, listed
from ldvae_ext.core._arrays import strings
from ldvae_ext.get._export import decoder, export_of, loadings
from ldvae_ext.get._populations import group_positions, populations_of

# Name of the sum over the factors of a path.
TOTAL = "total"
Rank = Literal["regression", "information", "loading"]
RANKS = get_args(Rank)


def gene_scores(
    adata: AnnData,
    *,
    kind: Rank = "information",
    statistic: Literal["score", "error"] = "score",
    key: str = DEFAULT_KEY,
) -> pd.DataFrame:
    """Scores that rank the genes of each factor: positive if expression increases with the factor, else negative.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    kind
        ``"regression"``: the slope of the gene's standardised log-normalised counts on the standardised factor, in [-1, 1], a
        property of the cells of the export. It replicates better between disjoint cells than loadings, but factors that are
        correlated over cells share genes. ``"information"``: the gene's
        signed share in the Fisher information of the counts about the factor
        (:meth:`ldvae_ext.core.LinearDecoder.gene_information`), which weighs loadings by expression. ``"loading"``: the canonical
        loading, in log-rate per unit of latent, which decodes; its largest values often belong to genes with very few counts.
    statistic
        ``"error"``: standard errors instead, all conditional on the factors. Those of loadings are from the Fisher information of
        the counts (:meth:`ldvae_ext.model.LDVAE.get_shrunken_loadings`), those of the shares from these
        (:meth:`ldvae_ext.core.LinearDecoder.gene_information_error`).
    key
        ``key_added`` of the export.

    Returns
    -------
    Genes of the model x factors in the exported order.

    Raises
    ------
    KeyError
        If the export has no slopes, for ``"regression"`` (data minified without counts have none), or no standard errors of loadings, for
        ``statistic="error"`` of the other kinds (a logistic-normal latent has none).
    ValueError
        If genes of ``adata`` were renamed since the export, for ``"information"``.

    Examples
    --------
    >>> scores = ldvae_ext.get.gene_scores(adata, kind="regression")
    >>> scores.shape
    (765, 5)
    >>> bool(scores.abs().max().max() <= 1)
    True
    """
    check_one_of("kind", kind, RANKS)
    check_one_of("statistic", statistic, ("score", "error"))
    table, keys = loadings(adata, key=key), export_of(adata, key)[0]
    if kind == "regression":
        return _stored(adata, keys, keys.scores if statistic == "score" else keys.errors, table)
    if kind == "loading":
        return table if statistic == "score" else _stored(adata, keys, keys.loadings_error, table)
    exported = decoder(adata, key=key)
    position = pd.Index(exported.genes).get_indexer(table.index.astype(str))
    if (position < 0).any():
        msg = f"Genes were renamed since the export: {listed(table.index[position < 0])} not among its genes. Export again, or use `kind='loading'`."
        raise ValueError(msg)
    if statistic == "score":
        value_gk = exported.gene_information()[position]
    else:
        error_gk = np.zeros((len(exported.genes), len(exported.factors)))
        error_gk[position] = _stored(adata, keys, keys.loadings_error, table)
        value_gk = exported.gene_information_error(error_gk)[position]
    return pd.DataFrame(value_gk, index=table.index, columns=table.columns)


def _stored(adata: AnnData, keys: ExportKeys, name: str, like: pd.DataFrame) -> pd.DataFrame:
    """A table of the export, of the model's genes, with the labels of the loadings."""
    if name not in adata.varm:
        why = "of a logistic-normal latent" if name == keys.loadings_error else "of cells without counts"
        msg = f"No {name!r} in `adata.varm`: the export {keys.info!r} is {why}, or of an earlier version."
        raise KeyError(msg)
    known = np.asarray(adata.var[keys.genes], dtype=bool)
    return pd.DataFrame(np.asarray(adata.varm[name])[known], index=like.index, columns=like.columns)


def top_genes(
    adata: AnnData,
    factor: Any = None,
    group: Any = None,
    *,
    n: int = 10,
    rank_by: Rank | None = None,
    key: str | None = None,
) -> pd.DataFrame:
    """The genes that rise and that fall most with a factor, at large or in one population.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    factor
        One factor or several: names (``"Z_3"``) or positions in the exported order. All of them if None.
    group
        One population, or several, of a result of :func:`ldvae_ext.tl.population_loadings`; genes are ranked by their values
        there, and ``factor`` may be all that they have: directions (``"D_0"``) for ``kind="within"``; for ``"path"`` ``"batch"``, and
        ``"total"``, the sum over all factors. (With ``kind="gradient", scale="log"`` all populations rank genes alike, see
        there.) None ranks by the decoder.
    n
        Genes in each direction; fewer are returned where fewer rise or fall.
    rank_by
        Without ``group``: kind of :func:`gene_scores`, with its default.
    key
        ``key_added`` of the export or, with ``group``, of the population loadings.

    Returns
    -------
    One row for each factor, direction and gene: ``factor``, ``direction`` (``"up"`` or ``"down"``), ``rank`` (from 1), ``gene``,
    ``loading`` (log-rate per unit of latent) and ``regression`` (slope) or ``information`` (signed share) if ranked by it. With
    ``group``, that column is first, and ``value`` replaces the last two.

    Raises
    ------
    KeyError
        If the export has no slopes, for ``rank_by="regression"``.
    ValueError
        If a factor or population does not exist, or ``rank_by`` is combined with ``group``.

    Examples
    --------
    >>> table = ldvae_ext.get.top_genes(adata, factor=0, n=3, rank_by="regression")
    >>> table[["direction", "rank"]].head(3)
      direction  rank
    0        up     1
    1        up     2
    2        up     3
    """
    check_positive_int("n", n)
    if group is not None:
        if rank_by is not None:
            msg = "`rank_by` ranks by the decoder; with `group`, genes are ranked by the population loadings of `key`."
            raise ValueError(msg)
        return _top_in_groups(adata, factor, group, n, POPULATION_LOADINGS if key is None else key)
    key = DEFAULT_KEY if key is None else key
    rank_by = "information" if rank_by is None else rank_by
    check_one_of("rank_by", rank_by, RANKS)
    score, loading = gene_scores(adata, kind=rank_by, key=key).to_numpy(), loadings(adata, key=key)
    tables = []
    for k in factor_indices(factor, loading.columns.tolist(), argument="factor"):
        for direction, rows in _ends(score[:, k], n):
            table = {
                "factor": loading.columns[k],
                "direction": direction,
                "rank": np.arange(1, len(rows) + 1),
                "gene": loading.index[rows],
                "loading": loading.to_numpy()[rows, k],
            }
            if rank_by != "loading":
                table[rank_by] = score[rows, k]
            tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def _top_in_groups(adata: AnnData, factor: Any, group: Any, n: int, key: str) -> pd.DataFrame:
    value_gkp, info = populations_of(adata, key)
    names, groups = strings(info["names"]).tolist(), strings(info["groups"]).tolist()
    tables = []
    if info["kind"] == "path" and factor == TOTAL:
        value_gkp, names = value_gkp.sum(axis=1, keepdims=True), [TOTAL]
    for p in group_positions(groups, group):
        for k in factor_indices(factor, names, argument="factor"):
            for direction, rows in _ends(value_gkp[:, k, p], n):
                table = {
                    "group": groups[p],
                    "factor": names[k],
                    "direction": direction,
                    "rank": np.arange(1, len(rows) + 1),
                    "gene": adata.var_names[rows],
                    "value": value_gkp[rows, k, p],
                }
                tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def _ends(score_g: np.ndarray, n: int) -> list[tuple[str, np.ndarray]]:
    """Rows of the largest positive and of the most negative scores; NaN is neither."""
    order = np.argsort(-score_g, kind="stable")
    return [
        ("up", order[score_g[order] > 0][:n]),
        ("down", order[::-1][score_g[order[::-1]] < 0][:n]),
    ]
