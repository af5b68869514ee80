"""The fused training step: loss and gradients of the usual network as one autograd function, in compiled loops on a CPU.

The loops are the same as layer by layer. For a minibatch of 128 cells the overhead of a graph with a hundred nodes takes
longer than the arithmetic.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput
from scvi.nn import Encoder
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

from ldvae_ext._scvi import MODULE_KEYS
from ldvae_ext.backends.counts import Counts, check_support
from ldvae_ext.backends.decoder_head import head_gradients, weighted_gradients
from ldvae_ext.backends.decoder_inputs import dispersion_codes, with_one_hot
from ldvae_ext.backends.encoder_pass import EncoderLayers, EncoderPass, NormalPrior
from ldvae_ext.backends.head_pass import HeadLayers, HeadPass
from ldvae_ext.backends.inference import seen_counts
from ldvae_ext.backends.layers import (
    encoders_in_use,
    has_moving_averages,
    has_one_hidden_layer,
    is_plain,
)


@dataclass(kw_only=True)
class StepInputs:
    """Inputs of a step other than parameters."""

    counts: Counts
    seen: Counts
    """Counts as the encoders see them."""
    covariates_nc: np.ndarray | None
    """Continuous covariates and one-hot levels, float32."""
    encoded_nc: np.ndarray | None
    """Those that the encoders take; None if they take counts alone."""
    truncates: bool
    """True if each cell keeps its first latents alone, at random."""
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
        n_latent = len(step.encoders[0].parameters[-1])
        # All draws in the order of the network's forward pass, in which latents are cut off at its end.
        draws = [encoder.draws(n_cells) for encoder in step.encoders]
        n_kept_n = np.full(n_cells, n_latent)
        if inputs.truncates:
            # The draw of `module.kept_latents`.
            n_kept_n = torch.randint(n_latent, (n_cells, 1)).squeeze(1).numpy() + 1
        seen = inputs.seen, inputs.encoded_nc
        passes.append(EncoderPass(step.encoders[0], *seen, standard, draws[0], n_kept_n))
        latent = passes[0].sample_nk
        if inputs.library_prior is None:
            with np.errstate(divide="ignore"):
                log_library_n = np.log(inputs.counts.totals().numpy())
            divergence_l_n = np.zeros(n_cells, np.float32)
        else:
            one_n = np.ones(n_cells, np.int64)
            passes.append(EncoderPass(step.encoders[1], *seen, inputs.library_prior, draws[1], one_n))
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
            and module.batch_representation == "one-hot"
            # Parametrised weights are computed anew at each step.
            and not any(is_parametrized(layer) for layer in module.modules())
            and all(map(_is_usual_encoder, encoders_in_use(module)))
        )

    @property
    def is_possible(self) -> bool:
        """True if gradients are wanted, and a callback has replaced neither a parameter nor the averages of a batch norm."""
        if not torch.is_grad_enabled():
            return False
        parts: list[EncoderLayers | HeadLayers] = [*self.encoders, *self.heads]
        now = [value for part in parts for value in part.current()]
        if self.log_theta is not None:
            now.append(self._module.px_r)
        are_current = len(now) == len(self._parameters) and all(map(operator.is_, now, self._parameters))
        return are_current and all(part.norm is None or part.norm.momentum is not None for part in parts)

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
        prior, covariates, encoded = None, None, None
        continuous, levels = tensors.get(REGISTRY_KEYS.CONT_COVS_KEY), tensors.get(REGISTRY_KEYS.CAT_COVS_KEY)
        if module.n_batch > 1 or continuous is not None or levels is not None:
            values, categories = module.conditions(batch_index, continuous, levels)
            beside_z = values[0] if values else counts.values.new_empty(counts.n_cells, 0)
            covariates = with_one_hot(module.decoder.factor_regressor, beside_z, categories).numpy()
            if module.encode_covariates:
                encoded = with_one_hot(module.z_encoder.encoder, beside_z, categories).numpy()
        if not module.use_observed_lib_size:
            code = batch_index.squeeze(-1)
            mean_n, scale_n = module.library_log_means[0, code], module.library_log_vars[0, code].sqrt()
            prior = NormalPrior(mean_n.numpy(), scale_n.numpy())
        codes = None
        if module.gene_likelihood != "poisson":
            codes = dispersion_codes(module, batch_index, tensors.get(REGISTRY_KEYS.LABELS_KEY))
        return StepInputs(
            counts=counts,
            seen=seen_counts(module, counts),
            covariates_nc=covariates,
            encoded_nc=encoded,
            truncates=module.truncates and module.training,
            code_n=None if codes is None else codes.numpy(),
            library_prior=prior,
        )


def _is_usual_encoder(encoder: Encoder) -> bool:
    """True for one hidden layer with batch norm, and dropout or none."""
    if not has_one_hidden_layer(encoder):
        return False
    _, norm, _, _, dropout = encoder.encoder.fc_layers[0]
    has_dropout = dropout is None or (is_plain(dropout, torch.nn.Dropout) and dropout.p < 1)
    return has_moving_averages(norm) and has_dropout
