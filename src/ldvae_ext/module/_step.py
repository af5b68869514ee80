"""A whole training step of the network that nearly everyone trains, as one function with its own gradients: compiled, on a CPU.

The same loops as layer by layer, without what lies between them: at a minibatch of 128 cells the bookkeeping of a graph with
a hundred nodes takes longer than the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scvi.nn import Encoder
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ldvae_ext.module._head import Folded, fold, run_head, unfold, update_norm, weighted_slopes
from ldvae_ext.module._likelihood import Counts
from ldvae_ext.module._sparse import linear, linear_back


def is_usual_norm(norm: torch.nn.Module | None) -> bool:
    """Whether a layer is a batch norm in training whose running statistics are moving averages."""
    return (
        type(norm) is torch.nn.BatchNorm1d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
    )


def is_usual_encoder(encoder: Encoder) -> bool:
    """Whether an encoder has scvi-tools' one hidden layer and is in training."""
    if len(encoder.encoder.fc_layers) != 1 or encoder.var_activation is not torch.exp:
        return False
    linear_layer, norm, layer_norm, activation, dropout = encoder.encoder.fc_layers[0]
    return (
        is_usual_norm(norm)
        and linear_layer.bias is not None
        and layer_norm is None
        and type(activation) is torch.nn.ReLU
        and (dropout is None or (dropout.training and 0 < dropout.p < 1))
    )


class Prior(NamedTuple):
    """Normal prior of the latents of each cell, the same for all of a cell."""

    mean_n: np.ndarray
    scale_n: np.ndarray


class EncoderRun:
    """An encoder on a minibatch, forward and back.

    Parameters
    ----------
    encoder
        A usual one.
    seen
        Counts as it sees them.
    prior
        Of what it encodes.
    """

    def __init__(self, encoder: Encoder, seen: Counts, prior: Prior) -> None:
        from ldvae_ext.module import _encoder_kernels as loops

        self._layer, norm, _, _, dropout = encoder.encoder.fc_layers[0]
        self._heads = encoder.mean_encoder, encoder.var_encoder
        self._seen, self._prior, self._least = seen, prior, encoder.var_eps
        n_cells, n_hidden = seen.n_cells, len(self._layer.bias)
        # The draws of torch.nn.Dropout and of Normal.rsample, in their order.
        kept = torch.ones(n_cells, n_hidden)
        if dropout is not None:
            kept = kept.bernoulli_(1 - dropout.p).div_(1 - dropout.p)
        draw_nk = torch.empty(n_cells, len(self._heads[0].bias)).normal_().numpy()
        before_nh = linear(self._layer.weight, self._layer.bias, None, seen).numpy()
        self._norm = [norm.weight.detach().numpy(), norm.bias.detach().numpy(), kept.numpy()]
        normal_nh, hidden_nh = np.empty((2, n_cells, n_hidden), np.float32)
        inverse_h = np.empty(n_hidden, np.float32)
        running = norm.running_mean.numpy(), norm.running_var.numpy(), norm.momentum
        loops.hidden(before_nh, *self._norm, norm.eps, *running, normal_nh, inverse_h, hidden_nh)
        norm.num_batches_tracked.add_(1)
        self._normal = normal_nh, inverse_h
        self._weights = [head.weight.detach().numpy() for head in self._heads]
        (mean_weight, variance_weight), biases = self._weights, [head.bias.detach().numpy() for head in self._heads]
        mean_nk, scale_nk, sample_nk = np.empty((3, *draw_nk.shape), np.float32)
        divergence_n = np.empty(n_cells, np.float32)
        heads = mean_weight, biases[0], variance_weight, biases[1], self._least
        loops.posterior(hidden_nh, *heads, draw_nk, *prior, mean_nk, scale_nk, sample_nk, divergence_n)
        self._kept = hidden_nh, draw_nk
        self.mean_nk, self.scale_nk, self.sample_nk, self.divergence_n = mean_nk, scale_nk, sample_nk, divergence_n

    @staticmethod
    def parameters(encoder: Encoder) -> list[torch.Tensor]:
        """Parameters, in the order of the gradients."""
        linear_layer, norm = encoder.encoder.fc_layers[0][:2]
        layers = linear_layer, norm, encoder.mean_encoder, encoder.var_encoder
        return [value for layer in layers for value in (layer.weight, layer.bias)]

    def back(self, d_sample_nk: np.ndarray, d_divergence_n: np.ndarray) -> list[torch.Tensor]:
        """Gradients of the parameters."""
        from ldvae_ext.module import _encoder_kernels as loops

        (hidden_nh, draw_nk), (mean_weight, variance_weight) = self._kept, self._weights
        d_hidden_nh, d_before_nh = np.zeros_like(hidden_nh), np.empty_like(hidden_nh)
        of_heads = [np.zeros(value.shape, np.float32) for head in self._heads for value in (head.weight, head.bias)]
        posterior = (*self._prior, self.mean_nk, self.scale_nk)
        slopes = d_sample_nk, d_divergence_n, d_hidden_nh
        loops.posterior_back(
            hidden_nh, mean_weight, variance_weight, self._least, draw_nk, *posterior, *slopes, *of_heads
        )
        d_gamma_h, d_beta_h, d_bias_h = np.zeros((3, hidden_nh.shape[1]), np.float32)
        loops.hidden_back(d_hidden_nh, *self._norm, *self._normal, d_before_nh, d_gamma_h, d_beta_h)
        d_weight_hg, _ = linear_back(self._layer.weight, None, self._seen, torch.from_numpy(d_before_nh), of_more=False)
        # Before a batch norm, which takes it away, a bias has no effect.
        return [d_weight_hg, *(torch.from_numpy(value) for value in (d_bias_h, d_gamma_h, d_beta_h, *of_heads))]


