"""Statistics of factors by all measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

from ldvae_ext._groups import codes_at
from ldvae_ext._scvi import ADATA_MINIFY_TYPE
from ldvae_ext._stats import FactorStats
from ldvae_ext._validate import cell_positions, check_positive_int, warn
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core._views import inverse_axes
from ldvae_ext.core.cells import indicator
from ldvae_ext.core.explained import PooledProfile, is_explained, null_deviance
from ldvae_ext.core.ledger import information_ledger
from ldvae_ext.core.plan import LatentSummary
from ldvae_ext.model._axes import ENCODER, UsePosterior, factor_decoder, factor_stream
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import given_cells, with_positions
from ldvae_ext.model._refinement import cell_bounds
from ldvae_ext.model._requests import ablated_chunks, ablation_request, groups_of_cells

# An ablation of each kind that a factor's weight is measured by.
_ABLATIONS = ("zero", "mean", "permute")
# Draws from the posteriors of a group that the sampled terms are means over, at least.
_N_DRAWS = 20_000


class StatsMixin(LDVAEBase):
    """All measures of a factor, side by side."""

    def get_factor_stats(
        self,
        groupby: str | None = None,
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        max_cells: int = 5000,
        seed: int | None = None,
        batch_size: int | None = None,
        silent: bool | None = None,
        use_posterior: UsePosterior = "encoder",
        amortization_gap: bool = False,
    ) -> FactorStats:
        """Statistics of each factor by all measures, for all cells or for each group.

        The mean KL of the posteriors from the prior splits, on orthogonal axes exactly, into three terms (Hoffman & Johnson 2016; Chen et al. 2018,
        arXiv:1802.04942), with ``q(f) = mean_n q(f|n)``, the mixture of the posteriors of the cells::

            mean_n KL(q(f|n) || p(f)) = I_q(f; n) + KL(q(f) || prod_k q(f_k)) + sum_k KL(q(f_k) || p(f_k))

        mutual information, total correlation and dimension-wise KL. The KL of a single factor, the usual measure of
        information, is the sum of the first and the last: ``KL_k = I_q(f_k; n) + KL(q(f_k) || p(f_k))``. The second term is
        the deviation of the factor's distribution over cells from a standard normal. Like an offset, it does not distinguish
        cells.

        Parameters
        ----------
        groupby
            Column of ``obs``, for instance the batch; cells without a value are left out. Mutual information is then
            that between the factor and the cell inside the group. All cells are one group, ``"all"``, if None.
        adata, indices
            Cells, as in :meth:`get_explained_deviance`.
        max_cells
            Cells of a group from which the decomposition is computed, drawn at random from larger groups: its cost grows with
            their square. ``kl``, ``active_unit`` and measures that need counts are computed from all cells.
        seed
            Of that draw, of the samples of the posterior and of the permutation; ``scvi.settings.seed`` if None, or 0.
        batch_size, silent
            As in :meth:`ablate`.
        use_posterior
            ``"encoder"``: posteriors are those of the network's encoder. ``"refined"``: modes and marginal variances of
            :meth:`get_refined_posterior`, from the decoder and the counts of each cell.
        amortization_gap
            True to add ``amortization_gap`` to ``totals``: the mean over the cells of each group, see
            :meth:`get_amortization_gap`.

        Returns
        -------
        A :class:`ldvae_ext.model.FactorStats` with ``factors``, ``totals`` (in which the identity closes on orthogonal axes, but for the error of the
        samples), ``ranks()`` and ``agreement()``. For each factor (of a rotation, if one is in force), larger is more:

        * ``kl``: mean KL of its posterior, in nats (``kl_bits``: in bits);
        * ``mutual_information``: ``I_q(f_k; n)``, at most the logarithm of the number of cells;
        * ``dimension_wise_kl``: ``KL(q(f_k) || p(f_k))``;
        * ``total_correlation``: ``I_q(f_k; f_others)``, mutual information of the factor and all others together;
        * ``active_unit``: variance over cells of the posterior mean (Burda et al. 2016, arXiv:1509.00519);
        * ``explained_deviance``: see :meth:`get_explained_deviance`, ``mode="zero"``;
        * ``ablation_zero``, ``ablation_mean``, ``ablation_permute``: mean effect of :meth:`ablate`, in nats per cell.

        Under ``latent_distribution="ln"`` the first five are those of u, with z = softmax(u). From data that were minified without
        counts the last four are NaN, with a warning.

        Raises
        ------
        KeyError, ValueError
            If there is no such column, or no cells.

        Examples
        --------
        >>> stats = model.get_factor_stats()
        >>> stats.table()[["kl", "explained_deviance", "ablation_zero"]].shape
        (5, 3)
        """
        return factor_stats(
            self,
            groupby,
            adata,
            indices,
            max_cells=max_cells,
            seed=seed,
            batch_size=batch_size,
            silent=silent,
            use_posterior=use_posterior,
            amortization_gap=amortization_gap,
        )


def factor_stats(
    model: LDVAEBase,
    groupby: str | None = None,
    adata: AnnData | None = None,
    indices: Any = None,
    *,
    max_cells: int = 5000,
    seed: int | None = None,
    batch_size: int | None = None,
    silent: bool | None = None,
    use_posterior: str = ENCODER,
    amortization_gap: bool = False,
) -> FactorStats:
    """See :meth:`ldvae_ext.model.LDVAE.get_factor_stats`."""
    check_positive_int("max_cells", max_cells)
    has_counts = model.minified_data_type != ADATA_MINIFY_TYPE.LATENT_POSTERIOR
    if not has_counts:
        warn(
            "The data were minified without counts: explained deviance and the effects of ablation are NaN. "
            f"`minify_adata({ADATA_MINIFY_TYPE.LATENT_POSTERIOR_WITH_COUNTS!r})` keeps counts."
        )
    groups, code_n = groups_of_cells(model, adata, groupby)
    seed = (0 if scvi.settings.seed is None else scvi.settings.seed) if seed is None else seed
    n_all = given_cells(model, adata).n_obs
    positions = cell_positions(indices, n_all)
    times_n = np.bincount(positions, minlength=n_all).astype(np.float64)
    seen, profile = LatentSummary(model.n_latent, keep=True), PooledProfile(*factor_decoder(model).intercept_bg.shape)
    with factor_stream(model, adata, None, batch_size, use_posterior=use_posterior) as cells:
        for chunk, at in with_positions(cells.chunks, cells.positions):
            seen.add(chunk.mean, chunk.variance, axes=chunk.axes)
            if has_counts:
                profile.add(chunk, times_n[at])
    group_n = codes_at(code_n, positions)
    tables, totals = [], []
    mean_nk, axes = seen.latents()
    for p in np.unique(group_n[group_n >= 0]):
        inside = positions[group_n == p]
        information, total = _information(mean_nk[inside], axes.variance_nk[inside], axes.rotation_kk, max_cells, seed)
        tables.append(pd.DataFrame({"group": groups[p], "factor": model.factor_names, **information}))
        totals.append({"group": groups[p], **total})
    if not tables:
        msg = "There are no cells to look at."
        raise ValueError(msg)
    factors = pd.concat(tables, ignore_index=True)
    needing_counts: dict[str, Any] = dict.fromkeys(
        ("explained_deviance", *(f"ablation_{mode}" for mode in _ABLATIONS)), np.nan
    )
    if has_counts:
        needing_counts = _measures_of_counts(
            model, seen, profile, adata, positions, groups, code_n, seed, batch_size, silent, use_posterior
        )
    table = pd.DataFrame(totals)
    if amortization_gap:
        table["amortization_gap"] = _mean_gaps(model, adata, positions, group_n, batch_size, seed)
    return FactorStats(factors.assign(**needing_counts), table)


def _mean_gaps(
    model: LDVAEBase,
    adata: AnnData | None,
    positions: np.ndarray,
    group_n: np.ndarray,
    batch_size: int | None,
    seed: int,
) -> np.ndarray:
    """Mean amortization gap of the cells of each group that has any."""
    gap_n = cell_bounds(model, adata, positions, seed=seed, batch_size=batch_size)["gap"].to_numpy()
    return np.array([gap_n[group_n == p].mean() for p in np.unique(group_n[group_n >= 0])])


def _measures_of_counts(
    model: LDVAEBase,
    seen: LatentSummary,
    profile: PooledProfile,
    adata: AnnData | None,
    positions: np.ndarray,
    groups: list[str],
    code_n: np.ndarray | None,
    seed: int,
    batch_size: int | None,
    silent: bool | None,
    use_posterior: str,
) -> dict[str, np.ndarray]:
    """Explained deviance and mean effects of ablation, one value for each group and factor, groups first."""
    requests = {
        mode: ablation_request(model, None, None, None, mode=mode, seed=seed if mode == "permute" else None)
        for mode in _ABLATIONS
    }
    plans = {mode: request.plan(seen, default_seed=seed) for mode, request in requests.items()}
    decoder = requests["zero"].decoder
    share_bg = profile.share_bg
    null_p, counts_p = np.zeros(len(groups)), np.zeros(len(groups))
    total_mpk = {mode: np.zeros((len(groups), model.n_latent)) for mode in _ABLATIONS}
    n_p = np.zeros(len(groups))
    with factor_stream(model, adata, positions, batch_size, use_posterior=use_posterior, silent=silent) as cells:
        chunks = ablated_chunks(model, cells, silent=silent)
        for chunk, at in with_positions(chunks, cells.positions):
            group_n = codes_at(code_n, at)
            indicator_pn = indicator(group_n, len(groups))
            n_p += indicator_pn.sum(axis=1)
            for mode, plan in plans.items():
                total_mpk[mode] += indicator_pn @ plan.effects(decoder, chunk, at, group_n)
            null_p += indicator_pn @ null_deviance(decoder, chunk, share_bg)
            counts_p += indicator_pn @ np.asarray(chunk.counts.sum(axis=1), dtype=np.float64).ravel()
    (present_p,) = np.nonzero(n_p)
    # A deviance is twice a log-likelihood.
    null_p = np.where(is_explained(null_p, counts_p), null_p, np.nan)
    explained_pk = 2 * total_mpk["zero"][present_p] / null_p[present_p, None]
    effects = {
        f"ablation_{mode}": (total[present_p] / n_p[present_p, None]).ravel() for mode, total in total_mpk.items()
    }
    return {"explained_deviance": explained_pk.ravel(), **effects}


def _information(
    mean_nk: np.ndarray, variance_nk: np.ndarray, rotation_kk: np.ndarray, max_cells: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns of the factors of one group, and its totals; means are on rotated axes, variances on the network's."""
    n_cells = len(mean_nk)
    marginal_nk = variance_nk @ np.square(rotation_kk)
    kl_k = kl_per_dimension(mean_nk, marginal_nk).mean(axis=0)
    some = np.arange(n_cells)
    if n_cells > max_cells:
        some = np.sort(np.random.default_rng(seed).choice(n_cells, max_cells, replace=False))
    # With few cells, more draws for each of them give the same precision as thousands of cells.
    n_samples = max(1, _N_DRAWS // len(some))
    ledger = information_ledger(
        mean_nk[some] @ inverse_axes(rotation_kk), variance_nk[some], rotation_kk, n_samples=n_samples, seed=seed
    )
    information = {
        "n_cells": n_cells,
        "kl": kl_k,
        "kl_bits": kl_k / np.log(2),
        "mutual_information": ledger.mutual_information_k,
        "dimension_wise_kl": ledger.dimension_wise_kl_k,
        "total_correlation": ledger.total_correlation_k,
        "active_unit": mean_nk.var(axis=0),
    }
    total = {
        "n_cells": ledger.n_cells,
        "kl": ledger.kl,
        "mutual_information": ledger.mutual_information,
        "total_correlation": ledger.total_correlation,
        "dimension_wise_kl": ledger.dimension_wise_kl,
    }
    return information, total
