"""Writes an export: latents, loadings and decoder, in order and with signs, to AnnData."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._formats import EXPORT
from ldvae_ext._keys import PCA_INFO, PCA_LATENT, PCA_LOADINGS, ExportKeys, export_keys
from ldvae_ext._validate import listed
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.core.scores import GeneScores


@dataclass(frozen=True, kw_only=True, eq=False)
class Export:
    """Posteriors of cells and the decoder that they belong to, in the decoder's own order and signs."""

    decoder: LinearDecoder
    mean_nk: Any
    """Posterior means, of u under ``"ln"``; here and below arrays of numpy, or of dask for a result on disk."""
    variance_nk: Any
    library_n: Any
    statistics: dict[str, np.ndarray]
    """Measures of the factors by name."""
    order: np.ndarray
    """Position of each exported factor in the decoder."""
    signs: np.ndarray
    """Signs of the exported factors."""
    names: np.ndarray
    """Names of the exported factors."""
    order_by: str
    network_variance_nk: Any = None
    """Variances of the network's latents, if the factors are rotated."""
    scores: GeneScores | None = None
    """Gene scores; None without counts."""
    error_gk: np.ndarray | None = None
    """Standard errors of the loadings; None if they are not known."""
    fit_n: np.ndarray | None = None
    """Deviance of each cell relative to its expectation; in a projection."""
    converged_n: np.ndarray | None = None
    """True for cells whose posterior mode was found; in a projection."""
    description: dict[str, Any] = field(default_factory=dict)
    """Further entries of ``uns``."""


def check_can_write(target: AnnData, key_added: str | None, *, overwrite: bool, as_pca: bool = False) -> ExportKeys:
    """Keys of the export, or an error if it would replace what is no export's."""
    keys = export_keys(key_added)
    if keys.info == PCA_INFO:
        msg = f"`key_added={key_added!r}` would replace scanpy's PCA; use `as_pca=True` to write a PCA with the export."
        raise ValueError(msg)
    if overwrite:
        return keys
    entry = target.uns.get(keys.info)
    is_known = isinstance(entry, Mapping) and "decoder" in entry
    if keys.genes in target.var and not is_known:
        msg = f"`adata.var[{keys.genes!r}]` exists and is no export's; choose another `key_added`, or `overwrite=True`."
        raise ValueError(msg)
    library = target.obs.get(keys.library)
    if library is not None and not pd.api.types.is_float_dtype(library):
        msg = f"`adata.obs[{keys.library!r}]` exists and is no library size; choose another `key_added`, or `overwrite=True`."
        raise ValueError(msg)
    slots = (
        ("obsm", keys.latent),
        ("obsm", keys.variance),
        ("obsm", keys.logits),
        ("obsm", keys.network_variance),
        ("varm", keys.loadings),
        ("varm", keys.loadings_error),
        ("varm", keys.scores),
        ("varm", keys.errors),
        ("obs", keys.fit),
        ("obs", keys.converged),
        ("uns", keys.info),
    )
    foreign = [f"{slot}[{key!r}]" for slot, key in slots if key in getattr(target, slot)]
    if foreign and not is_known:
        msg = (
            f"`adata` has {', '.join(foreign)}, which no export describes and which would be replaced; choose another "
            "`key_added`, or `overwrite=True`."
        )
        raise ValueError(msg)
    pca = ((PCA_LATENT, target.obsm), (PCA_LOADINGS, target.varm), (PCA_INFO, target.uns))
    taken = [key for key, slot in pca if key in slot]
    if as_pca and taken:
        msg = f"`as_pca`: {listed(taken)} would be replaced; `overwrite=True` does that."
        raise ValueError(msg)
    return keys


def write_export(target: AnnData, keys: ExportKeys, export: Export, *, as_pca: bool = False) -> None:
    """Write an export; fields of an earlier one under these keys that it lacks are removed."""
    decoder, order, signs = export.decoder, export.order, export.signs
    row_g = pd.Index(decoder.genes).get_indexer(target.var_names.astype(str))

    def by_gene(value_gk: np.ndarray) -> np.ndarray:
        out = np.full((target.n_vars, value_gk.shape[1]), np.nan, dtype=np.float32)
        out[row_g >= 0] = value_gk[row_g[row_g >= 0]]
        return out

    loadings = by_gene(decoder.reordered(order, signs).centered().weight_gk)
    statistics = {name: value_k[order] for name, value_k in export.statistics.items()}
    latent_nk = _deterministic_latent(export.mean_nk, decoder.latent_distribution)
    is_ln, network_variance_nk, scores = (
        decoder.latent_distribution == "ln",
        export.network_variance_nk,
        export.scores,
    )
    single = np.float32
    cells = {
        keys.latent: (latent_nk[:, order] * signs).astype(single),
        keys.variance: export.variance_nk[:, order].astype(single),
        keys.logits: export.mean_nk[:, order].astype(single) if is_ln else None,
        keys.network_variance: None if network_variance_nk is None else network_variance_nk.astype(single),
    }
    genes = {
        keys.loadings: loadings,
        keys.loadings_error: None if export.error_gk is None else by_gene(export.error_gk[:, order]),
        keys.scores: None if scores is None else by_gene(scores.score_gk[:, order] * signs),
        keys.errors: None if scores is None else by_gene(scores.error_gk[:, order]),
    }
    columns = {keys.library: np.asarray(export.library_n), keys.fit: export.fit_n, keys.converged: export.converged_n}
    slots: Any = ((target.obsm, cells), (target.varm, genes), (target.obs, columns))
    for slot, values in slots:
        for key, value in values.items():
            if value is not None:
                slot[key] = value
            elif key in slot:
                del slot[key]
    target.var[keys.genes] = row_g >= 0
    target.uns[keys.info] = {
        "format": EXPORT,
        "names": export.names.copy(),
        "order": order,
        "signs": signs,
        "order_by": export.order_by,
        "statistics": statistics,
        "decoder": decoder.to_arrays(),
        "likelihood": decoder.likelihood,
        "latent_distribution": decoder.latent_distribution,
        "n_cells": target.n_obs,
        **export.description,
    }
    if as_pca:
        target.obsm[PCA_LATENT] = target.obsm[keys.latent].copy()
        target.varm[PCA_LOADINGS] = np.nan_to_num(loadings)
        target.uns[PCA_INFO] = {
            "variance": statistics["kl"],
            "variance_ratio": statistics["kl_share"],
            "params": {
                "source": f"ldvae_ext export {keys.info!r}",
                "variance": "KL in nats",
                "variance_ratio": "share of KL",
            },
        }


def _deterministic_latent(mean_nk: Any, latent_distribution: str) -> Any:
    if hasattr(mean_nk, "map_blocks"):  # of dask
        return mean_nk.map_blocks(deterministic_latent, latent_distribution, dtype=mean_nk.dtype)
    return deterministic_latent(mean_nk, latent_distribution)


def add_statistic(adata: AnnData, keys: ExportKeys, name: str, value_k: np.ndarray) -> None:
    """Add a measure of the factors, in the exported order."""
    adata.uns[keys.info]["statistics"][name] = np.asarray(value_k, dtype=np.float64)
