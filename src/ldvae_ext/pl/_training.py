"""Training curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldvae_ext._validate import listed
from ldvae_ext.pl._figure import BLUE, ORANGE, SMALL, Ticks, em, finish, fit, panels, plain_axes, plain_text

_TITLES = {
    "elbo": "Negative ELBO\n(lower is better)",
    "reconstruction_loss": "Reconstruction\n(negative log-likelihood)",
    "kl_local": "KL of the posterior\nfrom the prior",
}
_STYLES = {"train": {"color": BLUE}, "validation": {"color": ORANGE, "linestyle": "--"}}
# The axis is made for the epochs after this share of them, with this much of their range to spare.
_EARLY = 1 / 3
_SPARE = 0.6


@plain_text
def training_curves(
    history: Mapping[str, pd.DataFrame], *, show: bool | None = None, return_fig: bool = False
) -> Figure | None:
    """Loss of the training and validation cells in each epoch, in nats per cell.

    A panel each for the negative ELBO (scvi-tools logs it as ``elbo_train`` and ``elbo_validation``; it counts the KL in
    full, also during warm-up), the reconstruction error and the KL divergence; the first is the sum of the others. If
    the values of early epochs would flatten the rest, they are outside of the axis, and a note in the panel has their range.

    Parameters
    ----------
    history
        ``history`` of a trained model: tables of one column, by metric, indexed by epoch.
    show
        True to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        True to return the figure; it is then only shown if ``show`` is True.

    Returns
    -------
    The figure, or None if it was shown.

    Raises
    ------
    TypeError
        If ``history`` is no mapping, as before training.
    KeyError
        If it has none of these metrics.

    Examples
    --------
    >>> figure = ldvae_ext.pl.training_curves(model.history, show=False)
    """
    if not isinstance(history, Mapping):
        msg = f"`history` must be `model.history` of a trained model, a mapping; got {type(history).__name__}."
        raise TypeError(msg)
    wanted = [f"{metric}_{cells}" for metric in _TITLES for cells in _STYLES]
    if not any(name in history for name in wanted):
        msg = f"`history` must have one of {listed(wanted)}; it has {listed(history, 20)}."
        raise KeyError(msg)
    curves = {
        metric: {cells: _curve(history[f"{metric}_{cells}"]) for cells in _STYLES if f"{metric}_{cells}" in history}
        for metric in _TITLES
    }
    curves = {metric: of for metric, of in curves.items() if of}

    n_cols, width, height = len(curves), 18 * em(), 14 * em()
    figure, axes = panels(1, n_cols, width, height)
    for ax, (metric, of) in zip(axes[0], curves.items(), strict=True):
        for cells, curve in of.items():
            marker = "o" if len(curve) == 1 else None
            ax.plot(curve.index, curve, label=cells, marker=marker, **_STYLES[cells])
        _leave_out_early(ax, pd.concat(list(of.values())))
        ax.set_title(_TITLES[metric], fontsize="medium")
        ax.set_xlabel("Epoch")
        ax.xaxis.set_major_locator(Ticks(5, integer=True))
        ax.yaxis.set_major_locator(Ticks(5))
        plain_axes(ax)
    axes[0, 0].set_ylabel("nats per cell")
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=SMALL)
    fit(axes[0, 0], width, height, n_cols=n_cols)
    return finish(figure, show=show, return_fig=return_fig)


def _curve(table: Any) -> pd.Series:
    return pd.Series(np.asarray(table, dtype=np.float64).ravel(), index=table.index)


def _leave_out_early(ax: Axes, values: pd.Series) -> None:
    """Fit the axis to the later epochs if the values of early epochs would flatten the rest."""
    values = values[np.isfinite(values)]
    later = values[values.index >= (1 - _EARLY) * values.index.min() + _EARLY * values.index.max()]
    spare = _SPARE * (later.max() - later.min())
    # Also false without values, and in a single epoch.
    if not spare > 0:
        return
    # The notes are beside the early epochs, where no curve is drawn.
    margin = 0.1 * spare
    low, high = later.min() - spare, later.max() + spare
    if values.min() < low:
        ax.set_ylim(bottom=low)
        _note(ax, f"early epochs: down to {_short(values.min())}", 0.02, "bottom")
    else:
        ax.set_ylim(bottom=values.min() - margin)
    if values.max() > high:
        ax.set_ylim(top=high)
        _note(ax, f"early epochs: up to {_short(values.max())}", 0.98, "top")
    else:
        ax.set_ylim(top=values.max() + margin)


def _note(ax: Axes, text: str, height: float, side: str) -> None:
    ax.text(0.98, height, text, transform=ax.transAxes, ha="right", va=side, fontsize=SMALL, color="dimgray")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
