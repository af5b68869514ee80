"""Forward and backward pass of an encoder in the fused training step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scvi.nn import Encoder

from ldvae_ext.backends.counts import Counts
from ldvae_ext.backends.layers import transposed


class Draws(NamedTuple):
    """Random draws of an encoder for a minibatch."""

    kept_nh: np.ndarray
    """Factors of the dropout, 0 or ``1 / (1 - p)``."""
    draw_nk: np.ndarray
    """Standard normal draws."""


class NormalPrior(NamedTuple):
    """Normal prior of each cell, the same for all of its latents."""

    mean_n: np.ndarray
    scale_n: np.ndarray


class EncoderLayers:
    """The layers of an encoder with one hidden layer.

    Parameters
    ----------
    encoder
        The encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.linear, self.norm, _, _, self.dropout = encoder.encoder.fc_layers[0]
        self.least_variance = encoder.var_eps
        self._layers = self.linear, self.norm, encoder.mean_encoder, encoder.var_encoder
        self.parameters = self.current()
        """In the order of the gradients of :meth:`EncoderPass.backward`."""

    def current(self) -> list[torch.Tensor]:
        """The parameters that the layers have now."""
        return [value for layer in self._layers for value in (layer.weight, layer.bias)]

    def draws(self, n_cells: int) -> Draws:
        """The draws of torch.nn.Dropout and of Normal.rsample, in their order.

        Parameters
        ----------
        n_cells
            Number of cells.
        """
        kept = torch.ones(n_cells, len(self.linear.bias))
        if self.dropout is not None and self.dropout.training and self.dropout.p > 0:
            kept = kept.bernoulli_(1 - self.dropout.p).div_(1 - self.dropout.p)
        return Draws(kept.numpy(), torch.empty(n_cells, len(self.parameters[-1])).normal_().numpy())


class EncoderPass:
    """Forward and backward pass of an encoder on a minibatch.

    Parameters
    ----------
    layers
        Its layers.
    seen
        Counts as input of the encoder.
    covariates_nc
        Covariates that it takes beside the counts; None if there are none.
    prior
        Prior of the encoded variable.
    draws
        Random draws.
    n_kept_n
        Number of latents that each cell keeps.
    """

    def __init__(
        self,
        layers: EncoderLayers,
        seen: Counts,
        covariates_nc: np.ndarray | None,
        prior: NormalPrior,
        draws: Draws,
        n_kept_n: np.ndarray,
    ) -> None:
        from ldvae_ext.kernels import encoder as loops
        from ldvae_ext.kernels import sparse

        self._layers, self._inputs, self._draws = layers, (seen, covariates_nc), draws
        arrays = [value.detach().numpy() for value in layers.parameters[1:]]
        bias_h, gamma_h, beta_h, mean_weight_kh, mean_bias_k, variance_weight_kh, variance_bias_k = arrays
        n_cells, n_hidden = draws.kept_nh.shape
        weight_gh = transposed(layers.linear.weight)
        before_nh = np.empty((n_cells, n_hidden), np.float32)
        sparse.sparse_dense_product(*seen.arrays, weight_gh, bias_h, before_nh)
        if covariates_nc is not None:
            before_nh += covariates_nc @ weight_gh[seen.n_genes :]
        norm = layers.norm
        self._is_frozen = not norm.training
        self._norm = gamma_h, beta_h, draws.kept_nh
        normal_nh, hidden_nh = np.empty((2, n_cells, n_hidden), np.float32)
        inverse_h = np.empty(n_hidden, np.float32)
        running = norm.running_mean.numpy(), norm.running_var.numpy(), norm.momentum, self._is_frozen
        loops.hidden_layer(before_nh, *self._norm, norm.eps, *running, normal_nh, inverse_h, hidden_nh)
        if not self._is_frozen:
            norm.num_batches_tracked.add_(1)
        self._normal, self._weights = (normal_nh, inverse_h), (mean_weight_kh, variance_weight_kh)
        mean_nk, scale_nk, sample_nk = np.empty((3, *draws.draw_nk.shape), np.float32)
        divergence_n = np.empty(n_cells, np.float32)
        heads = mean_weight_kh, mean_bias_k, variance_weight_kh, variance_bias_k, layers.least_variance
        self._given = draws.draw_nk, *prior, n_kept_n
        loops.posterior(hidden_nh, *heads, *self._given, mean_nk, scale_nk, sample_nk, divergence_n)
        self._hidden_nh = hidden_nh
        self.mean_nk, self.scale_nk, self.sample_nk, self.divergence_n = mean_nk, scale_nk, sample_nk, divergence_n

    def backward(self, d_sample_nk: np.ndarray, d_divergence_n: np.ndarray) -> list[torch.Tensor | None]:
        """Gradients of the parameters; None for all of them if none is trained.

        Parameters
        ----------
        d_sample_nk, d_divergence_n
            Gradients of the samples and of the KL divergences.
        """
        from ldvae_ext.kernels import encoder as loops

        parameters = self._layers.parameters
        if not any(value.requires_grad for value in parameters):
            return [None] * len(parameters)
        d_hidden_nh, d_before_nh = np.zeros_like(self._hidden_nh), np.empty_like(self._hidden_nh)
        d_heads = [np.zeros(value.shape, np.float32) for value in parameters[4:]]
        given = *self._given, self.mean_nk, self.scale_nk, d_sample_nk, d_divergence_n, d_hidden_nh
        loops.posterior_backward(self._hidden_nh, *self._weights, self._layers.least_variance, *given, *d_heads)
        d_gamma_h, d_beta_h = np.zeros((2, d_hidden_nh.shape[1]), np.float32)
        made = d_before_nh, d_gamma_h, d_beta_h
        loops.hidden_layer_backward(d_hidden_nh, *self._norm, *self._normal, self._is_frozen, *made)
        # A bias before a batch norm has no effect, and its gradient stays zero; unless the norm's statistics are frozen.
        d_bias_h = d_before_nh.sum(axis=0) if self._is_frozen else np.zeros_like(d_gamma_h)
        d_weight = self._d_weight(d_before_nh) if parameters[0].requires_grad else None
        return [d_weight, *(torch.from_numpy(value) for value in (d_bias_h, d_gamma_h, d_beta_h, *d_heads))]

    def _d_weight(self, d_before_nh: np.ndarray) -> torch.Tensor:
        from ldvae_ext.kernels import sparse

        seen, covariates_nc = self._inputs
        d_weight_gh = np.empty(self._layers.linear.weight.shape[::-1], np.float32)
        nothing_h = np.zeros(d_weight_gh.shape[1], np.float32)
        sparse.sparse_dense_product(*seen.by_gene, d_before_nh, nothing_h, d_weight_gh[: seen.n_genes])
        if covariates_nc is not None:
            d_weight_gh[seen.n_genes :] = covariates_nc.T @ d_before_nh
        return torch.from_numpy(d_weight_gh.T)
