"""Reproducibility of factors in several trainings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from ldvae_ext import get
from ldvae_ext._keys import CONSENSUS_KEY
from ldvae_ext._validate import given_names
from ldvae_ext.core.matching import FLAGS
from ldvae_ext.get._stability import consensus_info
from ldvae_ext.pl._figure import (
    BLUE,
    CHARACTER,
    COLUMN,
    DARK,
    ORANGE,
    PALETTE,
    SMALL,
    em,
    finish,
    fit,
    panels,
    plain_axes,
    plain_text,
    turn_crowded,
)

# Colour and shape of the mean, by flag.
_LOOKS = dict(zip(FLAGS, ((BLUE, "o"), (PALETTE[4], "D"), (ORANGE, "X")), strict=True))
# Width of the marker of a mean, in points.
_SIZE = 8
# Differences between runs: agreement between seeds is easily overrated.
_DIFFER = {
    "none": "same cells, other seeds\n(no information about other cells)",
    "halves": "two disjoint halves of the cells",
    "bootstrap": "cells drawn with replacement",
}
# Half of the room that the dots of a factor have.
_SPREAD = 0.3


@plain_text
def stability(
    adata: AnnData,
    *,
    key: str | Sequence[str] = CONSENSUS_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Reproducibility of each consensus factor in each run of an ensemble.

    Small dots: the absolute cosine between the factor of a run and its factor in a consensus of other runs, one dot for each
    run, from left to right in the order of the seeds. Large marker: their mean, the reproducibility of the factor; its colour
    and shape show the flag stable, uncertain or unstable.

    The title has the difference between the runs. Runs on the same cells with other seeds agree more than runs on other
    cells; ``fit_ensemble(resample="halves")`` or ``"bootstrap"`` measure agreement with other cells. With halves, factors whose gene
    scores and usages replicate between them (:attr:`ldvae_ext.model.Ensemble.stats`) are bold.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.Ensemble.export_to_anndata` wrote to.
    key
        ``key_added`` of a consensus, or of several: each has a panel. Factors with the same name in two of them can differ;
        :func:`ldvae_ext.tl.match_factors` finds pairs.
    ax
        Axes to draw one consensus in; a new figure if None.
    show
        True to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        True to return the figure; it is then only shown if ``show`` is True.

    Returns
    -------
    The axes of the dots, the figure for several keys or if ``return_fig``, or None if it was shown.

    Raises
    ------
    KeyError
        If there is no such consensus.
    ValueError
        If ``key`` names none, or ``ax`` is given for several.

    Examples
    --------
    >>> axes = ldvae_ext.pl.stability(result.adata, show=False)
    """
    is_single = isinstance(key, str)
    keys = given_names("key", key)
    if ax is not None and not is_single:
        msg = "`ax` has room for one consensus, given by its `key`; several make a figure of their own."
        raise ValueError(msg)
    drawn = [_drawn(adata, name, title="" if is_single else name) for name in keys]

    own = ax is None
    n_factors = max(len(one.table) for one in drawn)
    above = CHARACTER * max(len(line) for one in drawn for line in one.title.split("\n"))
    width, height = max(20 if is_single else 14, min(3 * n_factors, 40), COLUMN * n_factors, above) * em(), 20 * em()
    if ax is None:
        beside = max(len(name) for one in drawn for name in one.table.index)
        figure, grid = panels(1, len(keys), width, height, beside=beside, sharey=True)
        axes = grid[0].tolist()
    else:
        axes = [ax]
    for panel, one in zip(axes, drawn, strict=True):
        _panel(panel, one)
    axes[0].set_ylabel("Absolute cosine with the\nconsensus of other runs")
    _name_bands(axes[-1], drawn[-1])
    if own:
        fit(axes[0], width, height, n_cols=len(keys))
    else:
        turn_crowded(axes[0])
    if is_single:
        return finish(axes[0], show=show, return_fig=return_fig, own=own)
    return finish(figure, show=show, return_fig=return_fig)


class _Drawn(NamedTuple):
    """Values of a panel."""

    table: pd.DataFrame
    cosine_mk: np.ndarray
    thresholds: list[float]
    title: str


def _drawn(adata: AnnData, key: str, title: str) -> _Drawn:
    info: Any = consensus_info(adata, key)
    cosine_mk = np.asarray(info["cosine"])
    resample, n_failed = str(info["resample"]), int(info["n_failed"])
    failed = f" ({n_failed} failed)" if n_failed else ""
    lines = [title, _DIFFER.get(resample, resample), f"dots: {len(cosine_mk)} runs{failed}; large: their mean"]
    thresholds = np.asarray(info["thresholds"], dtype=np.float64).tolist()
    table = get.stability(adata, key=key)
    if "replicates" in table:
        lines.append(f"bold: the {table['replicates'].sum()} that replicate between the halves")
    return _Drawn(table, cosine_mk, thresholds, "\n".join(filter(None, lines)))


def _panel(ax: Axes, one: _Drawn) -> None:
    n_runs, n_factors = one.cosine_mk.shape
    at = np.arange(n_factors)
    ax.axhspan(*one.thresholds, color="whitesmoke", zorder=0)
    for threshold in one.thresholds:
        ax.axhline(threshold, color="darkgray", linewidth=0.8, linestyle="--", zorder=1)
    beside_m = np.linspace(-_SPREAD, _SPREAD, n_runs) if n_runs > 1 else np.zeros(1)
    # Dots at 0 and 1 are drawn whole, and the mean hides no run.
    ax.scatter(
        (at + beside_m[:, None]).ravel(),
        one.cosine_mk.ravel(),
        s=12,
        color=DARK,
        edgecolors="white",
        linewidths=0.4,
        clip_on=False,
        zorder=4,
        label="run",
    )
    for flag, (color, marker) in _LOOKS.items():
        has_flag = (one.table["flag"] == flag).to_numpy()
        ax.scatter(
            at[has_flag],
            one.table["reproducibility"].to_numpy()[has_flag],
            s=_SIZE**2,
            color=color,
            marker=marker,
            edgecolors="white",
            linewidths=0.5,
            clip_on=False,
            zorder=3,
            label=flag,
        )
    ax.set_xticks(at, one.table.index)
    if "replicates" in one.table:
        for label, replicates in zip(ax.get_xticklabels(), one.table["replicates"], strict=True):
            label.set_fontweight("bold" if replicates else "normal")
    ax.set_xlim(-0.6, n_factors - 0.4)
    ax.set_ylim(0, 1)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.set_xlabel("Consensus factor")
    ax.set_title(one.title, fontsize=SMALL)
    plain_axes(ax)


def _name_bands(ax: Axes, one: _Drawn) -> None:
    """Write the name of each flag, with its marker, beside the values that have it."""
    unstable, stable = one.thresholds
    for flag, height in zip(FLAGS, ((stable + 1) / 2, (unstable + stable) / 2, unstable / 2), strict=True):
        color, marker = _LOOKS[flag]
        for_marker, for_name = (
            offset_copy(ax.get_yaxis_transform(), ax.figure.figure, x=72 * em() * right, units="points")
            for right in (1, 1.8)
        )
        ax.plot(
            1,
            height,
            transform=for_marker,
            color=color,
            marker=marker,
            markersize=_SIZE,
            markeredgecolor="white",
            markeredgewidth=0.5,
            clip_on=False,
        )
        ax.text(1, height, flag, transform=for_name, va="center", fontsize=SMALL)
