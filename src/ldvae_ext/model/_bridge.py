"""The one bridge from torch to numpy: the network's decoder as a LinearDecoder, minibatches as posteriors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.nn import FCLayers

from ldvae_ext.backends.batch_norm import batch_norm_of
from ldvae_ext.backends.choose import choose_for_reading
from ldvae_ext.backends.counts import Counts
from ldvae_ext.core import Covariate, LinearDecoder, RawLinear
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.rotation import Rotation
from ldvae_ext.module import LDVAEModule


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64)


def raw_linear(layers: FCLayers, batch_embedding: np.ndarray | None = None) -> RawLinear:
    """Parts of a one-layer linear head, read from its layers."""
    linear, batch_norm = layers.fc_layers[0][0], layers.fc_layers[0][1]
    return RawLinear(
        weight=_array(linear.weight),
        bias=None if linear.bias is None else _array(linear.bias),
        batch_norm=None if batch_norm is None else batch_norm_of(batch_norm),
        batch_embedding=batch_embedding,
    )


def linear_decoder(
    module: LDVAEModule,
    genes: np.ndarray,
    batches: np.ndarray,
    factors: list[str],
    covariates: Sequence[Covariate] = (),
    labels: np.ndarray | None = None,
) -> LinearDecoder:
    """The decoder of a network, folded in float64."""
    embedding = None
    if module.batch_representation == "embedding":
        embedding = _array(module.get_embedding(REGISTRY_KEYS.BATCH_KEY).weight)
    raw: dict[str, RawLinear] = {"": raw_linear(module.decoder.factor_regressor, embedding)}
    parts: dict[str, Any] = {}
    if module.gene_likelihood == "zinb":
        raw["dropout_"] = parts["raw_dropout"] = raw_linear(module.decoder.px_dropout_decoder, embedding)
    dispersion = "gene" if module.gene_likelihood == "poisson" else module.dispersion
    if dispersion == "gene-cell":
        raw["dispersion_"] = raw_linear(module.decoder.px_r_decoder, embedding)
    elif module.gene_likelihood != "poisson":
        parts["theta_bg"] = np.exp(_array(module.px_r)).reshape(len(genes), -1).T
    for head, layer in raw.items():
        weight_gk, intercept_bg, covariate_cg = layer.fold(module.n_latent, covariates)
        parts[f"{head}weight_gk"], parts[f"{head}intercept_bg"] = weight_gk, intercept_bg
        if covariates:
            parts[f"{head}covariate_cg"] = covariate_cg
    return LinearDecoder(
        genes=genes,
        batches=batches,
        factors=np.array(factors),
        likelihood=module.gene_likelihood,
        dispersion=dispersion,
        latent_distribution=module.latent_distribution,
        link="softplus" if module.use_size_factor_key else "softmax",
        covariates=tuple(covariates),
        labels=labels if dispersion == "gene-label" else None,
        raw=raw[""],
        **parts,
    )


def _counts(tensor: torch.Tensor) -> np.ndarray | sparse.csr_array:
    return tensor.numpy() if tensor.layout is torch.strided else Counts.of(tensor).matrix


def _codes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy().ravel().astype(np.int64)


def _codes_or_zero(tensors: dict[str, Any], key: str, n_levels: int, n_cells: int) -> np.ndarray:
    """Codes of cells; zeros if a data module leaves them out because there is only one level."""
    if isinstance(tensors.get(key), torch.Tensor):
        return _codes(tensors[key])
    if n_levels > 1:
        msg = f"A minibatch has no {key!r} codes; the model knows {n_levels} of them."
        raise ValueError(msg)
    return np.zeros(n_cells, dtype=np.int64)


def _covariate_values(
    tensors: dict[str, torch.Tensor], covariates: Sequence[Covariate]
) -> dict[str, np.ndarray] | None:
    """Values of continuous covariates and levels, by name, of categorical ones."""
    values: dict[str, np.ndarray] = {}
    n_continuous = sum(c.levels is None for c in covariates)
    for i, covariate in enumerate(covariates):
        if covariate.levels is None:
            values[covariate.name] = tensors[REGISTRY_KEYS.CONT_COVS_KEY][:, i].cpu().numpy()
        else:
            codes = tensors[REGISTRY_KEYS.CAT_COVS_KEY][:, i - n_continuous]
            values[covariate.name] = covariate.levels[_codes(codes)]
    return values or None


def encode_cells(
    module: LDVAEModule,
    minibatches: Iterable[dict[str, torch.Tensor]],
    covariates: Sequence[Covariate] = (),
    rotation: Rotation | None = None,
) -> Iterator[EncodedCells]:
    """Posteriors of the cells, minibatch by minibatch."""
    n_labels = module.n_labels if module.dispersion == "gene-label" else 1
    backend = choose_for_reading(module)
    for tensors in minibatches:
        posterior = backend.posterior(module, tensors)
        n_cells = len(posterior.mean)
        cells = EncodedCells(
            mean=posterior.mean.cpu().numpy(),
            variance=posterior.variance.cpu().numpy(),
            library=np.exp(_array(posterior.log_library)),
            batch=_codes_or_zero(tensors, REGISTRY_KEYS.BATCH_KEY, module.n_batch, n_cells),
            label=_codes_or_zero(tensors, REGISTRY_KEYS.LABELS_KEY, n_labels, n_cells),
            covariates=_covariate_values(tensors, covariates),
            counts=_counts(tensors[REGISTRY_KEYS.X_KEY].cpu()),
        )
        yield cells if rotation is None else rotation.cells(cells)
