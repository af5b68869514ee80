"""Share of the variation in counts that a decoder explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import xlogy

from ldvae_ext.core._changes import to_log_rate
from ldvae_ext.core.cells import EncodedCells, dense, indicator
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.heads import heads_at
from ldvae_ext.core.likelihood import deviance, sparse_deviance
from ldvae_ext.core.plan import AblationPlan
from ldvae_ext.core.posterior import deterministic_latent


class PooledProfile:
    """Share of each gene in the counts of each batch: the expectation for a cell of which only the batch is known.

    Running sums over cells, with which ``share_bg = sum x / sum library``.
    """

    def __init__(self, n_batches: int, n_genes: int) -> None:
        self._counts_bg = np.zeros((n_batches, n_genes))
        self._library_b = np.zeros(n_batches)

    def add(self, cells: EncodedCells, times_n: np.ndarray | None = None) -> None:
        """Count some cells in, each once or the given number of times."""
        times_n = np.ones(len(cells.batch)) if times_n is None else times_n
        batches_bn = indicator(cells.batch, len(self._library_b)) @ sparse.diags_array(times_n)
        self._counts_bg += dense(batches_bn @ cells.counts)
        self._library_b += batches_bn @ cells.library

    @property
    def share_bg(self) -> np.ndarray:
        """Shape (batches, genes); 0 for a batch without cells."""
        library_b1 = self._library_b[:, None]
        return np.divide(self._counts_bg, library_b1, where=library_b1 > 0, out=np.zeros_like(self._counts_bg))


def cell_deviances(decoder: LinearDecoder, cells: EncodedCells, share_bg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deviance of each cell at its posterior mean and under the null model, each of shape (cells,).

    Both have the dispersion, dropout logits and library of the decoder at the posterior mean; the null model's mean is
    the library times the share of each gene in the batch.
    """
    x_ng = dense(cells.counts)
    z_nk = deterministic_latent(np.asarray(cells.mean, dtype=np.float64), decoder.latent_distribution)
    theta, dropout_ng = heads = _heads(decoder, z_nk, cells)
    null_n = _null_deviance(decoder, cells, share_bg, *heads)
    if decoder.likelihood == "poisson":
        log_ng = decoder.logits(z_nk, decoder.batches[cells.batch], cells.covariates)
        to_log_rate(decoder, log_ng, np.asarray(cells.library, dtype=np.float64).reshape(-1, 1))
        change_ng = xlogy(x_ng, x_ng) - x_ng + np.exp(log_ng)
        change_ng -= np.where(x_ng > 0, x_ng * log_ng, 0.0)
        return 2 * change_ng.sum(axis=1), null_n
    full_ng = decoder.rate(z_nk, decoder.batches[cells.batch], cells.covariates, library=cells.library)
    return deviance(decoder.likelihood, x_ng, full_ng, theta, dropout_ng).sum(axis=1), null_n


def null_deviance(decoder: LinearDecoder, cells: EncodedCells, share_bg: np.ndarray) -> np.ndarray:
    """Deviance of each cell under the null model, shape (cells,); see :func:`cell_deviances`."""
    z_nk = deterministic_latent(np.asarray(cells.mean, dtype=np.float64), decoder.latent_distribution)
    return _null_deviance(decoder, cells, share_bg, *_heads(decoder, z_nk, cells))


def _heads(
    decoder: LinearDecoder, z_nk: np.ndarray, cells: EncodedCells
) -> tuple[np.ndarray | None, np.ndarray | None]:
    label = None if decoder.labels is None else decoder.labels[cells.label]
    return heads_at(decoder, z_nk, decoder.batches[cells.batch], cells.covariates, label)


def _null_deviance(
    decoder: LinearDecoder,
    cells: EncodedCells,
    share_bg: np.ndarray,
    theta: np.ndarray | None,
    dropout_ng: np.ndarray | None,
) -> np.ndarray:
    null_ng = share_bg[cells.batch]
    null_ng *= cells.library[:, None]
    if decoder.likelihood in ("nb", "poisson"):
        return sparse_deviance(decoder.likelihood, cells.counts, null_ng, theta)
    return deviance(decoder.likelihood, dense(cells.counts), null_ng, theta, dropout_ng).sum(axis=1)


def is_explained(null_p: np.ndarray, counts_p: np.ndarray) -> np.ndarray:
    """True for groups with a deviance to explain: a null model may fit exactly, such as that of a single cell."""
    return null_p > 1e-9 * (1 + counts_p)


def explained_sets(plan: AblationPlan) -> AblationPlan:
    """Plan of a scree: replace each latent of the order by itself, then all but the first 0, 1, 2, ... latents."""
    whole = np.arange(plan.value_pk.shape[1])
    alone = [np.array([k]) for k in plan.order]
    beyond = [np.setdiff1d(whole, plan.order[:j]) for j in range(len(plan.order) + 1)]
    # On the simplex not all latents can be dropped. This set keeps all of them, and its value is not reported.
    beyond[0] = beyond[0] if plan.mode != "drop" else beyond[-1]
    return replace(plan, sets=[*alone, *beyond])


class ExplainedSums:
    """Deviances of groups of cells: running sums."""

    def __init__(self, n_groups: int, plan: AblationPlan) -> None:
        self._plan = plan
        self._n_p = np.zeros(n_groups, dtype=np.int64)
        self._full_p, self._null_p, self._counts_p = np.zeros(n_groups), np.zeros(n_groups), np.zeros(n_groups)
        self._lost_ps = np.zeros((n_groups, len(plan.sets)))

    def add(
        self,
        decoder: LinearDecoder,
        cells: EncodedCells,
        position_n: np.ndarray,
        group_n: np.ndarray,
        share_bg: np.ndarray,
    ) -> None:
        """Count some cells in; ``share_bg`` is the null model's."""
        indicator_pn = indicator(group_n, len(self._n_p))
        full_n, null_n = cell_deviances(decoder, cells, share_bg)
        self._n_p += indicator_pn.sum(axis=1).astype(np.int64)
        self._full_p += indicator_pn @ full_n
        self._null_p += indicator_pn @ null_n
        self._counts_p += indicator_pn @ np.asarray(cells.counts.sum(axis=1), dtype=np.float64).ravel()
        # A deviance is twice a log-likelihood.
        self._lost_ps += 2 * (indicator_pn @ self._plan.effects(decoder, cells, position_n, group_n))

    def columns(self, groups: Sequence[str], factors: Sequence[str]) -> dict[str, Any]:
        """A long table, column by column: each group's latents, in order."""
        order, (present_p,) = self._plan.order, np.nonzero(self._n_p)
        null_p1 = np.where(is_explained(self._null_p, self._counts_p), self._null_p, np.nan)[present_p, None]
        alone_pk, beyond_pj = np.split(self._lost_ps[present_p], [len(order)], axis=1)
        explained_pj = 1 - (self._full_p[present_p, None] + beyond_pj) / null_p1
        if self._plan.mode == "drop":
            explained_pj[:, 0] = np.nan
        return {
            "group": np.repeat(np.asarray(groups)[present_p], len(order)),
            "factor": np.tile(np.asarray(factors)[order], len(present_p)),
            "n_cells": np.repeat(self._n_p[present_p], len(order)),
            "explained_deviance": (alone_pk / null_p1).ravel(),
            "cumulative": explained_pj[:, 1:].ravel(),
            "without_latents": np.repeat(explained_pj[:, 0], len(order)),
        }
