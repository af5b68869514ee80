"""Dots on a grid of groups and factors, with areas for values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

from ldvae_ext.pl._figure import ROW, SMALL, em, fit, plain_axes, turn_crowded

# Side of the square that a dot has to itself, and width of the largest dot, in em.
CELL, DOT = ROW, 1.5
# The largest dot, as a share of a square that is small.
_SHARE = 0.85


def dress(ax: Axes, groups: Sequence[str], factors: Sequence[str], ylabel: str) -> None:
    """Name rows and columns, and leave room for the dots at the edges."""
    ax.set_xticks(np.arange(len(factors)), factors)
    ax.set_yticks(np.arange(len(groups)), groups)
    ax.set_xlim(-0.6, len(factors) - 0.4)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set(xlabel="Factor", ylabel=ylabel)
    ax.set_axisbelow(True)
    plain_axes(ax, lines=("left", "right", "top", "bottom"))
    ax.tick_params(length=0)


def size_legend(bar: Colorbar, ax: Axes, handles: Sequence[Line2D], labels: Sequence[str], title: str) -> Legend:
    """A legend above a colour bar in the lower half of the space to the right of the axes."""
    return bar.ax.legend(
        handles,
        labels,
        title=title,
        loc="upper left",
        bbox_to_anchor=(0, 1),
        bbox_transform=blended_transform_factory(bar.ax.transAxes, ax.transAxes),
        borderaxespad=0,
        borderpad=0,
        fontsize=SMALL,
        title_fontsize=SMALL,
        alignment="left",
        frameon=False,
    )


def laid_out_diameter(ax: Axes, n_groups: int, n_factors: int, *, own: bool, width: float, height: float) -> float:
    """Lay the figure out; return the width of the largest dot in points, at most the room in given axes."""
    if own:
        fit(ax, width, height)
    else:
        turn_crowded(ax)
    panel = ax.get_window_extent()
    cell = min(panel.width / n_factors, panel.height / n_groups) / ax.figure.figure.dpi / em()
    return 72 * em() * min(DOT, _SHARE * cell)
