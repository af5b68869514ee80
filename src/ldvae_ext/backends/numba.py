"""The backend ``"numba"``: compiled loops over sparse counts, on a CPU."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput

from ldvae_ext.backends.base import Backend
from ldvae_ext.backends.counts import Counts, check_genes, csr_of_dense
from ldvae_ext.backends.decoder_head import affine_head, head_loss
from ldvae_ext.backends.decoder_inputs import DecoderInputs, dispersion_codes, with_one_hot
from ldvae_ext.backends.folded_encoders import FoldedEncoders
from ldvae_ext.backends.fused_step import FusedStep
from ldvae_ext.backends.inference import CellPosterior
from ldvae_ext.backends.layer_by_layer import check_finite, loss_by_layers
from ldvae_ext.backends.layers import is_linear_head, is_plain, reads_sparse_counts
from ldvae_ext.backends.torch import obstacle_to_formulas
from ldvae_ext.kernels.threads import is_compiled

# Inputs of a decoder up to which its batch norm is computed from the covariance of the inputs.
_MOST_INPUTS = 256


class NumbaBackend(Backend):
    """Compiled loops: the fused step in training where the network is the usual one, else layer by layer."""

    name: ClassVar[str] = "numba"
    stores_by_columns: ClassVar[bool] = True

    def __init__(self) -> None:
        self._step: FusedStep | None = None
        self._encoders: FoldedEncoders | None = None
        self._module: Any = None

    def obstacle(self, module: Any, device: str) -> str | None:
        """See :meth:`Backend.obstacle`.

        Parameters
        ----------
        module, device
            As there.
        """
        return obstacle_to_formulas(module, device) or _obstacle_to_loops(module, device)

    def loss(self, module: Any, tensors: dict[str, torch.Tensor], kl_weight: Any) -> LossOutput:
        """See :meth:`Backend.loss`.

        Parameters
        ----------
        module, tensors, kl_weight
            As there.
        """
        x_ng = tensors[REGISTRY_KEYS.X_KEY]
        check_genes(x_ng, module.n_input)
        if x_ng.layout is torch.strided:
            tensors = {**tensors, REGISTRY_KEYS.X_KEY: csr_of_dense(x_ng)}
        self._look_up(module)
        weight = torch.as_tensor(kl_weight)
        is_usual = (
            len(x_ng) > 1
            and weight.numel() == 1
            and not weight.requires_grad
            and tensors.get(REGISTRY_KEYS.BATCH_KEY) is not None
        )
        if self._step is None or not (is_usual and self._step.is_possible):
            return loss_by_layers(module, tensors, kl_weight, _negative_log_likelihood)
        losses, encoder = self._step.loss(tensors, float(weight))
        check_finite(losses, encoder.mean_nk, encoder.scale_nk)
        return losses

    def _look_up(self, module: Any) -> None:
        if self._module is not module:
            self._module = module
            self._step = FusedStep(module) if FusedStep.fits(module) else None

    def posterior(self, module: Any, tensors: dict[str, torch.Tensor]) -> CellPosterior:
        """See :meth:`Backend.posterior`; :meth:`FoldedEncoders.fits` must be True.

        Parameters
        ----------
        module, tensors
            As there.
        """
        if self._encoders is None:
            self._encoders = FoldedEncoders(module)
        return self._encoders.posterior(tensors)


def _obstacle_to_loops(module: Any, device: str) -> str | None:
    decoder = module.decoder
    heads = [decoder.factor_regressor, decoder.px_dropout_decoder] if is_plain(decoder, module.decoder_cls) else []
    obstacles = {
        "compiled loops are switched off": not is_compiled(),
        "the network is not on a CPU": device != "cpu",
        "the network is not in float32": any(p.dtype != torch.float32 for p in module.parameters()),
        "size factors come with a softplus, the compiled loops are written for a softmax": module.use_size_factor_key,
        "`dispersion='gene-cell'` is another for each cell": module.dispersion == "gene-cell"
        and module.gene_likelihood != "poisson",
        "an encoder is not scvi-tools' own": not reads_sparse_counts(module),
        "the decoder is not linear as scvi-tools' own": not heads or not all(map(is_linear_head, heads)),
    }
    if (obstacle := next((obstacle for obstacle, stands in obstacles.items() if stands), None)) is not None:
        return obstacle
    n_inputs = heads[0].fc_layers[0][0].in_features
    return f"the decoder has {n_inputs} inputs, more than {_MOST_INPUTS}" if n_inputs > _MOST_INPUTS else None


def _negative_log_likelihood(module: Any, inputs: DecoderInputs, counts: Counts) -> torch.Tensor:
    decoder = module.decoder
    values, categories, log_library, batch_index, labels = inputs
    input_np = with_one_hot(decoder.factor_regressor, values, categories)
    dropout = affine_head(decoder.px_dropout_decoder, input_np) if module.gene_likelihood == "zinb" else None
    log_theta = codes = None
    if module.gene_likelihood != "poisson":
        log_theta = module.px_r.unsqueeze(0) if module.dispersion == "gene" else module.px_r.t()
        codes = dispersion_codes(module, batch_index, labels)
    weight_pg, intercept_g = affine_head(decoder.factor_regressor, input_np)
    return head_loss(counts, input_np, weight_pg, intercept_g, log_library.squeeze(-1), log_theta, codes, dropout)
