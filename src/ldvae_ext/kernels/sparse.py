"""Compiled loops of an encoder: minibatches of sparse counts, the first layer, its batch norm. Opened on first use."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP, PART

_F = np.float32


@njit(**LOOP)
def count_nonzero(x_ng: Any, out_indptr: Any) -> None:
    """Where each row of a dense matrix will begin."""
    out_indptr[0] = 0
    for n in range(x_ng.shape[0]):
        found = 0
        for g in range(x_ng.shape[1]):
            found += x_ng[n, g] != 0
        out_indptr[n + 1] = out_indptr[n] + found


@njit(**LOOP)
def dense_to_csr(x_ng: Any, out_indptr: Any, out_indices: Any, out_values: Any) -> None:
    """The non-zero values of a dense matrix, after :func:`count_nonzero`."""
    for n in range(x_ng.shape[0]):
        at = out_indptr[n]
        for g in range(x_ng.shape[1]):
            if x_ng[n, g] != 0:
                out_indices[at] = g
                out_values[at] = x_ng[n, g]
                at += 1


@njit(**LOOP)
def csr_to_csc(indptr: Any, indices: Any, values: Any, out_indptr: Any, out_indices: Any, out_values: Any) -> None:
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


@njit(**PART)
def _add_products(begin: int, end: int, indices: Any, values: Any, matrix_gh: Any, out: Any) -> None:
    """A row of a sparse matrix times a dense one, added to ``out``."""
    j = begin
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


@njit(**LOOP)
def sparse_dense_product(indptr: Any, indices: Any, values: Any, matrix_gh: Any, out_nh: Any) -> None:
    """A sparse matrix times a dense one, added to ``out_nh``."""
    for n in range(out_nh.shape[0]):
        _add_products(indptr[n], indptr[n + 1], indices, values, matrix_gh, out_nh[n])


@njit(**LOOP)
def sparse_dense_product_transposed(indptr: Any, indices: Any, values: Any, matrix_nh: Any, out_hg: Any) -> None:
    """A sparse matrix of genes x cells times a dense one, turned: ``out`` has a column for each gene."""
    n_hidden, n_genes = out_hg.shape
    tile = np.empty((8, n_hidden), np.float32)
    a, b, c, d, e, f, g, h = tile[0], tile[1], tile[2], tile[3], tile[4], tile[5], tile[6], tile[7]
    for first in range(0, n_genes, 8):
        size = min(8, n_genes - first)
        for i in range(8):
            for row in range(n_hidden):
                tile[i, row] = np.float32(0)
        for i in range(size):
            _add_products(indptr[first + i], indptr[first + i + 1], indices, values, matrix_nh, tile[i])
        if size == 8:
            for row in range(n_hidden):
                out = out_hg[row, first : first + 8]
                out[0], out[1], out[2], out[3] = a[row], b[row], c[row], d[row]
                out[4], out[5], out[6], out[7] = e[row], f[row], g[row], h[row]
        else:
            for row in range(n_hidden):
                for i in range(size):
                    out_hg[row, first + i] = tile[i, row]


@njit(**LOOP)
def transpose_dense(matrix_hg: Any, out_gh: Any) -> None:
    """The transpose of a matrix, laid out row by row; eight of its rows are read side by side."""
    n_rows, n_columns = matrix_hg.shape
    for top in range(0, n_rows - 7, 8):
        a, b, c, d = matrix_hg[top], matrix_hg[top + 1], matrix_hg[top + 2], matrix_hg[top + 3]
        e, f, g, h = matrix_hg[top + 4], matrix_hg[top + 5], matrix_hg[top + 6], matrix_hg[top + 7]
        for column in range(n_columns):
            out = out_gh[column, top : top + 8]
            out[0], out[1], out[2], out[3] = a[column], b[column], c[column], d[column]
            out[4], out[5], out[6], out[7] = e[column], f[column], g[column], h[column]
    for row in range(n_rows // 8 * 8, n_rows):
        for column in range(n_columns):
            out_gh[column, row] = matrix_hg[row, column]
