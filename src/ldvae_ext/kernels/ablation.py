"""Compiled loops over cells and genes: decoding, and the paired differences of an ablation. Opened on first use.

Each takes ``start`` and ``stop``, the rows that it works on, so that threads can share them (see
:func:`ldvae_ext.kernels.threads.over_rows`). Arrays are contiguous and writeable, or numba compiles them once more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from ldvae_ext.kernels.decoding import weighted_rows
from ldvae_ext.kernels.jit import LOOP, PART
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
# Numbers in a vector: what is left over at the end of a loop is done one by one, at many times the cost.
_WIDTH = 16
# Where a gene's share is less, its log-rate falls by more, or the mean of e^t is larger, float32 will not do.
_LEAST, _WIDEST, _LARGEST = _F(1e-30), _F(69.0), 1e7
# Where latents, or one of several that are replaced, move logits by more, what is left of the others is not enough.
_FAR = _F(64.0)
# Where one latent moves them by less, all is well whatever the mean of e^t.
_NEAR = _F(48.0)
# Below this mean of e^t its rounding is felt, and t is shifted.
_SMALL = 0.5
# A theta that is next to nothing beside the mean would leave nothing of 1 - a in float32.
_MOST = _F(1 - 1e-6)


@njit(**LOOP)
def _range(x_g: Any) -> Any:
    """Smallest and largest of some float32, found as integers in the same order: those of floats are not vectorised."""
    low, top = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for g in range(x_g.size):
        key = _ordered(_F(x_g[g]).view(np.int32))
        low, top = min(low, key), max(top, key)
    return np.int32(_ordered(low)).view(np.float32), np.int32(_ordered(top)).view(np.float32)


@njit(**LOOP)
def _ordered(bits: Any) -> Any:
    """Bits of a float32 as an integer in its order, and back."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit(**PART)
def _shares(latent_g: Any, base_g: Any, out_g: Any) -> None:
    """``base e^latent``, divided by its sum: rounded less than e to the power of a sum of both would be."""
    total = 0.0
    for first in range(0, out_g.size, _BLOCK):
        at = slice(first, first + _BLOCK)
        total += _products(latent_g[at], base_g[at], out_g[at])
    factor = _F(1.0 / total)
    for g in range(out_g.size):
        out_g[g] *= factor


@njit(**PART)
def _products(latent_g: Any, base_g: Any, out_g: Any) -> Any:
    """``base e^latent``; returns the sum."""
    total = _F(0)
    for g in range(out_g.size):
        e = exp(latent_g[g]) * base_g[g]
        out_g[g] = e
        total += e
    return total


@njit(**PART)
def _excess_of_one(base_g: Any, scale: Any, share_g: Any, out_g: Any) -> Any:
    """See :func:`_excess`, without stretch and shift, where no t is too large to be the exponent of a float32."""
    mean = _F(0)
    for g in range(out_g.size):
        p, power = parts_of_exp(scale * base_g[g])
        e = excess(p, power)
        out_g[g] = e
        mean += share_g[g] * e
    return mean


@njit(**PART)
def _excess_of_two(base_g: Any, scale: Any, latent_g: Any, stretch: Any, shift: Any, share_g: Any, out_g: Any) -> Any:
    """See :func:`_excess`."""
    mean = _F(0)
    for g in range(out_g.size):
        e = expm1(scale * base_g[g] + (stretch * latent_g[g] - shift))
        out_g[g] = e
        mean += share_g[g] * e
    return mean


# Genes are cut into blocks by slices, since numba asks of an index that does not begin at 0 whether it is negative.


