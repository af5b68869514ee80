"""Ablation: change of each cell's likelihood without a latent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi.utils import track

from ldvae_ext._groups import codes_at, gene_ablation
from ldvae_ext._keys import ABLATION_INFO
from ldvae_ext._validate import check_one_of
from ldvae_ext.core.explained import ExplainedSums, PooledProfile, explained_sets
from ldvae_ext.core.plan import MODES, Mode, Scheme
from ldvae_ext.model._axes import factor_stream
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import with_positions
from ldvae_ext.model._expression import posterior_mean_expression
from ldvae_ext.model._requests import (
    READ_TWICE,
    ablation_plan,
    ablation_request,
    groups_of_cells,
    with_fraction_warning,
)
from ldvae_ext.model._threads import with_torch_threads


class AblationMixin(LDVAEBase):
    """Ablation of latents: paired, streamed, on raw counts."""

    @with_torch_threads
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
        use_posterior: Literal["mean", "samples"] = "mean",
        n_samples: int | None = None,
        seed: int | None = None,
        transform_batch: Any = None,
        batch_size: int | None = None,
        dataloader: Any = None,
        silent: bool = True,
    ) -> AnnData:
        """Change of each cell's negative log-likelihood when latents are taken out.

        Every cell is compared with itself: ``NLL(x | latents replaced) - NLL(x | all latents)``, with the same latent,
        library size, dispersion and dropout logits on both sides, and no noise between them, so two calls give the same
        numbers. Likelihoods are scvi-tools' own. See :func:`ldvae_ext.core.ablation_effects` for the formula.

        Parameters
        ----------
        adata
            Cells to ablate; the model's own if None. Unseen cells are encoded; the AnnData is not written to.
        indices
            Cells of ``adata`` to ablate, as positions or a mask.
        latents
            Latents to take out, one at a time: names (``"Z_3"``; ``"F_3"`` while a rotation is in force) or positions; all if
            None. A mapping from a name to several takes each of these sets out as a whole. With ``scheme="keep_top"`` the
            order in which latents are kept; if None by descending KL over all cells of ``adata``, or as they are numbered
            after ``rotate("deviance")`` and :meth:`order_factors`.
        mode
            What a latent is replaced by (u under ``latent_distribution="ln"``, where z = softmax(u)):

            * ``"zero"``: 0, the prior mean;
            * ``"mean"``: its mean over all cells of ``adata``, whichever are asked for by ``indices``, so that what varies is
              taken away;
            * ``"group_mean"``: its mean over all cells of the cell's group of ``groupby``, so that what varies inside the
              group is; NaN for a cell without a group;
            * ``"permute"``: that of another cell of ``adata``, drawn without replacement, one donor for all latents of a cell;
              keeps the marginal distribution, breaks the link to the cell;
            * ``"prior"``: a standard normal draw;
            * ``"value"``: ``value``;
            * ``"drop"``: only under ``"ln"``: z = 0, and the other latents renormalised to sum to 1.
        value
            For ``mode="value"``: one number, one for each latent, or a mapping from names, which names the latents, too, if
            ``latents`` does not.
        groupby
            For ``mode="group_mean"``: a column of ``obs``.
        scheme
            ``"leave_out"``: the named latents are replaced. ``"leave_in"``: all others are. ``"keep_top"``: all but the first
            j are, for j from 0 (1 for ``"drop"``) to the number of latents.
        refit_heads
            Whether dropout logits (``"zinb"``) and dispersion (``"gene-cell"``) follow the replaced latents.
        use_posterior
            ``"mean"``: latents are the posterior means. ``"samples"``: the mean effect over draws from each cell's posterior, the
            same draws on both sides (common random numbers); donors are drawn with theirs. The library is not drawn.
        n_samples
            Draws for ``use_posterior="samples"``; 10 if None.
        seed
            Seed of ``"permute"``, ``"prior"`` and ``"samples"``; ``scvi.settings.seed`` if None, or 0. Draws belong to (seed,
            position of the cell in ``adata``) and depend on nothing else.
        transform_batch
            Batch, or batches, in which cells are decoded on both sides; their own if None. Effects are averaged over several.
        batch_size
            Cells per minibatch; ``scvi.settings.batch_size`` if None. The result does not depend on it.
        dataloader
            Minibatches of cells, instead of ``adata``. Their names are positions, since they bring no obs. What needs the
            latents of all cells first reads them twice.
        silent
            Whether to hide the progress bar.

        Returns
        -------
        AnnData, cells x sets of latents, in the network's order. ``X`` is float64, in nats per cell: positive where the
        latents help to explain the cell, negative where they hurt. ``obs`` is a copy; ``uns["ldvae_ablation"]`` says what was
        done.

        Raises
        ------
        ValueError
            If a latent, mode, batch or group does not exist, an argument has no use in the mode, or the model's data are
            minified without counts.
        TypeError
            If ``adata`` is no AnnData, or ``dataloader`` an iterator that would have to be read twice.
        """
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
            use_posterior=use_posterior,
            n_samples=n_samples,
            seed=seed,
        )
        request.reject_unused_groups()
        _, code_n = groups_of_cells(self, adata, groupby)
        plan = ablation_plan(self, request, adata, code_n, batch_size, dataloader)
        with factor_stream(self, adata, indices, batch_size, dataloader) as cells:
            parts = [
                plan.effects(request.decoder, chunk, at, codes_at(code_n, at))
                for chunk, at in with_positions(
                    track(
                        with_fraction_warning(self, cells.chunks),
                        description="Ablating",
                        total=cells.n_chunks,
                        disable=silent,
                    ),
                    cells.positions,
                )
            ]
            obs = None if cells.obs is None else cells.obs.copy()
        return AnnData(
            X=np.concatenate(parts) if parts else np.empty((0, len(plan.sets))),
            obs=obs,
            var=pd.DataFrame(index=plan.names),
            uns={ABLATION_INFO: request.description(plan, groupby)},
        )

    @with_torch_threads
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
        use_posterior: Literal["mean", "samples"] = "mean",
        n_samples: int | None = None,
        seed: int | None = None,
        transform_batch: Any = None,
        batch_size: int | None = None,
        dataloader: Any = None,
        silent: bool = True,
    ) -> AnnData:
        """What each gene contributes to the effect of an ablation, averaged over the cells of each group.

        The sum over genes is the mean effect of :meth:`ablate` in the group. Sums are streamed: cells x genes x latents are
        never held.

        Parameters
        ----------
        groupby
            Column of ``obs``; cells without a value are left out. All cells are one group if None.
        adata, indices, latents, mode, value, scheme, refit_heads, use_posterior, n_samples, seed, transform_batch
            As in :meth:`ablate`; ``mode="group_mean"`` takes the groups of ``groupby``.
        batch_size, dataloader, silent
            As in :meth:`ablate`. A data loader brings no obs, so that there are no groups.

        Returns
        -------
        AnnData, (groups x genes) x sets of latents, in the network's order; :func:`ldvae_ext.get.gene_ablation_df` reads it as
        a long table. ``X`` is float64, in nats per cell of the group; ``obs`` has ``group``, ``gene`` and ``n_cells``;
        ``uns["ldvae_ablation"]`` says what was done.
        """
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
            use_posterior=use_posterior,
            n_samples=n_samples,
            seed=seed,
        )
        groups, code_n = groups_of_cells(self, adata, groupby)
        plan, genes = ablation_plan(self, request, adata, code_n, batch_size, dataloader), request.decoder.genes
        total_pgs, n_p = np.zeros((len(groups), len(genes), len(plan.sets))), np.zeros(len(groups), dtype=np.int64)
        with factor_stream(self, adata, indices, batch_size, dataloader) as cells:
            chunks = track(
                with_fraction_warning(self, cells.chunks), description="Ablating", total=cells.n_chunks, disable=silent
            )
            for chunk, at in with_positions(chunks, cells.positions):
                group_n = codes_at(code_n, at)
                plan.add_gene_effects(total_pgs, request.decoder, chunk, at, group_n)
                n_p += np.bincount(group_n[group_n >= 0], minlength=len(groups))
        return gene_ablation(total_pgs, n_p, groups, genes, plan.names, request.description(plan, groupby))

    @with_torch_threads
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
        silent: bool = True,
    ) -> pd.DataFrame:
        """Share of the deviance of the counts that each latent explains, alone and with those before it.

        ``D(S)`` is the deviance (twice the log-likelihood lost against a mean equal to the count, at the model's dispersion,
        library and dropout logits) with the latents outside S replaced; ``D(null)`` that of a model which knows of a cell only
        its library and batch: the pooled share of each gene in the counts of the batch, taken from the very cells that are
        looked at. Latents are not independent, so that ``explained_deviance`` does not add up to the whole; ``cumulative`` does.

        Parameters
        ----------
        groupby
            Column of ``obs``; the deviances of a group are those of its cells, against the same null model. All cells are one
            group if None.
        adata, indices
            Cells to look at, such as ``indices=model.validation_indices`` for those that were held out in training; the null
            model is theirs. Other cells of ``adata`` count for the order by KL and for the means of ``mode="mean"``.
        latents
            Order in which latents are added up; if None as for ``scheme="keep_top"`` of :meth:`ablate`. Those left out are
            replaced throughout.
        mode, value
            What a latent is replaced by, see :meth:`ablate`; not the random ones.
        batch_size, dataloader, silent
            As in :meth:`ablate`; a data loader is read twice, and once more for the order by KL or a mean.

        Returns
        -------
        One row for each group and latent, in order: ``group``, ``factor``, ``n_cells``, ``explained_deviance``
        (``(D(all but it) - D(all)) / D(null)``), ``cumulative`` (``1 - D(it and those before it) / D(null)``) and
        ``without_latents``, what ``cumulative`` starts from: that of the intercepts alone (NaN for ``"drop"``). All of them can be
        negative: the null model knows the counts of these cells, and the intercepts, or a latent library that is far from a
        cell's total, may do worse. NaN where the null model fits exactly, as it does a single cell.
        """
        # With random latents it would be another at each draw.
        check_one_of("mode", mode, [known for known in MODES if known not in ("permute", "prior")])
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
        with factor_stream(self, adata, indices, batch_size, dataloader) as cells:
            chunks = track(
                with_fraction_warning(self, cells.chunks), description="Ablating", total=cells.n_chunks, disable=silent
            )
            for chunk, at in with_positions(chunks, cells.positions):
                sums.add(request.decoder, chunk, at, codes_at(code_n, at), profile.share_bg)
        return pd.DataFrame(sums.columns(groups, self.factor_names))

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
        silent: bool = True,
        dataloader: Any = None,
        *,
        value: Any = None,
        groupby: str | None = None,
        seed: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Decoded expression with latents taken out, all of them at once.

        What ``get_normalized_expression(use_posterior_mean=True)`` would be without them.

        Parameters
        ----------
        latents
            Latents to take out together: names (``"Z_3"``) or positions.
        mode, value, groupby, seed
            What they are replaced by; see :meth:`ablate`.
        adata, indices, transform_batch, gene_list, library_size, batch_size, return_numpy, silent, dataloader
            As in :meth:`get_normalized_expression`.

        Returns
        -------
        Cells x genes, float32.
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
