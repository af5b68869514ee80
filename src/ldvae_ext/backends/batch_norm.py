"""Batch norm of tensors: folded into its linear layer, read into numpy, and its running statistics updated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ldvae_ext.core import BatchNorm


def fold_batch_norm(linear: torch.nn.Linear, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear layer and its batch norm in evaluation mode as one affine map; differentiable.

    See :func:`ldvae_ext.core.fold.fold_batch_norm` for the formula.

    Parameters
    ----------
    linear
        The linear layer.
    norm
        Its batch norm; None if there is none.

    Returns
    -------
    Weight, shape (inputs, outputs), and intercept, shape (outputs,).
    """
    weight_pg = linear.weight.t()
    if norm is None:
        return weight_pg, linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    scale_g = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift_g = norm.running_mean if linear.bias is None else norm.running_mean - linear.bias
    return weight_pg * scale_g, norm.bias - shift_g * scale_g


def batch_norm_of(norm: torch.nn.BatchNorm1d) -> BatchNorm:
    """Statistics and parameters of a batch norm, in float64.

    Parameters
    ----------
    norm
        The layer.
    """

    def array(tensor: Any) -> np.ndarray:
        return tensor.detach().cpu().numpy().astype(np.float64)

    return BatchNorm(
        running_mean=array(norm.running_mean),
        running_var=array(norm.running_var),
        gamma=array(norm.weight),
        beta=array(norm.bias),
        eps=norm.eps,
    )


@torch.no_grad()
def update_running_statistics(norm: Any, mean_g: torch.Tensor, variance_g: torch.Tensor, n_cells: int) -> None:
    """Update the moving averages of a batch norm, as torch does it.

    Parameters
    ----------
    norm
        The layer; see :func:`ldvae_ext.backends.layers.has_moving_averages`.
    mean_g, variance_g
        Mean and (biased) variance of the minibatch, shape (outputs,).
    n_cells
        Number of cells in the minibatch.
    """
    norm.running_mean.lerp_(mean_g, norm.momentum)
    norm.running_var.lerp_(variance_g * (n_cells / (n_cells - 1)), norm.momentum)
    norm.num_batches_tracked.add_(1)
