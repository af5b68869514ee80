"""Compiled loops of an encoder after its first linear layer: batch norm, ReLU, dropout, and the posterior."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP, Float32Array, IntegerArray

_F = np.float32


@njit(**LOOP)
def hidden_layer(
    before_nh: Float32Array,
    gamma_h: Float32Array,
    beta_h: Float32Array,
    kept_nh: Float32Array,
    eps: float,
    running_mean_h: Float32Array,
    running_variance_h: Float32Array,
    momentum: float,
    is_frozen: bool,
    normal_nh: Float32Array,
    inverse_h: Float32Array,
    out_nh: Float32Array,
) -> None:
    """Batch norm, ReLU and dropout: ``out = kept * max(0, gamma * normal + beta)``.

    ``normal`` is the input standardised by the statistics of the minibatch, of which the running statistics take a share; or,
    frozen, by the running statistics.

    Parameters
    ----------
    before_nh
        Output of the linear layer, (cells, hidden units), float32.
    gamma_h, beta_h
        Parameters of the batch norm, (hidden units,), float32.
    kept_nh
        Factors of the dropout, 0 or ``1 / (1 - p)``, (cells, hidden units), float32.
    eps, momentum
        Constants of the batch norm.
    running_mean_h, running_variance_h
        Running statistics, (hidden units,), float32; updated unless frozen.
    is_frozen
        True for a batch norm in evaluation mode.
    normal_nh, inverse_h
        Output: standardised inputs, (cells, hidden units), and 1 / standard deviations, (hidden units,); float32.
    out_nh
        Output, (cells, hidden units), float32.
    """
    n_cells, n_hidden = before_nh.shape
    mean_h, variance_h = np.zeros(n_hidden), np.zeros(n_hidden)
    if is_frozen:
        for h in range(n_hidden):
            mean_h[h], variance_h[h] = running_mean_h[h], running_variance_h[h]
    else:
        for n in range(n_cells):
            row = before_nh[n]
            for h in range(n_hidden):
                mean_h[h] += row[h]
        for h in range(n_hidden):
            mean_h[h] /= n_cells
        for n in range(n_cells):
            row = before_nh[n]
            for h in range(n_hidden):
                centred = row[h] - mean_h[h]
                variance_h[h] += centred * centred
        for h in range(n_hidden):
            running_mean_h[h] += _F(momentum * (mean_h[h] - running_mean_h[h]))
            running_variance_h[h] += _F(momentum * (variance_h[h] / (n_cells - 1) - running_variance_h[h]))
            variance_h[h] /= n_cells
    shift_h = np.empty(n_hidden, _F)
    for h in range(n_hidden):
        inverse_h[h] = 1.0 / math.sqrt(variance_h[h] + eps)
        shift_h[h] = mean_h[h]
    for n in range(n_cells):
        row, normal, kept, out = before_nh[n], normal_nh[n], kept_nh[n], out_nh[n]
        for h in range(n_hidden):
            normal[h] = (row[h] - shift_h[h]) * inverse_h[h]
            value = gamma_h[h] * normal[h] + beta_h[h]
            # Written so that NaN stays NaN.
            out[h] = _F(0) if value <= _F(0) else kept[h] * value


@njit(**LOOP)
def hidden_layer_backward(
    d_out_nh: Float32Array,
    gamma_h: Float32Array,
    beta_h: Float32Array,
    kept_nh: Float32Array,
    normal_nh: Float32Array,
    inverse_h: Float32Array,
    is_frozen: bool,
    d_before_nh: Float32Array,
    d_gamma_h: Float32Array,
    d_beta_h: Float32Array,
) -> None:
    """Gradients of :func:`hidden_layer`.

    Parameters
    ----------
    d_out_nh
        Gradient of the output, (cells, hidden units), float32.
    gamma_h, beta_h, kept_nh, normal_nh, inverse_h, is_frozen
        Inputs and outputs of :func:`hidden_layer`.
    d_before_nh
        Output: gradient of the input, (cells, hidden units), float32.
    d_gamma_h, d_beta_h
        Output: gradients of the parameters, (hidden units,), float32; zeros at the call.
    """
    n_cells, n_hidden = d_out_nh.shape
    for n in range(n_cells):
        d_out, kept, normal, d_before = d_out_nh[n], kept_nh[n], normal_nh[n], d_before_nh[n]
        for h in range(n_hidden):
            is_on = gamma_h[h] * normal[h] + beta_h[h] > _F(0)
            gradient = d_out[h] * kept[h] if is_on else _F(0)
            d_before[h] = gradient
            d_beta_h[h] += gradient
            d_gamma_h[h] += gradient * normal[h]
    mean_h, along_h, scale_h = np.empty(n_hidden, _F), np.empty(n_hidden, _F), np.empty(n_hidden, _F)
    for h in range(n_hidden):
        # Frozen statistics do not depend on the cells.
        mean_h[h] = _F(0) if is_frozen else d_beta_h[h] / n_cells
        along_h[h] = _F(0) if is_frozen else d_gamma_h[h] / n_cells
        scale_h[h] = gamma_h[h] * inverse_h[h]
    for n in range(n_cells):
        normal, d_before = normal_nh[n], d_before_nh[n]
        for h in range(n_hidden):
            d_before[h] = scale_h[h] * (d_before[h] - mean_h[h] - normal[h] * along_h[h])


@njit(**LOOP)
def posterior(
    hidden_nh: Float32Array,
    mean_weight_kh: Float32Array,
    mean_bias_k: Float32Array,
    variance_weight_kh: Float32Array,
    variance_bias_k: Float32Array,
    least_variance: float,
    draw_nk: Float32Array,
    prior_mean_n: Float32Array,
    prior_scale_n: Float32Array,
    n_kept_n: IntegerArray,
    mean_nk: Float32Array,
    scale_nk: Float32Array,
    sample_nk: Float32Array,
    divergence_n: Float32Array,
) -> None:
    """Mean, standard deviation and a sample of the posterior, and its KL divergence from a normal prior.

    ``sample = mean + draw * scale``, ``KL = sum_k (r + ((mean - m0) / s0)^2 - 1 - log r) / 2`` with ``r = (scale / s0)^2``. Latents
    that a cell does not keep are 0 in the sample, and have no KL divergence.

    Parameters
    ----------
    hidden_nh
        Hidden units, (cells, hidden units), float32.
    mean_weight_kh, mean_bias_k
        Linear layer of the means, (latents, hidden units) and (latents,), float32.
    variance_weight_kh, variance_bias_k
        Linear layer of the log variances, of the same shapes, float32.
    least_variance
        Number added to the variances.
    draw_nk
        Standard normal draws, (cells, latents), float32.
    prior_mean_n, prior_scale_n
        Mean and standard deviation of the prior of all latents of a cell, (cells,), float32.
    n_kept_n
        Number of latents that each cell keeps, the first ones, (cells,), integers.
    mean_nk, scale_nk, sample_nk
        Output, (cells, latents), float32.
    divergence_n
        Output: KL divergences, (cells,), float32, in nats.
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
            if k >= n_kept_n[n]:
                sample_nk[n, k] = _F(0)
                continue
            sample_nk[n, k] = mean + draw_nk[n, k] * scale
            distance = (mean - prior_mean_n[n]) / prior_scale_n[n]
            ratio = scale / prior_scale_n[n]
            ratio *= ratio
            total += 0.5 * (ratio + distance * distance - 1.0 - math.log(ratio))
        divergence_n[n] = total


