"""Comparison of groups of cells: through which factors they differ, and how likely latents are in each sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi.model.base import RNASeqMixin, VAEMixin

from ldvae_ext._keys import ABUNDANCE
from ldvae_ext._scvi import MODULE_KEYS
from ldvae_ext._validate import check_column, check_one_of, factor_indices
from ldvae_ext.core import log_likelihood
from ldvae_ext.core.cells import EncodedCells, dense
from ldvae_ext.core.heads import parameters_given
from ldvae_ext.core.importance import importance_weights, latent_log_density
from ldvae_ext.core.rotation import Rotation
from ldvae_ext.model._axes import network_decoder
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import cells_to_read, check_registers_cells, stream_cells
from ldvae_ext.model._collection import as_anndata
from ldvae_ext.model._stock import quiet, reads_cells, with_checked_groups, with_u
from ldvae_ext.module import LDVAEModule


class ComparisonMixin(LDVAEBase):
    """Comparison of groups of cells: differential expression, importance weights, differential abundance."""

    @with_checked_groups
    def differential_expression(
        self,
        adata: AnnData | None = None,
        groupby: str | None = None,
        group1: list[str] | None = None,
        group2: str | None = None,
        idx1: list[int] | list[bool] | str | None = None,
        idx2: list[int] | list[bool] | str | None = None,
        mode: Literal["vanilla", "change"] = "vanilla",
        delta: float = 0.25,
        batch_size: int | None = None,
        all_stats: bool = True,
        batch_correction: bool | None = None,
        batchid1: list[str] | None = None,
        batchid2: list[str] | None = None,
        fdr_target: float = 0.05,
        silent: bool = False,
        weights: Literal["uniform", "importance"] | None = "uniform",
        filter_outlier_cells: bool = False,
        importance_weighting_kwargs: dict | None = None,
        dataloader: Any = None,
        *,
        factors: Any = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Differential expression between groups of cells, through all factors or through some of them.

        Without ``factors`` this is scvi-tools' method. With them, the compared expression is decoded from these factors:
        the others are set to the prior mean, z = 0 (u = 0 under ``latent_distribution="ln"``, with z = softmax(u)), in every
        cell. Differences between the groups are then due to differences in these factors, in their mean or in their spread.
        Cells, draws from posteriors and importance weights are those of the whole model: with the same seeds and
        ``batch_correction``, all factors give the result of ``factors=None``, and two sets of factors are compared draw by
        draw.

        Batch and covariates also affect the expression. With ``batch_correction=True`` both groups are decoded in each of
        the batches, so that the batch makes no difference, and with ``factors=[]`` nothing differs. The covariates of a cell
        stay the same: groups that differ in them differ in their expression, also with ``factors=[]``.

        Parameters
        ----------
        adata, groupby, group1, group2, idx1, idx2, mode, delta, batch_size, all_stats, batchid1, batchid2, fdr_target, silent
            As in :meth:`scvi.model.LinearSCVI.differential_expression`.
        weights, importance_weighting_kwargs, dataloader, **kwargs
            As there. Importance weights are by the likelihood of the counts given all factors.
        batch_correction
            True to decode both groups in the same batches, False to decode each cell in its own. If None, True with
            ``factors``.
        filter_outlier_cells
            True to leave outliers out; they are determined from the latents with all their factors.
        factors
            Factors through which groups may differ: names (``"Z_3"``; ``"F_3"`` while a rotation is in force) or positions. None: all of them, and no change of
            ``batch_correction``. An empty list: none of them.

        Returns
        -------
        A row for each gene and comparison, as in scvi-tools: ``proba_de``, ``bayes_factor``, ``lfc_mean``,
        ``is_de_fdr_0.05``, ... in ``mode="change"``; ``proba_m1``, ``bayes_factor``, ... in ``"vanilla"``. ``scale1`` and
        ``scale2`` are mean shares of expression decoded from ``factors``; statistics of the counts (``raw_mean1``, ...) are
        of the counts as they are.

        Raises
        ------
        ValueError
            If a factor or group does not exist, or cells from ``dataloader`` would have to be decoded in other batches than
            their own, which scvi-tools does not do.
        KeyError
            If ``groupby`` is no column of ``adata.obs``.

        Examples
        --------
        >>> table = model.differential_expression(groupby="phase", factors=["Z_0"])
        >>> table["comparison"].unique().tolist()
        ['G1 vs Rest', 'G2M vs Rest', 'S vs Rest']
        """
        check_one_of("mode", mode, ("vanilla", "change"))
        if batch_correction is None:
            batch_correction = factors is not None
        arguments = {
            "adata": adata,
            "groupby": groupby,
            "group1": group1,
            "group2": group2,
            "idx1": idx1,
            "idx2": idx2,
            "mode": mode,
            "delta": delta,
            "batch_size": batch_size,
            "all_stats": all_stats,
            "batch_correction": batch_correction,
            "batchid1": batchid1,
            "batchid2": batchid2,
            "fdr_target": fdr_target,
            "silent": silent,
            "weights": weights,
            "filter_outlier_cells": filter_outlier_cells,
            "importance_weighting_kwargs": importance_weighting_kwargs,
            "dataloader": dataloader,
            **kwargs,
        }
        stock = partial(_stock_differential_expression, self)
        if factors is None:
            return stock(**arguments)
        if batch_correction and adata is None and self.adata is None and self.module.n_batch > 1:
            msg = (
                "`factors` compares groups in the same batches, but cells from a `dataloader` are decoded in their own; "
                "`batch_correction=False` takes differences between batches into account."
            )
            raise ValueError(msg)
        with _expression_of(self.module, _positions(factors, self.factor_names), self.rotation):
            return stock(**arguments)

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

        They are scvi-tools' for a normal latent, a negative binomial and the softmax, unless they are truncated. For a
        logistic-normal latent the densities are those of z on the simplex (scvi-tools uses the density of u at z). For Poisson
        and size factors, for which scvi-tools has no weights, the likelihood is the model's.

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
            True to truncate weights at their mean (Ionides 2008). (scvi-tools raises those below the mean to it.)
        n_mc_samples, n_mc_samples_per_pass
            For the anchors' marginal likelihood.
        **data_loader_kwargs
            As in scvi-tools.

        Returns
        -------
        Weights that sum to 1, shape (samples * cells,).

        Examples
        --------
        >>> from torch import distributions, tensor
        >>> from scvi.distributions import NegativeBinomial
        >>> cells = np.arange(20)
        >>> z, variance = model.get_latent_representation(indices=cells, return_dist=True)
        >>> qz = distributions.Normal(tensor(z), tensor(variance).sqrt())
        >>> scale, theta = tensor(decoder.scale(z)), tensor(decoder.theta())
        >>> px = NegativeBinomial(mu=scale, theta=theta, scale=scale)
        >>> weights = model.get_importance_weights(adata, cells, qz, px, tensor(z))
        >>> weights.shape
        (20,)
        """
        module, indices = self.module, np.asarray(indices)
        is_negative_binomial = module.gene_likelihood in ("nb", "zinb") and not module.use_size_factor_key
        if is_negative_binomial and module.latent_distribution == "normal" and not truncation:
            for name, value, kind in (
                ("qz", qz, torch.distributions.Distribution),
                ("px", px, torch.distributions.Distribution),
                ("zs", zs, torch.Tensor),
            ):
                if not isinstance(value, kind):
                    msg = f"`{name}` must be a {kind.__name__} of torch; got {type(value).__name__}."
                    raise TypeError(msg)
            return super().get_importance_weights(
                adata=adata,
                indices=indices,
                qz=qz,
                px=px,
                zs=zs,
                max_cells=max_cells,
                truncation=truncation,
                n_mc_samples=n_mc_samples,
                n_mc_samples_per_pass=n_mc_samples_per_pass,
                **data_loader_kwargs,
            )
        rng = np.random
        anchors = np.arange(len(indices))
        if len(indices) > max_cells:
            anchors = rng.choice(anchors, size=max_cells, replace=False)
        with stream_cells(self, adata, indices, data_loader_kwargs=data_loader_kwargs) as cells:
            chunks = list(cells.chunks)
        z_snk = zs.reshape(-1, *zs.shape[-2:]).cpu().numpy().astype(np.float64)
        log_px_na = np.concatenate([_log_px(self, z_nk, chunks, anchors) for z_nk in z_snk])
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

        Under ``latent_distribution="ln"`` all densities are those of u, whose posteriors are Gaussian; scvi-tools
        evaluates the densities of u at softmax(u).

        Parameters
        ----------
        adata, adata_sub, sample_key, batch_size, num_cells_posterior, dof, dataloader
            As in :meth:`scvi.model.SCVI.differential_abundance`.

        Returns
        -------
        None: cells x samples are written to ``adata.obsm["da_log_probs"]``, or to the AnnData ``adata_sub``. With
        ``dataloader`` they are returned.

        Examples
        --------
        >>> model.differential_abundance(sample_key="phase")
        >>> adata.obsm["da_log_probs"].shape
        (700, 3)
        """
        if dataloader is not None and self.adata is not None:
            msg = "`dataloader` is for a model without an AnnData; this one compares the cells of `adata`."
            raise ValueError(msg)
        adata = as_anndata(adata)
        check_registers_cells(self, "differential_abundance", adata)
        given = self.adata if adata is None else adata
        if given is not None:
            check_column(given.obs.columns, "sample_key", cast("str", sample_key))
        target = given if adata_sub is None else adata_sub
        with (
            self.module.evaluating(),
            quiet(),
            cells_to_read(self, adata, dataloader) as cells,
            cells_to_read(self, adata_sub) as cells_sub,
        ):
            table = None
            if self.module.latent_distribution == "ln" and given is not None:
                self._write_densities_of_u(
                    cells, cells_sub, cast("str", sample_key), batch_size, num_cells_posterior, dof
                )
            else:
                table = with_u(VAEMixin.differential_abundance)(
                    self,
                    adata=cells,
                    adata_sub=cells_sub,
                    sample_key=sample_key,
                    batch_size=batch_size,
                    num_cells_posterior=num_cells_posterior,
                    dof=dof,
                    dataloader=dataloader,
                )
            read = cells if cells_sub is None else cells_sub
            if read is not None and read is not target and target is not None:
                target.obsm[ABUNDANCE] = read.obsm[ABUNDANCE]
        return table

    def _write_densities_of_u(
        self,
        adata: AnnData | None,
        adata_sub: AnnData | None,
        sample_key: str,
        batch_size: int,
        num_cells_posterior: int | None,
        dof: float | None,
    ) -> None:
        adata = self._validate_anndata(adata)
        adata_sub = adata if adata_sub is None else self._validate_anndata(adata_sub)
        check_column(adata_sub.obs.columns, "sample_key", sample_key)
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


