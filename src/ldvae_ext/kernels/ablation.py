"""Compiled loop over cells and genes: paired differences of log-likelihood in an ablation.

The loop takes ``start`` and ``stop`` first, so that threads can divide the cells, see
:func:`ldvae_ext.kernels.threads.over_rows`. Arrays are contiguous and writeable; numba compiles others once more.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ldvae_ext.kernels.decoding import weighted_rows
from ldvae_ext.kernels.jit import LOOP, PART, BooleanArray, Float32Array, Float64Array, IntegerArray
from ldvae_ext.kernels.vector_math import (
    HIGHEST,
    LOWEST,
    excess,
    exp,
    expm1,
    log1p,
    log_of_ratio,
    parts_of_exp,
)

_F = np.float32
_EPS = _F(1e-8)
# Genes whose terms are summed in float32 before they are added to a float64.
_BLOCK = 2048
# Numbers in a vector. Loops end with single numbers if their length is no multiple of it, at many times the cost.
_WIDTH = 16
# Bounds of float32: smallest share of a gene, largest fall of its log-rate, and largest mean of e^t.
_LEAST, _WIDEST, _LARGEST = _F(1e-30), _F(69.0), 1e7
# Largest move of a logit by all latents, or by one of several that are replaced, for which float32 is enough.
_FAR = _F(64.0)
# Largest move of a logit by a single latent for which float32 is enough with any mean of e^t.
_NEAR = _F(48.0)
# For a smaller mean of e^t rounding matters, and t is shifted. If the mean stays smaller, float32 is not enough.
_SMALL = 0.5
# Keeps 1 - a above 0 in float32, also for theta much smaller than the mean.
_MOST = _F(1 - 1e-6)


@njit(**LOOP)
def _range(x_g: Float32Array) -> tuple[np.float32, np.float32]:
    """Smallest and largest value, by comparing integers in the same order, since a maximum of floats is not vectorised."""
    low, top = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for g in range(x_g.size):
        key = _ordered(_F(x_g[g]).view(np.int32))
        low, top = min(low, key), max(top, key)
    return np.int32(_ordered(low)).view(np.float32), np.int32(_ordered(top)).view(np.float32)


@njit(**LOOP)
def _ordered(bits: np.int32) -> np.int32:
    """Bits of a float32 as an integer that sorts in the same order; its own inverse."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit(**PART)
def _shares(latent_g: Float32Array, base_g: Float32Array, out_g: Float32Array) -> None:
    """``base e^latent``, divided by its sum. Its rounding error is smaller than that of ``e^(log base + latent)``."""
    total = 0.0
    for first in range(0, out_g.size, _BLOCK):
        at = slice(first, first + _BLOCK)
        total += _products(latent_g[at], base_g[at], out_g[at])
    factor = _F(1.0 / total)
    for g in range(out_g.size):
        out_g[g] *= factor


@njit(**PART)
def _products(latent_g: Float32Array, base_g: Float32Array, out_g: Float32Array) -> np.float32:
    """``base e^latent``; returns the sum."""
    total = _F(0)
    for g in range(out_g.size):
        e = exp(latent_g[g]) * base_g[g]
        out_g[g] = e
        total += e
    return total


@njit(**PART)
def _excess_of_one(base_g: Float32Array, scale: np.float32, share_g: Float32Array, out_g: Float32Array) -> np.float32:
    """See :func:`_excess`, without stretch and shift, for t of at most ``_NEAR``."""
    mean = _F(0)
    for g in range(out_g.size):
        p, power = parts_of_exp(scale * base_g[g])
        e = excess(p, power)
        out_g[g] = e
        mean += share_g[g] * e
    return mean


@njit(**PART)
def _excess_of_two(
    base_g: Float32Array,
    scale: np.float32,
    latent_g: Float32Array,
    stretch: np.float32,
    shift: np.float32,
    share_g: Float32Array,
    out_g: Float32Array,
) -> np.float32:
    """See :func:`_excess`."""
    mean = _F(0)
    for g in range(out_g.size):
        e = expm1(scale * base_g[g] + (stretch * latent_g[g] - shift))
        out_g[g] = e
        mean += share_g[g] * e
    return mean