@njit(**LOOP)
def posterior_backward(
    hidden_nh: Float32Array,
    mean_weight_kh: Float32Array,
    variance_weight_kh: Float32Array,
    least_variance: float,
    draw_nk: Float32Array,
    prior_mean_n: Float32Array,
    prior_scale_n: Float32Array,
    n_kept_n: IntegerArray,
    mean_nk: Float32Array,
    scale_nk: Float32Array,
    d_sample_nk: Float32Array,
    d_divergence_n: Float32Array,
    d_hidden_nh: Float32Array,
    d_mean_weight_kh: Float32Array,
    d_mean_bias_k: Float32Array,
    d_variance_weight_kh: Float32Array,
    d_variance_bias_k: Float32Array,
) -> None:
    """Gradients of :func:`posterior`, added to the arrays.

    Parameters
    ----------
    hidden_nh, mean_weight_kh, variance_weight_kh, least_variance, draw_nk, prior_mean_n, prior_scale_n, n_kept_n, mean_nk, scale_nk
        Inputs and outputs of :func:`posterior`.
    d_sample_nk, d_divergence_n
        Gradients of the outputs, (cells, latents) and (cells,), float32.
    d_hidden_nh
        Gradient of the hidden units, (cells, hidden units), float32; added to.
    d_mean_weight_kh, d_mean_bias_k, d_variance_weight_kh, d_variance_bias_k
        Gradients of the layers, of their shapes, float32; added to.
    """
    n_hidden = hidden_nh.shape[1]
    for n in range(hidden_nh.shape[0]):
        row, d_row, weight = hidden_nh[n], d_hidden_nh[n], d_divergence_n[n]
        for k in range(n_kept_n[n]):
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
