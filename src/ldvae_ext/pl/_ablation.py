"""Effect of each factor in each population."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldvae_ext import get
from ldvae_ext._keys import ABLATION_INFO
from ldvae_ext._validate import check_one_of
from ldvae_ext.pl._dots import CELL, dress, laid_out_diameter, size_legend
from ldvae_ext.pl._figure import (
    CHARACTER,
    em,
    factor_labels,
    factors_in_order,
    finish,
    folded,
    inches,
    panels,
    plain_text,
)
from ldvae_ext.pl._heatmap import color_bar, heatmap, largest_of

KINDS = ("heatmap", "dotplot")
# Area of the dot of a factor that helps no cell, as a share of the largest: a factor that hurts all is a finding too.
_SMALLEST = 0.1
# Shares in the legend of the sizes.
_SHARES = (1.0, 0.5, 0.0)
_SIGNIFICANT = 0.05
# Width and colour of the edges: a dot of no effect is as white as the paper.
_RING, _PLAIN = (1.4, "black"), (0.4, "darkgray")


@plain_text
def ablation(
    ablation: AnnData,
    groupby: str | None = None,
    *,
    kind: Literal["heatmap", "dotplot"] = "heatmap",
    factors: Any = None,
    min_effect: float = 0.0,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Mean change of the negative log-likelihood of each group of cells without each factor.

    Rows are groups, with their number of cells, columns factors, values in nats per cell; the colours are symmetric
    around 0. Blue: the factor helps to explain the group. Red: it hurts.

    Parameters
    ----------
    ablation
        Cells x latents, from :meth:`ldvae_ext.model.LDVAE.ablate` or :func:`ldvae_ext.tl.ablate`. With the column ``flag`` of
        :func:`ldvae_ext.get.factors` in its ``var``, the names of uncertain and unstable factors have their flag.
    groupby
        Categorical column of its ``obs``; cells without a value and groups without cells are left out. All cells are one
        group, ``"all"``, if None.
    kind
        ``"heatmap"``: values are written into the cells where they fit; elsewhere a minus sign marks the negative ones.
        ``"dotplot"``: the area of a dot grows with the share of the group's cells that the factor helps, and does not start
        at 0, so that a factor that helps no cell is still seen; a black ring marks a factor that helps with
        ``q_value < 0.05`` in ``get.ablation_df(ablation, groupby, alternative="greater", min_effect=min_effect)``, over all groups
        and factors of ``ablation``, drawn or not. With many cells most dots have one: name a ``min_effect``.
    factors
        Factors to draw, in this order: names (``"Z_3"``), such as ``ldvae_ext.get.factors(adata).index`` for the
        exported order, or positions. All of them, in the order of ``ablation``, if None.
    min_effect
        For ``"dotplot"``: the effect, in nats per cell, that a factor must exceed to have a ring.
    ax
        Axes to draw in; a new figure if None.
    show
        True to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        True to return the figure; it is then only shown if ``show`` is True.

    Returns
    -------
    The axes of the heatmap or the dots, the figure if ``return_fig``, or None if it was shown.

    Raises
    ------
    KeyError
        If ``groupby`` is no column.
    ValueError
        If ``factors`` names none or an unknown one, if no cell has a group, or if there is no such kind.

    Examples
    --------
    >>> axes = ldvae_ext.pl.ablation(ablation, "bulk_labels", show=False)

    The first two factors as dots, with a flag if other trainings do not confirm them:

    >>> axes = ldvae_ext.pl.ablation(result.ablation, "bulk_labels", kind="dotplot", factors=[0, 1], show=False)
    """
    check_one_of("kind", kind, KINDS)
    if min_effect and kind != "dotplot":
        msg = "`min_effect` is for the rings of `kind='dotplot'`."
        raise ValueError(msg)
    table = get.ablation_df(ablation, groupby, alternative="greater", min_effect=min_effect)
    names = ablation.var_names.astype(str).tolist()
    chosen = [names[k] for k in factors_in_order(factors, names)]
    groups = table.drop_duplicates("group")
    labels = with_sizes(groups["group"], groups["n_cells"])
    wide = table.pivot(index="group", columns="factor")
    mean_pk, share_pk, q_pk = (
        wide[column].loc[groups["group"], chosen].to_numpy() for column in ("mean", "share_helped", "q_value")
    )
    own = ax is None
    label, ylabel = change_label(ablation), "" if groupby is None else groupby
    columns = factor_labels(ablation.var, chosen)
    if kind == "heatmap":
        ax = heatmap(mean_pk, labels, columns, label=label, xlabel="Factor", ylabel=ylabel, ax=ax)
    else:
        ax = _dotplot(mean_pk, share_pk, q_pk < _SIGNIFICANT, labels, columns, label=label, ylabel=ylabel, ax=ax)
    return finish(ax, show=show, return_fig=return_fig, own=own)


