"""Cells as the tools see them: posteriors, conditions and counts, and how they are read in chunks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse


class PosteriorAxes(NamedTuple):
    """Axes along which posteriors are independent, if these are not the factors."""

    variance_nk: np.ndarray
    """Posterior variances along these axes, cells x latents."""
    rotation_kk: np.ndarray
    """Axes of the factors: columns of unit length, latents x factors."""

    @classmethod
    def of(cls, variance_nk: np.ndarray, axes: PosteriorAxes | None) -> PosteriorAxes:
        """The given axes; those of the factors if None."""
        return cls(np.asarray(variance_nk), np.eye(variance_nk.shape[1])) if axes is None else axes


class EncodedCells(NamedTuple):
    """The posterior of some cells, with all that their likelihood needs."""

    mean: np.ndarray
    """Posterior means (of u under ``"ln"``), cells x factors."""
    variance: np.ndarray
    """Posterior variances, cells x factors."""
    library: np.ndarray
    """Library sizes in counts, or size factors, shape (cells,), float64."""
    batch: np.ndarray
    """Batch codes, shape (cells,), int64."""
    label: np.ndarray
    """Label codes, shape (cells,), int64."""
    covariates: Any
    """Levels and values of the covariates by name, shape (cells,) each; None without covariates."""
    counts: Any
    """Counts, cells x genes, dense or CSR."""
    axes: PosteriorAxes | None = None
    """Variances and rotation that make up the posterior covariance of rotated factors; None without a rotation."""

    @property
    def spread(self) -> PosteriorAxes:
        """Variances and rotation that make up the posterior covariance, with or without a rotation."""
        return PosteriorAxes.of(self.variance, self.axes)


class Nonzero(NamedTuple):
    """Counts that are not zero."""

    at: np.ndarray
    """Positions in the flattened matrix, cells x genes."""
    value: np.ndarray
    """Counts, float64."""


def nonzero(x_ng: Any) -> Nonzero:
    """The non-zero counts of a dense or sparse matrix."""
    if not sparse.issparse(x_ng):
        flat = np.asarray(x_ng).ravel()
        at = np.flatnonzero(flat)
        return Nonzero(at, flat[at].astype(np.float64))
    x_ng = sparse.csr_array(x_ng)
    if not x_ng.has_canonical_format or not x_ng.data.all():
        x_ng = x_ng.copy()
        x_ng.sum_duplicates()
        x_ng.eliminate_zeros()
    rows = np.repeat(np.arange(x_ng.shape[0], dtype=np.int64), np.diff(x_ng.indptr))
    return Nonzero(rows * x_ng.shape[1] + x_ng.indices, x_ng.data.astype(np.float64))


def csr_parts(x_ng: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR arrays of a dense or sparse matrix of counts: ``indptr``, ``indices`` and values in float32.

    They may contain zeros and duplicates, which have no effect on functions that are linear in counts.
    """
    if not sparse.issparse(x_ng):
        x_ng = np.asarray(x_ng)
        first_n = np.arange(len(x_ng) + 1) * x_ng.shape[1]
        at = np.flatnonzero(x_ng.ravel() != 0)
        indptr = np.searchsorted(at, first_n)
        columns = at - np.repeat(first_n[:-1], np.diff(indptr))
        return indptr.astype(np.int64), columns.astype(np.uint32), x_ng.ravel()[at].astype(np.float32)
    x_ng = x_ng.tocsr()
    parts = ((x_ng.indptr, np.int64), (x_ng.indices, np.int32), (x_ng.data, np.float32))
    indptr, indices, values = (np.require(array, dtype, ["C", "W"]) for array, dtype in parts)
    # numba checks the sign of each signed index.
    return indptr, indices.view(np.uint32), values


def values_of(x_ng: Any) -> np.ndarray:
    """The values of a dense or sparse matrix that are stored."""
    return np.asarray(x_ng.data if sparse.issparse(x_ng) else x_ng)


def has_fractions(x_ng: Any) -> bool:
    """True if a dense or sparse matrix has values that are not integers."""
    values = values_of(x_ng)
    return not np.issubdtype(values.dtype, np.integer) and bool((values != np.rint(values)).any())


def check_sparse(matrix: Any, where: str) -> None:
    """Raise if the positions of a sparse matrix in memory are not positions of its rows and columns.

    Nobody checks them in a damaged file, and a compiled loop would read and write beyond its arrays.

    Parameters
    ----------
    matrix
        Any matrix; CSR and CSC are checked.
    where
        Its name, for the message.
    """
    if not sparse.issparse(matrix) or matrix.format not in ("csr", "csc"):
        return
    n_lines, n_across = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    indptr, indices = matrix.indptr, matrix.indices
    is_sound = (
        len(indptr) == n_lines + 1
        and indptr[0] == 0
        and indptr[-1] == len(indices) == len(matrix.data)
        and bool((indptr[1:] >= indptr[:-1]).all())
    )
    if is_sound and len(indices):
        is_sound = indices.min() >= 0 and indices.max() < n_across
    if not is_sound:
        msg = f"`{where}` is a damaged sparse matrix: it has positions outside of its {matrix.shape[0]} rows and {matrix.shape[1]} columns."
        raise ValueError(msg)


def dense(x_ng: Any) -> np.ndarray:
    """A dense or sparse matrix as a dense array, float64."""
    return np.asarray(x_ng.toarray() if sparse.issparse(x_ng) else x_ng, dtype=np.float64)


def at_rows(covariates: Any, names: Iterable[str], rows: Any, n_cells: int) -> dict[str, np.ndarray] | None:
    """Covariates of some of the cells; each is given once for all cells or for each."""
    if covariates is None:
        return None
    return {name: np.broadcast_to(np.asarray(covariates[name]).ravel(), (n_cells,))[rows] for name in names}


def indicator(group_n: np.ndarray, n_groups: int) -> sparse.csr_array:
    """Indicator matrix of groups, shape (groups, cells); a cell with -1 is in no group."""
    (inside,) = np.nonzero(group_n >= 0)
    return sparse.csr_array((np.ones(len(inside)), (group_n[inside], inside)), shape=(n_groups, len(group_n)))
