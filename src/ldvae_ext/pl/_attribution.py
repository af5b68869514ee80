"""Contributions of factors to the expression of a gene in a population."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator

from ldvae_ext import get
from ldvae_ext._keys import POPULATION_LOADINGS
from ldvae_ext._validate import check_one_of, check_positive_int, listed, printable
from ldvae_ext.core._arrays import strings
from ldvae_ext.core.populations import BATCH
from ldvae_ext.get._populations import populations_of
from ldvae_ext.pl._figure import (
    BLUE,
    CHARACTER,
    DARK,
    ORANGE,
    SMALL,
    Ticks,
    em,
    finish,
    fit,
    inches,
    labels_in_result,
    panels,
    plain_axes,
    plain_text,
    turn_crowded,
)
from ldvae_ext.pl._populations import reference_line

_GRAY = "darkgray"
_BAR = 0.7
# Between the last part and the total, in rows.
_GAP = 0.4
# Smaller log-ratios are written as 0.
_MOST_DIGITS = 3


@plain_text
def attribution(
    adata: AnnData,
    gene: Any,
    group: str,
    *,
    n_factors: int = 8,
    ncols: int = 3,
    key: str = POPULATION_LOADINGS,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Contributions of factors to the difference of a gene's expression between a population and its reference.

    A waterfall: each bar starts where the one above it ends, the first at 0, and the last ends at the total, the log-ratio of
    the gene's expression at the mean latents of the population and of the reference. Factors are in descending order of
    contributions; batches and covariates follow, in gray. Lower axis: natural logarithm; upper axis:
    the same as a fold change.

    Parameters
    ----------
    adata
        AnnData that :func:`ldvae_ext.tl.population_loadings` wrote to with ``kind="path"``.
    gene
        A gene of the model, or several: then each has a panel, all with the same scale.
    group
        One of the populations.
    n_factors
        Factors with a bar of their own; the others are pooled, if they are more than one.
    ncols
        Panels in a row.
    key
        ``key_added`` of the population loadings.
    ax
        Axes to draw one gene in; a new figure if None.
    show
        True to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        True to return the figure; it is then only shown if ``show`` is True.

    Returns
    -------
    The axes of the bars, the figure for several genes or if ``return_fig``, or None if it was shown.

    Raises
    ------
    KeyError
        If there are no population loadings.
    ValueError
        If they are of another kind, a gene or the population does not exist, ``n_factors`` or ``ncols`` is no count, or ``ax``
        is given for several genes.

    Examples
    --------
    >>> ldvae_ext.tl.population_loadings(adata, "bulk_labels", "path", key_added="path")
    >>> gene = ldvae_ext.get.top_genes(adata, 0, n=1)["gene"].iloc[0]
    >>> axes = ldvae_ext.pl.attribution(adata, gene, "CD14+ Monocyte", key="path", show=False)
    """
    check_positive_int("n_factors", n_factors)
    check_positive_int("ncols", ncols)
    is_single = isinstance(gene, str)
    if ax is not None and not is_single:
        msg = "`ax` has room for one gene, given by its name; several make a figure of their own."
        raise ValueError(msg)
    value_gk, about = _path(adata, gene, group, key)
    falls = [_waterfall(value_k, n_factors) for _, value_k in value_gk.iterrows()]
    texts = _written(falls)

    own = ax is None
    n_cols = min(ncols, len(falls))
    n_rows = -(-len(falls) // n_cols)
    longest = max(map(len, about))
    width = max(26 if n_cols == 1 else 18, CHARACTER * longest / n_cols) * em()
    height = (len(falls[0].labels) + _GAP + 1) * 1.5 * em()
    if ax is None:
        beside = max(len(label) for fall in falls for label in fall.labels)
        figure, grid = panels(n_rows, n_cols, width, height, beside=beside, sharex=True)
        axes = grid.ravel()[: len(falls)].tolist()
        for empty in grid.flat[len(falls) :]:
            empty.remove()
    else:
        axes = [ax]
        width, _ = inches(ax)
    limits = _limits(falls, CHARACTER * (max(len(text) for row in texts for text in row) + 2) * em() / width)
    n_ticks = int(np.clip(width / em() / 4, 2, 6))
    for panel, name, fall, row in zip(axes, value_gk.index, falls, texts, strict=True):
        _panel(panel, fall, row, limits, n_ticks)
        panel.set_title("\n".join([name, *about]) if is_single else name, fontsize=SMALL if is_single else "medium")
    if is_single:
        axes[0].set_xlabel("Log-ratio (natural logarithm)")
        axes[0].child_axes[-1].set_xlabel("Fold change", fontsize=SMALL)
    else:
        figure.suptitle("\n".join(about), fontsize="medium")
        figure.supxlabel("Below: log-ratio (natural logarithm)\nAbove: fold change", fontsize=SMALL)
    if own:
        fit(axes[0], width, height, n_rows=n_rows, n_cols=n_cols)
    else:
        turn_crowded(axes[0])
    if is_single:
        return finish(axes[0], show=show, return_fig=return_fig, own=own)
    return finish(figure, show=show, return_fig=return_fig)


class Folds(Locator):
    """At most ``n`` round fold changes along an axis in natural logarithms."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __call__(self) -> list[float]:
        return [] if self.axis is None else self.tick_values(*sorted(self.axis.get_view_interval()))

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Logarithms of the fold changes between two logarithms."""
        if vmax - vmin < np.log(5):
            folds = np.asarray(Ticks(self._n).tick_values(np.exp(vmin), np.exp(vmax)))
            at = np.log(folds[folds > 0])
            return at[(at >= vmin) & (at <= vmax)].tolist()
        powers = np.log(10) * np.arange(np.floor(vmin / np.log(10)), np.ceil(vmax / np.log(10)) + 1)
        for mantissas in ((1, 2, 5), (1, 3), (1,)):
            at = (powers[:, None] + np.log(mantissas)).ravel()
            at = at[(at >= vmin) & (at <= vmax)]
            if len(at) <= self._n:
                break
        # One in several powers of ten where even those are too many.
        return at[:: max(1, -(-len(at) // self._n))].tolist()


class _Fall(NamedTuple):
    """The bars of one gene, from top to bottom; the last is the total."""

    labels: list[str]
    width: np.ndarray
    start: np.ndarray
    colors: list[str]


def _path(adata: AnnData, gene: Any, group: str, key: str) -> tuple[pd.DataFrame, list[str]]:
    """Genes x parts of the log-ratio, and the lines that name the ratio."""
    _, info = populations_of(adata, key)
    if info["kind"] != "path":
        msg = f"`key={key!r}` has population loadings of kind {str(info['kind'])!r}; use kind 'path', `tl.population_loadings(adata, groupby, 'path')`, whose values add up to a log-ratio."
        raise ValueError(msg)
    check_one_of("group", group, strings(info["groups"]).tolist())
    genes = list(dict.fromkeys([gene] if isinstance(gene, str) else map(str, gene)))
    table = get.population_loadings_df(adata, group=group, key=key)
    value_gk = pd.DataFrame(
        {factor: part.set_index("gene")["value"] for factor, part in table.groupby("factor", sort=False)}
    )
    unknown = [name for name in genes if name not in value_gk.index]
    if unknown or not genes:
        msg = f"`gene` must name genes of the model; got {listed(unknown) or 'none'}."
        raise ValueError(msg)
    value_gk.columns = pd.Index(labels_in_result(adata, value_gk.columns, info))
    shown = value_gk.loc[genes].set_axis([printable(name) for name in genes], axis=0)
    return shown, [printable(line) for line in (group, *reference_line(info))]


def _waterfall(value_k: pd.Series, n_factors: int) -> _Fall:
    factors = value_k.drop(BATCH, errors="ignore").sort_values(key=lambda value: -value.abs(), kind="stable")
    # A bar for "1 other" would take the room of its name.
    n_own = len(factors) if len(factors) <= n_factors + 1 else n_factors
    parts = {str(factor): value for factor, value in factors.iloc[:n_own].items()}
    colors = [BLUE if value < 0 else ORANGE for value in parts.values()]
    if n_own < len(factors):
        pooled = factors.iloc[n_own:].sum()
        parts[f"{len(factors) - n_own} others"] = pooled
        colors.append(BLUE if pooled < 0 else ORANGE)
    if BATCH in value_k.index:
        parts[BATCH] = value_k[BATCH]
        colors.append(_GRAY)
    width = np.array([*parts.values()])
    start = np.cumsum(width) - width
    return _Fall([*parts, "total"], np.append(width, width.sum()), np.append(start, 0.0), [*colors, DARK])


def _written(falls: list[_Fall]) -> list[list[str]]:
    """Numbers at the bars, all with the same number of decimals."""
    largest = max(np.abs(fall.width).max() for fall in falls) or 1.0
    digits = int(np.clip(2 - np.floor(np.log10(largest)), 0, _MOST_DIGITS))
    return [
        [
            f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}") if value else "0"
            for value in np.round(fall.width, digits)
        ]
        for fall in falls
    ]


def _limits(falls: list[_Fall], room: float) -> tuple[float, float]:
    """Ends of the axis, with room for numbers on the right, as a share of the axis."""
    ends = np.concatenate([[0.0], *(fall.start + fall.width for fall in falls)])
    low, high = ends.min(), ends.max()
    if high - low < 10.0**-_MOST_DIGITS:
        low, high = -1.0, 1.0
    low -= 0.03 * (high - low)
    room = min(room, 0.5)
    return low, (high - room * low) / (1 - room)


def _panel(ax: Axes, fall: _Fall, texts: list[str], limits: tuple[float, float], n_ticks: int) -> None:
    at = np.arange(len(fall.width), dtype=float)
    at[-1] += _GAP
    ends = fall.start + fall.width
    ax.barh(at, fall.width, left=fall.start, color=fall.colors, height=_BAR)
    ax.vlines(ends[:-1], at[:-1] + _BAR / 2, at[1:] - _BAR / 2, color="dimgray", linewidth=0.8)
    ax.axvline(0, color="black", linewidth=0.8)
    for y, x, text in zip(at, np.maximum(fall.start, ends), texts, strict=True):
        ax.annotate(
            text,
            (x, y),
            xytext=(0.3, 0),
            textcoords="offset fontsize",
            va="center",
            fontsize=SMALL,
            fontweight="bold" if y == at[-1] else "normal",
            # The line at 0 does not run through numbers.
            bbox={"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 0.5},
        )
    ax.set_yticks(at, fall.labels)
    ax.get_yticklabels()[-1].set_fontweight("bold")
    ax.set_ylim(at[-1] + 0.7, -0.7)
    ax.set_xlim(limits)
    ax.xaxis.set_major_locator(Ticks(n_ticks))
    folds = ax.secondary_xaxis("top")
    folds.xaxis.set_major_locator(Folds(n_ticks))
    folds.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{np.exp(x):g}"))
    plain_axes(ax, lines=("bottom",))
    folds.tick_params(labelsize=SMALL)
    ax.tick_params(labelbottom=True)
    ax.tick_params(axis="y", length=0)
