"""Compiled loops of an encoder behind its first layer: batch norm, ReLU, dropout, and the posterior. Opened on first use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP

_F = np.float32


@njit(**LOOP)
def hidden_layer(
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
    for h in range(n_hidden):
        mean_h[h] /= n_cells
    for n in range(n_cells):
        row = before_nh[n]
        for h in range(n_hidden):
            apart = row[h] - mean_h[h]
            variance_h[h] += apart * apart
    for h in range(n_hidden):
        running_mean_h[h] += _F(momentum * (mean_h[h] - running_mean_h[h]))
        running_variance_h[h] += _F(momentum * (variance_h[h] / (n_cells - 1) - running_variance_h[h]))
        inverse_h[h] = 1.0 / math.sqrt(variance_h[h] / n_cells + eps)
    shift_h = np.empty(n_hidden, _F)
    for h in range(n_hidden):
        shift_h[h] = mean_h[h]
    for n in range(n_cells):
        row, normal, kept, out = before_nh[n], normal_nh[n], kept_nh[n], out_nh[n]
        for h in range(n_hidden):
            normal[h] = (row[h] - shift_h[h]) * inverse_h[h]
            value = gamma_h[h] * normal[h] + beta_h[h]
            # What is not a number is not positive: it has to get through.
            out[h] = _F(0) if value <= _F(0) else kept[h] * value


@njit(**LOOP)
def hidden_layer_backward(
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
    """Gradients of :func:`hidden_layer`; those of gamma and beta come in as zeros."""
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


@njit(**LOOP)
def posterior(
    hidden_nh: Any,
    mean_weight_kh: Any,
    mean_bias_k: Any,
    variance_weight_kh: Any,
    variance_bias_k: Any,
    least_variance: float,
    draw_nk: Any,
    prior_mean_n: Any,
    prior_scale_n: Any,
    mean_nk: Any,
    scale_nk: Any,
    sample_nk: Any,
    divergence_n: Any,
) -> None:
    """Mean, scale, a sample and the KL divergence from a prior that is the same for all latents of a cell.

    ``sample = mean + draw * scale``, ``KL = sum_k (r + ((mean - m0) / s0)^2 - 1 - log r) / 2`` with ``r = (scale / s0)^2``.
    """
    n_hidden = hidden_nh.shape[1]
    for n in range(hidden_nh.shape[0]):
        row, total = hidden_nh[n], 0.0
        for k in range(mean_nk.shape[1]):
            mean_weight, variance_weight = mean_weight_kh[k], variance_weight_kh[k]
            mean, free = _F(0), _F(0)
            for h in range(n_hidden):
                mean += row[h] * mean_weight[h]
                free += row[h] * variance_weight[h]
            mean += mean_bias_k[k]
            variance = math.exp(free + variance_bias_k[k]) + _F(least_variance)
            scale = math.sqrt(variance)
            mean_nk[n, k], scale_nk[n, k] = mean, scale
            sample_nk[n, k] = mean + draw_nk[n, k] * scale
            distance = (mean - prior_mean_n[n]) / prior_scale_n[n]
            ratio = scale / prior_scale_n[n]
            ratio *= ratio
            total += 0.5 * (ratio + distance * distance - 1.0 - math.log(ratio))
        divergence_n[n] = total


@njit(**LOOP)
def posterior_backward(
    hidden_nh: Any,
    mean_weight_kh: Any,
    variance_weight_kh: Any,
    least_variance: float,
    draw_nk: Any,
    prior_mean_n: Any,
    prior_scale_n: Any,
    mean_nk: Any,
    scale_nk: Any,
    d_sample_nk: Any,
    d_divergence_n: Any,
    d_hidden_nh: Any,
    d_mean_weight_kh: Any,
    d_mean_bias_k: Any,
    d_variance_weight_kh: Any,
    d_variance_bias_k: Any,
) -> None:
    """Gradients of :func:`posterior`, added to what is there."""
    n_hidden = hidden_nh.shape[1]
    for n in range(hidden_nh.shape[0]):
        row, d_row, weight = hidden_nh[n], d_hidden_nh[n], d_divergence_n[n]
        for k in range(mean_nk.shape[1]):
            mean, scale, prior_scale = mean_nk[n, k], scale_nk[n, k], prior_scale_n[n]
            d_mean = d_sample_nk[n, k] + weight * (mean - prior_mean_n[n]) / (prior_scale * prior_scale)
            d_scale = d_sample_nk[n, k] * draw_nk[n, k]
            d_scale += weight * (scale / (prior_scale * prior_scale) - _F(1) / scale)
            # scale = sqrt(e^free + least)
            d_free = _F(0.5) * d_scale * (scale - _F(least_variance) / scale)
            d_mean_bias_k[k] += d_mean
            d_variance_bias_k[k] += d_free
            mean_weight, variance_weight = mean_weight_kh[k], variance_weight_kh[k]
            d_mean_weight, d_variance_weight = d_mean_weight_kh[k], d_variance_weight_kh[k]
            for h in range(n_hidden):
                d_row[h] += d_mean * mean_weight[h] + d_free * variance_weight[h]
                d_mean_weight[h] += d_mean * row[h]
                d_variance_weight[h] += d_free * row[h]
