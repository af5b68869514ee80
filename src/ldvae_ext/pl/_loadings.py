"""Top genes of each factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldvae_ext import get
from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import check_one_of, check_positive_int, printable
from ldvae_ext.get._genes import RANKS, Rank
from ldvae_ext.pl._figure import (
    BLUE,
    ORANGE,
    SMALL,
    Ticks,
    em,
    factor_labels,
    factors_in_order,
    finish,
    fit,
    panels,
    plain_axes,
    plain_text,
)


@plain_text
def loadings(
    adata: AnnData,
    *,
    factors: Any = None,
    n_genes: int = 8,
    ncols: int = 5,
    rank_by: Rank = "information",
    key: str = DEFAULT_KEY,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Genes at the two ends of each factor.

    Each factor has a panel. Each bar is the canonical loading of a gene, in log-rate per unit of latent: at the top genes
    that increase with the factor, below them genes that decrease. All panels have the same scale.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    factors
        Factors to draw, in this order: names (``"Z_3"``) or positions in the exported order. All of them if None.
    n_genes
        Genes at each end.
    ncols
        Panels in a row.
    rank_by
        Criterion of top genes: ``"information"``, which weighs loadings by expression and so prefers expressed genes;
        ``"regression"``, slopes of expression, which replicate best; ``"loading"``, the largest and smallest loadings, which are often those of rarely
        seen genes and uncertain. See :func:`ldvae_ext.get.gene_scores`.
    key
        ``key_added`` of the export.
    show
        True to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        True to return the figure; it is then only shown if ``show`` is True.

    Returns
    -------
    The figure, or None if it was shown.

    Raises
    ------
    KeyError
        If there is no such export.
    ValueError
        If it has no such factor, or if ``n_genes`` or ``ncols`` is no count or the model has too few genes.

    Examples
    --------
    >>> figure = ldvae_ext.pl.loadings(adata, n_genes=5, ncols=4, show=False)
    """
    table = get.loadings(adata, key=key)
    chosen = factors_in_order(factors, table.columns.tolist())
    check_positive_int("n_genes", n_genes)
    check_one_of("rank_by", rank_by, RANKS)
    check_positive_int("ncols", ncols)
    if 2 * n_genes > len(table):
        msg = f"`n_genes` must be at most {len(table) // 2}, half of the genes of the model; got {n_genes}."
        raise ValueError(msg)
    score_gk = get.gene_scores(adata, kind=rank_by, key=key).to_numpy()
    order_gk = np.argsort(score_gk, axis=0, kind="stable")[::-1]
    rows_gk = np.concatenate([order_gk[:n_genes], order_gk[-n_genes:]])[:, chosen]
    genes_gk = table.index.to_numpy().astype(str)[rows_gk]
    values_gk = table.to_numpy()[rows_gk, chosen]

    n_cols = min(ncols, len(chosen))
    n_rows = -(-len(chosen) // n_cols)
    # A single panel is wide enough for the label of the axis below it.
    width, height = max(11, 32 / n_cols) * em(), (2 * n_genes + 2) * 1.3 * em()
    figure, axes = panels(n_rows, n_cols, width, height, beside=max(map(len, genes_gk.flat)), sharex=True)
    for ax in axes.flat[len(chosen) :]:
        ax.remove()
    labels = factor_labels(get.factors(adata, key=key), table.columns[chosen])
    for i, label in enumerate(labels):
        _panel(axes.flat[i], label, genes_gk[:, i], values_gk[:, i])
    chosen_by = "" if rank_by == "loading" else f"; genes by {rank_by}"
    figure.supxlabel(f"Loading (log-rate per unit of latent{chosen_by})", fontsize=SMALL)
    fit(axes[0, 0], width, height, n_rows=n_rows, n_cols=n_cols)
    return finish(figure, show=show, return_fig=return_fig)


def _panel(ax: Axes, factor: str, genes: np.ndarray, values: np.ndarray) -> None:
    at = np.arange(len(genes), dtype=float)
    # One row apart, so that the eye finds the two ends.
    at[len(genes) // 2 :] += 1
    gene_bars(ax, genes, values, at)
    ax.set_title(factor, fontsize="medium")


def gene_bars(ax: Axes, genes: Sequence[str] | np.ndarray, values: np.ndarray, at: np.ndarray) -> None:
    """Bars of genes, orange where they rise."""
    ax.barh(at, values, color=np.where(values < 0, BLUE, ORANGE).tolist(), height=0.75)
    ax.set_yticks(at, [printable(gene) for gene in genes])
    dress(ax, at[-1] + 1)


def dress(ax: Axes, bottom: float) -> None:
    """Rows from the top to a height, on both sides of 0."""
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_ylim(bottom, -1)
    ax.xaxis.set_major_locator(Ticks(3))
    plain_axes(ax, lines=("bottom",))
    ax.tick_params(labelbottom=True)
    ax.tick_params(axis="y", length=0)
