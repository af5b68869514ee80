"""Mean expression of populations, from an export."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._groups import groups_of, table_of
from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import cell_positions, check_positive_int
from ldvae_ext.core._expression import GroupExpression, check_library_size, gene_positions
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.tl._cells import ExportedCells

CHUNK_SIZE = 4096


def population_expression(
    adata: AnnData,
    groupby: str,
    *,
    indices: Any = None,
    transform_batch: Any = None,
    gene_list: list[str] | None = None,
    library_size: float | Literal["latent"] = 1,
    key: str = DEFAULT_KEY,
    chunk_size: int = CHUNK_SIZE,
) -> pd.DataFrame:
    """Mean decoded expression of each population, from an export.

    Equals :meth:`ldvae_ext.model.LDVAE.get_population_expression` up to rounding. No counts are read, no array of cells x
    genes is made, and nothing is written.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    groupby
        Column of ``obs``; cells without a value are left out.
    indices
        Cells to average over, as positions or a mask; all if None.
    transform_batch
        Name of the batch, or names of several, in which cells are decoded; each cell's own batch if None. Expression is
        averaged over several batches.
    gene_list
        Genes to return, in the model's order; all if None.
    library_size
        Counts to scale to; ``"latent"`` for each cell's own library size. With 1, the result is a share of expression.
    key
        ``key_added`` of the export.
    chunk_size
        Cells held in memory at a time. The result does not depend on it.

    Returns
    -------
    Populations x genes of the model, float64.

    Raises
    ------
    KeyError
        If there is no such export or column.
    ValueError
        If a batch or gene does not exist, or no cell has a group.

    Examples
    --------
    >>> expression = ldvae_ext.tl.population_expression(adata, "bulk_labels")
    >>> expression.shape
    (10, 765)
    >>> bool(np.allclose(expression.sum(axis=1), 1))
    True
    """
    check_positive_int("chunk_size", chunk_size)
    check_library_size(library_size)
    exported = ExportedCells(adata, key)
    decoder = exported.decoder
    positions = cell_positions(indices, adata.n_obs)
    # Groups of the selected cells only, so that no group is empty.
    obs = table_of(adata.obs)
    groups, code_n = groups_of(obs if indices is None else obs.iloc[positions], groupby)
    genes, batches = gene_positions(decoder.genes, gene_list), exported.batch_codes(transform_batch)
    sums = GroupExpression(decoder, len(groups))
    for start in range(0, len(positions), chunk_size):
        at, group_n = positions[start : start + chunk_size], code_n[start : start + chunk_size]
        z_nk = deterministic_latent(exported.mean(at), decoder.latent_distribution)
        for batch in batches:
            batch_n = exported.batch_n[at] if batch is None else np.full(len(at), batch)
            sums.add(
                z_nk,
                decoder.batches[batch_n],
                group_n,
                covariates=None if exported.covariates is None else exported.covariates.iloc[at],
                library=exported.library_n[at] if isinstance(library_size, str) else library_size,
                share=1 / len(batches),
            )
        sums.count(group_n)
    return pd.DataFrame(sums.mean_pg[:, genes], index=groups, columns=decoder.genes[genes])
