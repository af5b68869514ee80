"""Effect of a rotation on the loadings."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.figure import Figure

from ldvae_ext import get
from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import check_one_of, check_positive_int
from ldvae_ext.core.matching import cosines, match_columns
from ldvae_ext.get._export import export_of
from ldvae_ext.get._genes import RANKS, Rank
from ldvae_ext.pl._figure import CHARACTER, COLUMN, ROW, SMALL, em, factor_labels, finish, fit, panels, plain_text
from ldvae_ext.pl._heatmap import annotate, color_bar, largest_of, longest_number, matrix, top_rows

# Share of the largest loading up to which a cell is nearly white.
_FAINT = 0.1
# With this number of factors two panels with numbers would be too wide, and names are vertical.
_FEW = 8


@plain_text
def rotation(
    adata: AnnData,
    *,
    n_genes: int = 3,
    rank_by: Rank = "loading",
    key: str = DEFAULT_KEY,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Loadings of the same genes before and after the rotation of an export.

    Left: loadings on the network's latents, each in the column of the factor with the most similar loadings (one to one); a
    minus sign before its name marks a latent whose sign is flipped. Right: loadings on the exported factors. Rows are genes,
    values canonical loadings in log-rate per unit of latent, with the same colours on both sides. Red: the gene increases.
    Blue: it decreases. Values are written into the cells if they fit; otherwise a minus sign marks negative values with a colour.

    The concentration of loadings is below each panel: the share of the largest loading of each gene in all squared loadings,
    ``sum_g max_k l_gk^2 / sum_gk l_gk^2``, over all genes of the model. It is 1 if each gene belongs to one factor, and
    1 / factors if the loadings of each gene have the same size.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to, after :meth:`ldvae_ext.model.LDVAE.rotate`.
    n_genes
        Genes of each factor: those with the largest absolute values after the rotation; a gene of several factors has one row.
        Genes that increase are first, then those that decrease, in the order of the factors.
    rank_by
        Criterion: ``"loading"``, ``"information"``, which weighs loadings by expression, or ``"regression"``, slopes of expression; see
        :func:`ldvae_ext.get.gene_scores`.
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
        If there is no such export, or it was made without a rotation.
    ValueError
        If ``n_genes`` is no count.

    Examples
    --------
    >>> model.rotate("varimax")
    >>> model.export_to_anndata()
    >>> figure = ldvae_ext.pl.rotation(adata, n_genes=2, show=False)
    """
    check_positive_int("n_genes", n_genes)
    check_one_of("rank_by", rank_by, RANKS)
    turn = get.rotation(adata, key=key)
    after = get.loadings(adata, key=key)
    is_known_g = after.notna().all(axis=1).to_numpy()
    score_gk = np.abs(get.gene_scores(adata, kind=rank_by, key=key).to_numpy()[is_known_g])
    after = after[is_known_g].astype(np.float64)
    before = _before(after, turn)
    share = [concentration(table.to_numpy()) for table in (before, after)]
    rows = np.unique(np.argsort(-score_gk, axis=0, kind="stable")[:n_genes])
    rows = rows[top_rows(after.to_numpy()[rows], len(rows))]
    tables = before.iloc[rows], after.iloc[rows]
    genes = after.index[rows].astype(str).tolist()
    after_labels = factor_labels(get.factors(adata, key=key), after.columns)
    method = str(export_of(adata, key)[1]["rotation"]["method"])

    both_gk = np.concatenate(tables, axis=1)
    largest = largest_of(both_gk)
    titles = "Before: latents", f"After: {method}"
    n_factors = after.shape[1]
    column = CHARACTER * (longest_number(both_gk, largest) + 1) if n_factors < _FEW else 2
    width = max(12, min(column * n_factors, 33), COLUMN * n_factors, CHARACTER * max(map(len, titles))) * em()
    height = max(14, ROW * len(genes)) * em()
    figure, axes = panels(1, 2, width, height, beside=max(map(len, [*genes, *after_labels])), sharey=True)
    images = []
    names = before.columns.tolist(), after_labels
    for ax, table, columns, title in zip(axes[0], tables, names, titles, strict=True):
        images.append(matrix(ax, table.to_numpy(), genes, columns, cmap="RdBu_r", largest=largest))
        ax.set_title(title, fontsize="medium")
        if n_factors >= _FEW:
            ax.tick_params(axis="x", labelrotation=90)
    color_bar(images[1], axes[0, 1], both_gk, "Loading\n(log-rate per\nunit of latent)")
    figure.supxlabel(
        f"Squared loadings that lie in the largest of each gene:\n{share[0]:.0%} before, {share[1]:.0%} after",
        fontsize=SMALL,
    )
    fit(axes[0, 0], width, height, n_cols=2)
    for image, table in zip(images, tables, strict=True):
        annotate(image, table.to_numpy(), largest, _FAINT * largest)
    return finish(figure, show=show, return_fig=return_fig)


def concentration(value_gk: np.ndarray) -> float:
    """Share of the largest loading of each gene in the squared loadings; NaN if all are 0."""
    square_gk = np.square(value_gk)
    total = square_gk.sum()
    return float(square_gk.max(axis=1).sum() / total) if total > 0 else np.nan


def _before(after: pd.DataFrame, turn: pd.DataFrame) -> pd.DataFrame:
    """Loadings on the network's latents, in the order and with the signs of the factors that they are most alike."""
    before_gk = after.to_numpy() @ turn.to_numpy().T
    match = match_columns(cosines(after.to_numpy(), before_gk))
    names = turn.index.astype(str)[match.second]
    turned = [f"\N{MINUS SIGN}{name}" if sign < 0 else name for name, sign in zip(names, match.sign, strict=True)]
    return pd.DataFrame(before_gk[:, match.second] * match.sign, index=after.index, columns=turned)
