"""Rotations of the latents to factors that are easier to read, or in the order in which they explain the counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS

from ldvae_ext._validate import cell_positions, check_one_of
from ldvae_ext.backends.counts import Counts
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core._views import check_rotatable
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.fisher import fisher_rotation, fisher_varimax, logit_information
from ldvae_ext.core.rotation import (
    METHODS,
    Rotation,
    independent_components,
    loading_promax,
    loading_varimax,
    score_varimax,
    with_signs,
)
from ldvae_ext.model._axes import network_decoder, network_posterior, put_in_force
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._bridge import encode_cells
from ldvae_ext.model._cells import minibatches, readable_cells
from ldvae_ext.model._registry import covariates_of
from ldvae_ext.module._truncation import polish_rotation, refine_rotation

# More cells would not change the axes that scores are far from 0 along.
_MANY_CELLS = 20_000
# Cells that a rotation is fitted to, fewer where they have many genes: dense counts are held in memory, 256 MB at most.
_MAX_CELLS, _MAX_COUNTS, _MIN_CELLS = 4096, 2**26, 256


def rotate(
    model: LDVAEBase, method: str, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None
) -> None:
    """See :meth:`ldvae_ext.model.LDVAE.rotate`."""
    if isinstance(method, AnnData):
        msg = "`method` must be the name of a rotation; got an AnnData, which `adata=` takes."
        raise TypeError(msg)
    check_one_of("method", method, (*METHODS, "none"))
    if method == "none":
        model.rotation_ = None
        return
    check_rotatable(model.module.latent_distribution)
    if method == "deviance":
        model._check_has_counts("rotate('deviance')")
        matrix_kk = deviance_rotation(model, adata, indices, batch_size)
        put_in_force(model, Rotation(matrix_kk=matrix_kk, method=method))
        return
    decoder, weight_g = network_decoder(model), np.zeros(len(model.get_var_names()))

    def weigh(chunk: EncodedCells) -> None:
        nonlocal weight_g
        weight_g = weight_g + logit_information(decoder, chunk).sum(axis=0)

    seen = weigh if method == "fisher-varimax" else None
    mean_nk, variance_nk = network_posterior(model, adata, indices, batch_size, seen)
    some_nk = mean_nk[:: -(-len(mean_nk) // _MANY_CELLS)]
    matrix_kk = {
        "varimax": lambda: loading_varimax(decoder),
        "promax": lambda: loading_promax(decoder),
        "fisher-varimax": lambda: fisher_varimax(decoder, weight_g),
        "score-varimax": lambda: score_varimax(some_nk),
        "ica": lambda: independent_components(some_nk),
    }[method]()
    rotation = Rotation(matrix_kk=matrix_kk, method=method)
    kl_k = kl_per_dimension(mean_nk @ matrix_kk, rotation.variance(variance_nk)).mean(axis=0)
    put_in_force(model, rotation.arranged(np.argsort(-kl_k, kind="stable"), 1))


def deviance_rotation(
    model: LDVAEBase, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None
) -> np.ndarray:
    """Orthogonal axes of a model's latent space under which the first factors explain the counts best.

    Starts at :func:`ldvae_ext.core.fisher.fisher_rotation` and is refined for the likelihood of random truncations, first
    along their gradient (:func:`ldvae_ext.module._truncation.refine_rotation`), then plane by plane
    (:func:`ldvae_ext.module._truncation.polish_rotation`). The model stays as it is, and so does the caller's random state;
    the same cells give the same rotation.

    Parameters
    ----------
    model
        A trained model with a normal latent.
    adata, indices
        Cells with counts that determine the rotation; all of the model's own if None. Of more than 4,096 cells a fixed random
        sample is used.
    batch_size
        Cells that are encoded at once.

    Returns
    -------
    Shape (latents, factors), float64: ``z @ R`` are the factors, in order.

    Raises
    ------
    ValueError
        If the latent is logistic-normal, or there are no counts.
    """
    check_rotatable(model.module.latent_distribution)
    model._check_has_counts("rotate('deviance')")
    decoder = network_decoder(model)
    if len(decoder.factors) == 1:
        return with_signs(decoder, np.eye(1))
    means, weight_g, parts = [], np.zeros(len(decoder.genes)), []
    with readable_cells(model, adata) as cells:
        rows = cell_positions(indices, cells.n_obs)
        n_most = min(_MAX_CELLS, max(_MIN_CELLS, _MAX_COUNTS // len(decoder.genes)))
        if len(rows) > n_most:
            rows = np.sort(np.random.default_rng(0).choice(rows, n_most, replace=False))
        if not len(rows):
            msg = "There are no cells to fit the rotation to."
            raise ValueError(msg)
        for tensors in minibatches(model, cells, rows, batch_size):
            (encoded,) = encode_cells(model.module, [tensors], covariates_of(model.registry))
            means.append(encoded.mean)
            weight_g += logit_information(decoder, encoded).sum(axis=0)
            dense = {REGISTRY_KEYS.X_KEY: Counts.of(tensors[REGISTRY_KEYS.X_KEY]).dense()}
            parts.append({name: value for name, value in (tensors | dense).items() if isinstance(value, torch.Tensor)})
    start = fisher_rotation(decoder, np.concatenate(means), weight_g)
    together = {name: torch.cat([tensors[name] for tensors in parts]) for name in parts[0]}
    refined = refine_rotation(model.module, together, start)
    return with_signs(decoder, polish_rotation(model.module, together, refined))
