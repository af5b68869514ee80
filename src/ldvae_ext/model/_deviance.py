"""The rotation that puts factors in the order in which they explain the counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from anndata import AnnData

from ldvae_ext._validate import cell_positions
from ldvae_ext.core._views import check_rotatable
from ldvae_ext.core.fisher import fisher_rotation, logit_information
from ldvae_ext.core.rotation import with_signs
from ldvae_ext.model._bridge import encode_cells
from ldvae_ext.model._cells import readable_cells
from ldvae_ext.model._decoding import DecodingMixin
from ldvae_ext.model._registry import covariates_of
from ldvae_ext.module._truncation import polish_rotation, refine_rotation

# Cells that a rotation is fitted to, fewer where they have many genes: dense counts are held in memory, 256 MB at most.
_MAX_CELLS, _MAX_COUNTS, _MIN_CELLS = 4096, 2**26, 256


def deviance_rotation(
    model: DecodingMixin, adata: AnnData | None = None, indices: Any = None, batch_size: int | None = None
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
        Cells with counts that decide; all of the model's own if None. Of more than 4,096, as many are drawn, always the same.
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
    decoder = model.get_decoder()
    if len(decoder.factors) == 1:
        return with_signs(decoder, np.eye(1))
    means, weight_g, minibatches = [], np.zeros(len(decoder.genes)), []
    with readable_cells(model, adata) as cells:
        rows = cell_positions(indices, cells.n_obs)
        n_most = min(_MAX_CELLS, max(_MIN_CELLS, _MAX_COUNTS // len(decoder.genes)))
        if len(rows) > n_most:
            rows = np.sort(np.random.default_rng(0).choice(rows, n_most, replace=False))
        if not len(rows):
            msg = "There are no cells to fit the rotation to."
            raise ValueError(msg)
        # A generator of its own, since a torch data loader draws a seed from the global one even if it does not shuffle.
        loader = model._make_data_loader(cells, indices=rows, batch_size=batch_size, generator=torch.Generator())
        for tensors in loader:
            (encoded,) = encode_cells(model.module, [tensors], covariates_of(model.registry))
            means.append(encoded.mean)
            weight_g += logit_information(decoder, encoded)
            minibatches.append({name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)})
    start = fisher_rotation(decoder, np.concatenate(means), weight_g)
    together = {name: torch.cat([tensors[name] for tensors in minibatches]) for name in minibatches[0]}
    refined = refine_rotation(model.module, together, start)
    return with_signs(decoder, polish_rotation(model.module, together, refined))
