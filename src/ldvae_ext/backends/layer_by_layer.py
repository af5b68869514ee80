"""The loss of a minibatch layer by layer: scvi-tools' own formulas, with another way to the likelihood of the counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import Normal
from scvi.module.base import LossOutput

from ldvae_ext._scvi import MODULE_KEYS
from ldvae_ext.backends.counts import Counts, check_genes, check_support
from ldvae_ext.backends.decoder_inputs import DecoderInputs
from ldvae_ext.backends.distributions import KnownLikelihood, Prior
from ldvae_ext.backends.inference import inference_outputs

Likelihood = Callable[[Any, DecoderInputs, Counts], torch.Tensor]
"""Negative log-likelihood of each cell, from the network, the inputs of its decoder and the counts."""


def loss_by_layers(
    module: Any, tensors: dict[str, torch.Tensor], kl_weight: Any, negative_log_likelihood: Likelihood
) -> LossOutput:
    """Loss of a minibatch by the network's ``inference`` and ``loss``, with a given likelihood instead of ``generative``.

    Parameters
    ----------
    module
        The network.
    tensors
        The minibatch; counts may be a CSR tensor.
    kl_weight
        Weight of the latents' KL divergence: a number, or one for each cell, which may need a gradient.
    negative_log_likelihood
        The likelihood.
    """
    x_ng = tensors[REGISTRY_KEYS.X_KEY]
    check_genes(x_ng, module.n_input)
    counts = Counts.of(x_ng)
    with module.normalising(len(x_ng)):
        outputs = inference_outputs(module, tensors)
        inputs = module.decoder_inputs(**module._get_generative_input(tensors, outputs))
        check_support(module.gene_likelihood, counts)
        loss_n = negative_log_likelihood(module, inputs, counts)
    generated = {
        MODULE_KEYS.PX_KEY: KnownLikelihood(loss_n),
        **module.priors(inputs, outputs[MODULE_KEYS.Z_KEY], Prior),
    }
    losses = module.loss(tensors, outputs, generated, kl_weight=kl_weight)
    posterior = outputs[MODULE_KEYS.QZ_KEY]
    check_finite(losses, posterior.loc, posterior.scale)
    return losses


def check_finite(losses: LossOutput, mean_nk: Any, scale_nk: Any) -> None:
    """Raise scvi-tools' error if the loss is not finite because the posteriors are not.

    scvi-tools checks all posteriors at each step.

    Parameters
    ----------
    losses
        The loss.
    mean_nk, scale_nk
        Means and scales of the posteriors, shape (cells, latents).
    """
    if not torch.isfinite(losses.loss):
        Normal(torch.as_tensor(mean_nk), torch.as_tensor(scale_nk), validate_args=True)
