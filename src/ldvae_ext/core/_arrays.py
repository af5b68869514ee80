"""Small array helpers that the frozen values share."""

from __future__ import annotations

from typing import Any

import numpy as np


def at_positions(value: np.ndarray, position: np.ndarray, n: int) -> np.ndarray:
    """Rows of an array at their positions among n, float32: NaN for the other rows; a position of -1 is none."""
    out = np.full((n, *value.shape[1:]), np.nan, dtype=np.float32)
    out[position[position >= 0]] = value[position >= 0]
    return out


def read_only(value: Any, shape: tuple[int | None, ...], name: str) -> np.ndarray:
    """A private float64 copy that nobody can write to, of the given shape (None: any length)."""
    array = np.array(value, dtype=np.float64)
    if array.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, array.shape, strict=True)
    ):
        msg = f"`{name}` must have shape {shape}; got {array.shape}."
        raise ValueError(msg)
    if not np.isfinite(array).all():
        msg = f"`{name}` must be finite; {np.count_nonzero(~np.isfinite(array))} of {array.size} values are not."
        raise ValueError(msg)
    array.setflags(write=False)
    return array


def strings(values: Any) -> np.ndarray:
    """An array of fixed-width strings, whatever kind of string array a file gave back."""
    return np.array([str(v) for v in np.asarray(values).ravel().tolist()], dtype=np.str_)


def names_array(values: Any, length: int, name: str) -> np.ndarray:
    """A read-only array of unique strings of the given length."""
    array = strings(values)
    if len(array) != length:
        msg = f"`{name}` must hold {length} names; got {len(array)}."
        raise ValueError(msg)
    unique, counts = np.unique(array, return_counts=True)
    if len(unique) != length:
        msg = f"`{name}` must be unique; {str(unique[counts > 1][0])!r} occurs more than once."
        raise ValueError(msg)
    array.setflags(write=False)
    return array
