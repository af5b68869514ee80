"""Ablation: change of each cell's likelihood without a latent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._docs import fill_docstring
from ldvae_ext._groups import codes_at, gene_ablation, table_of
from ldvae_ext._keys import ABLATION_INFO
from ldvae_ext._row_store import check_store, table_of_cells
from ldvae_ext._validate import check_one_of
from ldvae_ext.core.explained import ExplainedSums, PooledProfile, explained_sets
from ldvae_ext.core.plan import MODES, POSTERIORS, RANDOM_MODES, Mode, Scheme
from ldvae_ext.model._axes import ENCODER, REFINED, factor_stream
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import given_cells, with_positions
from ldvae_ext.model._expression import posterior_mean_expression
from ldvae_ext.model._requests import (
    READ_TWICE,
    ablated_chunks,
    ablation_plan,
    ablation_request,
    groups_of_cells,
)
from ldvae_ext.model._threads import with_torch_threads


class AblationMixin(LDVAEBase):
    """Ablation of latents: paired, streamed, on raw counts."""

    @with_torch_threads
    @fill_docstring
    def ablate(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        latents: Any = None,
        mode: Mode = "zero",
        *,
        value: Any = None,
        groupby: str | None = None,
        scheme: Scheme = "leave_out",
        refit_heads: bool = False,
        use_posterior: Literal["mean", "samples", "refined"] = "mean",
        n_samples: int | None = None,
        seed: int | None = None,
        transform_batch: Any = None,
        batch_size: int | None = None,
        dataloader: Any = None,
        silent: bool | None = None,
        store: str | Path | None = None,
    ) -> AnnData:
        """Change of each cell's negative log-likelihood when latents are taken out.

        Every cell is compared with itself: ``NLL(x | latents replaced) - NLL(x | all latents)``, with the same latent,
        library size, dispersion and dropout logits on both sides, and no noise between them, so two calls give the same
        numbers. Likelihoods are scvi-tools' own. See :func:`ldvae_ext.core.ablation_effects` for the formula.

        Parameters
        ----------
        %(adata_of_model)s
        %(indices)s
        %(latents)s
            Positions count along ``factor_names``. The default of that order is descending KL over all cells of
            ``adata``, or the numbering of the factors after ``rotate("deviance")`` and :meth:`order_factors`.
        %(mode)s
        %(value)s
            If ``latents`` is None and the scheme is ``"leave_out"``, the names of a mapping are also the latents.
        %(groupby_of_mode)s
        %(scheme)s
        %(refit_heads)s
        %(use_posterior)s
            ``"refined"``: latents are the modes of :meth:`get_refined_posterior`.
        %(n_samples)s
        %(seed)s
            The seed is ``scvi.settings.seed`` if None, and 0 if that is None, too.
        %(transform_batch)s
        %(batch_size)s
        %(dataloader)s
            It is read twice if the latents of all cells are needed first.
        %(silent)s
        %(store)s

        Returns
        -------
        AnnData, cells x sets of latents, in the network's order. ``X`` is float64, in nats per cell: positive where the
        latents help to explain the cell, negative where they hurt. ``obs`` is a copy; ``uns["ldvae_ablation"]`` describes
        the ablation.

        Raises
        ------
        ValueError
            If a latent, mode, batch or group does not exist, an argument has no use in the mode, or the model's data are
            minified without counts.
        TypeError
            If ``adata`` is no AnnData, or ``dataloader`` an iterator that would have to be read twice.

        Examples
        --------
        >>> effects = model.ablate(latents=["Z_0", "Z_3"])
        >>> effects.shape
        (700, 2)
        """
        check_one_of("use_posterior", use_posterior, (*POSTERIORS, REFINED))
        if store is not None:
            source = self.adata if adata is None and dataloader is not None else given_cells(self, adata)
            check_store(store, None if source is None else table_of(source.obs))
        self._check_has_counts("ablate")
        request = ablation_request(
            self,
            dataloader,
            groupby,
            transform_batch,
            latents=latents,
            mode=mode,
            value=value,
            scheme=scheme,
            refit_heads=refit_heads,
            use_posterior="mean" if use_posterior == REFINED else use_posterior,
            n_samples=n_samples,
            seed=seed,
        )
        request.reject_unused_groups()
        _, code_n = groups_of_cells(self, adata, groupby)
        source = REFINED if use_posterior == REFINED else ENCODER
        plan = ablation_plan(self, request, adata, code_n, batch_size, dataloader, use_posterior=source)
        with factor_stream(self, adata, indices, batch_size, dataloader, use_posterior=source, silent=silent) as cells:
            chunks = ablated_chunks(self, cells, silent=silent)
            parts = (
                plan.effects(request.decoder, chunk, at, codes_at(code_n, at))
                for chunk, at in with_positions(chunks, cells.positions)
            )
            obs = None if cells.obs is None else cells.obs.copy()
            return table_of_cells(
                parts,
                obs=obs,
                var=pd.DataFrame(index=plan.names),
                uns={ABLATION_INFO: {**request.description(plan, groupby), "use_posterior": use_posterior}},
                store=store,
            )

    @with_torch_threads
    @fill_docstring
    def ablate_genes(
        self,
        groupby: str | None = None,
        adata: AnnData | None = None,
        indices: Any = None,
        latents: Any = None,
        mode: Mode = "zero",
        *,
        value: Any = None,
        scheme: Scheme = "leave_out",
        refit_heads: bool = False,
        use_posterior: Literal["mean", "samples", "refined"] = "mean",
        n_samples: int | None = None,
        seed: int | None = None,
        transform_batch: Any = None,
        batch_size: int | None = None,
        dataloader: Any = None,
        silent: bool | None = None,
    ) -> AnnData:
        """Contribution of each gene to the effect of an ablation, averaged over the cells of each group.

        The sum over genes is the mean effect of :meth:`ablate` in the group. Sums are streamed: cells x genes x latents are
        never held.

        Parameters
        ----------
        %(groupby)s
        %(adata_of_model)s
        %(indices)s
        %(latents)s
            Positions count along ``factor_names``. The default of that order is descending KL over all cells of
            ``adata``, or the numbering of the factors after ``rotate("deviance")`` and :meth:`order_factors`.
        %(mode)s
        %(value)s
            If ``latents`` is None and the scheme is ``"leave_out"``, the names of a mapping are also the latents.
        %(scheme)s
        %(refit_heads)s
        %(use_posterior)s
            ``"refined"``: latents are the modes of :meth:`get_refined_posterior`.
        %(n_samples)s
        %(seed)s
            The seed is ``scvi.settings.seed`` if None, and 0 if that is None, too.
        %(transform_batch)s
        %(batch_size)s
        %(dataloader)s
            It is read twice if the latents of all cells are needed first.
        %(silent)s

        Returns
        -------
        AnnData, (groups x genes) x sets of latents, in the network's order; :func:`ldvae_ext.get.gene_ablation_df` reads it
        as a long table. ``X`` is float64, in nats per cell of the group; ``obs`` has ``group``, ``gene`` and ``n_cells``;
        ``uns["ldvae_ablation"]`` describes the ablation.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`ablate`.

        Examples
        --------
        >>> genes = model.ablate_genes("bulk_labels")
        >>> genes.shape  # ten populations times 765 genes
        (7650, 5)
        """
        check_one_of("use_posterior", use_posterior, (*POSTERIORS, REFINED))
        self._check_has_counts("ablate_genes")
        request = ablation_request(
            self,
            dataloader,
            groupby,
            transform_batch,
            latents=latents,
            mode=mode,
            value=value,
            scheme=scheme,
            refit_heads=refit_heads,
            use_posterior="mean" if use_posterior == REFINED else use_posterior,
            n_samples=n_samples,
            seed=seed,
        )
        groups, code_n = groups_of_cells(self, adata, groupby)
        source, genes = REFINED if use_posterior == REFINED else ENCODER, request.decoder.genes
        plan = ablation_plan(self, request, adata, code_n, batch_size, dataloader, use_posterior=source)
        total_pgs, n_p = np.zeros((len(groups), len(genes), len(plan.sets))), np.zeros(len(groups), dtype=np.int64)
        with factor_stream(self, adata, indices, batch_size, dataloader, use_posterior=source, silent=silent) as cells:
            chunks = ablated_chunks(self, cells, silent=silent)
            for chunk, at in with_positions(chunks, cells.positions):
                group_n = codes_at(code_n, at)
                plan.add_gene_effects(total_pgs, request.decoder, chunk, at, group_n)
                n_p += np.bincount(group_n[group_n >= 0], minlength=len(groups))
        description = {**request.description(plan, groupby), "use_posterior": use_posterior}
        return gene_ablation(total_pgs, n_p, groups, genes, plan.names, description)

    @with_torch_threads
    @fill_docstring
    def get_explained_deviance(
        self,
        groupby: str | None = None,
        adata: AnnData | None = None,
        indices: Any = None,
        latents: Any = None,
        mode: Mode = "zero",
        *,
        value: Any = None,
        batch_size: int | None = None,
        dataloader: Any = None,
        silent: bool | None = None,
    ) -> pd.DataFrame:
        """Share of the deviance of the counts that each latent explains, by itself and with the latents before it.

        ``D(S)`` is the deviance with the latents outside S replaced: twice the log-likelihood lost against a mean equal to
        the count, at the model's dispersion, library size and dropout logits. ``D(null)`` is the deviance of a null model
        that has only the library size and batch of each cell: its mean is the pooled share of each gene in the counts of
        the batch, computed from the selected cells. Latents are not independent, so ``explained_deviance`` does not add up
        to the whole; ``cumulative`` does.

        Parameters
        ----------
        %(groupby)s
            The null model is the same for all groups.
        %(adata_of_model)s
        indices
            Cells of ``adata`` to summarise, as positions or a mask, such as ``indices=model.validation_indices`` for the
            cells held out in training; all if None. The null model is computed from these cells. The order by KL and the
            means of ``mode="mean"`` are computed from all cells of ``adata``.
        latents
            Order in which latents are added up, as names or positions. If None: descending KL over all cells of ``adata``, or
            the numbering of the factors after ``rotate("deviance")`` and :meth:`order_factors`. Latents that are not in it are
            replaced throughout.
        %(mode)s

            ``"permute"`` and ``"prior"`` are not allowed here: the deviance would change with each draw.
        %(value)s
        %(batch_size)s
        %(dataloader)s
            It is read twice, and a third time for the order by KL or a mean.
        %(silent)s

        Returns
        -------
        DataFrame with one row for each group and latent, in order:

        * ``group``, ``factor``, ``n_cells``;
        * ``explained_deviance``: ``(D(all but it) - D(all)) / D(null)``;
        * ``cumulative``: ``1 - D(the latent and those before it) / D(null)``;
        * ``without_latents``: ``1 - D(none) / D(null)``, from the intercepts only, the start of ``cumulative``; NaN for ``"drop"``.

        All of them can be negative: the null model uses the counts of these cells, and the intercepts, or a latent library
        size far from a cell's total, can fit worse. NaN where the null model fits exactly, as for a single cell.

        Raises
        ------
        ValueError
            As for :meth:`ablate`, or if the mode draws at random.
        TypeError
            If ``adata`` is no AnnData, or ``dataloader`` an iterator.

        Examples
        --------
        >>> table = model.get_explained_deviance()
        >>> bool((table["cumulative"].diff()[1:] > 0).all())  # each adds something
        True
        """
        # The deviance would change with each draw of random latents.
        check_one_of("mode", mode, [known for known in MODES if known not in RANDOM_MODES])
        if isinstance(dataloader, Iterator):
            raise TypeError(READ_TWICE)
        self._check_has_counts("get_explained_deviance")
        request = ablation_request(
            self, dataloader, groupby, None, latents=latents, mode=mode, value=value, scheme="keep_top"
        )
        groups, code_n = groups_of_cells(self, adata, groupby)
        profile = PooledProfile(*request.decoder.intercept_bg.shape)
        with factor_stream(self, adata, indices, batch_size, dataloader) as cells:
            for chunk in cells.chunks:
                profile.add(chunk)
        plan = explained_sets(ablation_plan(self, request, adata, code_n, batch_size, dataloader))
        sums = ExplainedSums(len(groups), plan)
        with factor_stream(self, adata, indices, batch_size, dataloader, silent=silent) as cells:
            chunks = ablated_chunks(self, cells, silent=silent)
            for chunk, at in with_positions(chunks, cells.positions):
                sums.add(request.decoder, chunk, at, codes_at(code_n, at), profile.share_bg)
        return pd.DataFrame(sums.columns(groups, self.factor_names))

    @fill_docstring
    def get_ablated_expression(
        self,
        latents: Any,
        mode: Mode = "zero",
        adata: AnnData | None = None,
        indices: Any = None,
        transform_batch: Any = None,
        gene_list: list[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        batch_size: int | None = None,
        return_numpy: bool | None = None,
        silent: bool | None = None,
        dataloader: Any = None,
        *,
        value: Any = None,
        groupby: str | None = None,
        seed: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Decoded expression with latents taken out, all of them at once.

        Equals ``get_normalized_expression(use_posterior_mean=True)`` with these latents replaced.

        Parameters
        ----------
        latents
            Latents to take out together: names (``"Z_3"``; ``"F_3"`` under a rotation) or positions.
        %(mode)s
        %(adata_of_model)s
        %(indices)s
        transform_batch, gene_list, library_size, return_numpy
            As in :meth:`get_normalized_expression`.
        %(batch_size)s
        %(silent)s
        %(dataloader)s
            It is read twice if the latents of all cells are needed first.
        %(value)s
        %(groupby_of_mode)s
        %(seed)s
            The seed is ``scvi.settings.seed`` if None, and 0 if that is None, too.

        Returns
        -------
        Cells x genes, float32.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`ablate`.

        Examples
        --------
        >>> model.get_ablated_expression("Z_0").shape
        (700, 765)
        """
        request = ablation_request(
            self, dataloader, groupby, None, latents={"all": latents}, mode=mode, value=value, seed=seed
        )
        request.reject_unused_groups()
        _, code_n = groups_of_cells(self, adata, groupby)
        plan = ablation_plan(self, request, adata, code_n, batch_size, dataloader)
        return posterior_mean_expression(
            self,
            adata,
            indices,
            transform_batch,
            gene_list,
            library_size,
            batch_size,
            return_numpy,
            silent,
            dataloader,
            edit=lambda chunk, at: plan.replaced(chunk, at, codes_at(code_n, at)),
            rotation=self.rotation,
        )
