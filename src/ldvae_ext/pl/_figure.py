"""Shared parts of figures: colours, sizes, the order of factors, and the return value."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator

from ldvae_ext._validate import factor_indices, listed, printable
from ldvae_ext.get import factors as factor_table
from ldvae_ext.get._export import export_mark

# Okabe & Ito's colours, which are distinct with any kind of colour vision; black is for text.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
BLUE, ORANGE = PALETTE[:2]
MISSING, DARK = "lightgray", "#333333"
SMALL = "small"
# Width of a character in em, on the safe side.
CHARACTER = 0.65
# Least height of a row and width of a column in em: a name fits beside the one, a vertical name below the other.
ROW, COLUMN = 1.4, 1.35
# Characters of a name that stays in one line, and room in em that makes two lines of a longer one.
_LINE, _TWO_LINES = 32, 3.5


class Ticks(MaxNLocator):
    """At most ``n`` round ticks, whatever the size of the axis.

    The default number depends on the size, which a constrained layout takes from the ticks.
    """

    def __init__(self, n: int, *, integer: bool = False) -> None:
        super().__init__(n, steps=[1, 2, 5, 10], integer=integer)


def plain_text[**P, R](plot: Callable[P, R]) -> Callable[P, R]:
    """A plot whose names of genes and groups are text as they are: matplotlib takes text between two ``$`` for mathematics."""

    @wraps(plot)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        _check_drawing(**kwargs)
        # Each text keeps the setting with which it was made.
        with plt.rc_context({"text.parse_math": False}):
            return plot(*args, **kwargs)

    return run


def _check_drawing(*, ax: Any = None, show: Any = None, return_fig: Any = False, **_others: Any) -> None:
    """Raise unless the arguments that all plots share are axes and switches."""
    if ax is not None and not isinstance(ax, Axes):
        msg = f"`ax` must be matplotlib's Axes or None; got {ax!r}."
        raise TypeError(msg)
    for name, value in (("show", show), ("return_fig", return_fig)):
        if value is not None and not isinstance(value, (bool, np.bool_)):
            msg = f"`{name}` must be True or False; got {value!r}."
            raise ValueError(msg)


def em() -> float:
    """Size of the small type in inches, from the user's settings: the unit of rows and columns."""
    return FontProperties(size=SMALL).get_size_in_points() / 72


def plain_axes(*axes: Axes, lines: Sequence[str] = ("left", "bottom")) -> None:
    """The look of all axes: small names and numbers, no grid, and lines on these sides only."""
    for ax in axes:
        ax.grid(visible=False)
        ax.tick_params(labelsize=SMALL)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set_fontsize(SMALL)
        for side, line in ax.spines.items():
            line.set_visible(side in lines)


