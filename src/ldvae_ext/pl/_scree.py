"""Information of each factor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ldvae_ext import get
from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import check_one_of, given_names, listed
from ldvae_ext.pl._figure import (
    BLUE,
    CHARACTER,
    COLUMN,
    ORANGE,
    SMALL,
    Ticks,
    em,
    factor_labels,
    finish,
    fit,
    inches,
    panels,
    plain_axes,
    plain_text,
    turn_crowded,
)

# Title of each measure, and its unit.
_MEASURES = {
    "kl": ("KL", "nats per cell"),
    "mutual_information": ("Mutual information", "nats"),
    "dimension_wise_kl": ("Dimension-wise KL", "nats"),
    "total_correlation": ("Total correlation", "nats"),
    "active_unit": ("Variance of the posterior mean", "squared units\nof the factor"),
    "explained_deviance": ("Explained deviance", "share of\ndeviance"),
    "ablation_zero": ("Ablation to zero", "nats per cell"),
    "ablation_mean": ("Ablation to the mean", "nats per cell"),
    "ablation_permute": ("Ablation by permutation", "nats per cell"),
}
_UNKNOWN = "not known: it needs counts"


@plain_text
def factor_scree(
    adata: AnnData,
    *,
    measures: str | Sequence[str] | None = None,
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Information of each factor.

    Bars, left axis: mean KL divergence of the posterior from the prior, in nats per cell, in the exported order; 0 for a
    factor that is not used. Line, right axis: cumulative share of the KL of all factors
    together, in percent.

    With ``measures``: a panel for each, whose bars are its values in its own unit, with the rank of each factor above the bars
    (1 for the largest value; equal values share their mean rank), so that the order by one measure can be compared with
    the exported one, which all panels have, and with those by other measures.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    measures
        One measure or several that are in the export: ``"kl"``, ``"active_unit"`` and, after
        ``export_to_anndata(stats=True)``, ``"mutual_information"``, ``"dimension_wise_kl"``, ``"total_correlation"``,
        ``"explained_deviance"``, ``"ablation_zero"``, ``"ablation_mean"``, ``"ablation_permute"``; see
        :meth:`ldvae_ext.model.LDVAE.get_factor_stats`. Measures that need counts are missing for data minified without them;
        their panels have a note.
    key
        ``key_added`` of the export.
    ax
        Axes to draw one measure in; a new figure if None.
    show
        True to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        True to return the figure; it is then only shown if ``show`` is True.

    Returns
    -------
    The axes of the bars, the figure for a list of measures or if ``return_fig``, or None if it was shown.

    Raises
    ------
    KeyError
        If there is no such export.
    ValueError
        If a measure is unknown or not stored, or ``ax`` is given for a list of them.

    Examples
    --------
    >>> axes = ldvae_ext.pl.factor_scree(adata, show=False)
    >>> figure = ldvae_ext.pl.factor_scree(adata, measures=["kl", "active_unit"], show=False)
    """
    table = get.factors(adata, key=key)
    own = ax is None
    if measures is not None:
        names = _stored(measures, table, key)
        if ax is not None and not isinstance(measures, str):
            msg = "`ax` has room for one measure, given by its name; several make a figure of their own."
            raise ValueError(msg)
        first = _measure_panels(
            table[names], get.factor_ranks(adata, key=key)[names], factor_labels(table, table.index), ax
        )
        if isinstance(measures, str):
            return finish(first, show=show, return_fig=return_fig, own=own)
        return finish(first.figure.figure, show=show, return_fig=return_fig)
    width, height = _width(len(table)), 20 * em()
    labels = factor_labels(table, table.index)
    if ax is None:
        ax = panels(1, 1, width, height, beside=max(map(len, labels)))[1].item()
    at = np.arange(len(table))
    ax.bar(at, table["kl"], color=BLUE, width=0.7)
    ax.set_xticks(at, labels)
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
    plain_axes(ax, share, lines=("left", "right", "bottom"))
    if own:
        fit(ax, width, height)
    else:
        turn_crowded(ax)
    return finish(ax, show=show, return_fig=return_fig, own=own)


