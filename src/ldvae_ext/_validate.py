"""Argument checks. Each error gives the name of the argument, the allowed values and the given value."""

from __future__ import annotations

import re
import warnings
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGE = str(Path(__file__).parent)


def warn(message: str) -> None:
    """Issue a UserWarning that points to the caller's line, not into this package."""
    warnings.warn(message, UserWarning, skip_file_prefixes=(_PACKAGE,))


def listed(values: Iterable[Any], limit: int = 10) -> str:
    """Quote the first few values for an error message."""
    values = [v.item() if isinstance(v, np.generic) else v for v in values]
    shown = ", ".join(repr(v) for v in values[:limit])
    return f"{shown}, ... ({len(values)} in all)" if len(values) > limit else shown


# Control characters, and marks that change the direction of the text behind them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: Any) -> str:
    """Text for a figure, a page or a terminal: control characters of names are replaced by their escapes, as in ``repr``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def check_names_last(name: str, values: Iterable[Any]) -> None:
    """Raise on a name that ends with NUL: arrays of text lose it, and names that differ in nothing else become one."""
    for value in values:
        if isinstance(value, str) and value.endswith("\0"):
            msg = (
                f"`{name}`: {value!r} ends with a NUL character, which arrays of text and files do not keep; rename it."
            )
            raise ValueError(msg)


def check_is_decoder(decoder: Any) -> None:
    """Raise unless this is a :class:`ldvae_ext.core.LinearDecoder`."""
    # By its arrays: the class imports this file.
    if not hasattr(decoder, "weight_gk"):
        msg = f"`decoder` must be a LinearDecoder; got {type(decoder).__name__}."
        raise TypeError(msg)


def check_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    # Comparing a value without a hash, such as an AnnData, may raise.
    if not isinstance(value, Hashable) or value not in allowed:
        msg = f"`{name}` must be one of {listed(allowed)}; got {value!r}."
        raise ValueError(msg)


# More cells, genes, epochs or draws than this cannot be meant.
_MOST = 2**31 - 1


def check_positive_int(name: str, value: Any, *, least: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least 1, or of ``least``."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if not is_integer or value < least:
        msg = f"`{name}` must be an integer of at least {least}; got {value!r}."
        raise ValueError(msg)
    if value > _MOST:
        msg = f"`{name}` must be at most {_MOST:,}; got {value!r}."
        raise ValueError(msg)


def check_number(name: str, value: Any, *, least: float = -np.inf, most: float = np.inf) -> None:
    """Raise unless ``value`` is a finite number between bounds, which are allowed themselves."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, (bool, np.bool_))
    # Comparisons with NaN are false.
    if not is_number or not least <= value <= most or abs(value) == np.inf:
        bounds = f" of at least {least:g}" if np.isfinite(least) else ""
        bounds = f" from {least:g} to {most:g}" if np.isfinite(most) else bounds
        msg = f"`{name}` must be a finite number{bounds}; got {value!r}."
        raise ValueError(msg)


def check_column(columns: Iterable[Any], name: str, key: str) -> None:
    """Raise unless ``key``, the value of argument ``name``, is a column of obs."""
    if not isinstance(key, Hashable):
        msg = f"`{name}` must be the name of one column of `adata.obs`; got {key!r}."
        raise TypeError(msg)
    if key not in columns:
        msg = f"`{name}`: {key!r} is not a column of `adata.obs`, which has {listed(columns, 20)}."
        raise KeyError(msg)


def factor_indices(factors: Any, names: Sequence[str], *, argument: str = "latents") -> np.ndarray:
    """Positions of factors given by name, by 0-based position, or as None for all of them.

    Returns
    -------
    Unique positions in ascending order, int64.
    """
    if factors is None:
        return np.arange(len(names))
    if isinstance(factors, str) or not isinstance(factors, Iterable):
        factors = [factors]
    positions = {name: i for i, name in enumerate(names)}
    chosen = []
    for factor in factors:
        if isinstance(factor, (int, np.integer)) and not isinstance(factor, bool) and 0 <= factor < len(names):
            chosen.append(int(factor))
        elif isinstance(factor, str) and factor in positions:
            chosen.append(positions[factor])
        else:
            msg = f"`{argument}`: {factor!r} is no latent of this model; allowed are {listed(names, 50)} or 0 to {len(names) - 1}."
            if {str(factor)[:2], names[0][:2]} == {"Z_", "F_"}:
                msg += " Factors are named F_0, ... under a rotation and Z_0, ... otherwise; see `LDVAE.rotate`."
            raise ValueError(msg)
    if not chosen:
        msg = f"`{argument}` must name at least one latent; got {factors!r}."
        raise ValueError(msg)
    return np.unique(chosen)


def cell_positions(indices: Any, n_cells: int, *, argument: str = "indices") -> np.ndarray:
    """Positions of cells given as None (all cells), as a mask, or as positions."""
    if indices is None:
        return np.arange(n_cells)
    indices = np.asarray(indices)
    if indices.dtype == bool:
        if indices.shape != (n_cells,):
            msg = f"`{argument}` as a mask must have one value for each of {n_cells} cells; got shape {indices.shape}."
            raise ValueError(msg)
        return np.flatnonzero(indices)
    if not np.issubdtype(indices.dtype, np.integer) and indices.size:
        msg = f"`{argument}` must be positions (integers) or a mask (bool) of {n_cells} cells; got {indices.dtype} such as {indices.flat[0]!r}."
        raise TypeError(msg)
    positions = indices.ravel().astype(np.int64)
    outside = (positions < -n_cells) | (positions >= n_cells)
    if outside.any():
        msg = f"`{argument}` must be positions of {n_cells} cells; got {positions[outside][0]}."
        raise ValueError(msg)
    # Negative positions count from the end, as in numpy.
    return np.where(positions < 0, positions + n_cells, positions)


def given_names(argument: str, value: Any) -> list[str]:
    """Names as a list of strings; a single name becomes a list of one."""
    one = isinstance(value, (str, int, float, np.generic))
    names = [str(value)] if one else [str(name) for name in value]
    if not names:
        msg = f"`{argument}` must name at least one; got {value!r}."
        raise ValueError(msg)
    return names
