"""Replication of factors and programs between models of disjoint cells."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ldvae_ext.core.matching import consensus_loadings, cosines, match_columns, procrustes
from ldvae_ext.core.rotation import promax
from ldvae_ext.core.scores import SlopeSums
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import stream_cells, with_positions
from ldvae_ext.model.programs import additive_programs, decoded_expression

# Genes that are compared.
N_TOP = 50


class Readout(NamedTuple):
    """Scores of genes and usages of cells, as one group of models gives them."""

    score_gk: np.ndarray
    """Loadings or gene scores, genes x factors."""
    usage_nk: np.ndarray
    """Usages of all cells, also of those that no model of the group was trained on, cells x factors."""

    def columns(self, order: np.ndarray, signs: np.ndarray | int) -> Readout:
        """Some of the factors, in another order and with other signs."""
        return Readout(self.score_gk[:, order] * signs, self.usage_nk[:, order] * signs)


class ConsensusFactors(NamedTuple):
    """Factors that several models have in common."""

    loading_gk: np.ndarray
    """Consensus loadings, genes x factors."""
    mean_gk: np.ndarray
    """Mean of the loadings of the models, rotated to the consensus."""
    usage_nk: np.ndarray
    """Mean of the posterior means of the cells, rotated to the consensus, cells x factors."""


def consensus_factors(models: Sequence[LDVAEBase]) -> ConsensusFactors:
    """Consensus of models of the same genes, and the mean of their posteriors of all cells on its axes.

    Parameters
    ----------
    models
        The models, with the same data.
    """
    loadings = [model.get_decoder().centered().weight_gk for model in models]
    consensus_gk = consensus_loadings(loadings)
    mean_gk, usage_nk = np.zeros_like(consensus_gk), np.zeros((models[0].adata.n_obs, consensus_gk.shape[1]))
    for model, loading_gk in zip(models, loadings, strict=True):
        rotation_kk, _ = procrustes(consensus_gk, loading_gk)
        mean_gk += loading_gk @ rotation_kk / len(models)
        with stream_cells(model, None, None, None) as cells:
            usage_nk += np.concatenate([chunk.mean @ rotation_kk for chunk in cells.chunks]) / len(models)
    return ConsensusFactors(consensus_gk, mean_gk, usage_nk)


def slopes(model: LDVAEBase, cells: np.ndarray, usages: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Gene scores of several usages from the counts of some cells of a model's data, genes x factors each."""
    sums = [SlopeSums(len(model.get_var_names()), usage_nk.shape[1]) for usage_nk in usages]
    with stream_cells(model, None, cells, None) as stream:
        for chunk, at in with_positions(stream.chunks, stream.positions):
            for one, usage_nk in zip(sums, usages, strict=True):
                one.add(chunk.counts, usage_nk[at])
    return [one.scores().score_gk for one in sums]


def readouts(models: Sequence[LDVAEBase], cells: np.ndarray, n_programs: int) -> dict[str, Readout]:
    """What several models of the same cells say of genes and cells, read in different ways.

    Parameters
    ----------
    models
        The models, with the same data.
    cells
        Positions of the cells that they were trained on, from whose counts gene scores and programs are computed.
    n_programs
        Number of additive programs.

    Returns
    -------
    ``"factors, loadings"`` and ``"factors"``: consensus of varimax, with its loadings and with gene scores; ``"promax"``: its
    oblique factors, with gene scores; ``"programs"``: additive programs.
    """
    found = consensus_factors(models)
    oblique_nk = found.usage_nk @ promax(found.mean_gk, np.eye(found.mean_gk.shape[1]))
    of_factors, of_oblique = slopes(models[0], cells, (found.usage_nk, oblique_nk))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*additive programs reproduce", category=UserWarning)
        programs = additive_programs(models, n_programs, indices=cells)
    everyone = np.arange(models[0].adata.n_obs)
    usages = [
        programs.additive.usages(expression_ng).usage_nk
        for _, _, expression_ng in decoded_expression(models, None, everyone, None)
    ]
    return {
        "factors, loadings": Readout(found.loading_gk, found.usage_nk),
        "factors": Readout(of_factors, found.usage_nk),
        "promax": Readout(of_oblique, oblique_nk),
        "programs": Readout(programs.scores.to_numpy(), np.concatenate(usages)),
    }


def agreement(a: Readout, b: Readout, n_top: int = N_TOP) -> pd.DataFrame:
    """Agreement of two read-outs of the same genes and cells, whose factors are matched by the cosines of their scores.

    One row for each factor of the first that has a partner: ``scores``, the absolute cosine of the scores; ``top_genes``, the share
    of the ``n_top`` genes with the largest scores that both have; ``usages``, the absolute correlation over cells (NaN where
    usages are constant).
    """
    pairs = match_columns(cosines(a.score_gk, b.score_gk))
    found = _agreement(a.columns(pairs.first, 1), b.columns(pairs.second, pairs.sign), n_top).set_axis(pairs.first)
    return found.abs()


def _agreement(a: Readout, b: Readout, n_top: int) -> pd.DataFrame:
    """Agreement of columns that belong together, with signs that agree."""
    rows = []
    for score_g, other_g, usage_n, again_n in zip(a.score_gk.T, b.score_gk.T, a.usage_nk.T, b.usage_nk.T, strict=True):
        tops = [set(np.argsort(-values_g)[:n_top]) for values_g in (score_g, other_g)]
        centred = [value_n - value_n.mean() for value_n in (usage_n, again_n)]
        rows.append(
            {
                "scores": _cosine(score_g, other_g),
                "top_genes": len(tops[0] & tops[1]) / min(n_top, len(score_g)),
                "usages": _cosine(*centred),
            }
        )
    return pd.DataFrame(rows)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """NaN if one of them is zero."""
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else np.nan


def factor_replication(
    models: Sequence[LDVAEBase], kinds: Sequence[int], consensus_gk: np.ndarray, n_top: int = N_TOP
) -> pd.DataFrame:
    """Agreement of each factor of a consensus between models of two disjoint sets of cells.

    Columns are those of :func:`agreement`, with signs: scores or usages that point in opposite directions have a negative value.

    Each set has a consensus of its own, which knows nothing of the other cells, and its factors are matched to those of the
    whole. The scores are gene scores, from the counts of the set.

    Parameters
    ----------
    models, kinds
        The models, and the set of each.
    consensus_gk
        Loadings of the whole consensus, shape (genes, factors).
    n_top
        Number of genes that are compared.
    """
    sides = []
    for group, cells in sets_of(models, kinds):
        found = consensus_factors(group)
        (score_gk,) = slopes(group[0], cells, [found.usage_nk])
        pairs = match_columns(cosines(consensus_gk, found.loading_gk))
        sides.append(Readout(score_gk, found.usage_nk).columns(pairs.second, pairs.sign))
    first, second = sides
    return _agreement(first, second, n_top)


def sets_of(models: Sequence[LDVAEBase], kinds: Sequence[int]) -> list[tuple[list[LDVAEBase], np.ndarray]]:
    """The models of each set of cells, and the positions of its cells."""
    groups = [[model for model, kind in zip(models, kinds, strict=True) if kind == half] for half in sorted(set(kinds))]
    return [(group, np.unique(group[0].train_indices)) for group in groups]
