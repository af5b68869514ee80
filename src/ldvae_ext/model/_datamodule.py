"""Settings of a model from a Lightning data module instead of an AnnData."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from ldvae_ext.model._collection import sparse_minibatches
from ldvae_ext.model._counts import prior_of_totals


class Start(NamedTuple):
    """Statistics of all cells that a data module trains or validates on."""

    log_means: np.ndarray
    """Mean of the log library of each batch, shape (1, batches)."""
    log_variances: np.ndarray
    """Variance of the same."""
    mean_expression: np.ndarray
    """Share of each gene in all counts (mean counts per size factor where there are any), shape (genes,), float32."""


def start_of(datamodule: Any, n_batch: int, *, has_size_factors: bool) -> Start:
    """Read the cells of a data module once.

    Parameters
    ----------
    datamodule
        A Lightning data module with minibatches of scvi-tools.
    n_batch
        Number of batches.
    has_size_factors
        True if the model takes the size factors of minibatches; some data modules make them of totals.
    """
    total_g: Any = 0.5
    n_cells = 0
    totals, codes = [], []
    for tensors in _minibatches(datamodule):
        counts = tensors[REGISTRY_KEYS.X_KEY].to_dense().double()
        batch = tensors.get(REGISTRY_KEYS.BATCH_KEY)
        codes.append(np.zeros(len(counts)) if batch is None else batch.cpu().numpy().ravel())
        totals.append(counts.sum(dim=1).cpu().numpy())
        size = tensors.get(REGISTRY_KEYS.SIZE_FACTOR_KEY) if has_size_factors else None
        total_g = total_g + (counts if size is None else counts / size).sum(dim=0).cpu().numpy()
        n_cells += len(counts)
    total_n, code_n = np.concatenate(totals), np.concatenate(codes)
    priors = np.array([prior_of_totals(total_n[code_n == code]) for code in range(n_batch)])
    expression = total_g / (n_cells if has_size_factors else np.sum(total_g))
    return Start(priors[None, :, 0], priors[None, :, 1], np.asarray(expression, dtype=np.float32))


def _minibatches(datamodule: Any) -> Iterator[dict[str, torch.Tensor]]:
    """All cells that are trained or validated on, without moving the random state of the training to come."""
    random_state = np.random.get_state()  # noqa: NPY002 - data loaders may draw from it
    try:
        with torch.random.fork_rng(), sparse_minibatches(datamodule):
            datamodule.setup("fit")
            for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
                for minibatch in loader if loader is not None else ():
                    yield datamodule.on_before_batch_transfer(minibatch, 0)
    finally:
        np.random.set_state(random_state)  # noqa: NPY002
