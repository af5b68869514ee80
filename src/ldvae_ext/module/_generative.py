"""From latents to the likelihood of counts, and the ways in which it can be computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial
from scvi.module._constants import MODULE_KEYS
from scvi.module.base import LossOutput, auto_move_data
from scvi.nn import Encoder
from torch.nn.functional import linear, one_hot

from ldvae_ext.module._backends import BackendModule
from ldvae_ext.module._decoder import LinearDecoderLayer
from ldvae_ext.module._head import affine, head_inputs, loss_of_head
from ldvae_ext.module._likelihood import Counts, check_genes, check_support, log1p, negative_log_likelihood
from ldvae_ext.module._softmax_likelihood import softmax_negative_log_likelihood
from ldvae_ext.module._sparse import Encoded, Prior, encoded, is_plain, sparse_rows
from ldvae_ext.module._step import LatentPrior, Minibatch


class SummedCounts:
    """Stands where a loss expects the distribution of counts: log-likelihoods of cells, summed over genes.

    Parameters
    ----------
    loss
        Negative log-likelihood of each cell, given the counts.
    """

    def __init__(self, loss: Callable[[Counts], torch.Tensor]) -> None:
        self._loss = loss

    def log_prob(self, x_ng: torch.Tensor) -> torch.Tensor:
        """Log-likelihood of each cell, shape (cells, 1)."""
        return -self._loss(Counts.of(x_ng)).unsqueeze(-1)


class GenerativeModule(BackendModule):
    """Stands before scvi-tools' network, whose decoder it replaces; encoders of sparse counts besides."""

    _sums_genes: bool = False

    def forward(self: Any, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """scvi-tools' forward pass; where a loss is asked for, computed as :meth:`computing` says.

        Parameters
        ----------
        tensors
            A minibatch as scvi-tools' data loaders make it; counts may be a CSR tensor.
        *args, **kwargs
            As in scvi-tools.
        """
        x_ng = tensors[REGISTRY_KEYS.X_KEY]
        special = args or kwargs.get("inference_kwargs") or kwargs.get("generative_kwargs")
        if self._backend == "scvi" or special or not kwargs.get("compute_loss", True):
            if x_ng.layout is not torch.strided:
                tensors = {**tensors, REGISTRY_KEYS.X_KEY: Counts.of(x_ng).dense()}
            return super().forward(tensors, *args, **kwargs)  # type: ignore[misc]
        check_genes(x_ng, self.n_input)
        if self._backend == "numba" and x_ng.layout is torch.strided:
            tensors = {**tensors, REGISTRY_KEYS.X_KEY: sparse_rows(x_ng)}
        of_loss = kwargs.get("loss_kwargs") or {}
        weight = torch.as_tensor(of_loss.get("kl_weight", 1.0))
        is_usual = (
            set(of_loss) <= {"kl_weight"}
            and weight.numel() == 1
            and not weight.requires_grad
            and tensors.get(REGISTRY_KEYS.BATCH_KEY) is not None
        )
        if self._steps is not None and is_usual and self._steps.can_run:
            outputs = self._stepped(tensors, float(weight))
            self._check_posterior(outputs)
            return outputs
        self._sums_genes = True
        try:
            outputs = super().forward(tensors, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._sums_genes = False
        self._check_posterior(outputs)
        return outputs

    @staticmethod
    def _check_posterior(outputs: Any) -> None:
        if not torch.isfinite(outputs[-1].loss):
            # Raises what scvi-tools raises, at each step, of posteriors that are not finite.
            posterior = outputs[0][MODULE_KEYS.QZ_KEY]
            Normal(posterior.loc, posterior.scale, validate_args=True)

    def _stepped(self: Any, tensors: dict[str, torch.Tensor], kl_weight: float) -> Any:
        """The forward pass of a training step, without a graph of its own."""
        counts = Counts.of(tensors[REGISTRY_KEYS.X_KEY])
        check_support(self.gene_likelihood, counts)
        batch_index, labels = tensors[REGISTRY_KEYS.BATCH_KEY], tensors.get(REGISTRY_KEYS.LABELS_KEY)
        prior, covariates = None, None
        continuous, levels = tensors.get(REGISTRY_KEYS.CONT_COVS_KEY), tensors.get(REGISTRY_KEYS.CAT_COVS_KEY)
        if self.n_batch > 1 or continuous is not None or levels is not None:
            values, categorical = self._conditions(batch_index, continuous, levels)
            beside_z = values[0] if values else counts.values.new_empty(counts.n_cells, 0)
            covariates = head_inputs(self.decoder.factor_regressor, beside_z, categorical).numpy()
        if not self.use_observed_lib_size:
            known = batch_index.squeeze(-1)
            prior = LatentPrior(
                self.library_log_means[0, known].numpy(), self.library_log_vars[0, known].sqrt().numpy()
            )
        codes = None if self.gene_likelihood == "poisson" else self._codes_of_dispersion(batch_index, labels)
        batch = Minibatch(
            counts,
            replace(counts, values=log1p(counts.values)) if self.log_variational else counts,
            covariates,
            None if codes is None else codes.numpy(),
            prior,
        )
        losses = self._steps.run(batch, kl_weight)
        posteriors = [Encoded(torch.from_numpy(run.mean_nk), torch.from_numpy(run.scale_nk)) for run in losses.runs]
        z = torch.from_numpy(losses.runs[0].sample_nk)
        inferred = {
            MODULE_KEYS.Z_KEY: z,
            MODULE_KEYS.QZ_KEY: posteriors[0],
            MODULE_KEYS.QL_KEY: posteriors[1] if len(posteriors) > 1 else None,
            MODULE_KEYS.LIBRARY_KEY: torch.from_numpy(losses.runs[-1].sample_nk)
            if len(posteriors) > 1
            else torch.log(counts.totals()).unsqueeze(1),
        }
        payload = {"z": z, "batch": batch_index, "labels": labels} if self.extra_payload_autotune else {}
        return (
            inferred,
            {},
            LossOutput(
                loss=losses.loss,
                reconstruction_loss=losses.reconstruction_n,
                kl_local={
                    MODULE_KEYS.KL_L_KEY: losses.divergence_l_n,
                    MODULE_KEYS.KL_Z_KEY: losses.divergence_z_n,
                },
                extra_metrics=payload,
            ),
        )

    def _conditions(
        self: Any, batch_index: torch.Tensor, cont_covs: torch.Tensor | None, cat_covs: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What a network conditions on: continuous values, embedded batches among them, and codes of levels."""
        continuous = [] if cont_covs is None else [cont_covs]
        categorical = [] if cat_covs is None else list(torch.split(cat_covs, 1, dim=1))
        if self.batch_representation == "embedding":
            return [*continuous, self.compute_embedding(REGISTRY_KEYS.BATCH_KEY, batch_index)], categorical
        return continuous, [batch_index, *categorical]

    def _regular_inference(
        self: Any,
        x: torch.Tensor,
        batch_index: torch.Tensor,
        cont_covs: torch.Tensor | None = None,
        cat_covs: torch.Tensor | None = None,
        n_samples: int = 1,
    ) -> dict[str, Any]:
        """scvi-tools' own, of sparse counts too."""
        if x.layout is torch.strided:
            return super()._regular_inference(x, batch_index, cont_covs, cat_covs, n_samples)  # type: ignore[misc]
        if n_samples > 1 or x.device.type != "cpu" or not self.reads_sparse():
            return super()._regular_inference(Counts.of(x).dense(), batch_index, cont_covs, cat_covs, n_samples)  # type: ignore[misc]
        check_genes(x, self.n_input)
        counts = Counts.of(x)
        seen = replace(counts, values=log1p(counts.values)) if self.log_variational else counts
        continuous, categories = [], []
        if self.encode_covariates:
            continuous, categories = self._conditions(batch_index, cont_covs, cat_covs)
        continuous_nc = torch.cat(continuous, dim=-1) if continuous else None

        def encode(encoder: Encoder) -> tuple[Any, torch.Tensor]:
            return encoded(encoder, seen, continuous_nc, categories)

        qz, z = encode(self.z_encoder)
        ql, library = (
            (None, torch.log(counts.totals()).unsqueeze(1)) if self.use_observed_lib_size else encode(self.l_encoder)
        )
        return {
            MODULE_KEYS.Z_KEY: z,
            MODULE_KEYS.QZ_KEY: qz,
            MODULE_KEYS.QL_KEY: ql,
            MODULE_KEYS.LIBRARY_KEY: library,
        }

    @auto_move_data
    def generative(
        self: Any,
        z: torch.Tensor,
        library: torch.Tensor,
        batch_index: torch.Tensor | None,
        cont_covs: torch.Tensor | None = None,
        cat_covs: torch.Tensor | None = None,
        size_factor: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        transform_batch: int | None = None,
    ) -> dict[str, Any]:
        """Distribution of the counts given latents, and the priors.

        Parameters
        ----------
        z
            Latents, shape (cells, latents) or (samples, cells, latents).
        library
            Log library sizes, shape (cells, 1) or (samples, cells, 1).
        batch_index, y
            Codes of batches and labels, shape (cells, 1). Some data modules give no batch where there is one only.
        cont_covs, cat_covs
            Values of the continuous covariates, codes of the categorical ones.
        size_factor
            Log of the size factors, shape (cells, 1); used instead of ``library`` where cells come with size factors.
        transform_batch
            Code of a batch that replaces those of the cells.
        """
        if batch_index is None and self.n_batch > 1:
            msg = f"A minibatch has no batch codes; the model knows {self.n_batch} batches."
            raise ValueError(msg)
        if batch_index is None:
            batch_index = torch.zeros(z.shape[-2], 1, dtype=torch.int64, device=z.device)
        if transform_batch is not None:
            batch_index = torch.ones_like(batch_index) * transform_batch
        continuous, categorical = self._conditions(batch_index, cont_covs, cat_covs)
        inputs = torch.cat([z, *(value.expand(*z.shape[:-1], -1) for value in continuous)], dim=-1) if continuous else z
        scale = size_factor if self.use_size_factor_key else library
        if self._sums_genes:
            px: Any = SummedCounts(partial(self._loss_of_counts, inputs, scale, categorical, batch_index, y))
        else:
            px = self._likelihood(inputs, scale, categorical, batch_index, y)
        prior = Prior if self._sums_genes else Normal
        prior_library = None
        if not self.use_observed_lib_size:
            mean, variance = self._compute_local_library_params(batch_index)
            prior_library = prior(mean, variance.sqrt())
        return {
            MODULE_KEYS.PX_KEY: px,
            MODULE_KEYS.PL_KEY: prior_library,
            MODULE_KEYS.PZ_KEY: prior(torch.zeros_like(z), torch.ones_like(z)),
        }

    def _likelihood(
        self: Any,
        inputs: torch.Tensor,
        library: torch.Tensor,
        categorical: Sequence[torch.Tensor],
        batch_index: torch.Tensor,
        y: torch.Tensor | None,
    ) -> torch.distributions.Distribution:
        scale, log_theta, rate, dropout = self.decoder(self.dispersion, inputs, library, *categorical)
        if self.gene_likelihood == "poisson":
            return Poisson(rate=rate, scale=scale)
        theta = torch.exp(self._log_theta(batch_index, y) if log_theta is None else log_theta)
        if self.gene_likelihood == "zinb":
            return ZeroInflatedNegativeBinomial(mu=rate, theta=theta, zi_logits=dropout, scale=scale)
        if self.gene_likelihood == "nb":
            return NegativeBinomial(mu=rate, theta=theta, scale=scale)
        return Normal(rate, theta, normal_mu=scale)

    def _loss_of_counts(
        self: Any,
        inputs: torch.Tensor,
        library: torch.Tensor,
        categorical: Sequence[torch.Tensor],
        batch_index: torch.Tensor,
        y: torch.Tensor | None,
        counts: Counts,
    ) -> torch.Tensor:
        """Negative log-likelihood of each cell: what :meth:`_likelihood` makes of counts, without its detours."""
        check_support(self.gene_likelihood, counts)
        has_theta = self.gene_likelihood != "poisson"
        if self._backend == "torch":
            decoder = self.decoder
            is_shared = not has_theta or self.dispersion == "gene"
            if is_shared and is_plain(decoder, LinearDecoderLayer) and not decoder.softplus:
                logits = decoder.factor_regressor(inputs, *categorical)
                dropout = decoder.px_dropout_decoder(inputs, *categorical) if self.gene_likelihood == "zinb" else None
                theta = torch.exp(self.px_r) if has_theta else None
                return softmax_negative_log_likelihood(self.gene_likelihood, counts, logits, library, theta, dropout)
            _, log_theta, rate, dropout = decoder(self.dispersion, inputs, library, *categorical)
            if has_theta and log_theta is None:
                log_theta = self._log_theta(batch_index, y)
            theta = torch.exp(log_theta) if has_theta else None
            return negative_log_likelihood(self.gene_likelihood, counts, rate, theta, dropout)
        regressor = self.decoder.factor_regressor
        inputs = head_inputs(regressor, inputs, categorical)
        dropout = affine(self.decoder.px_dropout_decoder, inputs) if self.gene_likelihood == "zinb" else None
        log_theta = codes = None
        if has_theta:
            log_theta = self.px_r.unsqueeze(0) if self.dispersion == "gene" else self.px_r.t()
            codes = self._codes_of_dispersion(batch_index, y)
        return loss_of_head(counts, inputs, *affine(regressor, inputs), library.squeeze(-1), log_theta, codes, dropout)

    def _codes_of_dispersion(self: Any, batch_index: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor | None:
        if self.dispersion == "gene":
            return None
        codes = y if self.dispersion == "gene-label" else batch_index
        if codes is None:
            msg = "`dispersion='gene-label'` needs labels; register them with `labels_key`."
            raise ValueError(msg)
        if self._sums_genes or self._steps is not None:
            lowest, highest = (int(extreme) for extreme in codes.aminmax())
            if lowest < 0 or highest >= self.px_r.shape[1]:
                msg = f"Codes must be 0 to {self.px_r.shape[1] - 1}, of which there are dispersions; got {lowest} to {highest}."
                raise ValueError(msg)
        return codes.squeeze(-1)

    def _log_theta(self: Any, batch_index: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        codes = self._codes_of_dispersion(batch_index, y)
        if codes is None:
            return self.px_r
        return linear(one_hot(codes, self.px_r.shape[1]).to(self.px_r.dtype), self.px_r)
