"""Compiled loops in float32: a linear layer and its batch norm in training as one affine map, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP

_F = np.float32


@njit(**LOOP)
def fold_batch_norm(
    input_np: Any,
    weight_pg: Any,
    gamma_g: Any,
    beta_g: Any,
    eps: float,
    covariance_pp: Any,
    centred_np: Any,
    mean_p: Any,
    spread_pg: Any,
    inverse_g: Any,
    folded_pg: Any,
    intercept_g: Any,
    mean_g: Any,
    variance_g: Any,
) -> None:
    """A linear layer and its batch norm in training as one affine map; see :func:`ldvae_ext.module._head.affine`.

    Covariances come in as float64 zeros.
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
    centred_np: Any,
    mean_p: Any,
    weight_pg: Any,
    gamma_g: Any,
    inverse_g: Any,
    spread_pg: Any,
    folded_pg: Any,
    d_folded_pg: Any,
    d_intercept_g: Any,
    d_covariance_pp: Any,
    d_mean_p: Any,
    along_g: Any,
    d_variance_g: Any,
    d_input_np: Any,
    d_weight_pg: Any,
    d_gamma_g: Any,
) -> None:
    """Gradients of :func:`fold_batch_norm`."""
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
