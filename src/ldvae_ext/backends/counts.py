"""Minibatches of counts as CSR matrices: the tensors, their checks, and how they are made of dense tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scvi.distributions import Poisson, ZeroInflatedNegativeBinomial

from ldvae_ext.backends.elementwise import is_numpy_array


@cache
def note_sparse_tensors() -> None:
    """Create a CSR tensor once, so that torch's warning on the first one of a process is not shown: they are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], size=(1, 1), check_invariants=True)


@dataclass(frozen=True, eq=False)
class Counts:
    """A minibatch of counts, as the arrays of a CSR matrix; canonical: no gene comes twice in a cell, no zero is stored."""

    indptr: torch.Tensor
    """Start of each cell, shape (cells + 1,)."""
    indices: torch.Tensor
    """Genes of the stored counts."""
    values: torch.Tensor
    """Stored counts."""
    n_genes: int
    """Number of genes."""

    @classmethod
    def of(cls, x_ng: torch.Tensor) -> Counts:
        """The non-zero values of a CSR or of a dense tensor."""
        if x_ng.layout is not torch.sparse_csr:
            note_sparse_tensors()
            x_ng = x_ng.to_sparse_csr()
        indptr, indices, values = x_ng.crow_indices(), x_ng.col_indices(), x_ng.values()
        # On a CPU numpy checks them several times as fast as torch.
        all_nonzero = values.detach().numpy().all() if is_numpy_array(values) else (values != 0).all()
        if not all_nonzero:
            # Explicit zeros, for example from dropout, are removed.
            is_nonzero = values != 0
            before = torch.nn.functional.pad(is_nonzero.cumsum(0), (1, 0))
            indptr, indices, values = before[indptr.long()], indices[is_nonzero], values[is_nonzero]
        return cls(indptr, indices, values, x_ng.shape[1])

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1

    @cached_property
    def cells(self) -> torch.Tensor:
        """Cell of each stored count."""
        numbers = torch.arange(self.n_cells, device=self.indptr.device)
        return torch.repeat_interleave(numbers, self.indptr.diff(), output_size=len(self.indices))

    @cached_property
    def positions(self) -> torch.Tensor:
        """Position of each stored count in the dense matrix, cell by cell."""
        return self.cells * self.n_genes + self.indices

    @cached_property
    def matrix(self) -> sparse.csr_array:
        """The matrix, on a CPU."""
        indptr, indices, values = self.arrays
        return sparse.csr_array((values, indices, indptr), shape=(self.n_cells, self.n_genes))

    def dense(self) -> torch.Tensor:
        """The matrix, shape (cells, genes)."""
        if self.values.device.type == "cpu":
            # Several times as fast as torch's own.
            return torch.from_numpy(self.matrix.toarray())
        parts, shape = (self.indptr, self.indices, self.values), (self.n_cells, self.n_genes)
        return torch.sparse_csr_tensor(*parts, size=shape, check_invariants=False).to_dense()

    def totals(self) -> torch.Tensor:
        """Total of each cell, shape (cells,)."""
        return per_cell(self, self.values)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three arrays, in memory that is shared."""
        return self.indptr.numpy(), self.indices.numpy(), self.values.numpy()

    @cached_property
    def by_gene(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arrays of the CSC matrix: where each gene begins, cells, counts."""
        from ldvae_ext.kernels import sparse as loops

        indptr, indices, values = np.zeros(self.n_genes + 1, np.int64), *map(np.empty_like, self.arrays[1:])
        loops.csr_to_csc(*self.arrays, indptr, indices, values)
        return indptr, indices, values


def per_cell(counts: Counts, values: torch.Tensor) -> torch.Tensor:
    """Sums of values of stored counts over each cell."""
    return torch.segment_reduce(values, "sum", offsets=counts.indptr, initial=0)


def check_genes(x_ng: torch.Tensor, n_genes: int) -> None:
    """Raise unless a minibatch has the genes of the network: compiled loops do not check bounds.

    Parameters
    ----------
    x_ng
        Counts, shape (cells, genes).
    n_genes
        Number of genes of the network.
    """
    if x_ng.shape[1] != n_genes:
        msg = f"A minibatch must have the {n_genes} genes of the network; got {x_ng.shape[1]}."
        raise ValueError(msg)
    if x_ng.layout is torch.sparse_csr and (columns := x_ng.col_indices()).numel():
        values: Any = columns.numpy() if columns.device.type == "cpu" else columns
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest >= n_genes:
            msg = f"The columns of sparse counts must be 0 to {n_genes - 1}; got {lowest} to {highest}."
            raise ValueError(msg)


def check_support(likelihood: str, counts: Counts) -> None:
    """Raise or warn if counts are not integers, as scvi-tools' distributions do: Poisson raises, a zero-inflated one warns.

    Parameters
    ----------
    likelihood
        ``"nb"``, ``"zinb"`` or ``"poisson"``.
    counts
        The counts.
    """
    x = counts.values
    if likelihood not in ("poisson", "zinb") or bool(((x >= 0) & (x == x.floor())).all()):
        return
    one = torch.ones((), device=x.device)
    if likelihood == "poisson":
        Poisson(rate=one).log_prob(x)
    else:
        ZeroInflatedNegativeBinomial(mu=one, theta=one, zi_logits=one, scale=one).log_prob(x)


def csr_of_dense(x_ng: torch.Tensor) -> torch.Tensor:
    """The non-zero values of a dense float32 tensor on a CPU, as a CSR tensor.

    Parameters
    ----------
    x_ng
        Counts, shape (cells, genes).
    """
    from ldvae_ext.kernels import sparse as loops

    dense_ng = x_ng.detach().contiguous().numpy()
    indptr = np.empty(len(dense_ng) + 1, np.int64)
    loops.count_nonzero(dense_ng, indptr)
    indices, values = np.empty(indptr[-1], np.int64), np.empty(indptr[-1], np.float32)
    loops.dense_to_csr(dense_ng, indptr, indices, values)
    return csr_tensor(indptr, indices, values, dense_ng.shape)


def csr_tensor(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, shape: Sequence[int]) -> torch.Tensor:
    """A CSR tensor that shares the memory of its arrays, whose validity is not checked.

    Parameters
    ----------
    indptr, indices, values
        Arrays of a CSR matrix.
    shape
        Its shape.
    """
    note_sparse_tensors()
    parts = (torch.from_numpy(indptr), torch.from_numpy(indices), torch.from_numpy(values))
    return torch.sparse_csr_tensor(*parts, size=tuple(shape), check_invariants=False)
