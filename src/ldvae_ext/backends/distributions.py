"""Distributions that scvi-tools' ``loss`` is given: posteriors and priors with a fused KL divergence, known likelihoods."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributions import Normal, register_kl


class UncheckedNormal(Normal):
    """A normal distribution whose parameters are not checked: values that are not finite are found in the loss."""

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(loc, scale, validate_args=False)


class Prior(UncheckedNormal):
    """A prior without parameters to learn."""


@register_kl(UncheckedNormal, Prior)
def _kl(posterior: UncheckedNormal, prior: Prior) -> torch.Tensor:
    return _Divergence.apply(posterior.loc, posterior.scale, prior.loc, prior.scale)


class _Divergence(Function):
    """``KL(N(m, s) || N(m0, s0)) = (r + ((m - m0) / s0)^2 - 1 - log r) / 2`` with ``r = (s / s0)^2``."""

    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor, scale: torch.Tensor, mean_0: torch.Tensor, scale_0: torch.Tensor) -> Any:
        ratio = (scale / scale_0).square_()
        distance = (mean - mean_0).div_(scale_0)
        ctx.save_for_backward(distance, ratio, scale, scale_0)
        return 0.5 * (ratio + distance.square() - 1 - ratio.log())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: torch.Tensor) -> Any:
        distance, ratio, scale, scale_0 = ctx.saved_tensors
        return weight * distance / scale_0, weight * (ratio - 1) / scale, None, None


class KnownLikelihood:
    """Distribution of counts whose log-likelihood has been computed, summed over genes.

    Parameters
    ----------
    loss_n
        Negative log-likelihood of each cell, shape (cells,), in nats.
    """

    def __init__(self, loss_n: torch.Tensor) -> None:
        self._loss_n = loss_n

    def log_prob(self, _x_ng: torch.Tensor) -> torch.Tensor:
        """Log-likelihood of each cell, shape (cells, 1)."""
        return -self._loss_n.unsqueeze(-1)
