"""Compiled loops in float32: log-likelihood of the counts of a cell, and its gradients."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP, PART, Float32Array, IntegerArray
from ldvae_ext.kernels.vector_math import exp, log, log1p

_F = np.float32
_LANES = 64
_EPS = _F(1e-8)
# Genes whose terms are summed in float32 before they are added to a float64.
_BLOCK = 512
# Counts up to this have their gamma functions in tables, one for each gene.
N_TABLE = 8


@njit(**LOOP)
def _digamma(x: float) -> float:
    """Digamma function for x > 0: the recurrence up to 6, beyond it the asymptotic series (DLMF 5.11.2)."""
    shift = 0.0
    while x < 6.0:
        shift -= 1.0 / x
        x += 1.0
    y = 1.0 / (x * x)
    series = y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y * (1 / 132)))))
    return shift + math.log(x) - 0.5 / x - series


@njit(**LOOP)
def _gamma_terms(x: float, theta: float) -> tuple[float, np.float32]:
    """Values of ``log_gamma`` and ``digamma``, see :func:`dispersion_tables`, for any count."""
    x, theta = float(x), float(theta)
    log_gamma = math.lgamma(x + theta) - math.lgamma(theta) - math.lgamma(x + 1.0)
    return log_gamma, _F(_digamma(x + theta) - _digamma(theta))


@njit(**LOOP)
def dispersion_tables(
    theta_cg: Float32Array,
    inverse_cg: Float32Array,
    share_cg: Float32Array,
    log_gamma_cxg: Float32Array,
    digamma_cxg: Float32Array,
) -> None:
    """Compute the terms of the likelihood that depend only on dispersions.

    ``inverse = 1 / (theta + eps)``, ``share = theta / (theta + eps)``, and for counts x up to ``N_TABLE``
    ``log_gamma = lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)`` and ``digamma = digamma(x + theta) - digamma(theta)``, sums
    over i < x of ``log((theta + i) / (i + 1))`` and of ``1 / (theta + i)``.

    Parameters
    ----------
    theta_cg
        Inverse dispersions, (rows, genes), float32.
    inverse_cg, share_cg
        Output, (rows, genes), float32.
    log_gamma_cxg, digamma_cxg
        Output, (rows, N_TABLE + 1, genes), float32.
    """
    for c in range(theta_cg.shape[0]):
        for g in range(theta_cg.shape[1]):
            inverse_cg[c, g] = _F(1) / (theta_cg[c, g] + _EPS)
            share_cg[c, g] = theta_cg[c, g] * inverse_cg[c, g]
            log_gamma_cxg[c, 0, g] = _F(0)
            digamma_cxg[c, 0, g] = _F(0)
        for x in range(1, log_gamma_cxg.shape[1]):
            # One table in each loop: with more arrays the compiler does not vectorise it.
            theta, log_gamma, before = theta_cg[c], log_gamma_cxg[c, x], log_gamma_cxg[c, x - 1]
            for g in range(theta.size):
                log_gamma[g] = before[g] + log((theta[g] + _F(x - 1)) / _F(x))
            digamma, before = digamma_cxg[c, x], digamma_cxg[c, x - 1]
            for g in range(theta.size):
                digamma[g] = before[g] + _F(1) / (theta[g] + _F(x - 1))


@njit(**PART)
def _largest(x_g: Float32Array) -> np.float32:
    """Largest value. Each lane has a maximum of its own, since a loop with a single maximum is not vectorised."""
    largest = np.empty(_LANES, _F)
    for lane in range(_LANES):
        largest[lane] = x_g[0]
    for first in range(0, x_g.size - _LANES + 1, _LANES):
        x = x_g[first : first + _LANES]
        for lane in range(_LANES):
            largest[lane] = x[lane] if x[lane] > largest[lane] else largest[lane]
    result = largest[0]
    for lane in range(_LANES):
        result = max(result, largest[lane])
    for g in range(x_g.size // _LANES * _LANES, x_g.size):
        result = max(result, x_g[g])
    return result


@njit(**PART)
def _to_exponentials(logits_g: Float32Array, exp_g: Float32Array) -> float:
    """Write ``e^(logit - largest)`` of each gene; return their sum, which is NaN if a logit is NaN."""
    largest = _largest(logits_g)
    total = np.float64(0)
    for first in range(0, logits_g.size, _BLOCK):
        # numba does not vectorise loops whose indices could be negative; the indices of a slice begin at 0.
        x, e = logits_g[first : first + _BLOCK], exp_g[first : first + _BLOCK]
        part, zero = _F(0), _F(0)
        for g in range(x.size):
            e[g] = exp(x[g] - largest)
            part += e[g]
            zero += _F(0) * x[g]
        total += part + zero
    return total


@njit(**PART)
def _without_counts(
    rate: np.float32,
    weight: np.float32,
    exp_g: Float32Array,
    theta_g: Float32Array,
    inverse_g: Float32Array,
    share_g: Float32Array,
    d_log_mean_g: Float32Array,
    d_theta_g: Float32Array,
) -> tuple[float, float]:
    """Log-likelihood of a cell if all counts were 0, and the sum of its gradient in the log means."""
    log_likelihood = np.float64(0)
    gradient_sum = np.float64(0)
    for first in range(0, exp_g.size, _BLOCK):
        here = slice(first, first + _BLOCK)
        e, theta, inverse, share = exp_g[here], theta_g[here], inverse_g[here], share_g[here]
        d_log_mean, d_theta = d_log_mean_g[here], d_theta_g[here]
        part, gradient_part = _F(0), _F(0)
        for g in range(e.size):
            mu = rate * e[g]
            r = mu * inverse[g]
            q = _F(1) / (_F(1) + r)
            log1p_r = log1p(r)
            part -= theta[g] * log1p_r
            d_log_mean[g] = -share[g] * mu * q
            gradient_part += d_log_mean[g]
            d_theta[g] += weight * (log1p_r - share[g] * r * q)
        log_likelihood += part
        gradient_sum += gradient_part
    return log_likelihood, gradient_sum


@njit(**PART)
def negative_binomial(
    row_g: Float32Array,
    library: np.float32,
    weight: np.float32,
    genes: IntegerArray,
    x: Float32Array,
    theta_g: Float32Array,
    inverse_g: Float32Array,
    share_g: Float32Array,
    log_gamma_xg: Float32Array,
    digamma_xg: Float32Array,
    exp_g: Float32Array,
    d_log_mean_g: Float32Array,
    workspace: Float32Array,
    d_theta_g: Float32Array,
) -> tuple[float, float]:
    """Negative log-likelihood of a cell under a negative binomial, and its gradient in the log library size.

    With ``mu = library * softmax(logits)``, ``r = mu / (theta + eps)`` and ``q = 1 / (1 + r)``, a count of 0 has the
    log-likelihood ``-theta log1p(r)`` and the gradients ``-share * mu q`` in log mu and ``-log1p(r) + share * r q`` in theta.
    No large terms cancel in them. Terms of positive counts are added; only these need gamma functions. All gradients are
    multiplied by ``weight``.

    Parameters
    ----------
    row_g
        Logits of the cell, (genes,), float32; replaced by the gradient in them.
    library, weight
        Library size, and weight of the gradients, float32.
    genes, x
        Genes of the positive counts, integers, and the counts, float32; both (positive counts,).
    theta_g, inverse_g, share_g
        Inverse dispersions, and their terms; (genes,), float32; see :func:`dispersion_tables`.
    log_gamma_xg, digamma_xg
        Tables of gamma functions, (N_TABLE + 1, genes), float32; see :func:`dispersion_tables`.
    exp_g, d_log_mean_g
        Working memory, (genes,), float32.
    workspace
        Working memory, (2, at least the positive counts), float32.
    d_theta_g
        Gradient in theta, (genes,), float32; added to.
    """
    total = _to_exponentials(row_g, exp_g)
    rate = _F(library / total)
    log_likelihood, gradient_sum = _without_counts(
        rate, weight, exp_g, theta_g, inverse_g, share_g, d_log_mean_g, d_theta_g
    )
    mu, inverse = workspace[0, : x.size], workspace[1, : x.size]
    for j in range(x.size):
        mu[j] = rate * exp_g[genes[j]]
        inverse[j] = inverse_g[genes[j]]
    part, gradient_part = _F(0), _F(0)
    for j in range(x.size):
        r = mu[j] * inverse[j]
        per_total = inverse[j] / (_F(1) + r)  # 1 / (theta + mu + eps)
        mu_eps = mu[j] + _EPS
        part += x[j] * log(mu_eps * per_total)
        # Gradients of x log((mu + eps) / (theta + mu + eps)) in log mu and in theta.
        mu[j] = x[j] * mu[j] * (_F(1) / mu_eps - per_total)
        gradient_part += mu[j]
        inverse[j] = x[j] * per_total
    gammas = 0.0
    for j in range(x.size):
        g, count = genes[j], int(x[j])
        if count == x[j] and 0 <= count <= N_TABLE:
            gammas += log_gamma_xg[count, g]
            d_gamma = digamma_xg[count, g]
        else:
            gamma, d_gamma = _gamma_terms(x[j], theta_g[g])
            gammas += gamma
        d_log_mean_g[g] += mu[j]
        d_theta_g[g] += weight * (inverse[j] - d_gamma)
    gradient_sum += gradient_part
    share = _F(gradient_sum / total)
    for g in range(row_g.size):
        row_g[g] = weight * (share * exp_g[g] - d_log_mean_g[g])
    return -(log_likelihood + part + gammas), -weight * gradient_sum


@njit(**PART)
def poisson(
    row_g: Float32Array,
    library: np.float32,
    weight: np.float32,
    genes: IntegerArray,
    x: Float32Array,
    exp_g: Float32Array,
) -> tuple[float, float]:
    """Negative log-likelihood of a cell under a Poisson, and its gradient in the log library size.

    The means of a cell add up to its library size, so that counts of 0 contribute no terms of their own.

    Parameters
    ----------
    row_g
        Logits of the cell, (genes,), float32; replaced by the gradient in them.
    library, weight
        Library size, and weight of the gradients, float32.
    genes, x
        Genes of the positive counts, integers, and the counts, float32; both (positive counts,).
    exp_g
        Working memory, (genes,), float32.
    """
    largest, total = _largest(row_g), _to_exponentials(row_g, exp_g)
    shift = math.log(library) - math.log(total) - largest
    log_likelihood, n_counts = -float(library), np.float64(0)
    for j in range(x.size):
        count = float(x[j])
        n_counts += count
        log_likelihood += count * (row_g[genes[j]] + shift)
        # log 0! = log 1! = 0.
        if count > 1.0 or count < 0.0 or count != int(count):
            log_likelihood -= math.lgamma(count + 1.0)
    share = weight * _F(n_counts / total)
    for g in range(row_g.size):
        row_g[g] = share * exp_g[g]
    for j in range(x.size):
        row_g[genes[j]] -= weight * x[j]
    return -log_likelihood, weight * (library - n_counts)


@njit(**PART)
def _zero_inflated_without_counts(
    rate: np.float32,
    weight: np.float32,
    exp_g: Float32Array,
    dropout_g: Float32Array,
    theta_g: Float32Array,
    inverse_g: Float32Array,
    share_g: Float32Array,
    d_log_mean_g: Float32Array,
    d_dropout_g: Float32Array,
    d_theta_g: Float32Array,
) -> tuple[float, float]:
    """As :func:`_without_counts`, with zero inflation; also write the gradient in the dropout logits."""
    log_likelihood = np.float64(0)
    gradient_sum = np.float64(0)
    for first in range(0, exp_g.size, _BLOCK):
        here = slice(first, first + _BLOCK)
        e, theta, inverse, share, dropout = exp_g[here], theta_g[here], inverse_g[here], share_g[here], dropout_g[here]
        d_log_mean, d_dropout, d_theta = d_log_mean_g[here], d_dropout_g[here], d_theta_g[here]
        part, gradient_part = _F(0), _F(0)
        for g in range(e.size):
            mu = rate * e[g]
            r = mu * inverse[g]
            q = _F(1) / (_F(1) + r)
            log1p_r = log1p(r)
            stay_zero = -dropout[g] - theta[g] * log1p_r
            # softplus(y) = max(y, 0) + log(1 + e^-|y|); its derivative is 1 / (1 + e^-y).
            a, b = exp(-abs(stay_zero)), exp(-abs(dropout[g]))
            part += max(stay_zero, _F(0)) + log1p(a) - max(-dropout[g], _F(0)) - log1p(b)
            sigmoid_a, sigmoid_b = _F(1) / (_F(1) + a), _F(1) / (_F(1) + b)
            zero = sigmoid_a if stay_zero >= _F(0) else a * sigmoid_a
            d_log_mean[g] = -zero * share[g] * mu * q
            gradient_part += d_log_mean[g]
            d_theta[g] += weight * zero * (log1p_r - share[g] * r * q)
            d_dropout[g] = weight * (zero - (b * sigmoid_b if dropout[g] >= _F(0) else sigmoid_b))
        log_likelihood += part
        gradient_sum += gradient_part
    return log_likelihood, gradient_sum


@njit(**PART)
def zero_inflated_negative_binomial(
    row_g: Float32Array,
    library: np.float32,
    weight: np.float32,
    genes: IntegerArray,
    x: Float32Array,
    theta_g: Float32Array,
    inverse_g: Float32Array,
    share_g: Float32Array,
    log_gamma_xg: Float32Array,
    digamma_xg: Float32Array,
    exp_g: Float32Array,
    d_log_mean_g: Float32Array,
    workspace: Float32Array,
    d_theta_g: Float32Array,
    dropout_g: Float32Array,
    d_dropout_g: Float32Array,
) -> tuple[float, float]:
    """As :func:`negative_binomial`, with logits of zero inflation.

    Gradients are first computed as if all counts were 0. For positive counts, the share of the dropout is then removed.

    Parameters
    ----------
    row_g
        Logits of the cell, (genes,), float32; replaced by the gradient in them.
    library, weight
        Library size, and weight of the gradients, float32.
    genes, x
        Genes of the positive counts, integers, and the counts, float32; both (positive counts,).
    theta_g, inverse_g, share_g
        Inverse dispersions, and their terms; (genes,), float32; see :func:`dispersion_tables`.
    log_gamma_xg, digamma_xg
        Tables of gamma functions, (N_TABLE + 1, genes), float32; see :func:`dispersion_tables`.
    exp_g, d_log_mean_g
        Working memory, (genes,), float32.
    workspace
        Working memory, (5, at least the positive counts), float32.
    d_theta_g
        Gradient in theta, (genes,), float32; added to.
    dropout_g, d_dropout_g
        Logits of zero inflation, and the gradient in them (output), (genes,), float32.
    """
    total = _to_exponentials(row_g, exp_g)
    rate = _F(library / total)
    log_likelihood, gradient_sum = _zero_inflated_without_counts(
        rate, weight, exp_g, dropout_g, theta_g, inverse_g, share_g, d_log_mean_g, d_dropout_g, d_theta_g
    )
    mu, inverse, theta = workspace[0, : x.size], workspace[1, : x.size], workspace[2, : x.size]
    positive, d_theta = workspace[3, : x.size], workspace[4, : x.size]
    for j in range(x.size):
        mu[j] = rate * exp_g[genes[j]]
        inverse[j] = inverse_g[genes[j]]
        theta[j] = theta_g[genes[j]]
        positive[j] = dropout_g[genes[j]]
    part, gradient_part = _F(0), _F(0)
    for j in range(x.size):
        r = mu[j] * inverse[j]
        q = _F(1) / (_F(1) + r)
        log1p_r, mu_eps, share = log1p(r), mu[j] + _EPS, theta[j] * inverse[j]
        stay_zero = -positive[j] - theta[j] * log1p_r
        a = exp(-abs(stay_zero))
        part += x[j] * log(mu_eps * inverse[j] * q) + min(stay_zero, _F(0)) - log1p(a)
        sigmoid_a = _F(1) / (_F(1) + a)
        positive[j] = a * sigmoid_a if stay_zero >= _F(0) else sigmoid_a
        d_theta[j] = x[j] * inverse[j] * q + positive[j] * (log1p_r - share * r * q)
        mu[j] = x[j] * mu[j] * (_F(1) / mu_eps - inverse[j] * q) - positive[j] * share * mu[j] * q
        gradient_part += mu[j]
    gammas = 0.0
    for j in range(x.size):
        g, count = genes[j], int(x[j])
        if count == x[j] and 0 <= count <= N_TABLE:
            gammas += log_gamma_xg[count, g]
            d_gamma = digamma_xg[count, g]
        else:
            gamma, d_gamma = _gamma_terms(x[j], theta_g[g])
            gammas += gamma
        d_log_mean_g[g] += mu[j]
        d_dropout_g[g] += weight * positive[j]
        d_theta_g[g] += weight * (d_theta[j] - d_gamma)
    gradient_sum += gradient_part
    share = _F(gradient_sum / total)
    for g in range(row_g.size):
        row_g[g] = weight * (share * exp_g[g] - d_log_mean_g[g])
    return -(log_likelihood + part + gammas), -weight * gradient_sum
