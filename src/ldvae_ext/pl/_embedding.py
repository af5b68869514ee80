"""Factors on an embedding of the cells."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from ldvae_ext import get
from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import check_number, check_positive_int, listed
from ldvae_ext.get._export import latents_of
from ldvae_ext.pl._figure import (
    BLUE,
    ORANGE,
    SMALL,
    em,
    factor_labels,
    factors_in_order,
    finish,
    fit,
    panels,
    plain_axes,
    plain_text,
)

# Values beyond this quantile have the colour of the end.
_QUANTILE = 0.98
# Area of all points together, as in scanpy.
_AREA = 120_000
DIVERGING = LinearSegmentedColormap.from_list("ldvae_ext", [BLUE, "#dddddd", ORANGE])


@plain_text
def embedding_factors(
    adata: AnnData,
    *,
    basis: str | None = None,
    factors: Any = None,
    ncols: int = 4,
    size: float | None = None,
    key: str = DEFAULT_KEY,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Cells in an embedding, coloured by each factor.

    Each factor has a panel; all have the same scale, in units of the prior's standard deviation, with 0 in the middle. Cells at the ends of a
    factor are drawn on top.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    basis
        Embedding in ``obsm``, with or without ``X_``: its first two columns. ``"umap"`` if None.
    factors
        Factors to draw, in this order: names (``"Z_3"``) or positions in the exported order. All of them if None.
    ncols
        Panels in a row.
    size
        Area of a point in square points; 120,000 divided by the number of cells if None, at most 20.
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
        If there is no such export or embedding.
    ValueError
        If the export has no such factor, or the embedding has less than two columns.

    Examples
    --------
    >>> figure = ldvae_ext.pl.embedding_factors(result.adata, factors=[0, 1], show=False)
    """
    table = get.factors(adata, key=key)
    names = table.index.tolist()
    chosen = factors_in_order(factors, names)
    check_positive_int("ncols", ncols)
    if size is not None:
        check_number("size", size, least=0)
    xy, axis = _embedding(adata, "umap" if basis is None else basis)
    latent_nk = latents_of(adata, key)[:, chosen].astype(np.float64)
    limit = max(float(np.quantile(np.abs(latent_nk), _QUANTILE)), 1e-6)
    scale = Normalize(-limit, limit)
    n_cols = min(ncols, len(chosen))
    n_rows, side = -(-len(chosen) // n_cols), max(13, 36 / n_cols) * em()
    figure, axes = panels(n_rows, n_cols, side, side, beside=10)
    for ax in axes.flat[len(chosen) :]:
        ax.remove()
    area = min(_AREA / max(1, len(xy)), 20.0) if size is None else size
    drawn = None
    labels = factor_labels(table, [names[k] for k in chosen])
    for ax, label, value_n in zip(axes.flat, labels, latent_nk.T, strict=False):
        order = np.argsort(np.abs(value_n), kind="stable")
        drawn = ax.scatter(
            *xy[order].T, c=value_n[order], cmap=DIVERGING, norm=scale, s=area, linewidths=0, rasterized=True
        )
        ax.set_title(label, fontsize="medium")
        ax.set_xticks([])
        ax.set_yticks([])
        plain_axes(ax, lines=("left", "right", "top", "bottom"))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"{axis}2")
    for ax in axes.flat[max(0, len(chosen) - n_cols) : len(chosen)]:
        ax.set_xlabel(f"{axis}1")
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes.ravel().tolist()[: len(chosen)], extend="both", shrink=0.8, aspect=30)
        bar.set_label("Factor (standard deviations of the prior)", fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
    fit(axes[0, 0], side, side, n_rows=n_rows, n_cols=n_cols)
    return finish(figure, show=show, return_fig=return_fig)


def _embedding(adata: AnnData, basis: str) -> tuple[np.ndarray, str]:
    """Two columns of an embedding, and the name of its axes."""
    found = next((name for name in (f"X_{basis}", basis) if name in adata.obsm), None)
    if found is None:
        msg = f"`basis`: there is no {basis!r} in `adata.obsm`, which has {listed(adata.obsm) or 'nothing'}; `scanpy.tl.umap` makes a UMAP."
        raise KeyError(msg)
    xy = np.asarray(adata.obsm[found])
    if xy.ndim != 2 or xy.shape[1] < 2:
        msg = f"`basis`: {found!r} must have two columns or more; it has shape {xy.shape}."
        raise ValueError(msg)
    name = found.removeprefix("X_")
    return xy[:, :2].astype(np.float64), name.upper() if name in ("umap", "tsne", "pca") else name
