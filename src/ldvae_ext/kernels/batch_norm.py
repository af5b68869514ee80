"""Compiled loops in float32: a linear layer and its batch norm in training as one affine map, forward and backward."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP, Float32Array, Float64Array

_F = np.float32


@njit(**LOOP)
def fold_batch_norm(
    input_np: Float32Array,
    weight_pg: Float32Array,
    gamma_g: Float32Array,
    beta_g: Float32Array,
    eps: float,
    covariance_pp: Float64Array,
    centred_np: Float32Array,
    mean_p: Float32Array,
    spread_pg: Float32Array,
    inverse_g: Float32Array,
    folded_pg: Float32Array,
    intercept_g: Float32Array,
    mean_g: Float32Array,
    variance_g: Float32Array,
) -> None:
    """Linear layer and its batch norm in training as one affine map; see :func:`ldvae_ext.backends.decoder_head.affine_head`.

    Parameters
    ----------
    input_np
        Inputs, (cells, inputs), float32.
    weight_pg
        Weights of the linear layer, (inputs, genes), float32.
    gamma_g, beta_g, eps
        Parameters of the batch norm, (genes,), float32, and its constant.
    covariance_pp
        Output: cells x covariances of the inputs, (inputs, inputs), float64; zeros at the call.
    centred_np, mean_p
        Output: inputs minus their means, (cells, inputs), and the means, (inputs,); float32.
    spread_pg
        Output: covariances x weights, (inputs, genes), float32.
    inverse_g
        Output: 1 / standard deviations of the genes, (genes,), float32.
    folded_pg, intercept_g
        Output: the affine map, (inputs, genes) and (genes,), float32.
    mean_g, variance_g
        Output: means, without the bias, and variances of the linear layer, (genes,), float32.
    """
    n_cells, n_inputs = input_np.shape
    for p in range(n_inputs):
        total = 0.0
        for n in range(n_cells):
            total += input_np[n, p]
        mean_p[p] = total / n_cells
        for n in range(n_cells):
            centred_np[n, p] = input_np[n, p] - total / n_cells
    for n in range(n_cells):
        for p in range(n_inputs):
            for other in range(n_inputs):
                covariance_pp[p, other] += float(centred_np[n, p]) * centred_np[n, other]
    for g in range(mean_g.size):
        mean_g[g] = variance_g[g] = _F(0)
    for p in range(n_inputs):
        spread, weight, mean = spread_pg[p], weight_pg[p], mean_p[p]
        for g in range(spread.size):
            spread[g] = _F(0)
        for other in range(n_inputs):
            covariance, row = _F(covariance_pp[p, other] / n_cells), weight_pg[other]
            for g in range(spread.size):
                spread[g] += covariance * row[g]
        for g in range(spread.size):
            variance_g[g] += spread[g] * weight[g]
            mean_g[g] += mean * weight[g]
    for g in range(mean_g.size):
        variance_g[g] = max(variance_g[g], _F(0))
        inverse_g[g] = _F(1) / math.sqrt(variance_g[g] + _F(eps))
        intercept_g[g] = beta_g[g] - gamma_g[g] * inverse_g[g] * mean_g[g]
    for p in range(n_inputs):
        folded, weight = folded_pg[p], weight_pg[p]
        for g in range(folded.size):
            folded[g] = gamma_g[g] * inverse_g[g] * weight[g]


@njit(**LOOP)
def fold_batch_norm_backward(
    centred_np: Float32Array,
    mean_p: Float32Array,
    weight_pg: Float32Array,
    gamma_g: Float32Array,
    inverse_g: Float32Array,
    spread_pg: Float32Array,
    folded_pg: Float32Array,
    d_folded_pg: Float32Array,
    d_intercept_g: Float32Array,
    d_covariance_pp: Float32Array,
    d_mean_p: Float32Array,
    along_g: Float32Array,
    d_variance_g: Float32Array,
    d_input_np: Float32Array,
    d_weight_pg: Float32Array,
    d_gamma_g: Float32Array,
) -> None:
    """Gradients of :func:`fold_batch_norm`.

    Parameters
    ----------
    centred_np, mean_p, weight_pg, gamma_g, inverse_g, spread_pg, folded_pg
        Inputs and outputs of :func:`fold_batch_norm`.
    d_folded_pg, d_intercept_g
        Gradients of the affine map, (inputs, genes) and (genes,), float32; the first is overwritten.
    d_covariance_pp, d_mean_p, along_g, d_variance_g
        Working memory, (inputs, inputs), (inputs,), (genes,) and (genes,), float32.
    d_input_np, d_weight_pg, d_gamma_g
        Output: gradients, (cells, inputs), (inputs, genes) and (genes,), float32.
    """
    n_cells, n_inputs = centred_np.shape
    for g in range(along_g.size):
        along_g[g] = _F(0)
    for p in range(n_inputs):
        d_folded, weight, mean = d_folded_pg[p], weight_pg[p], mean_p[p]
        for g in range(along_g.size):
            d_folded[g] -= mean * d_intercept_g[g]
            along_g[g] += weight[g] * d_folded[g]
    for g in range(along_g.size):
        d_gamma_g[g] = inverse_g[g] * along_g[g]
        d_variance_g[g] = _F(-0.5) * inverse_g[g] * inverse_g[g] * inverse_g[g] * gamma_g[g] * along_g[g]
    for p in range(n_inputs):
        d_weight, d_folded, spread, folded, weight = (
            d_weight_pg[p],
            d_folded_pg[p],
            spread_pg[p],
            folded_pg[p],
            weight_pg[p],
        )
        total = _F(0)
        for g in range(d_weight.size):
            d_weight[g] = gamma_g[g] * inverse_g[g] * d_folded[g] + _F(2) * d_variance_g[g] * spread[g]
            total += d_intercept_g[g] * folded[g]
        d_mean_p[p] = -total
        for other in range(p + 1):
            row, total = weight_pg[other], _F(0)
            for g in range(row.size):
                total += d_variance_g[g] * weight[g] * row[g]
            d_covariance_pp[p, other] = d_covariance_pp[other, p] = total
    for n in range(n_cells):
        for p in range(n_inputs):
            total = d_mean_p[p]
            for other in range(n_inputs):
                total += _F(2) * centred_np[n, other] * d_covariance_pp[p, other]
            d_input_np[n, p] = total / n_cells
