"""Compiled Newton's method in float64 for the posterior modes of cells, under a softmax and a normal prior."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ldvae_ext.kernels.decoding import softmax64
from ldvae_ext.kernels.jit import LOOP, Float64Array, IntegerArray
from ldvae_ext.kernels.vector_math import log64

CONVERGED, STOPPED, INDEFINITE = 1, 0, -1
"""States of a cell: converged, out of iterations, or at a point where the Hessian is not negative definite."""
# scvi-tools' eps in the logarithms of its negative binomial.
_EPS = 1e-8
_HALVINGS = 30
# Near the mode, after a step as small as that, the exact Hessian takes the place of one that is surely positive definite; a
# tenth of that after each time that the exact one is not.
_NEAR = 0.1
# Points near a mode with a Hessian that is not negative definite, after which the search is left to numpy.
_TRIES = 3
# Genes whose loadings stay in the cache while all pairs of latents are summed.
_BLOCK = 256


@njit(**LOOP)
def _value(
    z_k: Float64Array,
    weight_kg: Float64Array,
    offset_g: Float64Array,
    at: IntegerArray,
    x: Float64Array,
    library: float,
    theta_g: Float64Array,
    is_poisson: bool,
    mu_g: Float64Array,
) -> float:
    """Log-likelihood up to terms of counts and dispersions alone; the means are written to ``mu_g``."""
    factor = library / softmax64(z_k, weight_kg, offset_g, mu_g)
    value = 0.0
    if is_poisson:
        for g in range(mu_g.size):
            mu_g[g] *= factor
            value -= mu_g[g]
        for i in range(at.size):
            value += x[i] * math.log(mu_g[at[i]])
        return value
    for g in range(mu_g.size):
        mu_g[g] *= factor
        value -= theta_g[g] * log64(theta_g[g] + mu_g[g] + _EPS)
    for i in range(at.size):
        mu = mu_g[at[i]]
        value += x[i] * math.log((mu + _EPS) / (theta_g[at[i]] + mu + _EPS))
    return value


@njit(**LOOP)
def _slopes(
    at: IntegerArray,
    x: Float64Array,
    library: float,
    theta_g: Float64Array,
    is_poisson: bool,
    mu_g: Float64Array,
    first_g: Float64Array,
    second_g: Float64Array,
    is_clamped: int,
) -> float:
    """Write first derivatives in the log-mean, and weights of the negative Hessian; return the sum of the first.

    Clamped weights are not negative, so that the matrix is positive definite.
    """
    total = 0.0
    for g in range(mu_g.size):
        if is_poisson:
            first_g[g] = -mu_g[g]
            second_g[g] = mu_g[g]
        else:
            share = mu_g[g] / (theta_g[g] + mu_g[g] + _EPS)
            first_g[g] = -theta_g[g] * share
            second_g[g] = first_g[g] * (share - 1.0)
        total += first_g[g]
    for i in range(at.size):
        g, rest, share = at[i], 0.0, 0.0
        if not is_poisson:
            rest, share = _EPS / (mu_g[g] + _EPS), mu_g[g] / (theta_g[g] + mu_g[g] + _EPS)
        first_g[g] += x[i] * (1.0 - rest - share)
        second_g[g] += x[i] * (share * (1.0 - share) - rest * (1.0 - rest))
        total += x[i] * (1.0 - rest - share)
    for g in range(mu_g.size):
        second_g[g] += total / library * mu_g[g]
    if is_clamped:
        for g in range(mu_g.size):
            second_g[g] = max(second_g[g], 0.0)
    return total


@njit(**LOOP)
def _dot(a_g: Float64Array, b_g: Float64Array) -> float:
    total = 0.0
    for g in range(a_g.size):
        total += a_g[g] * b_g[g]
    return total


@njit(**LOOP)
def _add_two_rows(
    i: int, p_g: Float64Array, q_g: Float64Array, weight_kg: Float64Array, start: int, out_kk: Float64Array
) -> None:
    """Add products of two vectors with the loadings from latent i on to rows i and i + 1.

    Eight sums at a time: with fewer, each addition would wait for the one before.
    """
    n_latent, n = weight_kg.shape[0], p_g.size
    stop, j = start + n, i
    while j + 4 <= n_latent:
        w_a, w_b = weight_kg[j, start:stop], weight_kg[j + 1, start:stop]
        w_c, w_d = weight_kg[j + 2, start:stop], weight_kg[j + 3, start:stop]
        p_a, p_b, p_c, p_d, q_a, q_b, q_c, q_d = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for g in range(n):
            p, q = p_g[g], q_g[g]
            p_a += p * w_a[g]
            p_b += p * w_b[g]
            p_c += p * w_c[g]
            p_d += p * w_d[g]
            q_a += q * w_a[g]
            q_b += q * w_b[g]
            q_c += q * w_c[g]
            q_d += q * w_d[g]
        out_kk[i, j] += p_a
        out_kk[i, j + 1] += p_b
        out_kk[i, j + 2] += p_c
        out_kk[i, j + 3] += p_d
        out_kk[i + 1, j] += q_a
        out_kk[i + 1, j + 1] += q_b
        out_kk[i + 1, j + 2] += q_c
        out_kk[i + 1, j + 3] += q_d
        j += 4
    while j < n_latent:
        w_a, p_a, q_a = weight_kg[j, start:stop], 0.0, 0.0
        for g in range(n):
            p_a += p_g[g] * w_a[g]
            q_a += q_g[g] * w_a[g]
        out_kk[i, j] += p_a
        out_kk[i + 1, j] += q_a
        j += 1


@njit(**LOOP)
def _add_products(
    start: int,
    stop: int,
    weight_kg: Float64Array,
    mu_g: Float64Array,
    first_g: Float64Array,
    second_g: Float64Array,
    part_2g: Float64Array,
    sum_3k: Float64Array,
    out_kk: Float64Array,
) -> None:
    """Add loadings times means, first and second derivatives, and squares of loadings, over some of the genes."""
    n_latent, n = weight_kg.shape[0], stop - start
    mu_g, first_g, second_g = mu_g[start:stop], first_g[start:stop], second_g[start:stop]
    p_g, q_g = part_2g[0, :n], part_2g[1, :n]
    for i in range(0, n_latent, 2):
        # The last of an odd number of latents is its own neighbour.
        other = min(i + 1, n_latent - 1)
        w_g, v_g = weight_kg[i, start:stop], weight_kg[other, start:stop]
        w_mean, w_first, w_second, v_mean, v_first, v_second = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for g in range(n):
            mu, first, p, q = mu_g[g], first_g[g], second_g[g] * w_g[g], second_g[g] * v_g[g]
            p_g[g] = p
            q_g[g] = q
            w_mean += mu * w_g[g]
            v_mean += mu * v_g[g]
            w_first += first * w_g[g]
            v_first += first * v_g[g]
            w_second += p
            v_second += q
        sum_3k[0, i] += w_mean
        sum_3k[1, i] += w_first
        sum_3k[2, i] += w_second
        if other > i:
            sum_3k[0, other] += v_mean
            sum_3k[1, other] += v_first
            sum_3k[2, other] += v_second
            _add_two_rows(i, p_g, q_g, weight_kg, start, out_kk)
        else:
            for g in range(n):
                out_kk[i, i] += p_g[g] * w_g[g]


@njit(**LOOP)
def _gradient_and_hessian(
    weight_kg: Float64Array,
    library: float,
    mu_g: Float64Array,
    first_g: Float64Array,
    second_g: Float64Array,
    total: float,
    gradient_k: Float64Array,
    hessian_kk: Float64Array,
) -> None:
    """Write gradient and negative Hessian of the log-likelihood: sums over genes of loadings less their mean."""
    n_latent, n_genes = weight_kg.shape
    sum_3k, part_2g, total_second = np.zeros((3, n_latent)), np.empty((2, _BLOCK)), 0.0
    hessian_kk[:] = 0.0
    for start in range(0, n_genes, _BLOCK):
        stop = min(start + _BLOCK, n_genes)
        _add_products(start, stop, weight_kg, mu_g, first_g, second_g, part_2g, sum_3k, hessian_kk)
    for g in range(n_genes):
        total_second += second_g[g]
    mean_k, of_second_k = sum_3k[0], sum_3k[2]
    for k in range(n_latent):
        mean_k[k] /= library
        gradient_k[k] = sum_3k[1, k] - total * mean_k[k]
    for i in range(n_latent):
        for j in range(i, n_latent):
            shift = of_second_k[i] * mean_k[j] + mean_k[i] * of_second_k[j] - total_second * mean_k[i] * mean_k[j]
            hessian_kk[i, j] -= shift
            hessian_kk[j, i] = hessian_kk[i, j]


@njit(**LOOP)
def _solve(hessian_kk: Float64Array, gradient_k: Float64Array, root_kk: Float64Array, step_k: Float64Array) -> bool:
    """Write the Newton step by a Cholesky decomposition; return False if the matrix is not positive definite."""
    n = gradient_k.size
    for i in range(n):
        for j in range(i + 1):
            rest = hessian_kk[i, j]
            for k in range(j):
                rest -= root_kk[i, k] * root_kk[j, k]
            if i > j:
                root_kk[i, j] = rest / root_kk[j, j]
            elif rest > 0:
                root_kk[i, i] = math.sqrt(rest)
            else:
                return False
    for i in range(n):
        rest = gradient_k[i]
        for k in range(i):
            rest -= root_kk[i, k] * step_k[k]
        step_k[i] = rest / root_kk[i, i]
    for i in range(n - 1, -1, -1):
        rest = step_k[i]
        for k in range(i + 1, n):
            rest -= root_kk[k, i] * step_k[k]
        step_k[i] = rest / root_kk[i, i]
    return True


@njit(**LOOP)
def _prior(z_k: Float64Array, precision_kk: Float64Array, pulled_k: Float64Array) -> float:
    """Log prior density up to a constant; the negative of its gradient is written to ``pulled_k``."""
    value = 0.0
    for i in range(z_k.size):
        pulled_k[i] = _dot(precision_kk[i], z_k)
        value -= 0.5 * z_k[i] * pulled_k[i]
    return value


@njit(**LOOP)
def modes(
    start: int,
    stop: int,
    z_nk: Float64Array,
    weight_kg: Float64Array,
    offset_rg: Float64Array,
    offset_n: IntegerArray,
    indptr: IntegerArray,
    at: IntegerArray,
    x: Float64Array,
    library_n: Float64Array,
    theta_rg: Float64Array,
    theta_n: IntegerArray,
    is_poisson: bool,
    precision_kk: Float64Array,
    max_iterations: int,
    tolerance: float,
    value_n: Float64Array,
    hessian_nkk: Float64Array,
    state_n: IntegerArray,
) -> None:
    """Find the posterior mode of each cell by Newton's method with a line search.

    Far from the mode, weights of genes in the negative Hessian that are negative are taken as 0.

    Parameters
    ----------
    start, stop
        First cell of this thread, and the end of its cells, integers.
    z_nk
        Where the search starts, (cells, latents), float64; replaced by the modes.
    weight_kg
        Loadings, (latents, genes), float64.
    offset_rg, offset_n
        Offsets of the logits, (rows, genes), float64, and the row of each cell, (cells,), integers.
    indptr, at, x
        Counts that are not zero in CSR form: (cells + 1,), integers; genes, integers, and values, float64, (counts,).
    library_n
        Library sizes, (cells,), float64.
    theta_rg, theta_n
        Inverse dispersions, (rows, genes), float64, and the row of each cell, (cells,), integers. Not used for Poisson counts.
    is_poisson
        True for Poisson counts, False for the negative binomial with scvi-tools' eps.
    precision_kk
        Inverse of the prior covariance, (latents, latents), float64.
    max_iterations
        Number of Newton steps, integer.
    tolerance
        A cell has converged if its next step is not larger; the step is taken.
    value_n
        Output, log-likelihood and log prior up to constants, (cells,), float64.
    hessian_nkk
        Output, negative Hessian of their sum, (cells, latents, latents), float64.
    state_n
        Output, :data:`CONVERGED`, :data:`STOPPED` or :data:`INDEFINITE`, (cells,), integers.
    """
    n_latent, n_genes = weight_kg.shape
    mu_g, first_g, second_g = np.empty(n_genes), np.empty(n_genes), np.empty(n_genes)
    gradient_k, pulled_k, step_k, trial_k = (
        np.empty(n_latent),
        np.empty(n_latent),
        np.empty(n_latent),
        np.empty(n_latent),
    )
    root_kk = np.empty((n_latent, n_latent))
    for n in range(start, stop):
        z_k, hessian_kk, offset_g, theta_g = z_nk[n], hessian_nkk[n], offset_rg[offset_n[n]], theta_rg[theta_n[n]]
        some, x_i, library = at[indptr[n] : indptr[n + 1]], x[indptr[n] : indptr[n + 1]], library_n[n]
        value = _value(z_k, weight_kg, offset_g, some, x_i, library, theta_g, is_poisson, mu_g)
        value += _prior(z_k, precision_kk, pulled_k)
        state_n[n], is_near, n_failed, near = STOPPED, False, 0, _NEAR
        for _ in range(max_iterations):
            total = _slopes(some, x_i, library, theta_g, is_poisson, mu_g, first_g, second_g, 0 if is_near else 1)
            _gradient_and_hessian(weight_kg, library, mu_g, first_g, second_g, total, gradient_k, hessian_kk)
            for i in range(n_latent):
                gradient_k[i] -= pulled_k[i]
                for j in range(n_latent):
                    hessian_kk[i, j] += precision_kk[i, j]
            if not _solve(hessian_kk, gradient_k, root_kk, step_k):
                is_near, n_failed, near = False, n_failed + 1, 0.1 * near
                if n_failed == _TRIES:
                    state_n[n] = INDEFINITE
                    break
                continue
            largest = 0.0
            for i in range(n_latent):
                largest = max(largest, abs(step_k[i]))
            if largest <= tolerance and is_near:
                for i in range(n_latent):
                    z_k[i] += step_k[i]
                state_n[n] = CONVERGED
                break
            slope, size = _dot(gradient_k, step_k), 1.0
            for _ in range(_HALVINGS):
                for i in range(n_latent):
                    trial_k[i] = z_k[i] + size * step_k[i]
                found = _value(trial_k, weight_kg, offset_g, some, x_i, library, theta_g, is_poisson, mu_g)
                found += _prior(trial_k, precision_kk, pulled_k)
                # Rounding of a sum of many terms can hide the gain of the last steps.
                if found >= value - 1e-12 * abs(value):
                    break
                # The maximum of the parabola through both values, within bounds that also hold for values that are not finite.
                best = 0.5 * slope * size / (slope * size + value - found)
                size *= best if 0.1 < best < 0.5 else (0.5 if best >= 0.5 else 0.1)
            else:
                break
            value, is_near = found, largest <= near
            for i in range(n_latent):
                z_k[i] = trial_k[i]
        if state_n[n] == STOPPED:
            # The exact Hessian at the last point, whose means a rejected trial may have replaced.
            _value(z_k, weight_kg, offset_g, some, x_i, library, theta_g, is_poisson, mu_g)
            total = _slopes(some, x_i, library, theta_g, is_poisson, mu_g, first_g, second_g, 0)
            _gradient_and_hessian(weight_kg, library, mu_g, first_g, second_g, total, gradient_k, hessian_kk)
            for i in range(n_latent):
                for j in range(n_latent):
                    hessian_kk[i, j] += precision_kk[i, j]
        value_n[n] = value
