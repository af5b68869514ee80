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
from ldvae_ext._validate import check_one_of, check_positive_int
from ldvae_ext.get._export import latents_of
from ldvae_ext.get._genes import RANKS, Rank
from ldvae_ext.pl._figure import (
    BLUE,
    SMALL,
    em,
    factor_label,
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
    population. The cards of the report (:func:`ldvae_ext.report`) have more.

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
    height = max(2 * n_genes + 2, len(groups) + 1) * 1.3 * em()
    longest = max([*map(len, groups), *top["gene"].astype(str).str.len()])
    figure, axes = panels(n_rows, 2, 18 * em(), height, beside=longest, sharex="col")
    for (left, right), k in zip(axes, chosen, strict=True):
        genes = top[top["factor"] == names[k]]
        _bars(left, genes["gene"].astype(str).tolist(), genes["loading"].to_numpy(), genes["direction"].to_numpy())
        left.set_title(
            f"{factor_label(adata, names[k], key)}: KL {table['kl'].iloc[k]:.2f} nats", fontsize="medium", loc="left"
        )
        _ranges(right, groups, [latent_nk[code_n == p, k] for p in range(len(groups))])
    axes[-1, 0].set_xlabel("Loading (log-rate per unit)", fontsize=SMALL)
    axes[-1, 1].set_xlabel("Factor (median, quartiles)", fontsize=SMALL)
    fit(axes[0, 0], 18 * em(), height, n_rows=n_rows, n_cols=2)
    return finish(figure, show=show, return_fig=return_fig)


def _bars(ax: Axes, genes: list[str], values: np.ndarray, directions: np.ndarray) -> None:
    # One row apart, so that the eye finds the two ends.
    at = np.arange(len(genes), dtype=float) + (directions == "down")
    gene_bars(ax, genes, values, at)


def _ranges(ax: Axes, groups: list[str], values: list[np.ndarray]) -> None:
    at = np.arange(len(groups), dtype=float)
    low, median, high = np.array([np.quantile(v, [0.25, 0.5, 0.75]) for v in values]).T
    ax.hlines(at, low, high, color=BLUE, linewidth=1.5)
    ax.plot(median, at, "o", color=BLUE, markersize=4)
    ax.set_yticks(at, groups)
    dress(ax, at)