def can_step(module: Any) -> bool:
    """Whether :func:`step` computes a network as it is now."""
    decoder_norm = module.decoder.factor_regressor.fc_layers[0][1]
    return (
        module.training
        and not module.truncates
        and module.latent_distribution == "normal"
        and not module.encode_covariates
        and module.batch_representation == "one-hot"
        and (decoder_norm is None or is_usual_norm(decoder_norm))
        and is_usual_encoder(module.z_encoder)
        and (module.use_observed_lib_size or is_usual_encoder(module.l_encoder))
    )


@dataclass
class Minibatch:
    """What a step takes besides parameters."""

    counts: Counts
    seen: Counts
    """Counts as the encoders see them."""
    covariates_nc: np.ndarray | None
    """Continuous covariates and one-hot levels, float32."""
    code_n: np.ndarray | None
    """Codes of the dispersions."""
    library_prior: Prior | None
    """Prior of the log library, where it is latent."""


class Losses(NamedTuple):
    """Terms of the loss of each cell; differentiable."""

    reconstruction_n: torch.Tensor
    divergence_z_n: torch.Tensor
    divergence_l_n: torch.Tensor
    runs: tuple[EncoderRun, ...]


class _Affine:
    """A head of the decoder as an affine map of its inputs, forward and back."""

    def __init__(self, layers: Any, input_np: np.ndarray) -> None:
        self._linear, self._norm = layers.fc_layers[0][:2]
        weight_pg = np.ascontiguousarray(self._linear.weight.detach().numpy().T)
        bias = None if self._linear.bias is None else self._linear.bias.detach()
        self._folded: Folded | None = None
        if self._norm is None:
            intercept_g = np.zeros(weight_pg.shape[1], np.float32) if bias is None else bias.numpy()
            self.map = weight_pg, intercept_g
            return
        of_norm = self._norm.weight.detach().numpy(), self._norm.bias.detach().numpy()
        self._folded = folded = fold(input_np, weight_pg, *of_norm, self._norm.eps)
        mean_g = torch.from_numpy(folded.mean_g)
        update_norm(
            self._norm, mean_g if bias is None else mean_g + bias, torch.from_numpy(folded.variance_g), len(input_np)
        )
        self.map = folded.weight_pg, folded.intercept_g

    @staticmethod
    def parameters(layers: Any) -> list[torch.Tensor]:
        linear_layer, norm = layers.fc_layers[0][:2]
        values = [linear_layer.weight, linear_layer.bias, *([] if norm is None else [norm.weight, norm.bias])]
        return [value for value in values if value is not None]

    def back(self, d_weight_pg: np.ndarray, d_intercept_g: np.ndarray) -> tuple[np.ndarray | float, list[torch.Tensor]]:
        """What goes into the inputs by way of their statistics, and gradients of the parameters."""
        d_input, of_norm, d_bias_g = 0.0, [], d_intercept_g
        if self._folded is not None:
            d_input, d_weight_pg, d_gamma_g = unfold(self._folded, d_weight_pg, d_intercept_g)
            of_norm, d_bias_g = [d_gamma_g, d_intercept_g], np.zeros_like(d_intercept_g)
        of_bias = [] if self._linear.bias is None else [d_bias_g]
        return d_input, [torch.from_numpy(value) for value in (d_weight_pg.T, *of_bias, *of_norm)]