def with_sizes(groups: Any, n_cells: Any) -> list[str]:
    """Labels of groups, with their numbers of cells."""
    return [f"{group} ({n:,})" for group, n in zip(groups, n_cells, strict=True)]


def change_label(ablation: AnnData) -> str:
    """Meaning of the numbers of an ablation, and their unit, in three lines."""
    scheme = ablation.uns.get(ABLATION_INFO, {}).get("scheme", "leave_out")
    without = {"leave_in": "with the factor alone", "keep_top": "with these alone"}.get(scheme, "without the factor")
    return f"Change in NLL\n{without}\n(nats per cell)"


def _dotplot(
    mean_pk: np.ndarray,
    share_pk: np.ndarray,
    has_ring_pk: np.ndarray,
    groups: Sequence[str],
    factors: Sequence[str],
    *,
    label: str,
    ylabel: str,
    ax: Axes | None,
) -> Axes:
    own = ax is None
    width = max(12, min(3 * len(factors), 36), CELL * len(factors)) * em()
    height = max(22, CELL * len(groups), CHARACTER * len(ylabel)) * em()
    if ax is not None:
        width, height = inches(ax)
    groups = folded(groups, height / len(groups))
    if ax is None:
        ax = panels(1, 1, width, height, beside=max(map(len, groups)))[1].item()
    largest = largest_of(mean_pk)
    row, column = np.nonzero(~np.isnan(mean_pk))
    widths, edges = zip(*(_RING if has_ring else _PLAIN for has_ring in has_ring_pk[row, column]), strict=True)
    points = ax.scatter(
        column,
        row,
        # Infinite effects have the strongest colour; scatter would leave them out.
        c=np.clip(mean_pk[row, column], -largest, largest),
        cmap="RdBu",
        norm=CenteredNorm(halfrange=largest),
        linewidths=widths,
        edgecolors=edges,
    )
    dress(ax, groups, factors, ylabel)
    # The lower half; the legend of sizes and rings is above it.
    bar = color_bar(points, ax, mean_pk, label, shrink=0.45, anchor=(0, 0))
    legend = size_legend(
        bar,
        ax,
        [*(_dot("dimgray", *_PLAIN) for _ in _SHARES), _dot("white", *_RING)],
        [*(f"{share:.0%}" for share in _SHARES), f"helps, q < {_SIGNIFICANT}"],
        "Cells helped",
    )
    diameter = laid_out_diameter(ax, len(groups), len(factors), own=own, width=width, height=height)
    points.set_sizes(diameter**2 * _area(share_pk[row, column]))
    for handle, share in zip(legend.get_lines(), (*_SHARES, 0.5), strict=True):
        handle.set_markersize(diameter * np.sqrt(_area(share)))
    return ax


def _dot(color: str, width: float, edge: str) -> Line2D:
    return Line2D(
        [], [], linestyle="none", marker="o", markerfacecolor=color, markeredgewidth=width, markeredgecolor=edge
    )


def _area(share: Any) -> Any:
    """Area of a dot, as a share of the largest."""
    return _SMALLEST + (1 - _SMALLEST) * share
