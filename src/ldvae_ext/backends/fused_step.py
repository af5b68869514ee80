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
from torch.nn.utils.parametrize import is_parametrized

from ldvae_ext.module._head import Folded, fold, is_known_norm, run_head, unfold, update_norm, weighted_slopes
from ldvae_ext.module._likelihood import Counts
from ldvae_ext.module._sparse import encoders_in_use, has_one_hidden_layer, is_plain


def _is_usual(encoder: Encoder) -> bool:
    if not has_one_hidden_layer(encoder):
        return False
    _, norm, _, _, dropout = encoder.encoder.fc_layers[0]
    return is_known_norm(norm) and (dropout is None or (is_plain(dropout, torch.nn.Dropout) and 0 < dropout.p < 1))


class LatentPrior(NamedTuple):
    """Normal prior of the latents of each cell, the same for all of a cell."""

    mean_n: np.ndarray
    scale_n: np.ndarray


def _first_layer(weight_hg: np.ndarray, bias_h: np.ndarray, seen: Counts) -> np.ndarray:
    from ldvae_ext.module import _row_kernels as loops

    weight_gh = np.empty(weight_hg.shape[::-1], np.float32)
    loops.turn(np.ascontiguousarray(weight_hg), weight_gh)
    out_nh = np.tile(bias_h, (seen.n_cells, 1))
    loops.multiply(*seen.arrays, weight_gh, out_nh)
    return out_nh


