"""Negative log-likelihoods of sparse counts where the mean is the library times a softmax, differentiated through both.

The formulas are those of ``scvi.distributions``, its eps = 1e-8 included. Arrays of cells x genes are what a step costs without
compiled loops: few are made, and each is read few times. For tensors of any type on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ldvae_ext.module._likelihood import EPS, Counts, log1p, per_cell, softplus

# Counts up to this have their gamma functions in tables, one for each gene.
_N_TABLE = 8


def _gamma_terms(counts: Counts, x: torch.Tensor, theta_g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)`` of the counts x, and its slope in theta.

    Both are sums over i < x, of ``log((theta + i) / (i + 1))`` and of ``1 / (theta + i)``: most counts are small.
    """
    i_x1 = torch.arange(_N_TABLE, dtype=x.dtype, device=x.device)[:, None]
    theta_xg = theta_g + i_x1
    tables = torch.log(theta_xg / (i_x1 + 1)), theta_xg.reciprocal_()
    for table in tables:
        # Row by row: torch's own sums up to each row are not deterministic under CUDA.
        for i in range(1, _N_TABLE):
            table[i] += table[i - 1]
    is_small = (x <= _N_TABLE) & (x == x.floor()) & (x >= 1)
    at = torch.where(is_small, x - 1, 0).long() * len(theta_g) + counts.indices
    log_gamma, slope = (table.view(-1)[at] for table in tables)
    large = torch.nonzero(~is_small).squeeze(-1)
    if len(large):
        of_large, theta = x[large], theta_g[counts.indices[large]]
        log_gamma[large] = torch.lgamma(of_large + theta) - torch.lgamma(theta) - torch.lgamma(of_large + 1)
        slope[large] = torch.digamma(of_large + theta) - torch.digamma(theta)
    return log_gamma, slope


