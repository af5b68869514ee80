"""Negative log-likelihoods of sparse counts with their gradients: gamma functions are evaluated on non-zero counts only.

The formulas are those of ``scvi.distributions``, its eps = 1e-8 included, differentiated by hand, for tensors of any type on
any device. :mod:`ldvae_ext.module._head` has them compiled.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scvi.distributions import Poisson, ZeroInflatedNegativeBinomial
from torch.autograd import Function
from torch.autograd.function import once_differentiable

EPS = 1e-8
_IDENTITY_FROM = 20


@cache
def note_sparse_tensors() -> None:
    """Have torch say now, where nobody hears it, what it says of a process's first CSR tensor: that they are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], size=(1, 1), check_invariants=True)


def _is_known_to_numpy(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Counts:
    """A minibatch of counts, as the arrays of a CSR matrix; canonical: no gene comes twice in a cell, no zero is stored."""

    indptr: torch.Tensor
    """Where each cell begins, shape (cells + 1,)."""
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
        # On a CPU numpy looks at them several times as fast.
        are_there = values.detach().numpy().all() if _is_known_to_numpy(values) else (values != 0).all()
        if not are_there:
            # A zero that is stored is a zero: dropout may have made it.
            is_there = values != 0
            before = torch.nn.functional.pad(is_there.cumsum(0), (1, 0))
            indptr, indices, values = before[indptr.long()], indices[is_there], values[is_there]
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
        from ldvae_ext.module import _row_kernels as loops

        indptr, indices, values = np.zeros(self.n_genes + 1, np.int64), *map(np.empty_like, self.arrays[1:])
        loops.transpose(*self.arrays, indptr, indices, values)
        return indptr, indices, values


def _at(counts: Counts, matrix: torch.Tensor) -> torch.Tensor:
    """Values of a matrix of (cells or 1, genes) where counts are stored."""
    if matrix.ndim == 1 or len(matrix) == 1:
        return matrix.reshape(-1)[counts.indices]
    return matrix.reshape(-1)[counts.positions]


def _add_at(counts: Counts, matrix_ng: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    matrix_ng.view(-1).index_add_(0, counts.positions, values)
    return matrix_ng


def per_cell(counts: Counts, values: torch.Tensor) -> torch.Tensor:
    """Sums of values of stored counts over each cell."""
    return torch.segment_reduce(values, "sum", offsets=counts.indptr, initial=0)


@cache
def _has_wide_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def log1p(x: torch.Tensor) -> torch.Tensor:
    """``log(1 + x)`` of a tensor without a graph.

    With AVX-512 by numpy, which has it in vector instructions: torch took forty times as long. Elsewhere torch is faster.
    """
    if not (_is_known_to_numpy(x) and _has_wide_vectors()):
        return torch.log1p(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        return torch.from_numpy(np.log1p(x.numpy()))


def softplus(x: torch.Tensor) -> torch.Tensor:
    """``log(1 + e^x)`` of a tensor without a graph; above 20 that is x itself, as in torch. See :func:`log1p`."""
    if not (_is_known_to_numpy(x) and _has_wide_vectors()):
        return torch.nn.functional.softplus(x)
    return torch.relu(x).add_(log1p(x.abs().neg_().exp_().masked_fill_(x > _IDENTITY_FROM, 0)))


class _NegativeBinomial(Function):
    """Of means and inverse dispersions; shape (cells, genes), the latter also (genes,)."""

    @staticmethod
    def forward(ctx: Any, mu_ng: torch.Tensor, theta: torch.Tensor, counts: Counts) -> torch.Tensor:
        x, mu, at_theta = counts.values.to(mu_ng), _at(counts, mu_ng), _at(counts, theta)
        # In place where that can be: at this size it is passes over memory that cost.
        per_total_ng = (mu_ng + (theta + EPS)).reciprocal_()
        per_total = _at(counts, per_total_ng)
        # log((theta + eps) / (theta + mu + eps))
        log_share_ng = (per_total_ng * (theta + EPS)).log_()
        loss_n = -(log_share_ng @ theta if theta.ndim == 1 else (theta * log_share_ng).sum(-1))
        gammas = torch.lgamma(x + at_theta) - torch.lgamma(at_theta) - torch.lgamma(x + 1)
        loss_n = loss_n - per_cell(counts, gammas + x * torch.log((mu + EPS) * per_total))
        d_mu_ng = per_total_ng.mul_(-theta)
        d_theta_ng = log_share_ng.add_(theta / (theta + EPS)).add_(d_mu_ng)
        _add_at(counts, d_mu_ng, x * ((mu + EPS).reciprocal() - per_total))
        rise = torch.digamma(x + at_theta) - torch.digamma(at_theta)
        _add_at(counts, d_theta_ng, rise - x * per_total)
        ctx.save_for_backward(d_mu_ng, d_theta_ng)
        ctx.is_shared = theta.ndim == 1
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        d_mu_ng, d_theta_ng = ctx.saved_tensors
        d_theta = -weight_n @ d_theta_ng if ctx.is_shared else d_theta_ng * -weight_n[:, None]
        return d_mu_ng * -weight_n[:, None], d_theta, None


class _ZeroInflatedNegativeBinomial(Function):
    """Of means, inverse dispersions (also of shape (genes,)) and dropout logits."""

    @staticmethod
    def forward(
        ctx: Any, mu_ng: torch.Tensor, theta: torch.Tensor, dropout_ng: torch.Tensor, counts: Counts
    ) -> torch.Tensor:
        share = theta / (theta + EPS)
        per_total_ng = (mu_ng + (theta + EPS)).reciprocal_()
        log_share_ng = torch.log((theta + EPS) * per_total_ng)
        stay_zero_ng = theta * log_share_ng - dropout_ng
        zero_ng = torch.sigmoid(stay_zero_ng)
        slope_ng = log_share_ng + share - theta * per_total_ng
        x, mu, at_theta = counts.values.to(mu_ng), _at(counts, mu_ng), _at(counts, theta)
        per_total, positive = _at(counts, per_total_ng), torch.sigmoid(-_at(counts, stay_zero_ng))
        gammas = torch.lgamma(x + at_theta) - torch.lgamma(at_theta) - torch.lgamma(x + 1)
        loss_n = (softplus(-dropout_ng) - softplus(stay_zero_ng)).sum(-1)
        # Of a count it is log(1 - dropout) + stay_zero, and not the softplus of the latter: y - softplus(y) = -softplus(-y).
        of_counts = gammas + x * torch.log((mu + EPS) * per_total) - softplus(-_at(counts, stay_zero_ng))
        loss_n = loss_n - per_cell(counts, of_counts)
        d_mu_ng = -zero_ng * theta * per_total_ng
        d_dropout_ng = torch.sigmoid(-dropout_ng) - zero_ng
        d_theta_ng = zero_ng * slope_ng
        given_back = positive * at_theta * per_total
        _add_at(counts, d_mu_ng, x * ((mu + EPS).reciprocal() - per_total) - given_back)
        _add_at(counts, d_dropout_ng, -positive)
        rise = torch.digamma(x + at_theta) - torch.digamma(at_theta)
        _add_at(counts, d_theta_ng, rise - x * per_total + positive * _at(counts, slope_ng))
        ctx.save_for_backward(d_mu_ng, d_theta_ng, d_dropout_ng)
        ctx.is_shared = theta.ndim == 1
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        d_mu_ng, d_theta_ng, d_dropout_ng = ctx.saved_tensors
        weight_n1 = -weight_n[:, None]
        d_theta = -weight_n @ d_theta_ng if ctx.is_shared else d_theta_ng * weight_n1
        return d_mu_ng * weight_n1, d_theta, d_dropout_ng * weight_n1, None


def check_genes(x_ng: torch.Tensor, n_genes: int) -> None:
    """Raise unless a minibatch has the genes of the network: loops do not look where they read.

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
        seen: Any = columns.numpy() if columns.device.type == "cpu" else columns
        lowest, highest = int(seen.min()), int(seen.max())
        if lowest < 0 or highest >= n_genes:
            msg = f"The columns of sparse counts must be 0 to {n_genes - 1}; got {lowest} to {highest}."
            raise ValueError(msg)


def check_support(likelihood: str, counts: Counts) -> None:
    """Say of counts that are not whole what scvi-tools' distributions say: Poisson raises, a zero-inflated one warns.

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


def negative_log_likelihood(
    likelihood: str,
    counts: Counts,
    mu_ng: torch.Tensor,
    theta: torch.Tensor | None = None,
    dropout_ng: torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each cell, in nats; differentiable once.

    Parameters
    ----------
    likelihood
        ``"nb"``, ``"zinb"`` or ``"poisson"``.
    counts
        The counts.
    mu_ng
        Means, shape (cells, genes).
    theta
        Inverse dispersions, shape (genes,) or (cells, genes).
    dropout_ng
        Logits of zero inflation, shape (cells, genes).

    Returns
    -------
    Shape (cells,).
    """
    if likelihood == "nb":
        return _NegativeBinomial.apply(mu_ng, theta, counts)
    if likelihood == "zinb":
        return _ZeroInflatedNegativeBinomial.apply(mu_ng, theta, dropout_ng, counts)
    x = counts.values.to(mu_ng)
    of_counts = torch.xlogy(x, _at(counts, mu_ng)) - torch.lgamma(x + 1)
    return mu_ng.sum(-1) - per_cell(counts, of_counts)