class EncoderParts:
    """The layers of a usual encoder.

    Parameters
    ----------
    encoder
        The encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.linear, self.norm, _, _, self.dropout = encoder.encoder.fc_layers[0]
        self.heads = encoder.mean_encoder, encoder.var_encoder
        self.least_variance = encoder.var_eps
        layers = self.linear, self.norm, *self.heads
        self.parameters = [value for layer in layers for value in (layer.weight, layer.bias)]
        """In the order of the gradients of a run."""


class EncoderRun:
    """An encoder on a minibatch, forward and back.

    Parameters
    ----------
    parts
        Its layers.
    seen
        Counts as it sees them.
    prior
        Of what it encodes.
    """

    def __init__(self, parts: EncoderParts, seen: Counts, prior: LatentPrior) -> None:
        from ldvae_ext.module import _encoder_kernels as loops

        self._parts, self._seen, self._prior = parts, seen, prior
        arrays = [value.detach().numpy() for value in parts.parameters[1:]]
        bias_h, gamma_h, beta_h, mean_weight_kh, mean_bias_k, variance_weight_kh, variance_bias_k = arrays
        n_cells, n_hidden = seen.n_cells, len(bias_h)
        # The draws of torch.nn.Dropout and of Normal.rsample, in their order.
        kept = torch.ones(n_cells, n_hidden)
        if parts.dropout is not None:
            kept = kept.bernoulli_(1 - parts.dropout.p).div_(1 - parts.dropout.p)
        draw_nk = torch.empty(n_cells, len(mean_bias_k)).normal_().numpy()
        before_nh = _first_layer(parts.linear.weight.detach().numpy(), bias_h, seen)
        self._norm = gamma_h, beta_h, kept.numpy()
        normal_nh, hidden_nh = np.empty((2, n_cells, n_hidden), np.float32)
        inverse_h = np.empty(n_hidden, np.float32)
        norm = parts.norm
        running = norm.running_mean.numpy(), norm.running_var.numpy(), norm.momentum
        loops.hidden(before_nh, *self._norm, norm.eps, *running, normal_nh, inverse_h, hidden_nh)
        norm.num_batches_tracked.add_(1)
        self._normal, self._weights = (normal_nh, inverse_h), (mean_weight_kh, variance_weight_kh)
        mean_nk, scale_nk, sample_nk = np.empty((3, *draw_nk.shape), np.float32)
        divergence_n = np.empty(n_cells, np.float32)
        heads = mean_weight_kh, mean_bias_k, variance_weight_kh, variance_bias_k, parts.least_variance
        loops.posterior(hidden_nh, *heads, draw_nk, *prior, mean_nk, scale_nk, sample_nk, divergence_n)
        self._kept = hidden_nh, draw_nk
        self.mean_nk, self.scale_nk, self.sample_nk, self.divergence_n = mean_nk, scale_nk, sample_nk, divergence_n

    def back(self, d_sample_nk: np.ndarray, d_divergence_n: np.ndarray) -> list[torch.Tensor]:
        """Gradients of the parameters."""
        from ldvae_ext.module import _encoder_kernels as loops
        from ldvae_ext.module import _row_kernels as rows

        (hidden_nh, draw_nk), (mean_weight, variance_weight) = self._kept, self._weights
        d_hidden_nh, d_before_nh = np.zeros_like(hidden_nh), np.empty_like(hidden_nh)
        of_heads = [np.zeros(value.shape, np.float32) for value in self._parts.parameters[4:]]
        posterior = (*self._prior, self.mean_nk, self.scale_nk)
        slopes = d_sample_nk, d_divergence_n, d_hidden_nh
        loops.posterior_back(
            hidden_nh, mean_weight, variance_weight, self._parts.least_variance, draw_nk, *posterior, *slopes, *of_heads
        )
        d_gamma_h, d_beta_h, d_bias_h = np.zeros((3, hidden_nh.shape[1]), np.float32)
        loops.hidden_back(d_hidden_nh, *self._norm, *self._normal, d_before_nh, d_gamma_h, d_beta_h)
        d_weight_hg = np.empty(self._parts.linear.weight.shape, np.float32)
        rows.multiply_turned(*self._seen.by_gene, d_before_nh, d_weight_hg)
        # Before a batch norm, which takes it away, a bias has no effect.
        return [torch.from_numpy(value) for value in (d_weight_hg, d_bias_h, d_gamma_h, d_beta_h, *of_heads)]


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
    library_prior: LatentPrior | None
    """Prior of the log library, where it is latent."""


class Losses(NamedTuple):
    """The loss and its terms for each cell; differentiable."""

    loss: torch.Tensor
    reconstruction_n: torch.Tensor
    divergence_z_n: torch.Tensor
    divergence_l_n: torch.Tensor
    runs: tuple[EncoderRun, ...]


class _HeadParts:
    """The layers of a head of the decoder."""

    def __init__(self, layers: Any) -> None:
        self.linear, self.norm = layers.fc_layers[0][:2]
        values = [self.linear.weight, self.linear.bias]
        values += [] if self.norm is None else [self.norm.weight, self.norm.bias]
        self.parameters = [value for value in values if value is not None]
        """In the order of the gradients of a run."""


class _Affine:
    """A head of the decoder as an affine map of its inputs, forward and back."""

    def __init__(self, parts: _HeadParts, input_np: np.ndarray) -> None:
        self._linear, self._norm = parts.linear, parts.norm
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

    def back(self, d_weight_pg: np.ndarray, d_intercept_g: np.ndarray) -> tuple[np.ndarray | float, list[torch.Tensor]]:
        """What goes into the inputs by way of their statistics, and gradients of the parameters."""
        d_input: np.ndarray | float = 0.0
        of_norm, d_bias_g = [], d_intercept_g
        if self._folded is not None:
            d_input, d_weight_pg, d_gamma_g = unfold(self._folded, d_weight_pg, d_intercept_g)
            of_norm, d_bias_g = [d_gamma_g, d_intercept_g], np.zeros_like(d_intercept_g)
        of_bias = [] if self._linear.bias is None else [d_bias_g]
        return d_input, [torch.from_numpy(value) for value in (d_weight_pg.T, *of_bias, *of_norm)]


class _Step(Function):
    """See :meth:`Steps.run`."""

    @staticmethod
    def forward(
        ctx: Any, steps: Steps, batch: Minibatch, kl_weight: float, runs: list, *_: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        n_cells = batch.counts.n_cells
        standard = LatentPrior(np.zeros(n_cells, np.float32), np.ones(n_cells, np.float32))
        runs.append(EncoderRun(steps.encoders[0], batch.seen, standard))
        latent = runs[0].sample_nk
        if batch.library_prior is None:
            with np.errstate(divide="ignore"):
                log_library_n = np.log(batch.counts.totals().numpy())
            divergence_l_n = np.zeros(n_cells, np.float32)
        else:
            runs.append(EncoderRun(steps.encoders[1], batch.seen, batch.library_prior))
            log_library_n, divergence_l_n = runs[1].sample_nk[:, 0].copy(), runs[1].divergence_n
        inputs = latent if batch.covariates_nc is None else np.concatenate([latent, batch.covariates_nc], axis=1)
        ctx.affine = [_Affine(head, inputs) for head in steps.heads]
        log_theta_cg = None
        if steps.log_theta is not None:
            log_theta_cg = np.ascontiguousarray(np.atleast_2d(steps.log_theta.detach().numpy().T))
        dropout = ctx.affine[1].map if len(ctx.affine) > 1 else (None, None)
        ctx.arrays = [inputs, *ctx.affine[0].map, log_library_n, log_theta_cg, *dropout]
        ctx.batch, ctx.runs, ctx.is_shared = batch, runs, steps.log_theta is not None and steps.log_theta.ndim == 1
        loss_n, ctx.slopes = run_head(ctx.arrays, batch.counts, batch.code_n)
        ctx.kl_weight = kl_weight
        # Nearly always it is the loss alone that has a gradient.
        ctx.set_materialize_grads(False)
        terms = tuple(map(torch.from_numpy, (loss_n, runs[0].divergence_n, divergence_l_n)))
        return torch.mean(terms[0] + kl_weight * terms[1] + terms[2]), *terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: torch.Tensor | None, *of_terms: torch.Tensor | None) -> Any:
        n_cells = ctx.batch.counts.n_cells
        of_loss = 0.0 if weight is None else float(weight) / n_cells
        loss_weight_n, z_weight_n, l_weight_n = (
            np.full(n_cells, of_loss * share, np.float32) + (0 if own is None else own.numpy())
            for share, own in zip((1.0, ctx.kl_weight, 1.0), of_terms, strict=True)
        )
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
            gradients.append(torch.from_numpy(d_log_theta_cg[0] if ctx.is_shared else d_log_theta_cg.T))
        return None, None, None, None, *of_encoders, *gradients


class Steps:
    """Training steps of a network; what they need of it is looked up once.

    Parameters
    ----------
    module
        A network of which :meth:`fit` holds.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.encoders = [EncoderParts(encoder) for encoder in encoders_in_use(module)]
        self.heads = [_HeadParts(module.decoder.factor_regressor)]
        if module.gene_likelihood == "zinb":
            self.heads.append(_HeadParts(module.decoder.px_dropout_decoder))
        self.log_theta = None if module.gene_likelihood == "poisson" else module.px_r
        parts: list[EncoderParts | _HeadParts] = [*self.encoders, *self.heads]
        parameters = [value for part in parts for value in part.parameters]
        self._parameters = parameters if self.log_theta is None else [*parameters, self.log_theta]
        self._modes = [part.norm for part in parts if part.norm is not None]
        self._modes += [part.dropout for part in self.encoders if part.dropout is not None]

    @staticmethod
    def fit(module: Any) -> bool:
        """Whether a network is made of the parts that are known here."""
        return (
            module.latent_distribution == "normal"
            and not module.encode_covariates
            and module.batch_representation == "one-hot"
            # Whose parameters are made anew at each step.
            and not any(is_parametrized(layer) for layer in module.modules())
            and all(map(_is_usual, encoders_in_use(module)))
        )

    @property
    def can_run(self) -> bool:
        """Whether everything is in training mode, and nothing else is asked for."""
        is_training = self._module.training and all(layer.training for layer in self._modes)
        # A callback may have put something else in their place.
        parts: list[Any] = [*self.encoders, *self.heads]
        are_there = all(part.linear.weight is part.parameters[0] for part in parts)
        return is_training and are_there and not self._module.truncates

    def run(self, batch: Minibatch, kl_weight: float) -> Losses:
        """The loss of a minibatch, with the random draws and gradients of the network's own forward pass.

        Parameters
        ----------
        batch
            The minibatch.
        kl_weight
            Weight of the latents' divergence.
        """
        runs: list[EncoderRun] = []
        loss, reconstruction_n, divergence_z_n, divergence_l_n = _Step.apply(
            self, batch, kl_weight, runs, *self._parameters
        )
        return Losses(loss, reconstruction_n, divergence_z_n, divergence_l_n, tuple(runs))
