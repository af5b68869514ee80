"""The one bridge from torch to numpy: the network's decoder as a LinearDecoder, minibatches as posteriors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.nn import FCLayers

from ldvae_ext.core import BatchNorm, LinearDecoder, RawLinear
from ldvae_ext.module import LDVAEModule


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64)


def raw_linear(layers: FCLayers) -> RawLinear:
    """The parts of a one-layer linear head; what it is made of is read from the layers, not from a flag."""
    linear, batch_norm = layers.fc_layers[0][0], layers.fc_layers[0][1]
    return RawLinear(
        weight=_array(linear.weight),
        bias=None if linear.bias is None else _array(linear.bias),
        batch_norm=None
        if batch_norm is None
        else BatchNorm(
            running_mean=_array(batch_norm.running_mean),
            running_var=_array(batch_norm.running_var),
            gamma=_array(batch_norm.weight),
            beta=_array(batch_norm.bias),
            eps=batch_norm.eps,
        ),
    )


def linear_decoder(module: LDVAEModule, genes: np.ndarray, batches: np.ndarray, factors: list[str]) -> LinearDecoder:
    """The decoder of a network, folded in float64."""
    n_latent = module.n_latent
    parts: dict[str, Any] = {}
    raw = raw_linear(module.decoder.factor_regressor)
    parts["weight_gk"], parts["intercept_bg"] = raw.fold(n_latent)
    if module.gene_likelihood == "zinb":
        parts["raw_dropout"] = raw_linear(module.decoder.px_dropout_decoder)
        parts["dropout_weight_gk"], parts["dropout_intercept_bg"] = parts["raw_dropout"].fold(n_latent)
    if module.gene_likelihood != "poisson":
        parts["theta_bg"] = np.exp(_array(module.px_r)).reshape(len(genes), -1).T
    return LinearDecoder(
        genes=genes,
        batches=batches,
        factors=np.array(factors),
        likelihood=module.gene_likelihood,
        dispersion="gene" if module.gene_likelihood == "poisson" else module.dispersion,
        latent_distribution=module.latent_distribution,
        raw=raw,
        **parts,
    )


class EncodedCells(NamedTuple):
    """The posterior of some cells, in numpy."""

    mean: np.ndarray
    """Posterior means (of u under ``"ln"``), cells x latents, float32."""
    variance: np.ndarray
    """Posterior variances, cells x latents, float32."""
    library: np.ndarray
    """Library sizes in counts, shape (cells,), float64."""
    batch: np.ndarray
    """Batch codes, shape (cells,), int64."""
    counts: np.ndarray
    """Counts, cells x genes, float32, dense."""


def encode(module: LDVAEModule, minibatches: Iterable[dict[str, torch.Tensor]]) -> Iterator[EncodedCells]:
    """Posteriors of the cells, minibatch by minibatch."""
    for tensors in minibatches:
        posterior = module.posterior(tensors)
        yield EncodedCells(
            mean=posterior.mean.cpu().numpy(),
            variance=posterior.variance.cpu().numpy(),
            library=np.exp(_array(posterior.log_library)),
            batch=tensors[REGISTRY_KEYS.BATCH_KEY].cpu().numpy().ravel().astype(np.int64),
            counts=tensors[REGISTRY_KEYS.X_KEY].cpu().numpy(),
        )
