"""Compiled loops of an encoder: minibatches of sparse counts, the first layer, its batch norm. Opened on first use."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ldvae_ext.core._kernels import _LOOP

_F = np.float32
# Edge of the squares in which a matrix is turned.
_TILE = 16


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
def transpose(indptr: Any, indices: Any, values: Any, out_indptr: Any, out_indices: Any, out_values: Any) -> None:
    """The CSC arrays of a CSR matrix; ``out_indptr`` comes in as zeros."""
    n_genes = out_indptr.size - 1
    for j in range(indices.size):
        out_indptr[indices[j] + 1] += 1
    for g in range(n_genes):
        out_indptr[g + 1] += out_indptr[g]
    for n in range(indptr.size - 1):
        for j in range(indptr[n], indptr[n + 1]):
            g = indices[j]
            out_indices[out_indptr[g]] = n
            out_values[out_indptr[g]] = values[j]
            out_indptr[g] += 1
    # Each now says where the next begins.
    for g in range(n_genes, 0, -1):
        out_indptr[g] = out_indptr[g - 1]
    out_indptr[0] = 0


@njit(**_LOOP)
def multiply(start: int, stop: int, indptr: Any, indices: Any, values: Any, matrix_gh: Any, out_nh: Any) -> None:
    """Rows ``start`` to ``stop`` of a sparse matrix times a dense one, added to ``out_nh``."""
    for n in range(start, stop):
        out, j, end = out_nh[n], indptr[n], indptr[n + 1]
        # Four at a time: the sums are read and written a quarter as often.
        while j + 3 < end:
            first, second, third, fourth = values[j], values[j + 1], values[j + 2], values[j + 3]
            a, b = matrix_gh[indices[j]], matrix_gh[indices[j + 1]]
            c, d = matrix_gh[indices[j + 2]], matrix_gh[indices[j + 3]]
            for h in range(out.size):
                out[h] += first * a[h] + second * b[h] + third * c[h] + fourth * d[h]
            j += 4
        while j < end:
            value, row = values[j], matrix_gh[indices[j]]
            for h in range(out.size):
                out[h] += value * row[h]
            j += 1


@njit(**_LOOP)
def turn(matrix_hg: Any, out_gh: Any) -> None:
    """The transpose of a matrix, laid out row by row."""
    n_rows, n_columns = matrix_hg.shape
    for top in range(0, n_rows, _TILE):
        for left in range(0, n_columns, _TILE):
            tile = matrix_hg[top : top + _TILE, left : left + _TILE]
            out = out_gh[left : left + _TILE, top : top + _TILE]
            for g in range(tile.shape[1]):
                for h in range(tile.shape[0]):
                    out[g, h] = tile[h, g]


@njit(**_LOOP)
def hidden(
    before_nh: Any,
    gamma_h: Any,
    beta_h: Any,
    kept_nh: Any,
    eps: float,
    running_mean_h: Any,
    running_variance_h: Any,
    momentum: float,
    normal_nh: Any,
    inverse_h: Any,
    out_nh: Any,
) -> None:
    """Batch norm in training, ReLU and dropout: ``out = kept * max(0, gamma * normal + beta)``.

    ``kept`` is what dropout multiplies with, 0 or ``1 / (1 - p)``. Running statistics are updated.
    """
    n_cells, n_hidden = before_nh.shape
    mean_h, variance_h = np.zeros(n_hidden), np.zeros(n_hidden)
    for n in range(n_cells):
        row = before_nh[n]
        for h in range(n_hidden):
            mean_h[h] += row[h]
    mean_h /= n_cells
    for n in range(n_cells):
        row = before_nh[n]
        for h in range(n_hidden):
            variance_h[h] += (row[h] - mean_h[h]) ** 2
    for h in range(n_hidden):
        running_mean_h[h] += _F(momentum * (mean_h[h] - running_mean_h[h]))
        running_variance_h[h] += _F(momentum * (variance_h[h] / (n_cells - 1) - running_variance_h[h]))
        inverse_h[h] = 1.0 / np.sqrt(variance_h[h] / n_cells + eps)
    shift_h = mean_h.astype(np.float32)
    for n in range(n_cells):
        row, normal, kept, out = before_nh[n], normal_nh[n], kept_nh[n], out_nh[n]
        for h in range(n_hidden):
            normal[h] = (row[h] - shift_h[h]) * inverse_h[h]
            value = gamma_h[h] * normal[h] + beta_h[h]
            out[h] = kept[h] * value if value > _F(0) else _F(0)


@njit(**_LOOP)
def hidden_back(
    d_out_nh: Any,
    gamma_h: Any,
    beta_h: Any,
    kept_nh: Any,
    normal_nh: Any,
    inverse_h: Any,
    d_before_nh: Any,
    d_gamma_h: Any,
    d_beta_h: Any,
) -> None:
    """Gradients of :func:`hidden`; those of gamma and beta come in as zeros."""
    n_cells, n_hidden = d_out_nh.shape
    for n in range(n_cells):
        d_out, kept, normal, d_before = d_out_nh[n], kept_nh[n], normal_nh[n], d_before_nh[n]
        for h in range(n_hidden):
            is_on = gamma_h[h] * normal[h] + beta_h[h] > _F(0)
            slope = d_out[h] * kept[h] if is_on else _F(0)
            d_before[h] = slope
            d_beta_h[h] += slope
            d_gamma_h[h] += slope * normal[h]
    mean_h, along_h, scale_h = np.empty(n_hidden, _F), np.empty(n_hidden, _F), np.empty(n_hidden, _F)
    for h in range(n_hidden):
        mean_h[h], along_h[h] = d_beta_h[h] / n_cells, d_gamma_h[h] / n_cells
        scale_h[h] = gamma_h[h] * inverse_h[h]
    for n in range(n_cells):
        normal, d_before = normal_nh[n], d_before_nh[n]
        for h in range(n_hidden):
            d_before[h] = scale_h[h] * (d_before[h] - mean_h[h] - normal[h] * along_h[h])
