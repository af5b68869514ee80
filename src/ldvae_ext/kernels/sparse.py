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
    indptr: IntegerArray,
    indices: IntegerArray,
    values: Float32Array,
    matrix_gh: Float32Array,
    start_h: Float32Array,
    out_nh: Float32Array,
) -> None:
    """Sparse-dense product. With the CSC arrays of the sparse matrix it is the product of its transpose.

    Parameters
    ----------
    indptr, indices, values
        Counts as CSR arrays, (cells + 1,), (stored counts,) and (stored counts,); integers, integers, float32.
    matrix_gh
        Dense matrix, (genes, columns), float32.
    start_h
        Added to each row, (columns,), float32.
    out_nh
        Output, (cells, columns), float32.
    """
    for n in range(out_nh.shape[0]):
        out = out_nh[n]
        for h in range(out.size):
            out[h] = start_h[h]
        _add_products(indptr[n], indptr[n + 1], indices, values, matrix_gh, out)
