"""What one writes with scvi-tools alone today."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scvi.distributions import NegativeBinomial


def ablation(model: Any, *, in_one_pass: bool, batch_size: int = 128) -> np.ndarray:
    """Decode with each latent at 0 in turn, and take the likelihood of the counts: cells x latents, in nats.

    Either all latents at each minibatch, or one pass over all cells for each latent and one for the whole, encoding them anew.
    """
    everything = [None, *range(model.module.n_latent)]

    @torch.inference_mode()
    def losses(latents: list[int | None]) -> np.ndarray:
        out = []
        for tensors in model._make_data_loader(model.adata, batch_size=batch_size):
            inference = model.module.inference(**model.module._get_inference_input(tensors))
            mean = inference["qz"].loc
            library = inference["library"] if inference["ql"] is None else inference["ql"].loc
            of_latents = []
            for latent in latents:
                z = mean.clone()
                if latent is not None:
                    z[:, latent] = 0
                px = model.module.generative(z=z, library=library, batch_index=tensors["batch"])["px"]
                px = NegativeBinomial(mu=px.mu, theta=px.theta)
                of_latents.append(-px.log_prob(tensors["X"]).sum(-1))
            out.append(torch.stack(of_latents, dim=1).numpy())
        return np.concatenate(out)

    was_training = model.module.training
    model.module.eval()
    try:
        passes = [everything] if in_one_pass else [[latent] for latent in everything]
        nll = np.concatenate([losses(latents) for latents in passes], axis=1)
    finally:
        model.module.train(was_training)
    return nll[:, 1:] - nll[:, :1]


def population_means(model: Any, groupby: str) -> Any:
    """Decode all cells and average each group."""
    expression = model.get_normalized_expression()
    return expression.groupby(model.adata.obs[groupby], observed=True).mean()


def latent_kl(model: Any) -> np.ndarray:
    """KL of each cell's posterior from the prior, cells x latents, in nats."""
    mean, variance = model.get_latent_representation(return_dist=True)
    return (mean**2 + variance - 1 - np.log(variance)) / 2


def export(model: Any, adata: AnnData) -> None:
    """Latents and loadings, as they are, into an AnnData."""
    adata.obsm["X_by_hand"] = model.get_latent_representation()
    adata.varm["by_hand"] = model.get_loadings().to_numpy()
