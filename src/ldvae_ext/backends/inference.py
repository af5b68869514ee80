"""From counts to the posteriors of cells: the network's inference, on sparse counts as well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from scvi import REGISTRY_KEYS

from ldvae_ext._scvi import MODULE_KEYS
from ldvae_ext.backends.counts import Counts, check_genes
from ldvae_ext.backends.elementwise import log1p
from ldvae_ext.backends.layers import reads_sparse_counts
from ldvae_ext.backends.sparse_encoder import encode_counts


class CellPosterior(NamedTuple):
    """Posteriors of the cells of a minibatch."""

    mean: torch.Tensor
    """Posterior means (of u under ``"ln"``), shape (cells, latents)."""
    variance: torch.Tensor
    """Posterior variances, same shape."""
    log_library: torch.Tensor
    """Log of the library size: size factor, observed, or the posterior mean of the log library; shape (cells,)."""


def inference_outputs(module: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The network's ``inference``, with the same random draws; sparse counts are not made dense where it can be avoided.

    Parameters
    ----------
    module
        The network.
    tensors
        A minibatch; counts may be a CSR tensor.
    """
    x_ng = tensors[REGISTRY_KEYS.X_KEY]
    is_sparse = x_ng.layout is torch.sparse_csr
    if is_sparse and module.minified_data_type is None and module.device.type == "cpu" and reads_sparse_counts(module):
        return _sparse_inference(module, tensors)
    return module.inference(**module._get_inference_input(with_dense_counts(tensors)))


def with_dense_counts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The minibatch with counts as a dense tensor.

    Parameters
    ----------
    tensors
        A minibatch; counts may be a CSR tensor.
    """
    x_ng = tensors[REGISTRY_KEYS.X_KEY]
    return tensors if x_ng.layout is torch.strided else {**tensors, REGISTRY_KEYS.X_KEY: Counts.of(x_ng).dense()}


def seen_counts(module: Any, counts: Counts) -> Counts:
    """Counts as the encoders see them: log(1 + counts), unless the network takes them as they are.

    Parameters
    ----------
    module
        The network.
    counts
        The counts.
    """
    return replace(counts, values=log1p(counts.values)) if module.log_variational else counts


def _sparse_inference(module: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    check_genes(tensors[REGISTRY_KEYS.X_KEY], module.n_input)
    counts = Counts.of(tensors[REGISTRY_KEYS.X_KEY])
    seen, continuous, categories = seen_counts(module, counts), [], []
    if module.encode_covariates:
        continuous, categories = module.conditions(
            tensors[REGISTRY_KEYS.BATCH_KEY],
            tensors.get(REGISTRY_KEYS.CONT_COVS_KEY),
            tensors.get(REGISTRY_KEYS.CAT_COVS_KEY),
        )
    continuous_nc = torch.cat(continuous, dim=-1) if continuous else None
    qz, z = encode_counts(module.z_encoder, seen, continuous_nc, categories)
    if module.use_observed_lib_size:
        ql, library = None, torch.log(counts.totals()).unsqueeze(1)
    else:
        ql, library = encode_counts(module.l_encoder, seen, continuous_nc, categories)
    return {
        MODULE_KEYS.Z_KEY: z,
        MODULE_KEYS.QZ_KEY: qz,
        MODULE_KEYS.QL_KEY: ql,
        MODULE_KEYS.LIBRARY_KEY: library,
    }


@torch.inference_mode()
def posterior_by_layers(module: Any, tensors: dict[str, torch.Tensor]) -> CellPosterior:
    """Posterior of the cells of a minibatch by the network's layers in evaluation mode.

    Deterministic; torch's random state does not change.

    Parameters
    ----------
    module
        The network.
    tensors
        A minibatch, minified or not; counts may be a CSR tensor.
    """
    on_gpu = [module.device] if module.device.type == "cuda" else []
    # Inference also draws a sample, which would change the caller's random state.
    with module.evaluating(), torch.random.fork_rng(devices=on_gpu):
        outputs = inference_outputs(module, tensors)
    qz, ql = outputs[MODULE_KEYS.QZ_KEY], outputs[MODULE_KEYS.QL_KEY]
    if module.use_size_factor_key:
        log_library = torch.log(tensors[REGISTRY_KEYS.SIZE_FACTOR_KEY])
    else:
        log_library = outputs[MODULE_KEYS.LIBRARY_KEY] if ql is None else ql.loc
    return CellPosterior(qz.loc, qz.scale.square(), log_library.squeeze(-1))
