"""The counts of the main job, which must be counts: a training on anything else says nothing."""

from __future__ import annotations

import warnings

import numpy as np
from anndata import AnnData
from scipy import sparse

from ldvae_ext._validate import listed


def check_raw_counts(adata: AnnData, layer: str | None, argument: str = "layer=") -> None:
    """Raise unless all values are counts; an error names the layers that hold some.

    Parameters
    ----------
    adata
        The cells.
    layer
        Layer with the counts; ``X`` if None.
    argument
        How the user names a layer.
    """
    # Importing the model takes seconds.
    from ldvae_ext.model._counts import are_counts, check_counts, counts_of

    with warnings.catch_warnings():
        # The set-up gives the same warnings.
        warnings.simplefilter("ignore", UserWarning)
        check_counts(adata, layer)
    if are_counts(counts_of(adata, layer)):
        return
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    msg = f"`{where}` must hold counts, but has values that are not integers, such as {_fraction(adata, layer):g}. "
    # anndata lists X among the layers, with the name None.
    others = [name for name in filter(None, adata.layers.keys()) if are_counts(adata.layers[name])]
    if others:
        msg += f"Counts are in {listed(others)}: name {'it' if len(others) == 1 else 'one of them'} with `{argument}`."
    elif layer is not None and adata.X is not None and are_counts(adata.X):
        msg += f"Counts are in `adata.X`: leave out `{argument}`."
    elif adata.raw is not None and are_counts(adata.raw.X):
        msg += (
            "`adata.raw` holds counts: `adata.layers['counts'] = adata.raw[:, adata.var_names].X` makes a layer of it."
        )
    else:
        msg += "No layer holds counts."
    msg += f" If they are corrected counts, as of SoupX or CellBender, round them first: `{where} = np.rint({where})`."
    raise ValueError(msg)


def _fraction(adata: AnnData, layer: str | None, n_at_once: int = 1000) -> float:
    """The first value that is not an integer."""
    from ldvae_ext.model._counts import counts_of

    for start in range(0, adata.n_obs, n_at_once):
        some = counts_of(adata[start : start + n_at_once], layer)
        values = some.data if sparse.issparse(some) else np.asarray(some)
        fractions = values[values % 1 != 0]
        if fractions.size:
            return float(fractions.flat[0])
    return np.nan
