"""Negative log-likelihoods of sparse counts given their means, for tensors of any type on any device.

The formulas are those of ``scvi.distributions``, eps = 1e-8 included, differentiated by hand; gamma functions are evaluated on
non-zero counts only. :func:`ldvae_ext.core.log_likelihood` is the reference; :mod:`ldvae_ext.backends.softmax_likelihood`
differentiates the same terms through a softmax.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ldvae_ext.backends.counts import Counts, per_cell
from ldvae_ext.backends.elementwise import log1p, softplus

EPS = 1e-8
# Gamma functions of counts up to this are read from tables, one for each gene.
_N_TABLE = 8


class CountTerms(NamedTuple):
    """Terms of a negative binomial that counts other than 0 add, one value for each stored count."""

    x: torch.Tensor
    """The counts."""
    mu: torch.Tensor
    """Their means."""
    log_likelihood: torch.Tensor
    """``lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) + x log((mu + eps) / (theta + mu + eps))``."""
    d_mu: torch.Tensor
    """Derivative of ``log((mu + eps) / (theta + mu + eps))`` in mu; to be multiplied by x."""
    d_theta: torch.Tensor
    """Derivative of ``log_likelihood`` in theta."""


class NegativeBinomialTerms(NamedTuple):
    """Terms of a negative binomial with ``r = mu / (theta + eps)``.

    A gene without counts has the log-likelihood ``-theta log(1 + r)``; counts add :class:`CountTerms`.
    """

    inverse: torch.Tensor
    """``1 / (theta + eps)``, shape of theta."""
    ratio_ng: torch.Tensor
    """r, shape (cells, genes)."""
    log_total_ng: torch.Tensor
    """``log(1 + r)``, shape (cells, genes)."""
    of_counts: CountTerms


def at_counts(counts: Counts, matrix: torch.Tensor) -> torch.Tensor:
    """Values of a matrix where counts are stored.

    Parameters
    ----------
    counts
        The counts.
    matrix
        Shape (cells, genes), (1, genes) or (genes,).
    """
    if matrix.ndim == 1 or len(matrix) == 1:
        return matrix.reshape(-1)[counts.indices]
    return matrix.reshape(-1)[counts.positions]


def add_at_counts(counts: Counts, matrix_ng: torch.Tensor, values: torch.Tensor, factor: float = 1.0) -> None:
    """Add values to a matrix, in place, where counts are stored.

    Parameters
    ----------
    counts
        The counts.
    matrix_ng
        Shape (cells, genes), contiguous.
    values
        One for each stored count.
    factor
        Factor of the values.
    """
    matrix_ng.view(-1).index_add_(0, counts.positions, values, alpha=factor)


def negative_binomial_terms(counts: Counts, mu_ng: torch.Tensor, theta: torch.Tensor) -> NegativeBinomialTerms:
    """The terms that loss and gradients of a negative binomial are made of.

    Parameters
    ----------
    counts
        The counts.
    mu_ng
        Means, shape (cells, genes).
    theta
        Inverse dispersions, shape (genes,) or (cells, genes).
    """
    inverse = (theta + EPS).reciprocal()
    ratio_ng = mu_ng * inverse
    log_total_ng = log1p(ratio_ng)
    x, mu = counts.values.to(mu_ng), at_counts(counts, mu_ng)
    # 1 / (theta + mu + eps)
    per_total = at_counts(counts, inverse) / (1 + at_counts(counts, ratio_ng))
    log_gamma, d_log_gamma = _gamma_terms(counts, x, theta)
    of_counts = CountTerms(
        x,
        mu,
        log_gamma + x * torch.log((mu + EPS) * per_total),
        (mu + EPS).reciprocal() - per_total,
        d_log_gamma - x * per_total,
    )
    return NegativeBinomialTerms(inverse, ratio_ng, log_total_ng, of_counts)


def _gamma_terms(counts: Counts, x: torch.Tensor, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)`` of the counts x, and its derivative in theta.

    Both are sums over i < x, of ``log((theta + i) / (i + 1))`` and of ``1 / (theta + i)``. Most counts are small, so that the
    sums are read from tables if theta is shared by all cells.
    """
    if theta.ndim > 1:
        return _gamma_functions(x, at_counts(counts, theta))
    i_x1 = torch.arange(_N_TABLE, dtype=x.dtype, device=x.device)[:, None]
    theta_xg = theta + i_x1
    tables = torch.log(theta_xg / (i_x1 + 1)), theta_xg.reciprocal_()
    for table in tables:
        # Row by row: torch's cumulative sums are not deterministic under CUDA.
        for i in range(1, _N_TABLE):
            table[i] += table[i - 1]
    is_small = (x <= _N_TABLE) & (x == x.floor()) & (x >= 1)
    at = torch.where(is_small, x - 1, 0).long() * len(theta) + counts.indices
    log_gamma, d_log_gamma = (table.view(-1)[at] for table in tables)
    large = torch.nonzero(~is_small).squeeze(-1)
    if len(large):
        log_gamma[large], d_log_gamma[large] = _gamma_functions(x[large], theta[counts.indices[large]])
    return log_gamma, d_log_gamma


