"""Rows of matrices in memory, on disk, or computed by dask."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from scipy import sparse

# Memory for rows that are read before they are needed.
READ_AHEAD_BYTES = 2**26
# The longest part of a file that is read at once, and the longest gap between wanted rows that is read with them: a new
# access takes as long as 128 KB in HDF5, and at least the decompression of a chunk in zarr.
_SPAN_BYTES, _GAP_BYTES, _GAP_BYTES_OF_ZARR = 2**24, 2**17, 2**20


class Rows(Protocol):
    """Rows of a matrix by their positions."""

    def take(self, rows: np.ndarray) -> Any:
        """Rows in the given order, dense or CSR."""
        ...


class RowReader:
    """Rows of a matrix: dense, scipy sparse, a DataFrame, on disk (HDF5 or zarr), or of dask.

    Rows on disk are read in long parts of the file, with unwanted rows between them where these are few. Rows of a CSC matrix on
    disk can be read, but slowly.

    Parameters
    ----------
    matrix
        The matrix, cells x genes.
    """

    def __init__(self, matrix: Any) -> None:
        # Columns of a CSC matrix lie together, rows do not: cutting rows would scan it once for each chunk.
        if sparse.issparse(matrix) and matrix.format != "csr":
            matrix = matrix.tocsr()
        self.shape: tuple[int, int] = matrix.shape
        self._matrix = getattr(matrix, "iloc", matrix)
        self._is_lazy = hasattr(matrix, "compute")
        is_sparse_on_disk = hasattr(matrix, "group")
        self._is_csr_on_disk = is_sparse_on_disk and matrix.format == "csr"
        self.is_in_memory: bool = sparse.issparse(matrix) or isinstance(matrix, np.ndarray) or hasattr(matrix, "iloc")
        """True if rows need not be read before they are needed."""
        self._is_dense_on_disk = not (self.is_in_memory or self._is_lazy or is_sparse_on_disk)
        if self._is_csr_on_disk:
            self._indptr = np.asarray(matrix.group["indptr"][:], dtype=np.int64)
            self._parts = matrix.group["data"], matrix.group["indices"]
        is_zarr = type(getattr(matrix, "group", matrix)).__module__.startswith("zarr")
        self._gap = _GAP_BYTES_OF_ZARR if is_zarr else _GAP_BYTES

    @property
    def row_bytes(self) -> float:
        """Mean size of a row in memory."""
        if self._is_csr_on_disk:
            return (self._parts[0].dtype.itemsize + 4) * self._indptr[-1] / max(1, self.shape[0]) + 8
        itemsize = getattr(getattr(self._matrix, "dtype", None), "itemsize", 4)
        return max(1, itemsize * self.shape[1])

    @property
    def n_ahead(self) -> int:
        """Number of rows to read before they are needed."""
        return max(1, int(READ_AHEAD_BYTES / self.row_bytes))

    def take(self, rows: np.ndarray) -> Any:
        """Rows in any order, also repeatedly; dense or CSR.

        Parameters
        ----------
        rows
            Positions.
        """
        if not len(rows):
            return self._read(slice(0, 0))
        if self.is_in_memory:
            is_run = rows[-1] - rows[0] + 1 == len(rows) and bool((np.diff(rows) == 1).all())
            return self._read(slice(rows[0], rows[-1] + 1) if is_run else rows)
        # Files read ascending positions only, and slices much faster.
        unique, inverse = np.unique(rows, return_inverse=True)
        is_run = unique[-1] - unique[0] + 1 == len(unique)
        if self._is_csr_on_disk:
            chunk = self._sparse_from_disk(unique)
        elif self._is_dense_on_disk and not is_run:
            chunk = self._dense_from_disk(unique)
        else:
            chunk = self._read(slice(unique[0], unique[-1] + 1) if is_run else unique)
        return chunk if np.array_equal(inverse, np.arange(len(rows))) else chunk[inverse]

    def _read(self, rows: Any) -> Any:
        chunk = self._matrix[rows]
        chunk = chunk.compute() if self._is_lazy else chunk
        return chunk.tocsr() if sparse.issparse(chunk) else np.asarray(chunk)

    def _dense_from_disk(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), self.shape[1]), self._matrix.dtype)
        for part in _spans(rows, rows + 1, int(self._gap / self.row_bytes), int(_SPAN_BYTES / self.row_bytes) + 1):
            wanted = rows[part]
            out[part] = self._matrix[wanted[0] : wanted[-1] + 1][wanted - wanted[0]]
        return out

    def _sparse_from_disk(self, rows: np.ndarray) -> sparse.csr_array:
        first, last = self._indptr[rows], self._indptr[rows + 1]
        indptr = np.concatenate([[0], np.cumsum(last - first)])
        size = sum(part.dtype.itemsize for part in self._parts)
        spans = _spans(first, last, self._gap // size, _SPAN_BYTES // size)
        # One after the other, since they are the most that is held.
        values, indices = (self._gathered(part, first, last, indptr, spans) for part in self._parts)
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.shape[1]):
            # A compiled loop would read and write beyond its arrays.
            msg = f"The file is damaged: columns of its counts must be 0 to {self.shape[1] - 1}; got {indices.min()} to {indices.max()}."
            raise ValueError(msg)
        # In one type, which scipy would else convert both to.
        indptr = indptr.astype(indices.dtype) if indptr[-1] <= np.iinfo(indices.dtype).max else indptr
        return sparse.csr_array((values, indices, indptr), shape=(len(rows), self.shape[1]))

    def _gathered(
        self, part: Any, first: np.ndarray, last: np.ndarray, indptr: np.ndarray, spans: list[slice]
    ) -> np.ndarray:
        out = np.empty(indptr[-1], part.dtype)
        for rows in spans:
            begin, end = first[rows.start], last[rows.stop - 1]
            here = out[indptr[rows.start] : indptr[rows.stop]]
            values = part[begin:end]
            if len(here) < end - begin:
                lengths = last[rows] - first[rows]
                shift = np.repeat(first[rows] - begin - (indptr[rows] - indptr[rows.start]), lengths)
                values = values[shift + np.arange(len(here))]
            here[:] = values
        return out


class ReadRows:
    """Rows of a matrix that were read before they are needed.

    Parameters
    ----------
    reader
        Reader of the matrix.
    rows
        Positions of the rows, in any order.
    """

    def __init__(self, reader: RowReader, rows: np.ndarray) -> None:
        self._reader, self._rows = reader, np.unique(rows)
        self._values = reader.take(self._rows)

    def take(self, rows: np.ndarray) -> Any:
        """Rows in any order; those that were not read before are read now.

        Parameters
        ----------
        rows
            Positions.
        """
        at = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        return self._values[at] if np.array_equal(self._rows[at], rows) else self._reader.take(rows)


def row_chunks(matrix: Any, rows: np.ndarray, chunk_size: int) -> Iterator[Any]:
    """Chosen rows of a matrix, a chunk at a time, each dense or CSR.

    Parameters
    ----------
    matrix
        A matrix that :class:`RowReader` takes.
    rows
        Positions of rows, in any order.
    chunk_size
        Rows in a chunk.
    """
    reader = RowReader(matrix)
    n_ahead = len(rows) if reader.is_in_memory else max(1, reader.n_ahead // chunk_size) * chunk_size
    for first in range(0, len(rows), max(1, n_ahead)):
        ahead = rows[first : first + n_ahead]
        source: Rows = reader if reader.is_in_memory else ReadRows(reader, ahead)
        for start in range(0, len(ahead), chunk_size):
            yield source.take(ahead[start : start + chunk_size])
        del source  # before the next rows are read


def _spans(first: np.ndarray, last: np.ndarray, gap: int, length: int) -> list[slice]:
    """Ascending intervals in groups that are read at once: with gaps of at most ``gap``, and not much longer than ``length``."""
    is_new = (first[1:] - last[:-1] > gap) | (first[1:] // length > first[:-1] // length)
    bounds = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(first)]
    return [slice(a, b) for a, b in pairwise(bounds)]