def _stored(measures: str | Sequence[str], table: pd.DataFrame, key: str) -> list[str]:
    """Names of measures in the export, without duplicates."""
    names = list(dict.fromkeys(given_names("measures", measures)))
    for name in names:
        check_one_of("measures", name, tuple(_MEASURES))
    lacking = [name for name in names if name not in table]
    if lacking:
        stored = [name for name in _MEASURES if name in table]
        msg = f"`measures`: the export {key!r} has {listed(stored)}, but not {listed(lacking)}; `LDVAE.export_to_anndata(stats=True)` stores all of them."
        raise ValueError(msg)
    return names


def _width(n_factors: int) -> float:
    return max(26, min(3 * n_factors, 48), COLUMN * n_factors) * em()


def _measure_panels(values: pd.DataFrame, ranks: pd.DataFrame, labels: list[str], ax: Axes | None) -> Axes:
    """A panel for each column, one below the other; the first of them."""
    n_factors, n_measures = values.shape
    width, height = _width(n_factors), (16 if n_measures == 1 else 10) * em()
    own = ax is None
    if ax is None:
        beside = max(map(len, labels))
        axes = panels(n_measures, 1, width, height, beside=beside, sharex=True)[1].ravel().tolist()
    else:
        axes = [ax]
        width, height = inches(ax)
    for panel, measure in zip(axes, values.columns.tolist(), strict=True):
        _measure(panel, values[measure].to_numpy(), ranks[measure].to_numpy(), width, height)
        title, unit = _MEASURES[measure]
        panel.set_title(title, fontsize=SMALL, loc="left")
        panel.set_ylabel(unit)
    axes[-1].set_xticks(np.arange(n_factors), labels)
    axes[-1].set_xlabel("Factor")
    if own:
        axes[0].figure.figure.align_ylabels(axes)
        fit(axes[0], width, height, n_rows=n_measures)
    else:
        turn_crowded(axes[0])
    return axes[0]


def _measure(ax: Axes, value_k: np.ndarray, rank_k: np.ndarray, width: float, height: float) -> None:
    """Bars with their ranks above them, in a panel of this size in inches."""
    at, is_known_k = np.arange(len(value_k)), np.isfinite(value_k)
    known_k = np.where(is_known_k, value_k, 0.0)
    ax.bar(at[is_known_k], value_k[is_known_k], color=BLUE, width=0.7)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xlim(-0.6, len(at) - 0.4)
    ax.yaxis.set_major_locator(Ticks(3))
    plain_axes(ax)
    if not is_known_k.any():
        ax.set_ylim(0, 1)
        ax.set_yticks([])
        ax.text(0.5, 0.5, _UNKNOWN, transform=ax.transAxes, ha="center", va="center", fontsize=SMALL, color="dimgray")
        return
    texts = ["" if np.isnan(rank) else f"{rank:g}" for rank in rank_k]
    long = CHARACTER * max(map(len, texts)) * em()
    is_upright = long + 0.3 * em() > width / len(at)
    # Room above the highest bar, and below the lowest where one is negative.
    room = min(0.5, ((long if is_upright else em()) + 0.5 * em()) / height)
    low, high = min(0.0, known_k.min()), max(0.0, known_k.max())
    if low == high:
        high = 1.0
    low -= 0.05 * (high - low) * (low < 0)
    ax.set_ylim(low, (high - room * low) / (1 - room))
    for x, value, text in zip(at, known_k, texts, strict=True):
        ax.annotate(
            text,
            (x, max(value, 0.0)),
            xytext=(0, 0.25),
            textcoords="offset fontsize",
            ha="center",
            va="bottom",
            rotation=90 if is_upright else 0,
            fontsize=SMALL,
            color="dimgray",
        )
