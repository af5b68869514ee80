"""From latents to the likelihood of counts, with every option of the network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import NegativeBinomial, Normal, Poisson, ZeroInflatedNegativeBinomial
from scvi.module.base import auto_move_data

from ldvae_ext._scvi import MODULE_KEYS
from ldvae_ext.backends.decoder_inputs import DecoderInputs, log_theta
from ldvae_ext.backends.inference import with_dense_counts
from ldvae_ext.module._decoder import LinearDecoderLayer


class GenerativeModule:
    """Stands before scvi-tools' network, whose ``generative`` it replaces."""

    decoder_cls = LinearDecoderLayer
    """Class of the decoder that the backends' formulas hold for."""

    def forward(self: Any, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """scvi-tools' forward pass, which also takes CSR counts and a minibatch of a single cell.

        Parameters
        ----------
        tensors
            A minibatch as scvi-tools' data loaders make it; counts may be a CSR tensor.
        *args, **kwargs
            As in scvi-tools.
        """
        tensors = with_dense_counts(tensors)
        with self.normalising(len(tensors[REGISTRY_KEYS.X_KEY])):
            return super().forward(tensors, *args, **kwargs)  # type: ignore[misc]

    def normalising(self: Any, n_cells: int) -> AbstractContextManager[None]:
        """Inside, batch norm uses its running statistics if a minibatch in training has a single cell.

        One cell has no variance to divide by.

        Parameters
        ----------
        n_cells
            Number of cells in the minibatch.
        """
        return self.evaluating(torch.nn.BatchNorm1d) if self.training and n_cells == 1 else nullcontext()

    def conditions(
        self: Any, batch_index: torch.Tensor, cont_covs: torch.Tensor | None, cat_covs: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Continuous and categorical values that the network conditions on.

        Parameters
        ----------
        batch_index
            Codes of the batches, shape (cells, 1).
        cont_covs, cat_covs
            Values of the continuous covariates and codes of the categorical ones, shape (cells, covariates).

        Returns
        -------
        Continuous covariates and embedded batches, shape (cells, columns) each; codes, shape (cells, 1) each.
        """
        continuous = [] if cont_covs is None else [cont_covs]
        categorical = [] if cat_covs is None else list(torch.split(cat_covs, 1, dim=1))
        if self.batch_representation == "embedding":
            return [*continuous, self.compute_embedding(REGISTRY_KEYS.BATCH_KEY, batch_index)], categorical
        return continuous, [batch_index, *categorical]

    def decoder_inputs(
        self: Any,
        z: torch.Tensor,
        library: torch.Tensor,
        batch_index: torch.Tensor | None,
        cont_covs: torch.Tensor | None = None,
        cat_covs: torch.Tensor | None = None,
        size_factor: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        transform_batch: int | None = None,
    ) -> DecoderInputs:
        """The inputs of the decoder and of the likelihood.

        Parameters
        ----------
        z, library, batch_index, cont_covs, cat_covs, size_factor, y, transform_batch
            See :meth:`generative`.

        Raises
        ------
        ValueError
            If there are several batches and no codes.
        """
        if batch_index is None and self.n_batch > 1:
            msg = f"A minibatch has no batch codes; the model has {self.n_batch} batches."
            raise ValueError(msg)
        if batch_index is None:
            batch_index = torch.zeros(z.shape[-2], 1, dtype=torch.int64, device=z.device)
        if transform_batch is not None:
            batch_index = torch.ones_like(batch_index) * transform_batch
        continuous, categories = self.conditions(batch_index, cont_covs, cat_covs)
        values = torch.cat([z, *(value.expand(*z.shape[:-1], -1) for value in continuous)], dim=-1) if continuous else z
        log_library: Any = size_factor if self.use_size_factor_key else library
        return DecoderInputs(values, categories, log_library, batch_index, y)

    def priors(self: Any, inputs: DecoderInputs, z: torch.Tensor, cls: type = Normal) -> dict[str, Any]:
        """Prior of the latents, and prior of the log library if it is latent, by the keys of scvi-tools.

        Parameters
        ----------
        inputs
            See :meth:`decoder_inputs`.
        z
            The latents.
        cls
            Class of the priors.
        """
        prior_library = None
        if not self.use_observed_lib_size:
            mean, variance = self._compute_local_library_params(inputs.batch_index)
            prior_library = cls(mean, variance.sqrt())
        return {
            MODULE_KEYS.PL_KEY: prior_library,
            MODULE_KEYS.PZ_KEY: cls(torch.zeros_like(z), torch.ones_like(z)),
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
        batch_index
            Codes of the batches, shape (cells, 1). Some data modules give no batch if there is only one.
        cont_covs, cat_covs
            Values of the continuous covariates, codes of the categorical ones.
        size_factor
            Log of the size factors, shape (cells, 1); used instead of ``library`` if cells have size factors.
        y
            Codes of the labels, shape (cells, 1).
        transform_batch
            Code of a batch that replaces those of the cells.
        """
        inputs = self.decoder_inputs(
            z, library, batch_index, cont_covs, cat_covs, size_factor=size_factor, y=y, transform_batch=transform_batch
        )
        return {MODULE_KEYS.PX_KEY: self._counts_given(inputs), **self.priors(inputs, z)}

    def _counts_given(self: Any, inputs: DecoderInputs) -> torch.distributions.Distribution:
        """Distribution of the counts."""
        scale, log_theta_ng, rate, dropout = self.decoder(
            self.dispersion, inputs.values, inputs.log_library, *inputs.categories
        )
        if self.gene_likelihood == "poisson":
            return Poisson(rate=rate, scale=scale)
        if log_theta_ng is None:
            log_theta_ng = log_theta(self, inputs.batch_index, inputs.labels)
        theta = torch.exp(log_theta_ng)
        if self.gene_likelihood == "zinb":
            return ZeroInflatedNegativeBinomial(mu=rate, theta=theta, zi_logits=dropout, scale=scale)
        if self.gene_likelihood == "nb":
            return NegativeBinomial(mu=rate, theta=theta, scale=scale)
        if self.gene_likelihood == "normal":
            return Normal(rate, theta, normal_mu=scale)
        msg = f"`gene_likelihood` must be 'nb', 'zinb', 'poisson' or 'normal'; got {self.gene_likelihood!r}."
        raise ValueError(msg)
