"""Groups of cells: importance weights of their latents, and how likely a latent is in each sample."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi.model.base import VAEMixin

from ldvae_ext._keys import ABUNDANCE
from ldvae_ext._validate import check_column
from ldvae_ext.core import log_likelihood
from ldvae_ext.core.cells import EncodedCells, dense
from ldvae_ext.core.heads import parameters_given
from ldvae_ext.core.importance import importance_weights, latent_log_density
from ldvae_ext.model._cells import stream_cells
from ldvae_ext.model._tasks import TasksMixin, quiet, with_u


class WeightsMixin(TasksMixin):
    """Densities of latents, right for a logistic-normal latent too."""

    def get_importance_weights(
        self,
        adata: AnnData | None,
        indices: Any,
        qz: torch.distributions.Distribution,
        px: torch.distributions.Distribution,
        zs: torch.Tensor,
        max_cells: int = 1024,
        truncation: bool = False,
        n_mc_samples: int = 500,
        n_mc_samples_per_pass: int = 250,
        **data_loader_kwargs: Any,
    ) -> np.ndarray:
        """Importance weights of latents for a group of cells.

        scvi-tools' own for a normal latent, a negative binomial and the softmax, unless they are truncated. For a
        logistic-normal latent the densities are those of z on the simplex (scvi-tools takes the density of u at z); for Poisson
        and size factors, which scvi-tools cannot weigh, the likelihood is the model's.

        Parameters
        ----------
        adata, indices
            The group of cells.
        qz, px, zs
            Posteriors and counts' distributions of the cells, and the latents drawn from them: shape (cells, latents) or
            (samples, cells, latents).
        max_cells
            Number of anchor cells at most.
        truncation
            Whether weights above their mean are cut to it (Ionides 2008). (scvi-tools raises those below the mean to it.)
        n_mc_samples, n_mc_samples_per_pass
            For the anchors' marginal likelihood.
        **data_loader_kwargs
            As in scvi-tools.

        Returns
        -------
        Weights that sum to 1, shape (samples * cells,).
        """
        module, indices = self.module, np.asarray(indices)
        is_negative_binomial = module.gene_likelihood in ("nb", "zinb") and not module.use_size_factor_key
        if is_negative_binomial and module.latent_distribution == "normal" and not truncation:
            return super().get_importance_weights(
                adata,
                indices,
                qz,
                px,
                zs,
                max_cells,
                truncation,
                n_mc_samples,
                n_mc_samples_per_pass,
                **data_loader_kwargs,
            )
        rng = np.random
        anchors = np.arange(len(indices))
        if len(indices) > max_cells:
            anchors = rng.choice(anchors, size=max_cells, replace=False)
        with stream_cells(self, adata, indices, data_loader_kwargs=data_loader_kwargs) as cells:
            chunks = list(cells.chunks)
        z_snk = zs.reshape(-1, *zs.shape[-2:]).cpu().numpy().astype(np.float64)
        log_px_na = np.concatenate([self._log_px(z_nk, chunks, anchors) for z_nk in z_snk])
        log_marginal = self.get_marginal_ll(
            adata,
            indices=indices[anchors],
            return_mean=False,
            n_mc_samples=n_mc_samples,
            n_mc_samples_per_pass=n_mc_samples_per_pass,
        )
        mean_ak = np.concatenate([chunk.mean for chunk in chunks])[anchors]
        variance_ak = np.concatenate([chunk.variance for chunk in chunks])[anchors]
        z_nk = z_snk.reshape(-1, z_snk.shape[-1])
        prior = np.zeros((1, z_nk.shape[1])), np.ones((1, z_nk.shape[1]))
        log_weight_n = importance_weights(
            latent_log_density(z_nk, *prior, module.latent_distribution)[:, 0],
            latent_log_density(z_nk, mean_ak, variance_ak, module.latent_distribution),
            log_px_na,
            cast("torch.Tensor", log_marginal).numpy(),
        )
        weight_n = np.exp(log_weight_n)
        if truncation:
            weight_n = np.minimum(weight_n, 1 / len(weight_n))
        return weight_n / weight_n.sum()

    def _log_px(self, z_nk: np.ndarray, chunks: list[EncodedCells], anchors: np.ndarray) -> np.ndarray:
        """Log-likelihood of each anchor's counts, given each cell's latent in that cell's batch; (cells, anchors)."""
        counts_ag = dense(sparse.vstack([sparse.csr_array(chunk.counts) for chunk in chunks], format="csr")[anchors])
        library_a = np.concatenate([chunk.library for chunk in chunks])[anchors]
        if not self.module.use_size_factor_key:
            library_a = counts_ag.sum(axis=1)
        decoder, out, start = self.get_decoder(), [], 0
        for chunk in chunks:
            stop = start + len(chunk.mean)
            scale_ng, theta, dropout_ng = parameters_given(decoder, z_nk[start:stop], chunk, 1.0)
            columns = [
                log_likelihood(decoder.likelihood, x_g[None], size * scale_ng, theta, dropout_ng).sum(axis=1)
                for x_g, size in zip(counts_ag, library_a, strict=True)
            ]
            out.append(np.stack(columns, axis=1))
            start = stop
        return np.concatenate(out)

    def differential_abundance(
        self,
        adata: AnnData | None = None,
        adata_sub: AnnData | None = None,
        sample_key: str | None = None,
        batch_size: int = 128,
        num_cells_posterior: int | None = None,
        dof: float | None = None,
        dataloader: Any = None,
    ) -> pd.DataFrame | None:
        """Log density of each cell's latent under the aggregated posterior of each sample.

        Under ``latent_distribution="ln"`` latents are taken as u throughout, where posteriors are Gaussian; scvi-tools
        evaluates the densities of u at softmax(u).

        Parameters
        ----------
        adata, adata_sub, sample_key, batch_size, num_cells_posterior, dof, dataloader
            As in :meth:`scvi.model.SCVI.differential_abundance`.

        Returns
        -------
        None: cells x samples are written to ``adata.obsm["da_log_probs"]``, or to that of ``adata_sub``; with ``dataloader``
        they are returned.
        """
        if dataloader is not None and self.adata is not None:
            msg = "`dataloader` is for a model without an AnnData; this one compares the cells of `adata`."
            raise ValueError(msg)
        with self.module.evaluating(), quiet():
            given = self.adata if adata is None else adata
            if given is not None:
                check_column(given.obs.columns, "sample_key", cast("str", sample_key))
            if self.module.latent_distribution != "ln" or given is None:
                return with_u(VAEMixin.differential_abundance)(
                    self, adata, adata_sub, sample_key, batch_size, num_cells_posterior, dof, dataloader
                )
            adata = self._validate_anndata(adata)
            adata_sub = adata if adata_sub is None else self._validate_anndata(adata_sub)
            check_column(adata_sub.obs.columns, "sample_key", cast("str", sample_key))
            u_nk, _ = self.get_latent_representation(adata_sub, batch_size=batch_size, return_dist=True)
            u_blocks = torch.from_numpy(u_nk).to(self.device).split(batch_size)
            columns = {}
            for sample in adata_sub.obs[sample_key].unique():
                members = np.flatnonzero(adata.obs[sample_key] == sample)
                if num_cells_posterior is not None and num_cells_posterior < len(members):
                    members = np.random.choice(members, num_cells_posterior, replace=False)  # noqa: NPY002
                mixture = self.get_aggregated_posterior(adata, members, batch_size, dof)
                columns[sample] = np.concatenate([mixture.log_prob(u).cpu().numpy() for u in u_blocks])
            adata_sub.obsm[ABUNDANCE] = pd.DataFrame(columns, index=adata_sub.obs_names)
        return None
