"""Matching of the factors of two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._keys import DEFAULT_KEY, consensus_keys, export_keys
from ldvae_ext._validate import check_one_of, listed
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core._arrays import strings
from ldvae_ext.core.matching import cosines, match_columns, procrustes
from ldvae_ext.core.rotation import CONSENSUS
from ldvae_ext.get._export import loadings
from ldvae_ext.get._genes import gene_scores
from ldvae_ext.get._programs import is_programs, programs

SOURCES = ("loadings", "gene_scores", "scores")


@dataclass(frozen=True, eq=False, repr=False)
class FactorMatch:
    """Matched factors of two models, from :func:`match_factors`.

    Examples
    --------
    >>> match = ldvae_ext.tl.match_factors(*result.ensemble.models)
    >>> match
    FactorMatch(5 pairs, 765 shared genes, median |cosine| ..., Procrustes distance ...)
    >>> match.cosine.shape
    (5, 5)
    """

    pairs: pd.DataFrame
    """One row for each pair: ``first``, ``second``, ``cosine`` (signed: negative if the factors have opposite directions) and
    ``aligned``. This is the cosine of the first factor with its counterpart after the orthogonal rotation that fits the second
    model best to the first; NaN unless ``by="loadings"``."""
    cosine: pd.DataFrame
    """Cosine (``by="scores"``: correlation) of each factor of the first model with each factor of the second."""
    procrustes_distance: float
    """0 if one model is a rotation of the other, 1 if they have nothing in common; see
    :func:`ldvae_ext.core.matching.procrustes`. NaN unless ``by="loadings"``."""
    n_shared: int
    """Number of compared genes or cells, which both models have."""
    by: str

    def __repr__(self) -> str:
        what = "cells" if self.by == "scores" else "genes"
        median = self.pairs["cosine"].abs().median()
        distance = "" if np.isnan(self.procrustes_distance) else f", Procrustes distance {self.procrustes_distance:.2f}"
        return f"FactorMatch({len(self.pairs)} pairs, {self.n_shared} shared {what}, median |cosine| {median:.2f}{distance})"


def match_factors(
    a: Any,
    b: Any,
    *,
    by: Literal["loadings", "gene_scores", "scores"] = "loadings",
    key: str = DEFAULT_KEY,
    key_b: str | None = None,
) -> FactorMatch:
    """Match the factors of two models, and separate a difference of axes from a difference of subspaces.

    Parameters
    ----------
    a, b
        Each a model (LDVAE, rotated if it has a rotation; LinearSCVI; an ensemble, by its consensus), a
        :class:`ldvae_ext.core.LinearDecoder`, an AnnData with an export or a consensus, or a DataFrame, genes x factors (for
        ``by="scores"``: cells x factors).
    by
        ``"loadings"``: canonical loadings (with the given signs for a LinearSCVI or a DataFrame) of the shared genes, centred
        over these genes. ``"gene_scores"``: slopes of the genes' log-normalised counts on the factors, for exports of cells with counts,
        programs (:meth:`ldvae_ext.model.LDVAE.get_programs`) and DataFrames; training on different cells changes them
        less than loadings.
        ``"scores"``: latents of the cells whose names are shared, centred; for models and AnnData.
        Training on different cells changes loadings more than scores.
    key, key_b
        ``key_added`` of the exports in ``a`` and ``b`` if these are AnnData; ``key_b`` is ``key`` if None.

    Returns
    -------
    A :class:`ldvae_ext.tl.FactorMatch`: ``pairs``, ``cosine``, ``procrustes_distance``. Pairs are one to one and maximise the
    sum of absolute cosines (Hungarian method). With unequal numbers of factors, some are left out.

    Raises
    ------
    TypeError
        If ``a`` or ``b`` has no factors.
    ValueError
        If values are not finite, or the number of shared genes or cells does not exceed the number of factors.

    Examples
    --------
    >>> match = ldvae_ext.tl.match_factors(adata, result.adata)
    >>> match.pairs.columns.tolist()
    ['first', 'second', 'cosine', 'aligned']
    >>> match.n_shared
    765
    """
    check_one_of("by", by, SOURCES)
    read = {"loadings": _loadings, "gene_scores": _gene_scores, "scores": _scores}[by]
    first, second = read(a, key), read(b, key if key_b is None else key_b)
    for name, table in (("a", first), ("b", second)):
        for names in (table.index, table.columns):
            if not names.is_unique:
                msg = f"`{name}`: names must be unique; {names[names.duplicated()][0]!r} occurs more than once."
                raise ValueError(msg)
        if not np.isfinite(table.to_numpy(dtype=np.float64)).all():
            msg = f"`{name}` holds values that are NaN or infinite, which cannot be compared."
            raise ValueError(msg)
    shared = first.index.intersection(second.index, sort=False)
    n_factors = max(first.shape[1], second.shape[1])
    if len(shared) <= n_factors:
        what = "cells" if by == "scores" else "genes"
        msg = f"`a` and `b` share {len(shared)} {what}, such as {listed(shared[:3]) or 'none'}; more than {n_factors} are needed to compare {n_factors} factors."
        raise ValueError(msg)
    a_nk, b_nj = (table.loc[shared].to_numpy(np.float64) for table in (first, second))
    if by != "gene_scores":  # which are correlations, and 0 for a gene that does not change
        a_nk, b_nj = a_nk - a_nk.mean(axis=0), b_nj - b_nj.mean(axis=0)
    cosine_kj = cosines(a_nk, b_nj)
    match = match_columns(cosine_kj)
    aligned_k, distance = np.full(first.shape[1], np.nan), np.nan
    if by == "loadings":
        rotation, distance = procrustes(a_nk, b_nj)
        aligned_k = np.diag(cosines(a_nk, b_nj @ rotation))
    pairs = pd.DataFrame(
        {
            "first": first.columns[match.first],
            "second": second.columns[match.second],
            "cosine": match.cosine * match.sign,
            "aligned": aligned_k[match.first],
        }
    )
    table = pd.DataFrame(cosine_kj, index=first.columns, columns=second.columns)
    return FactorMatch(pairs, table, distance, len(shared), by)


def _loadings(source: Any, key: str) -> pd.DataFrame:
    """Loadings with the names of genes and factors."""
    if isinstance(source, AnnData):
        keys = consensus_keys(key)
        info = source.uns.get(key)
        if isinstance(info, Mapping) and "cosine" in info:
            known = ~np.isnan(source.varm[keys.loadings]).any(axis=1)
            table = pd.DataFrame(source.varm[keys.loadings][known], index=source.var_names[known])
            return _named(table, strings(info["names"]))
        return _named(loadings(source, key=key))
    if isinstance(source, pd.DataFrame):
        return _named(source)
    decoder, is_consensus = source, False
    if hasattr(source, "get_decoder"):
        decoder = source.get_decoder(rotated=source.rotation is not None)
        is_consensus = source.rotation is not None and source.rotation.method == CONSENSUS
    if isinstance(decoder, LinearDecoder):
        signs = np.ones(len(decoder.factors), dtype=np.int64) if is_consensus else decoder.signs()
        canonical = decoder.reordered(np.arange(len(decoder.factors)), signs).centered()
        return _named(pd.DataFrame(canonical.weight_gk, index=decoder.genes, columns=decoder.factors))
    if hasattr(source, "get_loadings"):
        return _named(source.get_loadings())
    if isinstance(getattr(source, "loadings", None), pd.DataFrame):
        return _named(source.loadings)
    msg = f"Factors come from a model, a LinearDecoder, an AnnData or a DataFrame (genes x factors); got {type(source).__name__}."
    raise TypeError(msg)


def _gene_scores(source: Any, key: str) -> pd.DataFrame:
    """Slopes of genes with the names of genes and factors."""
    if isinstance(source, AnnData):
        is_ours = is_programs(source.uns.get(key))
        return _named(programs(source, key=key) if is_ours else gene_scores(source, kind="regression", key=key))
    table = source if isinstance(source, pd.DataFrame) else getattr(source, "scores", None)
    if isinstance(table, pd.DataFrame):
        return _named(table)
    msg = (
        "Gene scores come from an AnnData with an export or programs, from `Programs` or from a DataFrame (genes x factors); got "
        f"{type(source).__name__}. Export a model first."
    )
    raise TypeError(msg)


def _scores(source: Any, key: str) -> pd.DataFrame:
    """Latents with the names of cells and factors."""
    if isinstance(source, AnnData):
        info = source.uns.get(key, {})
        keys = export_keys(key)
        if not isinstance(info, Mapping) or keys.latent not in source.obsm or "names" not in info:
            msg = f"`adata` has no export {key!r} with latents of cells; `LDVAE.export_to_anndata` writes one."
            raise KeyError(msg)
        table = pd.DataFrame(np.asarray(source.obsm[keys.latent]), index=source.obs_names)
        return _named(table, strings(info["names"]))
    if isinstance(source, pd.DataFrame):
        return _named(source)
    if getattr(source, "adata", None) is not None and hasattr(source, "get_latent_representation"):
        latent_nk = np.asarray(source.get_latent_representation(), dtype=np.float64)
        rotation = getattr(source, "rotation", None)
        if rotation is not None:
            latent_nk = latent_nk @ rotation.matrix_kk
        names = getattr(source, "factor_names", [f"Z_{k}" for k in range(latent_nk.shape[1])])
        return _named(pd.DataFrame(latent_nk, index=source.adata.obs_names), names)
    msg = (
        f"Scores come from a model with data, an AnnData or a DataFrame (cells x factors); got {type(source).__name__}."
    )
    raise TypeError(msg)


def _named(table: pd.DataFrame, factors: Any = None) -> pd.DataFrame:
    """The table with names as strings."""
    columns = [str(name) for name in (table.columns if factors is None else factors)]
    return table.set_axis(columns, axis=1).set_axis(table.index.astype(str), axis=0)
