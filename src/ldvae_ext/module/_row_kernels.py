"""Compiled loops over rows of sparse counts: minibatches of them, and the first layer of an encoder. Opened on first use."""

from __future__ import annotations

from typing import Any

from numba import njit

from ldvae_ext.core._kernels import _LOOP


@njit(**_LOOP)
def n_stored(rows: Any, indptr: Any, out_indptr: Any) -> None:
    """Where each of some rows will begin."""
    total = 0
    out_indptr[0] = 0
    for i in range(rows.size):
        total += indptr[rows[i] + 1] - indptr[rows[i]]
        out_indptr[i + 1] = total


@njit(**_LOOP)
def gather(
    rows: Any, indptr: Any, indices: Any, values: Any, out_indptr: Any, out_indices: Any, out_values: Any
) -> None:
    """Some rows of a CSR matrix, after :func:`n_stored`."""
    for i in range(rows.size):
        at, begin = out_indptr[i], indptr[rows[i]]
        for j in range(indptr[rows[i] + 1] - begin):
            out_indices[at + j] = indices[begin + j]
            out_values[at + j] = values[begin + j]


@njit(**_LOOP)
def n_nonzero(x_ng: Any, out_indptr: Any) -> None:
    """Where each row of a dense matrix will begin."""
    out_indptr[0] = 0
    for n in range(x_ng.shape[0]):
        found = 0
        for g in range(x_ng.shape[1]):
            found += x_ng[n, g] != 0
        out_indptr[n + 1] = out_indptr[n] + found


@njit(**_LOOP)
def compress(x_ng: Any, out_indptr: Any, out_indices: Any, out_values: Any) -> None:
    """The non-zero values of a dense matrix, after :func:`n_nonzero`."""
    for n in range(x_ng.shape[0]):
        at = out_indptr[n]
        for g in range(x_ng.shape[1]):
            if x_ng[n, g] != 0:
                out_indices[at] = g
                out_values[at] = x_ng[n, g]
                at += 1


@njit(**_LOOP)
def multiply(start: int, stop: int, indptr: Any, indices: Any, values: Any, weight_gh: Any, out_nh: Any) -> None:
    """Counts times the weights of a layer, added to ``out_nh``."""
    for n in range(start, stop):
        for j in range(indptr[n], indptr[n + 1]):
            value, g = values[j], indices[j]
            for h in range(out_nh.shape[1]):
                out_nh[n, h] += value * weight_gh[g, h]


@njit(**_LOOP)
def add_outer(start: int, stop: int, indptr: Any, indices: Any, values: Any, slope_nh: Any, out_gh: Any) -> None:
    """Gradient of the weights of a layer, for hidden units ``start`` to ``stop``, added to ``out_gh``."""
    for n in range(slope_nh.shape[0]):
        for j in range(indptr[n], indptr[n + 1]):
            value, g = values[j], indices[j]
            for h in range(start, stop):
                out_gh[g, h] += value * slope_nh[n, h]
