"""Cells in the space of a few factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldvae_ext import get
from ldvae_ext._keys import DEFAULT_KEY, export_keys
from ldvae_ext._validate import check_column, listed
from ldvae_ext.pl._figure import BLUE, MISSING, PALETTE, SMALL, em, factors_in_order, finish, fit, panels

_DEFAULT_FACTORS = 4
_MANY_CELLS = 5_000
# A second set of shapes starts where the colours are used up.
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "*")


def latent_pairs(
    adata: AnnData,
    *,
    factors: Any = None,
    color: str | None = None,
    key: str = DEFAULT_KEY,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Posterior means of the cells, for each pair of factors.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    factors
        Factors to draw, in this order: names (``"Z_3"``) or positions in the exported order. The first four if None.
    color
        Column of ``obs``. A numeric one gets a colour bar, any other a legend, with the colours of
        ``uns[f"{color}_colors"]`` if there are enough, else with colours and markers. Cells without a value are grey.
    key
        ``key_added`` of the export.
    show
        Whether to show the figure; ``scanpy.settings.autoshow`` if None.
    return_fig
        Whether to return the figure, without showing it unless ``show`` says so.

    Returns
    -------
    The figure, or None if it was shown.

    Raises
    ------
    KeyError
        If there is no such export, or if ``color`` is no column.
    ValueError
        If the export has no such factor, or if there are fewer than two.
    """
