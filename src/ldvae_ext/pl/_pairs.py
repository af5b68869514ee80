"""Cells in the space of a few factors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path

from ldvae_ext import get
from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import check_column, listed
from ldvae_ext.get._export import latents_of
from ldvae_ext.pl._color import look_of
from ldvae_ext.pl._figure import (
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

_DEFAULT_FACTORS = 4
_MANY_CELLS = 5_000


@plain_text
def latent_pairs(
    adata: AnnData,
    *,
    factors: Any = None,
    color: str | None = None,
    key: str = DEFAULT_KEY,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Posterior means of the cells, for each pair of factors.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    factors
        Factors to draw, in this order: names (``"Z_3"``) or positions in the exported order. The first four if None.
    color
        Column of ``obs``. A numeric one gets a colour bar, any other a legend, with the colours of
        ``uns[f"{color}_colors"]`` if there are enough, else with colours and markers. Cells without a value are grey.
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
        If there is no such export, or if ``color`` is no column.
    ValueError
        If the export has no such factor, or if there are fewer than two.

    Examples
    --------
    >>> figure = ldvae_ext.pl.latent_pairs(adata, factors=[0, 1, 2], color="bulk_labels", show=False)
    """
    table = get.factors(adata, key=key)
    names = table.index.tolist()
    chosen = factors_in_order(range(min(_DEFAULT_FACTORS, len(names))) if factors is None else factors, names)
    if len(chosen) < 2:
        msg = f"`factors` must name at least two factors; got {listed(names[k] for k in chosen)}."
        raise ValueError(msg)
    if color is not None:
        check_column(adata.obs.columns, "color", color)
    latent_nk = latents_of(adata, key)[:, chosen]
    look = look_of(adata, color)
    labels = factor_labels(table, [names[k] for k in chosen])

    n = len(chosen) - 1
    side = max(16, 36 / n) * em()
    legend_cols = -(-len(look.labels) // (int(n * side / (1.6 * em())) - 1))
    beside = (max(map(len, look.labels), default=0) + 8) * legend_cols
    figure, axes = panels(n, n, side, side, beside=beside, sharex="col", sharey="row")
    # The order of drawing depends neither on the order of the cells nor on that of the groups.
    shapes = {marker: _shape(marker) for marker in np.unique(look.marker_n)}
    drawn = np.random.default_rng(0).permutation(adata.n_obs)
    for row, column in itertools.product(range(n), repeat=2):
        ax = axes[row, column]
        if column > row:
            ax.remove()
            continue
        points = ax.scatter(
            latent_nk[drawn, column],
            latent_nk[drawn, row + 1],
            c=look.color_n[drawn],
            s=np.clip(15_000 / max(1, adata.n_obs), 0.5, 20),
            linewidths=0,
            rasterized=adata.n_obs > _MANY_CELLS,
        )
        # One collection of all shapes: one for each shape would put the last of them on top.
        points.set_paths([shapes[marker] for marker in look.marker_n[drawn]])
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(Ticks(4))
        plain_axes(ax, lines=("left", "right", "top", "bottom"))
        ax.label_outer()
        ax.set(xlabel=labels[column] if row == n - 1 else "", ylabel=labels[row + 1] if column == 0 else "")
    if look.mappable is not None:
        bar = figure.colorbar(look.mappable, ax=figure.axes, aspect=30)
        bar.set_label(str(color), fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
    if look.labels:
        figure.legend(
            look.handles,
            look.labels,
            title=color,
            loc="outside right upper",
            ncols=legend_cols,
            fontsize=SMALL,
            title_fontsize=SMALL,
            alignment="left",
            frameon=False,
        )
    fit(axes[-1, 0], side, side, n_rows=n, n_cols=n)
    return finish(figure, show=show, return_fig=return_fig)


def _shape(marker: str) -> Path:
    style = MarkerStyle(marker)
    return style.get_path().transformed(style.get_transform())
