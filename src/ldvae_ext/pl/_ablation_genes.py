"""Through which genes a factor helps a population, or hurts it."""

from __future__ import annotations

from typing import Any

from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldvae_ext import get
from ldvae_ext._keys import ABLATION_INFO
from ldvae_ext._validate import check_positive_int
from ldvae_ext.pl._ablation import change_label, with_sizes
from ldvae_ext.pl._figure import factor_labels, finish, groups_in_order, one_factor, plain_text
from ldvae_ext.pl._heatmap import heatmap, top_rows


@plain_text
def ablation_genes(
    ablation: AnnData,
    factor: Any,
    *,
    n_genes: int = 10,
    groups: Any = None,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Genes whose counts a factor helps most to explain, or hurts most, in each group of cells.

    Rows are genes, columns groups, with their number of cells. Values are mean changes of the negative log-likelihood of the
    gene's counts without the factor, in nats per cell of the group; the colours are symmetric around 0. Blue: the factor
    helps to explain the gene. Red: it hurts. Values are written into the cells where they fit; elsewhere a minus sign marks
    the negative ones.

    Genes whose fit the factor improves in the group with their largest effect are first, then genes whose fit it makes
    worse; genes with the largest effect in the same group are adjacent.

    Parameters
    ----------
    ablation
        (Groups x genes) x latents, from :meth:`ldvae_ext.model.LDVAE.ablate_genes` or :func:`ldvae_ext.tl.ablate_genes`.
        With a column ``flag`` in its ``var``, as for :func:`ablation`, the title has the flag of the factor.
    factor
        One of its columns: a name (``"Z_3"``) or position.
    n_genes
        Genes to draw: those with the largest absolute change in any of the groups drawn. All where there are fewer.
    groups
        Groups to draw, in this order. All of them if None.
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
    ValueError
        If the ablation is not one of genes, the factor or a group does not exist, or ``n_genes`` is no count.

    Examples
    --------
    >>> genes = ldvae_ext.tl.ablate_genes(adata, "bulk_labels")
    >>> axes = ldvae_ext.pl.ablation_genes(genes, 0, show=False)
    """
    check_positive_int("n_genes", n_genes)
    if not isinstance(ablation, AnnData):
        msg = f"`ablation` must be a result of `ablate_genes`; got {type(ablation).__name__}."
        raise TypeError(msg)
    name = one_factor(factor, ablation.var_names.astype(str).tolist())
    table = get.gene_ablation_df(ablation, name)
    chosen = groups_in_order(groups, table["group"].unique().tolist())
    n_cells = table.groupby("group")["n_cells"].first().loc[chosen]
    values = table.pivot(index="gene", columns="group", values="mean").loc[table["gene"].unique(), chosen]
    values = values.iloc[top_rows(values.to_numpy(), n_genes)]
    own = ax is None
    ax = heatmap(
        values.to_numpy(),
        values.index.tolist(),
        with_sizes(chosen, n_cells),
        label=change_label(ablation),
        xlabel=ablation.uns[ABLATION_INFO].get("groupby", ""),
        title=factor_labels(ablation.var, [name])[0],
        ax=ax,
    )
    return finish(ax, show=show, return_fig=return_fig, own=own)
