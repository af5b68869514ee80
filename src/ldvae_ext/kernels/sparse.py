"""Compiled loops on sparse matrices: conversion between formats, and products with dense matrices."""

from __future__ import annotations

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP, PART, Float32Array, IntegerArray

_F = np.float32


@njit(**LOOP)
def count_nonzero(x_ng: Float32Array, out_indptr: IntegerArray) -> None:
    """Write the ``indptr`` of the CSR form of a dense matrix.

    Parameters
    ----------
    x_ng
        Dense matrix, (cells, genes), float32.
    out_indptr
        Output, (cells + 1,), integers.
    """
    out_indptr[0] = 0
    for n in range(x_ng.shape[0]):
        found = 0
        for g in range(x_ng.shape[1]):
            found += x_ng[n, g] != 0
        out_indptr[n + 1] = out_indptr[n] + found


@njit(**LOOP)
def dense_to_csr(
    x_ng: Float32Array, out_indptr: IntegerArray, out_indices: IntegerArray, out_values: Float32Array
) -> None:
    """Write the non-zero values of a dense matrix as CSR arrays, after :func:`count_nonzero`.

    Parameters
    ----------
    x_ng
        Dense matrix, (cells, genes), float32.
    out_indptr
        Result of :func:`count_nonzero`, (cells + 1,), integers.
    out_indices, out_values
        Output, (non-zero values,), integers and float32.
    """
    for n in range(x_ng.shape[0]):
        at = out_indptr[n]
        for g in range(x_ng.shape[1]):
            if x_ng[n, g] != 0:
                out_indices[at] = g
                out_values[at] = x_ng[n, g]
                at += 1


@njit(**LOOP)
def csr_to_csc(
    indptr: IntegerArray,
    indices: IntegerArray,
    values: Float32Array,
    out_indptr: IntegerArray,
    out_indices: IntegerArray,
    out_values: Float32Array,
) -> None:
    """Write the CSC arrays of a CSR matrix.

    Parameters
    ----------
    indptr, indices, values
        Counts as CSR arrays, (cells + 1,), (stored counts,) and (stored counts,); integers, integers, float32.
    out_indptr
        Output, (genes + 1,), integers; zeros at the call.
    out_indices, out_values
        Output, (stored counts,), integers and float32.
    """
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
    # Each entry is now the end of its gene, the beginning of the next.
    for g in range(n_genes, 0, -1):
        out_indptr[g] = out_indptr[g - 1]
    out_indptr[0] = 0


@njit(**PART)
def _add_products(
    begin: int, end: int, indices: IntegerArray, values: Float32Array, matrix_gh: Float32Array, out: Float32Array
) -> None:
    """Product of a row of a sparse matrix and a dense matrix, added to ``out``."""
    j = begin
    # Four rows in each loop: sums are read and written once for all of them.
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
def sparse_dense_product(
    indptr: IntegerArray, indices: IntegerArray, values: Float32Array, matrix_gh: Float32Array, out_nh: Float32Array
) -> None:
    """Sparse-dense product, added to ``out_nh``.

    Parameters
    ----------
    indptr, indices, values
        Counts as CSR arrays, (cells + 1,), (stored counts,) and (stored counts,); integers, integers, float32.
    matrix_gh
        Dense matrix, (genes, columns), float32.
    out_nh
        Sums, (cells, columns), float32; added to.
    """
    for n in range(out_nh.shape[0]):
        _add_products(indptr[n], indptr[n + 1], indices, values, matrix_gh, out_nh[n])


@njit(**LOOP)
def sparse_dense_product_transposed(
    indptr: IntegerArray, indices: IntegerArray, values: Float32Array, matrix_nh: Float32Array, out_hg: Float32Array
) -> None:
    """Transpose of a sparse-dense product.

    Parameters
    ----------
    indptr, indices, values
        Counts as CSC arrays, (genes + 1,), (stored counts,) and (stored counts,); integers, integers, float32.
    matrix_nh
        Dense matrix, (cells, columns), float32.
    out_hg
        Output, (columns, genes), float32.
    """
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
def transpose_dense(matrix_hg: Float32Array, out_gh: Float32Array) -> None:
    """Transpose of a dense matrix. Eight rows are read in each loop.

    Parameters
    ----------
    matrix_hg
        Matrix, (rows, columns), float32.
    out_gh
        Output, (columns, rows), float32.
    """
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