def panels(
    n_rows: int, n_cols: int, width: float, height: float, *, beside: int = 0, **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    """Figure and axes, rows x columns, with panels of ``width`` x ``height`` inches and room for labels of some characters.

    :func:`fit` makes the size exact; until then a layout without room would fail.
    """
    room = (10 + CHARACTER * beside) * em()
    return plt.subplots(
        n_rows,
        n_cols,
        figsize=(n_cols * (width + room), n_rows * (height + room)),
        squeeze=False,
        layout="constrained",
        **kwargs,
    )


def fit(ax: Axes, width: float, height: float, *, n_rows: int = 1, n_cols: int = 1) -> None:
    """Size the figure so that each of its equal panels, ``ax`` being one, measures ``width`` x ``height`` inches.

    A constrained layout takes the room for labels from the panels; here the figure gives it, however long they are.
    """
    figure = ax.figure.figure
    # Padding depends on the size of the figure, so a second pass corrects the first.
    for _ in range(2):
        turn_crowded(*figure.axes)
        panel = ax.get_window_extent()
        lacking = np.array([n_cols * (width - panel.width / figure.dpi), n_rows * (height - panel.height / figure.dpi)])
        figure.set_size_inches(figure.get_size_inches() + lacking)


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of axes."""
    panel, dpi = ax.get_window_extent(), ax.figure.figure.dpi
    return panel.width / dpi, panel.height / dpi


def folded(names: Sequence[str], room: float) -> list[str]:
    """Names as they are shown, the long ones in two lines if each name has room for them, in inches."""
    names = [printable(name) for name in names]
    return names if room < _TWO_LINES * em() else [_folded(name) for name in names]


def _folded(name: str) -> str:
    breaks = [found.end() for found in re.finditer(r"[\s/,;:_-]+", name[:-1])]
    if len(name) <= _LINE or not breaks:
        return name
    middle = min(breaks, key=lambda at: abs(at - len(name) / 2))
    return f"{name[:middle].rstrip()}\n{name[middle:]}"


def turn_crowded(*axes: Axes) -> None:
    """Lay out a figure; make the labels below these axes vertical if they would overlap or one is wider than the axes."""
    figure = axes[0].figure.figure
    figure.draw_without_rendering()
    space = em() * figure.dpi / 2
    crowded = [ax for ax in axes if _crowded(ax, space)]
    for ax in crowded:
        ax.tick_params(axis="x", labelrotation=90)
    if crowded:
        figure.draw_without_rendering()


def _crowded(ax: Axes, space: float) -> bool:
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    are_touching = any(right.x0 - left.x1 < space for left, right in itertools.pairwise(boxes))
    return are_touching or max((box.width for box in boxes), default=0) > ax.get_window_extent().width


def factors_in_order(factors: Any, names: Sequence[str]) -> list[int]:
    """Positions of factors given by name or position, each once, in the order in which they were given."""
    if factors is None or isinstance(factors, (str, int, np.integer)):
        return factor_indices(factors, names, argument="factors").tolist()
    given = list(factors)
    factor_indices(given, names, argument="factors")
    return list(dict.fromkeys(factor_indices([factor], names, argument="factors").item() for factor in given))


def factor_labels(table: Any, names: Iterable[str]) -> list[str]:
    """Names of factors, with a flag behind those that other trainings do not confirm.

    The table has a row for each factor: ``get.factors(adata)``, or ``var`` of an ablation. A name without a row, or in a
    table without a column ``flag``, stays as it is.
    """
    flags = dict(table["flag"]) if "flag" in table else {}
    return [
        f"{printable(name)} ({flags[name]})" if flags.get(name) in ("uncertain", "unstable") else printable(name)
        for name in names
    ]


def labels_in_result(adata: AnnData, names: Iterable[str], source: Mapping[str, Any]) -> list[str]:
    """:func:`factor_labels` by the export that a result names as its source; without flags if that was replaced."""
    key = str(source.get("key"))
    export = adata.uns.get(key)
    if not isinstance(export, Mapping) or "decoder" not in export:
        return list(names)
    is_same = source.get("export") in (None, export_mark(export))
    return factor_labels(factor_table(adata, key=key), names) if is_same else list(names)


def one_factor(factor: Any, names: Sequence[str]) -> str:
    """The name of one factor, given by name or position."""
    if not isinstance(factor, (str, int, np.integer)):
        msg = f"`factor` must be one factor, by name or position; got {factor!r}."
        raise ValueError(msg)
    return names[factor_indices(factor, names, argument="factor").item()]


def groups_in_order(groups: Any, known: Sequence[str]) -> list[str]:
    """Groups given by name, each once, in the order in which they were given; all of them for None."""
    if groups is None:
        return list(known)
    given = list(dict.fromkeys([groups] if isinstance(groups, str) else map(str, groups)))
    unknown = [group for group in given if group not in known]
    if unknown or not given:
        msg = f"`groups` must name some of {listed(known, 30)}; got {listed(unknown) or 'none'}."
        raise ValueError(msg)
    return given


def finish[Drawn: (Axes, Figure)](
    drawn: Drawn, *, show: bool | None, return_fig: bool, own: bool = True
) -> Drawn | Figure | None:
    """Show a figure, or return it.

    Parameters
    ----------
    drawn
        Return value if the figure is not shown.
    show
        True to show it; ``scanpy.settings.autoshow`` if None, unless the figure is returned.
    return_fig
        True to return the figure.
    own
        True if this package made the figure.
    """
    figure = drawn.figure.figure
    if show is None:
        # Importing scanpy takes a second; as long as nobody has, its setting has the default.
        scanpy = sys.modules.get("scanpy")
        show = (scanpy is None or scanpy.settings.autoshow) and not return_fig
    if show:
        plt.show()
        # A blocking `show` has done its work, and a backend without windows would keep the figure for ever.
        if own and not return_fig and not plt.isinteractive():
            plt.close(figure)
        return figure if return_fig else None
    return figure if return_fig else drawn