class _Step(Function):
    """See :func:`step`."""

    @staticmethod
    def forward(ctx: Any, module: Any, batch: Minibatch, runs: list, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n_cells = batch.counts.n_cells
        standard = Prior(np.zeros(n_cells, np.float32), np.ones(n_cells, np.float32))
        runs.append(EncoderRun(module.z_encoder, batch.seen, standard))
        latent = runs[0].sample_nk
        if batch.library_prior is None:
            with np.errstate(divide="ignore"):
                log_library_n = np.log(batch.counts.totals().numpy())
            divergence_l_n = np.zeros(n_cells, np.float32)
        else:
            runs.append(EncoderRun(module.l_encoder, batch.seen, batch.library_prior))
            log_library_n, divergence_l_n = runs[1].sample_nk[:, 0].copy(), runs[1].divergence_n
        inputs = latent if batch.covariates_nc is None else np.concatenate([latent, batch.covariates_nc], axis=1)
        ctx.affine = [_Affine(head, inputs) for head in _heads(module)]
        ctx.log_theta = None
        if module.gene_likelihood != "poisson":
            log_theta = module.px_r.detach()
            log_theta_cg = log_theta[None] if log_theta.ndim == 1 else log_theta.t().contiguous()
            ctx.log_theta = log_theta_cg.numpy()
        dropout = ctx.affine[1].map if len(ctx.affine) > 1 else (None, None)
        ctx.arrays = [inputs, *ctx.affine[0].map, log_library_n, ctx.log_theta, *dropout]
        ctx.batch, ctx.runs, ctx.is_flat = batch, runs, module.gene_likelihood == "poisson" or module.px_r.ndim == 1
        loss_n, ctx.slopes = run_head(ctx.arrays, batch.counts, batch.code_n)
        return tuple(map(torch.from_numpy, (loss_n, runs[0].divergence_n, divergence_l_n)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *weights: torch.Tensor) -> Any:
        loss_weight_n, z_weight_n, l_weight_n = (value.contiguous().numpy() for value in weights)
        slopes, ctx.slopes = ctx.slopes, None
        d_input_np, d_weight_pg, d_intercept_g, d_log_library_n, d_log_theta_cg, *of_dropout = weighted_slopes(
            ctx.arrays, ctx.batch.counts, ctx.batch.code_n, slopes, loss_weight_n
        )
        gradients: list[torch.Tensor] = []
        of_heads = [(d_weight_pg, d_intercept_g), of_dropout]
        for head, of_head in zip(ctx.affine, of_heads, strict=False):
            by_statistics, of_parameters = head.back(*of_head)
            d_input_np = d_input_np + by_statistics
            gradients += of_parameters
        n_latent = ctx.runs[0].sample_nk.shape[1]
        d_latent_nk = np.ascontiguousarray(d_input_np[:, :n_latent])
        of_encoders = ctx.runs[0].back(d_latent_nk, z_weight_n)
        if len(ctx.runs) > 1:
            of_encoders += ctx.runs[1].back(d_log_library_n[:, None], l_weight_n)
        if d_log_theta_cg is not None:
            gradients.append(torch.from_numpy(d_log_theta_cg[0] if ctx.is_flat else d_log_theta_cg.T))
        return None, None, None, *of_encoders, *gradients


def _heads(module: Any) -> list[Any]:
    heads = [module.decoder.factor_regressor]
    return [*heads, module.decoder.px_dropout_decoder] if module.gene_likelihood == "zinb" else heads


def step(module: Any, batch: Minibatch) -> Losses:
    """The terms of the loss of a minibatch, with the random draws and gradients of the network's own forward pass.

    Parameters
    ----------
    module
        A network of which :func:`can_step` holds.
    batch
        The minibatch.
    """
    parameters = EncoderRun.parameters(module.z_encoder)
    if batch.library_prior is not None:
        parameters += EncoderRun.parameters(module.l_encoder)
    for head in _heads(module):
        parameters += _Affine.parameters(head)
    if module.gene_likelihood != "poisson":
        parameters.append(module.px_r)
    runs: list[EncoderRun] = []
    return Losses(*_Step.apply(module, batch, runs, *parameters), tuple(runs))