_stock_differential_expression = with_u(reads_cells(RNASeqMixin.differential_expression))


def _positions(factors: Any, names: list[str]) -> np.ndarray:
    """Positions of factors given by name or position, possibly none of them."""
    given = [factors] if isinstance(factors, (str, int, np.integer)) else list(factors)
    return factor_indices(given, names, argument="factors") if given else np.empty(0, dtype=np.int64)


@contextmanager
def _expression_of(module: LDVAEModule, kept: np.ndarray, rotation: Rotation | None) -> Iterator[None]:
    """Inside, the expression that the network's forward pass gives is decoded from some latents, the others at 0.

    Only the result of ``get_normalized`` of the counts' distribution is replaced. Draws, latents, and parameters and
    likelihood of the distribution stay those of all latents, and so do importance weights.
    """
    is_logistic, transformation = module.latent_distribution == "ln", module.z_encoder.z_transformation
    is_kept = torch.zeros(module.n_latent, dtype=torch.bool, device=module.device)
    is_kept[torch.from_numpy(kept)] = True
    pair = (np.eye(module.n_latent),) * 2 if rotation is None else (rotation.matrix_kk, rotation.inverse_kk)
    axes, inverse = (torch.as_tensor(matrix, dtype=torch.float32, device=module.device) for matrix in pair)
    forward_with_all, latest_u = module.forward, torch.empty(0)

    def remember_u(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        nonlocal latest_u
        (latest_u,) = inputs

    def forward(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        outputs = forward_with_all(tensors, *args, **kwargs)
        if kwargs.get("compute_loss", True):
            return outputs  # for a likelihood, not for expression
        inference, generative = outputs
        u = latest_u if is_logistic else inference[MODULE_KEYS.Z_KEY]
        u = torch.where(is_kept, u @ axes, 0.0) @ inverse
        z = transformation(u)
        inputs = module._get_generative_input(tensors, {**inference, MODULE_KEYS.Z_KEY: z})
        restricted = module.generative(**inputs, **kwargs.get("generative_kwargs", {}))
        generative[MODULE_KEYS.PX_KEY].get_normalized = restricted[MODULE_KEYS.PX_KEY].get_normalized
        return outputs

    # u cannot be had from softmax(u), which forgets a constant. For a normal latent the transformation is no layer.
    hook = transformation.register_forward_pre_hook(remember_u) if is_logistic else None
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if hook is not None:
            hook.remove()


def _log_px(model: LDVAEBase, z_nk: np.ndarray, chunks: list[EncodedCells], anchors: np.ndarray) -> np.ndarray:
    """Log-likelihood of each anchor's counts, given each cell's latent in that cell's batch; (cells, anchors)."""
    counts_ag = dense(sparse.vstack([sparse.csr_array(chunk.counts) for chunk in chunks], format="csr")[anchors])
    library_a = np.concatenate([chunk.library for chunk in chunks])[anchors]
    if not model.module.use_size_factor_key:
        library_a = counts_ag.sum(axis=1)
    decoder, out, start = network_decoder(model), [], 0
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
