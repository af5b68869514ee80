"""The backend ``"torch"``: gamma functions of non-zero counts only, with gradients by hand, on any device."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput

from ldvae_ext.backends.base import Backend
from ldvae_ext.backends.counts import Counts, check_genes, csr_tensor
from ldvae_ext.backends.decoder_inputs import DecoderInputs, log_theta
from ldvae_ext.backends.layer_by_layer import loss_by_layers
from ldvae_ext.backends.layers import is_plain, replaced
from ldvae_ext.backends.likelihood import negative_log_likelihood
from ldvae_ext.backends.softmax_likelihood import softmax_negative_log_likelihood

# Methods that a minibatch passes in scvi-tools; where a subclass or a user has replaced one, its own way is taken.
_METHODS = (
    "forward",
    "_get_inference_input",
    "inference",
    "_regular_inference",
    "_get_generative_input",
    "decoder_inputs",
    "generative",
    "loss",
)


def obstacle_to_formulas(module: Any, device: str) -> str | None:
    """Reason why the likelihoods of this package do not hold for a network; None if they do.

    Parameters
    ----------
    module, device
        As in :meth:`Backend.obstacle`.
    """
    if module.gene_likelihood == "normal":
        return "`gene_likelihood='normal'` has no gamma functions, and is only computed by scvi-tools"
    if device not in ("cpu", "cuda"):
        return "there are sparse tensors on a CPU and under CUDA only"
    return replaced(module, _METHODS)


class TorchBackend(Backend):
    """Layer by layer, with likelihoods that evaluate gamma functions on non-zero counts and have gradients by hand."""

    name: ClassVar[str] = "torch"

    def obstacle(self, module: Any, device: str) -> str | None:
        """See :meth:`Backend.obstacle`.

        Parameters
        ----------
        module, device
            As there.
        """
        return obstacle_to_formulas(module, device)

    def loss(self, module: Any, tensors: dict[str, torch.Tensor], kl_weight: Any) -> LossOutput:
        """See :meth:`Backend.loss`.

        Parameters
        ----------
        module, tensors, kl_weight
            As there.
        """
        x_ng = tensors[REGISTRY_KEYS.X_KEY]
        if x_ng.layout is torch.strided and x_ng.device.type == "cpu" and x_ng.dtype is torch.float32:
            # Loaders in other processes give dense counts, whose sums are rounded differently.
            check_genes(x_ng, module.n_input)
            tensors = {**tensors, REGISTRY_KEYS.X_KEY: _sparse(x_ng)}
        return loss_by_layers(module, tensors, kl_weight, _negative_log_likelihood)


def _sparse(x_ng: torch.Tensor) -> torch.Tensor:
    at_n, at_g = torch.nonzero(x_ng, as_tuple=True)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(at_n.numpy(), minlength=len(x_ng)))])
    return csr_tensor(indptr, at_g.numpy(), x_ng[at_n, at_g].numpy(), x_ng.shape)


def _negative_log_likelihood(module: Any, inputs: DecoderInputs, counts: Counts) -> torch.Tensor:
    decoder, likelihood = module.decoder, module.gene_likelihood
    values, categories, log_library, batch_index, labels = inputs
    has_theta = likelihood != "poisson"
    is_shared = not has_theta or module.dispersion == "gene"
    if is_shared and is_plain(decoder, module.decoder_cls) and not decoder.softplus:
        logits = decoder.factor_regressor(values, *categories)
        dropout = decoder.px_dropout_decoder(values, *categories) if likelihood == "zinb" else None
        theta = torch.exp(module.px_r) if has_theta else None
        return softmax_negative_log_likelihood(likelihood, counts, logits, log_library, theta, dropout)
    _, log_theta_ng, rate, dropout = decoder(module.dispersion, values, log_library, *categories)
    if has_theta and log_theta_ng is None:
        log_theta_ng = log_theta(module, batch_index, labels)
    theta = torch.exp(log_theta_ng) if has_theta else None
    return negative_log_likelihood(likelihood, counts, rate, theta, dropout)
