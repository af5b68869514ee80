"""Compiled loops in float32: likelihoods of the counts of a cell, with their gradients. Opened on first use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP, PART
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
def _gamma_terms(x: float, theta: float) -> tuple[float, Any]:
    """What :func:`dispersion_tables` holds, for any count."""
    x, theta = float(x), float(theta)
    log_gamma = math.lgamma(x + theta) - math.lgamma(theta) - math.lgamma(x + 1.0)
    return log_gamma, _F(_digamma(x + theta) - _digamma(theta))


@njit(**LOOP)
def dispersion_tables(theta_cg: Any, inverse_cg: Any, share_cg: Any, log_gamma_cxg: Any, digamma_cxg: Any) -> None:
    """What the likelihood needs of the dispersions alone.

    ``inverse = 1 / (theta + eps)``, ``share = theta / (theta + eps)``, and for counts x up to ``N_TABLE``
    ``log_gamma = lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)`` and ``digamma = digamma(x + theta) - digamma(theta)``, sums
    over i < x of ``log((theta + i) / (i + 1))`` and of ``1 / (theta + i)``.
    """
    for c in range(theta_cg.shape[0]):
        for g in range(theta_cg.shape[1]):
            inverse_cg[c, g] = _F(1) / (theta_cg[c, g] + _EPS)
            share_cg[c, g] = theta_cg[c, g] * inverse_cg[c, g]
            log_gamma_cxg[c, 0, g] = _F(0)
            digamma_cxg[c, 0, g] = _F(0)
        for x in range(1, log_gamma_cxg.shape[1]):
            # One table at a time: too many arrays in a loop keep it from being vectorised.
            theta, log_gamma, before = theta_cg[c], log_gamma_cxg[c, x], log_gamma_cxg[c, x - 1]
            for g in range(theta.size):
                log_gamma[g] = before[g] + log((theta[g] + _F(x - 1)) / _F(x))
            digamma, before = digamma_cxg[c, x], digamma_cxg[c, x - 1]
            for g in range(theta.size):
                digamma[g] = before[g] + _F(1) / (theta[g] + _F(x - 1))


@njit(**PART)
def _largest(x_g: Any) -> Any:
    """The largest value; numbers are compared side by side, since a single maximum does not vectorise."""
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
def _to_exponentials(logits_g: Any, exp_g: Any) -> float:
    """``e^(logit - largest)`` of each gene; returns their sum, which is NaN if a logit is."""
    largest = _largest(logits_g)
    total: Any = 0.0
    for first in range(0, logits_g.size, _BLOCK):
        # Slices, whose indices are seen not to be negative: only such loops are vectorised.
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
    rate: Any, weight: Any, exp_g: Any, theta_g: Any, inverse_g: Any, share_g: Any, slope_g: Any, d_theta_g: Any
) -> tuple[float, float]:
    """Log-likelihood of a cell without counts, and the sum of its slopes in the logs of the means."""
    log_likelihood: Any = 0.0
    slope_sum: Any = 0.0
    for first in range(0, exp_g.size, _BLOCK):
        here = slice(first, first + _BLOCK)
        e, theta, inverse, share = exp_g[here], theta_g[here], inverse_g[here], share_g[here]
        slope, d_theta = slope_g[here], d_theta_g[here]
        part, slope_part = _F(0), _F(0)
        for g in range(e.size):
            mu = rate * e[g]
            r = mu * inverse[g]
            q = _F(1) / (_F(1) + r)
            grown = log1p(r)
            part -= theta[g] * grown
            slope[g] = -share[g] * mu * q
            slope_part += slope[g]
            d_theta[g] += weight * (grown - share[g] * r * q)
        log_likelihood += part
        slope_sum += slope_part
    return log_likelihood, slope_sum


@njit(**PART)
def negative_binomial(
    row_g: Any,
    library: Any,
    weight: Any,
    genes: Any,
    x: Any,
    theta_g: Any,
    inverse_g: Any,
    share_g: Any,
    log_gamma_xg: Any,
    digamma_xg: Any,
    exp_g: Any,
    slope_g: Any,
    of_counts: Any,
    d_theta_g: Any,
) -> tuple[float, float]:
    """Negative log-likelihood of a cell and its slope in the log library; the slopes in the logits take the place of the logits.

    With ``mu = library * softmax(logits)``, ``r = mu / (theta + eps)`` and ``q = 1 / (1 + r)`` a gene without counts has the
    log-likelihood ``-theta log1p(r)`` and the slopes ``-share * mu q`` in log mu and ``-log1p(r) + share * r q`` in theta, in
    which nothing large cancels. Counts add their terms, and only they need gamma functions. All slopes are times ``weight``.
    """
    total = _to_exponentials(row_g, exp_g)
    rate = _F(library / total)
    log_likelihood, slope_sum = _without_counts(rate, weight, exp_g, theta_g, inverse_g, share_g, slope_g, d_theta_g)
    mu, inverse = of_counts[0, : x.size], of_counts[1, : x.size]
    for j in range(x.size):
        mu[j] = rate * exp_g[genes[j]]
        inverse[j] = inverse_g[genes[j]]
    part, slope_part = _F(0), _F(0)
    for j in range(x.size):
        r = mu[j] * inverse[j]
        per_total = inverse[j] / (_F(1) + r)  # 1 / (theta + mu + eps)
        grown = mu[j] + _EPS
        part += x[j] * log(grown * per_total)
        # The slopes of x log((mu + eps) / (theta + mu + eps)) in log mu and in theta.
        mu[j] = x[j] * mu[j] * (_F(1) / grown - per_total)
        slope_part += mu[j]
        inverse[j] = x[j] * per_total
    gammas = 0.0
    for j in range(x.size):
        g, count = genes[j], int(x[j])
        if count == x[j] and 0 <= count <= N_TABLE:
            gammas += log_gamma_xg[count, g]
            rise = digamma_xg[count, g]
        else:
            gamma, rise = _gamma_terms(x[j], theta_g[g])
            gammas += gamma
        slope_g[g] += mu[j]
        d_theta_g[g] += weight * (inverse[j] - rise)
    slope_sum += slope_part
    share = _F(slope_sum / total)
    for g in range(row_g.size):
        row_g[g] = weight * (share * exp_g[g] - slope_g[g])
    return -(log_likelihood + part + gammas), -weight * slope_sum


@njit(**PART)
def poisson(row_g: Any, library: Any, weight: Any, genes: Any, x: Any, exp_g: Any) -> tuple[float, float]:
    """As :func:`negative_binomial`. The means of a cell add up to its library: genes without counts say nothing of their own."""
    largest, total = _largest(row_g), _to_exponentials(row_g, exp_g)
    shift = math.log(library) - math.log(total) - largest
    log_likelihood, n_counts = -float(library), 0.0
    for j in range(x.size):
        count = float(x[j])
        n_counts += count
        log_likelihood += count * (row_g[genes[j]] + shift)
        # Of 0! and 1! nothing is left.
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
    rate: Any,
    weight: Any,
    exp_g: Any,
    dropout_g: Any,
    theta_g: Any,
    inverse_g: Any,
    share_g: Any,
    slope_g: Any,
    d_dropout_g: Any,
    d_theta_g: Any,
) -> tuple[float, float]:
    """As :func:`_without_counts`; writes the slopes in the dropout logits, too."""
    log_likelihood: Any = 0.0
    slope_sum: Any = 0.0
    for first in range(0, exp_g.size, _BLOCK):
        here = slice(first, first + _BLOCK)
        e, theta, inverse, share, dropout = exp_g[here], theta_g[here], inverse_g[here], share_g[here], dropout_g[here]
        slope, d_dropout, d_theta = slope_g[here], d_dropout_g[here], d_theta_g[here]
        part, slope_part = _F(0), _F(0)
        for g in range(e.size):
            mu = rate * e[g]
            r = mu * inverse[g]
            q = _F(1) / (_F(1) + r)
            grown = log1p(r)
            stay_zero = -dropout[g] - theta[g] * grown
            # softplus(y) = max(y, 0) + log(1 + e^-|y|), whose slope is 1 / (1 + e^-y).
            a, b = exp(-abs(stay_zero)), exp(-abs(dropout[g]))
            part += max(stay_zero, _F(0)) + log1p(a) - max(-dropout[g], _F(0)) - log1p(b)
            of_a, of_b = _F(1) / (_F(1) + a), _F(1) / (_F(1) + b)
            zero = of_a if stay_zero >= _F(0) else a * of_a
            slope[g] = -zero * share[g] * mu * q
            slope_part += slope[g]
            d_theta[g] += weight * zero * (grown - share[g] * r * q)
            d_dropout[g] = weight * (zero - (b * of_b if dropout[g] >= _F(0) else of_b))
        log_likelihood += part
        slope_sum += slope_part
    return log_likelihood, slope_sum


@njit(**PART)
def zero_inflated_negative_binomial(
    row_g: Any,
    library: Any,
    weight: Any,
    genes: Any,
    x: Any,
    theta_g: Any,
    inverse_g: Any,
    share_g: Any,
    log_gamma_xg: Any,
    digamma_xg: Any,
    exp_g: Any,
    slope_g: Any,
    of_counts: Any,
    d_theta_g: Any,
    dropout_g: Any,
    d_dropout_g: Any,
) -> tuple[float, float]:
    """As :func:`negative_binomial`, with logits of zero inflation.

    All genes are taken for zeros first; where there are counts, the share of the slopes that dropout had is given back.
    """
    total = _to_exponentials(row_g, exp_g)
    rate = _F(library / total)
    log_likelihood, slope_sum = _zero_inflated_without_counts(
        rate, weight, exp_g, dropout_g, theta_g, inverse_g, share_g, slope_g, d_dropout_g, d_theta_g
    )
    mu, inverse, theta = of_counts[0, : x.size], of_counts[1, : x.size], of_counts[2, : x.size]
    positive, d_theta = of_counts[3, : x.size], of_counts[4, : x.size]
    for j in range(x.size):
        mu[j] = rate * exp_g[genes[j]]
        inverse[j] = inverse_g[genes[j]]
        theta[j] = theta_g[genes[j]]
        positive[j] = dropout_g[genes[j]]
    part, slope_part = _F(0), _F(0)
    for j in range(x.size):
        r = mu[j] * inverse[j]
        q = _F(1) / (_F(1) + r)
        log_grown, grown, share = log1p(r), mu[j] + _EPS, theta[j] * inverse[j]
        stay_zero = -positive[j] - theta[j] * log_grown
        a = exp(-abs(stay_zero))
        part += x[j] * log(grown * inverse[j] * q) + min(stay_zero, _F(0)) - log1p(a)
        of_a = _F(1) / (_F(1) + a)
        positive[j] = a * of_a if stay_zero >= _F(0) else of_a
        d_theta[j] = x[j] * inverse[j] * q + positive[j] * (log_grown - share * r * q)
        mu[j] = x[j] * mu[j] * (_F(1) / grown - inverse[j] * q) - positive[j] * share * mu[j] * q
        slope_part += mu[j]
    gammas = 0.0
    for j in range(x.size):
        g, count = genes[j], int(x[j])
        if count == x[j] and 0 <= count <= N_TABLE:
            gammas += log_gamma_xg[count, g]
            rise = digamma_xg[count, g]
        else:
            gamma, rise = _gamma_terms(x[j], theta_g[g])
            gammas += gamma
        slope_g[g] += mu[j]
        d_dropout_g[g] += weight * positive[j]
        d_theta_g[g] += weight * (d_theta[j] - rise)
    slope_sum += slope_part
    share = _F(slope_sum / total)
    for g in range(row_g.size):
        row_g[g] = weight * (share * exp_g[g] - slope_g[g])
    return -(log_likelihood + part + gammas), -weight * slope_sum
