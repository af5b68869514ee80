"""Which genes a factor is about."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import check_one_of, check_positive_int, factor_indices, listed
from ldvae_ext.get._export import decoder, loadings

RANKS = ("information", "loading")


def gene_scores(adata: AnnData, *, rank_by: str = "information", key: str = DEFAULT_KEY) -> pd.DataFrame:
    """What genes are ranked by, for each factor: positive where expression rises with it, negative where it falls.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    rank_by
        ``"loading"``: the canonical loading, in log-rate per unit of latent; its largest values often belong to genes
        with hardly any counts. ``"information"``: the gene's signed share in what the counts of an average cell say about
        the factor (:meth:`ldvae_ext.core.LinearDecoder.gene_information`), which weighs loadings by expression.
    key
        ``key_added`` of the export.

    Returns
    -------
    Genes of the model x factors in the exported order.

    Raises
    ------
    ValueError
        If genes of ``adata`` were renamed since the export, for ``"information"``.
    """
    check_one_of("rank_by", rank_by, RANKS)
    table = loadings(adata, key=key)
    if rank_by == "loading":
        return table
    exported = decoder(adata, key=key)
    position = pd.Index(exported.genes).get_indexer(table.index.astype(str))
    if (position < 0).any():
        msg = f"Genes were renamed since the export: {listed(table.index[position < 0])} not among its genes. Export again, or use `rank_by='loading'`."
        raise ValueError(msg)
    return pd.DataFrame(exported.gene_information()[position], index=table.index, columns=table.columns)


def top_genes(
    adata: AnnData,
    factor: Any = None,
    *,
    n: int = 10,
    rank_by: Literal["information", "loading"] = "information",
    key: str = DEFAULT_KEY,
) -> pd.DataFrame:
    """The genes that rise and that fall most with a factor.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    factor
        One factor or several: names (``"Z_3"``) or positions in the exported order. All of them if None.
    n
        Genes in each direction; fewer are returned where fewer rise or fall.
    rank_by
        See :func:`gene_scores`.
    key
        ``key_added`` of the export.

    Returns
    -------
    One row for each factor, direction and gene: ``factor``, ``direction`` (``"up"`` or ``"down"``), ``rank`` (from 1), ``gene``,
    ``loading`` (log-rate per unit of latent) and, with ``rank_by="information"``, ``information`` (signed share).
    """
    check_positive_int("n", n)
    score, loading = gene_scores(adata, rank_by=rank_by, key=key).to_numpy(), loadings(adata, key=key)
    tables = []
    for k in factor_indices(factor, loading.columns.tolist(), argument="factor"):
        order = np.argsort(-score[:, k], kind="stable")
        for direction, rows in (("up", order[score[order, k] > 0]), ("down", order[::-1][score[order[::-1], k] < 0])):
            rows = rows[:n]
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
