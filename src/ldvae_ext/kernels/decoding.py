"""Compiled loops in float64 that decode cells, see :mod:`ldvae_ext.kernels.ablation`."""

from __future__ import annotations

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP, Float32Array, Float64Array, IntegerArray
from ldvae_ext.kernels.vector_math import exp64

FloatArray = Float32Array | Float64Array


@njit(**LOOP)
def _largest64(x_g: Float64Array) -> float:
    """Largest value, by comparing integers in the same order, since a maximum of floats is not vectorised."""
    top = np.int64(-0x7FFFFFFFFFFFFFFF)
    for g in range(x_g.size):
        bits = np.float64(x_g[g]).view(np.int64)
        top = max(top, np.int64(bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))))
    return np.int64(top ^ ((top >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))).view(np.float64)


@njit(**LOOP)
def weighted_rows(value_k: FloatArray, weight_kg: FloatArray, out_g: FloatArray) -> None:
    """``value @ weight``, four rows at a time.

    Parameters
    ----------
    value_k
        Weights of the rows, (latents,), float64 or float32.
    weight_kg
        Rows, (latents, genes), of the same dtype.
    out_g
        Output, (genes,), of the same dtype.
    """
    n_latent, n_genes = weight_kg.shape
    for g in range(n_genes):
        out_g[g] = 0
    whole = n_latent - n_latent % 4
    for k in range(0, whole, 4):
        a, b, c, d = value_k[k], value_k[k + 1], value_k[k + 2], value_k[k + 3]
        w_a, w_b, w_c, w_d = weight_kg[k], weight_kg[k + 1], weight_kg[k + 2], weight_kg[k + 3]
        for g in range(n_genes):
            out_g[g] += (a * w_a[g] + b * w_b[g]) + (c * w_c[g] + d * w_d[g])
    for k in range(whole, n_latent):
        a, w_a = value_k[k], weight_kg[k]
        for g in range(n_genes):
            out_g[g] += a * w_a[g]


@njit(**LOOP)
def softmax64(z_k: Float64Array, weight_kg: Float64Array, offset_g: Float64Array, out_g: Float64Array) -> float:
    """Write the numerators of the softmax of a cell over genes; return its denominator.

    Parameters
    ----------
    z_k
        Latents, (latents,), float64.
    weight_kg
        Loadings, (latents, genes), float64.
    offset_g
        Offsets of the logits, (genes,), float64.
    out_g
        Output, (genes,), float64.
    """
    weighted_rows(z_k, weight_kg, out_g)
    for g in range(out_g.size):
        out_g[g] += offset_g[g]
    top = _largest64(out_g)
    total = 0.0
    for g in range(out_g.size):
        e = exp64(out_g[g] - top)
        out_g[g] = e
        total += e
    # exp64 of NaN is a number; NaN latents must give NaN.
    for k in range(z_k.size):
        total += 0.0 * z_k[k]
    return total


@njit(**LOOP)
def decode(
    start: int,
    stop: int,
    z_nk: Float64Array,
    weight_kg: Float64Array,
    offset_rg: Float64Array,
    row_n: IntegerArray,
    library_n: Float64Array,
    genes: IntegerArray,
    share: float,
    out_ng: Float64Array,
) -> None:
    """Write ``share * library * softmax`` of some genes and cells; add it if ``share`` is less than 1.

    Parameters
    ----------
    start, stop
        First cell of this thread, and the end of its cells, integers.
    z_nk
        Latents, (cells, latents), float64.
    weight_kg
        Loadings, (latents, genes), float64.
    offset_rg, row_n
        Offsets of the logits, (rows, genes), float64, and the row of each cell, (cells,), integers.
    library_n
        Library sizes, (cells,), float64.
    genes
        Genes to write, (selected genes,), ascending integers.
    share
        Factor of the result.
    out_ng
        Output, (cells, selected genes), float64.
    """
    e_g = np.empty(weight_kg.shape[1])
    for n in range(start, stop):
        factor = share * library_n[n] / softmax64(z_nk[n], weight_kg, offset_rg[row_n[n]], e_g)
        out_g = out_ng[n]
        if share < 1:
            for j in range(genes.size):
                out_g[j] += factor * e_g[genes[j]]
        elif genes.size < e_g.size:
            for j in range(genes.size):
                out_g[j] = factor * e_g[genes[j]]
        else:
            for g in range(e_g.size):
                out_g[g] = factor * e_g[g]


@njit(**LOOP)
def decode_groups(
    start: int,
    stop: int,
    bounds: IntegerArray,
    z_nk: Float64Array,
    weight_kg: Float64Array,
    offset_rg: Float64Array,
    row_n: IntegerArray,
    library_n: Float64Array,
    group_n: IntegerArray,
    out_ipg: Float64Array,
) -> None:
    """Add ``library * softmax`` of each cell to its group, piece by piece; cells of group -1 are left out.

    Parameters
    ----------
    start, stop
        First piece of this thread, and the end of its pieces, integers.
    bounds
        Cells of piece i are those from ``bounds[i]`` to ``bounds[i + 1]``, (pieces + 1,), integers.
    z_nk
        Latents, (cells, latents), float64.
    weight_kg
        Loadings, (latents, genes), float64.
    offset_rg, row_n
        Offsets of the logits, (rows, genes), float64, and the row of each cell, (cells,), integers.
    library_n
        Library sizes, (cells,), float64.
    group_n
        Group of each cell, (cells,), integers; -1 for none.
    out_ipg
        Sums, (pieces, groups, genes), float64; added to.
    """
    e_g = np.empty(weight_kg.shape[1])
    for i in range(start, stop):
        for n in range(bounds[i], bounds[i + 1]):
            if group_n[n] < 0:
                continue
            factor = library_n[n] / softmax64(z_nk[n], weight_kg, offset_rg[row_n[n]], e_g)
            out_g = out_ipg[i, group_n[n]]
            for g in range(e_g.size):
                out_g[g] += factor * e_g[g]
