"""How much information each factor carries."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ldvae_ext import get
from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext.pl._figure import BLUE, ORANGE, SMALL, Ticks, em, finish, fit, panels, turn_crowded


def factor_scree(
    adata: AnnData,
    *,
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Information of each factor.

    Bars, left axis: mean KL divergence of the posterior from the prior, in nats per cell, in the exported order; 0 for a
    factor that is not used. Line, right axis: the share of the KL of all factors that it and those before it hold
    together, in percent.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    key
        ``key_added`` of the export.
    ax
        Axes to draw in; a new figure if None.
    show
        Whether to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        Whether to return the figure, without showing it unless ``show`` says so.

    Returns
    -------
    The axes of the bars, the figure if ``return_fig``, or None if it was shown.

    Raises
    ------
    KeyError
        If there is no such export.
    """
    table = get.factors(adata, key=key)
    own = ax is None
    width, height = max(24, min(3 * len(table), 60), 1.6 * len(table)) * em(), 20 * em()
    if ax is None:
        ax = panels(1, 1, width, height)[1].item()
    at = np.arange(len(table))
    ax.bar(at, table["kl"], color=BLUE, width=0.7)
    ax.set_xticks(at, table.index)
    ax.set_xlim(-0.6, len(table) - 0.4)
    ax.set_xlabel("Factor")
    ax.set_ylabel("KL (nats per cell)", color=BLUE)
    ax.yaxis.set_major_locator(Ticks(5))
    share = ax.twinx()
    share.plot(at, table["kl_share"].cumsum(), color=ORANGE, marker="o", markersize=4)
    share.set_ylim(0, 1.05)
    share.set_ylabel("Cumulative share of KL", color=ORANGE)
    share.set_yticks([0, 0.25, 0.5, 0.75, 1])
    share.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (ax, share):
        axes.grid(visible=False)
        axes.spines["top"].set_visible(False)
        axes.tick_params(labelsize=SMALL)
    if own:
        fit(ax, width, height)
    else:
        turn_crowded(ax)
    return finish(ax, show=show, return_fig=return_fig, own=own)
