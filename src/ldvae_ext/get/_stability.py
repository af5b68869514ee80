"""Consensus of several trainings, and rotations, from AnnData."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._formats import CONSENSUS, check_format
from ldvae_ext._keys import CONSENSUS_KEY, DEFAULT_KEY, consensus_keys
from ldvae_ext._stats import MEASURES, STABILITY, rank_table, replicates
from ldvae_ext._validate import listed
from ldvae_ext.core._arrays import checked, strings
from ldvae_ext.get._export import check_is_annotated, export_of, factors, parts_of


def consensus_info(adata: AnnData, key: str = CONSENSUS_KEY) -> Any:
    """``uns`` entry of a consensus, or an error that names the function that writes one."""
    check_is_annotated(adata)
    info = adata.uns.get(consensus_keys(key).info)
    if info is None or "cosine" not in info:
        msg = f"No consensus {key!r} in `adata.uns`, which has {listed(adata.uns) or 'nothing'}; `fit_ensemble(...).export_to_anndata` writes one."
        raise KeyError(msg)
    check_format(f"`adata.uns[{key!r}]`", info.get("format"), CONSENSUS)
    return info


def stability(adata: AnnData, *, key: str = CONSENSUS_KEY) -> pd.DataFrame:
    """Reproducibility of each consensus factor.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.Ensemble.export_to_anndata` wrote to.
    key
        ``key_added`` of the consensus.

    Returns
    -------
    One row for each factor: ``reproducibility``, ``lowest``, ``flag``, ``kl``, ``cells`` and, with disjoint halves, ``scores``,
    ``top_genes``, ``usages`` and ``replicates``; see :attr:`ldvae_ext.model.Ensemble.stats`.

    Examples
    --------
    >>> table = ldvae_ext.get.stability(result.adata)
    >>> table.columns.tolist()
    ['reproducibility', 'lowest', 'flag', 'kl', 'cells']
    >>> table.index.tolist()
    ['C_0', 'C_1', 'C_2', 'C_3', 'C_4']
    """
    info = consensus_info(adata, key)
    statistics = {name: np.asarray(info["statistics"][name]) for name in STABILITY if name in info["statistics"]}
    table = pd.DataFrame(statistics, index=pd.Index(strings(info["names"]), name="factor"))
    table.insert(2, "flag", strings(info["flag"]))
    cells = {"none": "same", "halves": "disjoint halves"}.get(str(info["resample"]), str(info["resample"]))
    table.insert(4, "cells", cells)
    return table.assign(replicates=replicates(table)) if "scores" in table else table


def consensus_loadings(adata: AnnData, *, spread: bool = False, key: str = CONSENSUS_KEY) -> pd.DataFrame:
    """Consensus loadings, genes of the models x factors, in log-rate.

    Parameters
    ----------
    adata, key
        See :func:`stability`.
    spread
        True to return their standard deviation over runs instead.

    Examples
    --------
    >>> ldvae_ext.get.consensus_loadings(result.adata).shape
    (765, 5)
    """
    info, keys = consensus_info(adata, key), consensus_keys(key)
    value_gk = np.asarray(adata.varm[keys.spread if spread else keys.loadings])
    known = ~np.isnan(value_gk).any(axis=1)
    return pd.DataFrame(value_gk[known], index=adata.var_names[known], columns=strings(info["names"]))


def rotation(adata: AnnData, *, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """The rotation that exported factors were seen through.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    key
        ``key_added`` of the export.

    Returns
    -------
    Latents of the network (``Z_0``, ...) x factors in the exported order and signs: latents times it are the exported ones, and its
    inverse leads back. Columns have unit length, and are orthogonal but for ``"promax"`` and ``"ica"``, where ``R.T @ R`` are the
    prior correlations of the factors.

    Raises
    ------
    KeyError
        If there is no such export, or it was made without a rotation.

    Examples
    --------
    >>> rotation = ldvae_ext.get.rotation(result.adata)
    >>> bool(np.allclose(rotation.T @ rotation, np.eye(5), atol=1e-6))
    True
    """
    _, info = export_of(adata, key)
    if "rotation" not in info:
        msg = f"The export {key!r} was made on the network's own axes; `LDVAE.rotate` before it rotates them."
        raise KeyError(msg)
    order, signs = parts_of(info, key, "order", "signs")
    matrix, latents = parts_of(info["rotation"], f"{key}']['rotation", "matrix", "latents")
    matrix_kk = checked(matrix, (len(order), len(order)), f"adata.uns[{key!r}]['rotation']['matrix']")
    columns = strings(info["names"])
    return pd.DataFrame(matrix_kk[:, np.asarray(order)] * np.asarray(signs), index=strings(latents), columns=columns)


def factor_ranks(adata: AnnData, *, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """The orders by each stored measure, side by side: rank of each factor, 1 for the largest value.

    Parameters
    ----------
    adata, key
        See :func:`rotation`; ``export_to_anndata(stats=True)`` stores all measures.

    Returns
    -------
    Factors x measures. Their rank agreement (Spearman's) is ``factor_ranks(adata).corr()``.

    Examples
    --------
    >>> ranks = ldvae_ext.get.factor_ranks(result.adata)
    >>> sorted(ranks["kl"].astype(int))
    [1, 2, 3, 4, 5]
    """
    table = factors(adata, key=key)
    return rank_table(table[[name for name in MEASURES if name in table]])
