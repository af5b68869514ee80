"""Compiled loops in float32: fused forward and backward pass of the linear decoder and the likelihood, cell by cell.

The logits of a cell are computed, used and replaced by gradients while they are in the processor's cache; no array of
cells x genes exists. Loops over cells take ``start`` and ``stop`` first, so that threads can divide the cells, see
:func:`ldvae_ext.kernels.threads.over_rows`; sums over cells have an axis ``t`` of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP, PART, Float32Array, IntegerArray
from ldvae_ext.kernels.likelihood import negative_binomial, poisson, zero_inflated_negative_binomial

_F = np.float32
# Number of cells whose logits are computed together: weights are read once for all of them.
_TOGETHER = 4


# Loops over elements: an assignment of slices would also compile its error messages, which takes seconds.


@njit(**PART)
def _load(input_np: Float32Array, first: int, size: int, input_ip: Float32Array, d_input_ip: Float32Array) -> None:
    """Inputs of up to four cells, zeros for the others, and zeros for their gradients."""
    for i in range(_TOGETHER):
        for p in range(input_ip.shape[1]):
            input_ip[i, p] = input_np[first + i, p] if i < size else _F(0)
            d_input_ip[i, p] = _F(0)


@njit(**PART)
def _clear(row_ig: Float32Array, first: int) -> None:
    """Set the rows from ``first`` on to zero."""
    for i in range(first, _TOGETHER):
        for g in range(row_ig.shape[1]):
            row_ig[i, g] = _F(0)


@njit(**PART)
def _affine(input_ip: Float32Array, weight_pg: Float32Array, intercept_g: Float32Array, row_ig: Float32Array) -> None:
    """Logits of four cells."""
    a, b, c, d = row_ig[0], row_ig[1], row_ig[2], row_ig[3]
    for g in range(a.size):
        a[g] = b[g] = c[g] = d[g] = intercept_g[g]
    n_inputs = input_ip.shape[1]
    p = 0
    while p + 1 < n_inputs:
        first, second = weight_pg[p], weight_pg[p + 1]
        a0, b0, c0, d0 = input_ip[0, p], input_ip[1, p], input_ip[2, p], input_ip[3, p]
        a1, b1, c1, d1 = input_ip[0, p + 1], input_ip[1, p + 1], input_ip[2, p + 1], input_ip[3, p + 1]
        for g in range(a.size):
            a[g] += a0 * first[g] + a1 * second[g]
            b[g] += b0 * first[g] + b1 * second[g]
            c[g] += c0 * first[g] + c1 * second[g]
            d[g] += d0 * first[g] + d1 * second[g]
        p += 2
    if p < n_inputs:
        first = weight_pg[p]
        a0, b0, c0, d0 = input_ip[0, p], input_ip[1, p], input_ip[2, p], input_ip[3, p]
        for g in range(a.size):
            a[g] += a0 * first[g]
            b[g] += b0 * first[g]
            c[g] += c0 * first[g]
            d[g] += d0 * first[g]


@njit(**PART)
def _affine_backward(
    input_ip: Float32Array,
    weight_pg: Float32Array,
    row_ig: Float32Array,
    d_input_ip: Float32Array,
    d_weight_pg: Float32Array,
    d_intercept_g: Float32Array,
) -> None:
    """Gradients of :func:`_affine`, added to the arrays."""
    a, b, c, d = row_ig[0], row_ig[1], row_ig[2], row_ig[3]
    for g in range(a.size):
        d_intercept_g[g] += a[g] + b[g] + c[g] + d[g]
    for p in range(input_ip.shape[1]):
        weight, d_weight = weight_pg[p], d_weight_pg[p]
        a0, b0, c0, d0 = input_ip[0, p], input_ip[1, p], input_ip[2, p], input_ip[3, p]
        sum_a, sum_b, sum_c, sum_d = _F(0), _F(0), _F(0), _F(0)
        for g in range(a.size):
            d_weight[g] += a0 * a[g] + b0 * b[g] + c0 * c[g] + d0 * d[g]
            sum_a += weight[g] * a[g]
            sum_b += weight[g] * b[g]
            sum_c += weight[g] * c[g]
            sum_d += weight[g] * d[g]
        d_input_ip[0, p] += sum_a
        d_input_ip[1, p] += sum_b
        d_input_ip[2, p] += sum_c
        d_input_ip[3, p] += sum_d


@njit(**PART)
def _thread(start: int, n_rows: int, n_pieces: int) -> int:
    """Number of the thread whose rows begin at ``start``."""
    return (start * n_pieces + n_rows - 1) // n_rows


@njit(**PART)
def _most_counts(start: int, stop: int, indptr: IntegerArray) -> int:
    """Largest number of stored counts of a cell."""
    most = 0
    for n in range(start, stop):
        most = max(most, indptr[n + 1] - indptr[n])
    return most


@njit(**LOOP)
def poisson_head(
    start: int,
    stop: int,
    input_np: Float32Array,
    weight_pg: Float32Array,
    intercept_g: Float32Array,
    library_n: Float32Array,
    weight_n: Float32Array,
    indptr: IntegerArray,
    indices: IntegerArray,
    values: Float32Array,
    loss_n: Float32Array,
    d_input_np: Float32Array,
    d_log_library_n: Float32Array,
    d_weight_tpg: Float32Array,
    d_intercept_tg: Float32Array,
) -> None:
    """Negative log-likelihood of each cell, and ``weight_n`` times its gradient.

    Parameters
    ----------
    start, stop
        First cell of this thread, and the end of its cells, integers.
    input_np
        Inputs of the decoder, (cells, inputs), float32.
    weight_pg, intercept_g
        Affine map to the logits, (inputs, genes) and (genes,), float32.
    library_n, weight_n
        Library sizes, and weights of the gradients, (cells,), float32.
    indptr, indices, values
        Counts as CSR arrays, (cells + 1,), (stored counts,) and (stored counts,); integers, integers, float32.
    loss_n
        Output: negative log-likelihoods, (cells,), float32.
    d_input_np, d_log_library_n
        Output: gradients, (cells, inputs) and (cells,), float32.
    d_weight_tpg, d_intercept_tg
        Gradients, (threads, inputs, genes) and (threads, genes), float32; added to.
    """
    (n_cells, n_inputs), n_genes = input_np.shape, intercept_g.size
    thread = _thread(start, n_cells, d_weight_tpg.shape[0])
    inputs, d_inputs = np.empty((_TOGETHER, n_inputs), _F), np.empty((_TOGETHER, n_inputs), _F)
    rows, exp_g = np.empty((_TOGETHER, n_genes), _F), np.empty(n_genes, _F)
    for first in range(start, stop, _TOGETHER):
        size = min(_TOGETHER, stop - first)
        _load(input_np, first, size, inputs, d_inputs)
        _affine(inputs, weight_pg, intercept_g, rows)
        _clear(rows, size)
        for i in range(size):
            n = first + i
            here = slice(indptr[n], indptr[n + 1])
            loss_n[n], d_log_library_n[n] = poisson(
                rows[i], library_n[n], weight_n[n], indices[here], values[here], exp_g
            )
        _affine_backward(inputs, weight_pg, rows, d_inputs, d_weight_tpg[thread], d_intercept_tg[thread])
        for i in range(size):
            for p in range(n_inputs):
                d_input_np[first + i, p] = d_inputs[i, p]


@njit(**LOOP)
def negative_binomial_head(
    start: int,
    stop: int,
    input_np: Float32Array,
    weight_pg: Float32Array,
    intercept_g: Float32Array,
    library_n: Float32Array,
    weight_n: Float32Array,
    indptr: IntegerArray,
    indices: IntegerArray,
    values: Float32Array,
    loss_n: Float32Array,
    d_input_np: Float32Array,
    d_log_library_n: Float32Array,
    d_weight_tpg: Float32Array,
    d_intercept_tg: Float32Array,
    code_n: IntegerArray,
    theta_cg: Float32Array,
    inverse_cg: Float32Array,
    share_cg: Float32Array,
    log_gamma_cxg: Float32Array,
    digamma_cxg: Float32Array,
    d_theta_tcg: Float32Array,
) -> None:
    """As :func:`poisson_head`, with inverse dispersions; see :func:`ldvae_ext.kernels.likelihood.dispersion_tables`.

    Parameters
    ----------
    start, stop
        First cell of this thread, and the end of its cells, integers.
    input_np
        Inputs of the decoder, (cells, inputs), float32.
    weight_pg, intercept_g
        Affine map to the logits, (inputs, genes) and (genes,), float32.
    library_n, weight_n
        Library sizes, and weights of the gradients, (cells,), float32.
    indptr, indices, values
        Counts as CSR arrays, (cells + 1,), (stored counts,) and (stored counts,); integers, integers, float32.
    loss_n
        Output: negative log-likelihoods, (cells,), float32.
    d_input_np, d_log_library_n
        Output: gradients, (cells, inputs) and (cells,), float32.
    d_weight_tpg, d_intercept_tg
        Gradients, (threads, inputs, genes) and (threads, genes), float32; added to.
    code_n
        Row of the dispersions of each cell, (cells,), integers.
    theta_cg, inverse_cg, share_cg
        Inverse dispersions, and their terms, (rows, genes), float32; see
        :func:`ldvae_ext.kernels.likelihood.dispersion_tables`.
    log_gamma_cxg, digamma_cxg
        Tables of gamma functions, (rows, N_TABLE + 1, genes), float32; see the same function.
    d_theta_tcg
        Gradient, (threads, rows, genes), float32; added to.
    """
    (n_cells, n_inputs), n_genes = input_np.shape, intercept_g.size
    thread = _thread(start, n_cells, d_weight_tpg.shape[0])
    inputs, d_inputs = np.empty((_TOGETHER, n_inputs), _F), np.empty((_TOGETHER, n_inputs), _F)
    rows, exp_g, d_log_mean_g = np.empty((_TOGETHER, n_genes), _F), np.empty(n_genes, _F), np.empty(n_genes, _F)
    workspace = np.empty((2, _most_counts(start, stop, indptr)), _F)
    for first in range(start, stop, _TOGETHER):
        size = min(_TOGETHER, stop - first)
        _load(input_np, first, size, inputs, d_inputs)
        _affine(inputs, weight_pg, intercept_g, rows)
        _clear(rows, size)
        for i in range(size):
            n = first + i
            code, here = code_n[n], slice(indptr[n], indptr[n + 1])
            loss_n[n], d_log_library_n[n] = negative_binomial(
                rows[i],
                library_n[n],
                weight_n[n],
                indices[here],
                values[here],
                theta_cg[code],
                inverse_cg[code],
                share_cg[code],
                log_gamma_cxg[code],
                digamma_cxg[code],
                exp_g,
                d_log_mean_g,
                workspace,
                d_theta_tcg[thread, code],
            )
        _affine_backward(inputs, weight_pg, rows, d_inputs, d_weight_tpg[thread], d_intercept_tg[thread])
        for i in range(size):
            for p in range(n_inputs):
                d_input_np[first + i, p] = d_inputs[i, p]


@njit(**LOOP)
def zero_inflated_head(
    start: int,
    stop: int,
    input_np: Float32Array,
    weight_pg: Float32Array,
    intercept_g: Float32Array,
    library_n: Float32Array,
    weight_n: Float32Array,
    indptr: IntegerArray,
    indices: IntegerArray,
    values: Float32Array,
    loss_n: Float32Array,
    d_input_np: Float32Array,
    d_log_library_n: Float32Array,
    d_weight_tpg: Float32Array,
    d_intercept_tg: Float32Array,
    code_n: IntegerArray,
    theta_cg: Float32Array,
    inverse_cg: Float32Array,
    share_cg: Float32Array,
    log_gamma_cxg: Float32Array,
    digamma_cxg: Float32Array,
    d_theta_tcg: Float32Array,
    dropout_weight_pg: Float32Array,
    dropout_intercept_g: Float32Array,
    d_dropout_weight_tpg: Float32Array,
    d_dropout_intercept_tg: Float32Array,
) -> None:
    """As :func:`negative_binomial_head`, with a second head for the logits of zero inflation.

    Parameters
    ----------
    start, stop
        First cell of this thread, and the end of its cells, integers.
    input_np
        Inputs of the decoder, (cells, inputs), float32.
    weight_pg, intercept_g
        Affine map to the logits, (inputs, genes) and (genes,), float32.
    library_n, weight_n
        Library sizes, and weights of the gradients, (cells,), float32.
    indptr, indices, values
        Counts as CSR arrays, (cells + 1,), (stored counts,) and (stored counts,); integers, integers, float32.
    loss_n
        Output: negative log-likelihoods, (cells,), float32.
    d_input_np, d_log_library_n
        Output: gradients, (cells, inputs) and (cells,), float32.
    d_weight_tpg, d_intercept_tg
        Gradients, (threads, inputs, genes) and (threads, genes), float32; added to.
    code_n
        Row of the dispersions of each cell, (cells,), integers.
    theta_cg, inverse_cg, share_cg
        Inverse dispersions, and their terms, (rows, genes), float32; see
        :func:`ldvae_ext.kernels.likelihood.dispersion_tables`.
    log_gamma_cxg, digamma_cxg
        Tables of gamma functions, (rows, N_TABLE + 1, genes), float32; see the same function.
    d_theta_tcg
        Gradient, (threads, rows, genes), float32; added to.
    dropout_weight_pg, dropout_intercept_g
        Affine map to the logits of zero inflation, (inputs, genes) and (genes,), float32.
    d_dropout_weight_tpg, d_dropout_intercept_tg
        Gradients, (threads, inputs, genes) and (threads, genes), float32; added to.
    """
    (n_cells, n_inputs), n_genes = input_np.shape, intercept_g.size
    thread = _thread(start, n_cells, d_weight_tpg.shape[0])
    inputs, d_inputs = np.empty((_TOGETHER, n_inputs), _F), np.empty((_TOGETHER, n_inputs), _F)
    rows, exp_g, d_log_mean_g = np.empty((_TOGETHER, n_genes), _F), np.empty(n_genes, _F), np.empty(n_genes, _F)
    dropout_rows, d_dropout_rows = np.empty((_TOGETHER, n_genes), _F), np.empty((_TOGETHER, n_genes), _F)
    workspace = np.empty((5, _most_counts(start, stop, indptr)), _F)
    for first in range(start, stop, _TOGETHER):
        size = min(_TOGETHER, stop - first)
        _load(input_np, first, size, inputs, d_inputs)
        _affine(inputs, weight_pg, intercept_g, rows)
        _affine(inputs, dropout_weight_pg, dropout_intercept_g, dropout_rows)
        _clear(rows, size)
        _clear(d_dropout_rows, size)
        for i in range(size):
            n = first + i
            code, here = code_n[n], slice(indptr[n], indptr[n + 1])
            loss_n[n], d_log_library_n[n] = zero_inflated_negative_binomial(
                rows[i],
                library_n[n],
                weight_n[n],
                indices[here],
                values[here],
                theta_cg[code],
                inverse_cg[code],
                share_cg[code],
                log_gamma_cxg[code],
                digamma_cxg[code],
                exp_g,
                d_log_mean_g,
                workspace,
                d_theta_tcg[thread, code],
                dropout_rows[i],
                d_dropout_rows[i],
            )
        _affine_backward(inputs, weight_pg, rows, d_inputs, d_weight_tpg[thread], d_intercept_tg[thread])
        _affine_backward(
            inputs,
            dropout_weight_pg,
            d_dropout_rows,
            d_inputs,
            d_dropout_weight_tpg[thread],
            d_dropout_intercept_tg[thread],
        )
        for i in range(size):
            for p in range(n_inputs):
                d_input_np[first + i, p] = d_inputs[i, p]
