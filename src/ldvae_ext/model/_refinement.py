"""Posteriors from the decoder instead of the encoder, and what the encoder loses against them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

from ldvae_ext._groups import codes_at
from ldvae_ext._validate import cell_positions, check_positive_int
from ldvae_ext.core.draws import POSTERIOR, normal_draws
from ldvae_ext.core.evidence import evidence_bound, sampled_evidence
from ldvae_ext.model._axes import network_decoder, refine
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import given_cells, stream_cells, with_positions
from ldvae_ext.model._registry import has_size_factors
from ldvae_ext.model._requests import groups_of_cells
from ldvae_ext.model._threads import with_torch_threads


@dataclass(frozen=True, eq=False, repr=False)
class RefinedPosterior:
    """Posteriors of cells from the decoder alone, from :meth:`LDVAE.get_refined_posterior`.

    Examples
    --------
    >>> posterior = model.get_refined_posterior(indices=np.arange(100))
    >>> posterior.covariance.shape
    (100, 5, 5)
    """

    mean: pd.DataFrame
    """Posterior modes (of u under ``"ln"``), cells x factors."""
    variance: pd.DataFrame
    """Marginal posterior variances, cells x factors."""
    covariance: np.ndarray
    """Posterior covariances, shape (cells, factors, factors)."""
    log_evidence: pd.Series
    """Laplace's approximation of the log marginal likelihood of each cell, in nats."""
    converged: pd.Series
    """False for cells whose mode was not found to the last digits."""

    def __repr__(self) -> str:
        return f"RefinedPosterior of {len(self.mean)} cells and {self.mean.shape[1]} factors; {int(self.converged.sum())} converged"


