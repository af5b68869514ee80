"""Loadings of a factor in each population."""

from __future__ import annotations

from typing import Any

from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldvae_ext import get
from ldvae_ext._keys import POPULATION_LOADINGS
from ldvae_ext._validate import check_positive_int, printable
from ldvae_ext.core._arrays import strings
from ldvae_ext.get._populations import populations_of
from ldvae_ext.pl._figure import finish, groups_in_order, labels_in_result, one_factor, plain_text
from ldvae_ext.pl._heatmap import heatmap, top_rows

# Shares of expression are small; they are shown as counts in a cell with this total.
_COUNTS = 10_000


@plain_text
def population_loadings(
    adata: AnnData,
    factor: Any,
    *,
    n_genes: int = 20,
    groups: Any = None,
    key: str = POPULATION_LOADINGS,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Genes that a factor moves most, in each population.

    Rows are genes, columns populations; the colours are symmetric around 0. Red: the gene increases. Blue: it decreases.
    The label of the colour bar has the unit of the values, which depends on the ``kind`` of the population loadings. Values are
    written into the cells if they fit; otherwise a minus sign marks negative values.

    Genes that increase in the population with their largest value are first, then those that decrease; genes with the largest
    value in the same population are adjacent.

    Parameters
    ----------
    adata
        AnnData that :func:`ldvae_ext.tl.population_loadings` wrote to.
    factor
        A factor, by name (``"Z_3"``) or position in the exported order; ``"batch"`` where ``kind="path"`` has it. For
        ``kind="within"`` a direction (``"D_0"``), which differs between populations:
        :func:`ldvae_ext.get.population_directions_df` returns its factors.
    n_genes
        Genes to draw: those with the largest absolute value in any of the populations drawn. All where there are fewer.
    groups
        Populations to draw, in this order. All of them if None.
    key
        ``key_added`` of the population loadings.
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
    KeyError
        If there are no population loadings.
    ValueError
        If the factor or a population does not exist, or ``n_genes`` is no count.

    Notes
    -----
    Units: log-rate per unit of latent for ``kind="gradient"``, on the scale of expression counts per 10,000 per unit of latent
    (the stored shares times 10,000; under a softplus link counts at a size factor of 1, as they are); log-rate for
    ``"contribution"`` and ``"path"``; log-rate per standard deviation of the population's cells for ``"within"``. Gradients on
    the log scale differ between populations by one number for each factor only, see
    :meth:`ldvae_ext.model.LDVAE.get_population_loadings`.

    Examples
    --------
    >>> ldvae_ext.tl.population_loadings(adata, "bulk_labels")
    >>> axes = ldvae_ext.pl.population_loadings(adata, 0, n_genes=10, show=False)
    """
    check_positive_int("n_genes", n_genes)
    _, info = populations_of(adata, key)
    name = one_factor(factor, strings(info["names"]).tolist())
    chosen = groups_in_order(groups, strings(info["groups"]).tolist())
    label, times = _label(adata, info)
    table = get.population_loadings_df(adata, name, chosen, key=key)
    values = table.pivot(index="gene", columns="group", values="value").loc[table["gene"].unique(), chosen] * times
    values = values.iloc[top_rows(values.to_numpy(), n_genes)]
    above = [*labels_in_result(adata, [name], info), *reference_line(info)]
    if info["kind"] == "within":
        above.append("another in each")
    own = ax is None
    ax = heatmap(
        values.to_numpy(),
        values.index.astype(str).tolist(),
        chosen,
        label=label,
        cmap="RdBu_r",
        xlabel=str(info["groupby"]),
        title="\n".join(above),
        ax=ax,
    )
    return finish(ax, show=show, return_fig=return_fig, own=own)


def reference_line(info: Any) -> list[str]:
    """Reference of the populations, for a title, if there is one."""
    if "reference" not in info:
        return []
    reference = str(info["reference"])
    return [f"against {'the ' if reference in ('rest', 'prior') else ''}{printable(reference)}"]


def _label(adata: AnnData, info: Any) -> tuple[str, int]:
    """Meaning of the values, in up to three lines, and their factor."""
    if info["kind"] == "within":
        return "Change in log-rate\nper s.d. of the cells\nalong the direction", 1
    if info["kind"] == "path":
        return "Part in the log-ratio\n(log-rate)", 1
    if info["kind"] == "contribution":
        return "Contribution\n(log-rate)", 1
    if info["scale"] == "log":
        return "Slope\n(log-rate\nper unit of latent)", 1
    # A softplus has no shares of expression to multiply.
    if get.decoder(adata, key=str(info["key"])).link == "softplus":
        return "Slope\n(counts at size factor 1\nper unit of latent)", 1
    return f"Slope\n(counts per {_COUNTS:,}\nper unit of latent)", _COUNTS