# Blocks of genes are slices, since numba checks the sign of an index that does not begin at 0.


@njit(**LOOP)
def _excess(
    base_g: Float32Array,
    scale: np.float32,
    is_small: bool,
    latent_g: Float32Array,
    stretch: np.float32,
    shift: np.float32,
    share_g: Float32Array,
    out_g: Float32Array,
) -> float:
    """``e^t - 1`` of each gene, with ``t = scale base + stretch latent - shift``; returns its mean over the shares."""
    mean = 0.0
    for first in range(0, out_g.size, _BLOCK):
        at = slice(first, first + _BLOCK)
        if is_small and stretch == 0 and shift == 0:
            mean += _excess_of_one(base_g[at], scale, share_g[at], out_g[at])
        else:
            mean += _excess_of_two(base_g[at], scale, latent_g[at], stretch, shift, share_g[at], out_g[at])
    return mean


@njit(**PART)
def _gathered(
    at_i: IntegerArray,
    base_g: Float32Array,
    scale: np.float32,
    latent_g: Float32Array,
    stretch: np.float32,
    shift: np.float32,
    out_i: Float32Array,
) -> None:
    """The t of :func:`_excess` at some genes, clamped so that the exponential is a normal number."""
    if stretch == 0:
        for i in range(at_i.size):
            out_i[i] = min(max(scale * base_g[at_i[i]] - shift, LOWEST), HIGHEST)
    else:
        for i in range(at_i.size):
            out_i[i] = min(max(scale * base_g[at_i[i]] + (stretch * latent_g[at_i[i]] - shift), LOWEST), HIGHEST)


@njit(**PART)
def _sum_of_some(
    e_g: Float32Array, mean: np.float32, factor: np.float32, a_g: Float32Array, theta_g: Float32Array
) -> np.float32:
    """See :func:`_sum_of_all`."""
    total, less = _F(0), mean * factor
    for g in range(e_g.size):
        total += theta_g[g] * log1p((e_g[g] * factor - less) * a_g[g])
    return total


@njit(**PART)
def _sum_of_all(
    e_g: Float32Array, mean: np.float32, factor: np.float32, a_g: Float32Array, theta_g: Float32Array
) -> float:
    """``sum_g theta log1p(r a)``, with ``r = (e - mean) factor``."""
    total = 0.0
    for first in range(0, e_g.size, _BLOCK):
        at = slice(first, first + _BLOCK)
        total += _sum_of_some(e_g[at], mean, factor, a_g[at], theta_g[at])
    return total


@njit(**PART)
def _sum_of_counts(
    t_i: Float32Array,
    mean: np.float32,
    factor: np.float32,
    x_i: Float32Array,
    part_i: Float32Array,
    rest_i: Float32Array,
    eps_i: Float32Array,
) -> np.float32:
    """Contribution of positive counts, ``sum x log y``, with y of :func:`_count_terms` and t of :func:`_excess`."""
    total = _F(0)
    for i in range(t_i.size):
        p, power = parts_of_exp(t_i[i])
        ratio = (p * power + power) * factor
        move = (excess(p, power) - mean) * factor
        inverse = _F(1) / (ratio + eps_i[i])
        total += x_i[i] * log_of_ratio(
            -rest_i[i] * move * inverse, (rest_i[i] + eps_i[i] + part_i[i] * ratio) * inverse
        )
    return total


@njit(**PART)
def _gene_terms(library: np.float32, share_g: Float32Array, theta_g: Float32Array, out_g: Float32Array) -> None:
    """``a = mu / (mu + theta + eps)``: factor of the relative change of a rate in the dispersion term."""
    for g in range(share_g.size):
        mu = library * share_g[g]
        out_g[g] = min(mu / (mu + theta_g[g] + _EPS), _MOST)


