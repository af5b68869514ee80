"""Loadings of factors in populations of cells."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._groups import directions_table, groups_of, table_of
from ldvae_ext._validate import cell_positions
from ldvae_ext.core._expression import GroupExpression, check_library_size, gene_positions
from ldvae_ext.core.group_moments import GroupMoments
from ldvae_ext.core.populations import PopulationLoadings, PopulationRequest
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.model._axes import UsePosterior, factor_decoder, factor_stream, network_decoder, transform_batch_codes
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import given_cells, stream_cells, with_positions
from ldvae_ext.model._threads import with_torch_threads


class PopulationsMixin(LDVAEBase):
    """Loadings of populations."""

    def get_population_loadings(
        self,
        groupby: str,
        kind: Literal["gradient", "contribution", "path", "within"] = "gradient",
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        reference: str = "rest",
        scale: Literal["log", "expression"] | None = None,
        batch_size: int | None = None,
        use_posterior: UsePosterior = "encoder",
    ) -> dict[str, pd.DataFrame]:
        """Effect of each factor on each gene in each population, without retraining.

        Parameters
        ----------
        groupby
            Column of ``obs``; cells without a value are left out.
        kind
            * ``"gradient"``: the derivative of the decoder at the cells of the group, averaged over them:
              ``d rho_g / d z_k = rho_g (L_gk - E_rho[L_k])`` with the decoded expression ``rho`` of a cell, or with ``scale="log"``
              ``d log rho_g / d z_k = L_gk - E_rho[L_k]``. *On the log scale the genes of a factor have the same ranks in every
              population*: only a constant per factor differs. The expression scale shows which genes a factor moves in a
              population. (Under ``latent_distribution="ln"`` the derivative is along u, with z = softmax(u), and ranks differ.)
            * ``"contribution"``: the mean latent of the group minus that of the reference, times the centred loading: the factors
              that distinguish the group. Ranks of genes are the same here, too.
            * ``"path"``: the log-ratio of expression between the group's mean latent and the reference's, split exactly over
              factors; rows sum to ``log rho(group) - log rho(reference)``. Intercepts are averaged by the group's shares of the
              batches; their effect and that of covariates is in the column ``"batch"``, if there are any. See
              :func:`ldvae_ext.core.path_attribution`.
            * ``"within"``: variation *inside* the group: leading directions ``D_0``, ``D_1``, ... of the covariance of its latents,
              pushed through the centred loadings (the principal components of its cells' log-rates); change of the log-rate
              per standard deviation of the cells along the direction. Squares are the variance of each gene's log-rate that
              the direction explains.
              :meth:`get_population_directions` returns the share of each factor in a direction.
        adata, indices
            Cells, as in :meth:`get_latent_representation`; the reference too is made of them.
        reference
            Reference of ``"contribution"`` and ``"path"``: the cells of all other groups (``"rest"``), z = 0 (``"prior"``; u = 0
            under ``"ln"``), or the name of a group, which is then left out.
        scale
            For ``"gradient"``; ``"expression"`` if None.
        batch_size
            Cells per minibatch; the result does not depend on it.
        use_posterior
            ``"encoder"``: posteriors are those of the network's encoder. ``"refined"``: modes and marginal variances of
            :meth:`get_refined_posterior`, from the decoder and the counts of each cell.

        Returns
        -------
        Group -> genes x factors ``Z_i`` (directions for ``"within"``) in the network's order and signs, float64: share of
        expression, or log-rate, per unit of latent (``"gradient"``), else log-rate.

        Raises
        ------
        KeyError
            If ``groupby`` is no column.
        ValueError
            If a group or kind does not exist, a group is called as a reference is (``"rest"``, ``"prior"``), or an argument has no
            use for the kind.

        Notes
        -----
        No counts are needed, so that minified data can be used. Under a softplus link (size factors) nothing is centred over
        genes, since the link depends on the constant. There ``"gradient"`` and ``"path"`` are of ``log softplus``, and populations may rank genes
        otherwise on the log scale too; ``"contribution"`` and ``"within"`` are in units of the argument of the softplus, which is the
        log-rate only where expression is low.

        Examples
        --------
        >>> loadings = model.get_population_loadings("bulk_labels", "path")
        >>> loadings["CD14+ Monocyte"].shape
        (765, 5)
        """
        loadings, groups = _population_loadings(
            self, groupby, kind, adata, indices, reference, scale, batch_size, use_posterior
        )
        names = self.get_var_names()
        return {
            groups[p]: pd.DataFrame(value_gk, index=names, columns=loadings.columns)
            for p, value_gk in zip(loadings.groups, loadings.value_pgk, strict=True)
        }

    def get_population_directions(
        self,
        groupby: str,
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        batch_size: int | None = None,
        use_posterior: UsePosterior = "encoder",
    ) -> pd.DataFrame:
        """Share of each factor in the directions of variation inside each population.

        Parameters
        ----------
        groupby, adata, indices, batch_size
            As in :meth:`get_population_loadings`, whose ``kind="within"`` gives the genes.
        use_posterior
            As there.

        Returns
        -------
        One row for each group, direction and factor: ``group``, ``direction`` (``D_0``, ...), ``factor``, ``share`` of the factor in
        the direction (adding up to 1; negative if it opposes the others), ``variance`` of the log-rates along the
        direction, summed over genes, and ``variance_share``, its part in the variance of all directions of the group.

        Examples
        --------
        >>> table = model.get_population_directions("bulk_labels")
        >>> table.columns.tolist()
        ['group', 'direction', 'factor', 'share', 'variance', 'variance_share']
        """
        loadings, groups = _population_loadings(
            self, groupby, "within", adata, indices, "rest", None, batch_size, use_posterior
        )
        return directions_table(
            [groups[p] for p in loadings.groups],
            loadings.columns,
            self.factor_names,
            np.stack([d.share_jk for d in loadings.directions]),
            np.stack([d.variance_j for d in loadings.directions]),
        )

    @with_torch_threads
    def get_population_expression(
        self,
        groupby: str,
        adata: AnnData | None = None,
        indices: Any = None,
        transform_batch: Any = None,
        gene_list: list[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Mean decoded expression of each population, without an array of cells x genes.

        The means over the cells of each group of ``get_normalized_expression(use_posterior_mean=True)``, in float64 and in the
        memory of the result.

        Parameters
        ----------
        groupby
            Column of ``obs``; cells without a value are left out.
        adata, indices, transform_batch, gene_list, library_size, batch_size
            As in :meth:`get_normalized_expression`.

        Returns
        -------
        Populations x genes, float64.

        Raises
        ------
        KeyError
            If ``groupby`` is no column.
        ValueError
            If a batch or gene does not exist, or no cell has a group.

        Examples
        --------
        >>> model.get_population_expression("bulk_labels").shape
        (10, 765)
        """
        positions, groups, chosen_n = _chosen_groups(self, groupby, adata, indices)
        decoder = network_decoder(self)
        genes, codes = gene_positions(decoder.genes, gene_list), transform_batch_codes(self, transform_batch)
        check_library_size(library_size)
        sums = GroupExpression(decoder, len(groups))
        with stream_cells(self, adata, positions, batch_size) as cells:
            for chunk, at in with_positions(cells.chunks, None):
                z_nk = deterministic_latent(chunk.mean.astype(np.float64), decoder.latent_distribution)
                library = chunk.library if isinstance(library_size, str) else library_size
                for code in codes:
                    batch = decoder.batches[chunk.batch if code is None else np.full(len(z_nk), code)]
                    given = {"covariates": chunk.covariates, "library": library, "share": 1 / len(codes)}
                    sums.add(z_nk, batch, chosen_n[at], **given)
                sums.count(chosen_n[at])
        return pd.DataFrame(sums.mean_pg[:, genes], index=groups, columns=decoder.genes[genes])


def _chosen_groups(
    model: LDVAEBase, groupby: str, adata: AnnData | None, indices: Any
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Positions of the chosen cells, names of their groups, and their codes: of these cells only, so that none is empty."""
    source = given_cells(model, adata)
    positions = cell_positions(indices, source.n_obs)
    return positions, *groups_of(table_of(source.obs).iloc[positions], groupby)


def _population_loadings(
    model: LDVAEBase,
    groupby: str,
    kind: str,
    adata: AnnData | None,
    indices: Any,
    reference: str,
    scale: str | None,
    batch_size: int | None,
    use_posterior: str,
) -> tuple[PopulationLoadings, list[str]]:
    positions, groups, chosen_n = _chosen_groups(model, groupby, adata, indices)
    request = PopulationRequest(groups=groups, kind=kind, reference=str(reference), scale=scale)
    decoder = factor_decoder(model)
    moments = GroupMoments(decoder, len(groups), request.summed_scale)
    with factor_stream(model, adata, positions, batch_size, use_posterior=use_posterior) as cells:
        for chunk, at in with_positions(cells.chunks, None):
            z_nk = deterministic_latent(chunk.mean.astype(np.float64), decoder.latent_distribution)
            moments.add(z_nk, chunk.batch, chunk.covariates, chosen_n[at])
    return request.loadings(decoder, moments), groups
