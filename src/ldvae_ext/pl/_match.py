"""Matching of the factors of two models."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ldvae_ext.pl._figure import finish, plain_text
from ldvae_ext.pl._heatmap import heatmap


@plain_text
def match(
    match: Any, *, ax: Axes | None = None, show: bool | None = None, return_fig: bool = False
) -> Axes | Figure | None:
    """Similarity of each factor of one model and each factor of another.

    Rows are factors of the first model, columns those of the second, in the order of the pairs. Pairs are on the diagonal, with
    a frame; factors without a partner are last. Red: the same direction. Blue: opposite directions. Values
    are written into the cells where they fit; elsewhere a minus sign marks those below -0.1.

    The title has the median of the absolute values of the pairs and, for loadings, the Procrustes distance: if it is close
    to 0 while pairs are dissimilar, the two models have the same subspace and different axes.

    Parameters
    ----------
    match
        A :class:`ldvae_ext.tl.FactorMatch`, from :func:`ldvae_ext.tl.match_factors`.
    ax
        Axes to draw in; a new figure if None.
    show
        True to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        True to return the figure; it is then only shown if ``show`` is True.

    Returns
    -------
    The axes of the heatmap, the figure if ``return_fig``, or None if it was shown.

    Raises
    ------
    TypeError
        If ``match`` is no such match.

    Examples
    --------
    >>> matched = ldvae_ext.tl.match_factors(*result.ensemble.models)
    >>> axes = ldvae_ext.pl.match(matched, show=False)
    """
    if not all(hasattr(match, name) for name in ("pairs", "cosine", "procrustes_distance", "n_shared", "by")):
        msg = f"`match` must be a `FactorMatch`, from `tl.match_factors`; got {type(match).__name__}."
        raise TypeError(msg)
    rows, columns = match.cosine.index, match.cosine.columns
    paired_rows, paired_columns = rows.get_indexer(match.pairs["first"]), columns.get_indexer(match.pairs["second"])
    row_order = np.append(paired_rows, np.setdiff1d(np.arange(len(rows)), paired_rows))
    column_order = np.append(paired_columns, np.setdiff1d(np.arange(len(columns)), paired_columns))
    is_of_cells = match.by == "scores"
    what = "correlation" if is_of_cells else "cosine"
    title = [f"Median |{what}| of pairs: {match.pairs['cosine'].abs().median():.2f}"]
    if np.isfinite(match.procrustes_distance):
        title.append(f"Procrustes distance: {match.procrustes_distance:.2f}")

    own = ax is None
    ax = heatmap(
        match.cosine.to_numpy()[np.ix_(row_order, column_order)],
        rows[row_order].astype(str).tolist(),
        columns[column_order].astype(str).tolist(),
        label=f"{what.capitalize()} of {match.by.replace('_', ' ')}\n({match.n_shared:,} shared {'cells' if is_of_cells else 'genes'})",
        cmap="RdBu_r",
        xlabel="Factor of the second",
        ylabel="Factor of the first",
        title="\n".join(title),
        largest=1.0,
        faint=0.1,
        ax=ax,
    )
    for i in range(len(match.pairs)):
        ax.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.2, clip_on=False))
    return finish(ax, show=show, return_fig=return_fig, own=own)