class _NegativeBinomial(Function):
    """Of logits, log libraries of shape (cells, 1) and the inverse dispersions of the genes.

    With ``r = mu / (theta + eps)`` a gene without counts has the loss ``theta log1p(r)`` and the slopes ``theta r / (1 + r)`` in
    log mu and ``log1p(r) - theta / (theta + eps) r / (1 + r)`` in theta; counts add their terms.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_ng: torch.Tensor, log_library_n1: torch.Tensor, theta_g: torch.Tensor, counts: Counts
    ) -> torch.Tensor:
        library_n1 = torch.exp(log_library_n1)
        mu_ng = torch.softmax(logits_ng, dim=-1).mul_(library_n1)
        inverse_g = (theta_g + EPS).reciprocal()
        ratio_ng = mu_ng * inverse_g
        grown_ng = log1p(ratio_ng)
        x, mu = counts.values.to(mu_ng), mu_ng.view(-1)[counts.positions]
        per_total = inverse_g[counts.indices] / (1 + ratio_ng.view(-1)[counts.positions])
        # r / (1 + r), in place: at this size it is new memory that costs.
        part_ng = ratio_ng.reciprocal_().add_(1).reciprocal_()
        log_gamma, rise = _gamma_terms(counts, x, theta_g)
        loss_n = grown_ng @ theta_g - per_cell(counts, log_gamma + x * torch.log((mu + EPS) * per_total))
        of_mu = x * mu * ((mu + EPS).reciprocal() - per_total)
        slope_n = part_ng @ theta_g - per_cell(counts, of_mu)
        ctx.counts = counts
        ctx.save_for_backward(
            mu_ng, library_n1, theta_g, inverse_g, grown_ng, part_ng, of_mu, rise - x * per_total, slope_n
        )
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        mu_ng, library_n1, theta_g, inverse_g, grown_ng, part_ng, of_mu, of_theta, slope_n = ctx.saved_tensors
        counts = ctx.counts
        slope_ng = part_ng * theta_g
        slope_ng.view(-1).index_add_(0, counts.positions, of_mu, alpha=-1)
        slope_ng.addcmul_(mu_ng, _per_library(slope_n[:, None], library_n1), value=-1).mul_(weight_n[:, None])
        d_theta_g = weight_n @ grown_ng - theta_g * inverse_g * (weight_n @ part_ng)
        d_theta_g.index_add_(0, counts.indices, weight_n[counts.cells] * of_theta, alpha=-1)
        return slope_ng, (slope_n * weight_n)[:, None], d_theta_g, None


class _Poisson(Function):
    """Of logits and log libraries of shape (cells, 1). The means of a cell add up to its library."""

    @staticmethod
    def forward(ctx: Any, logits_ng: torch.Tensor, log_library_n1: torch.Tensor, counts: Counts) -> torch.Tensor:
        log_share_ng = torch.log_softmax(logits_ng, dim=-1)
        library_n = torch.exp(log_library_n1.squeeze(-1))
        x = counts.values.to(logits_ng)
        log_mu = log_share_ng.view(-1)[counts.positions] + log_library_n1.squeeze(-1)[counts.cells]
        total_n = per_cell(counts, x)
        ctx.counts = counts
        ctx.save_for_backward(log_share_ng, library_n, x, total_n)
        return library_n - per_cell(counts, x * log_mu - torch.lgamma(x + 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        log_share_ng, library_n, x, total_n = ctx.saved_tensors
        counts = ctx.counts
        slope_ng = torch.exp(log_share_ng).mul_((total_n * weight_n)[:, None])
        slope_ng.view(-1).index_add_(0, counts.positions, weight_n[counts.cells] * x, alpha=-1)
        return slope_ng, ((library_n - total_n) * weight_n)[:, None], None


class _ZeroInflatedNegativeBinomial(Function):
    """As :class:`_NegativeBinomial`, with dropout logits.

    A gene without counts stays zero by dropout or by chance: ``softplus(-d) - softplus(-d - theta log1p(r))``. All genes are
    taken for zeros first; where there are counts, what dropout had of the slopes is given back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_ng: torch.Tensor,
        log_library_n1: torch.Tensor,
        theta_g: torch.Tensor,
        dropout_ng: torch.Tensor,
        counts: Counts,
    ) -> torch.Tensor:
        at = counts.positions
        library_n1 = torch.exp(log_library_n1)
        mu_ng = torch.softmax(logits_ng, dim=-1).mul_(library_n1)
        inverse_g = (theta_g + EPS).reciprocal()
        ratio_ng = mu_ng * inverse_g
        grown_ng = log1p(ratio_ng)
        stay_zero_ng = torch.addcmul(dropout_ng, grown_ng, theta_g).neg_()
        x, mu, stay_zero = counts.values.to(mu_ng), mu_ng.view(-1)[at], stay_zero_ng.view(-1)[at]
        per_total = inverse_g[counts.indices] / (1 + ratio_ng.view(-1)[at])
        # r / (1 + r), in place: at this size it is new memory that costs.
        part_ng = ratio_ng.reciprocal_().add_(1).reciprocal_()
        log_gamma, rise = _gamma_terms(counts, x, theta_g)
        # Of a count it is log(1 - dropout) + stay_zero, and not the softplus of the latter: y - softplus(y) = -softplus(-y).
        of_counts = log_gamma + x * torch.log((mu + EPS) * per_total) - softplus(-stay_zero)
        loss_n = softplus(-dropout_ng).sub_(softplus(stay_zero_ng)).sum(-1) - per_cell(counts, of_counts)
        positive = torch.sigmoid(-stay_zero)
        theta, grown, part = theta_g[counts.indices], grown_ng.view(-1)[at], part_ng.view(-1)[at]
        of_mu = x * mu * ((mu + EPS).reciprocal() - per_total) - positive * theta * part
        of_theta = rise - x * per_total - positive * (grown - theta * inverse_g[counts.indices] * part)
        zero_ng = stay_zero_ng.sigmoid_()
        slopes_ng = grown_ng.mul_(zero_ng), part_ng.mul_(zero_ng)
        slope_n = slopes_ng[1] @ theta_g - per_cell(counts, of_mu)
        ctx.counts = counts
        saved = (
            mu_ng,
            library_n1,
            theta_g,
            inverse_g,
            *slopes_ng,
            of_mu,
            of_theta,
            slope_n,
            dropout_ng,
            zero_ng,
            positive,
        )
        ctx.save_for_backward(*saved)
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        *of_mean, dropout_ng, zero_ng, positive = ctx.saved_tensors
        mu_ng, library_n1, theta_g, inverse_g, grown_ng, part_ng, of_mu, of_theta, slope_n = of_mean
        counts = ctx.counts
        slope_ng = part_ng * theta_g
        slope_ng.view(-1).index_add_(0, counts.positions, of_mu, alpha=-1)
        slope_ng.addcmul_(mu_ng, _per_library(slope_n[:, None], library_n1), value=-1).mul_(weight_n[:, None])
        d_theta_g = weight_n @ grown_ng - theta_g * inverse_g * (weight_n @ part_ng)
        d_theta_g.index_add_(0, counts.indices, weight_n[counts.cells] * of_theta, alpha=-1)
        d_dropout_ng = torch.sigmoid(-dropout_ng).sub_(zero_ng).neg_()
        d_dropout_ng.view(-1).index_add_(0, counts.positions, positive)
        return slope_ng, (slope_n * weight_n)[:, None], d_theta_g, d_dropout_ng.mul_(weight_n[:, None]), None


def _per_library(values_n1: torch.Tensor, library_n1: torch.Tensor) -> torch.Tensor:
    """Zero of a cell without a library, whose means are all zero."""
    return torch.where(library_n1 > 0, values_n1 / library_n1, torch.where(library_n1 == 0, 0.0, library_n1))


def softmax_negative_log_likelihood(
    likelihood: str,
    counts: Counts,
    logits_ng: torch.Tensor,
    log_library_n1: torch.Tensor,
    theta_g: torch.Tensor | None = None,
    dropout_ng: torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each cell, in nats, where means are ``library * softmax(logits)``; differentiable once.

    Parameters
    ----------
    likelihood
        ``"nb"``, ``"zinb"`` or ``"poisson"``.
    counts
        The counts.
    logits_ng
        Shape (cells, genes).
    log_library_n1
        Logs of the library sizes, shape (cells, 1).
    theta_g
        Inverse dispersions of the genes.
    dropout_ng
        Logits of zero inflation, shape (cells, genes).

    Returns
    -------
    Shape (cells,).
    """
    if likelihood == "poisson":
        return _Poisson.apply(logits_ng, log_library_n1, counts)
    if likelihood == "nb":
        return _NegativeBinomial.apply(logits_ng, log_library_n1, theta_g, counts)
    return _ZeroInflatedNegativeBinomial.apply(logits_ng, log_library_n1, theta_g, dropout_ng, counts)
