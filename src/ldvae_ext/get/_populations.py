"""Population loadings, read back as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._formats import POPULATIONS, check_format
from ldvae_ext._groups import directions_table
from ldvae_ext._keys import POPULATION_LOADINGS
from ldvae_ext._validate import check_one_of, factor_indices, given_names, listed
from ldvae_ext.core._arrays import strings
from ldvae_ext.get._export import check_is_annotated, warn_if_outdated


def populations_of(adata: AnnData, key: str = POPULATION_LOADINGS) -> tuple[np.ndarray, Any]:
    """Array (genes x factors x populations) and ``uns`` entry of population loadings, or an error that names their function."""
    check_is_annotated(adata)
    entry = adata.uns.get(key)
    if key not in adata.varm or not isinstance(entry, Mapping) or "groups" not in entry:
        msg = f"No population loadings {key!r} in `adata.varm`, which has {listed(adata.varm) or 'nothing'}; `ldvae_ext.tl.population_loadings` writes them."
        raise KeyError(msg)
    info = adata.uns[key]
    check_format(f"`adata.uns[{key!r}]`", info.get("format"), POPULATIONS)
    warn_if_outdated(adata, f"`adata.varm[{key!r}]`", key=str(info["key"]), mark=info.get("export"))
    return np.asarray(adata.varm[key], dtype=np.float64), info


def group_positions(groups: Sequence[str], group: Any) -> list[int]:
    """Positions of one group, several, or, for None, all of them, in the order in which they were given."""
    known = [str(name) for name in groups]
    given = known if group is None else given_names("group", group)
    for name in given:
        check_one_of("group", name, known)
    return [known.index(name) for name in given]


def population_loadings_df(
    adata: AnnData, factor: Any = None, group: Any = None, *, key: str = POPULATION_LOADINGS
) -> pd.DataFrame:
    """Population loadings as a long table.

    Parameters
    ----------
    adata
        AnnData that :func:`ldvae_ext.tl.population_loadings` wrote to.
    factor
        One factor or several: names or positions; all of them if None. For ``kind="within"`` directions (``"D_0"``); for
        ``kind="path"`` ``"batch"`` is among them.
    group
        One population or several; all of them if None.
    key
        ``key_added`` of the population loadings.

    Returns
    -------
    One row for each population, factor and gene of the model: ``group``, ``factor`` (or direction), ``gene``,
    ``value`` (see :meth:`ldvae_ext.model.LDVAE.get_population_loadings` for its unit); for ``"path"`` also ``total``, the sum over all
    factors and ``"batch"``: the gene's log-ratio between population and reference; for ``"within"`` ``variance_share``: the share
    of the variance of the gene's log-rate inside the population that the direction explains.

    Raises
    ------
    KeyError
        If there are none.
    ValueError
        If a population or factor does not exist.

    Examples
    --------
    >>> ldvae_ext.tl.population_loadings(adata, "bulk_labels", "path")
    >>> table = ldvae_ext.get.population_loadings_df(adata, group="CD14+ Monocyte")
    >>> table.columns.tolist()
    ['group', 'factor', 'gene', 'value', 'total']
    """
    value_gkp, info = populations_of(adata, key)
    names = strings(info["names"]).tolist()
    groups = strings(info["groups"]).tolist()
    known = ~np.isnan(value_gkp).all(axis=(1, 2))
    genes = adata.var_names.to_numpy()[known]
    is_within, is_path = info["kind"] == "within", info["kind"] == "path"
    tables = []
    for p in group_positions(groups, group):
        total_g = np.square(value_gkp[known, :, p]).sum(axis=1)
        for k in factor_indices(factor, names, argument="factor"):
            value_g = value_gkp[known, k, p]
            table = {
                "group": groups[p],
                "factor": names[k],
                "gene": genes,
                "value": value_g,
            }
            if is_path:
                table["total"] = value_gkp[known, :, p].sum(axis=1)
            if is_within:
                table["variance_share"] = np.divide(
                    value_g**2, total_g, where=total_g > 0, out=np.full_like(total_g, np.nan)
                )
            tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def population_directions_df(adata: AnnData, *, key: str = POPULATION_LOADINGS) -> pd.DataFrame:
    """Share of each factor in the directions of variation inside each population.

    Parameters
    ----------
    adata
        AnnData that :func:`ldvae_ext.tl.population_loadings` wrote to with ``kind="within"``.
    key
        ``key_added`` of the population loadings.

    Returns
    -------
    As from :meth:`ldvae_ext.model.LDVAE.get_population_directions`.

    Examples
    --------
    >>> ldvae_ext.tl.population_loadings(adata, "bulk_labels", "within")
    >>> table = ldvae_ext.get.population_directions_df(adata)
    >>> table.columns.tolist()
    ['group', 'direction', 'factor', 'share', 'variance', 'variance_share']
    """
    _, info = populations_of(adata, key)
    if info["kind"] != "within":
        msg = f"`key={key!r}` has population loadings of kind {info['kind']!r}; only kind 'within' has directions."
        raise ValueError(msg)
    return directions_table(
        strings(info["groups"]).tolist(),
        strings(info["names"]).tolist(),
        strings(info["factors"]).tolist(),
        np.asarray(info["share"]),
        np.asarray(info["variance"]),
    )
