"""The fused training step: loss and gradients of the usual network as one autograd function, in compiled loops on a CPU.

The loops are the same as layer by layer. For a minibatch of 128 cells the overhead of a graph with a hundred nodes takes
longer than the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput
from scvi.nn import Encoder
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

from ldvae_ext._scvi import MODULE_KEYS
from ldvae_ext.backends.batch_norm import update_running_statistics
from ldvae_ext.backends.counts import Counts, check_support
from ldvae_ext.backends.decoder_head import (
    Folded,
    fold_in_training,
    fold_in_training_backward,
    head_gradients,
    weighted_gradients,
)
from ldvae_ext.backends.decoder_inputs import dispersion_codes, with_one_hot
from ldvae_ext.backends.inference import seen_counts
from ldvae_ext.backends.layers import (
    encoders_in_use,
    has_moving_averages,
    has_one_hidden_layer,
    is_plain,
    transposed,
)


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
        layers = self.linear, self.norm, encoder.mean_encoder, encoder.var_encoder
        self.parameters = [value for layer in layers for value in (layer.weight, layer.bias)]
        """In the order of the gradients of :meth:`EncoderPass.backward`."""


class EncoderPass:
    """Forward and backward pass of an encoder on a minibatch.

    Parameters
    ----------
    layers
        Its layers.
    seen
        Counts as input of the encoder.
    prior
        Prior of the encoded variable.
    """

    def __init__(self, layers: EncoderLayers, seen: Counts, prior: NormalPrior) -> None:
        from ldvae_ext.kernels import encoder as loops
        from ldvae_ext.kernels import sparse

        self._layers, self._seen, self._prior = layers, seen, prior
        arrays = [value.detach().numpy() for value in layers.parameters[1:]]
        bias_h, gamma_h, beta_h, mean_weight_kh, mean_bias_k, variance_weight_kh, variance_bias_k = arrays
        n_cells, n_hidden = seen.n_cells, len(bias_h)
        # The draws of torch.nn.Dropout and of Normal.rsample, in their order.
        kept = torch.ones(n_cells, n_hidden)
        if layers.dropout is not None:
            kept = kept.bernoulli_(1 - layers.dropout.p).div_(1 - layers.dropout.p)
        draw_nk = torch.empty(n_cells, len(mean_bias_k)).normal_().numpy()
        before_nh = np.empty((n_cells, n_hidden), np.float32)
        weight_gh = transposed(layers.linear.weight)
        sparse.sparse_dense_product(*seen.arrays, weight_gh, bias_h, before_nh)
        self._norm = gamma_h, beta_h, kept.numpy()
        normal_nh, hidden_nh = np.empty((2, n_cells, n_hidden), np.float32)
        inverse_h = np.empty(n_hidden, np.float32)
        norm = layers.norm
        running = norm.running_mean.numpy(), norm.running_var.numpy(), norm.momentum
        loops.hidden_layer(before_nh, *self._norm, norm.eps, *running, normal_nh, inverse_h, hidden_nh)
        norm.num_batches_tracked.add_(1)
        self._normal, self._weights = (normal_nh, inverse_h), (mean_weight_kh, variance_weight_kh)
        mean_nk, scale_nk, sample_nk = np.empty((3, *draw_nk.shape), np.float32)
        divergence_n = np.empty(n_cells, np.float32)
        heads = mean_weight_kh, mean_bias_k, variance_weight_kh, variance_bias_k, layers.least_variance
        loops.posterior(hidden_nh, *heads, draw_nk, *prior, mean_nk, scale_nk, sample_nk, divergence_n)
        self._kept = hidden_nh, draw_nk
        self.mean_nk, self.scale_nk, self.sample_nk, self.divergence_n = mean_nk, scale_nk, sample_nk, divergence_n

    def backward(self, d_sample_nk: np.ndarray, d_divergence_n: np.ndarray) -> list[torch.Tensor]:
        """Gradients of the parameters.

        Parameters
        ----------
        d_sample_nk, d_divergence_n
            Gradients of the samples and of the KL divergences.
        """
        from ldvae_ext.kernels import encoder as loops
        from ldvae_ext.kernels import sparse

        (hidden_nh, draw_nk), (mean_weight, variance_weight) = self._kept, self._weights
        d_hidden_nh, d_before_nh = np.zeros_like(hidden_nh), np.empty_like(hidden_nh)
        d_heads = [np.zeros(value.shape, np.float32) for value in self._layers.parameters[4:]]
        posterior = (*self._prior, self.mean_nk, self.scale_nk)
        given = d_sample_nk, d_divergence_n, d_hidden_nh
        loops.posterior_backward(
            hidden_nh, mean_weight, variance_weight, self._layers.least_variance, draw_nk, *posterior, *given, *d_heads
        )
        d_gamma_h, d_beta_h, d_bias_h = np.zeros((3, hidden_nh.shape[1]), np.float32)
        loops.hidden_layer_backward(d_hidden_nh, *self._norm, *self._normal, d_before_nh, d_gamma_h, d_beta_h)
        d_weight_gh = np.empty(self._layers.linear.weight.shape[::-1], np.float32)
        # A bias before a batch norm has no effect, and its gradient stays zero.
        sparse.sparse_dense_product(*self._seen.by_gene, d_before_nh, d_bias_h, d_weight_gh)
        return [torch.from_numpy(value) for value in (d_weight_gh.T, d_bias_h, d_gamma_h, d_beta_h, *d_heads)]


class HeadLayers:
    """The layers of a head of the decoder.

    Parameters
    ----------
    head
        The head.
    """

    def __init__(self, head: Any) -> None:
        self.linear, self.norm = head.fc_layers[0][:2]
        values = [self.linear.weight, self.linear.bias]
        values += [] if self.norm is None else [self.norm.weight, self.norm.bias]
        self.parameters = [value for value in values if value is not None]
        """In the order of the gradients of :meth:`HeadPass.backward`."""


class HeadPass:
    """Forward and backward pass of a head of the decoder as an affine map of its inputs.

    Parameters
    ----------
    layers
        Its layers.
    input_np
        Its inputs, shape (cells, inputs).
    """

    def __init__(self, layers: HeadLayers, input_np: np.ndarray) -> None:
        self._linear, self._norm = layers.linear, layers.norm
        weight_pg = transposed(self._linear.weight)
        bias = None if self._linear.bias is None else self._linear.bias.detach()
        self._folded: Folded | None = None
        if self._norm is None:
            intercept_g = np.zeros(weight_pg.shape[1], np.float32) if bias is None else bias.numpy()
            self.map = weight_pg, intercept_g
            return
        parameters = self._norm.weight.detach().numpy(), self._norm.bias.detach().numpy()
        self._folded = folded = fold_in_training(input_np, weight_pg, *parameters, self._norm.eps)
        mean_g = torch.from_numpy(folded.mean_g)
        update_running_statistics(
            self._norm, mean_g if bias is None else mean_g + bias, torch.from_numpy(folded.variance_g), len(input_np)
        )
        self.map = folded.weight_pg, folded.intercept_g

    def backward(
        self, d_weight_pg: np.ndarray, d_intercept_g: np.ndarray
    ) -> tuple[np.ndarray | float, list[torch.Tensor]]:
        """Gradient of the inputs through the statistics of the batch norm, and gradients of the parameters.

        Parameters
        ----------
        d_weight_pg, d_intercept_g
            Gradients of the affine map.
        """
        d_input: np.ndarray | float = 0.0
        of_norm, d_bias_g = [], d_intercept_g
        if self._folded is not None:
            d_input, d_weight_pg, d_gamma_g = fold_in_training_backward(self._folded, d_weight_pg, d_intercept_g)
            of_norm, d_bias_g = [d_gamma_g, d_intercept_g], np.zeros_like(d_intercept_g)
        of_bias = [] if self._linear.bias is None else [d_bias_g]
        return d_input, [torch.from_numpy(value) for value in (d_weight_pg.T, *of_bias, *of_norm)]


@dataclass
class StepInputs:
    """Inputs of a step other than parameters."""

    counts: Counts
    seen: Counts
    """Counts as the encoders see them."""
    covariates_nc: np.ndarray | None
    """Continuous covariates and one-hot levels, float32."""
    code_n: np.ndarray | None
    """Codes of the dispersions."""
    library_prior: NormalPrior | None
    """Prior of the log library; None if the library is observed."""


class _FusedLoss(Function):
    """Loss of a minibatch and its three terms for each cell; see :meth:`FusedStep.loss`."""

    @staticmethod
    def forward(
        ctx: Any, step: FusedStep, inputs: StepInputs, kl_weight: float, passes: list, *_: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        n_cells = inputs.counts.n_cells
        standard = NormalPrior(np.zeros(n_cells, np.float32), np.ones(n_cells, np.float32))
        passes.append(EncoderPass(step.encoders[0], inputs.seen, standard))
        latent = passes[0].sample_nk
        if inputs.library_prior is None:
            with np.errstate(divide="ignore"):
                log_library_n = np.log(inputs.counts.totals().numpy())
            divergence_l_n = np.zeros(n_cells, np.float32)
        else:
            passes.append(EncoderPass(step.encoders[1], inputs.seen, inputs.library_prior))
            log_library_n, divergence_l_n = passes[1].sample_nk[:, 0].copy(), passes[1].divergence_n
        input_np = latent if inputs.covariates_nc is None else np.concatenate([latent, inputs.covariates_nc], axis=1)
        ctx.heads = [HeadPass(head, input_np) for head in step.heads]
        log_theta_cg = None
        if step.log_theta is not None:
            log_theta_cg = np.ascontiguousarray(np.atleast_2d(step.log_theta.detach().numpy().T))
        dropout = ctx.heads[1].map if len(ctx.heads) > 1 else (None, None)
        ctx.arrays = [input_np, *ctx.heads[0].map, log_library_n, log_theta_cg, *dropout]
        ctx.inputs, ctx.passes, ctx.kl_weight = inputs, passes, kl_weight
        ctx.is_shared = step.log_theta is not None and step.log_theta.ndim == 1
        loss_n, ctx.gradients = head_gradients(ctx.arrays, inputs.counts, inputs.code_n)
        # Usually only the loss has a gradient.
        ctx.set_materialize_grads(False)
        terms = tuple(map(torch.from_numpy, (loss_n, passes[0].divergence_n, divergence_l_n)))
        return torch.mean(terms[0] + kl_weight * terms[1] + terms[2]), *terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor | None, *d_terms: torch.Tensor | None) -> Any:
        n_cells = ctx.inputs.counts.n_cells
        of_loss = 0.0 if d_loss is None else float(d_loss) / n_cells
        loss_weight_n, z_weight_n, l_weight_n = (
            np.full(n_cells, of_loss * share, np.float32) + (0 if own is None else own.numpy())
            for share, own in zip((1.0, ctx.kl_weight, 1.0), d_terms, strict=True)
        )
        gradients, ctx.gradients = ctx.gradients, None
        d_input_np, d_weight_pg, d_intercept_g, d_log_library_n, d_log_theta_cg, *of_dropout = weighted_gradients(
            ctx.arrays, ctx.inputs.counts, ctx.inputs.code_n, gradients, loss_weight_n
        )
        d_heads: list[torch.Tensor] = []
        for head, d_map in zip(ctx.heads, [(d_weight_pg, d_intercept_g), of_dropout], strict=False):
            through_statistics, d_parameters = head.backward(*d_map)
            d_input_np = d_input_np + through_statistics
            d_heads += d_parameters
        n_latent = ctx.passes[0].sample_nk.shape[1]
        d_latent_nk = np.ascontiguousarray(d_input_np[:, :n_latent])
        d_encoders = ctx.passes[0].backward(d_latent_nk, z_weight_n)
        if len(ctx.passes) > 1:
            d_encoders += ctx.passes[1].backward(d_log_library_n[:, None], l_weight_n)
        d_theta = []
        if d_log_theta_cg is not None:
            d_theta = [torch.from_numpy(d_log_theta_cg[0] if ctx.is_shared else d_log_theta_cg.T)]
        return None, None, None, None, *d_encoders, *d_heads, *d_theta


class FusedStep:
    """Training steps of a network. Its layers are looked up once.

    Parameters
    ----------
    module
        A network for which :meth:`fits` is True.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.encoders = [EncoderLayers(encoder) for encoder in encoders_in_use(module)]
        self.heads = [HeadLayers(module.decoder.factor_regressor)]
        if module.gene_likelihood == "zinb":
            self.heads.append(HeadLayers(module.decoder.px_dropout_decoder))
        self.log_theta = None if module.gene_likelihood == "poisson" else module.px_r
        parts: list[EncoderLayers | HeadLayers] = [*self.encoders, *self.heads]
        parameters = [value for part in parts for value in part.parameters]
        self._parameters = parameters if self.log_theta is None else [*parameters, self.log_theta]
        self._with_modes = [part.norm for part in parts if part.norm is not None]
        self._with_modes += [part.dropout for part in self.encoders if part.dropout is not None]

    @staticmethod
    def fits(module: Any) -> bool:
        """True if a network is made of the layers that the step is written for.

        Parameters
        ----------
        module
            A network for which the numba backend has no obstacle.
        """
        return (
            module.latent_distribution == "normal"
            and not module.encode_covariates
            and module.batch_representation == "one-hot"
            # Parametrised weights are computed anew at each step.
            and not any(is_parametrized(layer) for layer in module.modules())
            and all(map(_is_usual_encoder, encoders_in_use(module)))
        )

    @property
    def is_possible(self) -> bool:
        """True if all layers are in training mode and still the network's, and no latents are cut off."""
        is_training = self._module.training and all(layer.training for layer in self._with_modes)
        # A callback may have replaced parameters.
        parts: list[Any] = [*self.encoders, *self.heads]
        are_current = all(part.linear.weight is part.parameters[0] for part in parts)
        return is_training and are_current and not self._module.truncates

    def loss(self, tensors: dict[str, torch.Tensor], kl_weight: float) -> tuple[LossOutput, EncoderPass]:
        """Loss of a minibatch, with the random draws and gradients of the network's own forward pass, and the pass of the encoder.

        Parameters
        ----------
        tensors
            The minibatch, counts as a CSR tensor.
        kl_weight
            Weight of the latents' KL divergence.
        """
        module = self._module
        counts = Counts.of(tensors[REGISTRY_KEYS.X_KEY])
        check_support(module.gene_likelihood, counts)
        passes: list[EncoderPass] = []
        loss, reconstruction_n, divergence_z_n, divergence_l_n = _FusedLoss.apply(
            self, self._inputs(tensors, counts), kl_weight, passes, *self._parameters
        )
        extra_metrics = {}
        if module.extra_payload_autotune:
            extra_metrics = {
                "z": torch.from_numpy(passes[0].sample_nk),
                "batch": tensors[REGISTRY_KEYS.BATCH_KEY],
                "labels": tensors.get(REGISTRY_KEYS.LABELS_KEY),
            }
        losses = LossOutput(
            loss=loss,
            reconstruction_loss=reconstruction_n,
            kl_local={MODULE_KEYS.KL_L_KEY: divergence_l_n, MODULE_KEYS.KL_Z_KEY: divergence_z_n},
            extra_metrics=extra_metrics,
        )
        return losses, passes[0]

    def _inputs(self, tensors: dict[str, torch.Tensor], counts: Counts) -> StepInputs:
        module, batch_index = self._module, tensors[REGISTRY_KEYS.BATCH_KEY]
        prior, covariates = None, None
        continuous, levels = tensors.get(REGISTRY_KEYS.CONT_COVS_KEY), tensors.get(REGISTRY_KEYS.CAT_COVS_KEY)
        if module.n_batch > 1 or continuous is not None or levels is not None:
            values, categories = module.conditions(batch_index, continuous, levels)
            beside_z = values[0] if values else counts.values.new_empty(counts.n_cells, 0)
            covariates = with_one_hot(module.decoder.factor_regressor, beside_z, categories).numpy()
        if not module.use_observed_lib_size:
            code = batch_index.squeeze(-1)
            mean_n, scale_n = module.library_log_means[0, code], module.library_log_vars[0, code].sqrt()
            prior = NormalPrior(mean_n.numpy(), scale_n.numpy())
        codes = None
        if module.gene_likelihood != "poisson":
            codes = dispersion_codes(module, batch_index, tensors.get(REGISTRY_KEYS.LABELS_KEY))
        return StepInputs(
            counts, seen_counts(module, counts), covariates, None if codes is None else codes.numpy(), prior
        )


def _is_usual_encoder(encoder: Encoder) -> bool:
    """True for one hidden layer with batch norm, and dropout or none."""
    if not has_one_hidden_layer(encoder):
        return False
    _, norm, _, _, dropout = encoder.encoder.fc_layers[0]
    has_dropout = dropout is None or (is_plain(dropout, torch.nn.Dropout) and 0 < dropout.p < 1)
    return has_moving_averages(norm) and has_dropout
