"""Small array helpers that the frozen values share."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from ldvae_ext._validate import check_names_last, listed


def at_positions(value: np.ndarray, position: np.ndarray, n: int) -> np.ndarray:
    """Rows of an array at their positions among n, float32: NaN for the other rows; a position of -1 is none."""
    out = np.full((n, *value.shape[1:]), np.nan, dtype=np.float32)
    out[position[position >= 0]] = value[position >= 0]
    return out


def as_numbers(value: Any, name: str) -> np.ndarray:
    """An array in float64, or an error that names it if it holds something else than real numbers."""
    array = np.asarray(value)
    with suppress(TypeError, ValueError):
        if array.dtype.kind in "biufO":
            return array.astype(np.float64, copy=False)
    msg = f"`{name}` must hold real numbers; got {listed(array.ravel()[:1])} of type {array.dtype}."
    raise ValueError(msg)


def check_shape(array: Any, shape: tuple[int | None, ...], name: str) -> None:
    """Raise unless an array has this shape; None is any length."""
    if np.ndim(array) != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, np.shape(array), strict=True)
    ):
        msg = f"`{name}` must have shape {shape}; got {np.shape(array)}."
        raise ValueError(msg)


def check_broadcasts(array: Any, shape: tuple[int, ...], name: str) -> None:
    """Raise unless an array can be broadcast together with others of this shape."""
    try:
        np.broadcast_shapes(np.shape(array), shape)
    except ValueError as error:
        msg = f"`{name}` must have shape {shape}, or one that broadcasts to it; got {np.shape(array)}."
        raise ValueError(msg) from error


def checked(
    value: Any,
    shape: tuple[int | None, ...],
    name: str,
    *,
    finite: bool = True,
    least: float | None = None,
    positive: bool = False,
) -> np.ndarray:
    """An array in float64 of the given shape (None: any length) with finite values, or an error that names it.

    With ``least`` no value may be below it, with ``positive`` none may be 0 or below.
    """
    array = as_numbers(value, name)
    check_shape(array, shape, name)
    if finite and not np.isfinite(array).all():
        msg = f"`{name}` must be finite; {np.count_nonzero(~np.isfinite(array))} of {array.size} values are not."
        raise ValueError(msg)
    if positive and not (array > 0).all():
        msg = f"`{name}` must be positive; got {array[~(array > 0)].flat[0]:g}."
        raise ValueError(msg)
    if least is not None and (array < least).any():
        what = "be negative" if least == 0 else f"be below {least:g}"
        msg = f"`{name}` must not {what}; got {array[array < least].flat[0]:g}."
        raise ValueError(msg)
    return array


def read_only(value: Any, shape: tuple[int | None, ...], name: str, *, positive: bool = False) -> np.ndarray:
    """A private float64 copy that nobody can write to, of the given shape (None: any length)."""
    array = np.array(checked(value, shape, name, positive=positive))
    array.setflags(write=False)
    return array


def permutation(value: Any, length: int, name: str = "order") -> np.ndarray:
    """Positions of all things in another order, or an error that names them."""
    order = np.asarray(value)
    if order.shape != (length,) or not np.array_equal(np.sort(order), np.arange(length)):
        msg = f"`{name}` must be a permutation of 0 to {length - 1}; got {listed(order.ravel(), 20)}."
        raise ValueError(msg)
    return order.astype(np.int64)


def per_cell(value: Any, n_cells: int, name: str) -> np.ndarray:
    """One number, or one for each cell, as one for each cell; shape (cells,), float64."""
    array = as_numbers(value, name).ravel()
    if array.size not in (1, n_cells):
        msg = f"`{name}` must be one number, or one for each of {n_cells} cells; got {array.size}."
        raise ValueError(msg)
    return np.broadcast_to(array, (n_cells,))


def strings(values: Any) -> np.ndarray:
    """An array of fixed-width strings, whatever kind of string array a file gave back."""
    return np.array([str(v) for v in np.asarray(values).ravel().tolist()], dtype=np.str_)


def names_array(values: Any, length: int, name: str) -> np.ndarray:
    """A read-only array of unique strings of the given length."""
    array = strings(values)
    check_names_last(name, np.asarray(values, dtype=object).ravel())
    if len(array) != length:
        msg = f"`{name}` must hold {length} names; got {len(array)}."
        raise ValueError(msg)
    unique, counts = np.unique(array, return_counts=True)
    if len(unique) != length:
        msg = f"`{name}` must be unique; {str(unique[counts > 1][0])!r} occurs more than once."
        raise ValueError(msg)
    array.setflags(write=False)
    return array
