"""The decoder, the loadings and the factor table of an export."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._keys import DEFAULT_KEY, ExportKeys, check_key_added, export_keys
from ldvae_ext._validate import listed, warn
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core._arrays import strings
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
    if keys.info in adata.uns and "decoder" not in adata.uns[keys.info]:
        msg = f"`adata.uns[{keys.info!r}]` has no decoder, so it was not written by `LDVAE.export_to_anndata`."
        raise KeyError(msg)
    if keys.info not in adata.uns:
        msg = f"No export {key!r} in `adata.uns`, which has {listed(adata.uns)}; `LDVAE.export_to_anndata` writes one."
        raise KeyError(msg)
    return keys, adata.uns[keys.info]


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
    if latent_nk.shape[1] != n_factors:
        msg = f"`adata.obsm[{keys.latent!r}]` has {latent_nk.shape[1]} columns, but the export {key!r} has {n_factors} factors."
        raise ValueError(msg)
    return latent_nk


def check_no_export(adata: AnnData, key_added: str) -> None:
    """Raise if writing under this key would replace a part of an export, or if it is no key."""
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
    exported = LinearDecoder.from_arrays(info["decoder"]).reordered(info["order"], info["signs"]).centered()
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
    known = np.asarray(adata.var[keys.genes], dtype=bool)
    return pd.DataFrame(
        np.asarray(adata.varm[keys.loadings])[known],
        index=adata.var_names[known],
        columns=strings(info["names"]),
    )


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
    table = {"dimension": np.asarray(info["order"]), "sign": np.asarray(info["signs"])}
    # Files give the entries of a dictionary back in alphabetical order.
    first = [name for name in STATISTICS if name in info["statistics"]]
    for name in (*first, *sorted(set(info["statistics"]) - set(first))):
        table[name] = np.asarray(info["statistics"][name])
    if REPRODUCIBILITY in table:
        table["flag"] = flags(table[REPRODUCIBILITY])
    return pd.DataFrame(table, index=pd.Index(strings(info["names"]), name="factor"))
