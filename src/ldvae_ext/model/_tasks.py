"""scVI's tasks, by scvi-tools' own methods where they are right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.stats import spearmanr
from scvi import REGISTRY_KEYS
from scvi.model.base import RNASeqMixin, VAEMixin

from ldvae_ext._scvi import ADATA_MINIFY_TYPE
from ldvae_ext._validate import check_one_of, warn
from ldvae_ext.core import LinearDecoder, log_likelihood
from ldvae_ext.core.cells import EncodedCells, dense
from ldvae_ext.core.heads import parameters_given
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.model._axes import ENCODER, REFINED, UsePosterior, network_decoder
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import stream_cells
from ldvae_ext.model._counts import has_counts
from ldvae_ext.model._draws import cells_to_draw, drawn_latents
from ldvae_ext.model._fingerprint import note_change
from ldvae_ext.model._refinement import sampled_marginals
from ldvae_ext.model._stock import minibatches_of, reads_cells, sampled_distribution


def _no_latents(model: LDVAEBase, *_args: Any, return_dist: bool = False, **_kwargs: Any) -> Any:
    """Latents of no cells."""
    none = np.empty((0, model.n_latent), dtype=np.float32)
    return (none, none.copy()) if return_dist else none


class TasksMixin(LDVAEBase):
    """scVI's tasks: likelihoods, latents, parameters of the counts, correlation of genes, minified data."""

    get_elbo = reads_cells(VAEMixin.get_elbo, needs_counts=True, finite=True)
    get_latent_library_size = reads_cells(RNASeqMixin.get_latent_library_size, needs_counts=True, finite=True)
    get_aggregated_posterior = reads_cells(VAEMixin.get_aggregated_posterior)
    posterior_predictive_sample = reads_cells(RNASeqMixin.posterior_predictive_sample)

    @reads_cells(needs_counts=True, finite=True)
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        n_mc_samples: int = 1_000,
        batch_size: int | None = None,
        return_mean: bool = True,
        dataloader: Iterator[dict[str, torch.Tensor | None]] | None = None,
        data_loader_kwargs: dict | None = None,
        *,
        use_posterior: UsePosterior = "encoder",
        **kwargs: Any,
    ) -> np.float64 | torch.Tensor:
        """Marginal log-likelihood by importance sampling, in nats per cell: higher is better.

        Parameters
        ----------
        adata, indices, n_mc_samples, batch_size, dataloader, data_loader_kwargs, **kwargs
            As in :meth:`scvi.model.LinearSCVI.get_marginal_ll`.
        return_mean
            True to return the mean over cells. (scvi-tools averages the means of minibatches, so that a cell in a small last
            minibatch has a larger weight.) For a normal latent the estimate of a cell is scvi-tools', which is off by
            log(samples drawn / n_mc_samples) if ``n_mc_samples`` is no multiple of ``n_mc_samples_per_pass``.
        use_posterior
            Posteriors from which latents are drawn: ``"encoder"``, or ``"refined"`` (:meth:`get_refined_posterior`, which needs
            observed library sizes). Refined ones need far fewer draws. Their draws have the seed ``scvi.settings.seed``, or 0.

        Returns
        -------
        The mean, or shape (cells,).

        Raises
        ------
        ValueError
            If refined posteriors are requested without observed library sizes or size factors, or from a data loader.

        Examples
        --------
        >>> float(model.get_marginal_ll(n_mc_samples=10)) < 0
        True
        """
        check_one_of("use_posterior", use_posterior, (ENCODER, REFINED))
        if use_posterior == REFINED:
            if dataloader is not None or data_loader_kwargs or kwargs:
                msg = "`use_posterior='refined'` takes `adata`, `indices`, `n_mc_samples` and `batch_size` only."
                raise ValueError(msg)
            refined = sampled_marginals(self, adata, indices, n_mc_samples, batch_size)
            return refined.mean() if return_mean else torch.as_tensor(refined)
        of_cells = super().get_marginal_ll(
            adata=adata,
            indices=indices,
            n_mc_samples=n_mc_samples,
            batch_size=batch_size,
            return_mean=False,
            dataloader=dataloader,
            data_loader_kwargs=data_loader_kwargs,
            **kwargs,
        )
        return np.mean(of_cells.numpy(), dtype=np.float64) if return_mean else of_cells

    @reads_cells(empty=_no_latents)
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        give_mean: bool = True,
        mc_samples: int = 5_000,
        batch_size: int | None = None,
        return_dist: bool = False,
        dataloader: Iterator[dict[str, torch.Tensor | None]] | None = None,
        *,
        use_posterior_mean: bool = False,
        **data_loader_kwargs: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Latents of cells, as LinearSCVI returns them.

        Under ``latent_distribution="ln"`` this is the mean of softmax(u) over ``mc_samples`` random draws, which differs
        between calls; ``use_posterior_mean=True`` gives softmax of the mean of u, the latent that this package decodes.

        Parameters
        ----------
        adata, indices, give_mean, mc_samples, batch_size, return_dist, dataloader, **data_loader_kwargs
            As in :meth:`scvi.model.LinearSCVI.get_latent_representation`.
        use_posterior_mean
            True to return the deterministic latent of each cell, without sampling. No effect for a normal latent.

        Returns
        -------
        Cells x latents, float32, in the network's order; with ``return_dist`` the means and variances (of u under
        ``"ln"``).

        Examples
        --------
        >>> model.get_latent_representation().shape
        (700, 5)
        """
        is_deterministic = use_posterior_mean and not return_dist and self.module.latent_distribution == "ln"
        if is_deterministic and not give_mean:
            msg = "`use_posterior_mean=True` returns no samples, and `give_mean=False` requests them."
            raise ValueError(msg)
        manager = cells_to_draw(self, adata, dataloader, data_loader_kwargs)
        if manager is not None:
            of_cells = self.module, manager, indices, batch_size
            return drawn_latents(*of_cells, give_mean=give_mean, return_dist=return_dist)
        out = super().get_latent_representation(
            adata=adata,
            indices=indices,
            give_mean=give_mean,
            mc_samples=mc_samples,
            batch_size=batch_size,
            return_dist=return_dist or is_deterministic,
            dataloader=dataloader,
            **data_loader_kwargs,
        )
        return deterministic_latent(out[0], "ln") if is_deterministic else out

    @reads_cells(needs_counts=True, finite=True)
    def get_reconstruction_error(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        batch_size: int | None = None,
        dataloader: Iterator[dict[str, torch.Tensor | None]] | None = None,
        return_mean: bool = True,
        data_loader_kwargs: dict | None = None,
        *,
        use_posterior_mean: bool = False,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Negative log-likelihood of the counts given the latent, in nats per cell: *lower* is better.

        (The docstring of scvi-tools states the contrary.) By default latent and library size are one random draw from each
        posterior, which differs between calls; ``use_posterior_mean=True`` uses their posterior means instead and
        gives the same number each time.

        Parameters
        ----------
        adata, indices, batch_size, dataloader, return_mean, data_loader_kwargs, **kwargs
            As in :meth:`scvi.model.LinearSCVI.get_reconstruction_error`.
        use_posterior_mean
            True to use posterior means instead of a draw.

        Returns
        -------
        ``{"reconstruction_loss": tensor}``: the mean over cells, or shape (cells,).

        Examples
        --------
        >>> model.get_reconstruction_error(use_posterior_mean=True)
        {'reconstruction_loss': tensor(...)}
        """
        if not use_posterior_mean:
            return super().get_reconstruction_error(
                adata=adata,
                indices=indices,
                batch_size=batch_size,
                dataloader=dataloader,
                return_mean=return_mean,
                data_loader_kwargs=data_loader_kwargs,
                **kwargs,
            )
        if kwargs:
            msg = f"`use_posterior_mean=True` does not run the network's forward pass, which {sorted(kwargs)} are for."
            raise TypeError(msg)
        error_n = reconstruction_error_at_mean(self, adata, indices, batch_size, dataloader, data_loader_kwargs)
        return {"reconstruction_loss": error_n.mean() if return_mean else error_n}

    @reads_cells
    def get_likelihood_parameters(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        n_samples: int | None = 1,
        give_mean: bool | None = False,
        batch_size: int | None = None,
        dataloader: Iterator[dict[str, torch.Tensor | None]] | None = None,
        **data_loader_kwargs: Any,
    ) -> dict[str, np.ndarray]:
        """Parameters of the distribution of the counts, for latents drawn from each cell's posterior.

        Parameters
        ----------
        adata, indices, n_samples, give_mean, batch_size, dataloader, **data_loader_kwargs
            As in :meth:`scvi.model.LinearSCVI.get_likelihood_parameters`. For parameters without sampling, see
            :meth:`get_decoder`.

        Returns
        -------
        ``"mean"``, ``"dispersions"`` (not under ``"poisson"``; standard deviations under ``"normal"``) and, under
        ``"zinb"``, ``"dropout"``: shape (cells, genes), or (samples, cells, genes).

        Examples
        --------
        >>> parameters = model.get_likelihood_parameters()
        >>> sorted(parameters)
        ['dispersions', 'mean']
        """
        if self.module.gene_likelihood in ("nb", "zinb"):
            return super().get_likelihood_parameters(
                adata=adata,
                indices=indices,
                n_samples=n_samples,
                give_mean=give_mean,
                batch_size=batch_size,
                dataloader=dataloader,
                **data_loader_kwargs,
            )
        means, deviations = [], []
        for tensors in minibatches_of(self, adata, indices, batch_size, dataloader, data_loader_kwargs):
            px = sampled_distribution(self, tensors, n_samples or 1)
            means.append(px.mean.cpu().numpy())
            deviations.append(px.stddev.cpu().numpy())
        out = {"mean": np.concatenate(means, axis=-2)}
        if self.module.gene_likelihood == "normal":
            out["dispersions"] = np.concatenate(deviations, axis=-2)
        return {k: v.mean(axis=0) for k, v in out.items()} if give_mean and (n_samples or 1) > 1 else out

    def _has_own_rates(self) -> bool:
        """True if scvi-tools cannot draw rates before Poisson noise: from a Poisson likelihood."""
        return self.module.gene_likelihood == "poisson"

    def _sampled_rates(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        n_samples: int = 25,
        batch_size: int = 64,
        rna_size_factor: int = 1000,
        transform_batch: Any = None,
        dataloader: Any = None,
        **data_loader_kwargs: Any,
    ) -> np.ndarray:
        """Samples of the rate before Poisson noise; under a Poisson likelihood that is the decoded expression."""
        samples = []
        for tensors in minibatches_of(self, adata, indices, batch_size, dataloader, data_loader_kwargs):
            px = sampled_distribution(self, tensors, n_samples, transform_batch)
            rate = rna_size_factor * px.scale
            if self.module.gene_likelihood != "poisson":
                theta = px.theta.expand_as(rate)
                rate = torch.distributions.Gamma(theta, theta / rate).sample()
            samples.append(rate.cpu().numpy())
        joined = np.concatenate(samples, axis=-2)
        return joined if n_samples == 1 else joined.transpose(1, 2, 0)

    @reads_cells
    def get_feature_correlation_matrix(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        n_samples: int = 10,
        batch_size: int = 64,
        rna_size_factor: int = 1000,
        transform_batch: Any = None,
        correlation_type: Literal["spearman", "pearson"] = "spearman",
        silent: bool = True,
        *,
        dataloader: Any = None,
    ) -> pd.DataFrame:
        """Correlation of genes over cells and draws from their posteriors, before Poisson noise.

        Parameters
        ----------
        adata, indices, n_samples, batch_size, rna_size_factor, transform_batch, correlation_type, silent
            As in :meth:`scvi.model.LinearSCVI.get_feature_correlation_matrix`.
        dataloader
            Minibatches of cells, instead of ``adata``; each cell is decoded in its own batch.

        Returns
        -------
        Genes x genes.

        Raises
        ------
        ValueError
            Under ``gene_likelihood="normal"``, which has no rate before the noise of counting.

        Examples
        --------
        >>> model.get_feature_correlation_matrix(n_samples=1).shape
        (765, 765)
        """
        if self.module.gene_likelihood == "normal":
            msg = "The correlation is of rates without count noise; `gene_likelihood='normal'` has no counts."
            raise ValueError(msg)
        check_one_of("correlation_type", correlation_type, ("spearman", "pearson"))
        if dataloader is None:
            return super().get_feature_correlation_matrix(
                adata=adata,
                indices=indices,
                n_samples=n_samples,
                batch_size=batch_size,
                rna_size_factor=rna_size_factor,
                transform_batch=transform_batch,
                correlation_type=correlation_type,
                silent=silent,
            )
        if adata is not None or indices is not None or transform_batch is not None:
            msg = (
                "`dataloader` decides on the cells and their batches: leave out `adata`, `indices`, `transform_batch`."
            )
            raise ValueError(msg)
        rates = self._sampled_rates(n_samples=n_samples, rna_size_factor=rna_size_factor, dataloader=dataloader)
        flat = rates if n_samples == 1 else rates.transpose(2, 0, 1).reshape(-1, rates.shape[1])
        matrix = np.corrcoef(flat, rowvar=False) if correlation_type == "pearson" else spearmanr(flat).statistic
        names = self.get_var_names()
        return pd.DataFrame(matrix, index=names, columns=names)

    def minify_adata(
        self,
        minified_data_type: str = ADATA_MINIFY_TYPE.LATENT_POSTERIOR,
        use_latent_qzm_key: str = "X_latent_qzm",
        use_latent_qzv_key: str = "X_latent_qzv",
    ) -> None:
        """Replace the model's data by a copy with the posteriors of cells, with or without counts.

        A latent library size is kept as exp of the posterior mean of its logarithm, in the field that scvi-tools has for
        the observed one.

        Parameters
        ----------
        minified_data_type
            ``"latent_posterior_parameters"`` drops the counts, ``"latent_posterior_parameters_with_counts"`` keeps them,
            which likelihoods and ablations need.
        use_latent_qzm_key, use_latent_qzv_key
            Keys of ``adata.obsm`` with means and variances of the posteriors, as ``get_latent_representation(return_dist=True)``
            returns them. If neither exists, they are computed. (scvi-tools requires them.)

        Examples
        --------
        >>> model.minify_adata()
        >>> model.minified_data_type
        'latent_posterior_parameters'
        """
        check_one_of("minified_data_type", minified_data_type, tuple(ADATA_MINIFY_TYPE))
        keys = (use_latent_qzm_key, use_latent_qzv_key)
        computed = not any(key in self.adata.obsm for key in keys)
        if computed:
            posterior = self.get_latent_representation(return_dist=True)
            self.adata.obsm.update(dict(zip(keys, posterior, strict=True)))
        whole = self.adata
        try:
            self._minify(minified_data_type, *keys)
        finally:
            if computed:
                for key in keys:
                    del whole.obsm[key]

    def _minify(self, minified_data_type: str, *keys: str) -> None:
        if self.module.use_observed_lib_size:
            super().minify_adata(minified_data_type, *keys)
            return
        if has_counts(self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)):
            with stream_cells(self) as cells:
                library = [size for chunk in cells.chunks for size in chunk.library]
        else:
            warn("Without counts, the library size of each cell is the mean of its batch at the set-up of the model.")
            batch_n = self.adata_manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()
            library = np.exp(self.module.library_log_means.cpu().numpy().ravel()[batch_n].astype(np.float64)).tolist()
        # scvi-tools refuses by this flag, and fills the field with totals.
        self.module.use_observed_lib_size = True
        try:
            super().minify_adata(minified_data_type, *keys)
        finally:
            self.module.use_observed_lib_size = False
        self.adata.obs[self._OBSERVED_LIB_SIZE_KEY] = library
        note_change(self.adata_manager)


def reconstruction_error_at_mean(
    model: LDVAEBase,
    adata: AnnData | None = None,
    indices: Any = None,
    batch_size: int | None = None,
    dataloader: Any = None,
    data_loader_kwargs: dict | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each cell at its posterior mean, shape (cells,), in nats."""
    with stream_cells(model, adata, indices, batch_size, dataloader, data_loader_kwargs) as cells:
        decoder = network_decoder(model)
        return torch.from_numpy(np.concatenate([-_log_likelihood_at_mean(decoder, chunk) for chunk in cells.chunks]))


def _log_likelihood_at_mean(decoder: LinearDecoder, cells: EncodedCells) -> np.ndarray:
    z_nk = deterministic_latent(cells.mean.astype(np.float64), decoder.latent_distribution)
    mu_ng, theta, dropout_ng = parameters_given(decoder, z_nk, cells, cells.library)
    return log_likelihood(decoder.likelihood, dense(cells.counts), mu_ng, theta, dropout_ng).sum(axis=1)
