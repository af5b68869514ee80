"""A card for each factor: its genes, and the cells in which it is active."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldvae_ext import get
from ldvae_ext._groups import groups_of
from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import check_one_of, check_positive_int, printable
from ldvae_ext.get._export import latents_of
from ldvae_ext.get._genes import RANKS, Rank
from ldvae_ext.pl._color import group_colors
from ldvae_ext.pl._figure import (
    DARK,
    em,
    factor_labels,
    factors_in_order,
    finish,
    fit,
    panels,
    plain_text,
)
from ldvae_ext.pl._loadings import dress, gene_bars


@plain_text
def factors(
    adata: AnnData,
    *,
    groupby: str,
    factors: Any = None,
    n_genes: int = 6,
    rank_by: Rank = "information",
    key: str = DEFAULT_KEY,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """A row for each factor: the genes at its two ends, and its values in each population.

    Left: canonical loadings, in log-rate per unit of latent. Right: median and quartiles of the factor in each
    population, in the colours of ``uns[f"{groupby}_colors"]`` if there are enough. The cards of the report
    (:func:`ldvae_ext.report`) have more.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    groupby
        Column of ``obs`` with populations; cells without a value are left out.
    factors
        Factors to draw, in this order: names (``"Z_3"``) or positions in the exported order. The first five if None.
    n_genes
        Genes at each end.
    rank_by
        Criterion of top genes, see :func:`ldvae_ext.get.gene_scores`.
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
        If there is no such export or column.
    ValueError
        If it has no such factor, or ``n_genes`` is no count.

    Examples
    --------
    >>> figure = ldvae_ext.pl.factors(adata, groupby="bulk_labels", factors=[0, 1], show=False)
    """
    table = get.factors(adata, key=key)
    names = table.index.tolist()
    chosen = factors_in_order(range(min(5, len(names))) if factors is None else factors, names)
    check_positive_int("n_genes", n_genes)
    check_one_of("rank_by", rank_by, RANKS)
    groups, code_n = groups_of(adata.obs, groupby)
    top = get.top_genes(adata, [names[k] for k in chosen], n=n_genes, rank_by=rank_by, key=key)
    latent_nk = latents_of(adata, key).astype(np.float64)
    n_rows = len(chosen)
    # Genes and populations have rows of the same height.
    bottom = max(2 * n_genes + 1, len(groups))
    height = 1.3 * (bottom + 1) * em()
    colors = group_colors(adata, groupby, groups)
    labels = factor_labels(table, [names[k] for k in chosen])
    longest = max([*map(len, groups), *top["gene"].astype(str).str.len()])
    figure, axes = panels(n_rows, 2, 14 * em(), height, beside=longest, sharex="col")
    for (left, right), k, label in zip(axes, chosen, labels, strict=True):
        genes = top[top["factor"] == names[k]]
        _bars(left, genes["gene"].astype(str).tolist(), genes["loading"].to_numpy(), genes["direction"].to_numpy())
        left.set_title(f"{label}: KL {table['kl'].iloc[k]:.2f} nats per cell", fontsize="medium", loc="left")
        _ranges(right, groups, [latent_nk[code_n == p, k] for p in range(len(groups))], colors)
        for ax in (left, right):
            dress(ax, bottom)
    axes[-1, 0].set_xlabel("Loading\n(log-rate per unit of latent)")
    axes[-1, 1].set_xlabel("Median and quartiles\n(units of latent)")
    fit(axes[0, 0], 14 * em(), height, n_rows=n_rows, n_cols=2)
    return finish(figure, show=show, return_fig=return_fig)


def _bars(ax: Axes, genes: list[str], values: np.ndarray, directions: np.ndarray) -> None:
    # One row apart, so that the eye finds the two ends.
    at = np.arange(len(genes), dtype=float) + (directions == "down")
    gene_bars(ax, genes, values, at)


def _ranges(ax: Axes, groups: list[str], values: list[np.ndarray], colors: list[str]) -> None:
    at = np.arange(len(groups), dtype=float)
    low, median, high = np.array([np.quantile(v, [0.25, 0.5, 0.75]) for v in values]).T
    ax.hlines(at, low, high, colors=colors, linewidth=2.5)
    ax.plot(median, at, "o", color=DARK, markersize=3)
    ax.set_yticks(at, [printable(group) for group in groups])
