"""Compiled loops that decode cells, see :mod:`ldvae_ext.kernels.ablation`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ldvae_ext.kernels.jit import LOOP
from ldvae_ext.kernels.vector_math import exp64


@njit(**LOOP)
def _largest64(x_g: Any) -> float:
    """The largest of some float64, found as an integer in the same order: that of floats is not vectorised."""
    top = np.int64(-0x7FFFFFFFFFFFFFFF)
    for g in range(x_g.size):
        bits = np.float64(x_g[g]).view(np.int64)
        top = max(top, np.int64(bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))))
    return np.int64(top ^ ((top >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))).view(np.float64)


@njit(**LOOP)
def weighted_rows(value_k: Any, weight_kg: Any, out_g: Any) -> None:
    """``value @ weight``, four rows at a time."""
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
def _softmax64(z_k: Any, weight_kg: Any, offset_g: Any, out_g: Any) -> float:
    """Numerators of a cell's softmax over genes, in float64; returns what they are to be divided by."""
    weighted_rows(z_k, weight_kg, out_g)
    for g in range(out_g.size):
        out_g[g] += offset_g[g]
    top = _largest64(out_g)
    total = 0.0
    for g in range(out_g.size):
        e = exp64(out_g[g] - top)
        out_g[g] = e
        total += e
    # An exponential of NaN is a number here.
    for k in range(z_k.size):
        total += 0.0 * z_k[k]
    return total


@njit(**LOOP)
def decode(
    start: int,
    stop: int,
    z_nk: Any,
    weight_kg: Any,
    offset_rg: Any,
    row_n: Any,
    library_n: Any,
    genes: Any,
    share: float,
    out_ng: Any,
) -> None:
    """Set some genes of some cells, ascending, to ``share * library * softmax``, or add that where it is a share."""
    e_g = np.empty(weight_kg.shape[1])
    for n in range(start, stop):
        factor = share * library_n[n] / _softmax64(z_nk[n], weight_kg, offset_rg[row_n[n]], e_g)
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
    bounds: Any,
    z_nk: Any,
    weight_kg: Any,
    offset_rg: Any,
    row_n: Any,
    library_n: Any,
    group_n: Any,
    out_ipg: Any,
) -> None:
    """Add ``library * softmax`` of cells to their group, for pieces of the cells; a group of -1 is none."""
    e_g = np.empty(weight_kg.shape[1])
    for i in range(start, stop):
        for n in range(bounds[i], bounds[i + 1]):
            if group_n[n] < 0:
                continue
            factor = library_n[n] / _softmax64(z_nk[n], weight_kg, offset_rg[row_n[n]], e_g)
            out_g = out_ipg[i, group_n[n]]
            for g in range(e_g.size):
                out_g[g] += factor * e_g[g]
