"""Factors that distinguish groups of cells."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldvae_ext import get
from ldvae_ext._keys import GROUPS_INFO
from ldvae_ext.core._arrays import strings
from ldvae_ext.get._groups import ranking_of
from ldvae_ext.pl._dots import CELL, dress, laid_out_diameter, size_legend
from ldvae_ext.pl._figure import (
    CHARACTER,
    SMALL,
    em,
    factors_in_order,
    finish,
    folded,
    inches,
    labels_in_result,
    panels,
    plain_text,
)
from ldvae_ext.pl._heatmap import color_bar, largest_of

# AUROCs in the legend, largest first.
_SHOWN = (1.0, 0.9, 0.75, 0.6)


@plain_text
def factor_groups(
    adata: AnnData,
    *,
    key: str = GROUPS_INFO,
    factors: Any = None,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Differences of each factor between each group of cells and the compared cells.

    Rows are groups, columns factors. Colour: mean in the group minus mean in the compared cells, in units of the
    latent, symmetric around 0. Red: the factor is higher in the group. Blue: it is lower. Area: how far the AUROC is from
    0.5, ``|2 AUROC - 1|``; no dot for a factor without a difference, the largest for a perfect separation.

    Parameters
    ----------
    adata
        AnnData that :func:`ldvae_ext.tl.rank_factors_groups` wrote to.
    key
        ``key_added`` of the ranking.
    factors
        Factors to draw, in this order: names (``"Z_3"``) or positions in the exported order. All of them, in the exported
        order, if None.
    ax
        Axes to draw in; a new figure if None.
    show
        True to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        True to return the figure; it is then only shown if ``show`` is True.

    Returns
    -------
    The axes of the dots, the figure if ``return_fig``, or None if it was shown.

    Raises
    ------
    KeyError
        If there is no such ranking.
    ValueError
        If ``factors`` names none or an unknown one.

    Examples
    --------
    >>> ldvae_ext.tl.rank_factors_groups(adata, "bulk_labels")
    >>> axes = ldvae_ext.pl.factor_groups(adata, show=False)
    """
    entry = ranking_of(adata, key)
    names = strings(entry["factors"]).tolist()
    chosen = [names[k] for k in factors_in_order(factors, names)]
    table = get.rank_factors_groups_df(adata, key=key).set_index(["group", "factor"])
    groups = table.index.unique("group").tolist()
    difference_pk = table["mean_difference"].unstack().loc[groups, chosen].to_numpy()
    strength_pk = np.abs(2 * table["auroc"].unstack().loc[groups, chosen].to_numpy() - 1)
    groupby, reference = entry["params"]["groupby"], entry["params"]["reference"]
    title = "" if reference == "rest" else f"reference: {reference}"

    own = ax is None
    width = max(12, min(3 * len(chosen), 36), CELL * len(chosen), CHARACTER * len(title)) * em()
    height = max(20, CELL * len(groups), CHARACTER * len(groupby)) * em()
    if ax is not None:
        width, height = inches(ax)
    rows = folded(groups, height / len(groups))
    if ax is None:
        ax = panels(1, 1, width, height, beside=max(map(len, rows)))[1].item()
    largest = largest_of(difference_pk)
    row, column = np.indices(difference_pk.shape).reshape(2, -1)
    points = ax.scatter(
        column,
        row,
        c=difference_pk.ravel(),
        cmap="RdBu_r",
        norm=CenteredNorm(halfrange=largest),
        # A dot of no difference is as white as the paper.
        edgecolors="dimgray",
        linewidths=0.4,
    )
    dress(ax, rows, labels_in_result(adata, chosen, entry["params"]), groupby)
    ax.set_title(title, fontsize=SMALL)
    # The lower half; the legend of the sizes is above it.
    other = "rest" if reference == "rest" else "reference"
    label = f"Mean in group\n\N{MINUS SIGN} mean in {other}\n(units of latent)"
    bar = color_bar(points, ax, difference_pk, label, shrink=0.45, anchor=(0, 0))
    bar.ax.set_ylim(-largest, largest)
    legend = size_legend(
        bar,
        ax,
        [Line2D([], [], linestyle="none", marker="o", color="dimgray") for _ in _SHOWN],
        [f"{auroc:g} or {1 - auroc:g}" for auroc in _SHOWN],
        "AUROC",
    )
    diameter = laid_out_diameter(ax, len(groups), len(chosen), own=own, width=width, height=height)
    points.set_sizes(diameter**2 * strength_pk.ravel())
    for handle, auroc in zip(legend.get_lines(), _SHOWN, strict=True):
        handle.set_markersize(diameter * np.sqrt(abs(2 * auroc - 1)))
    return finish(ax, show=show, return_fig=return_fig, own=own)
