"""Numbers in cells, coloured symmetrically around 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import CenteredNorm
from matplotlib.image import AxesImage

from ldvae_ext.pl._figure import (
    CHARACTER,
    COLUMN,
    ROW,
    SMALL,
    em,
    fit,
    folded,
    inches,
    panels,
    plain_axes,
    turn_crowded,
)

# Width up to which columns are as wide as their numbers, in em.
_WITH_NUMBERS = 48
# Side of the smallest cell with a minus sign, in em.
_SIGN = 0.9


def heatmap(
    value_rc: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    cmap: str = "RdBu",
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    largest: float | None = None,
    faint: float = 0.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw a matrix with its values written into the cells where they fit; elsewhere a minus sign marks the negative ones.

    Cells that are smaller than a minus sign, as in small axes that were given, stay empty.

    Parameters
    ----------
    value_rc
        Values, rows x columns.
    rows, columns
        Their labels.
    label
        Meaning of the values and their unit, for the colour bar.
    cmap
        Diverging colours.
    xlabel, ylabel, title
        Labels of columns and rows, and the title.
    largest
        Absolute value at the ends of the colours and of the colour bar. If None, the largest value; the bar then has the
        range of the values.
    faint
        Negative values that are nearer to 0 have no minus sign where values are not written.
    ax
        Axes to draw in; a new figure if None.
    """
    is_given = largest is not None
    largest = largest_of(value_rc) if largest is None else largest
    own = ax is None
    column = CHARACTER * (longest_number(value_rc, largest) + 1)
    above = CHARACTER * max(map(len, title.split("\n")))
    width = max(12, COLUMN * len(columns), min(column * len(columns), _WITH_NUMBERS), above) * em()
    height = max(14, ROW * len(rows), CHARACTER * len(ylabel)) * em()
    if ax is not None:
        width, height = inches(ax)
    rows, columns = folded(rows, height / len(rows)), folded(columns, width / len(columns))
    if ax is None:
        ax = panels(1, 1, width, height, beside=max(map(len, rows)))[1].item()
    image = matrix(ax, value_rc, rows, columns, cmap=cmap, largest=largest)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=SMALL)
    bar = color_bar(image, ax, value_rc, label)
    if is_given:
        bar.ax.set_ylim(-largest, largest)
    if own:
        fit(ax, width, height)
    else:
        turn_crowded(ax)
    annotate(image, value_rc, largest, faint)
    return ax


def matrix(
    ax: Axes, value_rc: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, cmap: str, largest: float
) -> AxesImage:
    """Colours that are symmetric around 0 and end at ``largest``, rows and columns with their names."""
    image = ax.imshow(value_rc, cmap=cmap, norm=CenteredNorm(halfrange=largest), aspect="auto")
    ax.set_xticks(np.arange(len(columns)), columns)
    ax.set_yticks(np.arange(len(rows)), rows)
    plain_axes(ax, lines=())
    ax.tick_params(length=0)
    return image


def largest_of(values: np.ndarray) -> float:
    """The largest absolute value that is finite, or 1 if all are 0: where symmetric colours end."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0)) or 1.0


def digits_for(largest: float) -> int:
    """Decimals that give the largest value three digits."""
    return max(0, 2 - int(np.floor(np.log10(largest))))


def color_bar(
    drawn: ScalarMappable, ax: Axes, values: np.ndarray, label: str, *, shrink: float = 1.0, **kwargs: Any
) -> Colorbar:
    """Colour bar with the range of the values, out of colours that are symmetric around 0."""
    finite = values[np.isfinite(values)]
    # As wide as a character is high, whatever the height of the figure.
    height = shrink * inches(ax)[1] / em()
    bar = ax.figure.colorbar(drawn, ax=ax, pad=0.02, shrink=shrink, aspect=max(height, 5), **kwargs)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.set_ylim(finite.min(initial=0), finite.max(initial=0) or 0.05 * largest_of(values))
    return bar


def top_rows(value_rc: np.ndarray, n: int) -> np.ndarray:
    """Positions of the ``n`` rows with the largest absolute values, in an order in which the eye finds a pattern.

    The largest absolute value of a row is its peak. Rows with a positive peak come before those with a negative one, rows
    that peak in the same column lie together, in the order of the columns, and inside such a block peaks descend. NaN is
    no peak.
    """
    strength_rc = np.nan_to_num(np.abs(value_rc), nan=-1.0)
    chosen = np.argsort(-strength_rc.max(axis=1), kind="stable")[:n]
    column = strength_rc[chosen].argmax(axis=1)
    peak = value_rc[chosen, column]
    return chosen[np.lexsort((-peak, column, peak < 0))]


def longest_number(value_rc: np.ndarray, largest: float) -> int:
    """Characters of the longest number that :func:`annotate` would write."""
    return max(len(text) for row in _rounded(value_rc, largest)[1] for text in row)


def annotate(image: AxesImage, value_rc: np.ndarray, largest: float, faint: float = 0.0) -> None:
    """Write the values where they fit, else a minus sign where they are below ``-faint``; the axes must have been laid out."""
    ax, rgba_rc = image.axes, image.to_rgba(value_rc)
    shown_rc, texts = _rounded(value_rc, largest)
    panel = ax.get_window_extent()
    size = em() * ax.figure.figure.dpi
    longest = max(len(text) for row in texts for text in row)
    n_rows, n_columns = shown_rc.shape
    width, height = panel.width / n_columns / size, panel.height / n_rows / size
    roomy = width >= CHARACTER * longest and height >= 1.1
    if width < _SIGN or height < _SIGN:
        return
    for (r, c), value in np.ndenumerate(shown_rc):
        # A value that is not known has no colour and no sign.
        if np.isnan(value) or (not roomy and value >= -faint):
            continue
        red, green, blue, _ = rgba_rc[r, c]
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = texts[r][c].replace("-", "\N{MINUS SIGN}") if roomy else "\N{MINUS SIGN}"
        ax.text(c, r, text, ha="center", va="center", fontsize=SMALL, color="white" if dark else "black")


def _rounded(value_rc: np.ndarray, largest: float) -> tuple[np.ndarray, list[list[str]]]:
    """Values as they are written, as numbers and as texts."""
    digits = digits_for(largest)
    # Adding 0 takes the sign off a negative zero.
    shown_rc = np.round(value_rc, digits) + 0.0
    return shown_rc, [[f"{value:.{digits}f}" for value in row] for row in shown_rc]
