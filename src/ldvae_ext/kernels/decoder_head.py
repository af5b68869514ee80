"""Compiled loops in float32: the linear decoder and the likelihood of counts, cell by cell, forward and back at once.

Logits of a cell are made, used and turned into gradients while they are in the processor's cache; an array of cells x genes
does not exist. Opened on first use. Loops over cells take ``start`` and ``stop`` first, so that threads can share them, see
:func:`ldvae_ext.kernels.threads.over_rows`; what is summed over cells has an axis ``t`` of threads. Counts are the three arrays
of a CSR matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP, PART
from ldvae_ext.kernels.likelihood import negative_binomial, poisson, zero_inflated_negative_binomial

_F = np.float32
# Cells whose logits are made together, so that weights are read a quarter as often.
_TOGETHER = 4


# Element by element: an assignment of slices would compile its error messages, too, which takes seconds.


@njit(**PART)
def _load(input_np: Any, first: int, size: int, input_ip: Any, d_input_ip: Any) -> None:
    """Inputs of up to four cells, zeros for the others, and zeros for their gradients."""
    for i in range(_TOGETHER):
        for p in range(input_ip.shape[1]):
            input_ip[i, p] = input_np[first + i, p] if i < size else _F(0)
            d_input_ip[i, p] = _F(0)


@njit(**PART)
def _clear(row_ig: Any, first: int) -> None:
    """Zeros from a row on."""
    for i in range(first, _TOGETHER):
        for g in range(row_ig.shape[1]):
            row_ig[i, g] = _F(0)


@njit(**PART)
def _affine(input_ip: Any, weight_pg: Any, intercept_g: Any, row_ig: Any) -> None:
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
    input_ip: Any, weight_pg: Any, row_ig: Any, d_input_ip: Any, d_weight_pg: Any, d_intercept_g: Any
) -> None:
    """Gradients of :func:`_affine`, added to what is there."""
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
    """Which thread's rows begin at ``start``."""
    return (start * n_pieces + n_rows - 1) // n_rows


@njit(**PART)
def _most_counts(start: int, stop: int, indptr: Any) -> int:
    most = 0
    for n in range(start, stop):
        most = max(most, indptr[n + 1] - indptr[n])
    return most


@njit(**LOOP)
def poisson_head(
    start: int,
    stop: int,
    input_np: Any,
    weight_pg: Any,
    intercept_g: Any,
    library_n: Any,
    weight_n: Any,
    indptr: Any,
    indices: Any,
    values: Any,
    loss_n: Any,
    d_input_np: Any,
    d_log_library_n: Any,
    d_weight_tpg: Any,
    d_intercept_tg: Any,
) -> None:
    """Negative log-likelihood of each cell, and ``weight_n`` times its gradient."""
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
    input_np: Any,
    weight_pg: Any,
    intercept_g: Any,
    library_n: Any,
    weight_n: Any,
    indptr: Any,
    indices: Any,
    values: Any,
    loss_n: Any,
    d_input_np: Any,
    d_log_library_n: Any,
    d_weight_tpg: Any,
    d_intercept_tg: Any,
    code_n: Any,
    theta_cg: Any,
    inverse_cg: Any,
    share_cg: Any,
    log_gamma_cxg: Any,
    digamma_cxg: Any,
    d_theta_tcg: Any,
) -> None:
    """As :func:`poisson_head`, with inverse dispersions; see :func:`ldvae_ext.kernels.likelihood.dispersion_tables`."""
    (n_cells, n_inputs), n_genes = input_np.shape, intercept_g.size
    thread = _thread(start, n_cells, d_weight_tpg.shape[0])
    inputs, d_inputs = np.empty((_TOGETHER, n_inputs), _F), np.empty((_TOGETHER, n_inputs), _F)
    rows, exp_g, slope_g = np.empty((_TOGETHER, n_genes), _F), np.empty(n_genes, _F), np.empty(n_genes, _F)
    of_counts = np.empty((2, _most_counts(start, stop, indptr)), _F)
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
                slope_g,
                of_counts,
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
    input_np: Any,
    weight_pg: Any,
    intercept_g: Any,
    library_n: Any,
    weight_n: Any,
    indptr: Any,
    indices: Any,
    values: Any,
    loss_n: Any,
    d_input_np: Any,
    d_log_library_n: Any,
    d_weight_tpg: Any,
    d_intercept_tg: Any,
    code_n: Any,
    theta_cg: Any,
    inverse_cg: Any,
    share_cg: Any,
    log_gamma_cxg: Any,
    digamma_cxg: Any,
    d_theta_tcg: Any,
    dropout_weight_pg: Any,
    dropout_intercept_g: Any,
    d_dropout_weight_tpg: Any,
    d_dropout_intercept_tg: Any,
) -> None:
    """As :func:`negative_binomial_head`, with a second head for the logits of zero inflation."""
    (n_cells, n_inputs), n_genes = input_np.shape, intercept_g.size
    thread = _thread(start, n_cells, d_weight_tpg.shape[0])
    inputs, d_inputs = np.empty((_TOGETHER, n_inputs), _F), np.empty((_TOGETHER, n_inputs), _F)
    rows, exp_g, slope_g = np.empty((_TOGETHER, n_genes), _F), np.empty(n_genes, _F), np.empty(n_genes, _F)
    dropout_rows, d_dropout_rows = np.empty((_TOGETHER, n_genes), _F), np.empty((_TOGETHER, n_genes), _F)
    of_counts = np.empty((5, _most_counts(start, stop, indptr)), _F)
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
                slope_g,
                of_counts,
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
