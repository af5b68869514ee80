"""The decoder, the loadings and the factor table of an export."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._formats import EXPORT, check_format
from ldvae_ext._keys import DEFAULT_KEY, ExportKeys, check_key_added, export_keys
from ldvae_ext._validate import listed, warn
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core._arrays import permutation, strings
from ldvae_ext.core.matching import flags


def check_is_annotated(adata: Any) -> None:
    """Raise unless this is an AnnData."""
    if not isinstance(adata, AnnData):
        msg = f"`adata` must be the AnnData that was written to, by an `export_to_anndata` for instance; got {type(adata).__name__}."
        raise TypeError(msg)


STATISTICS = ("kl", "kl_share", "active_unit")
REPRODUCIBILITY = "reproducibility"


def export_mark(info: Any) -> int:
    """Statistics that identify an export, also after cells and genes were removed."""
    kl_k = np.asarray(info.get("statistics", {}).get("kl", []), dtype=np.float64)
    return zlib.crc32(" ".join(strings(info["names"])).encode() + kl_k.tobytes())


def warn_if_outdated(adata: AnnData, what: str, *, key: str, mark: int | None) -> None:
    """Warn if a result was computed from an earlier export under the same key, whose factors may have the same names."""
    info = adata.uns.get(key)
    if mark is not None and info is not None and export_mark(info) != int(mark):
        warn(f"{what} was computed from an earlier export {key!r}, whose factors differ from the present ones.")


def export_of(adata: AnnData, key: str = DEFAULT_KEY) -> tuple[ExportKeys, Any]:
    """Keys and ``uns`` entry of an export, or an error that names the method that writes one."""
    check_is_annotated(adata)
    keys = export_keys(key)
    entry = adata.uns.get(keys.info)
    if keys.info in adata.uns and not (isinstance(entry, Mapping) and isinstance(entry.get("decoder"), Mapping)):
        msg = f"`adata.uns[{keys.info!r}]` has no decoder, so it was not written by `LDVAE.export_to_anndata`."
        raise KeyError(msg)
    if keys.info not in adata.uns:
        msg = f"No export {key!r} in `adata.uns`, which has {listed(adata.uns) or 'nothing'}; `LDVAE.export_to_anndata` writes one."
        raise KeyError(msg)
    info = _in_memory(adata.uns[keys.info])
    check_format(f"`adata.uns[{keys.info!r}]`", info.get("format"), EXPORT)
    _check_sizes(info, keys.info)
    return keys, info


def _in_memory(entry: Any) -> Any:
    """An entry of ``uns`` whose arrays are read, if the AnnData was read lazily."""
    if isinstance(entry, Mapping):
        return {name: _in_memory(value) for name, value in entry.items()}
    return entry.compute() if hasattr(entry, "compute") else entry


def _check_sizes(info: Any, key: str) -> None:
    """Raise unless the parts of an export that are there belong to the same number of factors."""
    (names,) = parts_of(info, key, "names")
    n_factors, shape = np.size(names), np.shape(info["decoder"].get("weight_gk", np.empty((0, np.size(names)))))
    parts = {"names": (n_factors,), **{name: np.shape(info[name]) for name in ("order", "signs") if name in info}}
    wrong = [name for name, found in parts.items() if found != (n_factors,)]
    if wrong or np.ndim(names) != 1 or shape[1:] != (n_factors,):
        sizes = listed([f"{name}: {found}" for name, found in {**parts, "weight_gk": shape}.items()])
        msg = (
            f"`adata.uns[{key!r}]` has parts of different sizes, {sizes}; export again with `LDVAE.export_to_anndata`."
        )
        raise ValueError(msg)
    if "order" in info:
        permutation(info["order"], n_factors, f"adata.uns[{key!r}]['order']")
    if not np.isin(info.get("signs", 1), (-1, 1)).all():
        msg = f"`adata.uns[{key!r}]['signs']` must be +1 or -1 for each factor; got {listed(np.ravel(info['signs']))}."
        raise ValueError(msg)
    statistics = info.get("statistics", {})
    if not isinstance(statistics, Mapping) or any(np.asarray(v).dtype.kind not in "biuf" for v in statistics.values()):
        msg = f"`adata.uns[{key!r}]`: 'statistics' must hold numbers of each factor by name."
        raise ValueError(msg)


def parts_of(info: Any, key: str, *names: str) -> list[Any]:
    """Parts of the ``uns`` entry of an export, or an error that names those that are missing."""
    missing = [name for name in names if name not in info]
    if missing:
        msg = f"`adata.uns[{key!r}]` lacks {listed(missing)}; export again with `LDVAE.export_to_anndata`."
        raise KeyError(msg)
    return [info[name] for name in names]


def latents_of(adata: AnnData, key: str = DEFAULT_KEY) -> np.ndarray:
    """Exported latents, cells x factors, or an error if they are of several exports.

    ``anndata.concat`` joins the latents of two models in one array, and keeps the description of one of them.
    """
    keys, info = export_of(adata, key)
    if keys.latent not in adata.obsm:
        msg = f"The export {key!r} has no latents in `adata.obsm[{keys.latent!r}]`; export again with `LDVAE.export_to_anndata`."
        raise KeyError(msg)
    latent_nk, n_cells, n_factors = np.asarray(adata.obsm[keys.latent]), info.get("n_cells"), len(info["names"])
    if n_cells is not None and adata.n_obs > int(n_cells):
        msg = (
            f"`adata` has {adata.n_obs} cells, but the export {key!r} is of {int(n_cells)}: objects with exports of their own were "
            "merged, and the latents of one mean nothing in another. Export all cells together with `LDVAE.export_to_anndata`."
        )
        raise ValueError(msg)
    if latent_nk.dtype.kind not in "biuf":
        msg = f"`adata.obsm[{keys.latent!r}]` must hold numbers; its type is {latent_nk.dtype}."
        raise ValueError(msg)
    if latent_nk.ndim != 2 or latent_nk.shape[1] != n_factors:
        msg = f"`adata.obsm[{keys.latent!r}]` has {latent_nk.shape[1]} columns, but the export {key!r} has {n_factors} factors."
        raise ValueError(msg)
    return latent_nk


def check_no_export(adata: AnnData, key_added: str) -> None:
    """Raise if writing under this key would replace a part of an export, or if it is no key."""
    check_is_annotated(adata)
    check_key_added(key_added)
    for name, entry in adata.uns.items():
        if isinstance(entry, Mapping) and "decoder" in entry and key_added in (name, export_keys(name).loadings):
            msg = f"`key_added`: {key_added!r} belongs to the export {name!r}, which would be lost."
            raise ValueError(msg)


def decoder(adata: AnnData, *, key: str = DEFAULT_KEY) -> LinearDecoder:
    """Decoder of the exported latents: with their order, signs and names, in the canonical gauge.

    ``decoder(adata).scale(adata.obsm["X_ldvae"], batch)`` is the decoded expression of the cells, for the genes of the
    model. They are in the order of ``adata``, as in :func:`loadings`; if some have been left out of ``adata`` or renamed since the
    export, all are there, in the model's order.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    key
        ``key_added`` of the export.

    Examples
    --------
    >>> decoder = ldvae_ext.get.decoder(adata)
    >>> decoder.scale(adata.obsm["X_ldvae"]).shape
    (700, 765)
    """
    _, info = export_of(adata, key)
    order, signs = parts_of(info, key, "order", "signs")
    exported = LinearDecoder.from_arrays(info["decoder"]).reordered(order, signs).centered()
    position = adata.var_names.astype(str).get_indexer_for(pd.Index(exported.genes))
    whole = len(position) == len(exported.genes) and (position >= 0).all()
    return exported.with_genes_in_order(np.argsort(position)) if whole else exported


def loadings(adata: AnnData, *, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """Canonical loadings, genes of the model x factors in the exported order, in log-rate per unit of latent.

    Parameters
    ----------
    adata, key
        See :func:`decoder`.

    Examples
    --------
    >>> ldvae_ext.get.loadings(adata).shape
    (765, 5)
    """
    keys, info = export_of(adata, key)
    for slot, where, name in (("var", adata.var, keys.genes), ("varm", adata.varm, keys.loadings)):
        if name not in where:
            msg = f"The export {key!r} lacks `adata.{slot}[{name!r}]`; export again with `LDVAE.export_to_anndata`."
            raise KeyError(msg)
    known, names = np.asarray(adata.var[keys.genes], dtype=bool), strings(info["names"])
    loading_gk = np.asarray(adata.varm[keys.loadings])
    if loading_gk.ndim != 2 or loading_gk.shape[1] != len(names):
        msg = f"`adata.varm[{keys.loadings!r}]` has shape {loading_gk.shape}, but the export {key!r} has {len(names)} factors."
        raise ValueError(msg)
    return pd.DataFrame(loading_gk[known], index=adata.var_names[known], columns=names)


def factors(adata: AnnData, *, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """The factor table, one row for each factor in the exported order.

    Parameters
    ----------
    adata, key
        See :func:`decoder`.

    Returns
    -------
    Index: names. Columns: ``dimension`` (0-based, of the network), ``sign`` (+1 or -1, applied to loadings and latents),
    and the statistics of the export: ``kl`` (nats, mean over cells), ``kl_share``, ``active_unit``; of :func:`ldvae_ext.run` also
    ``reproducibility`` (0 to 1) and ``flag`` (``"stable"``, ``"uncertain"``, ``"unstable"``).

    Examples
    --------
    >>> table = ldvae_ext.get.factors(adata)
    >>> table.columns.tolist()
    ['dimension', 'sign', 'kl', 'kl_share', 'active_unit']
    >>> table["kl"].is_monotonic_decreasing
    True
    """
    _, info = export_of(adata, key)
    order, signs, statistics, names = parts_of(info, key, "order", "signs", "statistics", "names")
    table = {"dimension": np.asarray(order), "sign": np.asarray(signs)}
    # Files give the entries of a dictionary back in alphabetical order.
    first = [name for name in STATISTICS if name in statistics]
    for name in (*first, *sorted(set(statistics) - set(first))):
        table[name] = np.asarray(statistics[name])
    names = strings(names)
    for name, values in table.items():
        if values.shape != (len(names),):
            msg = f"`adata.uns[{key!r}]`: {name!r} must have a value for each of {len(names)} factors; it has shape {values.shape}."
            raise ValueError(msg)
    if REPRODUCIBILITY in table:
        table["flag"] = flags(table[REPRODUCIBILITY])
    return pd.DataFrame(table, index=pd.Index(names, name="factor"))
