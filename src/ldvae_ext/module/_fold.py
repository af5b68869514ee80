"""A linear layer and its batch norm in one, in training: the statistics of a minibatch are those of the layer's inputs."""

from __future__ import annotations

from typing import Any

import torch
from scvi.nn import FCLayers
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# With more inputs than these the covariance costs more than it saves.
_MOST_INPUTS = 48


class _Fold(Function):
    """Weights and intercept that a linear layer has behind its batch norm.

    With mean m and covariance C of the inputs over the minibatch, output g has the mean ``W_g m`` and the variance
    ``v_g = W_g C W_g'``, so that the layer is ``F a + c`` with ``F_g = gamma_g W_g / sqrt(v_g + eps)``, ``c = beta - F m``.
    Gradients pass through m and C, as they do through the statistics of a batch norm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_np: torch.Tensor,
        weight_gp: torch.Tensor,
        gamma_g: torch.Tensor,
        beta_g: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, ...]:
        wide_np = input_np.double()
        mean_p = wide_np.mean(0)
        centred_np = wide_np - mean_p
        covariance_pp = (centred_np.t() @ centred_np / len(input_np)).to(weight_gp.dtype)
        mean_p, centred_np = mean_p.to(weight_gp.dtype), centred_np.to(weight_gp.dtype)
        spread_gp = weight_gp @ covariance_pp
        variance_g = (spread_gp * weight_gp).sum(1).clamp_(min=0)
        inverse_g = torch.rsqrt(variance_g + eps)
        folded_gp = weight_gp * (gamma_g * inverse_g)[:, None]
        ctx.save_for_backward(centred_np, mean_p, weight_gp, gamma_g, inverse_g, spread_gp, folded_gp)
        means_g = weight_gp @ mean_p
        ctx.mark_non_differentiable(means_g, variance_g)
        return folded_gp, beta_g - folded_gp @ mean_p, means_g, variance_g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_folded_gp: torch.Tensor, d_beta_g: torch.Tensor, *_: torch.Tensor) -> Any:
        centred_np, mean_p, weight_gp, gamma_g, inverse_g, spread_gp, folded_gp = ctx.saved_tensors
        d_folded_gp = torch.addr(d_folded_gp, d_beta_g, mean_p, alpha=-1)
        along_g = (weight_gp * d_folded_gp).sum(1)
        d_variance_g = -0.5 * inverse_g.pow(3) * gamma_g * along_g
        d_weight_gp = (gamma_g * inverse_g)[:, None] * d_folded_gp + (2 * d_variance_g)[:, None] * spread_gp
        d_input_np = None
        if ctx.needs_input_grad[0]:
            d_covariance_pp = weight_gp.t() @ (d_variance_g[:, None] * weight_gp)
            d_mean_p = -(d_beta_g @ folded_gp)
            d_input_np = torch.addmm(d_mean_p, centred_np, d_covariance_pp, alpha=2) / len(centred_np)
        return d_input_np, d_weight_gp, inverse_g * along_g, d_beta_g, None


def affine_outputs(layers: FCLayers, z: torch.Tensor, categories: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Outputs of a linear head of the decoder; the head's own forward, with fewer passes over cells x genes in training.

    Parameters
    ----------
    layers
        A head: one linear layer, with or without batch norm.
    z
        Its inputs, shape (cells, inputs).
    categories
        Codes of the categorical covariates, shape (cells, 1) each.
    """
    linear, norm = layers.fc_layers[0][:2]
    is_usual = (
        norm is not None and norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None
    )
    if not is_usual or linear.weight.shape[1] > min(_MOST_INPUTS, len(z) // 2):
        return layers(z, *categories)
    one_hot = [
        torch.nn.functional.one_hot(codes.squeeze(-1), n_levels).to(z.dtype)
        for n_levels, codes in zip(layers.n_cat_list, categories, strict=False)
        if n_levels > 1
    ]
    inputs = torch.cat([z, *one_hot], dim=-1) if one_hot else z
    folded_gp, intercept_g, mean_g, variance_g = _Fold.apply(inputs, linear.weight, norm.weight, norm.bias, norm.eps)
    if linear.bias is not None:
        # It moves the mean and nothing else: its gradient is zero.
        mean_g, intercept_g = mean_g + linear.bias.detach(), intercept_g + 0 * linear.bias
    with torch.no_grad():
        norm.running_mean.lerp_(mean_g, norm.momentum)
        norm.running_var.lerp_(variance_g * (len(z) / (len(z) - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
    return torch.addmm(intercept_g, inputs, folded_gp.t())
