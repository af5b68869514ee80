"""Matching of the factors of two models, and consensus of several models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from ldvae_ext._validate import check_positive_int
from ldvae_ext.core._arrays import checked
from ldvae_ext.core.rotation import varimax

# A factor is called stable from the first, unstable below the second reproducibility on.
STABLE, UNSTABLE = 0.8, 0.6
FLAGS = ("stable", "uncertain", "unstable")


def cosines(a_gk: np.ndarray, b_gj: np.ndarray) -> np.ndarray:
    """Cosine of each column of the first with each of the second, shape (columns, columns); 0 for a column of zeros."""
    unit_gk, unit_gj = (
        np.divide(value, norm, where=norm > 0, out=np.zeros_like(value))
        for value, norm in ((value, np.linalg.norm(value, axis=0)) for value in (a_gk, b_gj))
    )
    return unit_gk.T @ unit_gj


class Match(NamedTuple):
    """Pairs of factors."""

    first: np.ndarray
    """Positions among the first, ascending."""
    second: np.ndarray
    """Positions of their partners among the second."""
    sign: np.ndarray
    """+1, or -1 where the partner points the other way."""
    cosine: np.ndarray
    """Absolute cosine of each pair."""


def match_columns(cosine_kj: np.ndarray) -> Match:
    """One-to-one pairs that make the sum of absolute cosines largest (Hungarian method).

    Parameters
    ----------
    cosine_kj
        Cosines or correlations, shape (factors, factors); with unequal numbers some stay without a partner.

    Examples
    --------
    >>> from ldvae_ext.core import match_columns
    >>> match = match_columns(np.array([[0.1, -0.9], [0.8, 0.3]]))
    >>> match.second.tolist(), match.sign.tolist()
    ([1, 0], [-1, 1])
    """
    cosine_kj = checked(cosine_kj, (None, None), "cosine_kj")
    first, second = linear_sum_assignment(-np.abs(cosine_kj))
    paired = cosine_kj[first, second]
    return Match(first, second, np.where(paired < 0, -1, 1), np.abs(paired))


def procrustes(a_gk: np.ndarray, b_gj: np.ndarray) -> tuple[np.ndarray, float]:
    """Rotation that minimises the distance of loadings to others, and the remaining distance.

    Minimises ``|A - B Q|^2`` over matrices Q with orthonormal rows or columns (Schonemann 1966, 10.1007/BF02289451), both scaled
    to unit Frobenius norm; with the singular values s of ``B'A`` the distance is ``1 - (sum s)^2``. It is 0 where the one is a
    rotation of the other (times a number), so that a low cosine of factors is one of axes, and 1 where the two span
    orthogonal subspaces.

    Parameters
    ----------
    a_gk, b_gj
        Loadings of the same genes, shape (genes, factors), centred.

    Returns
    -------
    Q, shape (factors of b, factors of a), and the distance, in [0, 1]; 1 if all loadings of one are zero.

    Examples
    --------
    >>> from ldvae_ext.core import procrustes
    >>> loadings = np.array([[1, 0], [0, 1], [-1, -1]])
    >>> exchanged = loadings[:, [1, 0]]
    >>> rotation, distance = procrustes(loadings, exchanged)
    >>> bool(np.allclose(exchanged @ rotation, loadings)), round(distance, 6)
    (True, 0.0)
    """
    a_gk = checked(a_gk, (None, None), "a_gk")
    b_gj = checked(b_gj, (len(a_gk), None), "b_gj")
    norm = np.linalg.norm(a_gk) * np.linalg.norm(b_gj)
    left, singular, right = np.linalg.svd(b_gj.T @ a_gk, full_matrices=False)
    if not norm > 0:
        return left @ right, 1.0
    return left @ right, float(np.clip(1 - (singular.sum() / norm) ** 2, 0, 1))


def consensus_loadings(loadings: Sequence[np.ndarray], n_factors: int | None = None) -> np.ndarray:
    """Loadings that several models agree on, whatever their axes: pooled singular vectors, then varimax.

    ``[L_1 | ... | L_M] / sqrt(M)`` depends on the axes of no model, since ``sum L_m L_m'`` does not. Its leading left singular
    vectors, times the singular values, span the common factors, at the scale of one model; factors of a single model shrink.

    Parameters
    ----------
    loadings
        Centred loadings of the same genes, shape (genes, factors) each.
    n_factors
        Number of factors; the median of the models' if None.

    Returns
    -------
    Shape (genes, factors). Signs are such that the longer tail of genes is positive; the order has no meaning.

    Examples
    --------
    >>> from ldvae_ext.core import consensus_loadings
    >>> loadings = np.array([[2, 0], [-2, 0], [0, 3], [0, -3]])
    >>> consensus = consensus_loadings([loadings, loadings[:, [1, 0]]])
    >>> np.abs(consensus).max(axis=1).round(6)
    array([2., 2., 3., 3.])
    """
    if not len(loadings):
        msg = "`loadings` must hold those of at least one model; got none."
        raise ValueError(msg)
    loadings = [checked(value, (len(loadings[0]), None), "loadings") for value in loadings]
    sizes = [value.shape[1] for value in loadings]
    if n_factors is None:
        n_factors = int(np.median(sizes))
    check_positive_int("n_factors", n_factors)
    if n_factors > sum(sizes):
        msg = f"`n_factors` must be at most {sum(sizes)}, the factors of all models; got {n_factors}."
        raise ValueError(msg)
    pooled = np.concatenate(loadings, axis=1) / np.sqrt(len(loadings))
    left, singular, _ = np.linalg.svd(pooled, full_matrices=False)
    common_gk = left[:, :n_factors] * singular[:n_factors]
    consensus_gk = common_gk @ varimax(common_gk)
    return consensus_gk * np.where((consensus_gk**3).sum(axis=0) < 0, -1.0, 1.0)


class Consensus(NamedTuple):
    """Consensus of several models, and their agreement."""

    loading_gk: np.ndarray
    """Consensus loadings, genes x factors."""
    spread_gk: np.ndarray
    """Standard deviation over models of the loadings of the matched factors, genes x factors."""
    cosine_mk: np.ndarray
    """Absolute cosine of each model's matched factor with the consensus of the other models (of other kinds)."""
    partner_mk: np.ndarray
    """Position in each model of the factor that is matched; -1 if none is."""
    sign_mk: np.ndarray
    """+1, or -1 where it points the other way."""

    @property
    def reproducibility_k(self) -> np.ndarray:
        """Mean of ``cosine_mk`` over models, in [0, 1]."""
        return self.cosine_mk.mean(axis=0)

    def arranged(self, order: np.ndarray) -> Consensus:
        """The factors in another order."""
        return Consensus(*(value[:, order] for value in self))


