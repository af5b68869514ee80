"""What each population loses without each factor."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from ldvae_ext import get
from ldvae_ext.pl._figure import CHARACTER, SMALL, em, factors_in_order, finish, fit, panels, turn_crowded


def ablation(
    ablation: AnnData,
    groupby: str,
    *,
    factors: Any = None,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Mean change of the negative log-likelihood of each group of cells without each factor.

    Rows are groups, with their number of cells, columns factors, values in nats per cell; the colours are symmetric
    around 0. Blue: the factor helps to explain the group. Red: it hurts. Values are written into the cells where they
    fit; elsewhere a minus sign marks the negative ones.

    Parameters
    ----------
    ablation
        Cells x latents, from :meth:`ldvae_ext.model.LDVAE.ablate`.
    groupby
        Categorical column of its ``obs``; cells where it is NaN are left out, groups without cells too.
    factors
        Factors to draw, in this order: names (``"Z_3"``), such as ``ldvae_ext.get.factors(adata).index`` for the
        exported order, or positions. All of them, as they stand in ``ablation``, if None.
    ax
        Axes to draw in; a new figure if None.
    show
        Whether to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        Whether to return the figure, without showing it unless ``show`` says so.

    Returns
    -------
    The axes of the heatmap, the figure if ``return_fig``, or None if it was shown.

    Raises
    ------
    KeyError
        If ``groupby`` is no column.
    ValueError
        If ``factors`` names none or an unknown one, or if no cell has a group.
    """
    table = get.ablation_df(ablation, groupby)
    names = ablation.var_names.astype(str).tolist()
    chosen = factors_in_order(factors, names)
    groups = table.drop_duplicates("group")
    labels = [f"{group} ({n:,})" for group, n in zip(groups["group"], groups["n_cells"], strict=True)]
    means = table.pivot(index="group", columns="factor", values="mean")
    mean_pk = means.loc[groups["group"], [names[k] for k in chosen]].to_numpy()
    finite = mean_pk[np.isfinite(mean_pk)]
    largest = np.abs(finite).max(initial=0) or 1.0
    # Three digits of the largest value.
    digits = max(0, 2 - int(np.floor(np.log10(largest))))
    # Adding 0 takes the sign off a negative zero.
    values_pk = np.round(mean_pk, digits) + 0.0
    texts = [[f"{value:.{digits}f}" for value in row] for row in values_pk]

    own = ax is None
    column = CHARACTER * (max(len(text) for row in texts for text in row) + 1)
    width = max(12, 1.5 * len(chosen), min(column * len(chosen), 70)) * em()
    height = max(14, 1.8 * len(labels), CHARACTER * len(groupby)) * em()
    if ax is None:
        ax = panels(1, 1, width, height, beside=max(map(len, labels)))[1].item()
    image = ax.imshow(mean_pk, cmap="RdBu", norm=CenteredNorm(halfrange=largest), aspect="auto")
    ax.set_xticks(np.arange(len(chosen)), [names[k] for k in chosen])
    ax.set_yticks(np.arange(len(labels)), labels)
    ax.set_xlabel("Factor")
    ax.set_ylabel(groupby, fontsize=SMALL)
    ax.grid(visible=False)
    ax.tick_params(labelsize=SMALL, length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label("Change in NLL\nwithout the factor\n(nats per cell)", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    # The colours are symmetric; the bar shows those that occur.
    bar.ax.set_ylim(finite.min(initial=0), finite.max(initial=0) or 0.05 * largest)
    if own:
        fit(ax, width, height)
    else:
        turn_crowded(ax)
    _annotate(ax, image.to_rgba(mean_pk), values_pk, texts)
    return finish(ax, show=show, return_fig=return_fig, own=own)


def _annotate(ax: Axes, rgba_pk: np.ndarray, values_pk: np.ndarray, texts: list[list[str]]) -> None:
    """Write the values where they fit, else a minus sign where they are negative; the axes must have been laid out."""
    panel = ax.get_window_extent()
    inches = em() * ax.figure.figure.dpi
    longest = max(len(text) for row in texts for text in row)
    n_groups, n_factors = values_pk.shape
    roomy = panel.width / n_factors >= CHARACTER * longest * inches and panel.height / n_groups >= 1.1 * inches
    for (p, k), value in np.ndenumerate(values_pk):
        if not roomy and value >= 0:
            continue
        red, green, blue, _ = rgba_pk[p, k]
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = texts[p][k].replace("-", "\N{MINUS SIGN}") if roomy else "\N{MINUS SIGN}"
        ax.text(k, p, text, ha="center", va="center", fontsize=SMALL, color="white" if dark else "black")
