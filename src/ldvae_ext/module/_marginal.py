"""Marginal likelihood by importance sampling, with densities of the Gaussian behind the latent."""

from __future__ import annotations

import math
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import Normal

from ldvae_ext._scvi import MODULE_KEYS


def log_marginal(
    module: Any, tensors: dict[str, torch.Tensor], n_mc_samples: int, n_mc_samples_per_pass: int
) -> torch.Tensor:
    """See :meth:`ldvae_ext.module.LDVAEModule.marginal_ll`."""
    encoded = module.inference(**module._get_inference_input(tensors, full_forward_pass=True))
    inputs = module._get_generative_input(tensors, encoded)
    qz, ql = encoded[MODULE_KEYS.QZ_KEY], encoded[MODULE_KEYS.QL_KEY]
    log_weights = []
    for start in range(0, n_mc_samples, n_mc_samples_per_pass):
        n_samples = min(n_mc_samples_per_pass, n_mc_samples - start)
        u = qz.sample((n_samples,))
        inputs[MODULE_KEYS.Z_KEY] = module.z_encoder.z_transformation(u)
        library = encoded[MODULE_KEYS.LIBRARY_KEY].expand(n_samples, -1, -1) if ql is None else ql.sample((n_samples,))
        inputs[MODULE_KEYS.LIBRARY_KEY] = library
        decoded = module.generative(**inputs)
        log_weight = decoded[MODULE_KEYS.PX_KEY].log_prob(tensors[REGISTRY_KEYS.X_KEY]).sum(dim=-1)
        log_weight += (Normal(0.0, 1.0).log_prob(u) - qz.log_prob(u)).sum(dim=-1)
        if ql is not None:
            log_weight += (decoded[MODULE_KEYS.PL_KEY].log_prob(library) - ql.log_prob(library)).sum(dim=-1)
        log_weights.append(log_weight)
    return torch.logsumexp(torch.cat(log_weights), dim=0) - math.log(n_mc_samples)