@njit(**PART)
def _count_terms(
    at_i: IntegerArray,
    library: np.float32,
    share_g: Float32Array,
    theta_g: Float32Array,
    part_i: Float32Array,
    rest_i: Float32Array,
    eps_i: Float32Array,
) -> None:
    """Terms of :func:`_sum_of_counts` that depend on the rates of some genes.

    If a rate becomes ``mu ratio``, then ``(mu + eps) / (mu + theta + eps)`` is divided by
    ``y = (rest + eps / mu + part ratio) / (ratio + eps / mu)``, ``part = (mu + eps) / (mu + theta + eps)``, ``rest = 1 - part``;
    ``y - 1 = rest (1 - ratio) / (ratio + eps / mu)`` is then accurate for small changes, too.
    """
    for i in range(at_i.size):
        mu, theta = library * share_g[at_i[i]], theta_g[at_i[i]]
        inverse = _F(1) / (mu + theta + _EPS)
        part_i[i] = (mu + _EPS) * inverse
        rest_i[i] = theta * inverse
        eps_i[i] = _EPS / mu


@njit(**LOOP)
def ablate(
    start: int,
    stop: int,
    z_nk: Float32Array,
    weight_kg: Float32Array,
    reach_k: Float32Array,
    base_rg: Float32Array,
    row_n: IntegerArray,
    library_n: Float64Array,
    theta_rg: Float32Array,
    theta_row_n: IntegerArray,
    indptr: IntegerArray,
    indices: IntegerArray,
    counts: Float32Array,
    delta_nk: Float32Array,
    scale_ns: Float32Array,
    stretch_ns: Float32Array,
    step_ptr: IntegerArray,
    step_k: IntegerArray,
    step_sign: Float32Array,
    is_fresh_s: BooleanArray,
    n_real: int,
    is_nb: bool,
    out_ns: Float64Array,
) -> None:
    """Change of the negative log-likelihood of each cell when sets of latents are replaced; NaN if float32 is not enough.

    The logits move by ``scale_ns sum_k delta_nk weight_kg + stretch_ns z weight``, with k in set s. A set is made from the
    set before it, or from the empty set, by steps that add or remove one latent each. Genes after the first ``n_real`` are
    padding to whole vectors; their base and theta are 0.

    Parameters
    ----------
    start, stop
        First cell of this thread, and the end of its cells, integers.
    z_nk
        Latents, (cells, latents), float32.
    weight_kg, reach_k
        Loadings, (latents, genes), and the largest absolute loading of each latent, (latents,); float32.
    base_rg, row_n
        Numerators of the softmax at z = 0, (rows, genes), float32, and the row of each cell, (cells,), integers.
    library_n
        Library sizes, (cells,), float64.
    theta_rg, theta_row_n
        Inverse dispersions, (rows, genes), float32, and the row of each cell, (cells,), integers.
    indptr, indices, counts
        Counts as CSR arrays, (cells + 1,), (stored counts,) and (stored counts,); integers, integers, float32.
    delta_nk
        Change of each latent if it is replaced, (cells, latents), float32.
    scale_ns, stretch_ns
        Factors of the change and of the other latents, (cells, sets), float32; a scale of NaN gives NaN.
    step_ptr, step_k, step_sign
        Steps of set s are those from ``step_ptr[s]`` to ``step_ptr[s + 1]``, (sets + 1,), integers; each adds (1) or
        removes (-1) a latent, (steps,), integers and float32.
    is_fresh_s
        True if a set starts from the empty set, (sets,).
    n_real
        Number of genes without padding.
    is_nb
        True for a negative binomial, False for a Poisson.
    out_ns
        Output, in nats, (cells, sets), float64.
    """
    n_genes = weight_kg.shape[1]
    # One array for each vector: LLVM does not vectorise loops over several rows of one array, which could overlap.
    latent_g = np.empty(n_genes, np.float32)
    share_g = np.empty(n_genes, np.float32)
    a_g = np.empty(n_genes, np.float32)
    e_g = np.empty(n_genes, np.float32)
    move_g = np.empty(n_genes, np.float32)
    n_most = 1
    for n in range(start, stop):
        n_most = max(n_most, indptr[n + 1] - indptr[n])
    n_most += _WIDTH
    all_at_i = np.empty(n_most, np.uint32)
    all_x_i = np.empty(n_most, np.float32)
    t_i = np.empty(n_most, np.float32)
    part_i = np.empty(n_most, np.float32)
    rest_i = np.empty(n_most, np.float32)
    eps_i = np.empty(n_most, np.float32)
    if not is_nb:
        for i in range(n_most):
            part_i[i], rest_i[i], eps_i[i] = 0, 1, 0
    for n in range(start, stop):
        weighted_rows(z_nk[n], weight_kg, latent_g)
        low, top = _range(latent_g)
        if not (low > -_FAR and top < _FAR):
            out_ns[n] = np.nan
            continue
        theta_g, library = theta_rg[theta_row_n[n]], _F(library_n[n])
        _shares(latent_g, base_rg[row_n[n]], share_g)
        if not _range(share_g[:n_real])[0] > _LEAST:
            out_ns[n] = np.nan
            continue
        # Padded to whole vectors with counts of 0 of the first gene.
        n_given = indptr[n + 1] - indptr[n]
        n_counts = (n_given + _WIDTH - 1) // _WIDTH * _WIDTH
        at_i, x_i = all_at_i[:n_counts], all_x_i[:n_counts]
        for i in range(n_given):
            at_i[i] = indices[indptr[n] + i]
            x_i[i] = counts[indptr[n] + i]
        for i in range(n_given, n_counts):
            at_i[i] = 0
            x_i[i] = 0
        if is_nb:
            _count_terms(at_i, library, share_g, theta_g, part_i[:n_counts], rest_i[:n_counts], eps_i[:n_counts])
            _gene_terms(library, share_g, theta_g, a_g)
        is_near = True
        for s in range(is_fresh_s.size):
            first, last = step_ptr[s], step_ptr[s + 1]
            scale, stretch = scale_ns[n, s], stretch_ns[n, s]
            if is_fresh_s[s] and last == first + 1:
                base_g = weight_kg[step_k[first]]
                scale *= delta_nk[n, step_k[first]] * step_sign[first]
                is_small = abs(scale) * reach_k[step_k[first]] < _NEAR
            else:
                base_g, is_small = move_g, False
                if is_fresh_s[s]:
                    for g in range(n_genes):
                        move_g[g] = 0
                    is_near = True
                for j in range(first, last):
                    d, w_g = delta_nk[n, step_k[j]] * step_sign[j], weight_kg[step_k[j]]
                    is_near = is_near and abs(d) * reach_k[step_k[j]] < _FAR
                    for g in range(n_genes):
                        move_g[g] += d * w_g[g]
                if not is_near:
                    out_ns[n, s] = np.nan
                    continue
            if stretch == 0 and (scale == 0 or (is_fresh_s[s] and first == last)):
                out_ns[n, s] = 0
                continue
            shift = _F(0)
            mean = _excess(base_g, scale, is_small, latent_g, stretch, shift, share_g, e_g)
            if not _SMALL <= 1 + mean <= _LARGEST:
                shift = _F(math.log(max(1 + mean, 1e-30)))
                mean = _excess(base_g, scale, is_small, latent_g, stretch, shift, share_g, e_g)
            if not (np.isfinite(scale) and _SMALL <= 1 + mean <= _LARGEST):
                out_ns[n, s] = np.nan
                continue
            factor = _F(1 / (1 + mean))
            _gathered(at_i, base_g, scale, latent_g, stretch, shift, t_i[:n_counts])
            low, total = _F(0), 0.0
            if not (is_small and stretch == 0 and shift == 0):
                low = min(low, _range(t_i[:n_counts])[0])
            for j in range(0, n_counts, _BLOCK):
                at = slice(j, min(j + _BLOCK, n_counts))
                total += _sum_of_counts(t_i[at], _F(mean), factor, x_i[at], part_i[at], rest_i[at], eps_i[at])
            if is_nb:
                total += _sum_of_all(e_g, _F(mean), factor, a_g, theta_g)
            out_ns[n, s] = total if low - math.log1p(mean) > -_WIDEST else np.nan
