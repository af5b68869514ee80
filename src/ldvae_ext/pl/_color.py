"""Colours and markers of cells, by a column of obs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, is_color_like, to_rgba_array
from matplotlib.lines import Line2D

from ldvae_ext._validate import listed, printable, warn
from ldvae_ext.pl._figure import BLUE, MISSING, PALETTE

# The next shape starts where the colours are used up.
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "*")


@dataclass(frozen=True, eq=False)
class Look:
    """Colour and marker of each cell, and their legend."""

    color_n: np.ndarray
    marker_n: np.ndarray
    labels: list[str] = field(default_factory=list)
    handles: list[Line2D] = field(default_factory=list)
    mappable: ScalarMappable | None = None


def _own_colors(adata: AnnData, color: str) -> list[str]:
    """Colours in ``uns``; none, with a warning as in scanpy, if one is not valid."""
    key = f"{color}_colors"
    given = adata.uns.get(key, ())
    colors = [given] if isinstance(given, str) else list(map(str, given))
    wrong = [value for value in colors if not is_color_like(value)]
    if wrong:
        warn(f"`adata.uns[{key!r}]` has {listed(wrong)}, which is no colour; the default colours are used.")
    return [] if wrong else colors


def group_colors(adata: AnnData, groupby: str, groups: Sequence[str]) -> list[str]:
    """Colours of groups in ``uns``, which are in the order of the categories; one for all if there are too few."""
    categories = list(map(str, pd.Categorical(pd.Series(adata.obs[groupby])).categories))
    own = _own_colors(adata, groupby)
    color_of = dict(zip(categories, own)) if len(own) >= len(categories) else {}
    return [color_of.get(group, BLUE) for group in groups]


def look_of(adata: AnnData, color: str | None) -> Look:
    """The look of the cells, by a column of ``obs`` that exists, or all the same."""
    round_n = np.full(adata.n_obs, _MARKERS[0])
    if color is None:
        return Look(np.tile(to_rgba_array(BLUE), (adata.n_obs, 1)), round_n)
    column = pd.Series(adata.obs[color])
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        value_n = column.to_numpy(dtype=np.float64, na_value=np.nan)
        known_n = np.isfinite(value_n)
        mappable = ScalarMappable(Normalize(), "viridis")
        mappable.set_array(value_n[known_n])
        mappable.autoscale()
        color_n = np.tile(to_rgba_array(MISSING), (adata.n_obs, 1))
        color_n[known_n] = mappable.to_rgba(value_n[known_n])
        return Look(color_n, round_n, mappable=mappable)
    groups = pd.Categorical(column)
    n_groups = len(groups.categories)
    own_colors = _own_colors(adata, color)
    if len(own_colors) >= n_groups:
        colors, markers = own_colors[:n_groups], [_MARKERS[0]] * n_groups
    else:
        at = np.arange(n_groups)
        colors = [PALETTE[i] for i in at % len(PALETTE)]
        markers = [_MARKERS[i] for i in at // len(PALETTE) % len(_MARKERS)]
    # A code of -1, for no value, takes the last of each.
    colors, markers = [*colors, MISSING], [*markers, _MARKERS[0]]
    present = [int(code) for code in np.unique(groups.codes)]
    present.sort(key=lambda code: code % len(colors))
    return Look(
        to_rgba_array(colors)[groups.codes],
        np.array(markers)[groups.codes],
        ["no value" if code < 0 else printable(groups.categories[code]) for code in present],
        [Line2D([], [], linestyle="none", marker=markers[code], color=colors[code]) for code in present],
    )