class RefinementMixin(LDVAEBase):
    """Refined posteriors and the amortization gap."""

    @with_torch_threads
    def get_refined_posterior(
        self, adata: AnnData | None = None, indices: Any = None, *, batch_size: int | None = None
    ) -> RefinedPosterior:
        """Posterior of each cell given the decoder: the mode by Newton's method, and its curvature.

        The encoder gives an approximation that has been learned for all cells at once. Given the decoder, the posterior of a
        single cell can be computed (:func:`ldvae_ext.core.posterior_of`); on cells that were not trained on it can differ a
        good deal, see :meth:`get_amortization_gap`. Library sizes are those that :meth:`export_to_anndata` writes. The model stays
        as it is.

        Parameters
        ----------
        adata, indices, batch_size
            Cells with counts, as in :meth:`get_latent_representation`.

        Returns
        -------
        A :class:`RefinedPosterior`, on the axes in force (``F_0``, ... under a rotation).

        Raises
        ------
        ValueError
            If there are no counts or no cells.

        Examples
        --------
        >>> posterior = model.get_refined_posterior(indices=np.arange(100))
        >>> posterior.mean.shape, bool(posterior.converged.all())
        ((100, 5), True)
        """
        self._check_has_counts("get_refined_posterior")
        decoder, parts = network_decoder(self), []
        with stream_cells(self, adata, indices, batch_size) as cells:
            parts = [refine(decoder, chunk) for chunk in cells.chunks]
            names = None if cells.obs is None else cells.obs.index
        if not parts:
            msg = "There are no cells to look at."
            raise ValueError(msg)
        mean_nk, _, covariance_nkk, log_evidence_n, converged_n = (
            np.concatenate([part[i] for part in parts]) for i in range(5)
        )
        if self.rotation is not None:
            rotation_kk = self.rotation.matrix_kk
            mean_nk, covariance_nkk = mean_nk @ rotation_kk, rotation_kk.T @ covariance_nkk @ rotation_kk
        variance_nk = np.diagonal(covariance_nkk, axis1=1, axis2=2)
        return RefinedPosterior(
            pd.DataFrame(mean_nk, index=names, columns=self.factor_names),
            pd.DataFrame(variance_nk, index=names, columns=self.factor_names),
            covariance_nkk,
            pd.Series(log_evidence_n, index=names, name="log_evidence"),
            pd.Series(converged_n, index=names, name="converged"),
        )

    @with_torch_threads
    def get_amortization_gap(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        groupby: str | None = None,
        *,
        n_samples: int = 10,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """ELBO that the encoder loses against the posterior from the decoder alone (Cremer et al. 2018, arXiv:1801.03558).

        Both sides use the same library sizes and the same random numbers. The refined posterior is normal with the mode and
        the full covariance of :meth:`get_refined_posterior`, so that a part of the gap is due to the encoder's diagonal
        covariance.

        Parameters
        ----------
        adata, indices, batch_size
            Cells with counts, as in :meth:`get_latent_representation`.
        groupby
            Column of ``obs``: means of its groups instead of a row for each cell.
        n_samples
            Draws from each posterior.
        seed
            Seed of the draws; ``scvi.settings.seed`` if None, or 0.

        Returns
        -------
        ``encoder`` and ``refined``, the ELBO in nats given the library size, and ``gap``, their difference (positive where the
        refined posterior is better), for each cell; with ``groupby`` their means and ``n_cells`` for each group.

        Raises
        ------
        ValueError
            If there are no counts or no cells.

        Examples
        --------
        >>> table = model.get_amortization_gap(groupby="phase")
        >>> table.columns.tolist()
        ['encoder', 'refined', 'gap', 'n_cells']
        """
        self._check_has_counts("get_amortization_gap")
        check_positive_int("n_samples", n_samples)
        groups, code_n = groups_of_cells(self, adata, groupby)
        seed = (scvi.settings.seed or 0) if seed is None else seed
        table = cell_bounds(self, adata, indices, n_samples=n_samples, seed=seed, batch_size=batch_size)
        if groupby is None:
            return table
        group_n = codes_at(code_n, cell_positions(indices, given_cells(self, adata).n_obs))
        inside = group_n >= 0
        label = pd.Categorical(np.asarray(groups)[group_n[inside]], categories=groups)
        grouped = table[inside].groupby(pd.Series(label, index=table.index[inside]), observed=True)
        return grouped.mean().assign(n_cells=grouped.size()).rename_axis("group")


def cell_bounds(
    model: LDVAEBase,
    adata: AnnData | None = None,
    indices: Any = None,
    *,
    n_samples: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """ELBO of each cell under the encoder's posterior and the refined one; see :meth:`LDVAE.get_amortization_gap`."""
    decoder, encoder, refined = network_decoder(model), [], []
    with stream_cells(model, adata, indices, batch_size) as cells:
        for chunk, at in with_positions(cells.chunks, cells.positions):
            noise_snk = normal_draws(seed, POSTERIOR, at, model.n_latent, n_samples)
            found = refine(decoder, chunk)
            diagonal_nkk = np.asarray(chunk.variance, dtype=np.float64)[:, :, None] * np.eye(model.n_latent)
            encoder.append(evidence_bound(decoder, chunk, chunk.mean.astype(np.float64), diagonal_nkk, noise_snk))
            refined.append(evidence_bound(decoder, chunk, found.mean_nk, np.asarray(found.covariance_nkk), noise_snk))
        names = None if cells.obs is None else cells.obs.index
    if not encoder:
        msg = "There are no cells to look at."
        raise ValueError(msg)
    table = pd.DataFrame({"encoder": np.concatenate(encoder), "refined": np.concatenate(refined)}, index=names)
    return table.assign(gap=table["refined"] - table["encoder"])


def sampled_marginals(
    model: LDVAEBase, adata: AnnData | None, indices: Any, n_samples: int, batch_size: int | None
) -> np.ndarray:
    """Log marginal likelihood of each cell by importance sampling from refined posteriors, shape (cells,)."""
    check_positive_int("n_mc_samples", n_samples)
    model._check_has_counts("use_posterior='refined'")
    if not (model.module.use_observed_lib_size or has_size_factors(model.registry)):
        msg = (
            "`use_posterior='refined'` needs observed library sizes, or size factors: refined posteriors are given the library "
            "size of a cell, and this model has a prior of it."
        )
        raise ValueError(msg)
    decoder, seed, parts = network_decoder(model), scvi.settings.seed or 0, []
    with stream_cells(model, adata, indices, batch_size) as cells:
        for chunk, at in with_positions(cells.chunks, cells.positions):
            found = refine(decoder, chunk)
            noise_snk = normal_draws(seed, POSTERIOR, at, model.n_latent, n_samples)
            covariance_nkk = np.asarray(found.covariance_nkk)
            parts.append(sampled_evidence(decoder, chunk, found.mean_nk, covariance_nkk, noise_snk))
    return np.concatenate(parts) if parts else np.empty(0)
