"""Negative log-likelihoods of sparse counts whose mean is the library times a softmax, differentiated through both.

The terms are those of :mod:`ldvae_ext.backends.likelihood`. Without compiled loops the arrays of cells x genes take the time of
a step: few are made, and each is read few times. For tensors of any type on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ldvae_ext.backends.counts import Counts, per_cell
from ldvae_ext.backends.likelihood import add_at_counts, at_counts, negative_binomial_terms, zero_inflated_terms


class _NegativeBinomial(Function):
    """Loss of logits, log libraries of shape (cells, 1) and inverse dispersions of the genes.

    A gene without counts has the derivatives ``theta r / (1 + r)`` in log mu and ``log(1 + r) - theta / (theta + eps) r / (1 + r)``
    in theta; counts add their terms.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_ng: torch.Tensor, log_library_n1: torch.Tensor, theta_g: torch.Tensor, counts: Counts
    ) -> torch.Tensor:
        library_n1 = torch.exp(log_library_n1)
        mu_ng = torch.softmax(logits_ng, dim=-1).mul_(library_n1)
        inverse_g, ratio_ng, log_total_ng, of_counts = negative_binomial_terms(counts, mu_ng, theta_g)
        loss_n = log_total_ng @ theta_g - per_cell(counts, of_counts.log_likelihood)
        share_ng = _share(ratio_ng)
        d_log_mu = of_counts.x * of_counts.mu * of_counts.d_mu
        d_log_library_n = share_ng @ theta_g - per_cell(counts, d_log_mu)
        ctx.counts = counts
        ctx.save_for_backward(
            mu_ng, library_n1, theta_g, inverse_g, log_total_ng, share_ng, d_log_mu, of_counts.d_theta, d_log_library_n
        )
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        return *_gradients(ctx.counts, weight_n, *ctx.saved_tensors), None


def _share(ratio_ng: torch.Tensor) -> torch.Tensor:
    """``r / (1 + r)``, in place: at this size new memory takes the time."""
    return ratio_ng.reciprocal_().add_(1).reciprocal_()


def _gradients(
    counts: Counts,
    weight_n: torch.Tensor,
    mu_ng: torch.Tensor,
    library_n1: torch.Tensor,
    theta_g: torch.Tensor,
    inverse_g: torch.Tensor,
    log_total_ng: torch.Tensor,
    share_ng: torch.Tensor,
    d_log_mu: torch.Tensor,
    d_theta: torch.Tensor,
    d_log_library_n: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in logits, log libraries and theta of the weighted sum of losses.

    ``d_log_mu`` and ``d_theta`` are the contributions of counts to the derivatives in log mu and theta.
    """
    d_logits_ng = share_ng * theta_g
    add_at_counts(counts, d_logits_ng, d_log_mu, -1.0)
    # Through the softmax: minus each gene's share of the sum over genes.
    d_logits_ng.addcmul_(mu_ng, _per_library(d_log_library_n[:, None], library_n1), value=-1).mul_(weight_n[:, None])
    d_theta_g = weight_n @ log_total_ng - theta_g * inverse_g * (weight_n @ share_ng)
    d_theta_g.index_add_(0, counts.indices, weight_n[counts.cells] * d_theta, alpha=-1)
    return d_logits_ng, (d_log_library_n * weight_n)[:, None], d_theta_g


class _Poisson(Function):
    """Loss of logits and log libraries of shape (cells, 1). The means of a cell add up to its library."""

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
        d_logits_ng = torch.exp(log_share_ng).mul_((total_n * weight_n)[:, None])
        d_logits_ng.view(-1).index_add_(0, counts.positions, weight_n[counts.cells] * x, alpha=-1)
        return d_logits_ng, ((library_n - total_n) * weight_n)[:, None], None


class _ZeroInflatedNegativeBinomial(Function):
    """As :class:`_NegativeBinomial`, with logits of zero inflation, shape (cells, genes)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_ng: torch.Tensor,
        log_library_n1: torch.Tensor,
        theta_g: torch.Tensor,
        dropout_ng: torch.Tensor,
        counts: Counts,
    ) -> torch.Tensor:
        library_n1 = torch.exp(log_library_n1)
        mu_ng = torch.softmax(logits_ng, dim=-1).mul_(library_n1)
        loss_n, terms, zero_ng, positive = zero_inflated_terms(counts, mu_ng, theta_g, dropout_ng)
        inverse_g, ratio_ng, log_total_ng, of_counts = terms
        share_ng = _share(ratio_ng)
        theta, inverse = theta_g[counts.indices], inverse_g[counts.indices]
        log_total, share = at_counts(counts, log_total_ng), at_counts(counts, share_ng)
        d_log_mu = of_counts.x * of_counts.mu * of_counts.d_mu - positive * theta * share
        d_theta = of_counts.d_theta - positive * (log_total - theta * inverse * share)
        log_total_ng.mul_(zero_ng)
        share_ng.mul_(zero_ng)
        d_log_library_n = share_ng @ theta_g - per_cell(counts, d_log_mu)
        ctx.counts = counts
        ctx.save_for_backward(
            mu_ng,
            library_n1,
            theta_g,
            inverse_g,
            log_total_ng,
            share_ng,
            d_log_mu,
            d_theta,
            d_log_library_n,
            dropout_ng,
            zero_ng,
            positive,
        )
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        *of_mean, dropout_ng, zero_ng, positive = ctx.saved_tensors
        d_dropout_ng = torch.sigmoid(-dropout_ng).sub_(zero_ng).neg_()
        add_at_counts(ctx.counts, d_dropout_ng, positive)
        return *_gradients(ctx.counts, weight_n, *of_mean), d_dropout_ng.mul_(weight_n[:, None]), None


def _per_library(values_n1: torch.Tensor, library_n1: torch.Tensor) -> torch.Tensor:
    """Values divided by the library; 0 for a cell without a library, whose means are all 0."""
    return torch.where(library_n1 > 0, values_n1 / library_n1, torch.where(library_n1 == 0, 0.0, library_n1))


def softmax_negative_log_likelihood(
    likelihood: str,
    counts: Counts,
    logits_ng: torch.Tensor,
    log_library_n1: torch.Tensor,
    theta_g: torch.Tensor | None = None,
    dropout_ng: torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each cell, in nats, for means ``library * softmax(logits)``; differentiable once.

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
    if likelihood != "zinb":
        msg = f"`likelihood` must be 'nb', 'zinb' or 'poisson'; got {likelihood!r}."
        raise ValueError(msg)
    return _ZeroInflatedNegativeBinomial.apply(logits_ng, log_library_n1, theta_g, dropout_ng, counts)
