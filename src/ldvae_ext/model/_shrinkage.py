"""Loadings shrunk by their standard errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

from ldvae_ext._validate import cell_positions, check_positive_int, listed, warn
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.shrinkage import LoadingInformation, check_level, shrink
from ldvae_ext.model._axes import ENCODER, factor_decoder, factor_stream
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import given_cells

# Share of the largest loading below which all shrunken loadings of a factor count as 0.
_EMPTY = 1e-3


@dataclass(frozen=True, eq=False, repr=False)
class ShrunkenLoadings:
    """Loadings as posterior means under a prior that was estimated from all genes; from :meth:`LDVAE.get_shrunken_loadings`.

    Tables are genes x factors, in log-rate per unit of latent. Under softmax, which ignores a constant added to the
    loadings of a factor, they are relative to the mean loading weighed by ``1 / errors**2``.

    Examples
    --------
    >>> shrunken = model.get_shrunken_loadings()
    >>> is_certain = shrunken.false_sign_rate["Z_0"] < 0.05
    >>> shrunken.mean["Z_0"][is_certain].sort_values().index[-1] in adata.var_names
    True
    """

    loadings: pd.DataFrame
    """Loadings of the decoder."""
    errors: pd.DataFrame
    """Their standard errors."""
    mean: pd.DataFrame
    """Posterior means: shrunken loadings."""
    sd: pd.DataFrame
    """Posterior standard deviations."""
    lower: pd.DataFrame
    """Lower ends of the intervals."""
    upper: pd.DataFrame
    """Upper ends of the intervals."""
    false_sign_rate: pd.DataFrame
    """Posterior probability that a loading is 0 or has the other sign, in [0, 1]."""
    decoder: LinearDecoder
    """The decoder with the shrunken loadings, on the same axes."""
    level: float
    """Posterior probability of the intervals."""

    def __repr__(self) -> str:
        certain = int((self.false_sign_rate < 1 - self.level).to_numpy().sum())
        return (
            f"ShrunkenLoadings of {self.mean.shape[0]} genes and {self.mean.shape[1]} factors; {certain} of {self.mean.size} have "
            f"a sign with a local false sign rate below {1 - self.level:.2g}"
        )


def shrunken_loadings(
    model: LDVAEBase,
    adata: AnnData | None,
    indices: Any,
    level: float,
    max_cells: int,
    seed: int | None,
    batch_size: int | None,
) -> ShrunkenLoadings:
    """See :meth:`ldvae_ext.model.LDVAE.get_shrunken_loadings`."""
    check_level(level)
    check_positive_int("max_cells", max_cells)
    decoder = factor_decoder(model)
    error_gk = loading_errors(model, decoder, adata, indices, max_cells=max_cells, seed=seed, batch_size=batch_size)
    weight_gk = decoder.weight_gk
    if decoder.link == "softmax":
        weight_gk = weight_gk - np.array(
            [np.average(w_g, weights=e_g**-2) for w_g, e_g in zip(weight_gk.T, error_gk.T, strict=True)]
        )
    found = shrink(weight_gk, error_gk, level)
    is_empty = np.abs(found.mean_gk).max(axis=0) < _EMPTY * np.abs(weight_gk).max(axis=0)
    if is_empty.any():
        warn(
            f"All loadings of {listed(decoder.factors[is_empty])} are shrunk to 0: they are no larger than their standard errors. "
            "The model may have been trained too briefly, or the factors may be noise."
        )

    def table(value_gk: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(value_gk, index=decoder.genes, columns=decoder.factors)

    return ShrunkenLoadings(
        loadings=table(weight_gk),
        errors=table(error_gk),
        mean=table(found.mean_gk),
        sd=table(found.sd_gk),
        lower=table(found.lower_gk),
        upper=table(found.upper_gk),
        false_sign_rate=table(found.false_sign_gk),
        decoder=decoder._with(weight_gk=found.mean_gk, raw=None, raw_dropout=None),
        level=level,
    )


def loading_errors(
    model: LDVAEBase,
    decoder: LinearDecoder,
    adata: AnnData | None = None,
    indices: Any = None,
    *,
    max_cells: int = 2000,
    seed: int | None = None,
    batch_size: int | None = None,
    use_posterior: str = ENCODER,
) -> np.ndarray:
    """Standard errors of the loadings on the axes in force, shape (genes, factors); see :meth:`LDVAE.get_shrunken_loadings`."""
    if decoder.latent_distribution == "ln":
        msg = "Loadings of a logistic-normal latent have no standard errors: its latents sum to 1 in each cell."
        raise ValueError(msg)
    positions = cell_positions(indices, given_cells(model, adata).n_obs)
    if not len(positions):
        msg = "There are no cells to compute standard errors from."
        raise ValueError(msg)
    some = positions
    if len(some) > max_cells:
        seed = (scvi.settings.seed or 0) if seed is None else seed
        some = np.sort(np.random.default_rng(seed).choice(positions, max_cells, replace=False))
    information = LoadingInformation(decoder)
    with factor_stream(model, adata, some, batch_size, use_posterior=use_posterior) as cells:
        for chunk in cells.chunks:
            information.add(chunk)
    return information.errors(len(positions))