@njit(**LOOP)
def _excess(
    base_g: Any, scale: Any, is_small: bool, latent_g: Any, stretch: Any, shift: Any, share_g: Any, out_g: Any
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
def _gathered(at_i: Any, base_g: Any, scale: Any, latent_g: Any, stretch: Any, shift: Any, out_i: Any) -> None:
    """The t of :func:`_excess` at some genes, clamped to where their exponential is a normal number."""
    if stretch == 0:
        for i in range(at_i.size):
            out_i[i] = min(max(scale * base_g[at_i[i]] - shift, LOWEST), HIGHEST)
    else:
        for i in range(at_i.size):
            out_i[i] = min(max(scale * base_g[at_i[i]] + (stretch * latent_g[at_i[i]] - shift), LOWEST), HIGHEST)


@njit(**PART)
def _sum_of_some(e_g: Any, mean: Any, factor: Any, a_g: Any, theta_g: Any) -> Any:
    """See :func:`_sum_of_all`."""
    total, less = _F(0), mean * factor
    for g in range(e_g.size):
        total += theta_g[g] * log1p((e_g[g] * factor - less) * a_g[g])
    return total


@njit(**PART)
def _sum_of_all(e_g: Any, mean: Any, factor: Any, a_g: Any, theta_g: Any) -> float:
    """``sum_g theta log1p(r a)``, with ``r = (e - mean) factor``."""
    total = 0.0
    for first in range(0, e_g.size, _BLOCK):
        at = slice(first, first + _BLOCK)
        total += _sum_of_some(e_g[at], mean, factor, a_g[at], theta_g[at])
    return total


@njit(**PART)
def _sum_of_counts(t_i: Any, mean: Any, factor: Any, x_i: Any, part_i: Any, rest_i: Any, eps_i: Any) -> Any:
    """What counts above 0 add: ``sum x log y``, with y as of :func:`_of_counts` and t as of :func:`_excess`."""
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
def _of_genes(library: Any, share_g: Any, theta_g: Any, out_g: Any) -> None:
    """``a = mu / (mu + theta + eps)``: what of the change of a rate goes through the dispersion."""
    for g in range(share_g.size):
        mu = library * share_g[g]
        out_g[g] = min(mu / (mu + theta_g[g] + _EPS), _MOST)


@njit(**PART)
def _of_counts(at_i: Any, library: Any, share_g: Any, theta_g: Any, part_i: Any, rest_i: Any, eps_i: Any) -> None:
    """What :func:`_sum_of_counts` asks of the rates of some genes.

    If a rate becomes ``mu ratio``, then ``(mu + eps) / (mu + theta + eps)`` is divided by
    ``y = (rest + eps / mu + part ratio) / (ratio + eps / mu)``, ``part = (mu + eps) / (mu + theta + eps)``, ``rest = 1 - part``;
    so ``y - 1 = rest (1 - ratio) / (ratio + eps / mu)``, which keeps its digits where little changes.
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
    z_nk: Any,
    weight_kg: Any,
    reach_k: Any,
    base_rg: Any,
    row_n: Any,
    library_n: Any,
    theta_rg: Any,
    theta_row_n: Any,
    indptr: Any,
    indices: Any,
    counts: Any,
    delta_nk: Any,
    scale_ns: Any,
    stretch_ns: Any,
    step_ptr: Any,
    step_k: Any,
    step_sign: Any,
    is_fresh_s: Any,
    n_real: int,
    is_nb: bool,
    out_ns: Any,
) -> None:
    """Change of the negative log-likelihood of each cell when sets of latents are replaced; NaN where float32 will not do.

    The logits of set s move by ``scale_ns sum_k delta_nk weight_kg + stretch_ns z weight``. A set is made of the one before it
    (or of nothing, if it is fresh) by steps, each of which adds a latent or takes it away. ``reach`` is the largest weight
    of each latent, ``base`` the numerators of the softmax at z = 0. Genes beyond the real ones fill up the last
    vector: nothing is expected of them, and their base and theta are 0.
    """
    n_genes = weight_kg.shape[1]
    # Values one by one: an assignment to a slice compiles its error messages, too.
    # Arrays one by one: of the rows of one array LLVM does not see that they are apart, and vectorises nothing.
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
        # Zeros of the first gene are added up to whole vectors.
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
            _of_counts(at_i, library, share_g, theta_g, part_i[:n_counts], rest_i[:n_counts], eps_i[:n_counts])
            _of_genes(library, share_g, theta_g, a_g)
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
            if not (np.isfinite(scale) and 1e-3 <= 1 + mean <= _LARGEST):
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
