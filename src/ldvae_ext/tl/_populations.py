"""Population loadings, written to AnnData."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._formats import POPULATIONS
from ldvae_ext._groups import groups_of, table_of
from ldvae_ext._keys import DEFAULT_KEY, POPULATION_LOADINGS
from ldvae_ext._validate import cell_positions, check_positive_int
from ldvae_ext.core._arrays import strings
from ldvae_ext.core.group_moments import GroupMoments
from ldvae_ext.core.populations import PopulationRequest
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.get._export import check_no_export, export_mark
from ldvae_ext.tl._cells import ExportedCells

CHUNK_SIZE = 1024


def population_loadings(
    adata: AnnData,
    groupby: str,
    kind: Literal["gradient", "contribution", "path", "within"] = "gradient",
    *,
    indices: Any = None,
    reference: str = "rest",
    scale: Literal["log", "expression"] | None = None,
    key: str = DEFAULT_KEY,
    key_added: str = POPULATION_LOADINGS,
    chunk_size: int = CHUNK_SIZE,
    copy: bool = False,
) -> AnnData | None:
    """Effect of each factor on each gene in each population, from an export.

    Equals :meth:`ldvae_ext.model.LDVAE.get_population_loadings`, in the exported order and signs. No counts are read.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    groupby
        Column of ``obs``; cells without a value are left out.
    indices
        Cells to use, as positions or a mask; all if None. The reference consists of these cells, too. To compare conditions
        inside one cell type, give the cells of that type.
    kind, reference, scale
        As in :meth:`ldvae_ext.model.LDVAE.get_population_loadings`.
    key
        ``key_added`` of the export.
    key_added
        Key of ``varm`` and ``uns`` to write to.
    chunk_size
        Cells decoded at a time (for ``"gradient"``). The result does not depend on it.
    copy
        True to return a copy of ``adata`` with the result and leave ``adata`` unchanged.

    Returns
    -------
    The copy if ``copy``, else None.

    Raises
    ------
    KeyError
        If there is no such export or column.
    ValueError
        If a group or kind does not exist, a group has the name of a reference, an argument has no use for the kind, or
        ``key_added`` belongs to an export. Nothing is written.

    Notes
    -----
    Writes

    * ``varm["ldvae_population_loadings"]``: genes x factors x populations, float32; NaN for genes outside the model;
    * ``uns["ldvae_population_loadings"]``: ``format`` (2), ``names`` (of the factors, including ``"batch"``, or of the directions),
      ``groups``, ``n_cells`` of each group, ``groupby``, ``kind``, ``reference``, ``scale``, ``key``, ``export`` (checksum
      of the export under this key); for ``"within"`` also ``factors``, ``share`` (populations x directions x factors) and
      ``variance`` (populations x directions).

    :func:`ldvae_ext.get.population_loadings_df` reads them.

    Examples
    --------
    >>> ldvae_ext.tl.population_loadings(adata, "bulk_labels", "path")
    >>> adata.varm["ldvae_population_loadings"].shape  # genes x factors x groups
    (765, 5, 10)
    """
    check_no_export(adata, key_added)
    check_positive_int("chunk_size", chunk_size)
    exported = ExportedCells(adata, key)
    positions = cell_positions(indices, adata.n_obs)
    # Groups of the selected cells only, so that no group is empty.
    groups, code_n = groups_of(table_of(adata.obs).iloc[positions], groupby)
    request = PopulationRequest(groups=groups, kind=kind, reference=str(reference), scale=scale)
    position = adata.var_names.astype(str).get_indexer_for(pd.Index(exported.decoder.genes))
    if len(position) != len(exported.decoder.genes) or not (position >= 0).any():
        problem = "has a gene twice" if len(position) != len(exported.decoder.genes) else "has none of its genes"
        msg = f"Loadings are written to the genes of the decoder; `adata` {problem}."
        raise ValueError(msg)
    decoder = exported.decoder.reordered(exported.order, exported.signs)
    moments = GroupMoments(decoder, len(groups), request.summed_scale)
    for start in range(0, len(positions), chunk_size):
        at = positions[start : start + chunk_size]
        z_nk = deterministic_latent(exported.mean(at), decoder.latent_distribution)
        covariates = None if exported.covariates is None else exported.covariates.iloc[at]
        moments.add(
            z_nk[:, exported.order] * exported.signs,
            exported.batch_n[at],
            covariates,
            code_n[start : start + chunk_size],
        )
    loadings = request.loadings(decoder, moments)

    target = adata.copy() if copy else adata
    known = position >= 0
    array = np.full((target.n_vars, len(loadings.columns), len(loadings.groups)), np.nan, dtype=np.float32)
    array[position[known]] = loadings.value_pgk.transpose(1, 2, 0)[known]
    info: dict[str, Any] = {
        "format": POPULATIONS,
        "names": strings(loadings.columns),
        "groups": strings([groups[p] for p in loadings.groups]),
        "n_cells": moments.n_p[loadings.groups],
        "groupby": groupby,
        "kind": kind,
        "key": key,
        "export": export_mark(adata.uns[key]),
    }
    if kind in ("contribution", "path"):
        info["reference"] = request.reference
    if request.summed_scale is not None:
        info["scale"] = request.summed_scale
    if kind == "within":
        info["factors"] = strings(decoder.factors)
        info["share"] = np.stack([d.share_jk for d in loadings.directions])
        info["variance"] = np.stack([d.variance_j for d in loadings.directions])
    target.varm[key_added] = array
    target.uns[key_added] = info
    return target if copy else None