def _gamma_functions(x: torch.Tensor, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_gamma = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return log_gamma, torch.digamma(x + theta) - torch.digamma(theta)


def sum_over_genes(matrix_ng: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``sum_g weight matrix_ng`` of each cell, shape (cells,).

    Parameters
    ----------
    matrix_ng
        Shape (cells, genes).
    weight
        Shape (genes,) or (cells, genes).
    """
    return matrix_ng @ weight if weight.ndim == 1 else (matrix_ng * weight).sum(-1)


def sum_over_cells(matrix_ng: torch.Tensor, weight_n: torch.Tensor, *, is_shared: bool) -> torch.Tensor:
    """Gradient of a parameter of the genes, shape (genes,), or of each cell and gene, shape (cells, genes).

    Parameters
    ----------
    matrix_ng
        Gradients for cells of weight 1, shape (cells, genes).
    weight_n
        Weight of each cell.
    is_shared
        True for a parameter of the genes, over whose cells the gradients are summed.
    """
    return weight_n @ matrix_ng if is_shared else matrix_ng * weight_n[:, None]


class _NegativeBinomial(Function):
    """Loss of means, shape (cells, genes), and inverse dispersions, the same or (genes,)."""

    @staticmethod
    def forward(ctx: Any, mu_ng: torch.Tensor, theta: torch.Tensor, counts: Counts) -> torch.Tensor:
        inverse, ratio_ng, log_total_ng, of_counts = negative_binomial_terms(counts, mu_ng, theta)
        loss_n = sum_over_genes(log_total_ng, theta) - per_cell(counts, of_counts.log_likelihood)
        # theta / (theta + mu + eps); in place, since at this size passes over memory take the time.
        d_mu_ng = ratio_ng.add_(1).reciprocal_().mul_(theta * inverse)
        d_theta_ng = log_total_ng.sub_(mu_ng * inverse * d_mu_ng)
        add_at_counts(counts, d_mu_ng, of_counts.x * of_counts.d_mu, -1.0)
        add_at_counts(counts, d_theta_ng, of_counts.d_theta, -1.0)
        ctx.save_for_backward(d_mu_ng, d_theta_ng)
        ctx.is_shared = theta.ndim == 1
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        d_mu_ng, d_theta_ng = ctx.saved_tensors
        d_theta = sum_over_cells(d_theta_ng, weight_n, is_shared=ctx.is_shared)
        return d_mu_ng * weight_n[:, None], d_theta, None


class ZeroInflatedTerms(NamedTuple):
    """Terms of a zero-inflated negative binomial with logits d of zero inflation.

    A gene without counts has the log-likelihood ``softplus(s) - softplus(-d)`` with ``s = -d - theta log(1 + r)``. All genes are
    taken for zeros first; the terms of counts other than 0 make up for it.
    """

    loss_n: torch.Tensor
    """Negative log-likelihood of each cell."""
    negative_binomial: NegativeBinomialTerms
    zero_ng: torch.Tensor
    """``sigmoid(s)``, the share of the zero that does not come from inflation, shape (cells, genes)."""
    positive: torch.Tensor
    """``sigmoid(-s)`` where counts are stored."""


def zero_inflated_terms(
    counts: Counts, mu_ng: torch.Tensor, theta: torch.Tensor, dropout_ng: torch.Tensor
) -> ZeroInflatedTerms:
    """The terms that loss and gradients of a zero-inflated negative binomial are made of.

    Parameters
    ----------
    counts, mu_ng, theta
        See :func:`negative_binomial_terms`.
    dropout_ng
        Logits of zero inflation, shape (cells, genes).
    """
    terms = negative_binomial_terms(counts, mu_ng, theta)
    stay_zero_ng = torch.addcmul(dropout_ng, terms.log_total_ng, theta).neg_()
    stay_zero = at_counts(counts, stay_zero_ng)
    # y - softplus(y) = -softplus(-y)
    of_counts = terms.of_counts.log_likelihood - softplus(-stay_zero)
    loss_n = softplus(-dropout_ng).sub_(softplus(stay_zero_ng)).sum(-1) - per_cell(counts, of_counts)
    return ZeroInflatedTerms(loss_n, terms, stay_zero_ng.sigmoid_(), torch.sigmoid(-stay_zero))


class _ZeroInflatedNegativeBinomial(Function):
    """Loss of means and dropout logits, shape (cells, genes), and inverse dispersions, the same or (genes,)."""

    @staticmethod
    def forward(
        ctx: Any, mu_ng: torch.Tensor, theta: torch.Tensor, dropout_ng: torch.Tensor, counts: Counts
    ) -> torch.Tensor:
        loss_n, terms, zero_ng, positive = zero_inflated_terms(counts, mu_ng, theta, dropout_ng)
        inverse, ratio_ng, log_total_ng, of_counts = terms
        d_mu_ng = ratio_ng.add_(1).reciprocal_().mul_(theta * inverse)
        d_theta_ng = log_total_ng.sub_(mu_ng * inverse * d_mu_ng)
        d_mu, d_theta = at_counts(counts, d_mu_ng), at_counts(counts, d_theta_ng)
        d_mu_ng.mul_(zero_ng)
        d_theta_ng.mul_(zero_ng)
        d_dropout_ng = zero_ng - torch.sigmoid(-dropout_ng)
        add_at_counts(counts, d_mu_ng, positive * d_mu - of_counts.x * of_counts.d_mu)
        add_at_counts(counts, d_theta_ng, positive * d_theta - of_counts.d_theta)
        add_at_counts(counts, d_dropout_ng, positive)
        ctx.save_for_backward(d_mu_ng, d_theta_ng, d_dropout_ng)
        ctx.is_shared = theta.ndim == 1
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        d_mu_ng, d_theta_ng, d_dropout_ng = ctx.saved_tensors
        d_theta = sum_over_cells(d_theta_ng, weight_n, is_shared=ctx.is_shared)
        return d_mu_ng * weight_n[:, None], d_theta, d_dropout_ng * weight_n[:, None], None


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
    if likelihood != "poisson":
        msg = f"`likelihood` must be 'nb', 'zinb' or 'poisson'; got {likelihood!r}."
        raise ValueError(msg)
    x = counts.values.to(mu_ng)
    of_counts = torch.xlogy(x, at_counts(counts, mu_ng)) - torch.lgamma(x + 1)
    return mu_ng.sum(-1) - per_cell(counts, of_counts)