def consensus_of(loadings: Sequence[np.ndarray], kind_m: Sequence[int] | None = None) -> Consensus:
    """Consensus of models, and the reproducibility of each of its factors by leaving models out.

    A model is compared with a consensus from which it is left out: that of all other models or, if several models were
    trained on the same cells and others on other cells, that of the models of other cells. Factors of the one are the
    factors of the other by signed matching.

    Parameters
    ----------
    loadings
        Canonical loadings of at least two models, shape (genes, factors) each, on the axes that are to be compared
        (varimax).
    kind_m
        Kind of each model, an integer. Models of a kind are left out together; each model by itself if None.
    """
    kinds = list(range(len(loadings))) if kind_m is None else list(kind_m)
    if len(set(kinds)) < 2:
        msg = "Reproducibility needs at least two models that can be compared."
        raise ValueError(msg)
    consensus_gk = consensus_loadings(loadings)
    n_factors = consensus_gk.shape[1]
    without = {
        kind: consensus_loadings([value for value, k in zip(loadings, kinds, strict=True) if k != kind], n_factors)
        for kind in sorted(set(kinds))
    }
    cosine_mk = np.zeros((len(loadings), n_factors))
    partner_mk, sign_mk = np.full(cosine_mk.shape, -1), np.ones(cosine_mk.shape, dtype=np.int64)
    for m, (loading_gk, kind) in enumerate(zip(loadings, kinds, strict=True)):
        others = match_columns(cosines(consensus_gk, without[kind]))
        own = match_columns(cosines(without[kind][:, others.second], loading_gk))
        cosine_mk[m, others.first[own.first]] = own.cosine
        partner_mk[m, others.first[own.first]] = own.second
        sign_mk[m, others.first[own.first]] = own.sign * others.sign[own.first]
    matched_mgk = np.stack(
        [
            np.where(partner_k < 0, 0.0, value[:, partner_k] * sign_k)
            for value, partner_k, sign_k in zip(loadings, partner_mk, sign_mk, strict=True)
        ]
    )
    return Consensus(consensus_gk, matched_mgk.std(axis=0, ddof=1), cosine_mk, partner_mk, sign_mk)


def flags(reproducibility_k: np.ndarray) -> np.ndarray:
    """``"stable"`` from 0.8 on, ``"unstable"`` below 0.6, else ``"uncertain"``."""
    return np.select([reproducibility_k >= STABLE, reproducibility_k < UNSTABLE], [FLAGS[0], FLAGS[2]], FLAGS[1])
